"""Small islands: hand-made parts of known size."""

from dataclasses import replace

import numpy as np
import pytest

from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.islands import remove_islands
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import SegmentOptions, UserError


def some_labels() -> np.ndarray:
    """Structure 3 in parts of 8, 4 and 1 voxels, the last touching the first by an edge; structure 7 in parts of 2 and 1."""
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[1:3, 1:3, 1:3] = 3
    labels[3, 3, 1] = 3  # an edge is no connection
    labels[5:7, 5:7, 8] = 3
    labels[7, 0, 0:2] = 7
    labels[0, 8, 9] = 7
    return labels


@pytest.mark.parametrize(
    ("limits", "left_3", "left_7"),
    [
        ({"min_voxels": 0.5}, 13, 3),
        ({"min_voxels": 1.5}, 12, 2),
        ({"min_voxels": 4.0}, 12, 2),
        ({"min_voxels": 4.5}, 8, 2),
        ({"min_voxels": 100.0}, 8, 2),
        ({"min_share": 0.125}, 13, 3),
        ({"min_share": 0.2}, 12, 3),  # a fifth of 8 is more than 1, a fifth of 2 is not
        ({"min_share": 1.0}, 8, 2),
        ({"min_share": 0.2, "min_voxels": 1.5}, 12, 2),
    ],
)
def test_small_parts_go_and_the_largest_stays(limits, left_3, left_7):
    labels = some_labels()
    remove_islands(labels, **limits)
    assert (np.count_nonzero(labels == 3), np.count_nonzero(labels == 7)) == (left_3, left_7)
    assert (labels[1:3, 1:3, 1:3] == 3).all() and (labels[7, 0, :2] == 7).all()


def test_labels_without_structures_stay_empty():
    labels = np.zeros((2, 3, 4), np.uint8)
    remove_islands(labels, min_voxels=1.0, min_share=0.5)
    assert not labels.any()


@pytest.mark.parametrize(("min_island_ml", "min_island_share", "stays"), [(0.0, 0.0, True), (20.0, 0.0, False), (0.0, 0.05, False), (1.0, 0.001, True)])
def test_islands_stay_unless_the_user_or_the_model_asks(a_phantom, a_tiny_bundle, min_island_ml, min_island_share, stays):
    volume, _ = a_phantom
    liver = segment_volume(volume, load_bundle(str(a_tiny_bundle)), options=SegmentOptions(device="cpu", threads=1, num_patches=None)).labelmap.array
    volume.array[:4, :4, :4] = 160.0  # as bright as the liver, far from it: 64 voxels of 0.216 ml
    bundle = load_bundle(str(a_tiny_bundle))
    bundle = replace(bundle, manifest=replace(bundle.manifest, min_island_share=min_island_share))
    shown = []
    options = SegmentOptions(device="cpu", threads=1, num_patches=None, min_island_ml=min_island_ml)
    found = segment_volume(volume, bundle, options=options, coarse_ready=shown.append).labelmap.array
    assert (found[:4, :4, :4] == 1).all() == found[:4, :4, :4].any() == stays
    assert shown[0].labelmap.array[:4, :4, :4].any() == stays  # the coarse result too
    found[:4, :4, :4] = 0
    np.testing.assert_array_equal(found, liver)


def test_island_at_the_end_of_the_volume_does_not_grow_into_the_padding_of_the_grid(a_tiny_bundle):
    volume = Volume(np.full((18, 24, 24), -1000.0, np.float32), np.diag([6.0, 6.0, 6.0, 1.0]))
    volume.array[2:12, 2:12, 2:12] = 160.0  # liver of 1000 voxels
    volume.array[16:, 16:20, 16:20] = 160.0  # 32 voxels in the last slices, behind which the grid goes on
    bundle = load_bundle(str(a_tiny_bundle))
    for share, stays in ((0.002, True), (0.05, False)):
        asking = replace(bundle, manifest=replace(bundle.manifest, min_island_share=share))
        found = segment_volume(volume, asking, options=SegmentOptions(device="cpu", threads=1, num_patches=0)).labelmap.array
        assert (found[4:10, 4:10, 4:10] == 1).all() and bool(found[14:].any()) == stays


def test_islands_go_at_export_where_the_mean_is_better_and_no_structure_worse():
    pytest.importorskip("monai")
    from NMSWSegment.training.calibration import TOLERANCE, is_better_without

    dice = np.array([[0.8, 0.7, np.nan], [0.6, 0.5, 0.9]])
    assert is_better_without(dice, dice + [0.0, 0.01, 0.0])
    assert not is_better_without(dice, dice)
    assert not is_better_without(dice, dice + [0.1, -2 * TOLERANCE, 0.0])  # the mean is better, one structure is not
    assert is_better_without(dice, dice + [0.1, -0.5 * TOLERANCE, 0.0])
    assert not is_better_without(np.array([[np.nan]]), np.array([[np.nan]]))


def test_negative_island_size_is_refused():
    with pytest.raises(UserError, match="0 or more"):
        SegmentOptions(min_island_ml=-1.0)
