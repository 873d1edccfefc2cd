"""The baselines: exact where the net is, windows counted by hand, and the same way back to the volume's grid."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import turned

from NMSWSegment.data.metrics import dice_per_class
from NMSWSegment.engine.resampling import to_model_grid
from NMSWSegment.engine.runtime import open_nets
from NMSWSegment.engine.segment import RunCache, coarse_pass
from NMSWSegment.evaluation.baselines import footprint_foreground, grown_box, one_voxel_foreground
from NMSWSegment.evaluation.methods import comparison_methods
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import Cancelled, SegmentOptions

METHODS = comparison_methods((3,))


def segment(name, volume, bundle, **more):
    method = METHODS[name]
    return method.segment(volume, bundle, options=SegmentOptions(num_patches=method.num_patches, policy=method.policy, device="cpu", threads=1), **more)


@pytest.fixture(scope="module")
def a_bundle(a_tiny_bundle):
    return load_bundle(a_tiny_bundle)


@pytest.fixture(scope="module")
def a_small_phantom():
    shape = (30, 24, 34)
    return phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))


@pytest.mark.parametrize(("name", "windows"), [("sw_0.50", 3 * 2 * 4), ("sw_0.25", 3 * 2 * 3)])
def test_sliding_window_on_the_model_grid_is_exact_with_windows_counted_by_hand(name, windows, a_bundle, a_small_phantom):
    volume, labels = a_small_phantom  # patches of 16, stride 8 or 12, in 30 x 24 x 34 voxels
    result = segment(name, volume, a_bundle)
    np.testing.assert_array_equal(result.labelmap.array, labels)
    assert result.run_info["windows"] == windows and result.run_info["candidates"] == 3 * 2 * 4 and result.patches == ()


def test_sliding_window_on_foreground_leaves_windows_out_and_stays_exact(a_bundle):
    shape = (30, 36, 100)  # air on both sides of the body
    volume, labels = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))
    result = segment("sw_foreground", volume, a_bundle)
    np.testing.assert_array_equal(result.labelmap.array, labels)
    _, _, grid = to_model_grid(volume, a_bundle.manifest)
    reference = torch.from_numpy(np.pad(labels, [(0, full - length) for full, length in zip(grid.padded_shape, labels.shape)]))
    needed = sum(bool(reference[grid.slices(index)].any()) for index in range(grid.num_candidates))
    assert needed <= result.run_info["windows"] < grid.num_candidates == result.run_info["candidates"]


def test_sliding_window_of_a_volume_smaller_than_a_patch(a_bundle):
    shape = (9, 12, 20)
    volume, labels = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))
    result = segment("sw_0.50", volume, a_bundle)
    np.testing.assert_array_equal(result.labelmap.array, labels)
    assert result.run_info["windows"] == 2


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_comes_back_to_an_oblique_mirrored_volume(name, a_bundle):
    shape = (28, 30, 26)
    ijk_to_ras = turned((7.0, 6.0, 8.0), shape, mirror=(-1, 1, 1), permutation=(2, 0, 1))
    volume, labels = phantoms.phantom(shape, ijk_to_ras=ijk_to_ras)
    result = segment(name, volume, a_bundle)
    np.testing.assert_array_equal(result.labelmap.ijk_to_ras, ijk_to_ras)
    assert result.labelmap.shape == shape
    liver, _, vertebrae = dice_per_class(result.labelmap.array, labels, num_classes=4)[1:]  # half-covered voxels of bone look like spleen
    assert min(liver, vertebrae) > (0.9 if name in ("sw_0.50", "sw_0.25", "sw_foreground", "all") else 0.5)


@pytest.mark.parametrize("name", ["random_published_3", "random_fair_3", "one_voxel_3"])
def test_chosen_patches_are_the_same_at_every_run_and_show_foreground(name, a_bundle, a_phantom):
    volume, _ = a_phantom
    first, second = (segment(name, volume, a_bundle) for _ in range(2))
    np.testing.assert_array_equal(first.labelmap.array, second.labelmap.array)
    assert [patch.rank for patch in first.patches] == [1, 2, 3]
    coarse = coarse_pass(volume, open_nets(a_bundle, device="cpu"))
    test = footprint_foreground if name == "random_fair_3" else one_voxel_foreground
    assert all(test(coarse.coarse_logits, grid=coarse.grid)[patch.candidate] for patch in first.patches)


def test_top_k_of_one_voxel_ranks_by_importance(a_bundle, a_phantom):
    importance = [patch.importance for patch in segment("one_voxel_3", a_phantom[0], a_bundle).patches]
    assert importance == sorted(importance, reverse=True)


def test_background_by_one_voxel_misses_what_the_footprint_sees():
    # 4 x 2 x 2 coarse voxels for 3 x 1 x 1 candidates; nearest reads the voxels 0, 1 and 2 along the first axis, always the first of the others
    grid = CandidateGrid.covering((8, 4, 4), patch_size=(4, 4, 4), overlap=0.5, coarse_factor=(2, 2, 2))
    logits = torch.zeros(2, 4, 2, 2)
    logits[0] = 5.0
    logits[1, 3, 1, 1] = 9.0  # foreground only where one voxel does not look
    assert one_voxel_foreground(logits, grid=grid).tolist() == [False, False, False]
    assert footprint_foreground(logits, grid=grid).tolist() == [False, False, True]
    logits[1, 1, 0, 0] = 9.0
    assert one_voxel_foreground(logits, grid=grid).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ((10, 11, 12), (12, 12, 14), ((8, 14), (9, 15), (10, 16))),  # 3, 2 and 3 voxels grown to 6 about their middle
        ((0, 1, 17), (1, 2, 19), ((0, 6), (0, 6), (14, 20))),  # moved inside at both ends
        ((2, 3, 4), (12, 4, 5), ((2, 13), (1, 7), (2, 8))),  # a side that is longer stays as it is
    ],
)
def test_box_grows_to_a_patch_inside_the_volume(first, last, expected):
    mask = torch.zeros(20, 18, 20, dtype=torch.bool)
    mask[first], mask[last] = True, True
    assert [(side.start, side.stop) for side in grown_box(mask, least=(6, 6, 6))] == list(expected)


def test_zoom_out_is_exact_where_nothing_is_zoomed(a_bundle):
    shape = (40, 40, 40)
    labels = np.zeros(shape, np.uint8)
    labels[4:12, 6:12, 5:13] = 1  # smaller than a patch, near a corner
    intensities = np.array([phantoms.BODY_HU, phantoms.ORGANS["liver"][2]], np.float32)
    volume = Volume(array=intensities[labels], ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))
    result = segment("zoom_out", volume, a_bundle)
    assert result.run_info["windows"] == 1
    np.testing.assert_array_equal(result.labelmap.array, labels)


def test_zoom_out_calls_the_net_once_a_class(a_bundle, a_small_phantom):
    result = segment("zoom_out", a_small_phantom[0], a_bundle)
    assert result.run_info["windows"] == 3 == len(np.unique(result.labelmap.array)) - 1


def test_zoom_out_of_an_empty_coarse_result_is_background(a_bundle):
    volume = Volume(array=np.full((20, 22, 24), phantoms.BODY_HU, np.float32), ijk_to_ras=np.diag([6.0, 6.0, 6.0, 1.0]))
    result = segment("zoom_out", volume, a_bundle)
    assert result.run_info["windows"] == 0 and not result.labelmap.array.any()


@pytest.mark.parametrize("name", ["sw_0.50", "zoom_out", "greedy_3"])
def test_second_run_has_the_nets_and_gives_the_same(name, a_bundle, a_small_phantom):
    warm = RunCache()
    cold = segment(name, a_small_phantom[0], a_bundle, run_cache=warm)
    again = segment(name, a_small_phantom[0], a_bundle, run_cache=RunCache(nets=warm.nets))
    assert "load" in cold.run_info["timings_s"] and "load" not in again.run_info["timings_s"]
    np.testing.assert_array_equal(cold.labelmap.array, again.labelmap.array)


def test_baseline_can_be_cancelled_between_patches(a_bundle, a_small_phantom):
    def stop(progress):
        if progress.stage == "patches" and progress.done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        segment("sw_0.50", a_small_phantom[0], a_bundle, on_progress=stop)


def test_without_class_weights_the_patches_replace_the_coarse_answer(a_bundle, a_small_phantom):
    weak = math.log(0.25 / 0.75)  # a = sigmoid(c) = 0.27, its least
    mixed = replace(a_bundle, manifest=replace(a_bundle.manifest, class_weights=(weak,) * 4))
    volume, labels = a_small_phantom
    method = comparison_methods((24,))["no_weights_24"]
    result = method.segment(volume, mixed, options=SegmentOptions(num_patches=24, device="cpu", threads=1))
    np.testing.assert_array_equal(result.labelmap.array, labels)
    assert (segment("all", volume, mixed).labelmap.array != labels).any()
