"""label_content: counts, and a fingerprint that cropping and renumbering do not change."""

import numpy as np
import pytest

from NMSWSegment.files.label_content import label_content, voxels_fingerprint
from NMSWSegment.files.labels import coded_labels


def a_labelmap() -> np.ndarray:
    array = np.zeros((5, 6, 7), dtype=np.uint8)
    array[1:3, 2:4, 1:6] = 1
    array[3, 4, 5] = 3
    return array


def test_label_content_counts_what_is_there_in_label_order():
    content = label_content(a_labelmap(), labels=coded_labels(["liver", "spleen", "heart"]))
    assert content.voxels_by_name == {"liver": 20, "heart": 1}
    assert content.fingerprint == voxels_fingerprint(a_labelmap(), values=[1, 3])


def test_label_content_value_that_is_no_label_is_refused():
    with pytest.raises(ValueError, match=r"\[3\], which no label names"):
        label_content(a_labelmap(), labels=coded_labels(["liver", "spleen"]))


def test_fingerprint_is_the_same_after_cropping_and_renumbering():
    array = a_labelmap()
    renumbered = np.where(array == 3, 2, array * 7)[1:4, 2:5, 1:6].astype(np.int16)
    assert voxels_fingerprint(renumbered, values=[7, 2]) == voxels_fingerprint(array, values=[1, 3])


@pytest.mark.parametrize("change", [lambda a: a.__setitem__((1, 2, 1), 0), lambda a: a.__setitem__((1, 2, 1), 3), lambda a: a.__setitem__((0, 0, 0), 1)])
def test_fingerprint_changes_with_one_voxel(change):
    array = a_labelmap()
    change(array)
    assert voxels_fingerprint(array, values=[1, 3]) != voxels_fingerprint(a_labelmap(), values=[1, 3])


def test_fingerprint_of_an_empty_labelmap_is_that_of_no_labels():
    assert voxels_fingerprint(np.zeros((2, 2, 2), np.uint8), values=[1]) == voxels_fingerprint(np.zeros((3, 2, 2), np.uint8), values=[])
