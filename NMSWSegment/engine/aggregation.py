"""Mix the coarse and the local logits (NMSW Eq. 6).

    L(v)      = sum_k w(v - o_k) y_k(v) / sum_k w(v - o_k)          over the patches that cover v
    y_high(v) = a L(v) + (1 - a) y_up(v)                            a = sigmoid(clamp(c, -1, 10)), per class
    y_high(v) = y_up(v)                                             where no patch covers v

The published code mixes by convolutions instead (docs/deviations.md, D23).

`aggregate` is the reference (differentiable, needs C full volumes); StreamingAggregator gives the same labels bit for bit
with memory of one label volume and a few blocks. Both up-sample with `CoarseUpsampler`, whose every output voxel is the
same sequence of float32 products and sums wherever it is computed.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.engine.blocked import BLOCK_FLOATS, BestClass, in_threads, ranges, shares
from NMSWSegment.files.grid import CandidateGrid

Block = tuple[int, int, int]
"""A stride-sized block by its place in the grid of blocks."""
SLICES_AT_ONCE = 16
"""Of a patch, for one thread."""
LIKELY_LOGITS = 3.0
"""How far below the likeliest class of a block a class may stay, at its best, to be looked at first. No label depends on it."""
WINDOW_SIGMA = 0.125  # of the patch size; MONAI's and nnU-Net's choice
WINDOW_FLOOR = 1e-3
UNIFORM_MARGIN = 1e-5  # relative; far above the rounding of three float32 interpolations
BOUND_MARGIN = 1e-3  # relative; far above that of a sum of patches
CLASS_WEIGHT_BOUNDS = (-1.0, 10.0)
"""Of c in Eq. 6."""


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # one that was made at inference would be of no use where gradients are needed
def patch_window(patch_size: tuple[int, int, int], *, device: torch.device | str = "cpu") -> Tensor:
    """Gaussian weight of every patch voxel, (P, P, P), at most 1 and at least 0.001; kept, and only to be read.

    Source: paper section 3.4; sigma = 0.125 P.
    """
    window = torch.ones((), dtype=torch.float64)
    for size in patch_size:
        offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        window = window[..., None] * torch.exp(-0.5 * (offset / (WINDOW_SIGMA * size)) ** 2)
    return (window / window.max()).clamp_min(WINDOW_FLOOR).float().to(device)


def mixing_weights(class_weights: Tensor) -> Tensor:
    """a of Eq. 6: sigmoid(clamp(c, -1, 10)), (C,)."""
    return torch.sigmoid(class_weights.clamp(*CLASS_WEIGHT_BOUNDS))


class CoarseUpsampler:
    """y_up: trilinear up-sampling of coarse logits to any box of the full volume.

    The same numbers as torch.nn.functional.interpolate(mode="trilinear", align_corners=False) up to rounding where coarse voxels of r voxels
    make up the volume. Axes are interpolated last one first, so that most of the work runs along contiguous voxels.
    """

    def __init__(self, coarse_logits: Tensor, *, grid: CandidateGrid, origin: Block | None = None) -> None:
        """Args: coarse_logits (C, d, h, w); origin: first coarse voxel of those that are only a part, None where they are all.

        Raises:
            ValueError: they are not those of the grid's volume.
        """
        if origin is None and tuple(coarse_logits.shape[1:]) != grid.coarse_shape:
            raise ValueError(f"coarse logits of {tuple(coarse_logits.shape[1:])} voxels for a coarse volume of {grid.coarse_shape}")
        self.coarse_logits = coarse_logits
        self.grid = grid
        axes = zip(grid.padded_shape, grid.coarse_shape, grid.coarse_factor, origin or (0, 0, 0))
        self.taps = [_AxisTaps(*axis) for axis in axes]

    def needed(self, box: Sequence[slice]) -> tuple[slice, slice, slice]:
        """The coarse voxels that a box of full-resolution voxels needs."""
        lower_upper = [taps.parts[:2] for taps in self.taps]
        return tuple(slice(int(lower[along][0]), int(upper[along][-1]) + 1) for (lower, upper), along in zip(lower_upper, box))

    def part(self, box: Sequence[slice]) -> Tensor:
        """The coarse logits of a box that consists of whole coarse voxels, (C, box / r); those of the edge go on where the coarse volume ends early.

        This is what the local net of a cascade reads.
        """
        values = self.coarse_logits
        for axis, (taps, along) in enumerate(zip(self.taps, box), start=1):
            voxels = np.arange(along.start // taps.factor, along.stop // taps.factor).clip(0, taps.coarse - 1) - taps.origin
            values = values.index_select(axis, torch.from_numpy(voxels).to(values.device))
        return values

    def region(self, box: Sequence[slice]) -> Tensor:
        """y_up in a box of full-resolution voxels, (C, box); differentiable."""
        values = self.coarse_logits
        for axis in (3, 2, 1):
            lower, upper, weight = (torch.from_numpy(part[box[axis - 1]]).to(values.device) for part in self.taps[axis - 1].parts)
            t = weight.reshape([-1 if i == axis else 1 for i in range(4)])
            first, last = int(lower[0]), int(upper[-1])
            values = values.narrow(axis, first, last - first + 1)
            low = values.index_select(axis, lower - first)
            values = low + (values.index_select(axis, upper - first) - low) * t
        return values

    def highest(self, box: Sequence[slice]) -> np.ndarray:
        """No value of `region` is higher than these, (C,), but for rounding."""
        return self.coarse_logits.numpy()[(slice(None), *self.needed(box))].max(axis=(1, 2, 3))

    def slabs(self, box: Sequence[slice], *, classes: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """`region` of some classes, a few slices at a time: slices of the box and y_up there, (classes, slices, h, w), to be used at once."""
        depth, height, width = ([part[inside] for part in taps.parts] for taps, inside in zip(self.taps, box))
        rows, columns = (slice(lower[0], upper[-1] + 1) for lower, upper, _ in (height, width))
        starts = [0, *(np.flatnonzero(np.diff(depth[0]) | np.diff(depth[1])) + 1).tolist(), len(depth[0])]
        planes: dict[int, np.ndarray] = {}
        for start, stop in itertools.pairwise(starts):  # slices between the same two coarse planes
            below, above = int(depth[0][start]), int(depth[1][start])
            planes = {d: planes.get(d) for d in (below, above)}
            for d in planes:
                if planes[d] is None:
                    part = self.coarse_logits.numpy()[classes, d, rows, columns]
                    part = _interpolated(part, *(index - columns.start for index in width[:2]), width[2], axis=2)
                    planes[d] = _interpolated(part, *(index - rows.start for index in height[:2]), height[2][:, None], axis=1)
            values = (planes[above] - planes[below])[:, None] * depth[2][start:stop, None, None]
            yield slice(start, stop), np.add(planes[below][:, None], values, out=values)

    def labels(self) -> Tensor:
        """arg max of y_up everywhere, (D, H, W) uint8, without ever holding C full volumes.

        A cell whose eight corners agree clearly on the arg max has that class everywhere inside, because the interpolant
        is a convex combination; only mixed cells are interpolated.
        """
        cells = uniform_cells(torch.from_numpy(np.pad(_clear_classes(self.coarse_logits.numpy()), 1, mode="edge")))[:-1, :-1, :-1].numpy()
        for axis, taps in enumerate(self.taps):
            cells = cells.take(taps.cells + 1, axis=axis)
        labels = cells.astype(np.uint8)
        for axis, factor in ((2, self.grid.coarse_factor[2]), (1, self.grid.coarse_factor[1]), (0, self.grid.coarse_factor[0])):
            labels = labels.repeat(factor, axis=axis)
        shape = [side for count, factor in zip(cells.shape, self.grid.coarse_factor) for side in (count, factor)]
        by_cell = labels.reshape(shape).transpose(0, 2, 4, 1, 3, 5)  # a view: cells, then the voxels of each
        mixed = np.stack(np.nonzero(cells < 0))
        at_once = max(1, BLOCK_FLOATS // (len(self.coarse_logits) * int(np.prod(self.grid.coarse_factor))))
        in_threads(lambda part: self._label_cells(by_cell, mixed[:, part]), ranges(mixed.shape[1], step=at_once))
        box = tuple(slice(taps.first, taps.first + length) for taps, length in zip(self.taps, self.grid.padded_shape))
        return torch.from_numpy(np.ascontiguousarray(labels[box]))

    def _label_cells(self, by_cell: np.ndarray, cells: np.ndarray) -> None:
        """Write the labels of some cells, (3, n) indices: the arithmetic of `region`, axis by axis."""
        pairs = [taps.corners(taps.cells[index]) for taps, index in zip(self.taps, cells)]
        corner = [np.stack(pair).reshape([2 if i == axis else 1 for i in range(3)] + [-1]) for axis, pair in enumerate(pairs)]
        values = self.coarse_logits.numpy()[:, corner[0], corner[1], corner[2]]  # (C, 2, 2, 2, n)
        for axis in (3, 2, 1):  # (C, 2, 2, 2, n) -> (C, 2, 2, r, n) -> (C, 2, r, r, n) -> (C, r, r, r, n)
            t = self.taps[axis - 1].phases.reshape([-1 if i == axis else 1 for i in range(5)])
            low = values.take([0], axis=axis)
            values = low + (values.take([1], axis=axis) - low) * t
        best, _ = BestClass(len(values))(values)
        by_cell[tuple(cells)] = np.moveaxis(best, -1, 0)


def patch_upsamplers(coarse_logits: Tensor, *, indices: Sequence[int], grid: CandidateGrid) -> dict[int, CoarseUpsampler]:
    """The up-sampler of each candidate, with a copy of what it needs where all of them together take less than the logits (C, d, h, w)."""
    whole = CoarseUpsampler(coarse_logits, grid=grid)
    needed = {index: whole.needed(grid.slices(index)) for index in indices}
    if sum(math.prod(part.stop - part.start for part in box) for box in needed.values()) >= math.prod(grid.coarse_shape):
        return dict.fromkeys(indices, whole)
    return {
        index: CoarseUpsampler(coarse_logits[(slice(None), *box)].clone(), grid=grid, origin=tuple(part.start for part in box)) for index, box in needed.items()
    }


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
    upsampled = CoarseUpsampler(coarse_logits, grid=grid).region(box)
    window = patch_window(grid.patch_size, device=coarse_logits.device)
    overlaps = {index: _overlap(box, grid.slices(index)) for index in indices}
    weight_sum = torch.zeros(upsampled.shape[1:], device=upsampled.device)
    gated_sum = torch.zeros_like(weight_sum)
    for index, gate in sorted(zip(indices, torch.ones(len(indices)) if gates is None else gates), key=lambda pair: pair[0]):
        if overlaps[index]:
            in_box, in_patch = overlaps[index]
            weight_sum[in_box] += window[in_patch]
            gated_sum[in_box] += window[in_patch] * gate
    total = torch.zeros_like(upsampled)
    for position, (index, logits) in enumerate(zip(indices, patch_logits)):
        if overlaps[index]:
            in_box, in_patch = overlaps[index]
            share = window[in_patch] / weight_sum[in_box]
            total[(slice(None), *in_box)] += (share if gates is None else share * gates[position]) * logits[(slice(None), *in_patch)]
    is_covered = weight_sum > 0
    a = mixing_weights(class_weights)[:, None, None, None]
    gated_share = gated_sum / torch.where(is_covered, weight_sum, torch.ones_like(weight_sum))  # exactly 1 without gates
    return torch.where(is_covered, a * total + (1 - a * gated_share) * upsampled, upsampled), is_covered


@dataclass
class _BlockSums:
    """What a block that several patches cover has so far."""

    weight_sum: np.ndarray
    """Of the windows of all its patches, (block)."""
    missing: int
    """Patches that have not come yet."""
    total: np.ndarray
    """Weighted logits of those that have come, (C, block)."""
    highest: np.ndarray
    """No logit of those that have come is higher, (C,); so is no mean of them."""


@dataclass(frozen=True)
class _Piece:
    """A block as the patch that is being added sees it."""

    block: Block
    inside: tuple[slice, slice, slice]
    """Its voxels in the coordinates of the patch."""
    highest: np.ndarray
    """As in the sums, with this patch, (C,)."""
    sums: _BlockSums | None
    """None where no other patch covers the block."""
    is_first: bool
    is_last: bool


class StreamingAggregator:
    """arg max of Eq. 6 while the patches come in, in O(volume) memory (docs/deviations.md, D8).

    Every stride-sized block keeps one accumulator from its first patch to its last; then it is mixed, turned into labels
    and forgotten. Patches added in candidate order keep the fewest blocks alive; any order is right, and sums run in
    the order of adding, so that the labels equal those of `aggregate` with the same order.
    """

    def __init__(self, upsamplers: dict[int, CoarseUpsampler], *, grid: CandidateGrid, class_weights: Tensor, coarse_labels: Tensor) -> None:
        """Take what holds where no patch will come.

        Args:
            upsamplers: of the coarse logits on the CPU, for each candidate that will be added; forgotten when it has come.
            class_weights: c, (C,).
            coarse_labels: `labels` of the CoarseUpsampler of these logits, (D, H, W).
        """
        self.grid = grid
        self.window = patch_window(grid.patch_size).numpy()
        self.upsamplers = upsamplers
        self.labels = coarse_labels.clone()
        a = mixing_weights(class_weights.cpu())[:, None, None, None]
        self.shares = a.numpy(), (1 - a).numpy()  # of the patches and of y_up, (C, 1, 1, 1)
        self.covering: dict[Block, list[int]] = {}  # the candidates of each block that is not done
        self.sums: dict[Block, _BlockSums] = {}
        for index in sorted(upsamplers):
            for block in self._blocks(index):
                self.covering.setdefault(block, []).append(index)

    def add(self, index: int, logits: Tensor) -> None:
        """Take the local logits (C, P, P, P) of a candidate that was announced."""
        patch, upsampler = logits.numpy(), self.upsamplers.pop(index)
        pieces = [self._piece(index, block, highest=highest) for block, highest in zip(self._blocks(index), self._highest_of_blocks(logits))]
        tasks = [(piece, slices) for piece in pieces for slices in ranges(self.grid.stride[0], step=SLICES_AT_ONCE)]
        in_threads(lambda task: self._add_slices(patch, upsampler, piece=task[0], slices=task[1]), tasks)
        for piece in pieces:
            if piece.is_last:
                del self.covering[piece.block]
                self.sums.pop(piece.block, None)

    def finish(self) -> Tensor:
        """The labels, (D, H, W) uint8 of the padded volume.

        Raises:
            ValueError: an announced patch was not added.
        """
        if self.covering:
            raise ValueError(f"{len(self.covering)} blocks still wait for a patch that was announced but not added")
        return self.labels

    def _piece(self, index: int, block: Block, *, highest: np.ndarray) -> _Piece:
        """A block of a patch that comes now; highest: of its logits there, (C,)."""
        candidates = self.covering[block]
        inside = self._inside(index, block)
        if len(candidates) == 1:
            return _Piece(block, inside, highest, sums=None, is_first=True, is_last=True)
        is_first = block not in self.sums
        if is_first:
            weight_sum = sum((self.window[self._inside(other, block)] for other in candidates), start=np.zeros(self.grid.stride, np.float32))
            total = np.empty((len(highest), *self.grid.stride), np.float32)
            self.sums[block] = _BlockSums(weight_sum, missing=len(candidates), total=total, highest=highest)
        sums = self.sums[block]
        sums.missing -= 1
        sums.highest = np.maximum(sums.highest, highest)
        return _Piece(block, inside, sums.highest, sums=sums, is_first=is_first, is_last=sums.missing == 0)

    def _highest_of_blocks(self, logits: Tensor) -> np.ndarray:
        """The highest logit of every class in every block of a patch (C, P, P, P), (blocks, C), as `_blocks` counts them."""
        (d, h, w), num_classes = self.grid.stride, len(logits)
        rows = logits.reshape(num_classes, -1, d, logits.shape[2] * logits.shape[3]).amax(2)  # by the slices of a block, then its rows, its columns
        by_block = rows.reshape(num_classes, len(rows[0]), -1, h, logits.shape[3] // w, w).amax(3).amax(4)
        return by_block.reshape(num_classes, -1).t().numpy()

    def _add_slices(self, patch: np.ndarray, upsampler: CoarseUpsampler, *, piece: _Piece, slices: slice) -> None:
        """Some slices of a block: the arithmetic of `aggregate`, into the sums or, with the last patch, into the labels.

        Args:
            patch: (C, P, P, P) logits.
            upsampler: of the candidate.
        """
        first = piece.inside[0].start
        in_patch = slice(first + slices.start, first + slices.stop), *piece.inside[1:]
        source = patch[(slice(None), *in_patch)]
        share, total = None, None
        if piece.sums:
            share, total = self.window[in_patch] / piece.sums.weight_sum[slices], piece.sums.total[:, slices]
        if piece.is_last:
            self._label_slices(source, share, total, upsampler, piece=piece, slices=slices)
            return
        for z, rows in _parts(source.shape[1:], floats=len(source)):
            target = total[:, z, rows]
            if piece.is_first:
                np.multiply(share[z, rows], source[:, z, rows], out=target)
            else:
                np.add(target, share[z, rows] * source[:, z, rows], out=target)

    def _label_slices(
        self, source: np.ndarray, share: np.ndarray | None, total: np.ndarray | None, upsampler: CoarseUpsampler, *, piece: _Piece, slices: slice
    ) -> None:
        """Mix some slices of a block with y_up and write their labels. Only classes that can be the largest somewhere in the block are looked at.

        Args:
            source: logits of the patch there, (C, slices, h, w).
            share, total: what it counts and the sums of the patches before; None where it is alone.
        """
        depth, *in_plane = self._box(piece.block)
        box = slice(depth.start + slices.start, depth.start + slices.stop), *in_plane
        patch_share, coarse_share = self.shares
        bounds = patch_share.ravel() * piece.highest + coarse_share.ravel() * upsampler.highest(box)
        likely = np.flatnonzero(~(bounds < bounds.max() - LIKELY_LOGITS))  # all where a bound is no number
        others = float(np.delete(bounds, likely).max(initial=np.finfo(np.float32).min))
        others += BOUND_MARGIN * max(1.0, abs(others))
        if not self._mix(source, share, total, upsampler, box=box, classes=likely, others=others):
            self._mix(source, share, total, upsampler, box=box, classes=np.arange(len(source)))

    def _mix(
        self,
        source: np.ndarray,
        share: np.ndarray | None,
        total: np.ndarray | None,
        upsampler: CoarseUpsampler,
        *,
        box: tuple[slice, slice, slice],
        classes: np.ndarray,
        others: float = -np.inf,
    ) -> bool:
        """Write the labels of a box as if there were only some classes; whether that is right, because they are larger than all others everywhere.

        Args:
            source, share, total: as in _label_slices.
            box: in the volume.
            others: no other class is higher.
        """
        (patch_share, coarse_share), best, labels = (one[classes] for one in self.shares), BestClass(len(classes)), self.labels.numpy()[box]
        codes = classes.astype(np.uint8)
        for slab, upsampled in upsampler.slabs(box, classes=classes):
            for z, rows in _parts(labels[slab].shape, floats=len(classes)):
                here = slice(slab.start + z.start, slab.start + z.stop), rows
                values = source[(classes, *here)]  # a copy
                if share is not None:
                    np.multiply(share[here], values, out=values)
                    np.add(total[(classes, *here)], values, out=values)
                np.multiply(patch_share, values, out=values)
                np.add(values, coarse_share * upsampled[:, z, rows], out=values)
                found, least = best(values)
                if least < others:
                    return False
                labels[here] = codes[found]
        return True

    def _inside(self, index: int, block: Block) -> tuple[slice, slice, slice]:
        """The voxels of a block in the coordinates of a patch."""
        return tuple(slice(s.start - int(start), s.stop - int(start)) for s, start in zip(self._box(block), self.grid.starts[index]))

    def _blocks(self, index: int) -> list[Block]:
        """The blocks of a patch, by their place in the grid of blocks."""
        first = [int(start) // step for start, step in zip(self.grid.starts[index], self.grid.stride)]
        d, h, w = [range(f, f + size // step) for f, size, step in zip(first, self.grid.patch_size, self.grid.stride)]
        return [(i, j, k) for i in d for j in h for k in w]

    def _box(self, block: Block) -> tuple[slice, slice, slice]:
        """The voxels of a block."""
        return tuple(slice(i * step, (i + 1) * step) for i, step in zip(block, self.grid.stride))


def _parts(shape: Sequence[int], *, floats: int) -> Iterator[tuple[slice, slice]]:
    """Slices and rows of a box (D, H, W) in parts that stay in the processor's cache with so many floats a voxel."""
    depth, height, width = shape
    rows = BLOCK_FLOATS // (floats * width)
    for z in ranges(depth, step=rows // height):
        for y in ranges(height, step=rows):
            yield z, y


@dataclass(frozen=True)
class _AxisTaps:
    """Linear interpolation along one axis. The r voxels between the centers of coarse voxels c and c + 1 make up cell c; beyond the first and the
    last center the value is that of the edge."""

    full: int
    """Full-resolution voxels of the axis."""
    coarse: int
    factor: int
    """r."""
    origin: int = 0
    """Coarse voxel that `parts` calls 0."""

    @cached_property
    def phases(self) -> np.ndarray:
        """Weight of the upper coarse voxel for each voxel of a cell, (r,) float32."""
        r = self.factor
        return ((2 * (np.arange(r) + r // 2) + 1 - r) / (2 * r)).astype(np.float32)

    @cached_property
    def cells(self) -> np.ndarray:
        """The cells in a row that hold every voxel of the axis, -1 before the first center; repeated at the end where the coarse volume ends early."""
        return np.arange(-(self.factor // 2 > 0), self._cell(self.full - 1) + 1).clip(-1, self.coarse - 1)

    @property
    def first(self) -> int:
        """Place of voxel 0 among the voxels of these cells."""
        return -(self.factor // 2 + self.factor * int(self.cells[0]))

    @cached_property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower coarse voxel, upper coarse voxel and weight of the upper one for every voxel of the axis."""
        voxels = np.arange(self.full)
        cells = self._cell(voxels)
        lower, upper = self.corners(cells)
        return lower - self.origin, upper - self.origin, self.phases[voxels - self.factor // 2 - cells * self.factor]

    def corners(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper coarse voxel of some cells."""
        return cells.clip(0, self.coarse - 1), (cells + 1).clip(0, self.coarse - 1)

    def _cell(self, voxel: np.ndarray | int) -> np.ndarray | int:
        """The cell of a voxel."""
        return (voxel - self.factor // 2) // self.factor


def _interpolated(values: np.ndarray, lower: np.ndarray, upper: np.ndarray, weight: np.ndarray, *, axis: int) -> np.ndarray:
    """values[lower] + (values[upper] - values[lower]) weight along an axis; the weights broadcast. "clip" leaves out the check of the indices."""
    low, result = values.take(lower, axis=axis, mode="clip"), values.take(upper, axis=axis, mode="clip")
    np.subtract(result, low, out=result)
    np.multiply(result, weight, out=result)
    return np.add(low, result, out=result)


def _clear_classes(coarse_logits: np.ndarray) -> np.ndarray:
    """The arg max of every coarse voxel that has a clear one, -1 for the others; (C, d, h, w) -> (d, h, w) int16."""
    num_classes, shape = len(coarse_logits), coarse_logits.shape[1:]
    logits, result = coarse_logits.reshape(num_classes, -1), np.empty(int(np.prod(shape)), np.int16)
    codes = np.arange(num_classes, dtype=np.uint8)[:, None]

    def label(share: slice) -> None:
        for part in ranges(share.stop, start=share.start, step=BLOCK_FLOATS // num_classes):
            best = logits[:, part].max(0)
            near_best = logits[:, part] >= best - UNIFORM_MARGIN * np.maximum(np.abs(best), 1)
            is_clear = np.add.reduce(near_best.view(np.uint8), axis=0, dtype=np.uint16) == 1
            classes = np.multiply(near_best.view(np.uint8), codes, out=near_best.view(np.uint8)).max(0)
            result[part] = np.where(is_clear, classes, np.int16(-1))

    in_threads(label, shares(logits.shape[1]))
    return result.reshape(shape)


def _overlap(box: Sequence[slice], other: Sequence[slice]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes meet, in the coordinates of each; None where they do not."""
    meets = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, other)]
    if any(start >= stop for start, stop in meets):
        return None
    return tuple(tuple(slice(start - s.start, stop - s.start) for (start, stop), s in zip(meets, frame)) for frame in (box, other))
