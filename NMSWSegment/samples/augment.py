"""The paper's augmentation of whole volumes at the model spacing: its geometry as one warp of the source, its intensities with MONAI's transforms.

Source: paper section 4; no mirroring, because the sides of the body are classes of their own.
"""

import math
from dataclasses import replace

import torch
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandShiftIntensity,
    RandSimulateLowResolution,
)
from monai.utils import convert_to_tensor
from torch import Tensor

from NMSWSegment.samples.warp import Warp, chance, rotation, uniform

SHIFT_VOXELS, SECOND_SHIFT_VOXELS = 50, (50, 10, 10)
"""Of all samples, and once more (KJI) of those that are turned and scaled, as in the published code."""
ROTATION_SHARE, ROTATION_RAD = 0.3, 0.52
SCALE = (0.3, 0.2, 0.2)
"""KJI; the paper's (.2, .2, .3) is H W D."""
DISTORTION_SHARE, DISTORTION, DISTORTION_CELLS = 0.3, 0.05, 5
"""A cell of an axis is wider or narrower by up to this share, as in MONAI's RandGridDistortion."""
GAMMA = (0.7, 1.5)
NOISE_SD = 0.1
"""Of the window; the paper names none, this is MONAI's default."""


def paper_warp(whole: Warp, *, generator: torch.Generator) -> Warp:
    """Translation, rotation with scaling and another translation, and grid distortion as one warp, so that the source is interpolated once (docs/deviations.md, D21).

    Nothing is mirrored (D16).

    Args:
        whole: shows the volume as it is.
    """
    spacing_mm = torch.tensor(whole.spacing_mm)
    shift_mm = (torch.rand(3, generator=generator) * 2 - 1) * SHIFT_VOXELS * spacing_mm
    matrix = whole.matrix
    if chance(generator, ROTATION_SHARE):
        angles = [uniform(generator, -ROTATION_RAD, ROTATION_RAD) for _ in range(3)]
        shift_mm += (torch.rand(3, generator=generator) * 2 - 1) * torch.tensor(SECOND_SHIFT_VOXELS) * spacing_mm
        matrix = rotation(angles) @ torch.diag(torch.tensor([uniform(generator, 1 - limit, 1 + limit) for limit in SCALE])) @ matrix
    axis_shifts_mm = None
    if chance(generator, DISTORTION_SHARE):
        axis_shifts_mm = tuple(distortion(size, generator=generator) * step for size, step in zip(whole.shape, whole.spacing_mm))
    return replace(whole, matrix=matrix, center_mm=whole.center_mm + shift_mm, axis_shifts_mm=axis_shifts_mm)


def distortion(size: int, *, generator: torch.Generator) -> Tensor:
    """How far each voxel of an axis looks along it, in voxels, (size,): cells are stretched at random, the middle of the axis stays.

    Source: MONAI RandGridDistortion, whose map is one of every axis alone.
    """
    cell = math.ceil(size / DISTORTION_CELLS)
    steps = 1 + DISTORTION * (2 * torch.rand(DISTORTION_CELLS, generator=generator) - 1)
    position = torch.cat([torch.zeros(1), steps.repeat_interleave(cell).cumsum(0)])[:size]
    shift = position - torch.arange(size)
    return shift - shift[size // 2]


class PaperIntensity:
    """Changes an intensity; the same state of the generator gives the same result."""

    def __init__(self, *, window: tuple[float, float]) -> None:
        """Args: window: intensities, HU or normalized ones, that the transforms see as 0 and 1; beyond it nothing is left."""
        self._low, self._high = window
        self._transform = Compose(
            [
                RandShiftIntensity(offsets=0.1, prob=0.2),
                RandGaussianNoise(prob=0.1, std=NOISE_SD),
                RandGaussianSmooth(prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
                RandScaleIntensity(factors=0.25, prob=0.15),
                RandSimulateLowResolution(prob=0.25, zoom_range=(0.5, 1.0)),
                RandAdjustContrast(prob=0.3, gamma=GAMMA, retain_stats=True),
                RandAdjustContrast(prob=0.1, gamma=GAMMA, invert_image=True, retain_stats=True),
            ]
        )

    def __call__(self, intensity: Tensor, *, generator: torch.Generator) -> Tensor:
        """Intensity (HU or normalized, (D, H, W), clipped to the window), changed."""
        self._transform.set_random_state(seed=int(torch.randint(2**31, (), generator=generator)))
        share = ((intensity - self._low) / (self._high - self._low)).clamp(0, 1)
        changed = convert_to_tensor(self._transform(share[None])[0], track_meta=False)
        return changed.clamp(0, 1) * (self._high - self._low) + self._low
