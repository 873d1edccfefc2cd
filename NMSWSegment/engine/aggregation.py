"""Mix the coarse and the local logits (NMSW Eq. 6).

    L(v)      = sum_k w(v - o_k) y_k(v) / sum_k w(v - o_k)          over the patches that cover v
    y_high(v) = a L(v) + (1 - a) y_up(v)                            a = sigmoid(clamp(c, -1, 10)), per class
    y_high(v) = y_up(v)                                             where no patch covers v

`aggregate` is the reference (differentiable, needs C full volumes); StreamingAggregator gives the same labels bit for bit
with memory of one label volume and a few blocks. Both up-sample with `CoarseUpsampler`, whose every output voxel is the
same sequence of float32 products and sums wherever it is computed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from NMSWSegment.files.grid import CandidateGrid

WINDOW_SIGMA = 0.125  # of the patch size; MONAI's and nnU-Net's choice
WINDOW_FLOOR = 1e-3
MIXED_VOXELS_AT_ONCE = 1 << 18  # bounds the memory of the gather below: C x 8 x 4 bytes each
UNIFORM_MARGIN = 1e-5  # relative; far above the rounding of three float32 interpolations


def patch_window(patch_size: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """Gaussian weight of every patch voxel, (P, P, P), at most 1 and at least 0.001.

    Source: paper section 3.4; sigma = 0.125 P.
    """
    window = torch.ones((), dtype=torch.float64)
    for size in patch_size:
        offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        window = window[..., None] * torch.exp(-0.5 * (offset / (WINDOW_SIGMA * size)) ** 2)
    return (window / window.max()).clamp_min(WINDOW_FLOOR).float().to(device)


def mixing_weights(class_weights: Tensor) -> Tensor:
    """a of Eq. 6: sigmoid(clamp(c, -1, 10)), (C,)."""
    return torch.sigmoid(class_weights.clamp(-1, 10))


class CoarseUpsampler:
    """y_up: trilinear up-sampling of coarse logits to any box of the full volume.

    The same numbers as torch.nn.functional.interpolate(mode="trilinear", align_corners=False) up to rounding.
    """

    def __init__(self, coarse_logits: Tensor, *, shape: Sequence[int]) -> None:
        """Args: coarse_logits (C, d, h, w); shape: voxels of the full volume, KJI."""
        self.coarse_logits = coarse_logits
        self.shape = tuple(shape)
        self.taps = [_axis_taps(full, coarse, coarse_logits.device) for full, coarse in zip(shape, coarse_logits.shape[1:])]

    def region(self, box: Sequence[slice]) -> Tensor:
        """y_up in a box of full-resolution voxels, (C, box)."""
        values = self.coarse_logits
        needed = [(lower[inside][0], upper[inside][-1]) for (lower, upper, _), inside in zip(self.taps, box)]
        values = values[(slice(None), *(slice(int(first), int(last) + 1) for first, last in needed))]
        for axis, ((lower, upper, weight), inside, (first, _)) in enumerate(zip(self.taps, box, needed), start=1):
            t = weight[inside].reshape([-1 if i == axis else 1 for i in range(4)])
            values = values.index_select(axis, lower[inside] - first) * (1 - t) + values.index_select(axis, upper[inside] - first) * t
        return values

    def labels(self) -> Tensor:
        """arg max of y_up everywhere, (D, H, W) uint8, without ever holding C full volumes.

        A cell whose eight corners agree clearly on the arg max has that class everywhere inside, because the interpolant
        is a convex combination; only voxels in mixed cells are interpolated.
        """
        uniform = self._uniform_cells()
        (d0, _, _), (h0, _, _), (w0, _, _) = self.taps
        labels = uniform[d0][:, h0][:, :, w0]
        mixed = torch.nonzero(labels < 0)
        result = labels.to(torch.uint8)
        for voxels in mixed.split(MIXED_VOXELS_AT_ONCE):
            d, h, w = voxels.unbind(1)
            result[d, h, w] = _best_class(self._at(d, h, w))
        return result

    def _at(self, *index: Tensor) -> Tensor:
        """y_up at single voxels, (C, n): the arithmetic of `region`, axis by axis."""
        lower, upper, weight = zip(*[(low[i], high[i], t[i]) for (low, high, t), i in zip(self.taps, index)])
        corners = (lower, upper)
        along_w = []
        for w in (0, 1):
            along_h = []
            for h in (0, 1):
                low, high = (self.coarse_logits[:, corners[d][0], corners[h][1], corners[w][2]] for d in (0, 1))
                along_h.append(low * (1 - weight[0]) + high * weight[0])
            along_w.append(along_h[0] * (1 - weight[1]) + along_h[1] * weight[1])
        return along_w[0] * (1 - weight[2]) + along_w[1] * weight[2]

    def _uniform_cells(self) -> Tensor:
        """Per coarse cell (named by its lower corner) the class of all eight corners, or -1; (d, h, w) int16."""
        best, labels = self.coarse_logits.topk(2, dim=0)
        is_clear = best[0] - best[1] > UNIFORM_MARGIN * best.abs().amax(0).clamp_min(1)
        return uniform_cells(torch.where(is_clear, labels[0], -1).to(torch.int16))


def uniform_cells(labels: Tensor) -> Tensor:
    """Per cell, named by its lower corner, the label of all eight corners, or -1 where they differ; (d, h, w) int16."""
    for axis in range(3):
        last = labels.shape[axis] - 1
        shifted = torch.cat([labels.narrow(axis, 1, last), labels.narrow(axis, last, 1)], dim=axis)
        labels = torch.where(labels == shifted, labels, torch.full_like(labels, -1))
    return labels


def aggregate(
    coarse_logits: Tensor,
    patch_logits: Sequence[Tensor],
    *,
    indices: Sequence[int],
    grid: CandidateGrid,
    class_weights: Tensor,
    box: Sequence[slice] | None = None,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference of Eq. 6 in a box of the volume (None: everywhere).

    Args:
        coarse_logits: (C, d, h, w).
        patch_logits: local logits of the chosen candidates, each (C, P, P, P).
        indices: their candidate indices; sums run in this order.
        class_weights: c, (C,).
        gates: (K,), all of value 1: 1 + y - stopgrad(y) of the differentiable top-k. A gate scales how far its patch pulls
            y_high away from y_up, so its gradient is <dL/dy_high, a w / sum w (y_patch - y_up)>, the patch's benefit.

    Returns:
        y_high (C, box) and whether some patch covers the voxel, (box) bool.

    Source: paper Eq. 6; the gate is ours (docs/deviations.md, D3).
    """
    box = tuple(box or (slice(0, length) for length in grid.padded_shape))
    upsampled = CoarseUpsampler(coarse_logits, shape=grid.padded_shape).region(box)
    window = patch_window(grid.patch_size, device=coarse_logits.device)
    total = torch.zeros_like(upsampled)
    weight_sum = torch.zeros(upsampled.shape[1:], device=upsampled.device)
    gated_sum = torch.zeros_like(weight_sum)
    for position, (index, logits) in enumerate(zip(indices, patch_logits)):
        overlap = _overlap(box, grid.slices(index))
        if overlap is None:
            continue
        in_box, in_patch = overlap
        weight = window[in_patch]
        gated = weight if gates is None else weight * gates[position]
        total[(slice(None), *in_box)] += gated * logits[(slice(None), *in_patch)]
        weight_sum[in_box] += weight
        gated_sum[in_box] += gated
    is_covered = weight_sum > 0
    divisor = torch.where(is_covered, weight_sum, torch.ones_like(weight_sum))
    return torch.where(is_covered, _mix(total, divisor, gated_sum, upsampled, class_weights), upsampled), is_covered


class StreamingAggregator:
    """arg max of Eq. 6 while the patches come in, in O(volume) memory.

    Every stride-sized block keeps one accumulator from its first patch to its last; then it is mixed, turned into labels
    and forgotten. Patches added in candidate order keep the fewest blocks alive; any order is right, and sums run in
    the order of adding, so that the labels equal those of `aggregate` with the same order.
    """

    def __init__(
        self, coarse_logits: Tensor, *, indices: Sequence[int], grid: CandidateGrid, class_weights: Tensor, coarse_labels: Tensor | None = None
    ) -> None:
        """Take what holds where no patch will come.

        Args:
            coarse_logits: (C, d, h, w).
            indices: all candidates that will be added.
            class_weights: c, (C,).
            coarse_labels: `labels` of the CoarseUpsampler of these logits, (D, H, W); None computes them.
        """
        self.grid = grid
        self.window = patch_window(grid.patch_size, device=coarse_logits.device)
        self.class_weights = class_weights
        self.upsampler = CoarseUpsampler(coarse_logits, shape=grid.padded_shape)
        self.labels = self.upsampler.labels() if coarse_labels is None else coarse_labels.clone()
        self.pending: dict[tuple[int, int, int], int] = {}
        self.sums: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        for index in indices:
            for block in self._blocks(index):
                self.pending[block] = self.pending.get(block, 0) + 1

    def add(self, index: int, logits: Tensor) -> None:
        """Take the local logits (C, P, P, P) of a candidate that was announced."""
        start = self.grid.starts[index]
        weighted = self.window * logits
        for block in self._blocks(index):
            box = self._box(block)
            inside = tuple(slice(s.start - int(o), s.stop - int(o)) for s, o in zip(box, start))
            total, weight_sum = self.sums.get(block) or (weighted.new_zeros((len(logits), *self.grid.stride)), weighted.new_zeros(self.grid.stride))
            total += weighted[(slice(None), *inside)]
            weight_sum += self.window[inside]
            self.sums[block] = (total, weight_sum)
            self.pending[block] -= 1
            if self.pending[block] == 0:
                self._finish_block(block, box)

    def finish(self) -> Tensor:
        """The labels, (D, H, W) uint8 of the padded volume.

        Raises:
            ValueError: an announced patch was not added.
        """
        if self.pending:
            raise ValueError(f"{len(self.pending)} blocks still wait for a patch that was announced but not added")
        return self.labels

    def _finish_block(self, block: tuple[int, int, int], box: tuple[slice, ...]) -> None:
        """Mix, take the arg max, forget the sums."""
        total, weight_sum = self.sums.pop(block)
        mixed = _mix(total, weight_sum, weight_sum, self.upsampler.region(box), self.class_weights)
        self.labels[box] = _best_class(mixed)
        del self.pending[block]

    def _blocks(self, index: int) -> list[tuple[int, int, int]]:
        """The blocks of a patch, by their place in the grid of blocks."""
        first = [int(start) // step for start, step in zip(self.grid.starts[index], self.grid.stride)]
        d, h, w = [range(f, f + size // step) for f, size, step in zip(first, self.grid.patch_size, self.grid.stride)]
        return [(i, j, k) for i in d for j in h for k in w]

    def _box(self, block: tuple[int, int, int]) -> tuple[slice, slice, slice]:
        """The voxels of a block."""
        return tuple(slice(i * step, (i + 1) * step) for i, step in zip(block, self.grid.stride))


def _mix(total: Tensor, weight_sum: Tensor, gated_sum: Tensor, upsampled: Tensor, class_weights: Tensor) -> Tensor:
    """a L + (1 - a G) y_up, with G = gated_sum / weight_sum, exactly 1 without gates."""
    a = mixing_weights(class_weights)[:, None, None, None]
    return a * (total / weight_sum) + (1 - a * (gated_sum / weight_sum)) * upsampled


def _best_class(logits: Tensor) -> Tensor:
    """arg max over the first axis, uint8, the lowest class where several are largest; `max` is twice as fast as `argmax`."""
    return logits.max(0).indices.to(torch.uint8)


def _axis_taps(full: int, coarse: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower index, upper index and weight of the upper one for every full-resolution voxel of an axis."""
    position = ((torch.arange(full, dtype=torch.float64) + 0.5) * coarse / full - 0.5).clamp(0, coarse - 1)
    lower = position.floor().long()
    return lower.to(device), (lower + 1).clamp_max(coarse - 1).to(device), (position - lower).float().to(device)


def _overlap(box: Sequence[slice], other: Sequence[slice]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes meet, in the coordinates of each; None where they do not."""
    meets = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, other)]
    if any(start >= stop for start, stop in meets):
        return None
    return tuple(tuple(slice(start - s.start, stop - s.start) for (start, stop), s in zip(meets, frame)) for frame in (box, other))
