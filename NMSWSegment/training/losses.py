"""The losses of NMSW (paper Eq. 7); voxels of unknown label take part in none."""

import torch
from torch import Tensor

from NMSWSegment.data.training_sample import UNKNOWN_LABEL

DICE_WEIGHT = 0.8
CROSS_ENTROPY_WEIGHT = 0.2
DICE_SMOOTHING = 1e-5


def segmentation_loss(logits: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """0.8 soft-Dice + 0.2 cross-entropy over the known voxels; background is left out of Dice.

    Args:
        logits: (B, C, ...) ; Dice is taken over the whole batch.
        labels: (B, ...) integers 0..C-1, or 255 for unknown.
        mask: (B, ...) bool, voxels to count; None counts all.

    Returns:
        A scalar; 0 when no voxel is known. A class that is neither present nor predicted has Dice 1.

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
    cross_entropy = -(at_target * known).sum() / known.sum().clamp_min(1)
    predicted = (log_probability.exp() * known[:, None]).transpose(0, 1).flatten(1).sum(1)
    overlap = torch.zeros_like(predicted).index_add(0, target.flatten(), (at_target.exp() * known).flatten())
    present = torch.zeros_like(predicted).index_add(0, target.flatten(), known.flatten())
    dice = (2 * overlap + DICE_SMOOTHING) / (predicted + present + DICE_SMOOTHING)
    return DICE_WEIGHT * (1 - dice[1:]).mean() + CROSS_ENTROPY_WEIGHT * cross_entropy


def entropy(importance: Tensor) -> Tensor:
    """H(pi) of pi = softmax(importance), in nats; importance (N,)."""
    log_pi = torch.log_softmax(importance, dim=0)
    return -(log_pi.exp() * log_pi).sum()
