"""A CT that is padded with 0, as many programs fill what a scan does not show, gets the answer of one that is padded with air."""

import numpy as np
import pytest
import SimpleITK as sitk

import NMSWSegment
from NMSWSegment.files.padding import find_padding
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import UserError

AIR = -1000.0


def noisy(shape=(30, 40, 50)) -> np.ndarray:
    """Tissue with noise, rounded as a CT is: some voxels are exactly 0."""
    return np.rint(np.random.default_rng(0).normal(0, 8, shape)).astype(np.int16)


def oblique_box(shape=(30, 40, 50)) -> np.ndarray:
    """A turned box inside a volume, (K, J, I) bool."""
    turn = sitk.Euler3DTransform((24.5, 19.5, 14.5), 0.3, 0.2, 0.25)
    box = sitk.GetImageFromArray(np.pad(np.ones([length - 12 for length in shape], np.uint8), 6))
    return sitk.GetArrayFromImage(sitk.Resample(box, turn, sitk.sitkNearestNeighbor, 0)) > 0


def cylinder(shape=(30, 40, 50)) -> np.ndarray:
    """A circular field of view, (K, J, I) bool."""
    j, i = np.ogrid[: shape[1], : shape[2]]
    return np.broadcast_to((j - 19.5) ** 2 + (i - 24.5) ** 2 < 18**2, shape)


@pytest.mark.parametrize("field", [oblique_box(), cylinder()], ids=["oblique box", "circle"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_padding_around_a_field_of_view_is_found_to_the_voxel(field, dtype):
    array = np.where(field, noisy() + 1000, 0).astype(dtype)
    array[10:14, 15:19, 20:24] = 0  # the same value inside
    found = find_padding(array, darkest=AIR)
    assert (found == ~field).all() and 0.2 < found.mean() < 0.8


def test_voxels_of_the_value_at_the_edge_of_the_field_of_view_are_all_that_is_mistaken():
    field = oblique_box()
    found = find_padding(np.where(field, noisy(), 0), darkest=AIR)
    assert found[~field].all() and found[field].mean() < 0.03


@pytest.mark.parametrize("value", [-3024, -1024, -1000, 40])
def test_other_values_are_left_to_the_networks(value):
    assert find_padding(np.where(oblique_box(), noisy(), value), darkest=AIR) is None


def test_zero_is_no_padding_where_it_is_the_lower_bound_of_the_intensities():
    assert find_padding(np.where(oblique_box(), noisy(), 0), darkest=0.0) is None


def test_noise_a_uniform_volume_and_no_number_are_no_padding():
    assert find_padding(noisy(), darkest=AIR) is None
    assert find_padding(np.zeros((5, 6, 7)), darkest=AIR) is None
    assert find_padding(np.full((5, 6, 7), np.nan), darkest=AIR) is None
    assert find_padding(noisy((1, 2, 2)), darkest=AIR) is None


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
    assert expected.run_info["padding_share"] == 0 and found.run_info["padding_share"] == pytest.approx(share, abs=1e-4)


def test_no_structure_is_found_in_the_padding(a_phantom, a_tiny_bundle, monkeypatch):
    monkeypatch.setattr(
        "NMSWSegment.engine.segment.restore_labelmap", lambda labels, grid: Volume(np.ones(grid.source_shape, np.uint8), grid.source_ijk_to_ras)
    )
    found = NMSWSegment.segment(padded(a_phantom[0], 0), model=a_tiny_bundle, k=0, device="cpu", threads=1).labelmap.array
    assert found.sum() == a_phantom[0].array.size and found[3:-9, 8:-4, 5:-12].all()


def test_training_sees_air_there_too(a_phantom):
    torch = pytest.importorskip("torch")
    from NMSWSegment.engine.resampling import block_averaged

    air, zero = (block_averaged(padded(a_phantom[0], value), spacing_mm=(6.0, 6.0, 6.0), bounds=(AIR, 1500.0))[0] for value in (AIR, 0))
    assert torch.equal(air, zero)


def test_stored_values_without_rescaling_are_still_refused(a_phantom, a_tiny_bundle):
    with pytest.raises(UserError, match="hardly a CT in Hounsfield units"):
        NMSWSegment.segment(Volume(padded(a_phantom[0], 0).array.clip(0), np.eye(4)), model=a_tiny_bundle, device="cpu")
