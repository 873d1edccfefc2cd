"""Multiply-accumulate operations of a whole run: of the nets as they are, and in the paper's way of counting."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.nets.backbones import LOCAL_CHANNELS, local_backbone
from NMSWSegment.nets.macs import count_macs, published_macs
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet


@dataclass(frozen=True)
class RunCosts:
    """MACs of one coarse pass and of one patch."""

    coarse: int
    local: int

    def times(self, num_runs: int) -> "RunCosts":
        """Of an ensemble."""
        return RunCosts(coarse=num_runs * self.coarse, local=num_runs * self.local)

    def total(self, windows: int, *, uses_coarse: bool) -> int:
        """MACs of a run with so many patches."""
        return windows * self.local + (self.coarse if uses_coarse else 0)


@dataclass(frozen=True)
class Costs:
    """Both ways of counting."""

    true: RunCosts
    paper: RunCosts
    """Of the published nets where the preset is the paper's, of the same nets else."""


@functools.lru_cache(maxsize=64)
def run_costs(
    architecture: Architecture, *, coarse_shape: tuple[int, int, int], patch_size: tuple[int, int, int], coarse_factor: tuple[int, int, int] = (1, 1, 1)
) -> Costs:
    """What a run costs with nets of an architecture; asked for once a volume and method, worth to be remembered.

    Args:
        coarse_shape: voxels that the coarse net sees, its padding included, KJI.
        patch_size: KJI.
        coarse_factor: KJI; does not matter unless the local net is a cascade's.
    """
    net = NMSWNet(architecture)
    coarse_input, image = (1, 1, *coarse_shape), (1, 1, *patch_size)
    part = (1, architecture.num_classes, *(length // factor for length, factor in zip(patch_size, coarse_factor)))
    inputs = (image, part) if architecture.cascade else (image,)
    true = RunCosts(coarse=count_macs(net.coarse, coarse_input), local=count_macs(net.local, *inputs))
    if architecture.preset != "paper":
        return Costs(true=true, paper=RunCosts(coarse=published_macs(net.coarse, coarse_input), local=published_macs(net.local, *inputs)))
    coarse, local = _published_unet(architecture), _published_local(architecture)
    return Costs(true=true, paper=RunCosts(coarse=published_macs(coarse, coarse_input), local=published_macs(local, image)))


def bundle_costs(manifest: BundleManifest, grid: CandidateGrid) -> Costs | None:
    """What a run of a bundle costs on a volume; None where the manifest does not say how its nets were built.

    The archives themselves cannot be counted: TorchScript takes no hooks.
    """
    if not manifest.architecture:
        return None
    seen = coarse_shape(grid.shape, manifest=manifest)
    costs = run_costs(Architecture(**manifest.architecture), coarse_shape=seen, patch_size=manifest.patch_size, coarse_factor=manifest.coarse_factor)
    return Costs(true=costs.true.times(manifest.num_runs), paper=costs.paper.times(manifest.num_runs))


def coarse_shape(shape: Sequence[int], *, manifest: BundleManifest) -> tuple[int, int, int]:
    """Voxels that the coarse net sees of a volume on the model grid of `shape`, the padding to whole multiples included, KJI."""
    multiple = manifest.coarse_multiple
    lengths = [-(-length // factor) for length, factor in zip(shape, manifest.coarse_factor)]
    return tuple(-(-length // multiple) * multiple for length in lengths)


def _published_local(architecture: Architecture) -> torch.nn.Module:
    """The local net as published, which ends in the classes."""
    if architecture.backbone == "unet":
        return _published_unet(architecture)
    return local_backbone(architecture.backbone, preset="paper", out_channels=architecture.num_classes)


def _published_unet(architecture: Architecture) -> torch.nn.Module:
    """MONAI's UNet with PReLU, its last block as wide as there are classes (ours ends in fewer features, docs/deviations.md, D7)."""
    from monai.networks.nets import UNet

    channels = LOCAL_CHANNELS["paper"]
    return UNet(spatial_dims=3, in_channels=1, out_channels=architecture.num_classes, channels=channels, strides=(2,) * (len(channels) - 1), num_res_units=2)
