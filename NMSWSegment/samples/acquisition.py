"""What a scanner adds to a body: the table, arms, field of view, blur, thick slices, noise and streaks.

All functions change the intensity (HU, (D, H, W) float32, S-A-R) in place or return a new one; none moves a label.
"""

import math

import torch
from torch import Tensor

from NMSWSegment.data.axis_filters import apply_along_axes
from NMSWSegment.files.orientation import Triple_mm
from NMSWSegment.samples.warp import chance, gaussian_matrix, rotation, slice_matrix, uniform, white_noise

AIR_HU = -1000.0
OUTSIDE_FIELD_HU = -1024.0
HU_RANGE = (-1024.0, 3071.0)
TURNED_SHARE, TURN_RAD = 0.7, 0.35
"""Of the boxes of turn_field_of_view, those that are turned, about all three axes by up to so much; the others are smaller only."""
TURNED_HALF = (0.36, 0.54)
"""From the middle to a face of such a box, as a share of the sample."""


def add_table(intensity: Tensor, body: Tensor, *, spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Paint a flat or curved table with its pad under the back, in air only.

    Args:
        intensity: HU, changed in place.
        body: where the patient is, (D, H, W) bool.
        spacing_mm: KJI.
    """
    height, width = intensity.shape[1:]
    half_width_mm = uniform(generator, 190, 270)
    sag_mm = uniform(generator, 15, 60) if chance(generator, 0.6) else 0.0
    thickness_mm, shell_mm, pad_mm = uniform(generator, 20, 70), uniform(generator, 1, 4), uniform(generator, 0, 25)
    shell_hu, foam_hu, pad_hu = uniform(generator, -500, 250), uniform(generator, -970, -800), uniform(generator, -980, -850)
    gap_mm, shift_mm = uniform(generator, 0, 8), uniform(generator, -25, 25)
    right_mm = (torch.arange(width, device=intensity.device) - (width - 1) / 2) * spacing_mm[2] - shift_mm
    sag = sag_mm * (right_mm / 220) ** 2
    silhouette = body.any(dim=0)  # (H, W)
    if not silhouette.any():
        return
    lowest_mm = torch.where(silhouette.any(dim=0), silhouette.int().argmax(dim=0) * spacing_mm[1], math.inf)
    top_mm = (lowest_mm - sag).min() - gap_mm + sag  # (W), along anterior
    depth_mm = top_mm - torch.arange(height, device=intensity.device)[:, None] * spacing_mm[1]  # (H, W), positive under the top
    layers = ((0.0, pad_mm, pad_hu), (pad_mm, pad_mm + shell_mm, shell_hu), (pad_mm + shell_mm, pad_mm + thickness_mm, foam_hu))
    layers += ((pad_mm + thickness_mm, pad_mm + thickness_mm + shell_mm, shell_hu),)
    added = sum(_layer_share(depth_mm, start, stop, spacing_mm[1]) * (hu - AIR_HU) for start, stop, hu in layers)
    added = added * (right_mm.abs() < half_width_mm)
    air_share = ((-intensity - 700) / 300).clamp_(0, 1).mul_(~body)
    intensity.add_(air_share.mul_(added))


def add_arms(intensity: Tensor, body: Tensor, *, spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Paint arms at the sides, or raised beside the shoulders, in air only; the box may cut them as a field of view does."""
    sides = body.any(dim=0).any(dim=0).nonzero()
    if not len(sides):
        return
    raised = chance(generator, 0.5)
    start = int(intensity.shape[0] * uniform(generator, 0.55, 0.85)) if raised else 0
    tilt, anterior = uniform(generator, -0.15, 0.15), uniform(generator, 0.3, 0.6)
    fat_hu, muscle_hu, bone_hu = uniform(generator, -120, -85), uniform(generator, 35, 75), uniform(generator, 350, 900)
    radius_mm = uniform(generator, 33, 55)
    for side in (-1, 1):
        edge = int(sides[0] if side < 0 else sides[-1]) * spacing_mm[2]
        right_mm = edge + side * (radius_mm + uniform(generator, 2, 25)) * (0.7 if raised else 1.0)
        center_mm = (anterior * intensity.shape[1] * spacing_mm[1] + uniform(generator, -25, 25), right_mm)
        rho = _cylinder(intensity[start:].shape, center_mm, tilt, radius_mm, uniform(generator, 0.8, 1.25), spacing_mm, intensity.device)
        arm = torch.where(rho < 0.8, muscle_hu, fat_hu)
        arm = torch.where(rho < 0.27, bone_hu, arm)
        arm = torch.where(rho < 0.15, 60.0, arm)
        share = ((1 - rho) * radius_mm / spacing_mm[1] + 0.5).clamp(0, 1) * ~body[start:]
        intensity[start:] += share * (arm - intensity[start:]).clamp(min=0)


def cut_field_of_view(intensity: Tensor, labels: Tensor, *, generator: torch.Generator) -> None:
    """Blank everything outside a circular reconstruction field; what is not shown is background."""
    height, width = intensity.shape[1:]
    radius = max(height, width) / 2 * uniform(generator, 0.88, 1.1)
    rows = torch.arange(height, device=intensity.device)[:, None] - (height - 1) / 2
    columns = torch.arange(width, device=intensity.device) - (width - 1) / 2
    outside = rows**2 + columns**2 > radius**2
    intensity[:, outside] = OUTSIDE_FIELD_HU
    labels[:, outside] = 0


def turn_field_of_view(intensity: Tensor, labels: Tensor, *, spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Blank everything outside a box that is turned or smaller than the sample, what an oblique or padded volume looks like once it is upright; background there."""
    angles = [uniform(generator, -1, 1) * TURN_RAD for _ in range(3)] if chance(generator, TURNED_SHARE) else (0.0, 0.0, 0.0)
    matrix = rotation(angles).tolist()
    axes = [(torch.arange(size, device=intensity.device) - (size - 1) / 2) * step for size, step in zip(intensity.shape, spacing_mm)]
    outside = torch.zeros(intensity.shape, dtype=torch.bool, device=intensity.device)
    for row, size, step in zip(matrix, intensity.shape, spacing_mm):
        along = (row[0] * axes[0])[:, None, None] + (row[1] * axes[1])[:, None] + row[2] * axes[2]
        low, high = (uniform(generator, *TURNED_HALF) * size * step for _ in range(2))
        outside |= (along < -low) | (along > high)
    intensity[outside] = OUTSIDE_FIELD_HU
    labels[outside] = 0


def blur(intensity: Tensor, *, spacing_mm: Triple_mm, generator: torch.Generator) -> Tensor:
    """The reconstruction's point spread, and sometimes thick slices interpolated back to the model's spacing."""
    in_plane = uniform(generator, 0.0, 0.75) if chance(generator, 0.7) else 0.0
    through = uniform(generator, 0.0, 0.8) if chance(generator, 0.5) else 0.0
    sigmas = (through, in_plane, in_plane)
    matrices = [gaussian_matrix(size, sigma_voxels=sigma) for size, sigma in zip(intensity.shape, sigmas)]
    if chance(generator, 0.25):
        thickness = max(1.0, uniform(generator, 4.5, 8.0) / spacing_mm[0])
        matrices[0] = slice_matrix(intensity.shape[0], thickness_voxels=thickness, phase=uniform(generator, 0, 1)) @ matrices[0]
    return apply_along_axes(intensity, tuple(matrices))


def lower_resolution(intensity: Tensor, *, generator: torch.Generator) -> Tensor:
    """A coarser scan on the same grid: up to twice the voxel size, the same for the two axes of a slice."""
    in_plane, through = uniform(generator, 1.0, 2.0), uniform(generator, 1.0, 2.0)
    matrices = [slice_matrix(size, thickness_voxels=width, phase=0.5) for size, width in zip(intensity.shape, (through, in_plane, in_plane))]
    return apply_along_axes(intensity, tuple(matrices))


def add_noise(intensity: Tensor, body: Tensor, *, generator: torch.Generator) -> None:
    """Noise of 3 to 35 HU with the grain of a reconstruction, sometimes with horizontal streaks where the body is wide."""
    sigma_hu = math.exp(uniform(generator, math.log(3), math.log(35)))
    grain = uniform(generator, 0.0, 0.9)
    noise = white_noise(intensity.shape, generator=generator, device=intensity.device)
    if grain > 0.3:
        matrices = [gaussian_matrix(size, sigma_voxels=grain * share) for size, share in zip(noise.shape, (0.7, 1.0, 1.0))]
        noise = apply_along_axes(noise, tuple(matrices))
    noise *= sigma_hu / float(noise[::4, ::4, ::4].std())
    if chance(generator, 0.2):
        width = body.float().mean(dim=1).mean(dim=1)  # (D,)
        strength = (width / width.max().clamp(min=1e-3)) ** 4 * uniform(generator, 0.3, 1.2) * sigma_hu
        streaks = white_noise(intensity.shape, generator=generator, device=intensity.device)
        streaks = torch.matmul(streaks, gaussian_matrix(streaks.shape[2], sigma_voxels=8.0).to(streaks.device))
        noise += streaks * (strength / float(streaks[::4, ::4, ::4].std()))[:, None, None]
    # noise is weaker in air and lung, where few photons are lost
    noise *= (intensity * 0.0006 + 0.95).clamp_(0.35, 1.0)
    intensity += noise


def _layer_share(depth_mm: Tensor, start_mm: float, stop_mm: float, voxel_mm: float) -> Tensor:
    """Share of each voxel that lies between two depths."""
    upper = (depth_mm + voxel_mm / 2).clamp(max=stop_mm)
    lower = (depth_mm - voxel_mm / 2).clamp(min=start_mm)
    return ((upper - lower) / voxel_mm).clamp(0, 1)


def _cylinder(
    shape: torch.Size, center_mm: tuple[float, float], tilt: float, radius_mm: float, aspect: float, spacing_mm: Triple_mm, device: torch.device
) -> Tensor:
    """Distance from a tilted axis relative to the radius, (D, H, W); the axis runs along superior through (anterior, right)."""
    rise_mm = (torch.arange(shape[0], device=device) - shape[0] / 2) * spacing_mm[0] * tilt
    anterior = torch.arange(shape[1], device=device) * spacing_mm[1] - center_mm[0] - rise_mm[:, None]  # (D, H)
    right = (torch.arange(shape[2], device=device) * spacing_mm[2] - center_mm[1]) * aspect
    return ((anterior**2)[:, :, None] + right**2).sqrt_() / radius_mm
