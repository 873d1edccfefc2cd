"""Small islands: hand-made parts of known size."""

import numpy as np
import pytest

from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.islands import without_islands
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import SegmentOptions, UserError


def a_labelmap() -> Volume:
    """Voxels of 1 ml: structure 3 in parts of 8, 4 and 1 voxels, the last touching the first by an edge; structure 7 in parts of 2 and 1."""
    array = np.zeros((8, 9, 10), np.uint8)
    array[1:3, 1:3, 1:3] = 3
    array[3, 3, 1] = 3  # an edge is no connection
    array[5:7, 5:7, 8] = 3
    array[7, 0, 0:2] = 7
    array[0, 8, 9] = 7
    return Volume(array, np.diag([10.0, 10.0, 10.0, 1.0]), name="case")


@pytest.mark.parametrize(("min_ml", "left_3", "left_7"), [(0.5, 13, 3), (1.5, 12, 2), (4.0, 12, 2), (4.5, 8, 2), (100.0, 8, 2)])
def test_parts_below_the_size_go_and_the_largest_stays(min_ml, left_3, left_7):
    labelmap = a_labelmap()
    found = without_islands(labelmap, min_ml=min_ml)
    assert (np.count_nonzero(found.array == 3), np.count_nonzero(found.array == 7)) == (left_3, left_7)
    assert (found.array[1:3, 1:3, 1:3] == 3).all() and (found.array[7, 0, :2] == 7).all()
    np.testing.assert_array_equal(labelmap.array, a_labelmap().array)


def test_labelmap_without_structures_stays_empty():
    assert not without_islands(Volume(np.zeros((2, 3, 4), np.uint8), np.eye(4)), min_ml=1.0).array.any()


def test_islands_stay_unless_asked_for(a_phantom, a_tiny_bundle):
    volume, _ = a_phantom
    volume.array[:4, :4, :4] = 160.0  # as bright as the liver, far from it: 64 voxels of 0.216 ml
    bundle = load_bundle(str(a_tiny_bundle))
    options = [SegmentOptions(device="cpu", threads=1, num_patches=None, min_island_ml=size) for size in (0.0, 20.0)]
    kept, removed = (segment_volume(volume, bundle, options=chosen).labelmap.array for chosen in options)
    assert kept[1, 1, 1] == 1 and removed[1, 1, 1] == 0
    is_changed = kept != removed
    assert is_changed[:4, :4, :4].sum() == is_changed.sum() == 64


def test_negative_island_size_is_refused():
    with pytest.raises(UserError, match="0 or more"):
        SegmentOptions(min_island_ml=-1.0)
