"""Random geometry of a training sample: the scanned box, the warp from it into the source, and separable filters.

Arrays are S-A-R: axis 0 grows to superior, 1 to anterior, 2 to the patient's right. Source points are millimetres along
these axes, 0 at the center of the source's first voxel. No warp mirrors: the sides of the body are classes of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from NMSWSegment.data.axis_filters import apply_along_axes
from NMSWSegment.files.orientation import Triple_mm

Triple = tuple[int, int, int]

INJECTIVE_SHARE = 0.4
"""A cubic B-spline displacement cannot fold while its coefficients stay under this share of the control spacing in 3D.

Source: Choi and Lee 2000, Injectivity conditions of 2D and 3D uniform cubic B-spline functions (bound 1 / 2.479).
"""


@dataclass(frozen=True)
class WarpLimits:
    """Largest random deformation of a body."""

    rotation_rad: Triple_mm = (0.3, 0.2, 0.2)
    """About the superior, anterior and right axis."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Smallest and largest size of a body relative to its source."""
    shear: float = 0.06
    """Largest off-diagonal entry."""
    elastic_mm: float = 12.0
    """Largest coefficient of the smooth displacement."""
    control_spacing_mm: float = 45.0
    """Distance of the displacement's control points."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale} is not an increasing pair of positive numbers; a negative scale would mirror")
        if self.elastic_mm > INJECTIVE_SHARE * self.control_spacing_mm:
            raise ValueError(f"elastic_mm {self.elastic_mm} may fold; keep it under {INJECTIVE_SHARE} of control_spacing_mm {self.control_spacing_mm}")


@dataclass(frozen=True)
class Warp:
    """For every output voxel the source point that it shows: matrix (p - middle) + center + displacement."""

    shape: Triple
    """Output voxels, S-A-R."""
    spacing_mm: Triple_mm
    matrix: Tensor
    """Output millimetres to source millimetres, (3, 3)."""
    center_mm: Tensor
    """Source point of the output's middle, (3,)."""
    control_mm: Tensor
    """B-spline coefficients of the displacement, (3, a, b, c)."""
    axis_shifts_mm: tuple[Tensor, Tensor, Tensor] | None = None
    """How far a voxel looks along each output axis before the matrix, (D,), (H,), (W,)."""

    def source_index(self, source_spacing_mm: Triple_mm, *, device: torch.device | str = "cpu") -> Tensor:
        """Continuous source index of every output voxel center, (3, D, H, W)."""
        axes = [(torch.arange(size, device=device) - (size - 1) / 2) * step for size, step in zip(self.shape, self.spacing_mm)]
        if self.axis_shifts_mm:
            axes = [axis + shift.to(device) for axis, shift in zip(axes, self.axis_shifts_mm)]
        splines = [bspline_matrix(size, num_controls=count) for size, count in zip(self.shape, self.control_mm.shape[1:])]
        control_mm, matrix, center_mm = self.control_mm.to(device), self.matrix.tolist(), self.center_mm.tolist()
        index = torch.empty(3, *self.shape, device=device)
        for axis, step in enumerate(source_spacing_mm):
            row = [value / step for value in matrix[axis]]
            plane = row[1] * axes[1][:, None] + row[2] * axes[2] + center_mm[axis] / step
            index[axis] = apply_along_axes(control_mm[axis] / step, splines)
            index[axis] += plane
            index[axis] += (row[0] * axes[0])[:, None, None]
        return index

    def source_step(self, offset_voxels: Triple_mm, source_spacing_mm: Triple_mm) -> Tensor:
        """Source index step of a small step in output voxels (displacement left out), (3,)."""
        offset_mm = torch.tensor(offset_voxels) * torch.tensor(self.spacing_mm)
        return self.matrix @ offset_mm / torch.tensor(source_spacing_mm)


def random_warp(box_mm: Tensor, *, limits: WarpLimits, spacing_mm: Triple_mm, max_voxels: int, generator: torch.Generator) -> Warp:
    """A random affine and elastic warp whose output shows a box of the source.

    Args:
        box_mm: start and stop of the box in source millimetres, (2, 3).
        limits: how strong the deformation may be.
        spacing_mm: output spacing, KJI.
        max_voxels: the output is cropped to this many voxels, evenly at all faces.
        generator: the only source of randomness.
    """
    matrix = _random_matrix(limits, generator)
    scale = torch.linalg.norm(matrix, dim=0)
    size_mm = (box_mm[1] - box_mm[0]) / scale
    shape = [max(8, math.floor(float(length) / step)) for length, step in zip(size_mm, spacing_mm)]
    shrink = min(1.0, (max_voxels / math.prod(shape)) ** (1 / 3))
    shape = tuple(max(8, int(size * shrink)) for size in shape)
    counts = [max(1, math.ceil(size * step / limits.control_spacing_mm)) + 3 for size, step in zip(shape, spacing_mm)]
    strength = limits.elastic_mm * uniform(generator, 0.2, 1.0)
    control = (torch.rand(3, *counts, generator=generator) * 2 - 1) * strength
    return Warp(shape=shape, spacing_mm=spacing_mm, matrix=matrix, center_mm=box_mm.mean(dim=0), control_mm=control)


def nearest_flat_index(index: Tensor, *, shape: Triple) -> Tensor:
    """Flat index of the nearest source voxel, clamped to the source, (D * H * W) int32; index is (3, D, H, W)."""
    flat = None
    for axis, size in enumerate(shape):
        nearest = index[axis].round().clamp_(0, size - 1).to(torch.int32)
        flat = nearest if flat is None else flat.mul_(size).add_(nearest)
    return flat.reshape(-1)


def is_outside(index: Tensor, *, size: int, axis: int) -> Tensor:
    """Where a continuous index (3, D, H, W) lies beyond a source axis of `size` voxels, (D, H, W) bool."""
    return (index[axis] < -0.5) | (index[axis] > size - 0.5)


def bspline_matrix(size: int, *, num_controls: int) -> Tensor:
    """Values of `num_controls` uniform cubic B-splines at `size` voxels of an axis; rows sum to 1, (size, num_controls)."""
    position = torch.linspace(0, num_controls - 3, size) + 1
    distance = (position[:, None] - torch.arange(num_controls)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far)


def gaussian_matrix(size: int, *, sigma_voxels: float) -> Tensor:
    """Gaussian smoothing of an axis with renormalized borders, (size, size); sigma 0 is the identity."""
    if sigma_voxels <= 0:
        return torch.eye(size)
    distance = torch.arange(size)[:, None] - torch.arange(size)
    weights = torch.exp(-0.5 * (distance / sigma_voxels) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def slice_matrix(size: int, *, thickness_voxels: float, phase: float = 0.0) -> Tensor:
    """Average an axis into slices of `thickness_voxels` and interpolate linearly back, (size, size).

    Args:
        size: voxels of the axis.
        thickness_voxels: slice thickness and distance, at least 1.
        phase: shift of the first slice as a share of the thickness, in [0, 1).
    """
    num_slices = max(2, math.ceil(size / thickness_voxels) + 1)
    centers = (torch.arange(num_slices) + phase - 0.5) * thickness_voxels
    voxels = torch.arange(size)
    covered = (thickness_voxels / 2 + 0.5 - (voxels - centers[:, None]).abs()).clamp(0, 1)
    # the first and last slice may lie outside the volume: they then repeat the border voxel
    nearest = torch.nn.functional.one_hot(centers.round().long().clamp(0, size - 1), size).float()
    covered = torch.where(covered.sum(dim=1, keepdim=True) > 0, covered, nearest)
    average = covered / covered.sum(dim=1, keepdim=True)
    interpolate = (1 - (voxels[:, None] - centers).abs() / thickness_voxels).clamp(min=0)
    return (interpolate / interpolate.sum(dim=1, keepdim=True)) @ average


def white_noise(shape: Sequence[int], *, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Gaussian noise of unit variance; on a GPU drawn there, from a seed that the generator (CPU) gives."""
    if torch.device(device).type == "cpu":
        return torch.randn(*shape, generator=generator)
    own = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    return torch.randn(*shape, generator=own, device=device)


def smooth_noise(shape: Triple, *, length_mm: float, spacing_mm: Triple_mm, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Smooth noise with about unit variance whose structures are `length_mm` wide, (D, H, W)."""
    counts = [max(1, math.ceil(size * step / length_mm)) + 3 for size, step in zip(shape, spacing_mm)]
    control = torch.randn(*counts, generator=generator).to(device)
    matrices = [bspline_matrix(size, num_controls=count) for size, count in zip(shape, counts)]
    # the mean square of a uniform cubic B-spline sum is 0.479 per axis
    return apply_along_axes(control, matrices).mul_(0.479**-1.5)


def trilinear(values: Tensor, index: Tensor) -> Tensor:
    """Values (C, d, h, w) at continuous indices (3, D, H, W), the border repeated beyond it, (C, D, H, W)."""
    grid = index.new_empty(*index.shape[1:], 3)
    for axis, size in enumerate(values.shape[1:]):
        torch.mul(index[axis], 2 / max(size - 1, 1), out=grid[..., 2 - axis]).sub_(1)
    return torch.nn.functional.grid_sample(values[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)[0]


def rotation(angles_rad: Sequence[float]) -> Tensor:
    """Rotation about axis 0, then 1, then 2, (3, 3)."""
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles_rad):
        first, second = [other for other in range(3) if other != axis]
        turn = torch.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One uniform number."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def chance(generator: torch.Generator, probability: float) -> bool:
    """True with a probability."""
    return uniform(generator, 0.0, 1.0) < probability


def _random_matrix(limits: WarpLimits, generator: torch.Generator) -> Tensor:
    """Rotation, shear and scale from output to source millimetres, (3, 3), determinant positive."""
    # the product of two uniform numbers keeps most bodies nearly straight, as on a real table
    matrix = rotation([limit * uniform(generator, -1, 1) * math.sqrt(uniform(generator, 0, 1)) for limit in limits.rotation_rad])
    shear = torch.eye(3) + (torch.rand(3, 3, generator=generator) * 2 - 1).triu(1) * limits.shear
    low, high = math.log(limits.scale[0]), math.log(limits.scale[1])
    common = uniform(generator, low, high)
    sizes = [min(max(common + uniform(generator, 0.4 * low, 0.4 * high), low), high) for _ in range(3)]
    return matrix @ shear @ torch.diag(torch.tensor([math.exp(-size) for size in sizes]))
