"""Small islands of a structure that lie apart from it: found and removed."""

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files.volume import Volume


def without_islands(labelmap: Volume, *, min_ml: float) -> Volume:
    """A labelmap without the connected parts of a structure that are smaller than `min_ml`; the largest part always stays.

    Voxels are connected through their faces. Removed voxels become background.

    Args:
        labelmap: labels, (K, J, I) uint8; not changed.
    """
    array = labelmap.array.copy()
    min_voxels = min_ml * 1000 / float(np.prod(labelmap.spacing_mm))
    boxes = sitk.LabelShapeStatisticsImageFilter()
    boxes.ComputePerimeterOff()  # only the boxes are needed
    boxes.Execute(sitk.GetImageFromArray(labelmap.array))
    for value in boxes.GetLabels():
        first, size = boxes.GetBoundingBox(value)[:3], boxes.GetBoundingBox(value)[3:]
        box = tuple(slice(start, start + length) for start, length in zip(first[::-1], size[::-1]))
        is_inside = (labelmap.array[box] == value).astype(np.uint8)
        parts = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(sitk.GetImageFromArray(is_inside))))  # 1 is the largest
        is_small = np.bincount(parts.ravel()) < min_voxels
        is_small[:2] = False
        array[box][is_small[parts]] = 0
    return Volume(array=array, ijk_to_ras=labelmap.ijk_to_ras, name=labelmap.name)
