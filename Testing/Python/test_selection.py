import math

import pytest
import torch

from NMSWSegment.engine.selection import candidate_importance, differentiable_top_k, greedy_coverage, pool_mean, select
from NMSWSegment.files.grid import CandidateGrid

GRID = CandidateGrid.covering((8, 8, 16), patch_size=(8, 8, 8), overlap=0.5, coarse_factor=(2, 2, 2))  # three candidates in a row


def logits_with_foreground(columns):
    """Coarse logits (2, 4, 4, 8) that are background but for some voxels of the last axis."""
    logits = torch.zeros(2, 4, 4, 8)
    logits[0] = 8
    for column in columns:
        logits[1, :, :, column] = 16
    return logits


def test_pooling_covers_the_true_footprint():
    values = torch.zeros(4, 4, 8)
    values[0, 0, 3] = 32.0  # full-resolution voxels 6 and 7: in candidates 0 (0..7) and 1 (4..11)
    assert pool_mean(values, grid=GRID).tolist() == [32 / 64, 32 / 64, 0]


def test_pooling_with_a_factor_that_divides_nothing_uses_voxel_centers():
    grid = CandidateGrid.covering((8, 8, 16), patch_size=(8, 8, 8), overlap=0.5, coarse_factor=(3, 3, 3))
    values = torch.arange(6.0).expand(3, 3, 6)  # centers 1.5, 4.5, 7.5, 10.5, 13.5, 16.5
    assert pool_mean(values, grid=grid).tolist() == [1, 2, 4]


def test_top_k_ranks_by_importance_and_breaks_ties_by_index():
    importance_map = torch.zeros(4, 4, 8)
    chosen = select(logits_with_foreground(range(8)), importance_map, grid=GRID, num_patches=3, policy="top_k")
    assert chosen.indices == (0, 1, 2)
    importance_map[:, :, 5:] = math.log(5)  # gains of 1 and 5 a voxel: means 1, 2, 4
    chosen = select(logits_with_foreground(range(8)), importance_map, grid=GRID, num_patches=2, policy="top_k")
    assert chosen.indices == (2, 1)
    assert chosen.importance == pytest.approx((4 / 7, 2 / 7))


@pytest.mark.parametrize("policy", ["top_k", "greedy", "random"])
def test_background_candidates_come_last(policy):
    chosen = select(logits_with_foreground([7]), torch.zeros(4, 4, 8), grid=GRID, num_patches=3, policy=policy)
    assert chosen.indices[0] == 2
    assert sorted(chosen.indices) == [0, 1, 2]


@pytest.mark.parametrize("policy", ["top_k", "greedy", "random"])
@pytest.mark.parametrize(("num_patches", "expected"), [(0, 0), (2, 2), (99, 3), (None, 3)])
def test_number_of_patches_is_clipped_to_the_candidates(policy, num_patches, expected):
    chosen = select(logits_with_foreground(range(8)), torch.zeros(4, 4, 8), grid=GRID, num_patches=num_patches, policy=policy)
    assert len(chosen.indices) == len(set(chosen.indices)) == expected


def test_greedy_avoids_overlap_where_top_k_does_not():
    mass = torch.zeros(4, 4, 8)
    mass[0, 0, 1], mass[0, 0, 2], mass[0, 0, 3], mass[0, 0, 7] = 0.1, 1.0, 1.0, 1.5  # candidates hold 2.1, 2.0, 1.5
    order = greedy_coverage(mass, torch.ones(3, dtype=torch.bool), grid=GRID, num_patches=3)
    assert order == [0, 2]  # then nothing is left


def test_greedy_goes_on_by_importance_when_everything_is_covered():
    importance_map = torch.full((4, 4, 8), -torch.inf)
    importance_map[0, 0, 2] = importance_map[0, 0, 3] = 0  # candidates 0 and 1 hold both, candidate 2 nothing
    importance_map[0, 0, 0] = -5
    assert select(logits_with_foreground(range(8)), importance_map, grid=GRID, num_patches=3, policy="greedy").indices == (0, 1, 2)


@pytest.mark.parametrize(("least_share", "expected"), [(0.0, [0, 2, 1]), (0.1, [0, 2, 1]), (0.101, [0, 2]), (0.35, [0]), (0.7, [])])
def test_greedy_stops_where_the_next_patch_adds_less_than_the_share(least_share, expected):
    grid = CandidateGrid.covering((8, 8, 24), patch_size=(8, 8, 8), overlap=0.0, coarse_factor=(2, 2, 2))  # three candidates side by side
    mass = torch.zeros(4, 4, 12)
    mass[:, :, 1], mass[:, :, 5], mass[:, :, 9] = 6.0, 1.0, 3.0
    assert greedy_coverage(mass, torch.ones(3, dtype=torch.bool), grid=grid, num_patches=3, least_share=least_share) == expected


def test_auto_takes_the_patches_that_pay_and_no_background():
    logits, importance_map = logits_with_foreground(range(4)), torch.full((4, 4, 8), -20.0)
    importance_map[:, :, 0] = 0.0  # much to gain at the near end
    importance_map[:, :, 7] = -3.0  # and a little at the far end, which is background
    assert select(logits, importance_map, grid=GRID, num_patches="auto", policy="greedy").indices == (0,)
    assert len(select(logits, importance_map, grid=GRID, num_patches=None, policy="greedy").indices) == 3


def test_auto_of_a_volume_without_foreground_takes_no_patch():
    logits = torch.zeros(2, 4, 4, 8)
    logits[0] = 2000
    assert select(logits, torch.zeros(4, 4, 8), grid=GRID, num_patches="auto", policy="greedy").indices == ()


@pytest.mark.parametrize("policy", ["top_k", "greedy", "random"])
@pytest.mark.parametrize("num_patches", [2, 3, None])
def test_region_of_interest_leaves_out_candidates_that_do_not_meet_it(policy, num_patches):
    in_roi = torch.zeros(4, 4, 8, dtype=torch.bool)
    in_roi[1, 2, 4:6] = True  # full-resolution columns 8 to 12: candidates 1 (4..11) and 2 (8..15)
    chosen = select(logits_with_foreground(range(8)), torch.zeros(4, 4, 8), grid=GRID, num_patches=num_patches, policy=policy, in_roi=in_roi)
    assert sorted(chosen.indices) == [1, 2]


def test_region_of_interest_decides_what_is_covered_first():
    in_roi = torch.zeros(4, 4, 8, dtype=torch.bool)
    in_roi[:, :, 6:] = True
    logits, importance_map = torch.zeros(2, 4, 4, 8), torch.zeros(4, 4, 8)
    importance_map[:, :, :4] = 3
    for policy in ("top_k", "greedy"):
        assert select(logits, importance_map, grid=GRID, num_patches=1, policy=policy).indices == (0,)
        assert select(logits, importance_map, grid=GRID, num_patches=1, policy=policy, in_roi=in_roi).indices == (2,)


def test_focus_counts_only_inside_the_region_of_interest():
    logits = torch.zeros(3, 4, 4, 8)
    logits[1, :, :, :4] = 10
    logits[2, :, :, 4:] = 10
    logits[1, :, :, 7] = 20
    in_roi = torch.zeros(4, 4, 8, dtype=torch.bool)
    in_roi[:, :, 3:] = True
    for policy in ("top_k", "greedy"):
        assert select(logits, torch.zeros(4, 4, 8), grid=GRID, num_patches=1, policy=policy, focus_classes=(1,), in_roi=in_roi).indices[0] in (1, 2)
        assert 0 not in select(logits, torch.zeros(4, 4, 8), grid=GRID, num_patches=2, policy=policy, focus_classes=(1,), in_roi=in_roi).indices[:1]


def test_focus_prefers_candidates_with_the_structure():
    logits = torch.zeros(3, 4, 4, 8)
    logits[1, :, :, :4] = 10
    logits[2, :, :, 4:] = 10
    for policy in ("top_k", "greedy"):
        assert select(logits, torch.zeros(4, 4, 8), grid=GRID, num_patches=1, policy=policy, focus_classes=(2,)).indices == (2,)
        assert select(logits, torch.zeros(4, 4, 8), grid=GRID, num_patches=1, policy=policy, focus_classes=(1,)).indices == (0,)


def test_differentiable_top_k_draws_without_replacement_and_is_reproducible():
    importance = torch.linspace(-1, 1, 10)
    first = differentiable_top_k(importance, k=99, tau=0.5, generator=torch.Generator().manual_seed(3))
    second = differentiable_top_k(importance, k=99, tau=0.5, generator=torch.Generator().manual_seed(3))
    assert sorted(first[0]) == list(range(10)) and first[0] == second[0]
    assert torch.equal(first[1], second[1]) and first[1][-1] == 1  # the last one left has all the probability


def test_differentiable_top_k_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    generator = torch.Generator().manual_seed(0)
    draws = [differentiable_top_k(probabilities.log(), k=1, tau=1.0, generator=generator)[0][0] for _ in range(3000)]
    shares = torch.bincount(torch.tensor(draws), minlength=3) / 3000
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.03)  # 3 sigma of 3000 draws


def test_differentiable_top_k_gradient_raises_the_chosen():
    importance = torch.zeros(4, requires_grad=True)
    indices, soft_weights = differentiable_top_k(importance, k=1, tau=1.0, generator=torch.Generator().manual_seed(0))
    soft_weights.sum().backward()
    assert importance.grad[indices[0]] > 0 and (importance.grad.sum().abs() < 1e-6)


def test_candidate_importance_is_the_log_of_the_mean_gain():
    importance_map = torch.zeros(4, 4, 8)
    importance_map[0, 0, 3] = math.log(65)  # 64 more in candidates 0 and 1: means 2, 2, 1
    torch.testing.assert_close(candidate_importance(importance_map, grid=GRID), torch.tensor([2.0, 2.0, 1.0]).log())
    torch.testing.assert_close(candidate_importance(importance_map - 200, grid=GRID), torch.tensor([2.0, 2.0, 1.0]).log() - 200)


def test_candidate_importance_is_differentiable():
    importance_map = torch.zeros(4, 4, 8, requires_grad=True)
    candidate_importance(importance_map, grid=GRID)[1].backward()
    expected = torch.zeros(4, 4, 8)
    expected[:, :, 2:6] = 1 / 64
    torch.testing.assert_close(importance_map.grad, expected)
