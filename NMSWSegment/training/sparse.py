"""Dynamic sparse feature fusion: the fusion convolutions of E2ENet train with a mask that keeps moving (arXiv 2312.04727).

    after every optimizer step            W <- W * M, and the same to the optimizer's moments
    every `update_every` iterations       prune the share zeta_t of what is active, smallest L1 first;
                                          regrow as much at random, new weights 0
    zeta_t = zeta_T + (zeta_0 - zeta_T) / 2 * (1 + cos(pi t / T))

Kind "kernel" masks single (out, in) kernels, as published; kind "channel" masks whole input channels (D14), which the export
leaves out, so that the saving is real.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from NMSWSegment.nets.e2enet import E2ENet, fusion_convolutions, input_axis
from NMSWSegment.protocol import UserError, unknown_name

MASK_KINDS = ("channel", "kernel")
LEAST_CHANNELS = 4
"""Input channels that every masked convolution keeps: of the 16 of the finest level S = 0.9 would leave one or two."""
SPARSITIES = (0.7, 0.8, 0.9)
"""S of the published nets."""


@dataclass(frozen=True)
class SparsityOptions:
    """How the fusion convolutions are sparsified."""

    iterations: int
    """T: optimizer steps of the whole run."""
    sparsity: float = 0.8
    """S: share of each fusion convolution that is masked; the paper has 0.7, 0.8 and 0.9."""
    kind: str = "channel"
    """channel or kernel."""
    update_every: int = 1200
    """Optimizer steps between two changes of the masks."""
    zeta_start: float = 0.5
    """Share of the active weights that the first change replaces."""
    zeta_end: float = 0.001

    def __post_init__(self) -> None:
        if self.kind not in MASK_KINDS:
            raise UserError(unknown_name("mask kind", self.kind, MASK_KINDS))
        if not 0 < self.sparsity < 1:
            raise UserError(
                f"The sparsity is {self.sparsity:g}. It is the share of weights to leave out: use more than 0 and less than 1, for example 0.8, or train without masks."
            )
        if self.iterations < 1 or self.update_every < 1:
            raise UserError("The iterations of the run and between two changes of the masks must be at least 1.")


class FusionSparsity:
    """The masks of a net's fusion convolutions. Every process that trains the same net with the same seed has the same masks.

    Build it before the weights of a checkpoint are loaded, because its first masks are random and take effect at once; then
    load_state_dict brings back those of the checkpoint.

    Args:
        net: its fusion weights are masked.
        optimizer: of the net; its moments are masked with the weights.
        seed: of the first masks and of what grows again.
    """

    def __init__(self, net: E2ENet, optimizer: torch.optim.Optimizer, *, options: SparsityOptions, seed: int = 0) -> None:
        self.options = options
        self._optimizer = optimizer
        self._generator = torch.Generator().manual_seed(seed)
        self._convs = fusion_convolutions(net)
        self.masks = {name: self._first_mask(conv) for name, conv in self._convs.items()}
        self._apply()

    @property
    def density(self) -> float:
        """Share of the fusion weights that is active."""
        active = sum(float(mask.float().mean()) * self._convs[name].weight.numel() for name, mask in self.masks.items())
        return active / sum(conv.weight.numel() for conv in self._convs.values())

    def step(self, iteration: int) -> None:
        """To be called after every optimizer step.

        Args:
            iteration: number of optimizer steps so far, from 1 on.
        """
        self._apply()
        if iteration % self.options.update_every == 0 and iteration < self.options.iterations:
            for name, conv in self._convs.items():
                self.masks[name] = self._moved(self.masks[name], conv, share=replaced_share(iteration, options=self.options))
            self._apply()

    def state_dict(self) -> dict:
        """Masks and generator, on the CPU: what a resumed run needs."""
        return {"kind": self.options.kind, "masks": {name: mask.clone() for name, mask in self.masks.items()}, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Go on where state_dict was taken.

        Raises:
            UserError: the state belongs to another net or another kind of mask.
        """
        shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in (self.masks, state["masks"])]
        if state["kind"] != self.options.kind or shapes[0] != shapes[1]:
            raise UserError("The masks of the checkpoint belong to another net or kind of mask. Resume with the options that the run was started with.")
        self.masks = {name: state["masks"][name].clone() for name in self.masks}
        self._generator.set_state(state["generator"])
        self._apply()

    def take_masks(self, net: E2ENet) -> None:
        """Keep what has weights in a net of the same size, which was sparse before: its density holds from now on."""
        self.masks = {name: _strengths(conv, kind=self.options.kind) > 0 for name, conv in fusion_convolutions(net).items()}
        self._apply()

    def _first_mask(self, conv: nn.Module) -> Tensor:
        """A random mask of the wanted density, at least one kernel or LEAST_CHANNELS channels active; (out, in) or (in,), bool, CPU."""
        size = _strengths(conv, kind=self.options.kind).shape
        order = torch.randperm(size.numel(), generator=self._generator)
        mask = torch.zeros(size.numel(), dtype=torch.bool)
        least = LEAST_CHANNELS if self.options.kind == "channel" else 1
        mask[order[: max(least, round((1 - self.options.sparsity) * size.numel()))]] = True
        return mask.reshape(size)

    def _moved(self, mask: Tensor, conv: nn.Module, *, share: float) -> Tensor:
        """The mask with a share of what is active replaced; what grows is drawn from all that is inactive then, and starts at 0 (D35)."""
        strengths = _strengths(conv, kind=self.options.kind).flatten()
        active = mask.flatten().nonzero()[:, 0]
        moved = mask.flatten().clone()
        moved[active[strengths[active].argsort(stable=True)[: int(share * len(active))]]] = False
        inactive = (~moved).nonzero()[:, 0]
        order = torch.randperm(len(inactive), generator=self._generator)
        grown = inactive[order[: int(share * len(active))]]
        with torch.no_grad():  # zero first: a weight that was pruned just now may grow again, but from 0
            conv.weight.mul_(_spread(moved.reshape(mask.shape), conv))
        moved[grown] = True
        return moved.reshape(mask.shape)

    @torch.no_grad()
    def _apply(self) -> None:
        """W <- W * M, and the same to every moment of the optimizer."""
        for name, conv in self._convs.items():
            mask = _spread(self.masks[name], conv)
            conv.weight.mul_(mask)
            for moment in self._optimizer.state.get(conv.weight, {}).values():
                if isinstance(moment, Tensor) and moment.shape == conv.weight.shape:
                    moment.mul_(mask)


def replaced_share(iteration: int, *, options: SparsityOptions) -> float:
    """zeta_t, the share of the active weights that is replaced at an iteration."""
    cosine = (1 + math.cos(math.pi * iteration / options.iterations)) / 2
    return options.zeta_end + (options.zeta_start - options.zeta_end) * cosine


def _strengths(conv: nn.Module, *, kind: str) -> Tensor:
    """L1 of every kernel, (out, in), or of every input channel, (in,); CPU."""
    kernels = conv.weight.detach().transpose(1, input_axis(conv)).abs().sum((2, 3, 4)).cpu()
    return kernels if kind == "kernel" else kernels.sum(0)


def _spread(mask: Tensor, conv: nn.Module) -> Tensor:
    """A mask in the layout and dtype of the weight, with one element for each kernel or input channel."""
    kernels = (mask if mask.ndim == 2 else mask[None]).transpose(1, input_axis(conv))
    return kernels[..., None, None, None].to(conv.weight)
