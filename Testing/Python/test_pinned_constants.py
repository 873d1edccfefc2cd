"""Constants of the method that no other test would miss: changed ones change every answer without an error."""

import pytest
import torch

from NMSWSegment.engine.aggregation import aggregate, mixing_weights, patch_window
from NMSWSegment.engine.selection import greedy_coverage, select, shows_foreground
from NMSWSegment.files.grid import CandidateGrid

SIDE_BY_SIDE = CandidateGrid.covering((8, 8, 24), patch_size=(8, 8, 8), overlap=0.0, coarse_factor=(2, 2, 2))
"""Three candidates."""


def test_a_class_that_is_never_trusted_to_the_patch_still_gets_sigmoid_of_minus_one():
    # The clamp of Eq. 6 at -1: a patch always keeps 0.2689 of a say.
    weights = mixing_weights(torch.tensor([-50.0, -1.0, 0.0, 50.0]))
    torch.testing.assert_close(weights, torch.tensor([0.26894143, 0.26894143, 0.5, 0.9999546]))
    grid = CandidateGrid.covering((8, 8, 8), patch_size=(8, 8, 8), overlap=0.0, coarse_factor=(2, 2, 2))
    mixed, _ = aggregate(torch.zeros(1, 4, 4, 4), [torch.ones(1, 8, 8, 8)], indices=[0], grid=grid, class_weights=torch.tensor([-50.0]))
    torch.testing.assert_close(mixed, torch.full((1, 8, 8, 8), 0.26894143))


def test_a_corner_of_a_patch_weighs_a_thousandth_of_its_center():
    # Without the floor the corner would weigh exp(-24): two patches that meet there would divide by almost nothing.
    window = patch_window((64, 64, 64))
    assert float(window.max()) == 1.0 and float(window[0, 0, 0]) == pytest.approx(1e-3)


@pytest.mark.parametrize(("presence", "is_shown"), [(0.0999, False), (0.1001, True)])
def test_a_candidate_shows_foreground_from_a_probability_of_a_tenth(presence, is_shown):
    foreground = torch.zeros(4, 4, 12)
    foreground[1, 2, 5] = presence  # one coarse voxel of the middle candidate
    assert shows_foreground(foreground, grid=SIDE_BY_SIDE).tolist() == [False, is_shown, False]


@pytest.mark.parametrize(("share", "num_patches"), [(0.0098, 2), (0.0102, 3)])
def test_auto_stops_where_the_next_patch_covers_less_than_a_hundredth(share, num_patches):
    mass = torch.zeros(4, 4, 12, dtype=torch.float64)
    mass[0, 0, 1], mass[0, 0, 5], mass[0, 0, 9] = 0.7, 0.3 - share, share
    logits = torch.zeros(2, 4, 4, 12)  # both classes equally likely everywhere, so that the importance alone decides
    importance_map = mass.clamp_min(1e-12).log().float()
    chosen = select(logits, importance_map, grid=SIDE_BY_SIDE, num_patches="auto", policy="greedy").indices
    assert chosen == tuple(range(num_patches))
    assert greedy_coverage(mass, torch.ones(3, dtype=torch.bool), grid=SIDE_BY_SIDE, num_patches=3, least_share=0.01) == list(range(num_patches))
