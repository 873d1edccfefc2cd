"""One volume through the nets: what a training step computes, and the losses of it (paper Eq. 7).

    coarse logits, importance <- coarse(x_low)
    patches <- differentiable top-k + random candidates
    y_high <- aggregate(coarse logits, local(patches))
    loss = seg(y_low) + seg(y_high) + mean_k seg(y_patch_k) - lambda H(pi)

For baselines each net also trains alone: the coarse net on seg(y_low), the local net on patches around random voxels.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from NMSWSegment.data.training_sample import UNKNOWN_LABEL, TrainingSample
from NMSWSegment.engine.aggregation import aggregate
from NMSWSegment.engine.resampling import coarse_input, normalize_intensity, pad_to_grid, run_coarse
from NMSWSegment.engine.selection import candidate_importance, differentiable_top_k
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.nets.nmsw_net import NMSWNet
from NMSWSegment.training.losses import entropy, segmentation_loss
from NMSWSegment.training.options import TrainOptions

FOREGROUND_SHARE = 2 / 3
"""Of the patches of the local net alone, those around a foreground voxel. Source: paper section 4, 2:1."""


@dataclass(frozen=True)
class Losses:
    """The terms of Eq. 7 for one volume; scalars, 0 where a term takes no part."""

    coarse: Tensor
    high: Tensor
    patch: Tensor
    entropy: Tensor
    total: Tensor

    def values(self) -> Tensor:
        """All terms in the order of the fields, detached, (5,) float32."""
        return torch.stack([getattr(self, field.name).detach().float() for field in fields(self)])


def prepare(sample: TrainingSample, options: TrainOptions) -> tuple[Tensor, Tensor, CandidateGrid]:
    """x (1, 1, D, H, W) in [0, 1], labels (D, H, W) with padding unknown, and the grid: what inference would make of it."""
    grid = CandidateGrid.covering(tuple(sample.intensity.shape), patch_size=options.patch_size, overlap=options.overlap, coarse_factor=options.coarse_factor)
    x = pad_to_grid(normalize_intensity(sample.intensity, options.intensity_points), grid=grid, value=0)
    return x[None, None], pad_to_grid(sample.labels, grid=grid, value=UNKNOWN_LABEL), grid


def volume_losses(net: NMSWNet, x: Tensor, labels: Tensor, *, grid: CandidateGrid, options: TrainOptions, tau: float, generator: torch.Generator) -> Losses:
    """The losses of one volume for what the run trains; arguments as in training_losses.

    Of train = patches they are those of both nets: the coarse net is frozen, so that its terms have no gradient.
    """
    if options.train == "coarse":
        return coarse_losses(net, x, labels, grid=grid, options=options)
    if options.train == "local":
        return local_losses(net, x, labels, options=options, generator=generator)
    return training_losses(net, x, labels, grid=grid, options=options, tau=tau, generator=generator)


def training_losses(net: NMSWNet, x: Tensor, labels: Tensor, *, grid: CandidateGrid, options: TrainOptions, tau: float, generator: torch.Generator) -> Losses:
    """Eq. 7 for one volume.

    Args:
        x: (1, 1, D, H, W); labels: (D, H, W), 255 unknown.
        generator: draws the Gumbel noise and the random candidates (CPU).
    """
    coarse_logits, importance_map = _run_coarse(net, x, grid=grid, options=options)
    importance = candidate_importance(importance_map, grid=grid)
    indices, soft_weights = differentiable_top_k(importance, k=options.top_k_patches, tau=tau, generator=generator)
    indices, soft_weights = _with_random(indices, soft_weights, grid=grid, count=options.random_patches, generator=generator)
    crops = torch.stack([x[(0, slice(None), *grid.slices(index))] for index in indices])
    if options.estimator == "scale":
        crops = crops * soft_weights[:, None, None, None, None]
    deep_logits = _run_local(net, crops, options)
    patch_logits = deep_logits[0]
    patch_labels = torch.stack([labels[grid.slices(index)] for index in indices])
    gates = 1 + soft_weights - soft_weights.detach() if options.estimator == "gate" else None
    y_high, is_first = _high_on_patches(coarse_logits[0].detach(), patch_logits, indices=indices, grid=grid, class_weights=net.class_weights, gates=gates)
    coarse = segmentation_loss(coarse_logits, _coarse_labels(labels, grid=grid))
    high = segmentation_loss(y_high, patch_labels, mask=is_first)
    patch = _mean_patch_loss(deep_logits, patch_labels)
    spread = entropy(importance)
    return Losses(coarse=coarse, high=high, patch=patch, entropy=spread, total=coarse + high + patch - options.entropy_weight * spread)


def coarse_losses(net: NMSWNet, x: Tensor, labels: Tensor, *, grid: CandidateGrid, options: TrainOptions) -> Losses:
    """seg(y_low) alone: the baseline that sees no patch."""
    coarse_logits, _ = _run_coarse(net, x, grid=grid, options=options)
    coarse = segmentation_loss(coarse_logits, _coarse_labels(labels, grid=grid))
    nothing = torch.zeros_like(coarse)
    return Losses(coarse=coarse, high=nothing, patch=nothing, entropy=nothing, total=coarse)


def local_losses(net: NMSWNet, x: Tensor, labels: Tensor, *, options: TrainOptions, generator: torch.Generator) -> Losses:
    """mean_k seg(y_patch_k) over top_k_patches + random_patches patches around random voxels: the local net of a sliding window."""
    boxes = [_random_box(labels, patch_size=options.patch_size, generator=generator) for _ in range(options.top_k_patches + options.random_patches)]
    deep_logits = _run_local(net, torch.stack([x[(0, slice(None), *box)] for box in boxes]), options)
    patch = _mean_patch_loss(deep_logits, torch.stack([labels[box] for box in boxes]))
    nothing = torch.zeros_like(patch)
    return Losses(coarse=nothing, high=nothing, patch=patch, entropy=nothing, total=patch)


def trained_parameters(net: NMSWNet, options: TrainOptions) -> list[torch.nn.Parameter]:
    """What the run trains; everything else is frozen, so that weight decay does not move it."""
    chosen = {"both": [net], "patches": [net.local, net.class_weights], "coarse": [net.coarse.backbone, net.coarse.head], "local": [net.local]}[options.train]
    net.requires_grad_(False)
    for part in chosen:
        part.requires_grad_(True)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _run_coarse(net: NMSWNet, x: Tensor, *, grid: CandidateGrid, options: TrainOptions) -> tuple[Tensor, Tensor]:
    """Coarse logits (1, C, d, h, w) and importance map (d, h, w), float32."""
    with _autocast(x, options):
        x_low = coarse_input(x, grid=grid)
        width, multiple = x_low.shape[4], net.architecture.coarse_multiple
        if max(x_low.shape[2:]) <= multiple:  # instance norm refuses a single voxel at the net's bottom
            x_low = torch.nn.functional.pad(x_low, [0, multiple])
        coarse_logits, importance_map = run_coarse(net.coarse, x_low, multiple=multiple)
    return coarse_logits[..., :width].float(), importance_map[0, 0, ..., :width].float()


def _run_local(net: NMSWNet, crops: Tensor, options: TrainOptions) -> tuple[Tensor, ...]:
    """Local logits (K, C, P, P, P), then those at 1/2, 1/4, ... where the backbone has heads for deep supervision; float32."""
    with _autocast(crops, options):
        deep_logits = net.local.deep_logits(crops)
    return tuple(logits.float() for logits in deep_logits)


def _autocast(tensor: Tensor, options: TrainOptions) -> torch.autocast:
    """bfloat16 where the run asks for it."""
    return torch.autocast(tensor.device.type, torch.bfloat16, enabled=options.precision == "bf16")


def _coarse_labels(labels: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Labels (D, H, W) at the centers of the coarse voxels, (1, d, h, w); unknown beyond the volume."""
    missing = [coarse * r - length for coarse, r, length in zip(grid.coarse_shape, grid.coarse_factor, labels.shape)]
    padding = [0, max(missing[2], 0), 0, max(missing[1], 0), 0, max(missing[0], 0)]
    padded = torch.nn.functional.pad(labels, padding, value=UNKNOWN_LABEL)
    return padded[tuple(slice(r // 2, coarse * r, r) for coarse, r in zip(grid.coarse_shape, grid.coarse_factor))][None]


def _nearest(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Labels (B, D, H, W) at another resolution by nearest, (B, *shape)."""
    return torch.nn.functional.interpolate(labels[:, None].float(), size=shape, mode="nearest-exact")[:, 0].to(labels.dtype)


def _mean_patch_loss(deep_logits: tuple[Tensor, ...], patch_labels: Tensor) -> Tensor:
    """The loss of every patch by itself, then the mean; of deep supervision the mean with the weights 1, 1/2, 1/4, ..."""
    total, weights = 0.0, [0.5**depth for depth in range(len(deep_logits))]
    for weight, logits in zip(weights, deep_logits):
        labels = _nearest(patch_labels, tuple(logits.shape[2:]))
        total = total + weight * torch.stack([segmentation_loss(one[None], other[None]) for one, other in zip(logits, labels)]).mean()
    return total / sum(weights)


def _random_box(labels: Tensor, *, patch_size: tuple[int, int, int], generator: torch.Generator) -> tuple[slice, slice, slice]:
    """A patch around a random voxel, foreground two times of three (background where there is none), moved into the volume."""
    is_foreground = (labels > 0) & (labels != UNKNOWN_LABEL)
    wants_foreground = float(torch.rand((), generator=generator)) < FOREGROUND_SHARE
    voxels = (is_foreground if wants_foreground and is_foreground.any() else labels == 0).flatten().nonzero()[:, 0]
    drawn = float(torch.rand((), generator=generator))
    flat = int(voxels[int(drawn * len(voxels))]) if len(voxels) else int(drawn * labels.numel())
    center = torch.unravel_index(torch.tensor(flat), labels.shape)
    starts = [min(max(int(c) - size // 2, 0), length - size) for c, size, length in zip(center, patch_size, labels.shape)]
    return tuple(slice(start, start + size) for start, size in zip(starts, patch_size))


def _high_on_patches(
    coarse_logits: Tensor, patch_logits: Tensor, *, indices: list[int], grid: CandidateGrid, class_weights: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_high on the chosen patches (K, C, P, P, P), and which of their voxels no earlier patch has (K, P, P, P).

    Elsewhere y_high is y_up, which the coarse term already trains.
    """
    seen = torch.zeros(grid.padded_shape, dtype=torch.bool, device=coarse_logits.device)
    high, is_first = [], []
    for index in indices:
        box = grid.slices(index)
        high.append(aggregate(coarse_logits, patch_logits, indices=indices, grid=grid, class_weights=class_weights, box=box, gates=gates)[0])
        is_first.append(~seen[box])
        seen[box] = True
    return torch.stack(high), torch.stack(is_first)


def _with_random(indices: list[int], soft_weights: Tensor, *, grid: CandidateGrid, count: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Append uniformly drawn candidates that are not chosen yet, with soft weight 1."""
    rest = [index for index in torch.randperm(grid.num_candidates, generator=generator).tolist() if index not in indices][:count]
    return indices + rest, torch.cat([soft_weights, soft_weights.new_ones(len(rest))])
