"""The losses of NMSW (paper Eq. 7); voxels of unknown label take part in none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from NMSWSegment.data.training_sample import UNKNOWN_LABEL

DICE_WEIGHT = 0.8
CROSS_ENTROPY_WEIGHT = 0.2
"""Of the paper; the published code has 1 and 1 (docs/deviations.md, D29)."""
DICE_SMOOTHING = 1e-5
BLOCK_VOXELS = 2**13
"""Voxels whose probabilities of some 25 classes stay in a core's cache."""
GPU_BLOCK_VOXELS = 2**20
"""Enough for all threads of a GPU, and few enough for float32: a sum of 2**24 ones stops growing."""


def segmentation_loss(logits: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """0.8 soft-Dice + 0.2 cross-entropy over the known voxels; Dice is the mean over the classes that are present, background left out (D20).

    Args:
        logits: (B, C, ...); Dice is taken over the whole batch.
        labels: (B, ...) integers 0..C-1, or 255 for unknown.
        mask: (B, ...) bool, voxels to count; None counts all.

    Returns:
        A scalar; 0 when no voxel is known. A class that is predicted but not present costs cross-entropy alone.

    Source: paper section 4. MONAI's DiceCELoss without unknown voxels (tested equal); written out because it cannot leave
    voxels out of Dice, and because its passes over C channels cost a CPU more than a compact net does.
    """
    if mask is not None:
        labels = labels.masked_fill(~mask, UNKNOWN_LABEL)
    return _DiceCrossEntropy.apply(logits, _Labels(labels.flatten()))


def soft_segmentation_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """segmentation_loss against shares of classes instead of labels.

    Args:
        logits: (B, C, ...).
        shares: known voxels of each class in every voxel as a share, (B, C, ...); their sum is below 1 where some are unknown.
    """
    return _DiceCrossEntropy.apply(logits, _Shares(_rows(shares)))


def class_shares(labels: Tensor, *, factor: Sequence[int], shape: Sequence[int], num_classes: int) -> Tensor:
    """What a coarser grid sees of labels: the share of each class in every coarse voxel, (B, C, *shape) float32 (docs/deviations.md, D19).

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


class _DiceCrossEntropy(torch.autograd.Function):
    """The loss with its gradient in two passes over blocks of voxels that stay in the processor's cache.

    Pass 1 sums over all voxels what Dice needs; pass 2 knows the slopes of the loss by these sums and writes the gradient.
    Autograd would keep a dozen volumes of C channels in memory and take five times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: Tensor, target: "_Labels | _Shares") -> Tensor:
        """Logits (B, C, ...) and the target of all their voxels -> the loss, a scalar."""
        rows = _rows(logits)
        precision = torch.promote_types(rows.dtype, torch.float32)
        blocks = _blocks(len(rows), device=rows.device)
        sums = [target.sums(torch.log_softmax(rows[block], dim=1, dtype=precision), block) for block in blocks]
        predicted, overlap, present, log_likelihood = (torch.stack(values).sum(0) for values in zip(*sums))
        size = predicted + present + DICE_SMOOTHING
        dice = (2 * overlap + DICE_SMOOTHING) / size
        counted = (present > 0).to(precision)
        counted[0] = 0
        dice_weight, entropy_weight = DICE_WEIGHT * counted / counted.sum().clamp_min(1), CROSS_ENTROPY_WEIGHT / present.sum().clamp_min(1)
        if ctx.needs_input_grad[0]:
            by_predicted, by_overlap = dice_weight * dice / size, -2 * dice_weight / size
            gradient = torch.empty_like(rows)
            for block in blocks:
                probability = torch.softmax(rows[block], dim=1, dtype=precision)
                gradient[block] = target.gradient(probability, block, by_predicted=by_predicted, by_overlap=by_overlap, entropy_weight=entropy_weight)
            ctx.save_for_backward(gradient)
            ctx.shape = logits.shape
        return (dice_weight * (1 - dice)).sum() - entropy_weight * log_likelihood

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, output_gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits, as they were given."""
        (gradient,) = ctx.saved_tensors
        batch, num_classes, *lengths = ctx.shape
        return (gradient * output_gradient.to(gradient.dtype)).reshape(batch, *lengths, num_classes).movedim(-1, 1), None


@dataclass(frozen=True)
class _Labels:
    """One class a voxel: it touches the probabilities of one class, the others follow from sums over classes."""

    labels: Tensor
    """(N,), 255 unknown."""

    def sums(self, log_probability: Tensor, block: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a block's known voxels (n, C): predicted, overlap and present, each (C,), and the log-likelihood."""
        index, known = self._known(block, log_probability.dtype)
        at_target = log_probability.gather(1, index[:, None])[:, 0]
        num_classes = log_probability.shape[1]
        return (
            known @ log_probability.exp(),
            _sums_by_class(at_target.exp() * known, index, num_classes=num_classes),
            _sums_by_class(known, index, num_classes=num_classes),
            torch.dot(at_target, known),
        )

    def gradient(self, probability: Tensor, block: slice, *, by_predicted: Tensor, by_overlap: Tensor, entropy_weight: Tensor) -> Tensor:
        """Of the loss by the logits of a block, (n, C), from the slopes by the sums; probability is overwritten."""
        index, known = self._known(block, probability.dtype)
        at_target = probability.gather(1, index[:, None])[:, 0] * by_overlap[index]
        common = entropy_weight - at_target - probability @ by_predicted
        probability *= by_predicted + common[:, None]
        probability.scatter_add_(1, index[:, None], (at_target - entropy_weight)[:, None])
        return probability.mul_(known[:, None])

    def _known(self, block: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Class of every voxel (n,), 0 where it is unknown, and 1 where it is known (n,)."""
        labels = self.labels[block]
        is_known = labels != UNKNOWN_LABEL
        return labels.masked_fill(~is_known, 0).long(), is_known.to(dtype)


@dataclass(frozen=True)
class _Shares:
    """Shares of all classes in every voxel."""

    shares: Tensor
    """(N, C)."""

    def sums(self, log_probability: Tensor, block: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As _Labels.sums."""
        shares = self.shares[block].to(log_probability.dtype)
        probability = log_probability.exp()
        return shares.sum(1) @ probability, (probability * shares).sum(0), shares.sum(0), (log_probability * shares).sum()

    def gradient(self, probability: Tensor, block: slice, *, by_predicted: Tensor, by_overlap: Tensor, entropy_weight: Tensor) -> Tensor:
        """As _Labels.gradient."""
        shares = self.shares[block].to(probability.dtype)
        known = shares.sum(1, keepdim=True)
        slope = shares * by_overlap + known * by_predicted
        slope += entropy_weight * known - (probability * slope).sum(1, keepdim=True)
        return slope.mul_(probability).sub_(shares * entropy_weight)


def _sums_by_class(values: Tensor, index: Tensor, *, num_classes: int) -> Tensor:
    """The sum of the values (n,) of every class, (C,), from sums of at most BLOCK_VOXELS voxels: all threads of a GPU would wait for the few addresses of one."""
    num_parts = max(1, math.ceil(len(index) / BLOCK_VOXELS))
    part = torch.arange(len(index), device=index.device) % num_parts  # neighbors, mostly of one class, go to different addresses
    return values.new_zeros(num_parts * num_classes).index_add(0, part * num_classes + index, values).reshape(num_parts, num_classes).sum(0)


def _blocks(num_voxels: int, *, device: torch.device) -> list[slice]:
    """The voxels in blocks that suit a device."""
    length = BLOCK_VOXELS if device.type == "cpu" else GPU_BLOCK_VOXELS
    return [slice(start, start + length) for start in range(0, num_voxels, length)]


def _rows(values: Tensor) -> Tensor:
    """(B, C, ...) as (N, C): a view where channels are last in memory."""
    return values.movedim(1, -1).reshape(-1, values.shape[1])
