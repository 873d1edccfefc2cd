"""Training sees a case as inference does: the same resampling whatever its axes, and free fluid that changes only what it may."""

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import turned

from NMSWSegment.data.body_extent import BodyExtent
from NMSWSegment.data.prepared_case import PreparedCase
from NMSWSegment.engine.resampling import resample_to_model_grid
from NMSWSegment.files import phantoms
from NMSWSegment.files.orientation import to_sar
from NMSWSegment.files.volume import Volume
from NMSWSegment.samples.case_memory import CaseMemory, loaded_case
from NMSWSegment.samples.case_source import CaseSource, resampled, whole_warp
from NMSWSegment.samples.pathology import ABDOMINAL_WORDS, BONE_WORDS, FAT_HU, FLUID_HU, add_ascites, add_effusion, change_bone_density, labels_with
from NMSWSegment.samples.scan_range import SLAB_MM, SLAB_SHARE, random_box
from NMSWSegment.samples.synthesis import SynthesisOptions

MODEL_MM = (6.0, 6.0, 6.0)
BOUNDS = (-1000.0, 1500.0)
SHAPE, FINE_MM = (64, 48, 70), (3.2, 3.0, 2.5)  # blocks of 1, 2 and 2 voxels
GEOMETRIES = {
    "axis-aligned": phantoms.upright_ijk_to_ras(FINE_MM, SHAPE),
    "flipped": turned(FINE_MM, SHAPE, degrees=(0, 0, 0), mirror=(-1, -1, 1)),
    "permuted": turned(FINE_MM, SHAPE, degrees=(0, 0, 0), permutation=(2, 0, 1)),
    "oblique": turned(FINE_MM, SHAPE, degrees=(12.0, -9.0, 5.0)),
}


def a_noisy_case(ijk_to_ras) -> tuple[Volume, np.ndarray, PreparedCase]:
    """A phantom under noise of 30 HU with a spike and a mark, its labels, and both as training keeps them."""
    volume, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    noise = np.random.default_rng(0).normal(0, 30, SHAPE).astype(np.float32)
    volume = Volume(array=volume.array + noise, ijk_to_ras=volume.ijk_to_ras)
    volume.array[30, 20, 33], volume.array[33, 28, 36] = 1e30, -3.4e38  # within the bounds they are what inference makes of them
    intensity, spacing_mm, direction = to_sar(volume)
    turned_labels = to_sar(Volume(array=labels, ijk_to_ras=volume.ijk_to_ras))[0]
    return volume, labels, PreparedCase(intensity=intensity, labels=turned_labels, spacing_mm=spacing_mm, extent=None, direction=direction)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_training_resamples_as_inference_does(geometry):
    volume, labels, case = a_noisy_case(GEOMETRIES[geometry])
    expected, model_grid = resample_to_model_grid(volume, spacing_mm=MODEL_MM, outside=float("nan"), bounds=BOUNDS)
    loaded = loaded_case(case, spacing_mm=MODEL_MM, bounds=BOUNDS)
    found, found_labels = resampled(loaded, whole_warp(loaded, spacing_mm=MODEL_MM))
    assert found.shape == expected.shape == model_grid.shape
    is_inside = ~expected.isnan() & ((found_labels != 0) | (found != BOUNDS[0])) & (found_labels != 255)
    assert float(is_inside.float().mean()) > (0.4 if geometry == "oblique" else 0.99)
    assert float((found - expected)[is_inside].abs().max()) < 0.1  # of 30 HU noise; 0.002 but for voxels on an oblique border
    # the organs lie where the file says, whatever its axes
    for value in (1, 2, 3):
        place, own = ((where == value).nonzero() for where in (found_labels, torch.from_numpy(labels)))
        center = [(grid @ [*index.double().mean(0).numpy()[::-1], 1.0])[:3] for grid, index in ((model_grid.ijk_to_ras, place), (volume.ijk_to_ras, own))]
        np.testing.assert_allclose(*center, atol=2.0)  # of two voxels that are equally near, nearest takes the lower: half a fine voxel


@pytest.mark.parametrize("geometry", ["axis-aligned", "oblique"])
def test_noise_is_as_strong_in_training_as_at_inference(geometry):
    noise = np.random.default_rng(1).normal(0, 30, SHAPE).astype(np.float32)
    volume = Volume(array=noise, ijk_to_ras=GEOMETRIES[geometry])
    intensity, spacing_mm, direction = to_sar(volume)
    case = PreparedCase(intensity=intensity, labels=np.ones(SHAPE, np.uint8), spacing_mm=spacing_mm, extent=None, direction=direction)
    expected, _ = resample_to_model_grid(volume, spacing_mm=MODEL_MM, outside=float("nan"), bounds=BOUNDS)
    loaded = loaded_case(case, spacing_mm=MODEL_MM, bounds=BOUNDS)
    found, labels = resampled(loaded, whole_warp(loaded, spacing_mm=MODEL_MM))
    is_inside = ~expected.isnan() & (labels == 1)
    assert float(found[is_inside].std()) == pytest.approx(float(expected[is_inside].std()), rel=0.01)
    assert 5 < float(expected[is_inside].std()) < 16  # blocks of 4 voxels leave 15 of 30, interpolation less


def test_sample_of_an_oblique_case_is_upright():
    volume, _, case = a_noisy_case(GEOMETRIES["oblique"])
    extent = BodyExtent(size_mm=tuple((n - 1) * s for n, s in zip(case.labels.shape, case.spacing_mm)), **_nothing_cut(case))
    case = PreparedCase(intensity=case.intensity, labels=case.labels, spacing_mm=case.spacing_mm, extent=extent, direction=case.direction)
    source = CaseSource("oblique", lambda: case, memory=CaseMemory(spacing_mm=MODEL_MM, bounds=BOUNDS))
    sample = source.draw(torch.Generator().manual_seed(1), SynthesisOptions(spacing_mm=MODEL_MM))
    liver, spleen = ((sample.labels == value).nonzero().float().mean(0) for value in (1, 2))
    assert sample.labels.shape == sample.intensity.shape and liver[2] > spleen[2]


def _nothing_cut(case: PreparedCase) -> dict:
    """The other facts of a body that fills its volume."""
    in_plane = tuple((0.0, (n - 1) * s) for n, s in zip(case.labels.shape[1:], case.spacing_mm[1:]))
    return {"in_plane_mm": in_plane, "is_cut": ((False, False), (False, False)), "landmarks_mm": {}}


def test_cases_of_the_same_name_in_two_data_sets_are_both_drawn():
    memory = CaseMemory(spacing_mm=MODEL_MM, bounds=BOUNDS)
    cases = [PreparedCase(np.full((4, 4, 4), hu, np.int16), np.zeros((4, 4, 4), np.uint8), MODEL_MM, None) for hu in (10, 20)]
    sources = [CaseSource("case_0001", lambda case=case: case, memory=memory) for case in cases]
    assert [float(memory.get(source, source._load).intensity.mean()) for source in (*sources, *sources)] == [10, 20, 10, 20]


def test_memory_forgets_the_case_that_was_used_first():
    case = PreparedCase(np.zeros((4, 4, 4), np.int16), np.zeros((4, 4, 4), np.uint8), MODEL_MM, None)
    memory, loaded = CaseMemory(spacing_mm=MODEL_MM, bounds=BOUNDS, max_bytes=2 * 5 * 64), []
    for key in ("a", "b", "a", "c", "a", "b"):
        memory.get(key, lambda key=key: loaded.append(key) or case)
    assert loaded == ["a", "b", "c", "b"]


def test_memory_keeps_nothing_beside_what_it_counts():
    memory, arrays = CaseMemory(spacing_mm=MODEL_MM, bounds=BOUNDS), []

    def load():
        case = PreparedCase(np.zeros((8, 8, 8), np.int16), np.zeros((8, 8, 8), np.uint8), (3.0, 3.0, 3.0), None)
        arrays.append(weakref.ref(case.intensity))
        return case

    loaded = memory.get("a", load)
    gc.collect()
    assert arrays[0]() is None
    assert loaded.intensity.shape == (4, 4, 4) and loaded.num_bytes == 4 * 4**3 + 8**3


def test_scans_are_slabs_now_and_then():
    extent = BodyExtent(size_mm=(700.0, 300.0, 400.0), in_plane_mm=((20.0, 280.0), (20.0, 380.0)), is_cut=((False, False), (False, False)), landmarks_mm={})
    boxes = torch.stack([random_box(extent, min_range_mm=120.0, generator=torch.Generator().manual_seed(seed)) for seed in range(600)])
    lengths = boxes[:, 1, 0] - boxes[:, 0, 0]
    assert abs(float((lengths < 119.9).float().mean()) - SLAB_SHARE) < 0.04
    assert SLAB_MM - 0.01 <= float(lengths.min()) < SLAB_MM + 20
    assert float(boxes[:, 0, 0].min()) >= 0 and float(boxes[:, 1, 0].max()) <= 700


# Free fluid.

NAMES = ("liver", "lung_left", "small_bowel", "heart")


def a_trunk() -> tuple[torch.Tensor, torch.Tensor]:
    """Fat around a liver (1), a lung (2) and muscle that is no class."""
    labels = torch.zeros(30, 40, 40, dtype=torch.uint8)
    labels[2:14, 10:30, 10:30], labels[16:28, 5:35, 10:30] = 1, 2
    grain = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    intensity = torch.full(labels.shape, -100.0) + 8 * grain
    intensity[:, :3], intensity[labels == 1], intensity[labels == 2] = 50, 60, -800
    return intensity, labels


def test_classes_of_free_fluid_are_found_by_name():
    assert labels_with(NAMES, ABDOMINAL_WORDS) == (1, 3) and labels_with(("Heart",), ABDOMINAL_WORDS) == ()


def test_ascites_turns_fat_near_the_abdominal_organs_to_fluid_and_nothing_else():
    num_changed = 0
    for seed in range(6):
        intensity, labels = a_trunk()
        before, labels_before = intensity.clone(), labels.clone()
        add_ascites(intensity, labels, organs=(1, 3), spacing_mm=(3.0,) * 3, generator=torch.Generator().manual_seed(seed))
        changed = intensity != before
        assert torch.equal(labels, labels_before)
        assert (labels[changed] == 0).all() and (before[changed] > FAT_HU[0]).all() and (before[changed] < FAT_HU[1]).all()
        if changed.any():
            assert FLUID_HU[0] - 5 < float(intensity[changed].mean()) < FLUID_HU[1] + 10
            assert int(changed.nonzero()[:, 0].max()) <= 13 + 14  # 40 mm of 3 mm voxels above the liver
        num_changed += int(changed.sum())
    assert num_changed > 5000


def test_bones_of_another_density_change_between_marrow_and_cortex_and_nothing_else_does():
    values = []
    for seed in range(40):
        intensity, labels = torch.full((4, 5, 6), 60.0), torch.zeros(4, 5, 6, dtype=torch.uint8)
        labels[1:3], labels[3] = 4, 7
        intensity[1], intensity[2] = 150.0, 1200.0  # spongy bone and cortex
        change_bone_density(intensity, labels, bones=(4,), generator=torch.Generator().manual_seed(seed))
        assert (intensity[0] == 60).all() and (intensity[3] == 60).all()
        values.append((float(intensity[1, 0, 0]), float(intensity[2, 0, 0])))
    spongy, cortex = np.array(values).T
    assert (spongy < cortex).all() and spongy.min() < 40 and spongy.max() > 170  # as dark as marrow without mineral, brighter than before
    assert 300 < cortex.min() < 600 and 1200 < cortex.max() < 1600
    assert labels_with(["spleen", "vertebrae", "ribs", "hip_left", "femur_right"], BONE_WORDS) == (2, 3, 4, 5)


def test_effusion_fills_the_back_of_the_lung_which_is_no_lung_then():
    num_filled = 0
    for seed in range(6):
        intensity, labels = a_trunk()
        before, labels_before = intensity.clone(), labels.clone()
        add_effusion(intensity, labels, lungs=(2,), spacing_mm=(3.0,) * 3, generator=torch.Generator().manual_seed(seed))
        changed = labels != labels_before
        assert torch.equal(changed, intensity != before)
        assert (labels_before[changed] == 2).all() and (labels[changed] == 0).all()
        if changed.any():
            num_filled += int(changed.sum())
            assert FLUID_HU[0] <= float(intensity[changed].min()) == float(intensity[changed].max()) <= FLUID_HU[1]
            left = (labels == 2).nonzero()[:, 1].float().mean()
            assert changed.nonzero()[:, 1].float().mean() < left  # posterior of what is left, low index
    assert num_filled > 500


@pytest.mark.parametrize("add", [lambda *a, **k: add_ascites(*a, organs=(7,), **k), lambda *a, **k: add_effusion(*a, lungs=(7,), **k)])
def test_free_fluid_without_its_organs_changes_nothing(add):
    intensity, labels = a_trunk()
    add(intensity, labels, spacing_mm=(3.0,) * 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(intensity, a_trunk()[0]) and torch.equal(labels, a_trunk()[1])
