"""The losses of Eq. 7 against MONAI, by hand, and with unknown voxels."""

import math

import pytest
import torch

from NMSWSegment.data.training_sample import UNKNOWN_LABEL
from NMSWSegment.training import losses as losses_module
from NMSWSegment.training.losses import CROSS_ENTROPY_WEIGHT, DICE_SMOOTHING, DICE_WEIGHT, entropy, ranking_loss, segmentation_loss

CLASSES = 4


def a_case(seed=0, *, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, classes, 3, 5, 4, generator=generator)
    labels = torch.randint(classes, (2, 3, 5, 4), generator=generator, dtype=torch.uint8)
    return logits, labels


@pytest.mark.parametrize("classes", [2, 4, 7])
@pytest.mark.parametrize("absent", [False, True])
def test_loss_without_unknown_voxels_equals_monai(classes, absent):
    losses = pytest.importorskip("monai.losses")
    logits, labels = a_case(classes, classes=classes)
    if absent:
        labels[labels == classes - 1] = 0
    smoothing = {"smooth_nr": DICE_SMOOTHING, "smooth_dr": DICE_SMOOTHING}
    dice_loss = losses.DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True, reduction="none", **smoothing)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    present = [value - 1 for value in labels.unique().tolist() if value > 0]  # the mean is over these, unlike MONAI's
    dice = dice_loss(theirs, labels[:, None].long()).flatten()[present].sum() / max(len(present), 1)
    cross_entropy = torch.nn.functional.cross_entropy(theirs, labels.long())
    found, expected = segmentation_loss(ours, labels), DICE_WEIGHT * dice + CROSS_ENTROPY_WEIGHT * cross_entropy
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)  # gradients of sums in another order


def test_loss_of_three_voxels_by_hand():
    probabilities = torch.tensor([[0.5, 0.25, 0.2], [0.5, 0.75, 0.8]])  # (C, voxels)
    labels = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
    dice = 2 * (0.75 + 0.8) / (0.5 + 0.75 + 0.8 + 2)
    cross_entropy = -(math.log(0.5) + math.log(0.75) + math.log(0.8)) / 3
    found = segmentation_loss(probabilities.log()[None], labels)
    assert float(found) == pytest.approx(0.8 * (1 - dice) + 0.2 * cross_entropy, rel=1e-5)


def test_dice_of_classes_that_are_not_there_does_not_dilute_that_of_those_that_are():
    probabilities = torch.tensor([[0.4, 0.2, 0.2], [0.5, 0.7, 0.7], [0.1, 0.1, 0.1]])  # class 2 is nowhere
    labels = torch.tensor([[0, 1, 1]], dtype=torch.uint8)
    dice = 2 * (0.7 + 0.7) / (0.5 + 0.7 + 0.7 + 2)
    cross_entropy = -(math.log(0.4) + 2 * math.log(0.7)) / 3
    assert float(segmentation_loss(probabilities.log()[None], labels)) == pytest.approx(0.8 * (1 - dice) + 0.2 * cross_entropy, rel=1e-5)
    more = torch.cat([probabilities, torch.full((20, 3), 1e-9)])  # as if the list had twenty classes more
    assert float(segmentation_loss(more.log()[None], labels)) == pytest.approx(0.8 * (1 - dice) + 0.2 * cross_entropy, rel=1e-5)


def test_volume_of_background_alone_costs_cross_entropy_alone():
    probabilities = torch.tensor([[0.5, 0.25], [0.5, 0.75]])
    found = segmentation_loss(probabilities.log()[None], torch.zeros(1, 2, dtype=torch.uint8))
    assert float(found) == pytest.approx(-0.2 * (math.log(0.5) + math.log(0.25)) / 2, rel=1e-5)


def test_ranking_loss_by_hand():
    importance, gain = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([3.0, 1.0, -5.0])
    assert float(ranking_loss(importance, gain)) == pytest.approx(-(0.75 * math.log(0.5) + 0.25 * math.log(0.3)), rel=1e-5)
    assert float(ranking_loss(importance, -gain.abs())) == 0  # nothing gains, nothing to learn


def test_ranking_loss_is_least_where_importance_is_the_share_of_the_gain():
    importance = torch.zeros(3, requires_grad=True)
    ranking_loss(importance, torch.tensor([2.0, 1.0, 1.0])).backward()
    torch.testing.assert_close(importance.grad, torch.tensor([1 / 3 - 1 / 2, 1 / 3 - 1 / 4, 1 / 3 - 1 / 4]))
    assert float(entropy(torch.tensor([0.5, 0.25, 0.25]).log())) == pytest.approx(
        float(ranking_loss(torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([2.0, 1, 1])))
    )


@pytest.mark.parametrize("value", [-50.0, 0.0, 50.0])
def test_unknown_voxels_change_nothing_whatever_the_logits_there(value):
    logits, labels = a_case()
    labels[:, 1:, :2] = UNKNOWN_LABEL
    expected = segmentation_loss(logits, labels)
    changed = logits.clone()
    changed[:, 2, 1:, :2] = value
    assert torch.equal(segmentation_loss(changed, labels), expected)


def test_unknown_voxels_get_no_gradient_and_known_ones_do():
    logits, labels = a_case()
    labels[:, 1:, :2] = UNKNOWN_LABEL
    logits.requires_grad_()
    segmentation_loss(logits, labels).backward()
    is_unknown = (labels == UNKNOWN_LABEL)[:, None].expand_as(logits)
    assert (logits.grad[is_unknown] == 0).all() and (logits.grad[~is_unknown] != 0).all()


def test_unknown_voxels_count_as_if_cut_away():
    logits, labels = a_case()
    labels[:, :, :, 3] = UNKNOWN_LABEL
    torch.testing.assert_close(segmentation_loss(logits, labels), segmentation_loss(logits[..., :3], labels[..., :3]), rtol=1e-6, atol=1e-7)


def test_masked_voxels_count_like_unknown_ones():
    logits, labels = a_case()
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    expected = segmentation_loss(logits, labels.masked_fill(~mask, UNKNOWN_LABEL))
    assert torch.equal(segmentation_loss(logits, labels, mask=mask), expected)
    assert not torch.equal(segmentation_loss(logits, labels), expected)


def test_nothing_known_gives_zero_with_zero_gradient():
    logits, labels = a_case()
    logits.requires_grad_()
    found = segmentation_loss(logits, torch.full_like(labels, UNKNOWN_LABEL))
    found.backward()
    assert float(found.detach()) == 0 and (logits.grad == 0).all()


def test_loss_of_half_precision_logits_is_computed_in_float32():
    logits, labels = a_case()
    rounded = logits.bfloat16()
    assert torch.equal(segmentation_loss(rounded, labels), segmentation_loss(rounded.float(), labels))


def test_sums_do_not_stop_growing_where_all_voxels_are_one_block():
    num_voxels = 2**24 + 2**12
    _, overlap, present, _ = losses_module._Labels(torch.zeros(num_voxels, dtype=torch.uint8)).sums(torch.zeros(num_voxels, 1), slice(0, num_voxels))
    assert overlap.tolist() == present.tolist() == [num_voxels]


def test_blocks_of_a_gpu_are_short_enough_for_float32_sums():
    blocks = losses_module._blocks(2**24 + 5, device=torch.device("cuda"))
    assert [index for block in blocks for index in (block.start, block.stop)][1:-1:2] == [block.start for block in blocks[1:]]
    assert blocks[-1].stop >= 2**24 + 5 and max(block.stop - block.start for block in blocks) <= 2**20


@pytest.mark.parametrize("block_voxels", [7, 60, 10**6])
def test_loss_and_gradient_do_not_depend_on_the_blocks(monkeypatch, block_voxels):
    logits, labels = a_case()
    expected, found = (logits.clone().requires_grad_() for _ in range(2))
    segmentation_loss(expected, labels).backward()
    monkeypatch.setattr(losses_module, "BLOCK_VOXELS", block_voxels)
    segmentation_loss(found, labels).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_entropy_by_hand():
    pi = torch.tensor([0.5, 0.25, 0.25])
    assert float(entropy(pi.log() + 3)) == pytest.approx(1.5 * math.log(2), rel=1e-6)  # adding a constant changes no softmax


def test_entropy_of_equal_and_of_certain_candidates():
    assert float(entropy(torch.zeros(7))) == pytest.approx(math.log(7), rel=1e-6)
    assert float(entropy(torch.tensor([200.0, 0.0, 0.0]))) == 0
