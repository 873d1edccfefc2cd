"""E2ENet: a triangle of fusion nodes on an encoder whose convolutions see depth only by shifting channels (arXiv 2312.04727).

    x[0,0]  x[0,1]  x[0,2]  x[0,3]    level 0, full resolution; the answer is read off the last node
    x[1,0]  x[1,1]  x[1,2]            level i works at 1 / 2^i of it
    x[2,0]  x[2,1]
    x[3,0]                            column 0 is the encoder; here of four levels, as published of six

Node x[i,j] fuses its left neighbor x[i,j-1], the one below that, up-sampled, and the one above that, pooled. A net with masked
fusion convolutions (training/sparse.py) is stored without the channels that nothing reads: without_unused_channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

PAPER_CHANNELS = (48, 96, 192, 320, 320, 320)
NUM_SHIFTS = 5  # groups of channels; group g moves by g - 2 voxels along depth
MAX_HEADS = 4  # deep supervision at 1, 1/2, 1/4, 1/8 of the resolution
KEPT, LEFT_OUT = "1", "0"


class E2ENet(nn.Module):
    """(B, in_channels, D, H, W) -> (B, out_channels, D, H, W); sizes divisible by 2^(levels - 1).

    Args:
        channels: features of each level, the finest first.
        fusion_channels: for every fusion convolution, in the order of fusion_convolutions, one character per input channel: "1"
            where it is kept. Empty keeps all.
    """

    def __init__(self, *, out_channels: int, channels: tuple[int, ...] = PAPER_CHANNELS, in_channels: int = 1, fusion_channels: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.channels, self.in_channels, self.out_channels, self.fusion_channels = channels, in_channels, out_channels, fusion_channels
        widths = (in_channels, *channels)
        self.encoder = nn.ModuleList([nn.Sequential(ShiftedConv(before, after), ShiftedConv(after, after)) for before, after in zip(widths, channels)])
        self.nodes = nn.ModuleDict()
        patterns = iter(fusion_channels)
        for column in range(1, len(channels)):
            for level in range(len(channels) - column):
                num_convs = 2 if level + column == len(channels) - 1 else 1  # two on the last diagonal
                kept = tuple(next(patterns) for _ in range(1 + num_convs)) if fusion_channels else ()
                above = channels[level - 1] if level else 0
                self.nodes[_node_name(level, column)] = FusionNode(channels[level], below=channels[level + 1], above=above, num_convs=num_convs, kept=kept)
        self.heads = nn.ModuleList([nn.Conv3d(width, out_channels, kernel_size=1, bias=False) for width in channels[: min(MAX_HEADS, len(channels) - 1)]])

    def forward(self, x: Tensor) -> Tensor:
        """Logits at full resolution, (B, out_channels, D, H, W)."""
        return self.heads[0](self._last_diagonal(x)[0])

    def deep_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits at 1, 1/2, 1/4, 1/8 of the resolution, as far as there are levels; the first are those of forward."""
        return tuple(head(features) for head, features in zip(self.heads, self._last_diagonal(x)))

    def _last_diagonal(self, x: Tensor) -> list[Tensor]:
        """Features of the last node of every level, the finest first."""
        column = []
        for stage in self.encoder:
            column.append(stage(functional.max_pool3d(column[-1], 2) if column else x))
        diagonal = []
        for index in range(1, len(self.channels)):
            column = [
                self.nodes[_node_name(level, index)](column[level], column[level + 1], column[level - 1] if level else None) for level in range(len(column) - 1)
            ]
            diagonal.append(column[-1])
        return diagonal[::-1]


class FusionNode(nn.Module):
    """[left, up-sampled below, pooled above] -> one or two convolutions -> as many channels as the left neighbor has.

    Args:
        channels: of the left neighbor and of the answer; below, above: of the other two, 0 where there is none above.
        kept: patterns of E2ENet.fusion_channels for the up-sampling and the convolutions; empty keeps all. The inputs of a
            convolution that are not kept are not computed either, where only it reads them.
    """

    def __init__(self, channels: int, *, below: int, above: int, num_convs: int, kept: tuple[str, ...] = ()) -> None:
        super().__init__()
        kept = kept or tuple(KEPT * width for width in (below, 2 * channels + above, *[channels] * (num_convs - 1)))
        left, up, pooled = (kept[1][start:stop] for start, stop in ((0, channels), (channels, 2 * channels), (2 * channels, None)))
        for name, pattern in (("left", left), ("below", kept[0]), ("above", pooled)):
            self.register_buffer(f"{name}_index", torch.tensor(kept_indices(pattern)) if LEFT_OUT in pattern else None)
        self.up = nn.ConvTranspose3d(kept[0].count(KEPT), up.count(KEPT), kernel_size=2, stride=2, bias=False)
        widths = [*(pattern.count(KEPT) for pattern in kept[2:]), channels]
        self.convs = nn.Sequential(*(ShiftedConv(len(pattern), width, kept=pattern) for pattern, width in zip(kept[1:], widths)))

    def forward(self, left: Tensor, below: Tensor, above: Tensor | None) -> Tensor:
        """Features of the neighbors in the column before, each at its own resolution -> features of this node."""
        sources = [_selected(left, self.left_index), self.up(_selected(below, self.below_index))]
        if above is not None:
            sources.append(functional.max_pool3d(_selected(above, self.above_index), 2))
        return self.convs(torch.cat(sources, dim=1))


class ShiftedConv(nn.Module):
    """Depth shift -> convolution in the plane -> instance norm -> leaky ReLU.

    Args:
        in_channels: of the input before anything is left out; the shift of a channel depends on it.
        kept: "1" for each input channel that is given; empty is all.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kept: str = "") -> None:
        super().__init__()
        kept = kept or KEPT * in_channels
        ends = _group_ends(in_channels)
        self.group_sizes = tuple(kept[start:stop].count(KEPT) for start, stop in zip((0, *ends), ends))
        self.conv = nn.Conv3d(kept.count(KEPT), out_channels, kernel_size=(1, 3, 3), padding=(0, 1, 1))
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, kept channels, D, H, W) -> (B, out_channels, D, H, W)."""
        return functional.leaky_relu(self.norm(self.conv(depth_shift(x, group_sizes=self.group_sizes))), negative_slope=0.01, inplace=True)


def depth_shift(x: Tensor, *, group_sizes: tuple[int, ...]) -> Tensor:
    """Move group g of the channels by g - 2 voxels along depth, the first spatial axis; what comes in is 0.

    Args:
        group_sizes: channels of each group, NUM_SHIFTS of them; a single group stays where it is.

    Source: restricted depth shift. The published code moves a single input channel by -2; here fewer than five stay (D15).
    """
    if len(group_sizes) == 1:
        return x
    depth, reach = x.shape[2], NUM_SHIFTS // 2
    padded = functional.pad(x, (0, 0, 0, 0, reach, reach))
    groups, start = [], 0
    for group, size in enumerate(group_sizes):
        first = 2 * reach - group
        groups.append(padded[:, start : start + size, first : first + depth])
        start += size
    return torch.cat(groups, dim=1)


def fusion_convolutions(net: E2ENet) -> dict[str, nn.Conv3d | nn.ConvTranspose3d]:
    """The convolutions that sparse feature fusion thins out, by name: of every node the up-sampling, then one or two convolutions."""
    found = {}
    for name, node in net.nodes.items():
        found[f"{name}.up"] = node.up
        for index, block in enumerate(node.convs):
            found[f"{name}.convs.{index}"] = block.conv
    return found


def input_axis(conv: nn.Conv3d | nn.ConvTranspose3d) -> int:
    """The axis of the weight that runs over the input channels; the output channels are the other one of 0 and 1."""
    return 0 if isinstance(conv, nn.ConvTranspose3d) else 1


def without_unused_channels(net: E2ENet) -> E2ENet:
    """The same function with narrower convolutions: input channels with only zero weights are left out, with all that only they need.

    The sums run over fewer terms, all of which are left out being zero: equal bit for bit where sums are exact, else up to the
    order of the sums. A net without such channels comes back as an equal copy.
    """
    if net.fusion_channels:
        raise ValueError("The net was sliced before. Slice the net that was trained.")
    patterns = {name: _used_pattern(conv) for name, conv in fusion_convolutions(net).items()}
    for name, node in net.nodes.items():
        patterns[f"{name}.convs.0"] = _with_every_source(patterns[f"{name}.convs.0"], left=node.convs[-1].conv.out_channels)
    fusion_channels = tuple(patterns.values()) if any(LEFT_OUT in pattern for pattern in patterns.values()) else ()
    sliced = E2ENet(out_channels=net.out_channels, channels=net.channels, in_channels=net.in_channels, fusion_channels=fusion_channels)
    state = sliced.state_dict() | net.state_dict()  # the first for the indices of the channels
    for name, node in net.nodes.items():
        state |= _sliced_node_state(node, prefix=f"nodes.{name}", patterns=[patterns[key] for key in patterns if key.startswith(f"{name}.")])
    sliced.load_state_dict(state)
    return sliced.train(net.training)


def kept_indices(pattern: str) -> list[int]:
    """Positions of the kept channels."""
    return [index for index, mark in enumerate(pattern) if mark == KEPT]


def _sliced_node_state(node: FusionNode, *, prefix: str, patterns: list[str]) -> dict[str, Tensor]:
    """Parameters of a node without what the patterns (up, convolutions) leave out."""
    channels = node.convs[-1].conv.out_channels
    inputs = [kept_indices(pattern) for pattern in patterns]
    up_outputs = kept_indices(patterns[1][channels : 2 * channels])
    state = {f"{prefix}.up.weight": node.up.weight[inputs[0]][:, up_outputs]}
    outputs = [*inputs[2:], list(range(channels))]  # a first convolution need not compute what the second does not read
    for index, block in enumerate(node.convs):
        key, rows = f"{prefix}.convs.{index}", outputs[index]
        state[f"{key}.conv.weight"] = block.conv.weight[rows][:, inputs[index + 1]]
        state |= {
            f"{key}.{name}": value[rows] for name, value in (("conv.bias", block.conv.bias), ("norm.weight", block.norm.weight), ("norm.bias", block.norm.bias))
        }
    return state


def _used_pattern(conv: nn.Conv3d | nn.ConvTranspose3d) -> str:
    """ "1" for each input channel that has a weight; at least one."""
    axis = input_axis(conv)
    is_used = (conv.weight.detach() != 0).transpose(0, axis).flatten(1).any(1)
    if not is_used.any():
        is_used[0] = True
    return "".join(KEPT if used else LEFT_OUT for used in is_used.tolist())


def _with_every_source(pattern: str, *, left: int) -> str:
    """The pattern with at least one channel of each of left, up and above; a convolution without channels does not exist."""
    sources = [pattern[:left], pattern[left : 2 * left], pattern[2 * left :]]
    return "".join(KEPT + source[1:] if source and KEPT not in source else source for source in sources)


def _group_ends(channels: int) -> tuple[int, ...]:
    """Where each shift group ends: five groups that differ by one channel at most; one group for fewer than five channels."""
    if channels < NUM_SHIFTS:
        return (channels,)
    return tuple(-(-channels * (group + 1) // NUM_SHIFTS) for group in range(NUM_SHIFTS))


def _selected(x: Tensor, index: Tensor | None) -> Tensor:
    """The channels of an index; None is all of them."""
    return x if index is None else x.index_select(1, index)


def _node_name(level: int, column: int) -> str:
    """Name of node x[level, column]."""
    return f"x{level}_{column}"
