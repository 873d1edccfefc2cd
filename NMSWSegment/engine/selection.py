"""Choose which candidates go through the local net (NMSW Eqs. 1-5).

The importance map is one logit per coarse voxel; the importance of a candidate is the log of its mean gain over the footprint, and
pi = softmax(importance) is the paper's p(z | x_low). Training draws candidates with the differentiable top-k; inference
ranks them without noise, ties broken by candidate index, so that the same volume always gives the same selection
(docs/deviations.md, D4).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.engine.blocked import BLOCK_FLOATS, in_threads, ranges, shares
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.protocol import AUTO, AUTO_GAIN

FOREGROUND_THRESHOLD = 0.1  # a candidate whose footprint nowhere reaches this much foreground is taken last
RANDOM_POLICY_SEED = 0
VOXELS_AT_ONCE = 1 << 14  # a multiple of the processor's vectors, so that no value depends on it
LEAST_ENTROPY = 1e-4  # nats; of the expected error where the coarse net is sure


@dataclass(frozen=True)
class Selection:
    """The chosen candidates of one volume, best first."""

    indices: tuple[int, ...]
    """Candidate indices in the grid."""
    importance: tuple[float, ...]
    """p(z | x_low) of each, in (0, 1)."""


def pool_mean(coarse_map: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Mean of a coarse map (d, h, w) over every candidate's footprint, (N,); differentiable.

    A footprint is the set of coarse voxels whose center lies in the candidate.
    """
    sums = _window_sums(_block_sums(coarse_map, grid=grid), grid=grid)
    return (sums / _footprint_sizes(grid).to(sums)).flatten()


def shows_foreground(presence: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Candidates whose footprint reaches FOREGROUND_THRESHOLD somewhere, (N,) bool, from the foreground probability (d, h, w) (docs/deviations.md, D2)."""
    return pool_mean((presence >= FOREGROUND_THRESHOLD).float(), grid=grid) > 0


def log_entropy(logits: Tensor) -> Tensor:
    """Log of the coarse answer's entropy plus LEAST_ENTROPY, (B, 1, d, h, w), from logits (B, C, d, h, w)."""
    entropy = []
    for part in logits.flatten(2).split(VOXELS_AT_ONCE, dim=2):
        log_probabilities = torch.log_softmax(part, dim=1)
        entropy.append(-(log_probabilities.exp() * log_probabilities).sum(1, keepdim=True))
    return torch.log(torch.cat(entropy, dim=2) + LEAST_ENTROPY).reshape(logits[:, :1].shape)


def candidate_importance(importance_map: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Importance logit of every candidate, (N,), from the importance map (d, h, w): the log of the mean of its exponential over the footprint.

    The map is the log of a gain per voxel, so that gains add up, as they do in greedy_coverage.

    Source: replaces the paper's trilinear resize to the grid, which reads 8 voxels per candidate (docs/deviations.md, D5).
    """
    largest = importance_map.detach().max()
    return largest + pool_mean(torch.exp(importance_map - largest), grid=grid).clamp_min(1e-30).log()


def differentiable_top_k(importance: Tensor, *, k: int, tau: float, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Draw k candidates without replacement; the soft weight of each carries the gradient.

    Args:
        importance: (N,) logits.
        k: clipped to N.
        tau: temperature of the relaxation.

    Returns:
        Candidate indices in the order of drawing, and y^(k)[i_k], (k,).

    Source: paper Eqs. 1-5. One Gumbel noise per volume; a drawn entry is masked, not renormalized, before the next draw.
    """
    uniform = torch.rand(importance.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(importance.device)
    perturbed = torch.log_softmax(importance, dim=0) - torch.log(-torch.log(uniform))
    taken = torch.zeros_like(importance, dtype=torch.bool)
    indices, soft_weights = [], []
    for _ in range(min(k, len(importance))):
        soft = torch.softmax(perturbed.masked_fill(taken, -torch.inf) / tau, dim=0)
        index = int(soft.argmax())
        indices.append(index)
        soft_weights.append(soft[index])
        taken = taken.clone()
        taken[index] = True
    return indices, torch.stack(soft_weights) if soft_weights else importance.new_zeros(0)


def select(
    coarse_logits: Tensor,
    importance_map: Tensor,
    *,
    grid: CandidateGrid,
    num_patches: int | str | None,
    policy: str,
    focus_classes: tuple[int, ...] = (),
    in_roi: Tensor | None = None,
    auto_gain: float = AUTO_GAIN,
) -> Selection:
    """The candidates to run at inference.

    Args:
        coarse_logits: (C, d, h, w).
        importance_map: (d, h, w) logits.
        num_patches: clipped to the candidates that meet the region of interest; None takes all of them, "auto" (greedy only) as
            many as cover auto_gain of the expected error each.
        policy: top_k (highest importance), greedy (most expected error not yet covered) or random.
        focus_classes: prefer candidates that show these classes; empty for all.
        in_roi: coarse voxels where patches may be spent, (d, h, w) bool; None is everywhere.

    Candidates that show only background come last whatever the policy, and are not taken by "auto".
    """
    scores = importance_map.detach().double().cpu()
    within = torch.ones_like(scores) if in_roi is None else in_roi.double()
    presence = within * class_presence(coarse_logits.detach().cpu(), focus_classes=focus_classes)
    wanted = presence if focus_classes else within
    importance = torch.softmax(candidate_importance(scores, grid=grid), dim=0)
    meets_roi = pool_mean(within, grid=grid) > 0
    is_foreground = shows_foreground(presence, grid=grid)
    count = int(meets_roi.sum()) if num_patches in (None, AUTO) else min(num_patches, int(meets_roi.sum()))
    order: list[int] = []
    score = importance
    if policy == "greedy":
        least_share = auto_gain if num_patches == AUTO else 0.0
        order = greedy_coverage(torch.exp(scores - scores.max()) * wanted, is_foreground, grid=grid, num_patches=count, least_share=least_share)
    else:
        score = pool_mean(wanted, grid=grid) * (_random_score(len(importance)) if policy == "random" else importance)
    if num_patches != AUTO:  # greedy ends where nothing uncovered is left; the rest by importance
        rest = [index for index in _ranked(score, is_foreground) if meets_roi[index] and index not in order]
        order += rest[: count - len(order)]
    return Selection(indices=tuple(order), importance=tuple(float(importance[index]) for index in order))


def class_presence(coarse_logits: Tensor, *, focus_classes: tuple[int, ...] = ()) -> Tensor:
    """Probability of foreground, or of some classes together, (d, h, w) float32.

    Args:
        coarse_logits: (C, d, h, w), on the CPU.
        focus_classes: empty for all but the background.
    """
    num_classes, shape = len(coarse_logits), coarse_logits.shape[1:]
    logits = coarse_logits.numpy().reshape(num_classes, -1)
    presence = np.empty(logits.shape[1], np.float32)

    def fill(share: slice) -> None:
        for part in ranges(share.stop, start=share.start, step=BLOCK_FLOATS // num_classes):
            exponentials = np.exp(logits[:, part] - logits[:, part].max(0))
            total = np.add.reduce(exponentials, axis=0)
            shown = exponentials[list(focus_classes)].sum(0) if focus_classes else total - exponentials[0]
            np.divide(shown, total, out=presence[part])

    in_threads(fill, shares(logits.shape[1]))
    return torch.from_numpy(presence.reshape(shape))


def greedy_coverage(mass: Tensor, is_foreground: Tensor, *, grid: CandidateGrid, num_patches: int, least_share: float = 0.0) -> list[int]:
    """Candidates in the order in which each covers the most mass that none before it covers.

    Args:
        mass: non-negative expected error, (d, h, w).
        is_foreground: candidates that may be taken, (N,) bool.
        num_patches: how many at most; fewer where nothing uncovered is left.
        least_share: of the whole mass; stop where the next candidate would add less.

    Greedy maximum coverage: at least 1 - 1/e of the best possible coverage (Nemhauser et al., 1978); the paper has top_k only (docs/deviations.md, D6).
    """
    blocks = _block_sums(mass, grid=grid)
    least_gain = least_share * float(blocks.sum())
    blocks_per_patch = [size // step for size, step in zip(grid.patch_size, grid.stride)]
    order: list[int] = []
    may_follow = is_foreground.clone()
    while len(order) < num_patches:
        gain = _window_sums(blocks, grid=grid).flatten().masked_fill(~may_follow, -1)
        best = int(gain.argmax())
        if gain[best] <= 0 or gain[best] < least_gain:
            break
        order.append(best)
        may_follow[best] = False
        first = grid.starts[best] // grid.stride
        blocks[tuple(slice(int(f), int(f) + n) for f, n in zip(first, blocks_per_patch))] = 0
    return order


def _random_score(num_candidates: int) -> Tensor:
    """The same random number for every candidate at every call, (N,)."""
    return torch.rand(num_candidates, generator=torch.Generator().manual_seed(RANDOM_POLICY_SEED))


def _ranked(score: Tensor, is_foreground: Tensor) -> list[int]:
    """Candidates by falling score, foreground ones first, ties by index."""
    by_score = torch.argsort(score, descending=True, stable=True)
    first = by_score[is_foreground[by_score]]
    return torch.cat([first, by_score[~is_foreground[by_score]]]).tolist()


def _block_sums(coarse_map: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Sum the coarse voxels whose centers lie in each stride-sized block, (blocks D, H, W)."""
    if tuple(coarse_map.shape) != grid.coarse_shape:
        raise ValueError(f"a map of {tuple(coarse_map.shape)} voxels for a coarse volume of {grid.coarse_shape}")
    for axis, blocks in enumerate(_blocks_of_coarse_voxels(grid)):
        shape = list(coarse_map.shape)
        shape[axis] = grid.padded_shape[axis] // grid.stride[axis]
        coarse_map = coarse_map.new_zeros(shape).index_add(axis, blocks.to(coarse_map.device), coarse_map)
    return coarse_map


def _blocks_of_coarse_voxels(grid: CandidateGrid) -> list[Tensor]:
    """For each axis the block that holds the center of each coarse voxel; the last block for a center beyond the end."""
    axes = zip(grid.coarse_shape, grid.coarse_factor, grid.stride, grid.padded_shape)
    return [((2 * torch.arange(coarse) + 1) * r // (2 * step)).clamp_max(full // step - 1) for coarse, r, step, full in axes]


def _footprint_sizes(grid: CandidateGrid) -> Tensor:
    """Coarse voxels in the footprint of every candidate, (n_d, n_h, n_w) float64."""
    d, h, w = (torch.bincount(blocks, minlength=full // step) for blocks, full, step in zip(_blocks_of_coarse_voxels(grid), grid.padded_shape, grid.stride))
    return _window_sums((d[:, None, None] * h[:, None] * w).double(), grid=grid)


def _window_sums(blocks: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Sum blocks into candidates, (n_d, n_h, n_w); the last axis is fastest, as in the grid."""
    for axis, (size, step, count) in enumerate(zip(grid.patch_size, grid.stride, grid.counts)):
        blocks = torch.stack([blocks.narrow(axis, offset, count) for offset in range(size // step)]).sum(0)
    return blocks
