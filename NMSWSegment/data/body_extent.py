"""Where the body lies in a source, and its landmarks.

Points are source millimetres in the order superior, anterior, right, 0 at the center of the source's first voxel.
"""

from dataclasses import dataclass

from torch import Tensor

from NMSWSegment.files.orientation import Triple_mm

BORDER_TISSUE_SHARE = 0.02
"""A face of a source that holds more tissue than this cuts the body; a box must not show air beyond it."""


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


def _ends_mm(line: Tensor, step_mm: float) -> tuple[float, float] | None:
    """First and last True of a line in millimetres; None when there is none."""
    found = line.nonzero()
    return (float(found[0]) * step_mm, float(found[-1]) * step_mm) if len(found) else None
