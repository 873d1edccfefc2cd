"""The two nets of NMSW and the class weights that mix them (paper section 3)."""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from NMSWSegment.nets.backbones import COARSE_CHANNELS, NUM_FEATURES, coarse_backbone, e2enet, ends_in_head, known_backbone, known_preset, local_backbone
from NMSWSegment.nets.e2enet import E2ENet, without_unused_channels
from NMSWSegment.protocol import UserError


@dataclass(frozen=True)
class Architecture:
    """Enough to build the nets again."""

    num_classes: int
    """C, with background."""
    backbone: str = "unet"
    """Backbone of the local net: unet, mednext, swin_unetr or e2enet."""
    preset: str = "compact"
    """compact or paper."""
    fusion_channels: tuple[str, ...] = ()
    """Of an exported e2enet: the input channels that its fusion convolutions kept (E2ENet.fusion_channels); empty is all."""

    def __post_init__(self) -> None:
        known_backbone(self.backbone)
        known_preset(self.preset)
        object.__setattr__(self, "fusion_channels", tuple(self.fusion_channels))  # JSON knows lists only
        if self.fusion_channels and self.backbone != "e2enet":
            raise UserError(f"The backbone {self.backbone} has no fusion channels, only e2enet has. Leave fusion_channels out.")

    @property
    def coarse_multiple(self) -> int:
        """The coarse net takes sizes that are multiples of this."""
        return 2 ** (len(COARSE_CHANNELS[self.preset]) - 1)

    def to_dict(self) -> dict:
        """A JSON-ready dict."""
        return asdict(self)


class CoarseNet(nn.Module):
    """Down-sampled volume -> coarse logits and importance map (f_g and the importance head)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        num_features = NUM_FEATURES[architecture.preset]
        self.backbone = coarse_backbone(preset=architecture.preset)
        self.head = nn.Conv3d(num_features, architecture.num_classes, kernel_size=1)
        self.importance_head = nn.Conv3d(num_features, 1, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, d, h, w) in [0, 1] -> coarse logits (B, C, d, h, w) and importance map (B, 1, d, h, w)."""
        features = self.backbone(x)
        return self.head(features), self.importance_head(features)


class LocalNet(nn.Module):
    """Full-resolution patch -> local logits (f_l)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        name, preset, num_classes = architecture.backbone, architecture.preset, architecture.num_classes
        if architecture.fusion_channels:
            self.backbone = e2enet(preset=preset, out_channels=num_classes, fusion_channels=architecture.fusion_channels)
        else:
            self.backbone = local_backbone(name, preset=preset, out_channels=num_classes if ends_in_head(name) else NUM_FEATURES[preset])
        self.head = nn.Identity() if ends_in_head(name) else nn.Conv3d(NUM_FEATURES[preset], num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, P, P, P) in [0, 1] -> local logits (B, C, P, P, P)."""
        return self.head(self.backbone(x))

    def deep_logits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits for deep supervision in training, those of forward first, then at 1/2, 1/4, ... where the backbone has such heads."""
        return self.backbone.deep_logits(x) if isinstance(self.backbone, E2ENet) else (self(x),)


class NMSWNet(nn.Module):
    """Everything that is trained: the coarse net, the local net, and c of Eq. 6."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.coarse = CoarseNet(architecture)
        self.local = LocalNet(architecture)
        self.class_weights = nn.Parameter(torch.zeros(architecture.num_classes))

    def slice_fusion(self) -> None:
        """Leave out what the masks of a sparse e2enet made superfluous; nothing happens to other nets. Ends the training."""
        if isinstance(self.local.backbone, E2ENet):
            self.local.backbone = without_unused_channels(self.local.backbone)
            self.architecture = replace(self.architecture, fusion_channels=self.local.backbone.fusion_channels)
