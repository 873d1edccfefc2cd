"""Padding with 0: what a scan does not show, as a resampling, a registration or a mask fills it in many programs.

CT is padded with air or with values below it, which the networks know. 0 is water in a CT: a network sees organs in it. So voxels of such a
padding are taken for air, in training as in a run, and no structure is found in them.
"""

import itertools

import numpy as np

FILL_VALUE = 0
CORNER_VOXELS = 3
"""Along each axis: as many voxels of the value in a corner are no noise."""


def find_padding(array: np.ndarray, *, darkest: float) -> np.ndarray | None:
    """Voxels of the padding, (K, J, I) bool; None where there is none, or where the nets cannot tell it from air.

    A corner of the volume shows whether there is one. Its voxels are those from which a straight line along an axis leaves the volume through zeros
    alone. Outside of a convex field of view, such as a box or a circle, that is every voxel: the line that leads away from it meets nothing.

    Args:
        array: intensities (K, J, I).
        darkest: lower bound of the intensities that the nets distinguish.
    """
    if darkest >= FILL_VALUE or not _has_filled_corner(array):
        return None
    filled = array == FILL_VALUE
    padding = np.zeros_like(filled)
    for axis in range(3):
        padding |= np.logical_and.accumulate(filled, axis=axis)
        padding |= np.flip(np.logical_and.accumulate(np.flip(filled, axis), axis=axis), axis)
    return None if padding.all() else padding


def _has_filled_corner(array: np.ndarray) -> bool:
    """Whether all voxels of a corner of the volume have the value."""
    ends = (slice(None, CORNER_VOXELS), slice(-CORNER_VOXELS, None))
    return any((array[corner] == FILL_VALUE).all() for corner in itertools.product(ends, repeat=3))
