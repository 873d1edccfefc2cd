"""Padding: what a scan does not show, filled with one value by a resampling, a registration or a mask.

CT is padded with air or with values below it, which the networks know. Many programs fill with 0 instead, which is water in a CT: a network
sees organs in it. So voxels of such a padding are taken for air, in training as in a run, and no structure is found in them.
"""

import itertools

import numpy as np

CORNER_VOXELS = 3
"""Along each axis: as many equal voxels in a corner are no noise."""


def find_padding(array: np.ndarray, *, darkest: float) -> np.ndarray | None:
    """Voxels of the padding, (K, J, I) bool; None where there is none, or none that is brighter than `darkest`, which the nets cannot tell from air.

    Its value is that of a corner of the volume, its voxels those from which a straight line along an axis leaves the volume through voxels of that value
    alone. Outside of a convex field of view, such as a box or a circle, that is every voxel: the line that leads away from it meets nothing.

    Args:
        array: intensities (K, J, I).
        darkest: lower bound of the intensities that the nets distinguish.
    """
    value = _corner_value(array, darkest=darkest)
    if value is None:
        return None
    same = array == value
    padding = np.zeros_like(same)
    for axis in range(3):
        for line in (same, np.flip(same, axis)):
            meets_nothing = np.logical_and.accumulate(line, axis=axis)
            padding |= meets_nothing if line is same else np.flip(meets_nothing, axis)
    return None if padding.all() else padding


def _corner_value(array: np.ndarray, *, darkest: float) -> float | None:
    """The value that a corner of the volume is filled with, if it is brighter than `darkest`."""
    ends = (slice(None, CORNER_VOXELS), slice(-CORNER_VOXELS, None))
    for corner in itertools.product(ends, repeat=3):
        voxels = array[corner]
        if voxels.flat[0] > darkest and (voxels == voxels.flat[0]).all():
            return voxels.flat[0]
    return None
