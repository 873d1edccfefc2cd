import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import turned

from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import Cancelled, SegmentOptions, UserError


def cpu(**values) -> SegmentOptions:
    return SegmentOptions(**({"device": "cpu", "threads": 1, "num_patches": None} | values))


def test_all_patches_give_the_phantom_exactly(a_tiny_bundle, a_phantom):
    volume, labels = a_phantom
    result = segment_volume(volume, load_bundle(a_tiny_bundle), options=cpu())
    body = volume.array > -500
    assert np.array_equal(result.labelmap.array[body], labels[body])
    assert result.labelmap.array.dtype == np.uint8
    np.testing.assert_array_equal(result.labelmap.ijk_to_ras, volume.ijk_to_ras)


def test_more_patches_follow_the_phantom_better(a_tiny_bundle, a_phantom):
    volume, labels = a_phantom
    bundle = load_bundle(a_tiny_bundle)
    wrong = [int((segment_volume(volume, bundle, options=cpu(num_patches=k)).labelmap.array != labels).sum()) for k in (0, 5, None)]
    assert wrong[0] > wrong[1] > wrong[2]


@pytest.mark.parametrize(
    ("spacing_mm", "shape", "orientation"),
    [
        ((4.0, 3.0, 3.0), (90, 85, 110), {"degrees": (20, -15, 10)}),
        ((4.0, 3.0, 3.0), (90, 85, 110), {"degrees": (20, -15, 10), "mirror": (-1, -1, 1), "permutation": (1, 2, 0)}),
        ((2.0, 5.0, 7.0), (160, 42, 46), {"degrees": (0, 0, 0), "mirror": (-1, 1, -1)}),
    ],
)
def test_oblique_mirrored_anisotropic_volumes_agree_with_the_world(a_tiny_bundle, spacing_mm, shape, orientation):
    ijk_to_ras = turned(spacing_mm, shape, **orientation)
    volume, _ = phantoms.phantom(shape, ijk_to_ras=ijk_to_ras)
    found = segment_volume(volume, load_bundle(a_tiny_bundle), options=cpu()).labelmap.array
    k, j, i = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    points_ras = np.stack([i, j, k], -1) @ ijk_to_ras[:3, :3].T + ijk_to_ras[:3, 3]
    for value, (center, radii, _) in enumerate(phantoms.ORGANS.values(), start=1):
        # Within one and a half model voxels of a surface, partial volume has the intensity of another organ.
        distance = lambda margin: (((points_ras - np.array(center)) / (np.array(radii) + margin)) ** 2).sum(-1)  # noqa: E731
        core = distance(-9.0) <= 1
        assert (found[core] == value).mean() > 0.995
        near = (distance(9.0) > 1) & (distance(14.0) <= 1) & (volume.array == phantoms.BODY_HU) & (points_ras[..., 1] > -40)
        assert (found[near] == value).mean() < 0.02


def test_same_input_same_answer_bit_for_bit(a_tiny_bundle, a_phantom):
    bundle = load_bundle(a_tiny_bundle)
    first, second = (segment_volume(a_phantom[0], bundle, options=cpu(num_patches=7)) for _ in range(2))
    assert np.array_equal(first.labelmap.array, second.labelmap.array)
    assert first.patches == second.patches


def test_patches_lie_in_the_volume_and_are_ranked(a_tiny_bundle, a_phantom):
    volume, _ = a_phantom
    result = segment_volume(volume, load_bundle(a_tiny_bundle), options=cpu(num_patches=4, policy="top_k"))
    assert [patch.rank for patch in result.patches] == [1, 2, 3, 4]
    importance = [patch.importance for patch in result.patches]
    assert importance == sorted(importance, reverse=True)
    size = np.array(volume.shape[::-1]) * 6.0
    for patch in result.patches:
        assert all(0 < side <= 96 for side in patch.size_mm)
        assert np.all(np.abs(np.array(patch.center_ras)) + np.array(patch.size_mm) / 2 <= size / 2 + 1e-6)


def test_greedy_patches_touch_the_organs(a_tiny_bundle, a_phantom):
    result = segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(num_patches=1))
    patch = result.patches[0]
    low = np.array(patch.center_ras) - np.array(patch.size_mm) / 2
    high = np.array(patch.center_ras) + np.array(patch.size_mm) / 2
    assert any(np.all(low < np.array(center) + radii) and np.all(high > np.array(center) - radii) for center, radii, _ in phantoms.ORGANS.values())


@pytest.mark.parametrize("shape", [(5, 7, 9), (2, 40, 3), (17, 16, 15)])
def test_volume_smaller_than_a_patch_just_works(a_tiny_bundle, shape):
    volume, _ = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))
    result = segment_volume(volume, load_bundle(a_tiny_bundle), options=cpu(num_patches=999))
    assert result.labelmap.array.shape == shape
    assert len(result.patches) == result.run_info["candidates"]


def test_structures_keep_only_what_was_asked_for(a_tiny_bundle, a_phantom):
    bundle = load_bundle(a_tiny_bundle)
    everything = segment_volume(a_phantom[0], bundle, options=cpu()).labelmap.array
    some = segment_volume(a_phantom[0], bundle, options=cpu(structures=("spleen",))).labelmap.array
    assert np.array_equal(some, np.where(everything == 2, 2, 0))


def test_unknown_structure_names_the_nearest(a_tiny_bundle, a_phantom):
    with pytest.raises(UserError, match="Did you mean 'spleen'"):
        segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(structures=("splen",)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a computer without CUDA")
def test_missing_device_lists_what_is_there(a_tiny_bundle, a_phantom):
    with pytest.raises(UserError, match="This computer has: cpu"):
        segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(device="cuda"))


def test_progress_rises_and_reports_every_patch(a_tiny_bundle, a_phantom):
    seen = []
    segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(num_patches=5), on_progress=seen.append)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert [progress.message for progress in seen if progress.message.startswith("Patch ")] == [f"Patch {n} of 5" for n in range(1, 6)]


def test_cancel_stops_between_patches(a_tiny_bundle, a_phantom):
    calls = []

    def cancel_at_second_patch(progress):
        calls.append(progress)
        if progress.message == "Patch 2 of 5":
            raise Cancelled

    with pytest.raises(Cancelled):
        segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(num_patches=5), on_progress=cancel_at_second_patch)
    assert calls[-1].message == "Patch 2 of 5"


def test_report_is_json_and_tells_what_ran(a_tiny_bundle, a_phantom):
    bundle = load_bundle(a_tiny_bundle)
    result = segment_volume(a_phantom[0], bundle, options=cpu(num_patches=3))
    run_info = json.loads(json.dumps(result.run_info))
    assert run_info["bundle"] == {"name": "tiny", "sha256": bundle.sha256}
    assert run_info["device"] == "cpu" and run_info["options"]["num_patches"] == 3
    assert set(run_info["timings_s"]) == {"load", "canonical", "coarse", "select", "upsample", "aggregate", "patches", "restore"}
    assert run_info["canonical_voxels"] == 54 * 36 * 52 and run_info["patches_reused"] == 0
    assert [patch["rank"] for patch in run_info["patches"]] == [1, 2, 3]


def test_thread_count_of_the_caller_is_left_alone(a_tiny_bundle, a_phantom):
    before = torch.get_num_threads()
    segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(threads=2, num_patches=0))
    assert torch.get_num_threads() == before


def test_one_class_volume_of_air_gives_background(a_tiny_bundle):
    volume = Volume(array=np.full((20, 20, 20), -1000, dtype=np.int16), ijk_to_ras=np.diag([6.0, 6.0, 6.0, 1.0]))
    assert segment_volume(volume, load_bundle(a_tiny_bundle), options=cpu(num_patches=2)).labelmap.array.max() == 0


def roi(center_ras, size_mm, *, degrees=(0.0, 0.0, 0.0)) -> tuple[tuple[float, ...], ...]:
    matrix = turned(tuple(size_mm)[::-1], (1, 1, 1), degrees=degrees)
    matrix[:3, 3] = center_ras
    return tuple(map(tuple, matrix))


def is_inside(volume: Volume, roi_to_ras) -> np.ndarray:
    k, j, i = np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij")
    in_roi = np.linalg.inv(np.array(roi_to_ras)) @ volume.ijk_to_ras
    return (np.abs(np.stack([i, j, k], -1) @ in_roi[:3, :3].T + in_roi[:3, 3]) <= 0.5).all(-1)


@pytest.mark.parametrize("degrees", [(0.0, 0.0, 0.0), (25.0, -10.0, 40.0)])
@pytest.mark.parametrize("k", [None, "auto", 999])
def test_region_of_interest_ends_at_its_faces_and_is_the_whole_answer_inside(a_tiny_bundle, degrees, k):
    shape = (60, 44, 50)
    volume, _ = phantoms.phantom(shape, ijk_to_ras=turned((5.0, 6.5, 7.0), shape, degrees=(15, -5, 10), mirror=(-1, 1, 1)))
    bundle = load_bundle(a_tiny_bundle)
    region = roi((-60, -20, 40), (70, 90, 110), degrees=degrees)
    everything = segment_volume(volume, bundle, options=cpu()).labelmap.array
    result = segment_volume(volume, bundle, options=cpu(num_patches=k, roi_to_ras=region))
    inside = is_inside(volume, region)
    assert 0 < inside.sum() < inside.size / 4 and {1, 2, 3} <= set(np.unique(everything[~inside]))
    assert not result.labelmap.array[~inside].any() and 2 in result.labelmap.array
    if k != "auto":
        assert np.array_equal(result.labelmap.array[inside], everything[inside])
        assert 0 < len(result.patches) < result.run_info["candidates"]


def test_patches_are_spent_inside_the_region_of_interest_only(a_tiny_bundle, a_phantom):
    region = roi((-85, -30, 45), (40, 30, 50))
    result = segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(num_patches=None, roi_to_ras=region))
    low, high = np.array([-105, -45, 20]), np.array([-65, -15, 70])
    for patch in result.patches:
        center, half = np.array(patch.center_ras), np.array(patch.size_mm) / 2 + 12  # 12 mm is the coarse voxel that counts as footprint
        assert np.all(center - half < high) and np.all(center + half > low)
    top_k = segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(num_patches=999, policy="top_k", roi_to_ras=region))
    assert {patch.candidate for patch in top_k.patches} == {patch.candidate for patch in result.patches}


@pytest.mark.parametrize(("region", "fix"), [(roi((900, 0, 0), (50, 50, 50)), "holds no voxel of the volume"), (roi((0, 0, 0), (50, 0, 50)), "is empty")])
def test_bad_region_of_interest_is_refused_before_the_nets_run(a_tiny_bundle, a_phantom, region, fix):
    seen = []
    with pytest.raises(UserError, match=f"{fix}.*Drag the box onto the volume, or choose no region of interest"):
        segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(roi_to_ras=region), on_progress=seen.append)
    assert seen == []


def test_auto_takes_some_patches_and_reports_them(a_tiny_bundle, a_phantom):
    result = segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(num_patches="auto"))
    best = segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu(num_patches=len(result.patches)))
    assert 0 < len(result.patches) < result.run_info["candidates"]
    assert result.patches == best.patches and result.run_info["options"]["num_patches"] == "auto"


def test_coarse_result_comes_first_and_is_that_of_no_patches(a_tiny_bundle, a_phantom):
    bundle = load_bundle(a_tiny_bundle)
    options = cpu(num_patches=3, structures=("liver", "vertebrae"), roi_to_ras=roi((20, 0, 0), (120, 150, 200), degrees=(0, 0, 20)))
    shown, events = [], []

    def coarse_ready(coarse):
        shown.append(coarse)
        events.append("coarse shown")

    segment_volume(a_phantom[0], bundle, options=options, on_progress=lambda progress: events.append(progress.stage), coarse_ready=coarse_ready)
    (coarse,) = shown
    alone = segment_volume(a_phantom[0], bundle, options=replace(options, num_patches=0))
    assert np.array_equal(coarse.labelmap.array, alone.labelmap.array) and {0, 1, 3} == set(np.unique(coarse.labelmap.array))
    assert events.index("coarse") < events.index("coarse shown") < events.index("patches")
    assert coarse.candidates == alone.run_info["candidates"]


def test_importance_map_lies_where_the_coarse_net_found_it(a_tiny_bundle):
    """The tiny net's importance is 4 x intensity, to which the log of the entropy is added; in the world the map is largest on the brightest organ, the spine."""
    shape = (60, 44, 50)
    volume, _ = phantoms.phantom(shape, ijk_to_ras=turned((5.0, 6.5, 7.0), shape, degrees=(15, -5, 10), mirror=(-1, 1, 1)))
    shown = []
    segment_volume(volume, load_bundle(a_tiny_bundle), options=cpu(num_patches=0), coarse_ready=shown.append)
    importance = shown[0].importance
    assert importance.array.dtype == np.float32 and importance.array.max() == 1 and importance.array.min() > 0
    np.testing.assert_allclose(importance.spacing_mm, (12.0, 12.0, 12.0))
    bright = np.argwhere(importance.array > 0.8)[:, ::-1] @ importance.ijk_to_ras[:3, :3].T + importance.ijk_to_ras[:3, 3]
    center, radii, _ = phantoms.ORGANS["vertebrae"]
    assert len(bright) >= 10
    assert (((bright - np.array(center)) / (np.array(radii) + 12)) ** 2).sum(1).max() < 1
    np.testing.assert_allclose(bright.mean(0), center, atol=8)


def test_lack_of_memory_names_the_size_of_the_volume(a_tiny_bundle, a_phantom, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr("NMSWSegment.engine.segment.to_model_grid", full)
    with pytest.raises(UserError, match="52 x 36 x 54 voxels. Crop the volume, or close other programs"):
        segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=cpu())
