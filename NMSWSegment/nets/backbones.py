"""Backbones: fully convolutional nets that keep the spatial size, built from MONAI parts.

A backbone ends in NUM_FEATURES channels, not in classes: the last MONAI UNet block works at its output width, which
is wasteful for many classes, so a 1 x 1 head follows it (docs/deviations.md, D7).
"""

from torch import nn

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


def unet(*, channels: tuple[int, ...], num_features: int, in_channels: int = 1) -> nn.Module:
    """A residual UNet: (B, in_channels, D, H, W) -> (B, num_features, D, H, W); sizes divisible by 2^(levels - 1).

    Args:
        channels: features of each level, the finest first; the finest works at half the input's resolution.

    Source: paper section 4, MONAI UNet with two residual units a level.
    """
    from monai.networks.nets import UNet

    return UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=num_features,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=2,
        act=("leakyrelu", {"negative_slope": 0.01, "inplace": True}),  # PReLU's backward costs 13 % of a CPU training step
    )


def coarse_backbone(*, preset: str) -> nn.Module:
    """The backbone of the coarse net, always a UNet."""
    return unet(channels=COARSE_CHANNELS[known_preset(preset)], num_features=NUM_FEATURES[preset])


def local_backbone(name: str, *, preset: str) -> nn.Module:
    """The backbone of the local net.

    Raises:
        UserError: the name or the preset does not exist.
    """
    if name not in BACKBONES:
        raise UserError(unknown_name("backbone", name, list(BACKBONES)))
    return BACKBONES[name](channels=LOCAL_CHANNELS[known_preset(preset)], num_features=NUM_FEATURES[preset])


def known_preset(preset: str) -> str:
    """The preset itself.

    Raises:
        UserError: it does not exist.
    """
    if preset not in NUM_FEATURES:
        raise UserError(unknown_name("preset", preset, list(NUM_FEATURES)))
    return preset


BACKBONES = {"unet": unet}
