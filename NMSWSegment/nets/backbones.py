"""Backbones: fully convolutional nets that keep the spatial size, built from MONAI parts.

A backbone ends in `num_features` channels, not in classes: the last MONAI UNet block works at its output width, which
is wasteful for many classes, so a 1 x 1 head follows it (docs/deviations.md, D7).
"""

from torch import nn

from NMSWSegment.protocol import UserError, unknown_name

UNET_CHANNELS = {
    "compact": (32, 64, 96, 112),
    "paper": (32, 64, 128, 256, 320, 320),
}


def unet(*, preset: str, num_features: int, in_channels: int = 1) -> nn.Module:
    """A residual UNet: (B, in_channels, D, H, W) -> (B, num_features, D, H, W); sizes divisible by 2^(levels - 1).

    Args:
        preset: compact (packaged bundles, 2 M parameters) or paper (the published widths).

    Source: paper section 4, MONAI UNet with two residual units a level.
    """
    from monai.networks.nets import UNet

    channels = UNET_CHANNELS[preset]
    return UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=num_features,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=2,
        act=("leakyrelu", {"negative_slope": 0.01, "inplace": True}),  # PReLU's backward costs 13 % of a CPU training step
    )


BACKBONES = {"unet": unet}
PRESETS = ("compact", "paper")


def build_backbone(name: str, *, preset: str, num_features: int) -> nn.Module:
    """The backbone of that name; the coarse net is always a UNet.

    Raises:
        UserError: the name or the preset does not exist.
    """
    if name not in BACKBONES:
        raise UserError(unknown_name("backbone", name, list(BACKBONES)))
    if preset not in PRESETS:
        raise UserError(unknown_name("preset", preset, PRESETS))
    return BACKBONES[name](preset=preset, num_features=num_features)
