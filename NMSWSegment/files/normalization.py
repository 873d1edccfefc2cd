"""What the positions of a manifest's intensity_points are counted in, so that volumes without absolute units can be mapped too.

    fixed         the volume's own values, HU for CT
    percentiles   0 is the 0.5th and 1 the 99.5th percentile of the volume's foreground
    zscore        standard deviations of the foreground from its mean

The foreground of a volume, whatever its padding and its share of air: without voxels that are no number, or as large as FLT_MAX; without all
voxels of the lowest value that is left, the padding; and of the rest those above a tenth of the way from its 0.1th to its 99.9th percentile.
At most MAX_VOXELS are looked at, every n-th along each axis from both ends, so that flipped and permuted axes give the same numbers.
Another unit or offset of the intensities changes nothing. Training and inference both look at the whole volume before it is resampled.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from NMSWSegment.protocol import UserError

FIXED, PERCENTILES, ZSCORE = NORMALIZATIONS = ("fixed", "percentiles", "zscore")
PERCENTILE_ENDS = (0.5, 99.5)
MAX_VOXELS = 1 << 22
LARGEST = 1e30
"""Larger values are no intensities but a mark, such as -FLT_MAX."""
RANGE_PERCENTILES = (0.1, 99.9)
BACKGROUND_SHARE = 0.1
"""Of the range between these percentiles. Source: air in MR has a few percent of the signal of fat; there is no standard value."""

Values = TypeVar("Values")


@dataclass(frozen=True)
class IntensityScale:
    """Where 0 lies among the intensities of a volume, and how far 1 is from it."""

    offset: float = 0.0
    unit: float = 1.0

    def normalized(self, intensity: Values) -> Values:
        """Intensities of the volume in units of the normalization; the same object where they are the same."""
        return intensity if self == IntensityScale() else (intensity - self.offset) / self.unit

    def own(self, value: float) -> float:
        """The inverse for one number."""
        return self.offset + self.unit * value


def intensity_scale(array: np.ndarray, normalization: str) -> IntensityScale:
    """The scale of a volume, (K, J, I) of any dtype.

    Raises:
        UserError: the foreground has one intensity only.
    """
    if normalization == FIXED:
        return IntensityScale()
    voxels = foreground(array)
    if not len(voxels) or voxels[0] == voxels[-1]:
        raise UserError("The volume has too few different intensities to normalize them. Choose a volume that is not a mask and not uniform.")
    if normalization == ZSCORE:
        return IntensityScale(float(voxels.mean()), float(voxels.std()))
    low, high = np.percentile(voxels, PERCENTILE_ENDS)
    return IntensityScale(float(low), float(high - low))


def foreground(array: np.ndarray) -> np.ndarray:
    """Intensities of the foreground, rising, (n,) float64; empty where all are the same."""
    step = int(np.ceil((array.size / MAX_VOXELS) ** (1 / 3)))
    from_one_end = [np.arange(0, (length + 1) // 2, step) for length in array.shape]
    along = [np.union1d(index, length - 1 - index) for index, length in zip(from_one_end, array.shape)]
    voxels = array[np.ix_(*along)].astype(np.float64).ravel()
    voxels = np.sort(voxels[np.abs(voxels) < LARGEST])  # sorted, so that sums do not depend on the order of the axes
    voxels = voxels[voxels > voxels[:1]] if len(voxels) else voxels
    if not len(voxels):
        return voxels
    low, high = np.percentile(voxels, RANGE_PERCENTILES)
    return voxels[voxels >= low + BACKGROUND_SHARE * (high - low)]
