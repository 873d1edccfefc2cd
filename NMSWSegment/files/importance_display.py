"""The importance map as a person wants to see it: smooth, and nothing of it in the air around the body."""

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files.volume import Volume

BODY_HU = -300.0
"""Between lung and fat: what the skin encloses is body, the lungs too."""
SMOOTHING_SIGMA_VOXELS = 1.2
"""Coarse voxels. Less leaves speckles, more hides which organ is meant."""


def importance_for_display(importance: Volume, volume: Volume) -> Volume:
    """Smooth an importance map and clip it to the body.

    Args:
        importance: 0 to 1 on coarse voxels along the world axes, (d, h, w).
        volume: CT in Hounsfield units, in the same coordinates.

    Returns:
        0 to 1 on the same voxels, float32; its highest value is 1 unless all is 0. Where no body is found nothing is clipped.
    """
    is_body = body_mask(importance.shape, ijk_to_ras=importance.ijk_to_ras, volume=volume)
    if not is_body.any():
        is_body[:] = True
    image = sitk.GetImageFromArray(np.where(is_body, importance.array, 0).astype(np.float32))
    smooth = sitk.GetArrayFromImage(sitk.DiscreteGaussian(image, variance=SMOOTHING_SIGMA_VOXELS**2, useImageSpacing=False))
    # What the Gaussian takes over the skin is lost; dividing by its share of the body brings the edge back.
    share = sitk.GetArrayFromImage(
        sitk.DiscreteGaussian(sitk.GetImageFromArray(is_body.astype(np.float32)), variance=SMOOTHING_SIGMA_VOXELS**2, useImageSpacing=False)
    )
    smooth = np.where(is_body, smooth / np.maximum(share, 1e-3), 0).astype(np.float32)
    return Volume(array=smooth / (smooth.max() or 1), ijk_to_ras=importance.ijk_to_ras, name=importance.name)


def body_mask(shape: tuple[int, int, int], *, ijk_to_ras: np.ndarray, volume: Volume) -> np.ndarray:
    """Which voxels of a coarse grid lie in the body, (d, h, w) bool: the largest part of the volume that is denser than lung, with what it encloses in each slice."""
    to_volume_ijk = np.linalg.inv(volume.ijk_to_ras) @ ijk_to_ras
    k, j, i = np.indices(shape, dtype=np.float64).reshape(3, -1)
    ijk = np.rint(to_volume_ijk[:3] @ np.stack([i, j, k, np.ones_like(i)])).astype(np.int64)
    is_inside = (ijk >= 0).all(axis=0) & (ijk < np.array(volume.shape[::-1])[:, None]).all(axis=0)
    is_dense = np.zeros(i.shape, dtype=bool)
    is_dense[is_inside] = volume.array[ijk[2, is_inside], ijk[1, is_inside], ijk[0, is_inside]] > BODY_HU
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(sitk.GetImageFromArray(is_dense.reshape(shape).astype(np.uint8))))
    return _filled(sitk.GetArrayFromImage(parts) == 1)


def _filled(mask: np.ndarray) -> np.ndarray:
    """A mask (d, h, w) with what it encloses in each plane."""
    # A full plane between every two keeps the planes apart, so that one search does for all of them.
    apart = np.zeros((2 * len(mask), *mask.shape[1:]), dtype=np.uint8)
    apart[::2] = ~mask
    holes = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(apart)))[::2]
    edges = np.concatenate([holes[:, 0].ravel(), holes[:, -1].ravel(), holes[:, :, 0].ravel(), holes[:, :, -1].ravel()])
    is_outside = np.zeros(holes.max() + 1, dtype=bool)
    is_outside[edges] = True
    is_outside[0] = False  # the mask itself, where it reaches the edge
    return ~is_outside[holes]
