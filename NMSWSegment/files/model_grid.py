"""Where the model looks: the upright frame of a volume at the model's spacing.

Needs no torch, so that the panel can say how much work a volume is before anything is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from NMSWSegment.protocol import UserError

MAX_CANONICAL_VOXELS = 1 << 30
GRID_TOLERANCE = 1e-4  # voxels: a volume already on the model's grid stays as it is


@dataclass(frozen=True)
class CanonicalFrame:
    """Where a canonical tensor lies, and which volume it came from."""

    shape: tuple[int, int, int]
    """Voxels before padding, KJI (= S, A, R)."""
    ijk_to_ras: np.ndarray
    """4 x 4; diagonal, because the frame is upright."""
    source_shape: tuple[int, int, int]
    """Voxels of the volume, KJI."""
    source_ijk_to_ras: np.ndarray
    """4 x 4 of the volume."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Model spacing, KJI."""
        return tuple(float(value) for value in np.diag(self.ijk_to_ras)[2::-1])


def canonical_frame(shape: Sequence[int], ijk_to_ras: np.ndarray, *, spacing_mm: Sequence[float]) -> CanonicalFrame:
    """The smallest upright frame that holds every voxel of a volume, centered on it.

    Args:
        shape: voxels of the volume, KJI.
        ijk_to_ras: 4 x 4 of the volume.
        spacing_mm: model spacing, KJI.

    Raises:
        UserError: the frame would have more than 2^30 voxels.
    """
    far = np.array(tuple(shape)[::-1]) - 0.5
    corners = np.array([[i, j, k, 1] for i in (-0.5, far[0]) for j in (-0.5, far[1]) for k in (-0.5, far[2])])
    points_ras = (ijk_to_ras @ corners.T)[:3]
    low, high = points_ras.min(1), points_ras.max(1)
    spacing_ijk = np.array(spacing_mm[::-1], dtype=float)
    counts = np.maximum(np.ceil((high - low) / spacing_ijk - GRID_TOLERANCE), 1).astype(int)
    if np.prod(counts.astype(float)) > MAX_CANONICAL_VOXELS:
        size_cm = " x ".join(f"{value / 10:.0f}" for value in high - low)
        raise UserError(f"The volume is {size_cm} cm large, which is {np.prod(counts.astype(float)):.2g} voxels for this bundle. Crop it, or check its spacing.")
    frame_to_ras = np.diag([*spacing_ijk, 1.0])
    frame_to_ras[:3, 3] = (low + high) / 2 - (counts - 1) / 2 * spacing_ijk
    return CanonicalFrame(
        shape=tuple(int(count) for count in counts[::-1]),
        ijk_to_ras=frame_to_ras,
        source_shape=tuple(shape),
        source_ijk_to_ras=np.asarray(ijk_to_ras, dtype=np.float64),
    )
