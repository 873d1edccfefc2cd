"""Backbones: fully convolutional nets that keep the spatial size, built from MONAI parts or our own (e2enet.py).

The local net takes any of them, the coarse net is always a UNet. A UNet ends in NUM_FEATURES channels, not in classes: its last
block works at its output width, which is wasteful for many classes, so a 1 x 1 head follows it (docs/deviations.md, D7). The
others end in a 1 x 1 head of their own (D13).
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from NMSWSegment.nets.e2enet import PAPER_CHANNELS, E2ENet
from NMSWSegment.protocol import UserError, unknown_name

COARSE_CHANNELS = {
    "compact": (24, 48, 64, 88, 88),  # one level deeper than the local net: it has to tell left from right
    "paper": (32, 64, 128, 256, 320, 320),
}
LOCAL_CHANNELS = {
    "compact": (24, 48, 96, 96),
    "paper": (32, 64, 128, 256, 320, 320),
}
NUM_FEATURES = {"compact": 12, "paper": 16}
E2ENET_CHANNELS = {
    "compact": (16, 32, 64, 112, 112),  # narrow at the top, which works at full resolution; the UNet's at half
    "paper": PAPER_CHANNELS,
}
# A local net takes patches whose sides are multiples of this: 2 to the number of times that it halves the resolution.
PATCH_MULTIPLES = {
    "unet": {"compact": 8, "paper": 32},
    "mednext": {"compact": 16, "paper": 16},
    "swin_unetr": {"compact": 32, "paper": 32},
    "e2enet": {"compact": 16, "paper": 32},
}


def unet(*, channels: tuple[int, ...], out_channels: int, in_channels: int = 1) -> nn.Module:
    """A residual UNet: (B, in_channels, D, H, W) -> (B, out_channels, D, H, W); sizes divisible by 2^(levels - 1).

    Args:
        channels: features of each level, the finest first; the finest works at half the input's resolution.

    Source: paper section 4, MONAI UNet with two residual units a level.
    """
    from monai.networks.nets import UNet

    return UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=2,
        act=("leakyrelu", {"negative_slope": 0.01, "inplace": True}),  # PReLU's backward costs 13 % of a CPU training step (D28)
    )


def mednext(*, preset: str, out_channels: int, in_channels: int = 1) -> nn.Module:
    """MedNeXt with kernel 3: (B, in_channels, D, H, W) -> (B, out_channels, D, H, W); paper is the published size M, sizes divisible by 16."""
    from monai.networks.nets import MedNeXt, MedNeXtM

    if preset == "paper":
        return MedNeXtM(spatial_dims=3, in_channels=in_channels, out_channels=out_channels, kernel_size=3)
    return MedNeXt(
        init_filters=16,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=3,
        blocks_down=(1, 1, 2, 2),  # depth where it is cheap: the deepest level adds no time that can be measured
        blocks_bottleneck=2,
        blocks_up=(2, 2, 1, 1),
        use_residual_connection=True,
    )


def swin_unetr(*, preset: str, out_channels: int, in_channels: int = 1) -> nn.Module:
    """Swin-UNETR: (B, in_channels, D, H, W) -> (B, out_channels, D, H, W); sizes divisible by 32."""
    from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
    from monai.networks.nets import SwinUNETR

    device = torch.empty(0).device  # meta where only shapes matter; MONAI reads a value while it builds this net, which meta has not
    with torch.device("cpu"):
        if preset == "paper":
            net = SwinUNETR(in_channels=in_channels, out_channels=out_channels, feature_size=24)
        else:
            # Windows of 4 tile a patch of 64 without a rest: four times faster than 7, which pads 32 tokens to 35
            net = SwinUNETR(in_channels=in_channels, out_channels=out_channels, feature_size=12, window_size=4)
            # At the bottom, 2^3 and 4^3 voxels of a patch of 64, kernels of 3 would hold three quarters of all weights
            net.encoder10 = UnetrBasicBlock(spatial_dims=3, in_channels=192, out_channels=192, kernel_size=1, stride=1, norm_name="instance", res_block=True)
            net.decoder5 = UnetrUpBlock(
                spatial_dims=3, in_channels=192, out_channels=96, kernel_size=1, upsample_kernel_size=2, norm_name="instance", res_block=True
            )
    return net.to(device)


def e2enet(*, preset: str, out_channels: int, in_channels: int = 1, fusion_channels: tuple[str, ...] = ()) -> nn.Module:
    """E2ENet, see e2enet.py; sizes divisible by 32 (paper) or 16 (compact)."""
    return E2ENet(in_channels=in_channels, out_channels=out_channels, channels=E2ENET_CHANNELS[preset], fusion_channels=fusion_channels)


def coarse_backbone(*, preset: str) -> nn.Module:
    """The backbone of the coarse net: a UNet that ends in NUM_FEATURES channels."""
    return unet(channels=COARSE_CHANNELS[known_preset(preset)], out_channels=NUM_FEATURES[preset])


def local_backbone(name: str, *, preset: str, out_channels: int, in_channels: int = 1) -> nn.Module:
    """The backbone of the local net.

    Args:
        in_channels: 1 for the image alone.
        out_channels: classes where the backbone ends_in_head, else features.

    Raises:
        UserError: the name or the preset does not exist.
    """
    return _BUILDERS[known_backbone(name)](preset=known_preset(preset), in_channels=in_channels, out_channels=out_channels)


def ends_in_head(name: str) -> bool:
    """Whether the last layer of a backbone is a 1 x 1 convolution, so that its channels can be the classes."""
    return name != "unet"


def memory_format(name: str) -> torch.memory_format:
    """The order in memory in which a local net of this backbone trains fastest on the CPU (measured, bf16, patches of 64): channels
    last is a fifth faster for the UNet and Swin-UNETR, a quarter slower for E2ENet and nearly half for MedNeXt."""
    return torch.channels_last_3d if known_backbone(name) in ("unet", "swin_unetr") else torch.contiguous_format


def check_patch_size(name: str, *, preset: str, patch_size: tuple[int, int, int]) -> None:
    """Check that a backbone takes patches of a size.

    Raises:
        UserError: a side is no multiple of what the backbone needs, or a single voxel would be left at its bottom, which cannot be
            normalized; the name or the preset does not exist.
    """
    multiple = PATCH_MULTIPLES[known_backbone(name)][known_preset(preset)]
    if all(side > 0 and side % multiple == 0 for side in patch_size) and math.prod(patch_size) > multiple**3:
        return
    sides = [max(1, math.ceil(side / multiple)) * multiple for side in patch_size]
    if math.prod(sides) == multiple**3:
        sides = [2 * multiple] * 3
    found, nearest = (" x ".join(map(str, triple)) for triple in (patch_size, sides))
    raise UserError(
        f"Patches of {found} voxels do not suit the backbone {name} ({preset}): each side must be a multiple of {multiple}, and one of them more than {multiple}. Use {nearest}."
    )


def known_backbone(name: str) -> str:
    """The name of a backbone itself.

    Raises:
        UserError: it does not exist.
    """
    if name not in _BUILDERS:
        raise UserError(unknown_name("backbone", name, list(_BUILDERS)))
    return name


def known_preset(preset: str) -> str:
    """The preset itself.

    Raises:
        UserError: it does not exist.
    """
    if preset not in NUM_FEATURES:
        raise UserError(unknown_name("preset", preset, list(NUM_FEATURES)))
    return preset


def _local_unet(*, preset: str, in_channels: int, out_channels: int) -> nn.Module:
    """The UNet of the local net."""
    return unet(channels=LOCAL_CHANNELS[preset], in_channels=in_channels, out_channels=out_channels)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {"unet": _local_unet, "mednext": mednext, "swin_unetr": swin_unetr, "e2enet": e2enet}
BACKBONES = tuple(_BUILDERS)
