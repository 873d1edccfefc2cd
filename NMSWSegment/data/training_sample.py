"""What a net learns from: one volume with its labels, wherever they come from."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

UNKNOWN_LABEL = 255
"""Label of voxels whose class nobody knows; they take part in no loss and no score."""


@dataclass(frozen=True)
class TrainingSample:
    """One training volume in the model grid, before intensity is mapped to [0, 1]."""

    name: str
    """Where it comes from."""
    intensity: Tensor
    """In units of the run's normalization, HU where it is fixed, (D, H, W) float32."""
    labels: Tensor
    """0..C-1 or 255 for unknown, (D, H, W) uint8."""

    def to(self, device: torch.device) -> "TrainingSample":
        """The same on a device."""
        return replace(self, intensity=self.intensity.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> "TrainingSample":
        """The same in memory that a GPU fetches by itself; a DataLoader asks for it."""
        return replace(self, intensity=self.intensity.pin_memory(), labels=self.labels.pin_memory())
