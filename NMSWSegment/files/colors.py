"""Colors that mean the same everywhere: in the application, in the preview and in files."""

import numpy as np

RANK_COLORS = np.array([(255, 230, 60), (255, 140, 40), (230, 60, 130), (150, 90, 230)]) / 255
"""From the first patch to the last: yellow to violet, each bright enough on a dark volume."""


def rank_color(rank: int, *, count: int) -> tuple[float, float, float]:
    """Color of the patch of rank 1..count; red, green, blue in 0..1."""
    place = (rank - 1) / max(count - 1, 1) * (len(RANK_COLORS) - 1)
    anchors = np.arange(len(RANK_COLORS))
    return tuple(round(float(np.interp(place, anchors, channel)), 4) for channel in RANK_COLORS.T)
