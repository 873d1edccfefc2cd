"""The two nets of NMSW and the class weights that mix them (paper section 3).

Both nets end in a log-softmax: Eq. 6 with weights per class is defined up to a shift of each net's logits only then (docs/deviations.md, D18).
"""

import math
from collections.abc import Sequence
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
    cascade: bool = False
    """Whether the local net reads the coarse logits of its patch beside the image."""

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


CASCADE_CLASS_WEIGHT = 3.0
"""c of Eq. 6 at the start of training: the patch counts sigmoid(3) = 0.95."""
VOXELS_AT_ONCE = 1 << 14
"""Of the last, pointwise part of a net where no gradient is wanted, so that its temporary arrays are small beside the logits of many classes."""


@torch.jit.script_if_tracing  # a trace would fix the number of parts
def log_probabilities(features: Tensor, weight: Tensor, bias: Tensor, at_once: int) -> Tensor:
    """log-softmax over the classes (B, C, d, h, w) of what a 1 x 1 convolution makes of features (B, F, d, h, w), float32.

    Without a gradient some slices at a time: of many classes the convolution alone would hold the logits twice, and once more in the layout of its own.
    """
    if torch.is_grad_enabled():
        return torch.log_softmax(torch.nn.functional.conv3d(features, weight, bias).float(), dim=1)
    step = max(1, at_once // (features.size(3) * features.size(4)))
    result = torch.empty([features.size(0), weight.size(0), features.size(2), features.size(3), features.size(4)], device=features.device)
    for start in range(0, features.size(2), step):
        part = torch.nn.functional.conv3d(features[:, :, start : start + step], weight, bias)
        result[:, :, start : start + step] = torch.log_softmax(part.float(), dim=1)
    return result


@torch.jit.script_if_tracing
def expected_gain(features: Tensor, logits: Tensor, weights: list[Tensor], biases: list[Tensor], at_once: int) -> Tensor:
    """The importance map (B, 1, d, h, w): log of the entropy of log-probabilities (B, C, d, h, w), plus the perceptron's correction.

    0.0001 nats are added to the entropy: where the coarse net is sure, importance differs by the correction alone.
    """
    step = logits.size(2)
    if not torch.is_grad_enabled():
        step = max(1, at_once // (logits.size(3) * logits.size(4)))
    parts: list[Tensor] = []
    for start in range(0, logits.size(2), step):
        part = logits[:, :, start : start + step]
        probabilities = part.exp()
        entropy = -(probabilities * part).sum(1, keepdim=True)
        x = torch.cat([features[:, :, start : start + step], probabilities.to(features.dtype)], dim=1)
        for layer in range(len(weights)):
            x = torch.nn.functional.conv3d(x, weights[layer], biases[layer])
            if layer < len(weights) - 1:
                x = torch.nn.functional.leaky_relu(x, 0.01)
        parts.append(torch.log(entropy + 1e-4) + x.float())
    return torch.cat(parts, dim=2)


class CoarseNet(nn.Module):
    """Down-sampled volume -> coarse logits and importance map (f_g and the importance head)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        num_features = NUM_FEATURES[architecture.preset]
        self.backbone = coarse_backbone(preset=architecture.preset)
        self.head = nn.Conv3d(num_features, architecture.num_classes, kernel_size=1)
        self.importance_head = ImportanceHead(num_features + architecture.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, d, h, w) in [0, 1] -> coarse logits, log-probabilities (B, C, d, h, w), and importance map (B, 1, d, h, w)."""
        features = self.backbone(x)
        logits = log_probabilities(features, self.head.weight, self.head.bias, VOXELS_AT_ONCE)
        return logits, self.importance_head(features, logits)

    def without_importance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Like forward, for a loss of the segmentation alone: logits before the log-softmax, which the loss takes itself, and zeros for the importance map."""
        logits = self.head(self.backbone(x))
        return logits, torch.zeros_like(logits[:, :1])


class ImportanceHead(nn.Module):
    """How much a local patch would improve the coarse answer at every coarse voxel, as a logit: the log of the expected gain.

    The log of the coarse answer's entropy, corrected by a multilayer perceptron of 1 x 1 convolutions that sees the coarse net's last features
    and its probabilities. The correction starts at 0, so that an untrained head ranks by entropy.

    Source: paper section 3.2 (a perceptron of four layers); entropy and probabilities are ours (docs/deviations.md, D17).
    """

    WIDTH = 32

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_channels, self.WIDTH, self.WIDTH):
            layers += [nn.Conv3d(width, self.WIDTH, kernel_size=1), nn.LeakyReLU(0.01)]
        last = nn.Conv3d(self.WIDTH, 1, kernel_size=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.perceptron = nn.Sequential(*layers, last)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Features (B, F, d, h, w) and log-probabilities (B, C, d, h, w) -> importance map (B, 1, d, h, w)."""
        layers = [layer for layer in self.perceptron if isinstance(layer, nn.Conv3d)]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return expected_gain(features, logits.detach(), weights, biases, VOXELS_AT_ONCE)  # detached: the coarse answer is no means to move the importance


def upsampled(values: Tensor, *, size: Sequence[int]) -> Tensor:
    """Values (B, C, d, h, w) at another size, as interpolate(mode="trilinear"): a matrix an axis, which a CPU multiplies five times as fast."""
    batch, channels, depth, height, width = values.shape
    to_depth, to_height, to_width = (_interpolation(old, new, like=values) for old, new in zip((depth, height, width), size))
    planes = torch.matmul(to_height, torch.matmul(values, to_width.t()))
    return torch.matmul(to_depth, planes.flatten(3)).reshape(batch, channels, *size)


def _interpolation(old: int, new: int, *, like: Tensor) -> Tensor:
    """The matrix of linear interpolation along an axis, (new, old)."""
    identity = torch.eye(old).type_as(like).float()  # type_as, because a trace would hold a device
    return torch.nn.functional.interpolate(identity[None], size=new, mode="linear")[0].t().to(like.dtype)


class CoarsePrior(nn.Module):
    """What the local net of a cascade takes from the coarse net: its probabilities, in few channels beside the image, and its logits, to which
    the local net's own are added. So an untrained local net gives the coarse answer, and training has to find corrections only.

    Source: the cascade of nnU-Net (Isensee et al. 2021), whose second net reads the first one's labels; logits instead, and their sum, are ours (docs/deviations.md, D22).
    """

    CHANNELS = 15
    """With the image 16, which a processor's vectors hold."""
    LEAST_LOGIT = -10.0
    """A coarse net that is sure and wrong must stay correctable."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Conv3d(num_classes, self.CHANNELS, kernel_size=1)
        self.trust = nn.Parameter(torch.ones(1, num_classes, 1, 1, 1))

    def channels(self, coarse_logits: Tensor, x: Tensor) -> Tensor:
        """The image (B, 1, P, P, P) with the probabilities behind it, (B, 1 + CHANNELS, P, P, P)."""
        embedded = self.embedding(coarse_logits.exp())
        return torch.cat([x.to(embedded.dtype), upsampled(embedded, size=x.shape[2:])], dim=1)

    def added_to(self, logits: Tensor, coarse_logits: Tensor) -> Tensor:
        """Logits (B, C, ...) at any resolution of the patch, on top of the coarse ones."""
        trusted = (coarse_logits.clamp(min=self.LEAST_LOGIT) * self.trust).to(logits.dtype)
        return upsampled(trusted, size=logits.shape[2:]).add_(logits)  # in place: as large as all classes


class LocalNet(nn.Module):
    """Full-resolution patch -> local logits (f_l)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        name, preset, num_classes = architecture.backbone, architecture.preset, architecture.num_classes
        self.prior = CoarsePrior(num_classes) if architecture.cascade else None
        in_channels = 1 + CoarsePrior.CHANNELS if architecture.cascade else 1
        if architecture.fusion_channels:
            self.backbone = e2enet(preset=preset, in_channels=in_channels, out_channels=num_classes, fusion_channels=architecture.fusion_channels)
        else:
            out_channels = num_classes if ends_in_head(name) else NUM_FEATURES[preset]
            self.backbone = local_backbone(name, preset=preset, in_channels=in_channels, out_channels=out_channels)
        self.head = nn.Identity() if ends_in_head(name) else nn.Conv3d(NUM_FEATURES[preset], num_classes, kernel_size=1)

    def forward(self, x: Tensor, coarse_logits: Tensor | None = None) -> Tensor:
        """Patches (B, 1, P, P, P) in [0, 1] and, for a cascade, their coarse logits (B, C, P/r, P/r, P/r) -> local logits, log-probabilities (B, C, P, P, P)."""
        logits = self._with_prior(self.head(self.backbone(self._input(x, coarse_logits))), coarse_logits)
        return torch.log_softmax(logits.float(), dim=1)  # plain operators, which other runtimes take

    def deep_logits(self, x: Tensor, coarse_logits: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits for training, before the log-softmax, which a loss takes itself; for deep supervision also at 1/2, 1/4, ... where the backbone has such heads."""
        seen = self._input(x, coarse_logits)
        deep_logits = self.backbone.deep_logits(seen) if isinstance(self.backbone, E2ENet) else (self.head(self.backbone(seen)),)
        return tuple(self._with_prior(logits, coarse_logits) for logits in deep_logits)

    def _input(self, x: Tensor, coarse_logits: Tensor | None) -> Tensor:
        """What the backbone sees."""
        return x if self.prior is None else self.prior.channels(coarse_logits, x)

    def _with_prior(self, logits: Tensor, coarse_logits: Tensor | None) -> Tensor:
        """A cascade's answer, from what its backbone adds to the coarse one."""
        return logits if self.prior is None else self.prior.added_to(logits, coarse_logits)


class CoarseEnsemble(nn.Module):
    """The coarse nets of several runs as one: the mean of their probabilities, and of the gains that they expect."""

    def __init__(self, nets: Sequence[CoarseNet]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As CoarseNet.forward."""
        logits, importance_map = self.nets[0](x)
        for net in self.nets[1:]:
            more, more_importance = net(x)
            logits, importance_map = torch.logaddexp(logits, more), torch.logaddexp(importance_map, more_importance)
        return logits - math.log(len(self.nets)), importance_map - math.log(len(self.nets))


class LocalEnsemble(nn.Module):
    """The local nets of several runs as one: the mean of their probabilities."""

    def __init__(self, nets: Sequence[LocalNet]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, *inputs: Tensor) -> Tensor:
        """As LocalNet.forward."""
        logits = self.nets[0](*inputs)
        for net in self.nets[1:]:
            logits = torch.logaddexp(logits, net(*inputs))
        return logits - math.log(len(self.nets))


class NMSWNet(nn.Module):
    """Everything that is trained: the coarse net, the local net, and c of Eq. 6."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.coarse = CoarseNet(architecture)
        self.local = LocalNet(architecture)
        # a cascade's local net has heard the coarse one already
        self.class_weights = nn.Parameter(torch.full((architecture.num_classes,), CASCADE_CLASS_WEIGHT if architecture.cascade else 0.0))

    def slice_fusion(self) -> None:
        """Leave out what the masks of a sparse e2enet made superfluous; nothing happens to other nets. Ends the training."""
        if isinstance(self.local.backbone, E2ENet) and not self.architecture.fusion_channels:
            self.local.backbone = without_unused_channels(self.local.backbone)
            self.architecture = replace(self.architecture, fusion_channels=self.local.backbone.fusion_channels)
