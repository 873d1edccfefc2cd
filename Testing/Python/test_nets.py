"""The nets: sizes, parameter counts, and what happens with names that do not exist."""

import pytest
import torch

from NMSWSegment.nets.backbones import build_backbone
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
    assert num_parameters(net.coarse) == 2_115_221
    assert num_parameters(net.local) == 2_115_204
    assert num_parameters(net) == 2_115_221 + 2_115_204 + 20  # both nets and c of Eq. 6


def test_a_class_costs_one_row_of_each_head_and_one_class_weight():
    few, more = (num_parameters(NMSWNet(Architecture(num_classes=classes))) for classes in (4, 5))
    assert more - few == 2 * (16 + 1) + 1


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
def test_any_size_divisible_by_8_keeps_its_shape(a_compact_net, shape):
    x = torch.rand(1, 1, *shape)
    with torch.no_grad():
        logits, importance_map = a_compact_net.coarse(x)
        local = a_compact_net.local(x.expand(2, -1, -1, -1, -1))
    assert logits.shape == (1, 3, *shape) and importance_map.shape == (1, 1, *shape) and local.shape == (2, 3, *shape)


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
    architecture = Architecture(num_classes=7, preset="paper", num_features=8)
    assert Architecture(**architecture.to_dict()) == architecture


@pytest.mark.parametrize(("name", "preset", "fix"), [("unett", "compact", "Did you mean 'unet'"), ("unet", "compct", "Did you mean 'compact'")])
def test_unknown_backbone_or_preset_names_the_nearest(name, preset, fix):
    with pytest.raises(UserError, match=fix):
        build_backbone(name, preset=preset, num_features=16)
