"""Agreement of two labelmaps on the same grid: overlap (DSC) and surfaces (NSD, HD95).

Voxels of reference 255 are unknown and take part in nothing. A class that the reference does not hold is nan in every metric,
whatever was predicted; a class that is there and was missed altogether has DSC 0, NSD 0 and HD95 infinity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from NMSWSegment.data.training_sample import UNKNOWN_LABEL

TOLERANCE_MM = 2.0
TOLERANCE_VOXELS = 2.0
"""Of the model's grid; the setting of the paper."""
HAUSDORFF_PERCENT = 95


@dataclass(frozen=True)
class SurfaceScores:
    """Of every class, (num_classes,) float64; background is nan."""

    nsd_mm: np.ndarray
    """Share of both surfaces that lies within TOLERANCE_MM of the other one."""
    nsd_voxels: np.ndarray
    """The same within TOLERANCE_VOXELS."""
    hd95_mm: np.ndarray
    """The larger of the two directed 95th percentiles of the surface distance."""


def dice_per_class(predicted: np.ndarray, reference: np.ndarray, *, num_classes: int) -> np.ndarray:
    """DSC of every class, (num_classes,) float64.

    Voxels of reference 255 count for nothing. A class that the reference does not hold is nan, whatever was predicted.
    """
    known = reference != UNKNOWN_LABEL
    pairs = np.bincount(predicted[known].astype(np.int64) * num_classes + reference[known], minlength=num_classes**2).reshape(num_classes, num_classes)
    overlap, predicted_sizes, reference_sizes = np.diag(pairs), pairs.sum(1), pairs.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(reference_sizes > 0, 2 * overlap / (predicted_sizes + reference_sizes), np.nan)


def surface_scores(
    predicted: np.ndarray, reference: np.ndarray, *, num_classes: int, spacing_mm: Sequence[float], spacing_voxels: Sequence[float]
) -> SurfaceScores:
    """NSD and HD95 of every class.

    Args:
        predicted, reference: labels on one grid, (K, J, I).
        spacing_mm: KJI.
        spacing_voxels: step along each axis in voxels of the model's grid, KJI (model_steps gives it).

    Source: Nikolov et al., arXiv:1809.04430; surfaces by voxels as in MONAI's compute_surface_dice and compute_hausdorff_distance, which
    give the same numbers (tested) but know no unknown voxels and need SciPy.
    """
    nsd_mm, nsd_voxels, hd95_mm = (np.full(num_classes, np.nan) for _ in range(3))
    ratios = np.array(spacing_mm) / np.array(spacing_voxels)
    for value in range(1, num_classes):
        distances_mm = surface_distances(predicted, reference, value=value, spacing=spacing_mm)
        if distances_mm is None:
            continue
        if np.allclose(ratios, ratios[0], rtol=1e-6):  # an isotropic model grid: one distance map does for both
            distances_voxels = tuple(distances / ratios[0] for distances in distances_mm)
        else:
            distances_voxels = surface_distances(predicted, reference, value=value, spacing=spacing_voxels)
        nsd_mm[value] = _share_within(distances_mm, TOLERANCE_MM)
        nsd_voxels[value] = _share_within(distances_voxels, TOLERANCE_VOXELS)
        hd95_mm[value] = max(_percentile(distances) for distances in distances_mm if len(distances))
    return SurfaceScores(nsd_mm=nsd_mm, nsd_voxels=nsd_voxels, hd95_mm=hd95_mm)


def surface_distances(predicted: np.ndarray, reference: np.ndarray, *, value: int, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray] | None:
    """How far each surface voxel of one labelmap is from the surface of the other, in the unit of the spacing.

    A surface voxel is one with a face towards another class or the border of the volume. One that touches an unknown voxel is not
    counted, because nobody knows whether the surface is there; others may still find it near.

    Returns:
        Distances of the predicted surface voxels and of those of the reference, infinite where the other surface is missing. None where
        the reference does not hold the class, or nothing of either surface counts.
    """
    box = _bounding_box(reference == value, (predicted == value) & (reference != UNKNOWN_LABEL))
    if box is None:
        return None
    is_unknown = reference[box] == UNKNOWN_LABEL
    counts = ~_grown(is_unknown)
    surfaces = [_surface((labels[box] == value) & ~is_unknown) for labels in (predicted, reference)]
    distances = tuple(_distance_map(other, spacing)[surface & counts] for surface, other in zip(surfaces, surfaces[::-1]))
    return distances if any(map(len, distances)) else None


def model_steps(ijk_to_ras: np.ndarray, *, model_spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Length of a step along each axis of a volume in voxels of the model's upright grid, KJI.

    Args:
        ijk_to_ras: 4 x 4 of the volume.
        model_spacing_mm: KJI (= S, A, R).

    Distances along these steps are exact where the volume is upright or the model's grid isotropic.
    """
    steps_ras = ijk_to_ras[:3, :3] / np.array(model_spacing_mm[::-1], dtype=float)[:, None]
    return tuple(float(length) for length in np.linalg.norm(steps_ras, axis=0)[::-1])  # ijk -> KJI


def _share_within(distances: tuple[np.ndarray, np.ndarray], tolerance: float) -> float:
    """Share of all surface voxels whose distance is at most the tolerance."""
    together = np.concatenate(distances)
    return float(np.count_nonzero(together <= tolerance * (1 + 1e-6)) / len(together))  # float32 maps: 2 mm may come as 2.0000001


def _percentile(distances: np.ndarray) -> float:
    """The 95th percentile; NumPy's own is nan for infinite distances, which come all together or not at all."""
    return float(np.percentile(distances, HAUSDORFF_PERCENT)) if np.isfinite(distances).all() else np.inf


def _bounding_box(reference: np.ndarray, predicted: np.ndarray) -> tuple[slice, ...] | None:
    """The box of both masks and one voxel around it; None where the reference is empty."""
    if not reference.any():
        return None
    is_either = reference | predicted
    box = []
    for axis in range(3):
        found = np.flatnonzero(is_either.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(max(int(found[0]) - 1, 0), int(found[-1]) + 2))
    return tuple(box)


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a face towards the outside; beyond the array is outside."""
    return mask & ~_neighbors_all(mask, beyond=False)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and everything that shares a face with it."""
    return ~_neighbors_all(~mask, beyond=True)


def _neighbors_all(mask: np.ndarray, *, beyond: bool) -> np.ndarray:
    """Where a voxel and its six neighbors are all in the mask."""
    padded = np.pad(mask, 1, constant_values=beyond)
    inner = (slice(1, -1),) * 3
    result = mask.copy()
    for axis in range(3):
        for shifted in (slice(0, -2), slice(2, None)):
            result &= padded[(*inner[:axis], shifted, *inner[axis + 1 :])]
    return result


def _distance_map(surface: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance of every voxel to the nearest voxel of a surface; infinite where there is none."""
    if not surface.any():
        return np.full(surface.shape, np.inf, dtype=np.float32)
    image = sitk.GetImageFromArray(surface.astype(np.uint8))
    image.SetSpacing([float(step) for step in spacing[::-1]])  # KJI -> ijk
    signed = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
    return np.maximum(sitk.GetArrayFromImage(signed), 0)  # negative inside corners that are thicker than one voxel
