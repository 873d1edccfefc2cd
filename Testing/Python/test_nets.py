"""The nets: sizes, parameter counts, and what happens with names that do not exist."""

import pytest
import torch

from NMSWSegment.canonical import run_coarse
from NMSWSegment.nets.backbones import coarse_backbone, local_backbone
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet
from NMSWSegment.protocol import UserError


def num_parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.fixture(scope="module")
def a_compact_net() -> NMSWNet:
    torch.manual_seed(0)
    return NMSWNet(Architecture(num_classes=3)).eval()


def test_compact_preset_has_the_documented_size():
    net = NMSWNet(Architecture(num_classes=20))
    assert num_parameters(net.coarse) == 2_090_569
    assert num_parameters(net.local) == 1_545_956
    assert num_parameters(net) == 2_090_569 + 1_545_956 + 20  # both nets and c of Eq. 6


def test_a_class_costs_one_row_of_each_head_and_one_class_weight():
    few, more = (num_parameters(NMSWNet(Architecture(num_classes=classes))) for classes in (4, 5))
    assert more - few == 2 * (12 + 1) + 1  # 12 features and a bias for each net


def test_paper_preset_has_the_published_widths():
    # MONAI's UNet as published ends in the 20 classes and has 26,537,933 parameters. Ours ends in 16 features, then a 1 x 1
    # head: its last block is narrower, and the rest is the same.
    networks = pytest.importorskip("monai.networks.nets")
    with torch.device("meta"):
        net = NMSWNet(Architecture(num_classes=20, preset="paper"))
        published = networks.UNet(spatial_dims=3, in_channels=1, out_channels=20, channels=(32, 64, 128, 256, 320, 320), strides=(2,) * 5, num_res_units=2)
    assert num_parameters(published) == 26_537_933
    assert num_parameters(net.local) == 26_527_444
    assert num_parameters(net.coarse) == 26_527_444 + 17  # the importance head


@pytest.mark.parametrize("shape", [(8, 8, 16), (16, 24, 8), (8, 32, 40)])
def test_local_net_keeps_any_size_divisible_by_8(a_compact_net, shape):
    with torch.no_grad():
        assert a_compact_net.local(torch.rand(2, 1, *shape)).shape == (2, 3, *shape)


@pytest.mark.parametrize("shape", [(16, 16, 32), (32, 16, 48), (17, 1, 23), (40, 9, 16)])
def test_coarse_net_answers_for_any_size(a_compact_net, shape):
    with torch.no_grad():
        logits, importance_map = run_coarse(a_compact_net.coarse, torch.rand(1, 1, *shape), multiple=a_compact_net.architecture.coarse_multiple)
    assert logits.shape == (1, 3, *shape) and importance_map.shape == (1, 1, *shape)


def test_coarse_multiple_is_what_the_net_needs(a_compact_net):
    multiple = a_compact_net.architecture.coarse_multiple
    assert multiple == 16
    assert a_compact_net.coarse(torch.rand(1, 1, multiple, multiple, 2 * multiple))[0].shape[2:] == (16, 16, 32)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        a_compact_net.coarse(torch.rand(1, 1, multiple, multiple, 2 * multiple - 8))


@pytest.mark.parametrize("shape", [(32, 16, 48), (33, 15, 48)])
def test_padding_of_the_coarse_net_is_air_at_the_far_ends(a_compact_net, shape):
    x_low = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(2))
    padded = torch.zeros(1, 1, *[-(-length // 16) * 16 for length in shape])
    padded[..., : shape[0], : shape[1], : shape[2]] = x_low
    with torch.no_grad():
        found, expected = run_coarse(a_compact_net.coarse, x_low, multiple=16), a_compact_net.coarse(padded)
    for have, want in zip(found, expected):
        assert torch.equal(have, want[..., : shape[0], : shape[1], : shape[2]])


def test_patches_of_a_batch_do_not_see_each_other(a_compact_net):
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(1, 1, 16, 8, 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        together, alone = a_compact_net.local(torch.cat([first, 3 * second])), a_compact_net.local(first)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)  # convolutions sum a batch in another order


def test_new_net_mixes_the_classes_evenly(a_compact_net):
    assert torch.equal(a_compact_net.class_weights, torch.zeros(3))


def test_the_two_nets_share_no_weights(a_compact_net):
    coarse = {parameter.data_ptr() for parameter in a_compact_net.coarse.parameters()}
    assert not coarse & {parameter.data_ptr() for parameter in a_compact_net.local.parameters()}


def test_architecture_comes_back_from_its_dict():
    architecture = Architecture(num_classes=7, backbone="other", preset="paper")
    assert Architecture(**architecture.to_dict()) == architecture


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'unet'"):
        local_backbone("unett", preset="compact")


@pytest.mark.parametrize("build", [lambda preset: coarse_backbone(preset=preset), lambda preset: local_backbone("unet", preset=preset)])
def test_unknown_preset_names_the_nearest(build):
    with pytest.raises(UserError, match="Did you mean 'compact'"):
        build("compct")
