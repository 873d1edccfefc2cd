"""One volume through the nets: what a training step computes, and the losses of it (paper Eq. 7).

    coarse logits, importance <- coarse(x_low)
    patches <- differentiable top-k + random candidates, among those that show foreground
    y_high <- aggregate(coarse logits, local(top-k patches))
    loss = seg(y_low) + seg(y_high) + mean_k seg(y_patch_k) - lambda H(pi) [+ the ranking of the patches by their gain]

Each part also trains alone: the coarse net on seg(y_low), the local net on patches around random voxels or upon a finished coarse net, the
importance head upon two finished nets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from NMSWSegment.data.training_sample import UNKNOWN_LABEL, TrainingSample
from NMSWSegment.engine.aggregation import CoarseUpsampler, aggregate, mixing_weights
from NMSWSegment.engine.resampling import coarse_input, normalize_intensity, pad_to_grid, run_coarse
from NMSWSegment.engine.selection import candidate_importance, differentiable_top_k, shows_foreground
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.nets.nmsw_net import NMSWNet
from NMSWSegment.training.cascade import disturbed, parts_of_boxes
from NMSWSegment.training.losses import DICE_SMOOTHING, class_shares, entropy, ranking_loss, segmentation_loss, soft_segmentation_loss
from NMSWSegment.training.options import TrainOptions

LOCAL_TRAINS = ("both", "patches", "local")
"""What trains the local net, as in TrainOptions.train."""
FOREGROUND_SHARE = 2 / 3
"""Of the patches of the local net alone, those around a voxel of a random class that is present. Source: paper section 4, 2:1."""


@dataclass(frozen=True)
class Losses:
    """The terms of Eq. 7 for one volume; scalars, 0 where a term takes no part."""

    coarse: Tensor
    high: Tensor
    patch: Tensor
    entropy: Tensor
    ranking: Tensor
    total: Tensor

    def values(self) -> Tensor:
        """All terms in the order of the fields, detached, (6,) float32."""
        return torch.stack([getattr(self, field.name).detach().float() for field in fields(self)])


@dataclass(frozen=True)
class TrainingVolume:
    """A training volume as the nets take it."""

    x: Tensor
    """(1, 1, D, H, W) in [0, 1], padded to the grid."""
    labels: Tensor
    """(D, H, W) uint8, padding unknown."""
    grid: CandidateGrid
    generator: torch.Generator
    """Draws the Gumbel noise and the random patches (CPU)."""


def prepare(sample: TrainingSample, options: TrainOptions) -> tuple[Tensor, Tensor, CandidateGrid]:
    """x (1, 1, D, H, W) in [0, 1], labels (D, H, W) with padding unknown, and the grid: what inference would make of it (D25); the sample is normalized already."""
    grid = CandidateGrid.covering(tuple(sample.intensity.shape), patch_size=options.patch_size, overlap=options.overlap, coarse_factor=options.coarse_factor)
    x = pad_to_grid(normalize_intensity(sample.intensity, options.intensity_points), grid=grid, value=0)
    return x[None, None], pad_to_grid(sample.labels, grid=grid, value=UNKNOWN_LABEL), grid


def volume_losses(net: NMSWNet, volume: TrainingVolume, *, options: TrainOptions, tau: float) -> Losses:
    """The losses of a volume for what the run trains.

    Args:
        volume: on the device of the net.
        tau: temperature of the differentiable top-k.
    """
    if options.train == "coarse":
        return coarse_losses(net, volume, options=options)
    if options.train == "local":
        return local_losses(net, volume, options=options)
    return training_losses(net, volume.x, volume.labels, grid=volume.grid, options=options, tau=tau, generator=volume.generator)


def training_losses(net: NMSWNet, x: Tensor, labels: Tensor, *, grid: CandidateGrid, options: TrainOptions, tau: float, generator: torch.Generator) -> Losses:
    """Eq. 7 for one volume; a net that the run does not train gives its terms without a gradient.

    Args:
        x: (1, 1, D, H, W); labels: (D, H, W), 255 unknown.
        generator: draws the Gumbel noise and the random candidates (CPU).
    """
    coarse_logits, importance_map = _run_coarse(net, coarse_input(x, grid=grid), options)
    importance_map = importance_map[0, 0]
    importance = candidate_importance(importance_map, grid=grid)
    shown = _candidates_with_foreground(coarse_logits, grid=grid)
    importance = importance.masked_fill(~shown, -torch.inf)
    top, soft_weights = differentiable_top_k(importance, k=min(options.top_k_patches, int(shown.sum())), tau=tau, generator=generator)
    indices = top + _random_candidates(shown, taken=top, count=options.random_patches, generator=generator)
    boxes = [grid.slices(index) for index in indices]
    crops = torch.stack([x[(0, slice(None), *box)] for box in boxes])
    if options.estimator == "scale":  # D31
        scales = torch.cat([soft_weights, soft_weights.new_ones(len(indices) - len(top))])
        crops = crops * scales[:, None, None, None, None]
    parts = _coarse_parts(coarse_logits[0].detach(), boxes, grid=grid, options=options, generator=generator)
    deep_logits = _run_local(net, crops, parts, options)
    patch_logits = torch.log_softmax(deep_logits[0].float(), dim=1)
    patch_labels = torch.stack([labels[box] for box in boxes])
    shares = class_shares(labels[None], factor=grid.coarse_factor, shape=grid.coarse_shape, num_classes=coarse_logits.shape[1])
    coarse, patch, spread = soft_segmentation_loss(coarse_logits, shares), _patch_loss(deep_logits, patch_labels), entropy(importance[shown])
    high = ranking = torch.zeros_like(coarse)
    if top:
        gates = 1 + soft_weights - soft_weights.detach() if options.estimator == "gate" else None
        chosen = slice(0, len(top))
        y_high, is_first = _high_on_patches(
            coarse_logits[0].detach(), patch_logits[chosen], indices=top, grid=grid, class_weights=net.class_weights, gates=gates
        )
        high = segmentation_loss(y_high, patch_labels[chosen], mask=is_first)
    if options.estimator == "gain" and importance.requires_grad:
        gains = patch_gains(coarse_logits[0], patch_logits, patch_labels, shares=shares[0], indices=indices, grid=grid, class_weights=net.class_weights)
        ranking = ranking_loss(importance[indices], gains)
    total = coarse + high + patch - options.entropy_weight * spread + ranking
    return Losses(coarse=coarse, high=high, patch=patch, entropy=spread, ranking=ranking, total=total)


def coarse_losses(net: NMSWNet, volume: TrainingVolume, *, options: TrainOptions) -> Losses:
    """seg(y_low) alone."""
    grid, num_classes = volume.grid, net.architecture.num_classes
    coarse_logits, _ = _run_coarse(net, coarse_input(volume.x, grid=grid), options, net.coarse.without_importance)
    coarse = soft_segmentation_loss(
        coarse_logits, class_shares(volume.labels[None], factor=grid.coarse_factor, shape=grid.coarse_shape, num_classes=num_classes)
    )
    nothing = torch.zeros_like(coarse)
    return Losses(coarse=coarse, high=nothing, patch=nothing, entropy=nothing, ranking=nothing, total=coarse)


def local_losses(net: NMSWNet, volume: TrainingVolume, *, options: TrainOptions) -> Losses:
    """seg(y_patch) over top_k_patches + random_patches patches around random voxels: the local net of a sliding window.

    That of a cascade reads the coarse net's answer, which stays as it is.
    """
    count, multiple = options.top_k_patches + options.random_patches, options.coarse_factor if options.cascade else (1, 1, 1)
    boxes = random_boxes(volume.labels, count=count, patch_size=options.patch_size, multiple=multiple, generator=volume.generator)
    parts = None
    if options.cascade:
        with torch.no_grad():
            coarse_logits, _ = _run_coarse(net, coarse_input(volume.x, grid=volume.grid), options)
        parts = _coarse_parts(coarse_logits[0], boxes, grid=volume.grid, options=options, generator=volume.generator)
    deep_logits = _run_local(net, torch.stack([volume.x[(0, slice(None), *box)] for box in boxes]), parts, options)
    patch = _patch_loss(deep_logits, torch.stack([volume.labels[box] for box in boxes]))
    nothing = torch.zeros_like(patch)
    return Losses(coarse=nothing, high=nothing, patch=patch, entropy=nothing, ranking=nothing, total=patch)


@torch.no_grad()
def patch_gains(
    coarse_logits: Tensor, patch_logits: Tensor, patch_labels: Tensor, *, shares: Tensor, indices: list[int], grid: CandidateGrid, class_weights: Tensor
) -> Tensor:
    """How much each patch alone raises the mean soft Dice of the volume over its classes, to first order, (K,).

    With D = 2 O / (P + N) of a class from the coarse answer, a change dp of its probabilities p changes D by
    sum_v dp(v) (2 t(v) - D) / (P + N); the sum runs over the known voxels of the patch, t is 1 where the class is.

    Args:
        coarse_logits: (C, d, h, w); patch_logits: (K, C, P, P, P); patch_labels: (K, P, P, P).
        shares: of class_shares on the coarse grid, (C, d, h, w).
        indices: candidates of the patches.
    """
    probabilities = torch.softmax(coarse_logits, dim=0)
    voxels = math.prod(grid.coarse_factor)  # fine voxels per coarse voxel
    predicted, overlap, present = (values.flatten(1).sum(1) * voxels for values in (probabilities * shares.sum(0), probabilities * shares, shares))
    size = predicted + present + DICE_SMOOTHING
    dice = 2 * overlap / size
    counts = (present > 0) & (torch.arange(len(present), device=present.device) > 0)
    upsampler, a = CoarseUpsampler(coarse_logits, grid=grid), mixing_weights(class_weights)[:, None, None, None]
    gains = []
    for index, logits, labels in zip(indices, patch_logits, patch_labels):
        upsampled = upsampler.region(grid.slices(index))
        known = (labels != UNKNOWN_LABEL).float()
        change = (torch.softmax(a * logits + (1 - a) * upsampled, dim=0) - torch.softmax(upsampled, dim=0)) * known
        target = labels.long().masked_fill(labels == UNKNOWN_LABEL, 0)
        on_target = torch.zeros_like(size).index_add(0, target.flatten(), change.gather(0, target[None])[0].flatten())
        gain = (2 * on_target - dice * change.flatten(1).sum(1)) / size
        gains.append((gain * counts).sum() / counts.sum().clamp_min(1))
    return torch.stack(gains)


def trained_parameters(net: NMSWNet, options: TrainOptions) -> list[torch.nn.Parameter]:
    """What the run trains; everything else is frozen, so that weight decay does not move it."""
    parts = {
        "both": [net],
        "patches": [net.local, net.class_weights],
        "importance": [net.coarse.importance_head, net.class_weights],
        "weights": [net.class_weights],
        "coarse": [net.coarse.backbone, net.coarse.head],
        "local": [net.local],
    }
    net.requires_grad_(False)
    for part in parts[options.train]:
        part.requires_grad_(True)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _run_coarse(net: NMSWNet, x_low: Tensor, options: TrainOptions, run: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Tensor]:
    """Coarse logits (B, C, d, h, w) and importance map (B, 1, d, h, w); run: what to call instead of the coarse net."""
    with _autocast(x_low, options):
        width, multiple = x_low.shape[4], net.architecture.coarse_multiple
        if max(x_low.shape[2:]) <= multiple:  # instance norm refuses a single voxel at the net's bottom
            x_low = torch.nn.functional.pad(x_low, [0, multiple])
        coarse_logits, importance_map = run_coarse(run or net.coarse, x_low, multiple=multiple)
    return coarse_logits[..., :width], importance_map[..., :width]


def _coarse_parts(
    coarse_logits: Tensor, boxes: Sequence[tuple[slice, slice, slice]], *, grid: CandidateGrid, options: TrainOptions, generator: torch.Generator
) -> Tensor | None:
    """What a cascade's local net reads in some boxes, (K, C, P/r, P/r, P/r): disturbed where that net is trained; None where the image is all."""
    if not options.cascade:
        return None
    if options.train in LOCAL_TRAINS:
        coarse_logits = disturbed(coarse_logits, generator=generator)
    return parts_of_boxes(coarse_logits, boxes, grid=grid)


def _run_local(net: NMSWNet, crops: Tensor, parts: Tensor | None, options: TrainOptions) -> tuple[Tensor, ...]:
    """Local logits (K, C, P, P, P), then those at 1/2, 1/4, ... where the backbone has heads for deep supervision; float32."""
    with _autocast(crops, options):
        return net.local.deep_logits(crops, parts)


def _autocast(tensor: Tensor, options: TrainOptions) -> torch.autocast:
    """bfloat16 where the run asks for it."""
    return torch.autocast(tensor.device.type, torch.bfloat16, enabled=options.precision == "bf16")


def _patch_loss(deep_logits: tuple[Tensor, ...], patch_labels: Tensor) -> Tensor:
    """The loss of all patches together; of deep supervision the mean with the weights 1, 1/2, 1/4, ..."""
    total = segmentation_loss(deep_logits[0], patch_labels)
    weights = [0.5**depth for depth in range(len(deep_logits))]
    for weight, logits in zip(weights[1:], deep_logits[1:]):
        total = total + weight * soft_segmentation_loss(logits, _shares_of_patches(patch_labels, logits))
    return total / sum(weights)


def _shares_of_patches(patch_labels: Tensor, logits: Tensor) -> Tensor:
    """class_shares of the patches at the resolution of deeper logits."""
    shape = tuple(logits.shape[2:])
    factor = tuple(fine // coarse for fine, coarse in zip(patch_labels.shape[1:], shape))
    return class_shares(patch_labels, factor=factor, shape=shape, num_classes=logits.shape[1])


def random_boxes(
    labels: Tensor, *, count: int, patch_size: tuple[int, int, int], generator: torch.Generator, multiple: tuple[int, int, int] = (1, 1, 1)
) -> list[tuple[slice, slice, slice]]:
    """Patches around random voxels, two of three of a random class that is present, the others of background, moved into the volume (D27).

    Args:
        multiple: patches begin at multiples of this, which the lengths of volume and patch are too.
    """
    present = [value for value, size in enumerate(torch.bincount(labels.flatten(), minlength=256).tolist()) if size and value != UNKNOWN_LABEL]
    voxels: dict[int, Tensor] = {}
    boxes = []
    for _ in range(count):
        wants_foreground, class_draw, voxel_draw = torch.rand(3, generator=generator).tolist()
        classes = [value for value in present if (value > 0) == (wants_foreground < FOREGROUND_SHARE)] or present or [UNKNOWN_LABEL]
        value = classes[int(class_draw * len(classes))]
        if value not in voxels:
            voxels[value] = (labels == value).flatten().nonzero()[:, 0]
        flat = int(voxels[value][int(voxel_draw * len(voxels[value]))])
        center = (flat // (labels.shape[1] * labels.shape[2]), flat // labels.shape[2] % labels.shape[1], flat % labels.shape[2])
        starts = [min(max(c - size // 2, 0), length - size) // step * step for c, size, length, step in zip(center, patch_size, labels.shape, multiple)]
        boxes.append(tuple(slice(start, start + size) for start, size in zip(starts, patch_size)))
    return boxes


def _high_on_patches(
    coarse_logits: Tensor, patch_logits: Tensor, *, indices: list[int], grid: CandidateGrid, class_weights: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_high on the chosen patches (K, C, P, P, P), and which of their voxels no earlier patch has (K, P, P, P).

    Elsewhere y_high is y_up, which the coarse term already trains (D9).
    """
    seen = torch.zeros(grid.padded_shape, dtype=torch.bool, device=coarse_logits.device)
    high, is_first = [], []
    for index in indices:
        box = grid.slices(index)
        high.append(aggregate(coarse_logits, patch_logits, indices=indices, grid=grid, class_weights=class_weights, box=box, gates=gates)[0])
        is_first.append(~seen[box])
        seen[box] = True
    return torch.stack(high), torch.stack(is_first)


def _candidates_with_foreground(coarse_logits: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Candidates that may be drawn, (N,) bool: those that show foreground, as at inference; all where none does."""
    shown = shows_foreground(1 - torch.softmax(coarse_logits[0].detach(), dim=0)[0], grid=grid)
    return shown if shown.any() else torch.ones_like(shown)


def _random_candidates(shown: Tensor, *, taken: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Uniformly drawn candidates among those with foreground that are not taken yet (D27)."""
    free = [index for index in shown.nonzero()[:, 0].tolist() if index not in taken]
    return [free[position] for position in torch.randperm(len(free), generator=generator).tolist()[:count]]
