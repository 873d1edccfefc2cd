"""Synthetic volumes with exact labels, defined in the world, so that any grid samples the same body.

Used by the tests and by whoever wants to try a bundle without patient data.
"""

from collections.abc import Sequence

import numpy as np

from NMSWSegment.files.volume import Volume

BODY_HU = 40.0
AIR_HU = -1000.0
BODY_RADII_MM = (150.0, 100.0, 160.0)
ORGANS = {  # name: (center RAS mm, radii RAS mm, HU); asymmetric in every direction
    "liver": ((70.0, 20.0, 30.0), (55.0, 50.0, 45.0), 160.0),
    "spleen": ((-85.0, -30.0, 45.0), (30.0, 35.0, 40.0), 280.0),
    "vertebrae": ((0.0, -60.0, 0.0), (25.0, 25.0, 140.0), 700.0),
}


def upright_ijk_to_ras(spacing_mm: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """4 x 4 of an upright RAS grid centered on the world's origin; spacing and shape KJI."""
    ijk_to_ras = np.diag([*spacing_mm[::-1], 1.0])
    ijk_to_ras[:3, 3] = -np.array(spacing_mm[::-1]) * (np.array(shape[::-1]) - 1) / 2
    return ijk_to_ras


def phantom(shape: Sequence[int], *, ijk_to_ras: np.ndarray) -> tuple[Volume, np.ndarray]:
    """A torso-like body of ellipsoids: liver right and front, spleen left and back, spine behind.

    Args:
        shape: voxels, KJI.

    Returns:
        The volume (float32, HU) and its labels (K, J, I) uint8: 0 background, 1 liver, 2 spleen, 3 vertebrae.
    """
    k, j, i = np.meshgrid(*[np.arange(length) for length in shape], indexing="ij")
    points_ras = np.stack([i, j, k], axis=-1) @ ijk_to_ras[:3, :3].T + ijk_to_ras[:3, 3]
    intensity = np.where(_inside(points_ras, (0.0, 0.0, 0.0), BODY_RADII_MM), BODY_HU, AIR_HU).astype(np.float32)
    labels = np.zeros(shape, dtype=np.uint8)
    for value, (center, radii, hu) in enumerate(ORGANS.values(), start=1):
        is_organ = _inside(points_ras, center, radii)
        intensity[is_organ] = hu
        labels[is_organ] = value
    return Volume(array=intensity, ijk_to_ras=np.asarray(ijk_to_ras, dtype=np.float64), name="phantom"), labels


def _inside(points_ras: np.ndarray, center: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Which points lie in an ellipsoid along the world axes."""
    return (((points_ras - np.array(center)) / np.array(radii)) ** 2).sum(-1) <= 1
