"""Candidate patches: a regular grid of overlapping cubes that covers a padded volume exactly.

The paper clamps the last patch of an axis; here the volume is padded instead (docs/deviations.md, D1), so that every
stride-sized block is covered by whole patches and patches meet on block borders.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class CandidateGrid:
    """All N candidates of one volume, in array order KJI; candidates are numbered with the last axis fastest."""

    patch_size: Triple
    """Voxels of a patch along each axis."""
    stride: Triple
    """Voxels between neighboring starts along each axis."""
    counts: Triple
    """Candidates along each axis."""
    shape: Triple
    """Voxels of the volume before padding."""
    coarse_factor: Triple = (1, 1, 1)
    """r: coarse voxel i covers the voxels [r i, r i + r) along each axis."""

    @classmethod
    def covering(cls, shape: Triple, *, patch_size: Triple, overlap: float, coarse_factor: Triple = (1, 1, 1)) -> "CandidateGrid":
        """The smallest grid whose patches cover a volume of `shape`.

        Args:
            shape: voxels of the volume before padding, KJI.
            patch_size: voxels of a patch, KJI.
            overlap: share of a patch that the next one repeats, in [0, 1).
            coarse_factor: r, KJI; does not matter to those who only ask for candidates.

        Raises:
            ValueError: the overlap does not give a whole stride that divides the patch.

        Source: paper section 3.2, N = ceil((D - P) / s) + 1 per axis.
        """
        stride = tuple(round(size * (1 - overlap)) for size in patch_size)
        if any(step < 1 or size % step for size, step in zip(patch_size, stride)):
            raise ValueError(f"overlap {overlap} of patch {patch_size} gives stride {stride}, which does not divide the patch")
        counts = tuple(-(-max(length - size, 0) // step) + 1 for length, size, step in zip(shape, patch_size, stride))
        return cls(patch_size=tuple(patch_size), stride=stride, counts=counts, shape=tuple(shape), coarse_factor=tuple(coarse_factor))

    @property
    def has_whole_coarse_voxels(self) -> bool:
        """Whether every candidate begins and ends with a coarse voxel, as a cascade needs."""
        return not any(size % r or step % r for size, step, r in zip(self.patch_size, self.stride, self.coarse_factor))

    @property
    def padded_shape(self) -> Triple:
        """Voxels of the padded volume: P + (n - 1) s along each axis."""
        return tuple(size + (count - 1) * step for size, count, step in zip(self.patch_size, self.counts, self.stride))

    @cached_property
    def coarse_shape(self) -> Triple:
        """Voxels of the coarse volume: those that cover the volume's own extent, and one at least with its center in every candidate."""
        return tuple(
            max(-(-length // r), -(-(2 * (full - size) - r) // (2 * r)) + 1)
            for length, full, size, r in zip(self.shape, self.padded_shape, self.patch_size, self.coarse_factor)
        )

    @property
    def num_candidates(self) -> int:
        """N."""
        return int(np.prod(self.counts))

    @cached_property
    def starts(self) -> np.ndarray:
        """First voxel of every candidate, (N, 3) int64, KJI."""
        axes = [np.arange(count) * step for count, step in zip(self.counts, self.stride)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)

    def slices(self, index: int) -> tuple[slice, slice, slice]:
        """Voxels [start, start + P) of a candidate, to index the last three axes of an array."""
        return tuple(slice(int(start), int(start) + size) for start, size in zip(self.starts[index], self.patch_size))
