"""Boxes in space: their corners, the upright box around a turned one, and those around labels."""

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


def label_boxes(labels: np.ndarray) -> dict[int, tuple[slice, slice, slice]]:
    """The smallest box of every label but 0, KJI, by rising label.

    Args:
        labels: (K, J, I) uint8.
    """
    slices, rows, columns = (np.zeros((256, length), bool) for length in labels.shape)
    for k, plane in enumerate(labels):
        for value in np.flatnonzero(np.bincount(plane.ravel(), minlength=256)[1:]) + 1:
            is_inside = plane == value
            slices[value, k] = True
            rows[value] |= is_inside.any(axis=1)
            columns[value] |= is_inside.any(axis=0)
    return {int(value): tuple(_span(hit[value]) for hit in (slices, rows, columns)) for value in np.flatnonzero(slices.any(axis=1))}


def _span(hit: np.ndarray) -> slice:
    """From the first to the last True."""
    places = np.flatnonzero(hit)
    return slice(int(places[0]), int(places[-1]) + 1)
