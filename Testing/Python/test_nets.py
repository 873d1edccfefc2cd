"""The nets: sizes, parameter counts, and what happens with names that do not exist."""

import json

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("einops")  # MONAI's Swin-UNETR needs it

from NMSWSegment.engine.resampling import run_coarse  # noqa: E402
from NMSWSegment.engine.selection import log_entropy  # noqa: E402
from NMSWSegment.nets.backbones import BACKBONES, PATCH_MULTIPLES, check_patch_size, coarse_backbone, local_backbone  # noqa: E402
from NMSWSegment.nets.macs import count_macs, published_macs  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, CoarseNet, LocalNet, NMSWNet  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402

PAPER_PATCH, PAPER_COARSE = (1, 1, 128, 128, 128), (1, 1, 160, 160, 160)


def num_parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.fixture(scope="module")
def a_compact_net() -> NMSWNet:
    torch.manual_seed(0)
    return NMSWNet(Architecture(num_classes=3)).eval()


def test_compact_preset_has_the_documented_size():
    net = NMSWNet(Architecture(num_classes=20))
    assert num_parameters(net.coarse) == 2_093_757
    assert num_parameters(net.local) == 1_545_956
    assert num_parameters(net) == 2_093_757 + 1_545_956 + 20  # both nets and c of Eq. 6


def test_a_class_costs_one_row_of_each_head_one_input_of_the_importance_and_one_class_weight():
    few, more = (num_parameters(NMSWNet(Architecture(num_classes=classes))) for classes in (4, 5))
    assert more - few == 2 * (12 + 1) + 32 + 1  # 12 features and a bias for each net, 32 hidden features of the importance head


def test_paper_preset_has_the_published_widths():
    # As published the UNet ends in the 20 classes. Ours ends in 16 features, then a 1 x 1 head: its last block is narrower.
    with torch.device("meta"):
        net, published = NMSWNet(Architecture(num_classes=20, preset="paper")), published_unet(20)
    assert num_parameters(published) == 26_537_933
    assert num_parameters(net.local) == 26_527_444
    assert num_parameters(net.coarse) == 26_527_444 + 3_329  # the importance head: 36 inputs, three layers of 32, one output


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


def test_both_nets_answer_with_log_probabilities(a_compact_net):
    with torch.no_grad():
        (coarse, _), local = a_compact_net.coarse(torch.rand(1, 1, 16, 32, 16)), a_compact_net.local(torch.rand(1, 1, 16, 16, 16))
    for logits in (coarse, local):
        torch.testing.assert_close(logits.exp().sum(1), torch.ones_like(logits[:, 0]))


def test_shift_of_all_raw_logits_changes_no_answer(a_compact_net):
    # Eq. 6 weighs logits per class: on raw ones, 3 more for every class would change the answer
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        before = a_compact_net.local(x)
        a_compact_net.local.head.bias += 3
        after = a_compact_net.local(x)
        a_compact_net.local.head.bias -= 3
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_untrained_importance_is_the_log_of_the_entropy(a_compact_net):
    with torch.no_grad():
        logits, importance_map = a_compact_net.coarse(torch.rand(1, 1, 16, 32, 16))
    torch.testing.assert_close(importance_map, log_entropy(logits))
    without, zeros = a_compact_net.coarse.without_importance(torch.rand(1, 1, 16, 32, 16))
    assert without.shape == logits.shape and not zeros.any()


def test_the_two_nets_share_no_weights(a_compact_net):
    coarse = {parameter.data_ptr() for parameter in a_compact_net.coarse.parameters()}
    assert not coarse & {parameter.data_ptr() for parameter in a_compact_net.local.parameters()}


@pytest.mark.parametrize(
    "architecture",
    [Architecture(num_classes=7, backbone="mednext", preset="paper"), Architecture(num_classes=2, backbone="e2enet", fusion_channels=("101", "1"))],
)
def test_architecture_comes_back_from_its_json(architecture):
    assert Architecture(**json.loads(json.dumps(architecture.to_dict()))) == architecture


def test_fusion_channels_of_another_backbone_are_refused():
    with pytest.raises(UserError, match="Leave fusion_channels out"):
        Architecture(num_classes=2, backbone="unet", fusion_channels=("101",))


@pytest.mark.parametrize(
    "build",
    [
        lambda name: local_backbone(name, preset="compact", out_channels=2),
        lambda name: Architecture(2, backbone=name),
        lambda name: check_patch_size(name, preset="compact", patch_size=(64, 64, 64)),
    ],
)
def test_unknown_backbone_names_the_nearest(build):
    with pytest.raises(UserError, match="Did you mean 'swin_unetr'"):
        build("swin_unet")


@pytest.mark.parametrize(
    "build",
    [
        lambda preset: coarse_backbone(preset=preset),
        lambda preset: local_backbone("unet", preset=preset, out_channels=2),
        lambda preset: Architecture(2, preset=preset),
    ],
)
def test_unknown_preset_names_the_nearest(build):
    with pytest.raises(UserError, match="Did you mean 'compact'"):
        build("compct")


@pytest.mark.parametrize(("name", "size"), [("unet", 1_546_021), ("mednext", 1_411_273), ("swin_unetr", 1_275_727), ("e2enet", 1_488_288)])
def test_compact_local_nets_fit_into_a_packaged_bundle(name, size):
    # 2 bytes a weight, with the coarse net of 25 classes, leave room below 8 MB
    net = LocalNet(Architecture(num_classes=25, backbone=name))
    assert num_parameters(net) == size
    assert 2 * (size + 2_093_982) < 7.4e6  # half a megabyte for code, manifest and picture


# The papers' nets with the classes as output, as published; ours differ for unet only, which ends in features and a head.
def published_unet(num_classes: int) -> torch.nn.Module:
    from monai.networks.nets import UNet

    return UNet(spatial_dims=3, in_channels=1, out_channels=num_classes, channels=(32, 64, 128, 256, 320, 320), strides=(2,) * 5, num_res_units=2)


@pytest.mark.parametrize(
    ("build", "millions", "true_gmacs", "published_gmacs"),
    [
        (published_unet, 26.54, 73.1, 183.2),
        (lambda num_classes: local_backbone("swin_unetr", preset="paper", out_channels=num_classes), 15.70, 200.4, 200.6),
        (lambda num_classes: local_backbone("mednext", preset="paper", out_channels=num_classes), 17.53, 243.6, 255.8),
    ],
    ids=["unet", "swin_unetr", "mednext"],
)
def test_paper_nets_have_the_published_size_and_macs(build, millions, true_gmacs, published_gmacs):
    with torch.device("meta"):
        net = build(20)
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    assert round(num_parameters(net) / 1e6, 2) == millions
    assert round(count_macs(net, PAPER_PATCH) / 1e9, 1) == true_gmacs
    assert round(published_macs(net, PAPER_PATCH) / 1e9, 1) == published_gmacs


def test_our_local_nets_are_the_published_ones_but_for_the_end_of_the_unet():
    with torch.device("meta"):
        ours = {name: LocalNet(Architecture(num_classes=20, backbone=name, preset="paper")) for name in BACKBONES}
        published = {name: local_backbone(name, preset="paper", out_channels=20) for name in BACKBONES}
    assert num_parameters(ours["unet"]) == 26_527_444 and count_macs(ours["unet"], PAPER_PATCH) == 63_827_083_264
    assert {name: num_parameters(net) for name, net in ours.items() if name != "unet"} == {
        name: num_parameters(net) for name, net in published.items() if name != "unet"
    }


def test_counts_give_the_tables_of_the_paper():
    # Table 2 at 480^3: the coarse net at 160^3 and k patches; TMACs with the three digits that are printed
    with torch.device("meta"):
        nets = {
            name: published_unet(20) if name == "unet" else local_backbone(name, preset="paper", out_channels=20) for name in ("unet", "swin_unetr", "mednext")
        }
    assert round(count_macs(nets["unet"], PAPER_COARSE) / 1e9, 1) == 142.8
    coarse = published_macs(nets["unet"], PAPER_COARSE)
    for name, by_k in {"unet": (1.27, 5.85), "swin_unetr": (1.36, 6.37), "mednext": (1.64, 8.02)}.items():
        patch = published_macs(nets[name], PAPER_PATCH)
        for k, tmacs in zip((5, 30), by_k):
            assert (coarse + k * patch) / 1e12 == pytest.approx(tmacs, rel=2e-3, abs=5e-3)


def test_macs_of_three_layers_are_those_of_the_pencil():
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.InstanceNorm3d(2), torch.nn.ConvTranspose3d(2, 3, 2, stride=2))
    voxels = 4 * 5 * 6
    assert count_macs(net, (1, 1, 4, 5, 6)) == voxels * 27 * 2 + voxels * 8 * 2 * 3
    assert published_macs(net, (1, 1, 4, 5, 6)) == voxels * 27 * 2 + voxels * 2 * 2 + 8 * voxels * 8 * 2 * 3
    assert next(net.parameters()).device.type == "cpu" and not net[1]._forward_hooks  # the net is as before


@pytest.mark.parametrize("name", BACKBONES)
def test_smallest_patch_that_passes_the_check_runs_and_half_of_its_multiple_does_not(name):
    torch.manual_seed(1)
    net, multiple = LocalNet(Architecture(num_classes=3, backbone=name)), PATCH_MULTIPLES[name]["compact"]
    patch_size = (multiple, multiple, 2 * multiple)
    check_patch_size(name, preset="compact", patch_size=patch_size)
    logits = net(torch.rand(1, 1, *patch_size))  # in training mode, which is the pickier one
    assert logits.shape == (1, 3, *patch_size) and logits.isfinite().all()
    assert [deep.shape[2:] for deep in net.deep_logits(torch.rand(1, 1, *patch_size))][0] == patch_size
    with pytest.raises((RuntimeError, ValueError)), torch.no_grad():
        net(torch.rand(1, 1, multiple, multiple + multiple // 2, 2 * multiple))


@pytest.mark.parametrize(
    ("name", "preset", "patch_size", "fix"),
    [
        ("unet", "compact", (60, 64, 64), "multiple of 8.*Use 64 x 64 x 64"),
        ("unet", "paper", (8, 40, 64), "multiple of 32.*Use 32 x 64 x 64"),
        ("mednext", "compact", (16, 16, 16), "one of them more than 16. Use 32 x 32 x 32"),
        ("swin_unetr", "compact", (48, 32, 32), "multiple of 32.*Use 64 x 32 x 32"),
        ("e2enet", "compact", (0, 32, 32), "multiple of 16.*Use 16 x 32 x 32"),
    ],
)
def test_patch_size_that_a_backbone_cannot_take_says_which_it_can(name, preset, patch_size, fix):
    with pytest.raises(UserError, match=fix):
        check_patch_size(name, preset=preset, patch_size=patch_size)


def test_archive_of_the_coarse_net_works_in_parts_and_gives_the_same_for_any_size(monkeypatch):
    monkeypatch.setattr("NMSWSegment.nets.nmsw_net.VOXELS_AT_ONCE", 1 << 10)
    torch.manual_seed(0)
    net = CoarseNet(Architecture(num_classes=5)).eval()
    torch.nn.init.normal_(net.importance_head.perceptron[-1].weight)
    with torch.no_grad():
        archive = torch.jit.trace(net, torch.rand(1, 1, 32, 32, 16), check_trace=False)
    x = torch.rand(1, 1, 16, 48, 32)
    whole = net(x)  # with a gradient nothing is done in parts
    with torch.inference_mode():
        for found in (net(x), archive(x)):
            for have, want in zip(found, whole):
                torch.testing.assert_close(have, want, rtol=0, atol=1e-6)
    assert set(archive.state_dict()) == set(net.state_dict())
