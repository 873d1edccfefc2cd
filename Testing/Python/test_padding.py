"""What a scan does not show holds no structure, and a CT that is padded with 0, as many programs do, gets the answer of one that is padded with air."""

import functools

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import NMSWSegment
from NMSWSegment.data.body_extent import BodyExtent
from NMSWSegment.data.prepared_case import PreparedCase
from NMSWSegment.evaluation import baselines
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.normalization import FIXED, ZSCORE
from NMSWSegment.files.padding import find_padding
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import SegmentOptions, UserError
from NMSWSegment.samples.case_memory import loaded_case

AIR = -1000.0


def noisy(shape=(30, 40, 50)) -> np.ndarray:
    """Tissue with noise, rounded as a CT is: some voxels are exactly 0."""
    return np.rint(np.random.default_rng(0).normal(0, 8, shape)).astype(np.int16)


def oblique_box(shape=(30, 40, 50)) -> np.ndarray:
    """A turned box inside a volume, (K, J, I) bool."""
    turn = sitk.Euler3DTransform((24.5, 19.5, 14.5), 0.3, 0.2, 0.25)
    box = sitk.GetImageFromArray(np.pad(np.ones([length - 12 for length in shape], np.uint8), 6))
    return sitk.GetArrayFromImage(sitk.Resample(box, turn, sitk.sitkNearestNeighbor, 0)) > 0


def cylinder(shape=(30, 40, 50), *, radius=18) -> np.ndarray:
    """A circular field of view, (K, J, I) bool."""
    j, i = np.ogrid[: shape[1], : shape[2]]
    return np.broadcast_to((j - 19.5) ** 2 + (i - 24.5) ** 2 < radius**2, shape)


def found_in(array: np.ndarray, **options) -> np.ndarray | None:
    """Voxels of the padding, (K, J, I) bool."""
    padding = find_padding(array, **{"normalization": FIXED, "darkest": AIR} | options)
    return padding and padding.of_slices(slice(None))


@pytest.mark.parametrize("field", [oblique_box(), cylinder()], ids=["oblique box", "circle"])
@pytest.mark.parametrize(("value", "dtype"), [(0, np.int16), (0, np.uint16), (0, np.float32), (-1024, np.int16), (-3024, np.float64), (-1000, np.int16)])
def test_padding_around_a_field_of_view_is_found_to_the_voxel(field, value, dtype):
    array = np.where(field, noisy() + 1000, value).astype(dtype)
    array[10:14, 15:19, 20:24] = value  # the same value inside
    found = found_in(array)
    assert (found == ~field).all() and 0.2 < found.mean() < 0.8


def test_corners_of_different_values_are_all_padding():
    field = oblique_box() & cylinder()
    array = np.where(oblique_box(), np.where(cylinder(), noisy() + 1000, -3024), -1024)
    found = found_in(array)
    assert (found[~oblique_box()]).all() and not found[field].any()


def test_voxels_of_the_value_at_the_edge_of_the_field_of_view_are_all_that_is_mistaken():
    field = oblique_box()
    found = found_in(np.where(field, noisy(), 0))
    assert found[~field].all() and found[field].mean() < 0.01


def test_lungs_that_reach_the_ends_of_a_scan_are_no_padding():
    array = np.where(cylinder(), np.maximum(noisy() * 10 - 1000, -1024), -1024)  # as many voxels of the value as of others
    assert 0.3 < (array[cylinder()] == -1024).mean() < 0.5
    found = found_in(array)
    assert found[~cylinder()].all() and found[cylinder(radius=12)].mean() < 0.005


def test_other_values_are_left_to_the_networks():
    assert found_in(np.where(oblique_box(), noisy(), 40)) is None
    assert found_in(np.where(oblique_box(), noisy(), -500)) is None


def test_intensities_that_are_relative_have_no_value_of_air():
    assert found_in(np.where(oblique_box(), noisy(), 0), normalization=ZSCORE, darkest=-2.0) is None


def test_noise_a_uniform_volume_and_no_number_are_no_padding():
    assert found_in(noisy()) is None
    assert found_in(np.zeros((5, 6, 7))) is None
    assert found_in(np.full((5, 6, 7), np.nan)) is None
    assert found_in(noisy((1, 2, 2))) is None


def padded(volume: Volume, value: float) -> Volume:
    """The volume with layers of a value around it, more of them at some faces, on a grid with the same voxels."""
    layers = ((3, 9), (8, 4), (5, 12))
    matrix = volume.ijk_to_ras.copy()
    matrix[:3, 3] -= matrix[:3, :3] @ np.array([before for before, _ in layers[::-1]])
    return Volume(np.pad(volume.array, layers, constant_values=value), matrix, volume.name)


def test_answer_is_that_of_a_volume_padded_with_air(a_phantom, a_tiny_bundle):
    options = {"model": a_tiny_bundle, "k": 3, "device": "cpu", "threads": 1}
    expected, found = (NMSWSegment.segment(padded(a_phantom[0], value), **options) for value in (AIR, 0))
    assert (found.labelmap.array == expected.labelmap.array).all() and found.labelmap.array.any()
    share = 1 - a_phantom[0].array.size / found.labelmap.array.size
    assert expected.run_info["zero_padding_share"] == 0 and found.run_info["zero_padding_share"] == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("value", [0, -1024])
def test_no_structure_is_found_in_the_padding(a_phantom, a_tiny_bundle, monkeypatch, value):
    monkeypatch.setattr("NMSWSegment.engine.segment._kept", lambda labels, keep: torch.ones_like(labels))
    found = NMSWSegment.segment(padded(a_phantom[0], value), model=a_tiny_bundle, k=0, device="cpu", threads=1).labelmap.array
    assert found.sum() == a_phantom[0].array.size and found[3:-9, 8:-4, 5:-12].all()


def test_a_sliding_window_finds_no_structure_there_either(a_phantom, a_tiny_bundle, monkeypatch):
    monkeypatch.setattr(baselines, "slide", lambda x, run, **_: (torch.ones(x.shape[2:], dtype=torch.uint8), 1))
    volume = padded(a_phantom[0], -1024)
    method = functools.partial(baselines.sliding_window, overlap=0.5)
    found = baselines.as_segment(volume, load_bundle(a_tiny_bundle), method=method, options=SegmentOptions(device="cpu", threads=1)).labelmap.array
    assert found.sum() == a_phantom[0].array.size and found[3:-9, 8:-4, 5:-12].all()


def test_training_sees_air_there_too(a_phantom):
    def seen_by_training(value: float) -> torch.Tensor:
        volume = padded(a_phantom[0], value)
        extent = BodyExtent((1, 1, 1), ((0, 1), (0, 1)), ((False, False), (False, False)), {})
        case = PreparedCase(volume.array, np.zeros(volume.shape, np.uint8), volume.spacing_mm, extent)
        return loaded_case(case, spacing_mm=(6.0, 6.0, 6.0), bounds=(AIR, 1500.0)).intensity

    assert torch.equal(seen_by_training(AIR), seen_by_training(0))


def test_stored_values_without_rescaling_are_still_refused(a_phantom, a_tiny_bundle):
    with pytest.raises(UserError, match="hardly a CT in Hounsfield units"):
        NMSWSegment.segment(Volume(padded(a_phantom[0], 0).array.clip(0), np.eye(4)), model=a_tiny_bundle, device="cpu")
