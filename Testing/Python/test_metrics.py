"""DSC of small cases that can be counted by hand."""

import numpy as np
import pytest

from NMSWSegment.evaluation.metrics import dice_per_class


def dice(predicted, reference, *, num_classes=3):
    return dice_per_class(np.array(predicted, np.uint8), np.array(reference, np.uint8), num_classes=num_classes)


@pytest.mark.parametrize(
    ("predicted", "reference", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], [1, 1, 1]),
        ([0, 1, 1], [0, 1, 2], [1, 2 / 3, 0]),
        ([1, 1, 0], [0, 1, 1], [0, 1 / 2, np.nan]),
        ([2, 2, 2], [0, 0, 1], [0, 0, np.nan]),  # predicted although absent: still left out
        ([1, 2, 0], [255, 2, 1], [np.nan, 0, 1]),  # the unknown voxel takes its prediction with it
    ],
)
def test_dice_of_three_voxels_by_hand(predicted, reference, expected):
    np.testing.assert_allclose(dice(predicted, reference), expected, rtol=1e-12)


def test_dice_of_absent_class_is_nan_not_one():
    assert np.isnan(dice([0, 0], [0, 0])[1])


def test_dice_where_nothing_is_known_is_nan():
    assert np.isnan(dice([0, 1, 2], [255, 255, 255])).all()


def test_dice_of_empty_labelmap_is_nan():
    assert np.isnan(dice([], [])).all()


def test_dice_is_not_changed_by_what_is_predicted_in_unknown_voxels():
    reference = [1, 255, 0, 2, 255]
    np.testing.assert_array_equal(dice([1, 0, 0, 2, 0], reference), dice([1, 2, 0, 2, 1], reference))


def test_dice_many_classes_do_not_overflow_uint8():
    values = np.arange(200, dtype=np.uint8)
    np.testing.assert_array_equal(dice_per_class(values, values, num_classes=200), np.ones(200))
