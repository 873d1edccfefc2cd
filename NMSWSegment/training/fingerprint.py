"""What the cases of a data set look like: voxels and size from the headers of all, classes and their HU from a sample."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from NMSWSegment.data.case_cache import label_voxels
from NMSWSegment.data.prepared_case import PreparedCase
from NMSWSegment.data.training_sample import UNKNOWN_LABEL
from NMSWSegment.files.orientation import nearest_axes
from NMSWSegment.training.label_checks import label_warnings

SAMPLED_CASES, SAMPLED_S = 20, 30.0
"""At most so many cases are read, and no further one after so many seconds."""
SAMPLED_VOXELS = 10_000
"""Of a class in a case."""
PERCENTILES = (0.5, 50.0, 99.5)
"""As in nnU-Net's fingerprint."""


@dataclass(frozen=True)
class ClassFacts:
    """One class in the cases that were read."""

    num_cases: int
    """How many hold it."""
    median_ml: float
    """Volume in those; nan where there are none."""
    percentiles_hu: tuple[float, ...]
    """PERCENTILES of its intensities, every case with the same weight; nan where there are none."""


@dataclass(frozen=True)
class Fingerprint:
    """What a sample of cases holds."""

    classes: tuple[ClassFacts, ...]
    """In label order without background."""
    label_voxels: tuple[tuple[str, dict[int, int]], ...]
    """Name of every case that was read, and the voxels of every label in it."""


def read_fingerprint(cases: Sequence[tuple[str, Callable[[], PreparedCase]]], *, num_classes: int, clock: Callable[[], float] = time.monotonic) -> Fingerprint:
    """Read some cases, the same ones at every call as far as the time allows.

    Args:
        cases: name, and what reads the case.
        num_classes: with background.
    """
    generator = np.random.default_rng(0)
    started, counted = clock(), []
    volumes_ml: list[list[float]] = [[] for _ in range(num_classes)]
    samples_hu: list[list[np.ndarray]] = [[] for _ in range(num_classes)]
    for number in generator.permutation(len(cases))[:SAMPLED_CASES]:
        if counted and clock() - started > SAMPLED_S:
            break
        name, read = cases[number]
        case = read()
        counts = label_voxels(case.labels)
        counted.append((name, counts))
        voxel_ml = float(np.prod(case.spacing_mm)) / 1000
        for value in set(counts) - {0, UNKNOWN_LABEL}:
            volumes_ml[value].append(counts[value] * voxel_ml)
            samples_hu[value].append(generator.choice(case.intensity[case.labels == value], SAMPLED_VOXELS).astype(np.float32))
    classes = tuple(
        ClassFacts(
            num_cases=len(volumes),
            median_ml=float(np.median(volumes)) if volumes else np.nan,
            percentiles_hu=tuple(np.percentile(np.concatenate(samples), PERCENTILES).tolist()) if samples else (np.nan,) * len(PERCENTILES),
        )
        for volumes, samples in zip(volumes_ml[1:], samples_hu[1:])
    )
    return Fingerprint(classes=classes, label_voxels=tuple(counted))


def fingerprint_lines(fingerprint: Fingerprint, *, label_names: Sequence[str], num_cases: int, anatomy_labels: set[int]) -> Iterator[str]:
    """A line a class, and what is odd about the labels of the cases that were read.

    Args:
        num_cases: that there are.

    Raises:
        UserError: a case has no known label.
    """
    num_read = len(fingerprint.label_voxels)
    yield f"Classes in {num_read} of {num_cases} cases: cases, median volume in ml, {' / '.join(f'{percent:g}' for percent in PERCENTILES)} % of the HU"
    width = max(map(len, label_names))
    for name, facts in zip(label_names, fingerprint.classes):
        percentiles = " / ".join(f"{value:.0f}" for value in facts.percentiles_hu)
        yield f"            {name:{width}}  {facts.num_cases:4d}" + (f"  {facts.median_ml:10.1f}  {percentiles}" if facts.num_cases else "")
    some = "" if num_read == num_cases else " (of those that were read)"
    for warning in label_warnings(fingerprint.label_voxels, anatomy_labels=anatomy_labels, label_names=label_names):
        yield f"Warning     {warning}{some}"


def geometry_lines(grids: Sequence[tuple[tuple[int, ...], np.ndarray]]) -> Iterator[str]:
    """Voxel size and number of voxels along superior, anterior, right.

    Args:
        grids: shape (KJI) and 4 x 4 of every case; of ijk to RAS or to LPS, because signs do not matter.
    """
    placed = [_along_world(*grid) for grid in grids]
    for title, values, unit in (("Spacing", [spacing for spacing, _ in placed], "mm"), ("Size", [shape for _, shape in placed], "voxels")):
        low, middle, high = (_times(function(values, axis=0)) for function in (np.min, np.median, np.max))
        yield f"{title:<12}median {middle} {unit} (S x A x R), from {low} to {high}"


def _along_world(shape: tuple[int, ...], matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spacing in mm and number of voxels along superior, anterior, right, as nearly as the axes run so."""
    spacing_ijk = np.linalg.norm(matrix[:3, :3], axis=0)
    order = nearest_axes(np.abs(matrix[:3, :3] / spacing_ijk))[::-1]
    return spacing_ijk[order], np.array(shape[::-1])[order]


def _times(values: np.ndarray) -> str:
    """'1.5 x 0.78 x 0.78'."""
    return " x ".join(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values)
