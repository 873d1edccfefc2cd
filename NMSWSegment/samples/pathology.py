"""What healthy label maps and most scans do not show: ascites around the abdominal organs, effusion in the lungs, bones that have lost or gained mineral.

All work on HU (D, H, W), S-A-R, and labels of the same shape, on the device where they lie.
"""

import torch
from torch import Tensor

from NMSWSegment.files.orientation import Triple_mm
from NMSWSegment.samples.warp import smooth_noise, uniform

ABDOMINAL_WORDS = ("liver", "spleen", "stomach", "bowel", "intestine", "colon", "bladder", "pancreas")
LUNG_WORDS = ("lung",)
BONE_WORDS = ("vertebra", "rib", "sternum", "sacrum", "hip", "femur", "humerus", "scapula", "clavicula", "skull")
MARROW_HU = (-110.0, 10.0)
"""Of marrow without mineral: yellow to red."""
BONE_DENSITY = (0.3, 1.3)
"""Mineral as a multiple of what there was; an old person's vertebrae have a third of a young one's."""
FAT_HU = (-190.0, -25.0)
FLUID_HU = (-5.0, 25.0)
REACH_MM = (8.0, 40.0)
"""How far from an organ ascites fills the fat."""


def add_ascites(intensity: Tensor, labels: Tensor, *, organs: tuple[int, ...], spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Turn the fat around the abdominal organs into fluid, in place; no label changes.

    Args:
        organs: labels of the abdominal organs; nothing happens where none is shown.
        spacing_mm: KJI.
    """
    is_organ = _is_one_of(labels, organs)
    reach_mm, fluid_hu = uniform(generator, *REACH_MM), uniform(generator, *FLUID_HU)
    near = _within(is_organ, [max(1, round(reach_mm / step)) for step in spacing_mm])
    near &= smooth_noise(tuple(labels.shape), length_mm=60.0, spacing_mm=spacing_mm, generator=generator, device=labels.device) > uniform(generator, -2.0, 0.3)
    low, high = FAT_HU
    is_fat = (labels == 0) & near & (intensity > low) & (intensity < high)
    intensity[is_fat] = (intensity[is_fat] - (low + high) / 2) * 0.15 + fluid_hu  # what is left of its grain


def add_effusion(intensity: Tensor, labels: Tensor, *, lungs: tuple[int, ...], spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Fill the posterior part of the lungs with fluid up to a level, in place; what is filled is no lung any more.

    Args:
        lungs: labels of the lungs; nothing happens where none is shown.
        spacing_mm: KJI.
    """
    fluid_hu, share = uniform(generator, *FLUID_HU), uniform(generator, 0.05, 0.5)
    for lung in lungs:
        where = (labels == lung).any(dim=0).any(dim=1).nonzero()[:, 0]
        if len(where) and uniform(generator, 0, 1) < 0.7:
            back, front = int(where[0]), int(where[-1])
            below = back + share * (front - back) * uniform(generator, 0.4, 1.0)
            level = below + 6 / spacing_mm[1] * smooth_noise(
                (labels.shape[0], 1, labels.shape[2]), length_mm=60.0, spacing_mm=spacing_mm, generator=generator, device=labels.device
            )
            filled = (labels == lung) & (torch.arange(labels.shape[1], device=labels.device)[:, None] < level)
            intensity[filled], labels[filled] = fluid_hu, 0


def labels_with(label_names: list[str] | tuple[str, ...], words: tuple[str, ...]) -> tuple[int, ...]:
    """The values of the classes whose name holds one of the words."""
    return tuple(value for value, name in enumerate(label_names, start=1) if any(word in name.lower() for word in words))


def change_bone_density(intensity: Tensor, labels: Tensor, *, bones: tuple[int, ...], generator: torch.Generator) -> None:
    """Scale what lifts the bones above their marrow, in place: inside they come to look like fat or like metal.

    Args:
        bones: labels of bones; nothing happens where none is shown.
    """
    is_bone = _is_one_of(labels, bones)
    marrow_hu, (low, high) = uniform(generator, *MARROW_HU), BONE_DENSITY
    density = low * (high / low) ** uniform(generator, 0, 1)
    intensity[is_bone] = (intensity[is_bone] - marrow_hu) * density + marrow_hu


def _is_one_of(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    """Where a label is one of the values, bool."""
    table = torch.zeros(256, dtype=torch.bool, device=labels.device)
    table[list(values)] = True
    return table[labels.int()]


def _within(mask: Tensor, reach: list[int]) -> Tensor:
    """Voxels in a box of `reach` voxels around the mask, (D, H, W) bool; axis by axis."""
    near = mask[None, None].float()
    for axis, size in enumerate(reach):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * size + 1, size
        near = torch.nn.functional.max_pool3d(near, kernel, stride=1, padding=padding)
    return near[0, 0] > 0
