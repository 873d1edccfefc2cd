"""Which part of a body a sample shows: landmarks of a source, and random boxes like those of real scans.

Points are source millimetres in the order superior, anterior, right, 0 at the center of the source's first voxel.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.training.warp import Triple_mm, uniform
from NMSWSegment.volume import Volume, read_volume

BORDER_TISSUE_SHARE = 0.02
"""A face of a source that holds more tissue than this cuts the body; a box must not show air beyond it."""

# protocols: share of the scans, (landmark, its end, extra mm) of the lower and the upper limit; None is the source's own end
PROTOCOLS = (
    (0.20, ("lung", "low", -40.0), ("lung", "high", 35.0)),
    (0.20, ("hip", "high", -60.0), ("liver", "high", 30.0)),
    (0.20, ("hip", "low", -30.0), ("liver", "high", 30.0)),
    (0.07, ("hip", "low", -50.0), ("hip", "high", 30.0)),
    (0.18, None, None),
)  # fmt: skip
RANGE_JITTER_MM = 25.0


@dataclass(frozen=True)
class BodyExtent:
    """Where the body lies in a source."""

    size_mm: Triple_mm
    """Last voxel center of the source, S-A-R; the first is at 0."""
    in_plane_mm: tuple[tuple[float, float], tuple[float, float]]
    """Lowest and highest point of the body along anterior and right."""
    is_cut: tuple[tuple[bool, bool], tuple[bool, bool]]
    """Whether the source ends inside the body there."""
    landmarks_mm: dict[str, tuple[float, float]]
    """Lowest and highest point along superior of lung, liver and hip, where they exist."""


def read_canonical(path: Path) -> tuple[np.ndarray, Triple_mm, np.ndarray]:
    """Read a volume and turn its axes to S-A-R without resampling.

    Returns:
        The array (S, A, R), its spacing in that order, and its own ijk_to_ras (before turning), to compare geometries.
    """
    volume = read_volume(path)
    array, spacing_mm = to_sar(volume)
    return array, spacing_mm, volume.ijk_to_ras


def to_sar(volume: Volume) -> tuple[np.ndarray, Triple_mm]:
    """Permute and flip the array axes so that they grow to superior, anterior and right as nearly as they can."""
    directions = volume.ijk_to_ras[:3, :3] / np.linalg.norm(volume.ijk_to_ras[:3, :3], axis=0)
    order = _nearest_axes(np.abs(directions))  # order[world axis] = index axis, both ijk = RAS
    array = volume.array.transpose([2 - order[world] for world in (2, 1, 0)])
    flips = tuple(position for position, world in enumerate((2, 1, 0)) if directions[world, order[world]] < 0)
    spacing_ijk = volume.spacing_mm[::-1]
    return np.ascontiguousarray(np.flip(array, flips)), tuple(spacing_ijk[order[world]] for world in (2, 1, 0))


def measure_body(body: Tensor, landmarks: dict[str, Tensor], *, spacing_mm: Triple_mm) -> BodyExtent:
    """Extent of a body and its landmarks.

    Args:
        body: where the body is, (D, H, W) bool, S-A-R; an empty one counts as filling the source.
        landmarks: by name, whether a slice holds the landmark, (D) bool; absent ones may be left out or all False.
        spacing_mm: source spacing, KJI.
    """
    silhouettes = (body.any(dim=0).any(dim=1), body.any(dim=0).any(dim=0))
    in_plane = tuple(_ends_mm(line, step) or (0.0, (len(line) - 1) * step) for line, step in zip(silhouettes, spacing_mm[1:]))
    faces = ((body[:, 0], body[:, -1]), (body[:, :, 0], body[:, :, -1]))
    is_cut = tuple(tuple(float(face.float().mean()) > BORDER_TISSUE_SHARE for face in pair) for pair in faces)
    found = {name: _ends_mm(line, spacing_mm[0]) for name, line in landmarks.items()}
    size = tuple((count - 1) * step for count, step in zip(body.shape, spacing_mm))
    return BodyExtent(size_mm=size, in_plane_mm=in_plane, is_cut=is_cut, landmarks_mm={name: ends for name, ends in found.items() if ends})


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


def _ends_mm(line: Tensor, step_mm: float) -> tuple[float, float] | None:
    """First and last True of a line in millimetres; None when there is none."""
    found = line.nonzero()
    return (float(found[0]) * step_mm, float(found[-1]) * step_mm) if len(found) else None


def _nearest_axes(cosines: np.ndarray) -> list[int]:
    """For each world axis the index axis that runs along it most; every index axis is used once."""
    order, cosines = [0, 0, 0], cosines.copy()
    for _ in range(3):
        world, axis = np.unravel_index(np.argmax(cosines), cosines.shape)
        order[world] = int(axis)
        cosines[world, :] = cosines[:, axis] = -1
    return order
