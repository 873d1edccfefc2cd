"""Padding: what a scan does not show, as scanners, resampling, registration and masks fill it, with one value.

No structure is found in it. Of a CT it has a value that the networks cannot tell from air, or it has 0 in many programs: that is water, in which a
network sees organs. So voxels of a padding with 0 are taken for air, in training as in a run.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from NMSWSegment.files.normalization import FIXED

WATER = 0
SHORTEST_LINE = 3
"""Voxels: as many of one value at the border, or along each axis in a corner, are no noise."""


@dataclass(frozen=True)
class Padding:
    """Which voxels of a volume (K, J, I) are padding."""

    packed: np.ndarray
    """(K, J, I / 8 rounded up) uint8, eight voxels a byte."""
    width: int
    """I."""
    share_of_zeros: float
    """Of the volume's voxels: padding with 0, which is taken for air."""

    def of_slices(self, slices: slice) -> np.ndarray:
        """The voxels of some slices, (slices, J, I) bool."""
        return np.unpackbits(self.packed[slices], axis=-1, count=self.width).view(bool)

    def clear(self, labels: np.ndarray) -> None:
        """Turn labels (K, J, I) of the padding into background, in place."""
        for number, one in enumerate(labels):
            one[self.of_slices(slice(number, number + 1))[0]] = 0


def find_padding(array: np.ndarray, *, normalization: str, darkest: float) -> Padding | None:
    """The padding of a volume; None where there is none, or where its intensities are relative, as in MR.

    A corner of the volume shows whether there is one, and its value. Its voxels are those from which a straight line along a row or column of their
    slice leaves the volume through such values alone. Outside of a convex field of view, such as a box or a circle, that is every voxel: one of
    the four lines that lead away from it meets nothing.

    Args:
        array: intensities (K, J, I).
        normalization: of the model, one of normalization.NORMALIZATIONS.
        darkest: lower bound of the intensities that the model distinguishes, HU for CT.
    """
    values = {value for value in _corner_values(array) if value <= darkest or value == WATER}
    if normalization != FIXED or not values:
        return None
    packed, num_found, num_zeros = [], 0, 0
    for one in array:
        found = functools.reduce(np.logical_or, (one == value for value in values))
        found = _reached_from_the_ends(found, axis=0) | _reached_from_the_ends(found, axis=1)
        packed.append(np.packbits(found, axis=-1))
        num_found += np.count_nonzero(found)
        num_zeros += np.count_nonzero(found & (one == WATER)) if WATER in values else 0
    return Padding(np.stack(packed), width=array.shape[2], share_of_zeros=num_zeros / array.size) if 0 < num_found < array.size else None


def _corner_values(array: np.ndarray) -> Iterator[float]:
    """Of every corner of the volume that has only one value."""
    ends = (slice(None, SHORTEST_LINE), slice(-SHORTEST_LINE, None))
    for corner in itertools.product(ends, repeat=3):
        first = array[corner].flat[0]
        if (array[corner] == first).all():
            yield first.item()


def _reached_from_the_ends(filled: np.ndarray, *, axis: int) -> np.ndarray:
    """Voxels of a slice, bool, of lines of True along an axis that begin at one of its ends; a voxel or two there are noise."""
    length = filled.shape[axis]
    places = np.arange(length, dtype=np.min_scalar_type(-2 * length)).reshape((-1, 1) if axis == 0 else (1, -1))
    beyond = filled * places.dtype.type(length)
    first = (places + beyond).min(axis=axis, keepdims=True)  # that is not filled
    last = (places - beyond).max(axis=axis, keepdims=True)
    first[first < SHORTEST_LINE] = 0
    last[last >= length - SHORTEST_LINE] = length - 1
    return (places < first) | (places > last)
