"""The two nets of NMSW and the class weights that mix them (paper section 3)."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from NMSWSegment.nets.backbones import COARSE_CHANNELS, NUM_FEATURES, coarse_backbone, local_backbone


@dataclass(frozen=True)
class Architecture:
    """Enough to build the nets again."""

    num_classes: int
    """C, with background."""
    backbone: str = "unet"
    """Backbone of the local net."""
    preset: str = "compact"
    """compact or paper."""

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
        self.backbone = local_backbone(architecture.backbone, preset=architecture.preset)
        self.head = nn.Conv3d(NUM_FEATURES[architecture.preset], architecture.num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, P, P, P) in [0, 1] -> local logits (B, C, P, P, P)."""
        return self.head(self.backbone(x))


class NMSWNet(nn.Module):
    """Everything that is trained: the coarse net, the local net, and c of Eq. 6."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.coarse = CoarseNet(architecture)
        self.local = LocalNet(architecture)
        self.class_weights = nn.Parameter(torch.zeros(architecture.num_classes))
