"""Any place, size and direction of a volume, drawn at random: what is written comes back, and the answer turns with the volume."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from NMSWSegment.engine.resampling import resample_to_model_grid, restore_labelmap, to_model_grid  # noqa: E402
from NMSWSegment.engine.segment import segment_volume  # noqa: E402
from NMSWSegment.files.bundle import load_bundle  # noqa: E402
from NMSWSegment.files.grid import CandidateGrid  # noqa: E402
from NMSWSegment.files.model_grid import model_grid_around  # noqa: E402
from NMSWSegment.files.volume import Volume, read_volume, write_volume  # noqa: E402
from NMSWSegment.protocol import SegmentOptions  # noqa: E402

# The same examples in every run, so that a failure is there again.
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW_EXAMPLES = settings(EXAMPLES, max_examples=12)

lengths = st.tuples(*[st.integers(2, 9)] * 3)
spacings = st.tuples(*[st.floats(0.3, 8.0)] * 3)
origins = st.tuples(*[st.floats(-900, 900)] * 3)
quaternions = st.tuples(*[st.floats(-1, 1)] * 4)
mirrors = st.sampled_from([1.0, -1.0])
axes_orders = st.permutations([0, 1, 2])
flips = st.tuples(*[st.booleans()] * 3)


def rotation(quaternion: tuple[float, ...]) -> np.ndarray:
    """3 x 3 of a quaternion of any length but 0."""
    q = np.array(quaternion)
    assume(np.linalg.norm(q) > 0.1)
    a, b, c, d = q / np.linalg.norm(q)
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )


@st.composite
def volumes(draw, *, shape=lengths) -> Volume:
    """Any oblique, mirrored, anisotropic volume with asymmetric voxels."""
    array = np.random.default_rng(draw(st.integers(0, 99))).integers(-1000, 1000, draw(shape)).astype(np.int16)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation(draw(quaternions)) @ np.diag(draw(spacings)) @ np.diag([draw(mirrors), 1, 1])
    matrix[:3, 3] = draw(origins)
    return Volume(array=array, ijk_to_ras=matrix)


@EXAMPLES
@given(volume=volumes(), ending=st.sampled_from([".nii", ".nii.gz", ".nrrd", ".mha"]))
def test_volume_comes_back_from_every_format_with_voxels_and_place(volume, ending):
    with tempfile.TemporaryDirectory() as folder:
        write_volume(volume, path := Path(folder) / f"ct{ending}")
        found = read_volume(path)
    np.testing.assert_array_equal(found.array, volume.array)
    np.testing.assert_allclose(found.ijk_to_ras, volume.ijk_to_ras, atol=1e-3 if ending.startswith(".nii") else 1e-9)


@EXAMPLES
@given(volume=volumes(), spacing_mm=spacings)
def test_model_frame_is_upright_and_holds_every_corner(volume, spacing_mm):
    frame = model_grid_around(volume.shape, volume.ijk_to_ras, spacing_mm=spacing_mm)
    assert np.array_equal(frame.ijk_to_ras[:3, :3], np.diag(spacing_mm[::-1]))
    ends = [(-0.5, length - 0.5) for length in volume.shape[::-1]]
    corners_ijk = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
    corners_ras = corners_ijk @ volume.ijk_to_ras[:3, :3].T + volume.ijk_to_ras[:3, 3]
    in_frame = (corners_ras - frame.ijk_to_ras[:3, 3]) / np.array(spacing_mm[::-1])
    assert (in_frame > -0.5 - 2e-4).all() and (in_frame < np.array(frame.shape[::-1]) - 0.5 + 2e-4).all()


@EXAMPLES
@given(volume=volumes(), spacing_mm=spacings, intensity=st.integers(-1000, 1000))
def test_constant_volume_is_constant_inside_and_air_outside(volume, spacing_mm, intensity):
    constant = Volume(np.full(volume.shape, intensity, np.int16), volume.ijk_to_ras)
    found, _ = resample_to_model_grid(constant, spacing_mm=spacing_mm, outside=-1024)
    values = found.numpy()
    assert (np.isclose(values, intensity, atol=1e-2) | (values == -1024)).all()


@EXAMPLES
@given(volume=volumes(), spacing_mm=spacings, label=st.integers(1, 255))
def test_labelmap_of_one_label_covers_the_volume_again(volume, spacing_mm, label):
    import torch

    frame = model_grid_around(volume.shape, volume.ijk_to_ras, spacing_mm=spacing_mm)
    restored = restore_labelmap(torch.full(frame.shape, label, dtype=torch.uint8), frame)
    assert restored.shape == volume.shape and (restored.array == label).all()
    np.testing.assert_array_equal(restored.ijk_to_ras, volume.ijk_to_ras)


@EXAMPLES
@given(shape=lengths, half_patch=st.tuples(*[st.integers(1, 4)] * 3))
def test_candidates_cover_every_voxel_and_nothing_beyond_the_padding(shape, half_patch):
    patch_size = tuple(2 * length for length in half_patch)
    grid = CandidateGrid.covering(shape, patch_size=patch_size, overlap=0.5)
    covered = np.zeros(grid.padded_shape, dtype=int)
    for index in range(grid.num_candidates):
        covered[grid.slices(index)] += 1
    assert covered.min() >= 1 and all(padded >= length for padded, length in zip(grid.padded_shape, shape))


def reordered(volume: Volume, *, order: list[int], flipped: tuple[bool, ...]) -> Volume:
    """The same voxels at the same places, stored with other axes."""
    array, matrix = volume.array.transpose(order), volume.ijk_to_ras.copy()
    columns = [2 - order[2 - axis] for axis in range(3)]  # array order KJI -> columns IJK
    matrix[:3, :3] = matrix[:3, columns]
    for axis in range(3):
        if flipped[axis]:
            array = np.flip(array, axis)
            column = 2 - axis
            matrix[:3, 3] += matrix[:3, column] * (array.shape[axis] - 1)
            matrix[:3, column] *= -1
    return Volume(np.ascontiguousarray(array), matrix)


@FEW_EXAMPLES
@given(order=axes_orders, flipped=flips)
def test_segmentation_is_the_same_however_the_voxels_are_stored(a_tiny_bundle, a_phantom, order, flipped):
    bundle, options = load_bundle(a_tiny_bundle), SegmentOptions(num_patches=3, device="cpu", threads=1)
    volume, _ = a_phantom
    expected = segment_volume(volume, bundle, options=options).labelmap
    found = segment_volume(reordered(volume, order=order, flipped=flipped), bundle, options=options).labelmap
    np.testing.assert_array_equal(found.array, reordered(expected, order=order, flipped=flipped).array)


@FEW_EXAMPLES
@given(volume=volumes(shape=st.tuples(*[st.integers(2, 24)] * 3)))
def test_segmentation_of_any_volume_lies_on_its_own_grid_and_its_patches_within_its_frame(a_tiny_bundle, volume):
    bundle = load_bundle(a_tiny_bundle)
    result = segment_volume(volume, bundle, options=SegmentOptions(num_patches=2, device="cpu", threads=1))
    assert result.labelmap.shape == volume.shape and result.labelmap.array.dtype == np.uint8 and result.labelmap.array.max() <= 3
    np.testing.assert_array_equal(result.labelmap.ijk_to_ras, volume.ijk_to_ras)
    x, frame, grid = to_model_grid(volume, bundle.manifest)
    assert bool(x.isfinite().all()) and x.min() >= 0 and x.max() <= 1
    low = frame.ijk_to_ras[:3, 3] - np.array(frame.spacing_mm[::-1]) / 2
    high = low + np.array(frame.shape[::-1]) * np.array(frame.spacing_mm[::-1])
    for patch in result.patches:
        center, half = np.array(patch.center_ras), np.array(patch.size_mm) / 2
        assert (center - half > low - 1e-6).all() and (center + half < high + 1e-6).all()
