"""Where the model looks: the upright grid around a volume at the model's spacing (docs/deviations.md, D10).

Needs no torch, so that the panel can say how much work a volume is before anything is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from NMSWSegment.files.boxes import bounds_after
from NMSWSegment.protocol import UserError

MAX_MODEL_GRID_VOXELS = 1 << 30
GRID_TOLERANCE = 1e-4  # voxels: a volume already on the model's grid stays as it is


@dataclass(frozen=True)
class ModelGrid:
    """Where a tensor on it lies, and which volume it came from."""

    shape: tuple[int, int, int]
    """Voxels before padding, KJI (= S, A, R)."""
    ijk_to_ras: np.ndarray
    """4 x 4; diagonal, because the model grid is upright."""
    source_shape: tuple[int, int, int]
    """Voxels of the volume, KJI."""
    source_ijk_to_ras: np.ndarray
    """4 x 4 of the volume."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Model spacing, KJI."""
        return tuple(float(value) for value in np.diag(self.ijk_to_ras)[2::-1])


def moves_with(ijk_to_ijk: np.ndarray, *, shape: Sequence[int]) -> np.ndarray:
    """Which coordinate (row) changes along which axis i, j, k (column) of a grid, (3, 3) bool; what rounding leaves in direction cosines moves nothing.

    Args:
        ijk_to_ijk: 4 x 4 to the voxels of another grid.
        shape: of the grid, KJI.
    """
    return np.abs(ijk_to_ijk[:3, :3]) * np.array(shape[::-1]) > GRID_TOLERANCE / 10


def model_grid_around(shape: Sequence[int], ijk_to_ras: np.ndarray, *, spacing_mm: Sequence[float]) -> ModelGrid:
    """The smallest upright grid that holds every voxel of a volume, centered on it.

    Args:
        shape: voxels of the volume, KJI.
        ijk_to_ras: 4 x 4 of the volume.
        spacing_mm: model spacing, KJI.

    Raises:
        UserError: the grid would have more than 2^30 voxels.
    """
    low, high = bounds_after(ijk_to_ras, low=-0.5, high=np.array(tuple(shape)[::-1]) - 0.5)
    spacing_ijk = np.array(spacing_mm[::-1], dtype=float)
    counts = np.maximum(np.ceil((high - low) / spacing_ijk - GRID_TOLERANCE), 1).astype(int)
    if np.prod(counts.astype(float)) > MAX_MODEL_GRID_VOXELS:
        size_cm = " x ".join(f"{value / 10:.0f}" for value in high - low)
        raise UserError(
            f"The volume is {size_cm} cm large, which is {np.prod(counts.astype(float)):.2g} voxels for this bundle. Crop it, or check its spacing."
        )
    grid_to_ras = np.diag([*spacing_ijk, 1.0])
    grid_to_ras[:3, 3] = (low + high) / 2 - (counts - 1) / 2 * spacing_ijk
    return ModelGrid(
        shape=tuple(int(count) for count in counts[::-1]),
        ijk_to_ras=grid_to_ras,
        source_shape=tuple(shape),
        source_ijk_to_ras=np.asarray(ijk_to_ras, dtype=np.float64),
    )
