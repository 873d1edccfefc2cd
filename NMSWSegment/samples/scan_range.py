"""Which part of a body a sample shows: landmarks of a source, and random boxes like those of real scans.

Points are source millimetres in the order superior, anterior, right, 0 at the center of the source's first voxel.
"""

import torch
from torch import Tensor

from NMSWSegment.data.body_extent import BodyExtent
from NMSWSegment.samples.warp import chance, uniform

# protocols: share of the scans, (landmark, its end, extra mm) of the lower and the upper limit; None is the source's own end
PROTOCOLS = (
    (0.20, ("lung", "low", -40.0), ("lung", "high", 35.0)),
    (0.20, ("hip", "high", -60.0), ("liver", "high", 30.0)),
    (0.20, ("hip", "low", -30.0), ("liver", "high", 30.0)),
    (0.07, ("hip", "low", -50.0), ("hip", "high", 30.0)),
    (0.18, None, None),
)  # fmt: skip
RANGE_JITTER_MM = 25.0
SLAB_SHARE = 0.1
"""Of the scans, those that show a slab of SLAB_MM or more and less than the shortest range."""
SLAB_MM = 40.0


def random_box(extent: BodyExtent, *, min_range_mm: float, generator: torch.Generator) -> Tensor:
    """A random scan of a body, (2, 3) start and stop in source millimetres.

    Along superior a typical protocol, a random range or everything, never beyond the source; in plane tight, with a margin of
    air, or cropped, with air only where the source is not cut.
    """
    start, stop = _random_range(extent, min_range_mm, generator)
    box = torch.tensor([[start, 0.0, 0.0], [stop, 0.0, 0.0]])
    kind = uniform(generator, 0, 1)
    widest = uniform(generator, 30, 90)
    for axis in (1, 2):
        for end in (0, 1):
            margin = uniform(generator, 3, 35) if kind < 0.6 else uniform(generator, 0.3, 1) * widest if kind < 0.85 else uniform(generator, -45, 15)
            if (axis, end) == (1, 0) and kind < 0.85:
                margin += uniform(generator, 0, 50)  # the table lies behind the back
            if extent.is_cut[axis - 1][end]:
                margin = min(margin, -5.0)
            box[end, axis] = extent.in_plane_mm[axis - 1][end] + (margin if end else -margin)
    return box


def _random_range(extent: BodyExtent, min_range_mm: float, generator: torch.Generator) -> tuple[float, float]:
    """Start and stop along superior, inside the source."""
    length = extent.size_mm[0]
    shortest = min(min_range_mm, length)
    if chance(generator, SLAB_SHARE):
        size = uniform(generator, min(SLAB_MM, shortest), shortest)
        start = uniform(generator, 0, length - size)
        return start, start + size
    choice, lower, upper = uniform(generator, 0, 1), None, None
    jitter = [uniform(generator, -RANGE_JITTER_MM, RANGE_JITTER_MM) for _ in range(2)]
    for share, lower, upper in PROTOCOLS:
        choice -= share
        if choice < 0:
            break
    wanted = _limits_mm(extent, lower, upper)
    if choice >= 0 or wanted is None:
        size = uniform(generator, shortest, length)
        start = uniform(generator, 0, length - size)
        return start, start + size
    start, stop = (min(max(value + shift, 0.0), length) for value, shift in zip(wanted, jitter))
    if stop - start < shortest:
        middle = min(max((start + stop) / 2, shortest / 2), length - shortest / 2)
        start, stop = middle - shortest / 2, middle + shortest / 2
    return start, stop


def _limits_mm(extent: BodyExtent, lower: tuple[str, str, float] | None, upper: tuple[str, str, float] | None) -> tuple[float, float] | None:
    """The limits of a protocol in this body; None when a landmark is missing."""
    limits = []
    for limit, own_end in ((lower, 0.0), (upper, extent.size_mm[0])):
        if limit is None:
            limits.append(own_end)
        elif limit[0] in extent.landmarks_mm:
            limits.append(extent.landmarks_mm[limit[0]][limit[1] == "high"] + limit[2])
        else:
            return None
    return limits[0], limits[1]
