"""Agreement of two labelmaps on the same grid."""

import numpy as np

from NMSWSegment.training.losses import UNKNOWN_LABEL


def dice_per_class(predicted: np.ndarray, reference: np.ndarray, *, num_classes: int) -> np.ndarray:
    """DSC of every class, (num_classes,) float64.

    Voxels of reference 255 count for nothing. A class that the reference does not hold is nan, whatever was predicted.
    """
    known = reference != UNKNOWN_LABEL
    pairs = np.bincount(predicted[known].astype(np.int64) * num_classes + reference[known], minlength=num_classes**2).reshape(num_classes, num_classes)
    overlap, predicted_sizes, reference_sizes = np.diag(pairs), pairs.sum(1), pairs.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(reference_sizes > 0, 2 * overlap / (predicted_sizes + reference_sizes), np.nan)
