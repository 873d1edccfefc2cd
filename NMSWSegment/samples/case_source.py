"""Random training samples of one labelled CT."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from NMSWSegment.data.prepared_case import BODY_THRESHOLD_HU, PreparedCase, ijk_to_ras_of
from NMSWSegment.data.training_sample import UNKNOWN_LABEL, TrainingSample
from NMSWSegment.files.model_grid import model_grid_around
from NMSWSegment.files.orientation import Triple_mm
from NMSWSegment.samples.acquisition import AIR_HU, HU_RANGE, add_noise, blur, lower_resolution
from NMSWSegment.samples.augment import PaperIntensity, paper_warp
from NMSWSegment.samples.case_memory import CaseMemory, LoadedCase
from NMSWSegment.samples.scan_range import random_box
from NMSWSegment.samples.synthesis import SynthesisOptions, add_pathology, cut
from NMSWSegment.samples.warp import Warp, chance, is_outside, nearest_flat_index, random_warp, trilinear, uniform

GAMMA_WINDOW_HU = (-250.0, 500.0)
"""The gamma works inside this window, the paper's; its range is narrower than the paper's, which would turn a liver into fat (1.35: 40 to -50 HU)."""


OTHER_PHASE_SHARE = 0.12
"""Of the classes whose intensity is shifted, those that are shifted as far as another phase of contrast medium or other contents would."""


class CaseSource:
    """One labelled CT; every draw is another sample of it."""

    def __init__(self, name: str, load: Callable[[], PreparedCase], *, memory: CaseMemory, paper_intensity: PaperIntensity | None = None) -> None:
        """Args:
        name: of the case.
        load: reads it; called again when the memory had to forget it.
        memory: keeps it, on the device where samples are drawn.
        paper_intensity: augments whole volumes as the paper does; None draws warped, re-contrasted and re-scanned parts.
        """
        self.name = name
        self._load, self._memory, self._paper_intensity = load, memory, paper_intensity

    def draw(self, generator: torch.Generator, options: SynthesisOptions) -> TrainingSample:
        """A random sample; the same state of the generator gives the same one."""
        loaded = self._memory.get(self, self._load)
        if self._paper_intensity:
            whole = whole_warp(loaded, spacing_mm=self._memory.spacing_mm)
            intensity, labels = resampled(loaded, paper_warp(whole, generator=generator))
            intensity = self._paper_intensity(intensity, generator=generator)
        else:
            intensity, labels = _scan(loaded, options=options, generator=generator)
        return TrainingSample(name=self.name, intensity=intensity, labels=labels)

    def whole(self) -> TrainingSample:
        """The case as it is, on the model's grid."""
        loaded = self._memory.get(self, self._load)
        intensity, labels = resampled(loaded, whole_warp(loaded, spacing_mm=self._memory.spacing_mm))
        return TrainingSample(name=self.name, intensity=intensity, labels=labels)


def _scan(loaded: LoadedCase, *, options: SynthesisOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random patient and scan made of a case; labels are 255 above and below the source, 0 beside it."""
    box_mm = random_box(loaded.extent, min_range_mm=options.min_range_mm, generator=generator)
    warp = random_warp(box_mm, limits=options.warp, spacing_mm=options.spacing_mm, max_voxels=options.max_voxels, generator=generator)
    intensity, labels = resampled(loaded, warp)
    body = intensity > max(BODY_THRESHOLD_HU, loaded.outside)
    intensity = _recontrasted(intensity, labels, generator)
    add_pathology(intensity, labels, options=options, generator=generator)
    intensity = _rescanned(intensity, body, spacing_mm=options.spacing_mm, generator=generator)
    cut(intensity, labels, options=options, generator=generator)
    return intensity.clamp_(*HU_RANGE), labels


def whole_warp(loaded: LoadedCase, *, spacing_mm: Triple_mm) -> Warp:
    """The warp that shows the whole case on the model's grid, unchanged: what inference would make of it."""
    shape = tuple(loaded.labels.shape)
    model_grid = model_grid_around(shape, ijk_to_ras_of(loaded.spacing_mm, loaded.direction), spacing_mm=spacing_mm)
    center_mm = torch.tensor([(length - 1) / 2 * own for length, own in zip(shape, loaded.spacing_mm)])
    return Warp(shape=model_grid.shape, spacing_mm=spacing_mm, matrix=torch.eye(3), center_mm=center_mm, control_mm=torch.zeros(3, 4, 4, 4))


def resampled(loaded: LoadedCase, warp: Warp) -> tuple[Tensor, Tensor]:
    """Intensity (trilinear) and labels (nearest) through one warp of upright space; the lower bound and background beside the source, 255 above and below."""
    labels = loaded.labels
    upright = replace(warp, matrix=torch.tensor(loaded.direction).T @ warp.matrix)
    index = upright.source_index(loaded.spacing_mm, device=labels.device)
    flat = nearest_flat_index(index, shape=tuple(labels.shape))
    warped_labels = labels.reshape(-1).index_select(0, flat).reshape(warp.shape)
    beside = is_outside(index, size=labels.shape[1], axis=1) | is_outside(index, size=labels.shape[2], axis=2)
    beyond = is_outside(index, size=labels.shape[0], axis=0)
    for axis, block in enumerate(loaded.blocks):  # voxels of the case -> blocks
        index[axis].sub_((block - 1) / 2).div_(block)
    warped = trilinear(loaded.intensity[None], index)[0]
    warped[beside], warped_labels[beside] = loaded.outside, 0
    warped_labels[beyond] = UNKNOWN_LABEL
    return warped, warped_labels


def _recontrasted(intensity: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Another scanner and contrast phase: shift, scale, gamma in the soft-tissue window, and a shift of each class."""
    if chance(generator, 0.7):
        shift_hu = torch.randn(256, generator=generator) * uniform(generator, 5, 30)
        shift_hu[torch.rand(256, generator=generator) < OTHER_PHASE_SHARE] *= 3
        shift_hu[[0, UNKNOWN_LABEL]] = 0.0
        intensity = intensity + shift_hu.to(labels.device)[labels.int()]
    if chance(generator, 0.3):
        low, high = GAMMA_WINDOW_HU
        share = ((intensity - low) / (high - low)).clamp(0, 1)
        intensity = intensity + (share ** uniform(generator, 0.88, 1.14) - share) * (high - low)
    return (intensity - AIR_HU) * uniform(generator, 0.96, 1.04) + AIR_HU + uniform(generator, -15, 15)


def _rescanned(intensity: Tensor, body: Tensor, *, spacing_mm: Triple_mm, generator: torch.Generator) -> Tensor:
    """Sometimes lower resolution, more blur, more noise; a real scan already has its own."""
    if chance(generator, 0.2):
        intensity = lower_resolution(intensity, generator=generator)
    if chance(generator, 0.35):
        intensity = blur(intensity, spacing_mm=spacing_mm, generator=generator)
    if chance(generator, 0.5):
        add_noise(intensity, body, generator=generator)
    return intensity
