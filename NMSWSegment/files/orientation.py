"""Array axes turned to superior, anterior, right (S-A-R), without resampling."""

from pathlib import Path

import numpy as np

from NMSWSegment.files.volume import Volume, read_volume

Triple = tuple[float, float, float]
Triple_mm = tuple[float, float, float]


def read_sar(path: Path) -> tuple[np.ndarray, Triple_mm, np.ndarray]:
    """Read a volume and turn its axes to S-A-R without resampling.

    Returns:
        The array (S, A, R), its spacing in that order, and its own ijk_to_ras (before turning), to compare geometries.
    """
    volume = read_volume(path)
    array, spacing_mm, _ = to_sar(volume)
    return array, spacing_mm, volume.ijk_to_ras


def to_sar(volume: Volume) -> tuple[np.ndarray, Triple_mm, tuple[Triple, Triple, Triple]]:
    """Permute and flip the array axes so that they grow to superior, anterior and right as nearly as they can.

    Returns:
        The array, its spacing, and what is left of an oblique volume's rotation: rows are superior, anterior and right of the world, columns the
        array's axes, the entries cosines; the identity unless the volume is oblique.
    """
    directions = volume.ijk_to_ras[:3, :3] / np.linalg.norm(volume.ijk_to_ras[:3, :3], axis=0)
    order = nearest_axes(np.abs(directions))  # order[world axis] = index axis, both ijk = RAS
    array = volume.array.transpose([2 - order[world] for world in (2, 1, 0)])
    flips = tuple(position for position, world in enumerate((2, 1, 0)) if directions[world, order[world]] < 0)
    spacing_ijk = volume.spacing_mm[::-1]
    signs = [np.sign(directions[world, order[world]]) for world in (2, 1, 0)]
    rows = [tuple(float(directions[world, order[along]] * sign) for along, sign in zip((2, 1, 0), signs)) for world in (2, 1, 0)]
    return np.ascontiguousarray(np.flip(array, flips)), tuple(spacing_ijk[order[world]] for world in (2, 1, 0)), tuple(rows)


def nearest_axes(cosines: np.ndarray) -> list[int]:
    """For each world axis the index axis that runs along it most; every index axis is used once."""
    order, cosines = [0, 0, 0], cosines.copy()
    for _ in range(3):
        world, axis = np.unravel_index(np.argmax(cosines), cosines.shape)
        order[world] = int(axis)
        cosines[world, :] = cosines[:, axis] = -1
    return order
