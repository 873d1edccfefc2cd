"""The losses of NMSW (paper Eq. 7); voxels of unknown label take part in none."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from NMSWSegment.data.training_sample import UNKNOWN_LABEL

DICE_WEIGHT = 0.8
CROSS_ENTROPY_WEIGHT = 0.2
DICE_SMOOTHING = 1e-5


def segmentation_loss(logits: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """0.8 soft-Dice + 0.2 cross-entropy over the known voxels; Dice is the mean over the classes that are present, background left out.

    Args:
        logits: (B, C, ...); Dice is taken over the whole batch.
        labels: (B, ...) integers 0..C-1, or 255 for unknown.
        mask: (B, ...) bool, voxels to count; None counts all.

    Returns:
        A scalar; 0 when no voxel is known. A class that is predicted but not present costs cross-entropy alone.

    Source: paper section 4. MONAI's DiceCELoss without unknown voxels (tested equal); written out because it cannot leave
    voxels out of Dice, and to gather one probability per voxel instead of a one-hot volume of C channels.
    """
    is_known = labels != UNKNOWN_LABEL
    if mask is not None:
        is_known = is_known & mask
    known = is_known.float()
    target = labels.long().masked_fill(~is_known, 0)
    log_probability = torch.log_softmax(logits.float(), dim=1)
    at_target = log_probability.gather(1, target[:, None])[:, 0]
    predicted = _class_sums(log_probability.exp(), known)
    is_class = target[:, None] == torch.arange(logits.shape[1], device=logits.device).reshape(-1, *[1] * (labels.dim() - 1))
    overlap = _class_sums(is_class * at_target.exp()[:, None], known)
    present = _class_sums(is_class, known)
    return _dice_cross_entropy(predicted, overlap, present, cross_entropy=-(at_target * known).sum() / known.sum().clamp_min(1))


def soft_segmentation_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """segmentation_loss against shares of classes instead of labels.

    Args:
        logits: (B, C, ...).
        shares: known voxels of each class in every voxel as a share, (B, C, ...); their sum is below 1 where some are unknown.
    """
    log_probability = torch.log_softmax(logits.float(), dim=1)
    known = shares.sum(1, keepdim=True)
    predicted, overlap, present = (
        (values.transpose(0, 1).flatten(1)).sum(1) for values in (log_probability.exp() * known, log_probability.exp() * shares, shares)
    )
    return _dice_cross_entropy(predicted, overlap, present, cross_entropy=-(log_probability * shares).sum() / known.sum().clamp_min(1))


def class_shares(labels: Tensor, *, factor: Sequence[int], shape: Sequence[int], num_classes: int) -> Tensor:
    """What a coarser grid sees of labels: the share of each class in every coarse voxel, (B, C, *shape) float32.

    Args:
        labels: (B, D, H, W), 255 unknown (part of no share).
        factor: fine voxels along a coarse one; coarse voxel i covers [r i, r i + r).
        shape: voxels of the coarser grid; what it covers beyond the labels is unknown, labels beyond it are left out.

    Nearest neighbors would do it half a fine voxel off wherever the factor is even.
    """
    kept = labels[(slice(None), *(slice(0, r * coarse) for r, coarse in zip(factor, shape)))]
    batch, num_voxels = len(kept), math.prod(shape)
    d, h, w = (torch.arange(fine, device=labels.device) // r for fine, r in zip(kept.shape[1:], factor))
    voxel = (d[:, None, None] * shape[1] + h[:, None]) * shape[2] + w
    classes = kept.long().masked_fill(kept == UNKNOWN_LABEL, num_classes)
    first = (torch.arange(batch, device=labels.device)[:, None, None, None] * (num_classes + 1) + classes) * num_voxels
    counts = torch.bincount((first + voxel).flatten(), minlength=batch * (num_classes + 1) * num_voxels)
    shares = counts.reshape(batch, num_classes + 1, num_voxels)[:, :num_classes] / math.prod(factor)
    return shares.float().reshape(batch, num_classes, *shape)


def entropy(importance: Tensor) -> Tensor:
    """H(pi) of pi = softmax(importance), in nats; importance (N,)."""
    log_pi = torch.log_softmax(importance, dim=0)
    return -(log_pi.exp() * log_pi).sum()


def ranking_loss(importance: Tensor, gain: Tensor) -> Tensor:
    """How far pi of some candidates is from their share of what they gain together; 0 when none gains.

    Args:
        importance: logits of the candidates, (n,).
        gain: of each, (n,); negative ones count as 0.

    Source: Cao et al. 2007, ListNet; the gain of each trained patch is known, so that no estimator is needed (docs/deviations.md, D3).
    """
    share = gain.clamp_min(0)
    total = share.sum()
    return -(share / total.clamp_min(1e-12) * torch.log_softmax(importance, dim=0)).sum()


def _class_sums(values: Tensor, known: Tensor) -> Tensor:
    """Sum of (B, C, ...) over everything but the classes, weighted by known (B, ...), (C,)."""
    return torch.einsum("bcn,bn->c", values.flatten(2).to(known.dtype), known.flatten(1))


def _dice_cross_entropy(predicted: Tensor, overlap: Tensor, present: Tensor, *, cross_entropy: Tensor) -> Tensor:
    """The two terms from sums over voxels, (C,) each."""
    dice = (2 * overlap + DICE_SMOOTHING) / (predicted + present + DICE_SMOOTHING)
    is_present = (present > 0).float()[1:]
    lost = ((1 - dice[1:]) * is_present).sum() / is_present.sum().clamp_min(1)
    return DICE_WEIGHT * lost + CROSS_ENTROPY_WEIGHT * cross_entropy
