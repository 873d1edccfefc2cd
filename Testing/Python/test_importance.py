"""The importance on a task with a known answer: only patches on fine stripes improve the coarse result.

A smooth organ looks the same on the coarse grid; stripes average out there; a coin decides the label of the third structure, whatever net looks at it. The coarse
net is as unsure of the third one as of the stripes, so that its entropy says nothing about where a patch pays. Both nets are given in closed
form, the importance head alone is trained.
"""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("monai")

from NMSWSegment.data.training_sample import TrainingSample  # noqa: E402
from NMSWSegment.engine.resampling import coarse_input  # noqa: E402
from NMSWSegment.engine.selection import candidate_importance, shows_foreground  # noqa: E402
from NMSWSegment.nets.backbones import NUM_FEATURES  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet  # noqa: E402
from NMSWSegment.training.options import TrainOptions  # noqa: E402
from NMSWSegment.training.step import TrainingVolume, _run_coarse, prepare, trained_parameters, volume_losses  # noqa: E402

SMOOTH, STRIPED, COIN = 1, 2, 3
SIDE = 48
HU = {"nothing": 0.0, "coin": 250.0, "dark stripe": 400.0, "stripes, averaged": 600.0, "bright stripe": 800.0, "smooth": 1000.0}
WINDOW = ((0.0, 0.0), (1000.0, 1.0))
FACTOR = 4
COARSE_ANSWERS = {"nothing": (0,), "coin": (0, COIN), "stripes, averaged": (0, STRIPED), "smooth": (SMOOTH,)}
LOCAL_ANSWERS = {"nothing": (0,), "coin": (0, COIN), "dark stripe": (0,), "bright stripe": (STRIPED,), "smooth": (SMOOTH,)}


class Levels(nn.Module):
    """One feature per intensity level, 1 where a voxel has it."""

    def __init__(self, names) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor([HU[name] / 1000 for name in names])[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        features = torch.exp(-(((x - self.levels) / 0.06) ** 2))
        return torch.cat([features, features.new_zeros(len(x), NUM_FEATURES["compact"] - len(self.levels), *x.shape[2:])], dim=1)


def set_head(head: nn.Conv3d, answers: dict[str, tuple[int, ...]]) -> None:
    """Level -> equal probabilities of its classes."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    for column, classes in enumerate(answers.values()):
        head.weight.data[list(classes), column] = 8.0


def a_net() -> NMSWNet:
    """Both nets in closed form, the importance head new."""
    torch.manual_seed(0)
    net = NMSWNet(Architecture(num_classes=4))
    net.coarse.backbone, net.local.backbone = Levels(COARSE_ANSWERS), Levels(LOCAL_ANSWERS)
    set_head(net.coarse.head, COARSE_ANSWERS)
    set_head(net.local.head, LOCAL_ANSWERS)
    return net


def a_sample(seed: int) -> TrainingSample:
    """Two boxes of each structure, 8 to 16 voxels wide, under noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SIDE,) * 3
    intensity, labels = torch.zeros(shape), torch.zeros(shape, dtype=torch.uint8)
    coins = torch.rand(shape, generator=generator) < 0.5
    stripes = (torch.arange(SIDE) % 2 == 1).expand(shape)
    for structure in (SMOOTH, STRIPED, COIN) * 2:
        sizes = torch.randint(2, 5, (3,), generator=generator) * FACTOR
        starts = [int(torch.randint((SIDE - size) // FACTOR + 1, (), generator=generator)) * FACTOR for size in sizes.tolist()]
        box = tuple(slice(start, start + size) for start, size in zip(starts, sizes.tolist()))
        if structure == SMOOTH:
            intensity[box], labels[box] = HU["smooth"], SMOOTH
        elif structure == STRIPED:
            intensity[box] = torch.where(stripes[box], HU["bright stripe"], HU["dark stripe"])
            labels[box] = stripes[box].to(torch.uint8) * STRIPED
        else:
            intensity[box], labels[box] = HU["coin"], coins[box].to(torch.uint8) * COIN
    return TrainingSample("toy", intensity + 20 * torch.randn(shape, generator=generator), labels)


def options(estimator: str) -> TrainOptions:
    return TrainOptions(
        data=("decathlon:nowhere",),
        train="importance",
        initial_run="given",
        estimator=estimator,
        patch_size=(16, 16, 16),
        overlap=0.0,
        coarse_factor=(FACTOR,) * 3,
        intensity_points=WINDOW,
        top_k_patches=3,
        random_patches=1,
    )


@torch.no_grad()
def area_under_curve(net: NMSWNet, *, seeds: range) -> float:
    """How often a foreground candidate with stripes is more important than one without, pooled over volumes of their own."""
    wins = pairs = 0.0
    for seed in seeds:
        x, labels, grid = prepare(a_sample(seed), options("gain"))
        logits, importance_map = _run_coarse(net, coarse_input(x, grid=grid), options("gain"))
        importance = candidate_importance(importance_map[0, 0], grid=grid)
        shown = shows_foreground(1 - logits[0].exp()[0], grid=grid)
        has_stripes = torch.tensor([bool((labels[grid.slices(index)] == STRIPED).any()) for index in range(grid.num_candidates)])
        with_stripes, without = importance[shown & has_stripes], importance[shown & ~has_stripes]
        difference = with_stripes[:, None] - without[None]
        wins += float((difference > 0).float().sum() + (difference == 0).float().sum() / 2)
        pairs += difference.numel()
    return wins / pairs


def trained_net(estimator: str, *, steps: int, seed: int = 0) -> NMSWNet:
    """The importance head after some steps on one volume each."""
    net, settings = a_net(), options(estimator)
    optimizer = torch.optim.AdamW(trained_parameters(net, settings), lr=1e-2)
    for step in range(steps):
        number = 1000 * (seed + 1) + step
        volume = TrainingVolume(*prepare(a_sample(number), settings), torch.Generator().manual_seed(number))
        losses = volume_losses(net, volume, options=settings, tau=1.0)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    return net


def test_importance_finds_the_structure_that_needs_patches():
    untrained, trained = (area_under_curve(net, seeds=range(4)) for net in (a_net(), trained_net("gain", steps=12)))
    assert untrained < 0.8
    assert trained >= 0.9


if __name__ == "__main__":  # the figures of docs/deviations.md, D3
    print(f"untrained (entropy)  {area_under_curve(a_net(), seeds=range(20)):.3f}")
    for estimator in ("gain", "gate"):
        for steps in (12, 40):
            found = [area_under_curve(trained_net(estimator, steps=steps, seed=seed), seeds=range(20)) for seed in range(2)]
            print(f"{estimator:6} {steps:4} steps  {'  '.join(f'{value:.3f}' for value in found)}", flush=True)
