"""What the nets are trained on: coarse targets in their places, classes that are present, patches of every class, gains of patches."""

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from test_train import LABELS, a_net, a_sample, a_volume, step_options  # noqa: E402

from NMSWSegment.data.training_sample import UNKNOWN_LABEL  # noqa: E402
from NMSWSegment.engine.aggregation import mixing_weights  # noqa: E402
from NMSWSegment.files import phantoms  # noqa: E402
from NMSWSegment.files.grid import CandidateGrid  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, LocalNet  # noqa: E402
from NMSWSegment.training import losses as losses_module  # noqa: E402
from NMSWSegment.training import step as step_module  # noqa: E402
from NMSWSegment.training.losses import DICE_SMOOTHING, class_shares, segmentation_loss, soft_segmentation_loss  # noqa: E402
from NMSWSegment.training.step import TrainingVolume, coarse_losses, patch_gains, training_losses  # noqa: E402

SHAPE = (48, 36, 60)  # multiples of every factor below


def asymmetric_labels() -> torch.Tensor:
    """Three ellipsoids, none of them symmetric in the volume; one is cut by its border."""
    return torch.from_numpy(phantoms.phantom(SHAPE, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE))[1])


def centroid(weights: torch.Tensor, *, factors) -> np.ndarray:
    """Center of mass of a coarser map in fine voxels; voxel i of a factor r covers r i to r i + r - 1."""
    places = [(np.arange(size) + 0.5) * factor - 0.5 for size, factor in zip(weights.shape, factors)]
    weights = weights.double().numpy()
    axes = [weights.sum(tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    return np.array([(axis * place).sum() / weights.sum() for axis, place in zip(axes, places)])


def shifts(shares: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """How far every foreground class of shares (C, d, h, w) lies from its labels, in fine voxels, (C - 1, 3)."""
    factors = [full / size for full, size in zip(labels.shape, shares.shape[1:])]
    return np.stack([centroid(shares[value], factors=factors) - centroid(labels == value, factors=(1, 1, 1)) for value in range(1, len(LABELS))])


@pytest.fixture
def targets(monkeypatch) -> list[torch.Tensor]:
    """The shares that a step hands to its losses."""
    seen = []

    def record(logits, shares):
        seen.append(shares)
        return soft_segmentation_loss(logits, shares)

    monkeypatch.setattr(step_module, "soft_segmentation_loss", record)
    return seen


@pytest.mark.parametrize("factors", [(2, 2, 2), (3, 3, 3), (4, 3, 3), (1, 2, 4)])
def test_coarse_targets_are_not_shifted(targets, factors):
    labels = asymmetric_labels()
    options = step_options(coarse_factor=factors, patch_size=(24, 12, 12), overlap=0.0, train="coarse")
    grid = CandidateGrid.covering(SHAPE, patch_size=options.patch_size, overlap=0.0, coarse_factor=factors)
    coarse_losses(a_net(), TrainingVolume(torch.rand(1, 1, *SHAPE), labels, grid, torch.Generator()), options=options)
    (shares,) = targets
    assert tuple(shares.shape[2:]) == tuple(size // factor for size, factor in zip(SHAPE, factors))
    assert np.abs(shifts(shares[0], labels)).max() < 0.1


def test_nearest_labels_would_be_shifted_by_half_a_voxel():
    # The mistake that shares replace: the tests above and below would see it.
    labels = asymmetric_labels()
    nearest = torch.nn.functional.interpolate(labels[None, None].float(), size=[size // 2 for size in SHAPE], mode="nearest-exact")[0, 0]
    shifted = shifts(torch.stack([nearest == value for value in range(len(LABELS))]), labels)
    np.testing.assert_allclose(np.median(shifted, axis=0), [-0.5] * 3, atol=0.1)


def test_targets_of_e2enets_deep_supervision_are_not_shifted(targets):
    labels = asymmetric_labels()[:32, :32, 10:58]
    torch.manual_seed(0)
    with torch.no_grad():
        deep = LocalNet(Architecture(num_classes=4, backbone="e2enet")).deep_logits(torch.rand(1, 1, *labels.shape))
    step_module._patch_loss(deep, labels[None])
    assert [tuple(shares.shape[2:]) for shares in targets] == [tuple(size // 2**depth for size in labels.shape) for depth in range(1, len(deep))]
    assert len(targets) >= 2
    assert np.abs(shifts(targets[0][0], labels)).max() < 0.1
    masks = torch.stack([labels == value for value in range(len(LABELS))]).float()
    for depth, shares in enumerate(targets, start=1):  # where a structure is hardly larger than a voxel its centroid says nothing
        torch.testing.assert_close(shares[0], torch.nn.functional.avg_pool3d(masks, 2**depth))


def test_shares_of_what_lies_beyond_the_labels_are_unknown():
    labels = torch.tensor([0, 1, 1, 255, 1], dtype=torch.uint8).reshape(1, 1, 1, 5)
    shares = class_shares(labels, factor=(1, 1, 3), shape=(1, 1, 2), num_classes=2)  # voxels 0 to 2; 3, 4 and one beyond
    torch.testing.assert_close(shares[0, :, 0, 0], torch.tensor([[1 / 3, 0], [2 / 3, 1 / 3]]))


def test_loss_of_shares_that_are_labels_is_the_loss_of_the_labels():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(2, 4, 3, 5, 4, generator=generator), torch.randint(4, (2, 3, 5, 4), generator=generator)
    labels[:, 1, 2:] = UNKNOWN_LABEL
    shares = class_shares(labels, factor=(1, 1, 1), shape=(3, 5, 4), num_classes=4)
    torch.testing.assert_close(soft_segmentation_loss(logits, shares), segmentation_loss(logits, labels))


def plain_loss(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The loss by its formula, for autograd: 0.8 (1 - mean Dice of present classes) + 0.2 cross-entropy per known voxel."""
    log_probability = torch.log_softmax(logits, dim=1)
    axes = [0, *range(2, logits.dim())]
    predicted, overlap, present = (v.sum(axes) for v in (log_probability.exp() * shares.sum(1, keepdim=True), log_probability.exp() * shares, shares))
    dice = ((2 * overlap + DICE_SMOOTHING) / (predicted + present + DICE_SMOOTHING))[1:][present[1:] > 0]
    return 0.8 * (1 - dice).mean() - 0.2 * (log_probability * shares).sum() / shares.sum()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("block_voxels", [7, 2**13])  # blocks that end inside a row, and one for all
def test_gradient_of_the_loss_is_that_of_its_formula(memory_format, block_voxels, monkeypatch):
    monkeypatch.setattr(losses_module, "BLOCK_VOXELS", block_voxels)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 3, 5, 4, generator=generator, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    labels = torch.randint(3, (2, 3, 5, 4), generator=generator)  # class 3 is not there
    labels[:, 1, 2:] = UNKNOWN_LABEL
    shares = class_shares(labels, factor=(1, 1, 1), shape=(3, 5, 4), num_classes=4).double()
    mixed = 0.7 * shares + 0.3 * shares.roll(1, dims=1)
    for found, wanted in (
        (segmentation_loss(logits, labels), plain_loss(logits, shares)),
        (soft_segmentation_loss(logits, mixed), plain_loss(logits, mixed)),
        (3 * segmentation_loss(logits, labels) ** 2, 3 * plain_loss(logits, shares) ** 2),
    ):
        torch.testing.assert_close(found, wanted)
        (gradient,), (wanted_gradient,) = torch.autograd.grad(found, logits), torch.autograd.grad(wanted, logits)
        torch.testing.assert_close(gradient, wanted_gradient)


def test_loss_of_bf16_logits_has_a_gradient_in_bf16_near_the_exact_one():
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(1, 25, 8, 8, 8, generator=generator).bfloat16().float().requires_grad_()
    labels = torch.randint(25, (1, 8, 8, 8), generator=generator)
    coarse = exact.detach().bfloat16().requires_grad_()
    for logits in (exact, coarse):
        segmentation_loss(logits, labels).backward()
    assert coarse.grad.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.grad.float(), exact.grad, rtol=0.01, atol=1e-8)


def test_patches_of_the_local_net_show_small_classes_as_often_as_large_ones():
    labels = torch.zeros(40, 40, 40, dtype=torch.uint8)
    labels[8:32, 8:32, 8:20], labels[20, 20, 30], labels[8, 8, 30:32] = 1, 2, UNKNOWN_LABEL  # 6912 voxels and one
    boxes = step_module.random_boxes(labels, count=900, patch_size=(8, 8, 8), generator=torch.Generator().manual_seed(0))
    centers = torch.tensor([[where.start + 4 for where in box] for box in boxes])
    found = torch.bincount(labels[tuple(centers.T)].long(), minlength=256) / 900
    inside = ((centers > 4) & (centers < 36)).all(1).float().mean()
    assert abs(float(found[1]) - 1 / 3) < 0.05 and abs(float(found[2]) - 1 / 3) < 0.05 and inside > 0.7
    assert all(0 <= where.start and where.stop <= 40 for box in boxes for where in box)


@pytest.fixture
def drawn(monkeypatch):
    """Run a step whose coarse net shows foreground in the last two of four candidates, and is most drawn to the first; the candidates it took."""
    net = a_net()

    def run(seed: int, **changes) -> list[int]:
        options = step_options(patch_size=(16, 16, 16), overlap=0.0, coarse_factor=(2, 2, 2), estimator="gain", **changes)
        grid = CandidateGrid.covering((16, 16, 64), patch_size=(16, 16, 16), overlap=0.0, coarse_factor=(2, 2, 2))
        x = torch.arange(4.0).repeat_interleave(16).expand(1, 1, 16, 16, 64)  # every voxel knows its candidate
        logits, importance_map, taken = torch.zeros(1, 4, 8, 8, 32), torch.zeros(1, 1, 8, 8, 32), []
        logits[:, 0, ..., :16], logits[:, 1, ..., 16:] = 20, 20
        importance_map[..., :8] = 50

        def local(net, crops, parts, options):
            taken.extend(int(value) for value in crops[:, 0, 0, 0, 0])
            return (torch.zeros(len(crops), 4, 16, 16, 16, requires_grad=True),)

        monkeypatch.setattr(step_module, "_run_coarse", lambda *_, **__: (logits, importance_map))
        monkeypatch.setattr(step_module, "_run_local", local)
        labels = torch.ones(16, 16, 64, dtype=torch.uint8)
        losses = training_losses(net, x, labels, grid=grid, options=options, tau=1.0, generator=torch.Generator().manual_seed(seed))
        assert torch.isfinite(losses.total) and float(losses.entropy) <= np.log(2) + 1e-5
        return taken

    return run


def test_background_is_never_drawn_however_important(drawn):
    first = [drawn(seed, top_k_patches=1, random_patches=0) for seed in range(12)]
    assert {tuple(indices) for indices in first} == {(2,), (3,)}
    assert sorted(drawn(0, top_k_patches=3, random_patches=2)) == [2, 3]  # no more than there are


def test_random_patch_is_one_that_shows_foreground_and_is_not_drawn_yet(drawn):
    pairs = [tuple(drawn(seed, top_k_patches=1, random_patches=1)) for seed in range(12)]
    assert set(pairs) == {(2, 3), (3, 2)}
    assert {tuple(drawn(seed, top_k_patches=0, random_patches=1)) for seed in range(12)} == {(2,), (3,)}


def test_random_patch_takes_no_part_in_y_high(monkeypatch):
    seen = []
    monkeypatch.setattr(step_module, "_high_on_patches", lambda *_, **facts: seen.append(facts["indices"]) or _stop())
    volume = a_volume(step_options())
    with pytest.raises(KeyboardInterrupt):
        training_losses(a_net(), volume.x, volume.labels, grid=volume.grid, options=step_options(), tau=1.0, generator=volume.generator)
    assert len(seen[0]) == 2  # top_k_patches; random_patches is 1


def _stop():
    raise KeyboardInterrupt


def test_patch_gains_are_the_first_order_change_of_the_mean_dice():
    generator = torch.Generator().manual_seed(2)
    grid = CandidateGrid.covering((8, 8, 16), patch_size=(8, 8, 8), overlap=0.5)
    labels = torch.randint(3, grid.padded_shape, generator=generator, dtype=torch.uint8)
    labels[2:4, :, 5:9], labels[labels == 2] = UNKNOWN_LABEL, 0  # a class that is predicted but not present
    labels[5:, 5:, 11:] = 2
    labels = labels[: grid.padded_shape[0]]
    coarse = torch.randn(3, *grid.padded_shape, generator=generator)  # the coarse grid is the fine one: sums are exact
    patches, weights = 2 * torch.randn(3, 3, 8, 8, 8, generator=generator), torch.tensor([0.3, -0.5, 2.0])
    indices = [2, 0, 1]
    shares = class_shares(labels[None], factor=(1, 1, 1), shape=grid.coarse_shape, num_classes=3)[0]
    patch_labels = torch.stack([labels[grid.slices(index)] for index in indices])
    found = patch_gains(coarse, patches, patch_labels, shares=shares, indices=indices, grid=grid, class_weights=weights)

    steps = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    before, a = coarse.double(), mixing_weights(weights)[:, None, None, None].double()
    probabilities = torch.softmax(before, dim=0)
    for step, index, logits in zip(steps, indices, patches.double()):
        box = (slice(None), *grid.slices(index))
        moved = torch.zeros_like(probabilities)
        moved[box] = torch.softmax(a * logits + (1 - a) * before[box], dim=0) - torch.softmax(before[box], dim=0)
        probabilities = probabilities + step * moved
    known = labels != UNKNOWN_LABEL
    dice = []
    for value in (1, 2):
        p, t = probabilities[value][known], (labels[known] == value).double()
        dice.append(2 * (p * t).sum() / (p.sum() + t.sum() + DICE_SMOOTHING))
    (expected,) = torch.autograd.grad(torch.stack(dice).mean(), steps)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    assert float(expected.abs().min()) > 1e-4


def test_phantom_sample_shows_all_classes():
    assert set(a_sample().labels.unique().tolist()) == {0, 1, 2, 3}  # what the tests above rest on
