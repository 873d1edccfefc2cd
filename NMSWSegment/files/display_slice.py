"""Upright slices of a volume and its labelmap for a picture, whatever the direction of the voxel axes."""

from dataclasses import dataclass

import numpy as np

from NMSWSegment.files.boxes import box_corners
from NMSWSegment.files.volume import Volume

# Index of the RAS axis that runs across, up and through the picture.
PLANES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}

_MAX_PIXELS = 700
"""Along one side of a slice; a preview is smaller than that on the page."""
_MAX_LABEL_POINTS = 500_000
"""Labeled voxels that take part in the choice of positions; more give the same choice."""


@dataclass(frozen=True)
class DisplaySlice:
    """One slice in radiological view: patient right (or anterior) at the left edge, superior (or anterior) at the top."""

    plane: str
    """axial, coronal or sagittal."""
    position_mm: float
    """Where the slice lies on the RAS axis through the picture."""
    across_mm: tuple[float, float]
    """RAS coordinate at the left and the right edge; falls from left to right."""
    up_mm: tuple[float, float]
    """RAS coordinate at the bottom and the top edge."""
    intensities: np.ndarray
    """(rows, columns) float32, top row first; nan outside the volume."""
    labels: np.ndarray
    """(rows, columns), dtype of the labelmap, 0 outside."""


def display_slices(volume: Volume, labelmap: Volume) -> tuple[DisplaySlice, ...]:
    """An axial, a coronal and a sagittal slice through the positions that show most structures.

    Args:
        volume: intensities.
        labelmap: labels on the grid of the volume.
    """
    corners = _corners_ras(volume)
    low, high = corners.min(axis=0), corners.max(axis=0)
    positions = _informative_position_ras(labelmap, low, high)
    return tuple(_display_slice(volume, labelmap, plane=plane, position_ras=positions, bounds_ras=(low, high)) for plane in PLANES)


def _corners_ras(volume: Volume) -> np.ndarray:
    """Outer corners of the corner voxels, (8, 3)."""
    corners_ijk = box_corners(-0.5, np.array(volume.shape[::-1]) - 0.5)[:, :3]
    return corners_ijk @ volume.ijk_to_ras[:3, :3].T + volume.ijk_to_ras[:3, 3]


def _informative_position_ras(labelmap: Volume, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Point whose three slices cut the most structures, each where it is large; the middle if there are none."""
    found = np.flatnonzero(labelmap.array)
    if len(found) == 0:
        return (low + high) / 2
    found = found[:: -(-len(found) // _MAX_LABEL_POINTS)]
    values = np.unique(labelmap.array.ravel()[found], return_inverse=True)[1]
    index_ijk = np.stack(np.unravel_index(found, labelmap.shape)[::-1], axis=-1)  # (points, 3)
    points_ras = index_ijk @ labelmap.ijk_to_ras[:3, :3].T + labelmap.ijk_to_ras[:3, 3]
    # Bins no narrower than the widest voxel side: narrower ones would stay empty between slices.
    step_mm = max(labelmap.spacing_mm)
    position = np.empty(3)
    for axis in range(3):
        bins = np.floor((points_ras[:, axis] - low[axis]) / step_mm).astype(np.int64)
        counts = np.zeros((values.max() + 1, bins.max() + 1))
        np.add.at(counts, (values, bins), 1)
        # The root counts a structure that is just touched for little, yet prefers two halves to one whole.
        scores = np.sqrt(counts / counts.max(axis=1, keepdims=True)).sum(axis=0)
        best = np.flatnonzero(scores >= scores.max() * (1 - 1e-9))
        position[axis] = low[axis] + (best[len(best) // 2] + 0.5) * step_mm  # the middle of equally good ones
    return np.clip(position, low, high)


def _display_slice(volume: Volume, labelmap: Volume, *, plane: str, position_ras: np.ndarray, bounds_ras: tuple[np.ndarray, np.ndarray]) -> DisplaySlice:
    """Sample one plane."""
    across, up, through = PLANES[plane]
    low, high = bounds_ras
    step_mm = max(min(volume.spacing_mm), max(high[across] - low[across], high[up] - low[up]) / _MAX_PIXELS)
    columns = _pixel_centers(low[across], high[across], step_mm)[::-1]  # right or anterior first
    rows = _pixel_centers(low[up], high[up], step_mm)[::-1]  # superior or anterior first
    points_ras = np.empty((len(rows), len(columns), 3))
    points_ras[..., across], points_ras[..., up], points_ras[..., through] = columns[None, :], rows[:, None], position_ras[through]
    ras_to_ijk = np.linalg.inv(volume.ijk_to_ras)
    index_kji = (points_ras @ ras_to_ijk[:3, :3].T + ras_to_ijk[:3, 3])[..., ::-1]
    return DisplaySlice(
        plane=plane,
        position_mm=float(position_ras[through]),
        across_mm=(float(high[across]), float(low[across])),
        up_mm=(float(low[up]), float(high[up])),
        intensities=_sample_linear(volume.array, index_kji),
        labels=_sample_nearest(labelmap.array, index_kji),
    )


def _pixel_centers(low: float, high: float, step_mm: float) -> np.ndarray:
    """Centers of equal pixels of about `step_mm` that fill [low, high]."""
    count = max(int(round((high - low) / step_mm)), 1)
    return low + (np.arange(count) + 0.5) * (high - low) / count


def _is_inside(shape: tuple[int, int, int], index_kji: np.ndarray) -> np.ndarray:
    """Which points lie in a voxel, half a voxel beyond the outermost centers included."""
    return ((index_kji >= -0.5) & (index_kji <= np.array(shape) - 0.5)).all(axis=-1)


def _sample_linear(array: np.ndarray, index_kji: np.ndarray) -> np.ndarray:
    """Trilinear values at fractional indices, float32; nan outside."""
    inside = _is_inside(array.shape, index_kji)
    index = np.clip(index_kji[inside], 0, np.array(array.shape) - 1)  # (points, 3)
    first = np.minimum(index.astype(np.int64), np.maximum(np.array(array.shape) - 2, 0))
    share = index - first
    values = np.zeros(len(index))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share), axis=-1)
        values += weight * array[tuple((first + corner).T)]
    result = np.full(inside.shape, np.nan, dtype=np.float32)
    result[inside] = values
    return result


def _sample_nearest(array: np.ndarray, index_kji: np.ndarray) -> np.ndarray:
    """Value of the voxel around each fractional index; 0 outside."""
    inside = _is_inside(array.shape, index_kji)
    nearest = np.clip(np.rint(index_kji[inside]).astype(np.int64), 0, np.array(array.shape) - 1)
    result = np.zeros(inside.shape, dtype=array.dtype)
    result[inside] = array[tuple(nearest.T)]
    return result
