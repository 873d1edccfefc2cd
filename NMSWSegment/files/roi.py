"""The region of interest: a box in the world, oblique or not, and the voxels that lie in it."""

from collections.abc import Iterator, Sequence

import numpy as np

from NMSWSegment.files.boxes import box_corners
from NMSWSegment.protocol import UserError

FACE_TOLERANCE = 1e-9  # of an edge: a voxel center on a face is inside, however the last digit was rounded
SHORTEST_EDGE_MM = 1e-3
FLATTEST = 1e-6  # volume of the box with edges of length 1; 1 at right angles
VOXELS_AT_ONCE = 1 << 18  # one slab of three float64 coordinates stays in the processor's cache

_WAY_OUT = "Drag the box onto the volume, or choose no region of interest."


def voxels_in_roi(shape: Sequence[int], *, ijk_to_ras: np.ndarray, roi_to_ras: Sequence[Sequence[float]], margin_voxels: float = 0.0) -> np.ndarray:
    """Which voxels of a grid have their center in the region of interest, (K, J, I) bool.

    Args:
        shape: voxels of the grid, KJI.
        ijk_to_ras: 4 x 4 of the grid.
        roi_to_ras: 4 x 4; sends the cube [-0.5, 0.5]^3 to the box in RAS mm. A center on a face is inside.
        margin_voxels: the box is grown until it holds everything that is at most this many voxels away along each axis of the grid.

    Raises:
        UserError: the box has an edge of no length, or holds no voxel center.
    """
    roi_to_ras = np.asarray(roi_to_ras, dtype=np.float64)
    _check_edges(roi_to_ras)
    to_roi = np.linalg.inv(roi_to_ras) @ ijk_to_ras
    limits = 0.5 + FACE_TOLERANCE + margin_voxels * np.abs(to_roi[:3, :3]).sum(1)
    inside = np.zeros(tuple(shape), dtype=bool)
    for slab in _slabs(_bounding_box(to_roi, limits=limits, shape=shape)):
        k, j, i = np.ogrid[slab]
        is_in = np.ones((1, 1, 1), dtype=bool)
        for row, limit in zip(to_roi[:3], limits):
            is_in = is_in & (np.abs(_coordinate(row, i=i, j=j, k=k)) <= limit)
        inside[slab] = is_in
    if not inside.any():
        raise UserError(
            f"The region of interest holds no voxel of the volume: the box spans {_span(roi_to_ras, (1, 1, 1))}, "
            f"the volume {_span(ijk_to_ras, tuple(shape)[::-1])}. {_WAY_OUT}"
        )
    return inside


def has_volume(axes_mm: np.ndarray) -> bool:
    """Whether three directions, 3 x 3 in columns, span a box: none is short or NaN, and they do not lie in one plane."""
    lengths_mm = np.linalg.norm(axes_mm, axis=0)
    return bool(lengths_mm.min() > SHORTEST_EDGE_MM and abs(np.linalg.det(axes_mm / lengths_mm)) > FLATTEST)  # False for NaN


def _check_edges(roi_to_ras: np.ndarray) -> None:
    """Raise UserError unless the box has a volume."""
    edges_mm = np.linalg.norm(roi_to_ras[:3, :3], axis=0)
    if not has_volume(roi_to_ras[:3, :3]):
        raise UserError(f"The region of interest is empty: its edges are {' x '.join(f'{edge:.4g}' for edge in edges_mm)} mm long. {_WAY_OUT}")


def _bounding_box(to_roi: np.ndarray, *, limits: np.ndarray, shape: Sequence[int]) -> tuple[slice, slice, slice]:
    """The voxels of the grid between the corners of the (grown) box, KJI."""
    limits = np.asarray(limits)
    corners = box_corners(-limits, limits)
    corners_kji = (np.linalg.inv(to_roi) @ corners.T)[2::-1]  # ijk -> KJI
    low, high = np.floor(corners_kji.min(1)), np.ceil(corners_kji.max(1)) + 1
    return tuple(slice(int(np.clip(first, 0, length)), int(np.clip(stop, 0, length))) for first, stop, length in zip(low, high, shape))


def _slabs(box: tuple[slice, slice, slice]) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of a box along its first axis that hold about VOXELS_AT_ONCE voxels."""
    area = max(1, (box[1].stop - box[1].start) * (box[2].stop - box[2].start))
    step = max(1, VOXELS_AT_ONCE // area)
    for start in range(box[0].start, box[0].stop, step):
        yield slice(start, min(start + step, box[0].stop)), box[1], box[2]


def _coordinate(row: np.ndarray, *, i: np.ndarray, j: np.ndarray, k: np.ndarray) -> np.ndarray:
    """One coordinate of voxel centers in the box; of size 1 along the axes it does not depend on, so that an upright box costs three vectors."""
    coordinate = np.full((1, 1, 1), row[3])
    for coefficient, index in zip(row[:3], (i, j, k)):
        if abs(coefficient) * index.size > FACE_TOLERANCE / 3:
            coordinate = coordinate + coefficient * index
    return coordinate


def _span(to_ras: np.ndarray, size_ijk: Sequence[int]) -> str:
    """'R -20 to 35, A 0 to 40, S 10 to 90 mm': the extent of a box of so many steps of a 4 x 4; the first is centered on 0."""
    corners = box_corners(-0.5, np.array(size_ijk) - 0.5)[:, :3]
    points_ras = corners @ to_ras[:3, :3].T + to_ras[:3, 3]
    return ", ".join(f"{name} {low:.0f} to {high:.0f}" for name, low, high in zip("RAS", points_ras.min(0), points_ras.max(0))) + " mm"
