"""E2ENet: the depth shift by hand, the published counts, and that leaving out unused channels changes nothing."""

import pytest
import torch

pytest.importorskip("monai")

from NMSWSegment.nets.e2enet import E2ENet, FusionNode, ShiftedConv, depth_shift, fusion_convolutions, input_axis, with_all_channels, without_unused_channels  # noqa: E402
from NMSWSegment.nets.macs import count_macs  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, LocalNet, NMSWNet  # noqa: E402

CHANNELS = (6, 8, 10, 7)  # four levels, none with the same width; groups of the shift that differ in size
SHAPE = (16, 8, 24)


def num_parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def a_tiny_net(*, seed: int = 0) -> E2ENet:
    torch.manual_seed(seed)
    return E2ENet(out_channels=3, channels=CHANNELS).eval()


def leave_out(net: E2ENet, *, share: float, seed: int = 1) -> None:
    """Zero a share of the input channels of every fusion convolution, at random."""
    generator = torch.Generator().manual_seed(seed)
    for conv in fusion_convolutions(net).values():
        inputs = conv.weight.data.transpose(0, input_axis(conv))  # a view
        inputs[torch.rand(len(inputs), generator=generator) < share] = 0


def whole_numbers(net: torch.nn.Module, *, seed: int = 2) -> None:
    """Small whole numbers instead of weights, so that sums of products are exact in whatever order; zeros stay."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = torch.randint(1, 4, parameter.shape, generator=generator).float() * (parameter.data != 0)


def test_depth_shift_moves_the_five_groups_by_minus_two_to_two():
    x = torch.arange(1.0, 5.0).reshape(1, 1, 4, 1, 1).repeat(1, 5, 1, 1, 1)
    shifted = depth_shift(x, group_sizes=(1,) * 5)[0, :, :, 0, 0]
    assert shifted.tolist() == [[3, 4, 0, 0], [2, 3, 4, 0], [1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 1, 2]]


def test_depth_shift_moves_along_depth_only_and_by_channel():
    x = torch.rand(2, 7, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    shifted = depth_shift(x, group_sizes=(2, 1, 1, 1, 2))
    assert torch.equal(shifted[:, :2, :3], x[:, :2, 2:]) and torch.equal(shifted[:, 5:, 2:], x[:, 5:, :3])
    assert torch.equal(shifted[:, 3], x[:, 3])
    assert shifted[:, :2, 3:].count_nonzero() == 0 and shifted[:, 5:, :2].count_nonzero() == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_depth_shift_of_less_depth_than_its_reach_leaves_what_stays(depth):
    x = torch.ones(1, 5, depth, 1, 1)
    shifted = depth_shift(x, group_sizes=(1,) * 5)[0, :, :, 0, 0]
    assert shifted.sum(1).tolist() == [0, depth - 1, depth, depth - 1, 0]


@pytest.mark.parametrize(
    ("channels", "sizes"), [(1, (1,)), (4, (4,)), (5, (1, 1, 1, 1, 1)), (7, (2, 1, 2, 1, 1)), (16, (4, 3, 3, 3, 3)), (48, (10, 10, 9, 10, 9))]
)
def test_groups_of_the_shift_differ_by_one_channel_and_fewer_than_five_channels_stay(channels, sizes):
    assert ShiftedConv(channels, 2).group_sizes == sizes


def test_single_channel_stays_in_its_slice():
    # the published code moves it by -2, so that the first convolution would not see two slices
    conv = ShiftedConv(1, 1)
    x = torch.zeros(1, 1, 6, 4, 4)
    x[0, 0, 1] = torch.rand(4, 4)
    answer = conv(x)
    assert [index for index in range(6) if answer[0, 0, index].std() > 1e-3] == [1]


def test_image_is_read_where_it_lies_whatever_is_beside_it():
    torch.manual_seed(0)
    net = E2ENet(out_channels=3, channels=CHANNELS, in_channels=16)
    x = torch.zeros(1, 16, 8, 8, 8)
    x[0, 0, 3] = torch.rand(8, 8)
    answer = net.encoder[0][0](x)
    assert [index for index in range(8) if answer[0, 0, index].std() > 1e-3] == [3]


def test_paper_net_has_the_published_sizes_and_ideal_macs():
    # The paper gives 11.24, 9.44 and 7.63 M parameters for S = .7, .8, .9 and does not say for how many classes; a class costs 656.
    # The figures fit four classes, and only when up-sampling and the second convolutions of the last diagonal are masked, too.
    with torch.device("meta"):
        net = E2ENet(out_channels=4)
    fusion = sum(conv.weight.numel() for conv in fusion_convolutions(net).values())
    assert (len(net.nodes), len(net.heads), fusion) == (15, 4, 18_067_200)
    assert [round((num_parameters(net) - sparsity * fusion) / 1e6, 2) for sparsity in (0.7, 0.8, 0.9)] == [11.24, 9.44, 7.63]
    fusion_macs = 0
    for name, conv in fusion_convolutions(net).items():
        level = int(name[1]) + name.endswith("up")  # a transposed convolution works at the resolution of its input
        fusion_macs += conv.weight.numel() * (128 >> level) ** 3
    dense = count_macs(net, (1, 1, 128, 128, 128))
    assert [round((dense - sparsity * fusion_macs) / 1e9) for sparsity in (0.9, 0.7)] == [192, 374]


def test_node_fuses_left_below_and_above_in_this_order():
    node = FusionNode(5, below=7, above=6, num_convs=1)
    seen = []
    node.convs.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    left, below, above = torch.rand(1, 5, 4, 6, 8), torch.rand(1, 7, 2, 3, 4), torch.rand(1, 6, 8, 12, 16)
    assert node(left, below, above).shape == left.shape
    assert torch.equal(seen[0][:, :5], left)
    assert torch.equal(seen[0][:, 5:10], node.up(below))
    assert torch.equal(seen[0][:, 10:], torch.nn.functional.max_pool3d(above, 2))


def test_deep_logits_start_with_those_of_forward_and_halve_the_resolution():
    net, x = a_tiny_net(), torch.rand(2, 1, *SHAPE)
    with torch.no_grad():
        deep, logits = net.deep_logits(x), net(x)
    assert torch.equal(deep[0], logits)
    assert [tuple(level.shape[2:]) for level in deep] == [(16, 8, 24), (8, 4, 12), (4, 2, 6)]


def test_every_parameter_is_reached_by_deep_supervision():
    net = a_tiny_net().train()
    sum(logits.square().sum() for logits in net.deep_logits(torch.rand(1, 1, *SHAPE))).backward()
    assert not [name for name, parameter in net.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_leaving_out_unused_channels_changes_no_answer(share):
    net = a_tiny_net()
    leave_out(net, share=share)
    net, sliced = net.double(), without_unused_channels(net).double()
    x = torch.rand(2, 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert num_parameters(sliced) < num_parameters(net)
    with torch.no_grad():
        for have, want in zip(sliced.deep_logits(x), net.deep_logits(x)):
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-10)  # the order of the sums is all that differs


def test_node_without_unused_channels_is_equal_bit_for_bit_where_sums_are_exact():
    net = a_tiny_net()
    leave_out(net, share=0.5)
    whole_numbers(net)
    sliced, generator = without_unused_channels(net), torch.Generator().manual_seed(4)
    for name, node in net.nodes.items():
        level = int(name[1])
        left, below, above = (
            torch.randint(-3, 4, (1, CHANNELS[level + step], *[size >> step + 1 for size in SHAPE]), generator=generator).float() if level + step >= 0 else None
            for step in (0, 1, -1)
        )
        with torch.no_grad():
            assert torch.equal(sliced.nodes[name](left, below, above), node(left, below, above)), name


def test_sliced_convolutions_hold_the_kept_weights_alone():
    net = a_tiny_net()
    leave_out(net, share=0.5)
    sliced = without_unused_channels(net)
    for name, conv in fusion_convolutions(sliced).items():
        used = conv.weight.transpose(0, input_axis(conv)).flatten(1).abs().sum(1)
        assert (used > 0).sum() >= len(used) - 2, name  # a source of a node keeps one channel, needed or not
    assert count_macs(sliced, (1, 1, *SHAPE)) < 0.7 * count_macs(net, (1, 1, *SHAPE))


def test_net_that_uses_all_channels_comes_back_equal():
    net = a_tiny_net()
    copy = without_unused_channels(net)
    assert copy.fusion_channels == ()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in copy.state_dict().items())


def test_kernel_mask_keeps_the_shapes():
    net = a_tiny_net()
    for conv in fusion_convolutions(net).values():
        conv.weight.data[0, 0] = 0
    assert without_unused_channels(net).fusion_channels == ()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_sliced_net_gets_its_channels_back_and_answers_the_same(share):
    net = a_tiny_net()
    leave_out(net, share=share)
    sliced = without_unused_channels(net)
    back = with_all_channels(sliced, start=a_tiny_net(seed=5))
    x = torch.rand(2, 1, *SHAPE, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(back(x), sliced(x))
    torch.testing.assert_close(back(x), net(x))
    again = without_unused_channels(back)
    assert again.fusion_channels == sliced.fusion_channels
    for name, value in sliced.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_net_is_sliced_only_once():
    net = a_tiny_net()
    leave_out(net, share=0.5)
    with pytest.raises(ValueError, match="Slice the net that was trained"):
        without_unused_channels(without_unused_channels(net))


def test_architecture_of_a_sliced_net_builds_it_again():
    torch.manual_seed(5)
    net = NMSWNet(Architecture(num_classes=3, backbone="e2enet")).eval()
    leave_out(net.local.backbone, share=0.7)
    x = torch.rand(1, 1, 16, 32, 16)
    with torch.no_grad():
        masked = net.local(x)
        net.slice_fusion()
        again = LocalNet(Architecture(**net.architecture.to_dict())).eval()
        again.load_state_dict(net.local.state_dict())
        assert torch.equal(again(x), net.local(x))
    torch.testing.assert_close(net.local(x), masked, rtol=1e-4, atol=1e-4)  # sums of float32 in another order, through ten layers


def test_slicing_leaves_other_nets_alone():
    net = NMSWNet(Architecture(num_classes=2))
    backbone = net.local.backbone
    net.slice_fusion()
    assert net.local.backbone is backbone and net.architecture == Architecture(num_classes=2)
