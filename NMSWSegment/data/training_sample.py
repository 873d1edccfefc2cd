"""What a net learns from: one volume with its labels, wherever they come from."""

from dataclasses import dataclass

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
