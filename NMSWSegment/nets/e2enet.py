"""E2ENet: a triangle of fusion nodes on an encoder whose convolutions see depth only by shifting channels (arXiv 2312.04727).

    x[0,0]  x[0,1]  x[0,2]  x[0,3]    level 0, full resolution; the answer is read off the last node
    x[1,0]  x[1,1]  x[1,2]            level i works at 1 / 2^i of it
    x[2,0]  x[2,1]
    x[3,0]                            column 0 is the encoder; here of four levels, as published of six

Node x[i,j] fuses its left neighbor x[i,j-1], the one below that, up-sampled, and the one above that, pooled. A net with masked
fusion convolutions (training/sparse.py) is stored without the channels that nothing reads: without_unused_channels; with_all_channels goes back.
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
        self.encoder[0][0].group_sizes = (in_channels,)  # the image is read where it lies, also with a coarse answer beside it (D15)
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
            column.append(stage(functional.max_pool3d(column[-1], 2) if column else x))  # the published encoder strides instead (D33)
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
        self.conv = nn.Conv3d(kept.count(KEPT), out_channels, kernel_size=(1, 3, 3), padding=(0, 1, 1))  # its scale at the start does not matter (D34)
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


def with_all_channels(sliced: E2ENet, *, start: E2ENet) -> E2ENet:
    """The inverse of without_unused_channels: the same function with all channels, which can be trained further.

    Args:
        start: a net with all channels of the same size. Parameters that the sliced net lacks stay as they are in it, but nothing reads them.

    Returns:
        start, changed.
    """
    if not sliced.fusion_channels:
        start.load_state_dict(sliced.state_dict())
        return start
    patterns = dict(zip(fusion_convolutions(start), sliced.fusion_channels, strict=True))
    own = sliced.state_dict()
    state = start.state_dict() | {key: value for key, value in own.items() if not key.startswith("nodes.")}
    for name, node in start.nodes.items():
        kept = _KeptChannels([patterns[key] for key in patterns if key.startswith(f"{name}.")], node=node)
        prefix = f"nodes.{name}"
        state[f"{prefix}.up.weight"] = _put_back(own[f"{prefix}.up.weight"], node.up.weight, outputs=kept.up_outputs, inputs=kept.inputs[0], axis=0)
        for index, block in enumerate(node.convs):
            key, rows = f"{prefix}.convs.{index}", kept.outputs[index]
            state[f"{key}.conv.weight"] = _put_back(own[f"{key}.conv.weight"], block.conv.weight, outputs=rows, inputs=kept.inputs[index + 1], axis=1)
            for part in _BY_OUTPUT:
                state[f"{key}.{part}"] = state[f"{key}.{part}"].index_copy(0, torch.tensor(rows), own[f"{key}.{part}"])
    start.load_state_dict(state)
    return start


def kept_indices(pattern: str) -> list[int]:
    """Positions of the kept channels."""
    return [index for index, mark in enumerate(pattern) if mark == KEPT]


_BY_OUTPUT = ("conv.bias", "norm.weight", "norm.bias")
"""Parameters of a ShiftedConv with one value per output channel."""


class _KeptChannels:
    """What the patterns of a node (up-sampling, convolutions) keep."""

    def __init__(self, patterns: list[str], *, node: FusionNode) -> None:
        channels = node.convs[-1].conv.out_channels
        self.inputs = [kept_indices(pattern) for pattern in patterns]
        """Of the up-sampling, then of every convolution."""
        self.up_outputs = kept_indices(patterns[1][channels : 2 * channels])
        self.outputs = [*self.inputs[2:], list(range(channels))]
        """Of every convolution: a first one need not compute what the second does not read."""


def _sliced_node_state(node: FusionNode, *, prefix: str, patterns: list[str]) -> dict[str, Tensor]:
    """Parameters of a node without what the patterns (up, convolutions) leave out."""
    kept = _KeptChannels(patterns, node=node)
    state = {f"{prefix}.up.weight": node.up.weight[kept.inputs[0]][:, kept.up_outputs]}
    for index, block in enumerate(node.convs):
        key, rows, values = f"{prefix}.convs.{index}", kept.outputs[index], block.state_dict()
        state[f"{key}.conv.weight"] = block.conv.weight[rows][:, kept.inputs[index + 1]]
        state |= {f"{key}.{part}": values[part][rows] for part in _BY_OUTPUT}
    return state


def _put_back(sliced: Tensor, start: Tensor, *, outputs: list[int], inputs: list[int], axis: int) -> Tensor:
    """A weight with all channels: 0 for inputs that were left out, for outputs that were left out that of `start`.

    Args:
        axis: of the inputs, 0 or 1; the outputs are the other one.
    """
    weight = start.detach().clone().transpose(0, axis)  # inputs first
    weight[[index for index in range(len(weight)) if index not in inputs]] = 0
    rows, columns = torch.tensor(inputs)[:, None], torch.tensor(outputs)[None]
    weight[rows, columns] = sliced.transpose(0, axis)
    return weight.transpose(0, axis).contiguous()


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
