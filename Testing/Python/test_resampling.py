import numpy as np
import pytest
import torch
from conftest import turned

from NMSWSegment.engine import resampling
from NMSWSegment.engine.resampling import coarse_ijk_to_ras, coarse_input, normalize_intensity, resample_to_model_grid, restore_labelmap
from NMSWSegment.files import phantoms
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.model_grid import ModelGrid, model_grid_around, moves_with
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import UserError

SPACING = (6.0, 6.0, 6.0)


def world_points(model_grid):
    """RAS of every voxel of the model grid center, (D, H, W, 3)."""
    k, j, i = np.meshgrid(*[np.arange(n) for n in model_grid.shape], indexing="ij")
    return np.stack([i, j, k], -1) @ model_grid.ijk_to_ras[:3, :3].T + model_grid.ijk_to_ras[:3, 3]


def test_volume_on_the_model_grid_is_unchanged(a_phantom):
    volume, _ = a_phantom
    intensity, model_grid = resample_to_model_grid(volume, spacing_mm=SPACING, outside=-1000)
    assert np.array_equal(intensity.numpy(), volume.array)
    np.testing.assert_allclose(model_grid.ijk_to_ras, volume.ijk_to_ras)


@pytest.mark.parametrize(
    ("spacing_mm", "shape", "orientation"),
    [
        ((6.0, 6.0, 6.0), (54, 36, 52), {"degrees": (0, 0, 0), "mirror": (-1, -1, 1)}),
        ((6.0, 6.0, 6.0), (36, 52, 54), {"degrees": (0, 0, 0), "permutation": (2, 0, 1)}),
        ((2.0, 3.1, 4.4), (160, 70, 72), {"degrees": (0, 0, 0), "mirror": (1, -1, -1)}),
        ((4.0, 3.0, 3.0), (90, 85, 110), {"degrees": (20, -15, 10)}),
        ((4.0, 3.0, 3.0), (90, 85, 110), {"degrees": (20, -15, 10), "mirror": (-1, 1, -1), "permutation": (1, 2, 0)}),
        ((10.0, 2.0, 2.0), (34, 120, 160), {"degrees": (3, 0, 0)}),
    ],
)
def test_any_frame_gives_the_same_picture(spacing_mm, shape, orientation):
    ijk_to_ras = turned(spacing_mm, shape, **orientation)
    volume, _ = phantoms.phantom(shape, ijk_to_ras=ijk_to_ras)
    intensity, model_grid = resample_to_model_grid(volume, spacing_mm=SPACING, outside=-1000)
    assert np.array_equal(model_grid.ijk_to_ras[:3, :3], np.diag([6.0, 6.0, 6.0]))
    points = world_points(model_grid)
    for center, _, hu in phantoms.ORGANS.values():
        near = ((points - np.array(center)) ** 2).sum(-1) < 12**2
        assert near.any()
        np.testing.assert_allclose(intensity.numpy()[near], hu, atol=1e-2)


def test_rounding_of_direction_cosines_makes_no_volume_oblique():
    shape = (20, 24, 28)
    exact, rounded = (turned((3.0, 3.0, 3.0), shape, degrees=(0, 0, degrees)) for degrees in (0, 1e-8))
    assert not np.array_equal(exact, rounded)
    assert (moves_with(np.linalg.inv(exact) @ rounded, shape=shape) == np.eye(3, dtype=bool)).all()
    assert moves_with(np.linalg.inv(exact) @ turned((3.0, 3.0, 3.0), shape, degrees=(0, 0, 0.001)), shape=shape).sum() == 5
    array = np.random.default_rng(0).normal(0, 100, shape).astype(np.float32)
    first, second = (resample_to_model_grid(Volume(array, matrix), spacing_mm=(2.0, 2.0, 2.0), outside=0)[0] for matrix in (exact, rounded))
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_outside_of_an_oblique_volume_is_the_lower_bound():
    volume = Volume(array=np.full((20, 20, 20), 50.0, dtype=np.float32), ijk_to_ras=turned((6.0, 6.0, 6.0), (20, 20, 20), degrees=(0, 0, 45)))
    intensity, _ = resample_to_model_grid(volume, spacing_mm=SPACING, outside=-1000)
    assert intensity[10, 0, 0] == -1000 and intensity[10, 14, 14] == 50
    assert set(np.unique(intensity.numpy().round(3))) == {-1000.0, 50.0}


def test_finer_volumes_are_averaged_not_sampled():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 100, (48, 48, 48)).astype(np.float32)
    volume = Volume(array=noise, ijk_to_ras=phantoms.upright_ijk_to_ras((1.5, 1.5, 1.5), noise.shape))
    intensity, model_grid = resample_to_model_grid(volume, spacing_mm=SPACING, outside=0)
    assert model_grid.shape == (12, 12, 12)
    assert float(intensity[2, 3, 4]) == pytest.approx(noise[8:12, 12:16, 16:20].mean(), abs=1e-3)
    assert intensity.std() < 20


def test_intensity_map_goes_through_its_points_and_clamps():
    points = ((-1000.0, 0.0), (-200.0, 0.2), (300.0, 0.85), (1500.0, 1.0))
    values = normalize_intensity(torch.tensor([-3000.0, -1000, -600, -200, 50, 300, 1500, 9000]), points)
    torch.testing.assert_close(values, torch.tensor([0, 0, 0.1, 0.2, 0.525, 0.85, 1, 1]))


def test_coarse_input_is_the_mean_of_blocks():
    x = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
    coarse = coarse_input(x, grid=CandidateGrid.covering((4, 4, 4), patch_size=(4, 4, 4), overlap=0.5, coarse_factor=(2, 2, 4)))
    assert coarse.shape == (1, 1, 2, 2, 1)
    assert coarse[0, 0, 1, 0, 0] == x[0, 0, 2:, :2, :].mean()


@pytest.mark.parametrize("coarse_factor", [(2, 2, 4), (3, 3, 3)])  # 3 divides neither volume nor padding
def test_coarse_voxels_lie_in_the_middle_of_what_they_average(coarse_factor):
    model_grid = model_grid_around((31, 15, 22), turned((7.0, 6.0, 5.0), (31, 15, 22)), spacing_mm=(6.0, 5.0, 4.0))
    grid = CandidateGrid.covering(model_grid.shape, patch_size=(16, 8, 8), overlap=0.5, coarse_factor=coarse_factor)
    k, j, i = np.meshgrid(*[np.arange(n) for n in grid.padded_shape], indexing="ij")
    points = np.stack([i, j, k], -1) @ model_grid.ijk_to_ras[:3, :3].T + model_grid.ijk_to_ras[:3, 3]
    averaged = [coarse_input(torch.from_numpy(points[..., axis])[None, None], grid=grid)[0, 0] for axis in range(3)]
    assert tuple(averaged[0].shape) == grid.coarse_shape
    matrix = coarse_ijk_to_ras(model_grid, grid=grid)
    for index_kji in np.ndindex(*[full // r for full, r in zip(grid.shape, coarse_factor)]):
        center = (matrix @ [*index_kji[::-1], 1])[:3]
        np.testing.assert_allclose([float(values[index_kji]) for values in averaged], center, atol=1e-6)


def test_coarse_input_sees_the_volume_and_not_the_padding():
    grid = CandidateGrid.covering((9, 8, 13), patch_size=(8, 8, 8), overlap=0.5, coarse_factor=(2, 2, 2))
    assert (grid.padded_shape, grid.coarse_shape) == ((12, 8, 16), (5, 4, 7))
    x = torch.zeros(1, 1, *grid.padded_shape)
    x[..., :9, :8, :13] = 1
    coarse = coarse_input(x, grid=grid)
    assert coarse[0, 0, :4, :, :6].eq(1).all()
    assert coarse[0, 0, 4, 0, 6] == 1 / 4  # one slice of two, one column of two


@pytest.mark.parametrize("orientation", [{"degrees": (0, 0, 0)}, {"degrees": (0, 0, 0), "mirror": (-1, 1, -1), "permutation": (2, 0, 1)}])
def test_labels_round_trip_exactly_on_the_model_grid(orientation):
    shape = (54, 36, 52)
    volume, labels = phantoms.phantom(shape, ijk_to_ras=turned(SPACING, shape, **orientation))
    in_frame = Volume(array=labels.astype(np.float32), ijk_to_ras=volume.ijk_to_ras)
    intensity, model_grid = resample_to_model_grid(in_frame, spacing_mm=SPACING, outside=0)
    restored = restore_labelmap(intensity.to(torch.uint8), model_grid)
    assert np.array_equal(restored.array, labels)
    np.testing.assert_array_equal(restored.ijk_to_ras, volume.ijk_to_ras)


@pytest.mark.parametrize("orientation", [{"degrees": (0, 0, 0)}, {"degrees": (20, -15, 10), "mirror": (1, -1, 1)}])
def test_restored_surface_is_smooth(orientation):
    """Labels at 6 mm, restored to 2 mm, follow the ellipsoid better than nearest-neighbor blocks do."""
    _, coarse_labels = phantoms.phantom((54, 36, 52), ijk_to_ras=phantoms.upright_ijk_to_ras(SPACING, (54, 36, 52)))
    shape = (150, 100, 150)
    fine, expected = phantoms.phantom(shape, ijk_to_ras=turned((2.0, 2.0, 2.0), shape, **orientation))
    coarse = Volume(array=coarse_labels, ijk_to_ras=phantoms.upright_ijk_to_ras(SPACING, (54, 36, 52)))
    model_grid = ModelGrid(shape=(54, 36, 52), ijk_to_ras=coarse.ijk_to_ras, source_shape=shape, source_ijk_to_ras=fine.ijk_to_ras)
    restored = restore_labelmap(torch.from_numpy(coarse_labels), model_grid).array
    to_coarse = np.linalg.inv(coarse.ijk_to_ras) @ fine.ijk_to_ras
    k, j, i = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    index = np.rint(np.stack([i, j, k], -1) @ to_coarse[:3, :3].T + to_coarse[:3, 3]).astype(int)
    blocky = coarse_labels[tuple(np.clip(index[..., axis], 0, n - 1) for axis, n in zip((2, 1, 0), (54, 36, 52)))]
    assert (restored != expected).sum() < 0.75 * (blocky != expected).sum()
    assert set(np.unique(restored)) == {0, 1, 2, 3}


def test_slabs_do_not_change_the_answer(a_phantom, monkeypatch):
    volume, labels = a_phantom
    shape = (61, 40, 50)
    other, _ = phantoms.phantom(shape, ijk_to_ras=turned((4.0, 7.0, 5.0), shape))
    whole, model_grid = resample_to_model_grid(other, spacing_mm=SPACING, outside=-1000)
    restored = restore_labelmap(whole.gt(100).to(torch.uint8), model_grid).array
    monkeypatch.setattr(resampling, "VOXELS_AT_ONCE", 5000)
    in_slabs, _ = resample_to_model_grid(other, spacing_mm=SPACING, outside=-1000)
    assert torch.equal(in_slabs, whole)
    assert np.array_equal(restore_labelmap(whole.gt(100).to(torch.uint8), model_grid).array, restored)


def test_absurd_extent_is_refused():
    volume = Volume(array=np.zeros((10, 10, 10), dtype=np.float32), ijk_to_ras=np.diag([5000.0, 5000.0, 5000.0, 1.0]))
    with pytest.raises(UserError, match="check its spacing"):
        resample_to_model_grid(volume, spacing_mm=SPACING, outside=0)


def test_oblique_volume_of_few_voxels_is_interpolated_along_its_own_axes():
    matrix = np.array([[-1.0, 0, 0, 0], [0, 0.28, 2.88, 0], [0, 0.96, -0.84, 0], [0, 0, 0, 1]])  # turned about the axis of right
    array = np.array([[[701, 273], [22, -461]], [[-385, -919], [-850, -967]]], dtype=np.float32)
    shape = array.shape
    found, model_grid = resample_to_model_grid(Volume(array, matrix), spacing_mm=(3.0, 3.0, 3.0), outside=-2000.0)
    assert tuple(found.shape) == model_grid.shape
    to_source = np.linalg.inv(matrix) @ model_grid.ijk_to_ras
    for kji in np.ndindex(*model_grid.shape):
        ijk = (to_source @ [*kji[::-1], 1.0])[:3]
        if not ((ijk >= -0.5) & (ijk <= np.array(shape[::-1]) - 0.5)).all():
            assert float(found[kji]) == -2000
            continue
        low = np.clip(ijk, 0, np.array(shape[::-1]) - 1)
        wanted = sum(np.prod([1 - abs(low[axis] - corner[axis]) for axis in range(3)]) * array[corner[::-1]] for corner in np.ndindex(2, 2, 2))
        assert float(found[kji]) == pytest.approx(wanted, abs=0.1)
