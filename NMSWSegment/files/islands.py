"""Small islands of a structure that lie apart from it: found and removed."""

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files.boxes import label_boxes


def remove_islands(labels: np.ndarray, *, min_voxels: float = 0.0, min_share: float = 0.0) -> None:
    """Turn into background, in place, the connected parts of a structure that are small; its largest part always stays.

    Voxels are connected through their faces.

    Args:
        labels: (D, H, W) uint8, 0 is background.
        min_voxels: parts with fewer voxels are small.
        min_share: parts that are smaller than this share of the largest part of their structure are small, too; as in nnU-Net, the
            training's validation says whether a model is better off without them (training/calibration.py).
    """
    for value, box in label_boxes(labels).items():
        parts = sitk.ConnectedComponent(sitk.GetImageFromArray((labels[box] == value).view(np.uint8)))
        numbers = sitk.GetArrayViewFromImage(parts)
        num_parts = int(numbers.max())
        # Slice by slice, because numpy counts and looks up in eight bytes a voxel.
        sizes = sum(np.bincount(one.ravel(), minlength=num_parts + 1) for one in numbers)
        sizes[0] = 0  # what is not of the structure
        largest = int(sizes.argmax())
        is_small = sizes < max(min_voxels, min_share * sizes[largest])
        is_small[[0, largest]] = False
        if is_small.any():
            for inside, one in zip(labels[box], numbers):
                inside[is_small[one]] = 0
