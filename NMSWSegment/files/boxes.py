"""Boxes in space: their corners, and the upright box around a turned one."""

import numpy as np
from numpy.typing import ArrayLike


def box_corners(low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """The eight corners of a box as homogeneous points, (8, 4) float64, the first coordinate slowest.

    Args:
        low, high: coordinates of the two ends along three axes; one number is for all axes.
    """
    low, high = (np.broadcast_to(np.asarray(end, dtype=np.float64), 3) for end in (low, high))
    return np.array([[x, y, z, 1] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])


def bounds_after(matrix: np.ndarray, *, low: ArrayLike, high: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates of a box after a 4 x 4, each (3,)."""
    points = (matrix @ box_corners(low, high).T)[:3]
    return points.min(1), points.max(1)


def voxel_corners(shape: tuple[int, int, int]) -> np.ndarray:
    """Centers of the corner voxels of an array of `shape` (KJI), homogeneous ijk, (8, 4)."""
    return box_corners(0, np.array(shape[::-1]) - 1)
