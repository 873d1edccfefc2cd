"""What the local net of a cascade reads while it trains: the coarse answer, made as wrong as it is on volumes that the coarse net has not seen.

A coarse net knows the volumes it was trained on too well. A local net that reads its answers there learns to believe them; so they are
moved, blurred between classes and sometimes made to forget a class first, each smoothly in space, as real mistakes are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from NMSWSegment.engine.aggregation import CoarseUpsampler
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.nets.nmsw_net import CoarsePrior
from NMSWSegment.samples.warp import chance, smooth_noise, trilinear, uniform

UNDISTURBED_SHARE = 0.15
"""Of the volumes, whose coarse answer stays as it is."""
NOISE_WIDTH = 5.0
"""Coarse voxels; how wide the structures are of what varies in space."""
MOST_SHIFT = 0.65
"""Standard deviation in coarse voxels, along each axis."""
MOST_NOISE = 1.35
"""Standard deviation of what is added to a logit."""
FORGOTTEN_SHARE = 0.25
"""Of the volumes, in which one class becomes unlikely everywhere."""


def disturbed(coarse_logits: Tensor, *, generator: torch.Generator) -> Tensor:
    """Log-probabilities (C, d, h, w) of a coarse net that is less sure and makes more mistakes.

    Args:
        generator: draws on the CPU.

    Source: nnU-Net changes the labels that its cascade reads by morphology for the same reason; smooth noise of logits is ours (docs/deviations.md, D22).
    """
    if chance(generator, UNDISTURBED_SHARE):
        return coarse_logits
    (num_classes, *shape), device = coarse_logits.shape, coarse_logits.device
    shift = _smooth(3, shape, generator=generator, device=device) * uniform(generator, 0, MOST_SHIFT)
    place = torch.stack(torch.meshgrid(*(torch.arange(length, device=device) for length in shape), indexing="ij")) + shift
    logits = trilinear(coarse_logits, place)
    logits = logits.clamp(min=CoarsePrior.LEAST_LOGIT) * uniform(generator, 0.6, 1.4)  # a class at minus infinity could not come back
    logits = logits + _smooth(num_classes, shape, generator=generator, device=device) * uniform(generator, 0, MOST_NOISE)
    if chance(generator, FORGOTTEN_SHARE):
        present = torch.unique(coarse_logits.max(0).indices)
        present = present[present > 0]
        if len(present):
            logits[present[int(torch.randint(len(present), (), generator=generator))]] -= uniform(generator, 2, 8)
    return torch.log_softmax(logits, dim=0)


def parts_of_boxes(coarse_logits: Tensor, boxes: Sequence[tuple[slice, slice, slice]], *, grid: CandidateGrid) -> Tensor:
    """The coarse logits (C, d, h, w) of boxes of whole coarse voxels, (K, C, P/r, P/r, P/r)."""
    upsampler = CoarseUpsampler(coarse_logits, grid=grid)
    return torch.stack([upsampler.part(box) for box in boxes])


def _smooth(channels: int, shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
    """Smooth noise of unit variance in every channel, (channels, *shape); few numbers are drawn on the CPU and interpolated on the device."""
    noise = (smooth_noise(tuple(shape), length_mm=NOISE_WIDTH, spacing_mm=(1.0, 1.0, 1.0), generator=generator, device=device) for _ in range(channels))
    return torch.stack(list(noise))
