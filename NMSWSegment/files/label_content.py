"""What a labelmap holds: voxels of every label, and a fingerprint of the voxels that saving and loading does not change."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from NMSWSegment.files.bundle import Label
from NMSWSegment.files.labels import MAX_LABELS


@dataclass(frozen=True)
class LabelContent:
    """Of one labelmap."""

    voxels_by_name: dict[str, int]
    """Labels that are there, in label order."""
    fingerprint: str
    """As `voxels_fingerprint` of the labels that are there, in label order."""


def label_content(array: np.ndarray, *, labels: Sequence[Label]) -> LabelContent:
    """Count the labels of a labelmap (K, J, I) and fingerprint them.

    Raises:
        ValueError: it holds a value that is no label.
    """
    # slice by slice: bincount turns its argument into int64, eight times the labelmap
    counts = sum(np.bincount(plane.ravel(), minlength=MAX_LABELS + 1) for plane in array)
    unknown = set(np.flatnonzero(counts).tolist()) - {0} - {label.value for label in labels}
    if unknown:
        raise ValueError(f"the labelmap holds {sorted(unknown)}, which no label names")
    found = [label for label in labels if counts[label.value]]
    fingerprint = voxels_fingerprint(array, values=[label.value for label in found])
    return LabelContent({label.name: int(counts[label.value]) for label in found}, fingerprint)


def voxels_fingerprint(array: np.ndarray, *, values: Sequence[int]) -> str:
    """Hash of the labelled voxels (K, J, I), whatever integers stand for the labels and however much background surrounds them.

    A segmentation file may crop the background and number its segments anew; the order of the segments stays.

    Args:
        values: the integers of the labels in their order; every other integer counts as background.
    """
    place_of_value = np.zeros(MAX_LABELS + 1, dtype=np.uint8)
    place_of_value[list(values)] = np.arange(1, len(values) + 1)
    rows, columns, planes = np.zeros(array.shape[1], dtype=bool), np.zeros(array.shape[2], dtype=bool), []
    for index, plane in enumerate(array):
        is_labelled = place_of_value[plane] > 0
        in_rows = is_labelled.any(axis=1)
        if in_rows.any():
            planes.append(index)
            rows |= in_rows
            columns |= is_labelled.any(axis=0)
    hasher = hashlib.blake2b(digest_size=16)
    if planes:
        box = tuple(slice(found[0], found[-1] + 1) for found in (np.flatnonzero(rows), np.flatnonzero(columns)))
        hasher.update(repr((planes[-1] - planes[0] + 1, *(part.stop - part.start for part in box))).encode())
        for plane in array[planes[0] : planes[-1] + 1]:
            hasher.update(place_of_value[plane[box]].tobytes())
    return hasher.hexdigest()
