import time

import numpy as np
import pytest
from conftest import turned

from NMSWSegment.files.roi import voxels_in_roi
from NMSWSegment.protocol import UserError


def box(center_ras, size_mm, *, degrees=(0.0, 0.0, 0.0)) -> np.ndarray:
    """roi_to_ras of a box."""
    roi_to_ras = turned(tuple(size_mm)[::-1], (1, 1, 1), degrees=degrees)
    roi_to_ras[:3, 3] = center_ras
    return roi_to_ras


def centers_ras(shape, ijk_to_ras) -> np.ndarray:
    """World place of every voxel center, (K, J, I, 3)."""
    k, j, i = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    return np.stack([i, j, k], -1) @ ijk_to_ras[:3, :3].T + ijk_to_ras[:3, 3]


def test_upright_box_holds_the_voxels_between_its_faces_in_ras():
    ijk_to_ras = np.diag([2.0, 3.0, 4.0, 1.0])
    ijk_to_ras[:3, 3] = -10, 20, 5  # R -10 to 8, A 20 to 41, S 5 to 25
    inside = voxels_in_roi((6, 8, 10), ijk_to_ras=ijk_to_ras, roi_to_ras=box((-3, 30, 12), (9, 11, 7)))  # R -7.5 to 1.5, A 24.5 to 35.5, S 8.5 to 15.5
    expected = np.zeros((6, 8, 10), dtype=bool)
    expected[1:3, 2:6, 2:6] = True
    assert np.array_equal(inside, expected)


@pytest.mark.parametrize("mirror", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize("degrees", [(0.0, 0.0, 0.0), (0.0, 25.0, 0.0), (40.0, -10.0, 75.0)])
def test_any_grid_and_any_box_agree_with_the_world(mirror, degrees):
    shape = (23, 31, 27)
    ijk_to_ras = turned((4.0, 2.5, 3.0), shape, degrees=(15, 5, -30), mirror=mirror, permutation=(2, 0, 1))
    roi_to_ras = box((5, -12, 9), (50, 31, 22), degrees=degrees)
    offset = centers_ras(shape, ijk_to_ras) - roi_to_ras[:3, 3]
    directions = roi_to_ras[:3, :3] / np.linalg.norm(roi_to_ras[:3, :3], axis=0)
    expected = (np.abs(offset @ directions) <= np.array([50, 31, 22]) / 2).all(-1)
    assert 200 < expected.sum() < expected.size / 2
    assert np.array_equal(voxels_in_roi(shape, ijk_to_ras=ijk_to_ras, roi_to_ras=roi_to_ras), expected)


def test_mirrored_box_is_the_same_region():
    mirrored = box((1, 2, 3), (9, 8, 7)) @ np.diag([-1.0, 1.0, -1.0, 1.0])
    grid = {"shape": (12, 12, 12), "ijk_to_ras": np.eye(4)}
    assert np.array_equal(voxels_in_roi(**grid, roi_to_ras=mirrored), voxels_in_roi(**grid, roi_to_ras=box((1, 2, 3), (9, 8, 7))))


@pytest.mark.parametrize("shift_mm", [0.0, 1234.5, -987.1])
def test_voxel_centers_on_a_face_are_inside(shift_mm):
    ijk_to_ras = np.diag([0.7, 0.7, 0.7, 1.0])
    ijk_to_ras[:3, 3] = shift_mm
    faces = box(np.array([3.5, 3.5, 3.5]) * 0.7 + shift_mm, np.array([3, 5, 7]) * 0.7)  # voxels 2..5, 1..6, 0..7
    inside = voxels_in_roi((9, 9, 9), ijk_to_ras=ijk_to_ras, roi_to_ras=faces)
    assert inside.sum() == 4 * 6 * 8 and inside[0:8, 1:7, 2:6].all()


def test_margin_takes_everything_within_so_many_voxels_along_the_axes_of_the_grid():
    ijk_to_ras = np.diag([2.0, 3.0, 4.0, 1.0])
    inside = voxels_in_roi((10, 10, 10), ijk_to_ras=ijk_to_ras, roi_to_ras=box((8.9, 12, 16), (0.2, 1, 1)), margin_voxels=1.0)
    expected = np.zeros((10, 10, 10), dtype=bool)
    expected[3:6, 3:6, 4:6] = True  # R 8.8 to 9.0 is between voxels 4 and 5
    assert np.array_equal(inside, expected)


def test_region_larger_than_the_volume_is_the_volume():
    assert voxels_in_roi((4, 5, 6), ijk_to_ras=turned((1, 2, 3), (4, 5, 6)), roi_to_ras=box((0, 0, 0), (500, 600, 700), degrees=(10, 20, 30))).all()


@pytest.mark.parametrize(
    "roi_to_ras", [box((0, 0, 0), (30, 0, 20)), np.zeros((4, 4)), np.full((4, 4), np.nan), np.array([[9.0, 9, 0, 0], [0, 0, 0, 0], [0, 0, 9, 0], [0, 0, 0, 1]])]
)
def test_box_without_volume_is_refused(roi_to_ras):
    with pytest.raises(UserError, match="is empty: its edges are .* Drag the box onto the volume, or choose no region of interest"):
        voxels_in_roi((4, 4, 4), ijk_to_ras=np.eye(4), roi_to_ras=roi_to_ras)


@pytest.mark.parametrize("center_ras", [(80, 2, 2), (2, -40, 2), (1.5, 1.5, 1.5)])
def test_box_that_holds_no_voxel_says_where_both_are(center_ras):
    with pytest.raises(UserError, match=r"the box spans R .* the volume R -0 to 4, A -0 to 4, S -0 to 6 mm\. Drag the box onto the volume"):
        voxels_in_roi((6, 4, 4), ijk_to_ras=np.eye(4), roi_to_ras=box(center_ras, (0.5, 0.5, 0.5)))


def test_large_volume_takes_no_time():
    shape = (200, 512, 512)  # 52 million voxels; 0.25 s on one core
    started = time.perf_counter()
    inside = voxels_in_roi(shape, ijk_to_ras=turned((1.5, 0.8, 0.8), shape), roi_to_ras=box((0, 0, 0), (900, 900, 900), degrees=(3, 4, 5)))
    assert inside.all() and time.perf_counter() - started < 3
