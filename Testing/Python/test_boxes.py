"""Corners of boxes and the upright box around a turned one."""

import numpy as np

from NMSWSegment.files.boxes import bounds_after, box_corners, label_boxes, voxel_corners


def test_box_corners_are_all_eight_and_homogeneous():
    corners = box_corners((0, 1, 2), (10, 11, 12))
    assert {tuple(corner) for corner in corners} == {(x, y, z, 1) for x in (0, 10) for y in (1, 11) for z in (2, 12)}
    assert corners.dtype == np.float64


def test_box_corners_of_one_number_are_those_of_a_cube():
    assert np.array_equal(box_corners(-0.5, 0.5), box_corners([-0.5] * 3, [0.5] * 3))


def test_bounds_after_a_turn_hold_the_turned_box():
    quarter = np.array([[0.0, -1, 0, 5], [1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])  # about the third axis, which is doubled
    low, high = bounds_after(quarter, low=0, high=(1, 2, 3))
    assert low.tolist() == [3, 0, 0] and high.tolist() == [5, 1, 6]


def test_label_boxes_are_the_smallest_ones():
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1, 2, 3] = labels[3, 0, 5] = 4
    labels[4, 5, 0:3] = 255
    assert label_boxes(labels) == {4: (slice(1, 4), slice(0, 3), slice(3, 6)), 255: (slice(4, 5), slice(5, 6), slice(0, 3))}
    assert label_boxes(np.zeros((2, 3, 4), np.uint8)) == {}


def test_voxel_corners_are_in_ijk_order():
    assert voxel_corners((2, 3, 4)).max(0).tolist() == [3, 2, 1, 1]
