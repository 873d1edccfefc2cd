"""Sparse feature fusion: masks hold through training, move as scheduled, and a resumed run goes on as if nothing had happened."""

import pytest
import torch

from NMSWSegment.nets.e2enet import E2ENet, fusion_convolutions, input_axis, without_unused_channels
from NMSWSegment.protocol import UserError
from NMSWSegment.training.sparse import LEAST_CHANNELS, FusionSparsity, SparsityOptions, replaced_share

CHANNELS = (6, 8, 10)
KINDS = ("channel", "kernel")


class TinyRun:
    """A few optimizer steps on noise; everything depends on the seed and the iteration alone."""

    def __init__(self, kind: str, *, sparsity: float = 0.6, update_every: int = 2, iterations: int = 8) -> None:
        torch.manual_seed(0)
        self.net = E2ENet(out_channels=2, channels=CHANNELS)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2, weight_decay=1e-2)
        options = SparsityOptions(iterations=iterations, sparsity=sparsity, kind=kind, update_every=update_every, zeta_end=0.2)
        self.sparsity = FusionSparsity(self.net, self.optimizer, options=options, seed=3)

    def train(self, first: int, last: int) -> None:
        """Iterations first .. last, counted from 1."""
        for iteration in range(first, last + 1):
            x = torch.rand(1, 1, 8, 4, 12, generator=torch.Generator().manual_seed(iteration))
            self.optimizer.zero_grad()
            sum(logits.square().mean() for logits in self.net.deep_logits(x)).backward()
            self.optimizer.step()
            self.sparsity.step(iteration)

    def state(self) -> dict:
        """What a checkpoint holds, as copies."""
        return {
            "net": {key: value.clone() for key, value in self.net.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "sparsity": self.sparsity.state_dict(),
        }


def expanded(mask: torch.Tensor, conv: torch.nn.Module) -> torch.Tensor:
    """A mask over the axes (out, in) of a weight, whichever is which there."""
    axis = input_axis(conv)
    out_in = mask if mask.ndim == 2 else mask.expand(conv.weight.shape[1 - axis], -1)
    return (out_in if axis == 1 else out_in.T)[..., None, None, None].expand_as(conv.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_each_convolution_has_the_wanted_share_of_active_inputs(kind):
    run = TinyRun(kind, sparsity=0.75)
    for name, conv in fusion_convolutions(run.net).items():
        out_channels, in_channels = conv.weight.shape[1 - input_axis(conv)], conv.weight.shape[input_axis(conv)]
        mask = run.sparsity.masks[name]
        assert mask.shape == ((out_channels, in_channels) if kind == "kernel" else (in_channels,))
        least = LEAST_CHANNELS if kind == "channel" else 1
        assert int(mask.sum()) == max(least, round(0.25 * mask.numel()))
        assert torch.equal(conv.weight != 0, expanded(mask, conv))  # masked weights are 0 from the start, the others are not
    if kind == "kernel":
        assert run.sparsity.density == pytest.approx(0.25, abs=0.03)


def test_finest_level_of_a_very_sparse_net_is_not_starved():
    run = TinyRun("channel", sparsity=0.9)
    kept = {name: int(mask.sum()) for name, mask in run.sparsity.masks.items()}
    assert set(kept.values()) == {LEAST_CHANNELS}  # a tenth of 6 to 28 inputs would be one to three
    run.train(1, 4)
    assert {name: int(mask.sum()) for name, mask in run.sparsity.masks.items()} == kept


@pytest.mark.parametrize("kind", KINDS)
def test_masked_weights_and_their_moments_stay_zero_through_training(kind):
    run = TinyRun(kind)
    run.train(1, 5)
    for name, conv in fusion_convolutions(run.net).items():
        mask, moments = expanded(run.sparsity.masks[name], conv), run.optimizer.state[conv.weight]
        for values in (conv.weight, moments["exp_avg"], moments["exp_avg_sq"]):
            assert values[~mask].count_nonzero() == 0 and values[mask].count_nonzero() > 0
    untouched = run.net.encoder[1][0].conv.weight
    assert untouched.count_nonzero() == untouched.numel()


def test_masks_move_at_their_iterations_only_and_keep_their_size():
    run = TinyRun("kernel", update_every=3, iterations=9)
    before = run.sparsity.state_dict()["masks"]
    run.train(1, 2)
    assert all(torch.equal(run.sparsity.masks[name], mask) for name, mask in before.items())
    run.train(3, 3)
    assert all(int(run.sparsity.masks[name].sum()) == int(mask.sum()) for name, mask in before.items())
    assert any(not torch.equal(run.sparsity.masks[name], mask) for name, mask in before.items())
    run.train(4, 8)
    before = run.sparsity.state_dict()["masks"]
    run.train(9, 9)  # the end of the run: what would grow now could learn nothing
    assert all(torch.equal(run.sparsity.masks[name], mask) for name, mask in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_weakest_are_pruned_and_what_grows_starts_at_zero(kind):
    run = TinyRun(kind, sparsity=0.5, update_every=1, iterations=4)
    name, conv = next((name, conv) for name, conv in fusion_convolutions(run.net).items() if name.endswith("convs.0"))
    mask = run.sparsity.masks[name].clone()
    strengths = conv.weight.detach().abs().sum((2, 3, 4) if kind == "kernel" else (0, 2, 3, 4))
    num_pruned = int(replaced_share(1, options=run.sparsity.options) * int(mask.sum()))
    weakest = strengths.masked_fill(~mask, float("inf")).flatten().argsort()[:num_pruned]
    before = conv.weight.detach().clone()
    run.sparsity.step(1)
    after, kept = run.sparsity.masks[name], mask.clone()
    kept.view(-1)[weakest] = False
    assert num_pruned > 0 and bool((after & kept).equal(kept))  # all but the weakest are still there
    assert torch.equal(conv.weight, before * expanded(kept, conv))  # unchanged; what was pruned and what is new is 0
    assert int((after & ~kept).sum()) == num_pruned


@pytest.mark.parametrize(("iteration", "share"), [(0, 0.5), (50, 0.2505), (100, 0.001), (25, 0.001 + 0.2495 * (1 + 2**-0.5))])
def test_share_that_is_replaced_falls_along_a_cosine(iteration, share):
    assert replaced_share(iteration, options=SparsityOptions(iterations=100)) == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_an_uninterrupted_one(kind):
    straight, first = TinyRun(kind), TinyRun(kind)
    straight.train(1, 7)
    first.train(1, 3)
    state = first.state()
    torch.manual_seed(99)
    resumed = TinyRun(kind)
    resumed.net.load_state_dict(state["net"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.sparsity.load_state_dict(state["sparsity"])
    resumed.train(4, 7)
    assert all(torch.equal(value, resumed.net.state_dict()[key]) for key, value in straight.net.state_dict().items())
    assert all(torch.equal(mask, resumed.sparsity.masks[name]) for name, mask in straight.sparsity.masks.items())


def test_state_is_a_copy_and_fits_a_checkpoint(tmp_path):
    run = TinyRun("channel")
    state = run.sparsity.state_dict()
    torch.save(state, tmp_path / "state.pt")
    run.train(1, 2)
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(stored["masks"][name], mask) for name, mask in state["masks"].items())
    assert any(not torch.equal(run.sparsity.masks[name], mask) for name, mask in state["masks"].items())


def test_two_processes_with_the_same_seed_have_the_same_masks():
    first, second = TinyRun("channel"), TinyRun("channel")
    first.train(1, 4)
    second.train(1, 4)
    assert all(torch.equal(mask, second.sparsity.masks[name]) for name, mask in first.sparsity.masks.items())


def test_channel_masks_are_sliced_at_export_and_kernel_masks_are_not():
    for kind, is_sliced in (("channel", True), ("kernel", False)):
        run = TinyRun(kind, sparsity=0.3)  # so that a tiny kernel mask empties no channel by chance
        run.train(1, 3)
        exported = without_unused_channels(run.net.eval())
        assert bool(exported.fusion_channels) == is_sliced
        x = torch.rand(1, 1, 8, 4, 12)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), run.net(x), rtol=1e-4, atol=1e-5)  # sums in another order


def test_state_of_another_kind_says_to_resume_with_the_same_options():
    with pytest.raises(UserError, match="Resume with the options that the run was started with"):
        TinyRun("channel").sparsity.load_state_dict(TinyRun("kernel").sparsity.state_dict())


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        ({"kind": "channels"}, "Did you mean 'channel'"),
        ({"sparsity": 1.0}, "for example 0.8"),
        ({"sparsity": 0.0}, "train without masks"),
        ({"update_every": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_say_what_does(values, fix):
    with pytest.raises(UserError, match=fix):
        SparsityOptions(**({"iterations": 5} | values))
