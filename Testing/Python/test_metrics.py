"""DSC, NSD and HD95 of small cases that can be counted by hand."""

import numpy as np
import pytest

from NMSWSegment.data.metrics import dice_per_class, model_steps, surface_distances, surface_scores


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


def scores(predicted, reference, *, num_classes=2, spacing_mm=(1.0, 1.0, 1.0), spacing_voxels=None):
    return surface_scores(predicted, reference, num_classes=num_classes, spacing_mm=spacing_mm, spacing_voxels=spacing_voxels or spacing_mm)


def a_box(*, start, size=(4, 5, 6), shape=(16, 18, 20), value=1):
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(first, first + length) for first, length in zip(start, size))] = value
    return labels


def test_surfaces_of_equal_boxes_agree():
    labels = a_box(start=(3, 4, 5))
    found = scores(labels, labels)
    assert np.isnan(found.nsd_mm[0]) and found.nsd_mm[1] == found.nsd_voxels[1] == 1 and found.hd95_mm[1] == 0


@pytest.mark.parametrize(("spacing_k", "shift_mm"), [(1.0, 3.0), (0.5, 1.5), (2.0, 6.0)])
def test_plates_of_one_voxel_are_as_far_apart_as_the_spacing_says(spacing_k, shift_mm):
    # a plate of 1 x 8 x 9 voxels moved by 3 voxels along K: every surface voxel is exactly that far
    reference, predicted = (a_box(start=(first, 4, 5), size=(1, 8, 9)) for first in (4, 7))
    found = scores(predicted, reference, spacing_mm=(spacing_k, 1.0, 1.0), spacing_voxels=(1.0, 1.0, 1.0))
    assert found.hd95_mm[1] == pytest.approx(shift_mm)
    assert found.nsd_mm[1] == (1.0 if shift_mm <= 2 else 0.0)
    assert found.nsd_voxels[1] == 0  # 3 voxels, whatever the mm


def test_nsd_counts_the_surface_voxels_of_both_by_hand():
    # Two bars of one voxel's width along I: 10 voxels, and the first 4 of them. All 4 lie on the longer one; of its 10
    # the 4 shared and the next 2 are within 2 mm.
    reference, predicted = a_box(start=(5, 6, 4), size=(1, 1, 10)), a_box(start=(5, 6, 4), size=(1, 1, 4))
    found = scores(predicted, reference)
    assert found.nsd_mm[1] == pytest.approx((4 + 6) / (4 + 10))
    assert found.hd95_mm[1] == pytest.approx(np.percentile([0, 0, 0, 0, 1, 2, 3, 4, 5, 6], 95))


def test_axes_and_spacing_are_both_in_array_order():
    reference, predicted = a_box(start=(3, 4, 5), size=(4, 5, 1)), a_box(start=(3, 4, 9), size=(4, 5, 1))  # moved by 4 voxels along I
    assert scores(predicted, reference, spacing_mm=(5.0, 3.0, 0.25)).hd95_mm[1] == pytest.approx(1.0)


def test_missed_class_scores_0_and_infinity_and_absent_class_nan():
    reference = a_box(start=(3, 4, 5))
    missed = scores(np.zeros_like(reference), reference, num_classes=3)
    assert missed.nsd_mm[1] == missed.nsd_voxels[1] == 0 and missed.hd95_mm[1] == np.inf
    absent = scores(np.full_like(reference, 2), reference, num_classes=3)
    assert np.isnan([absent.nsd_mm[2], absent.nsd_voxels[2], absent.hd95_mm[2]]).all()


def test_surfaces_ignore_what_is_predicted_in_unknown_voxels():
    reference = a_box(start=(3, 4, 5))
    reference[:, :, 9:] = 255  # the far part of the box and all beyond it
    perfect, beyond = a_box(start=(3, 4, 5), size=(4, 5, 4)), a_box(start=(3, 4, 5), size=(4, 5, 14))
    for predicted in (perfect, beyond):
        found = scores(predicted, reference)
        assert found.nsd_mm[1] == 1 and found.hd95_mm[1] == 0


def test_surface_that_ends_at_unknown_voxels_counts_neither_as_right_nor_as_wrong():
    # Plates along J of 6 voxels; the reference knows nothing from J = 10 on. Without the surface voxel beside the unknown, 5 count.
    reference = a_box(start=(5, 4, 6), size=(1, 12, 1))
    reference[:, 10:] = 255
    predicted = a_box(start=(5, 7, 6), size=(1, 3, 1))
    from_predicted, from_reference = surface_distances(predicted, reference, value=1, spacing=(1.0, 1.0, 1.0))
    np.testing.assert_allclose(from_predicted, [0, 0])
    np.testing.assert_allclose(from_reference, [3, 2, 1, 0, 0])


def test_class_whose_whole_surface_is_unsure_is_nan():
    reference = np.full((5, 6, 7), 255, np.uint8)
    reference[2, 3, 3] = 1
    found = scores(reference.copy(), reference)
    assert np.isnan(found.nsd_mm[1]) and np.isnan(found.hd95_mm[1])


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (3.0, 0.7, 1.3)])
def test_surfaces_equal_those_of_monai(spacing_mm):
    pytest.importorskip("scipy")
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    generator = torch.Generator().manual_seed(3)
    noise = [torch.nn.functional.avg_pool3d(torch.rand(1, 1, 18, 20, 22, generator=generator), 5, stride=1, padding=2)[0, 0] for _ in range(2)]
    predicted, reference = [((field > 0.47).int() + (field > 0.52).int()).numpy().astype(np.uint8) for field in noise]
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 3).movedim(-1, 0)[None] for labels in (predicted, reference)]
    found = scores(predicted, reference, num_classes=3, spacing_mm=spacing_mm)
    np.testing.assert_allclose(found.nsd_mm[1:], compute_surface_dice(*one_hot, class_thresholds=[2.0, 2.0], spacing=spacing_mm)[0], rtol=1e-5)
    np.testing.assert_allclose(found.hd95_mm[1:], compute_hausdorff_distance(*one_hot, percentile=95, spacing=spacing_mm)[0], rtol=1e-5)


def test_model_steps_of_permuted_volume_are_in_its_own_array_order():
    ijk_to_ras = np.zeros((4, 4))
    ijk_to_ras[2, 0], ijk_to_ras[0, 1], ijk_to_ras[1, 2] = 1.5, -2.0, 3.0  # i runs to S, j to L, k to A
    steps = model_steps(ijk_to_ras, model_spacing_mm=(6.0, 3.0, 4.0))
    assert steps == pytest.approx((3.0 / 3.0, 2.0 / 4.0, 1.5 / 6.0))
