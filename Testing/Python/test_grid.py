import numpy as np
import pytest

from NMSWSegment.files.grid import CandidateGrid


@pytest.mark.parametrize(
    ("shape", "candidates"),
    [((480, 480, 480), 343), ((288, 480, 480), 196), ((10, 10, 10), 1), ((128, 129, 128), 2)],
)
def test_covering_counts_match_the_paper(shape, candidates):
    assert CandidateGrid.covering(shape, patch_size=(128, 128, 128), overlap=0.5).num_candidates == candidates


@pytest.mark.parametrize(("shape", "overlap"), [((37, 20, 8), 0.5), ((8, 8, 8), 0.0), ((3, 50, 17), 0.75)])
def test_every_voxel_is_covered_and_padding_is_smallest(shape, overlap):
    grid = CandidateGrid.covering(shape, patch_size=(8, 8, 8), overlap=overlap)
    covered = np.zeros(grid.padded_shape, dtype=int)
    for index in range(grid.num_candidates):
        covered[grid.slices(index)] += 1
    assert covered.min() == 1
    assert all(full >= length and full - length < max(8 - length + 1, step) for full, length, step in zip(grid.padded_shape, shape, grid.stride))


def test_candidates_are_numbered_with_the_last_axis_fastest():
    grid = CandidateGrid.covering((12, 8, 16), patch_size=(8, 8, 8), overlap=0.5)
    assert grid.counts == (2, 1, 3)
    assert grid.starts.tolist() == [[0, 0, 0], [0, 0, 4], [0, 0, 8], [4, 0, 0], [4, 0, 4], [4, 0, 8]]


def test_overlap_without_whole_stride_is_refused():
    with pytest.raises(ValueError, match="does not divide the patch"):
        CandidateGrid.covering((20, 20, 20), patch_size=(8, 8, 8), overlap=0.3)


@pytest.mark.parametrize(
    ("shape", "patch", "factor", "expected"),
    [
        ((480, 480, 480), 128, 3, (160, 160, 160)),  # not 171, of the 512 voxels with padding
        ((1, 30, 130), 64, 2, (1, 15, 65)),
        ((97, 200, 95), 96, 4, (25, 50, 24)),
    ],
)
def test_coarse_volume_is_that_of_the_volume_without_padding(shape, patch, factor, expected):
    assert CandidateGrid.covering(shape, patch_size=(patch,) * 3, overlap=0.5, coarse_factor=(factor,) * 3).coarse_shape == expected


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_every_candidate_has_the_center_of_a_coarse_voxel(overlap):
    for length in range(1, 40):
        for factor in (1, 2, 3, 5, 8):
            grid = CandidateGrid.covering((length, 8, 8), patch_size=(8, 8, 8), overlap=overlap, coarse_factor=(factor, 1, 1))
            centers = (np.arange(grid.coarse_shape[0]) + 0.5) * factor
            centers = np.minimum(centers, grid.padded_shape[0] - 0.5)  # the last coarse voxel may reach beyond the padding
            for start in grid.starts[:, 0]:
                assert ((centers >= start) & (centers < start + 8)).any(), (length, factor, start)
