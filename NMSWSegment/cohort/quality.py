"""What a user should look at in a result: scan range, intensities, organs at the edge, odd volumes and sides.

The norms are in Resources/Norms/adult.json, with their sources. A check that is passed leaves no trace.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from NMSWSegment.files.bundle import Label
from NMSWSegment.files.resources import resources_folder
from NMSWSegment.files.statistics import StructureStatistics
from NMSWSegment.files.volume import Volume

NORMS_PATH = resources_folder() / "Norms" / "adult.json"
WARNING, NOTE = "warning", "note"
SHORT_SCAN_MM = 100.0
"""Less than half of the torso's organs are whole in a shorter scan."""
DARKEST_OF_NO_AIR_HU = -300.0
"""Fat has about -100 HU; a volume without darker voxels shows neither air around the body nor lungs."""
COARSE_SPACING = 2.0
"""Times the spacing of the model."""
_WHOLE_ORGANS = ("lung", "heart", "liver", "spleen", "kidney", "stomach", "gallbladder", "pancreas", "urinary_bladder")
"""Organs that end inside the body, so that an edge through them means a part is missing. Vessels, bowel, bones and muscles often leave a scan."""
_SIDE_FACES, _END_FACES = {"left", "right", "anterior", "posterior"}, {"inferior", "superior"}


@dataclass(frozen=True)
class QualityCheck:
    """A check that a result did not pass."""

    kind: str
    """range, spacing, intensity, border, missing, volume or sides."""
    severity: str
    """WARNING is to be looked at; NOTE is only said."""
    message: str


def quality_checks(
    volume: Volume, statistics: Sequence[StructureStatistics], *, labels: Sequence[Label], modality: str, spacing_mm: Sequence[float]
) -> tuple[QualityCheck, ...]:
    """The checks that a result did not pass, warnings first.

    Args:
        volume: intensities, (K, J, I).
        statistics: of the result.
        labels: its structures.
        modality: of the model; intensities are checked for CT only.
        spacing_mm: of the model, KJI.
    """
    titles = {label.name: label.title for label in labels}
    present = {row.structure: row for row in statistics if row.voxels}
    checks = [*_scan_checks(volume, spacing_mm=spacing_mm)]
    if not present:
        checks.append(QualityCheck("missing", WARNING, "No structure was found at all"))
    if modality == "CT":
        checks += [*_intensity_checks(volume, present, titles=titles)]
    checks += [*_border_checks(present, titles=titles), *_volume_checks(present, titles=titles), *_side_checks(present)]
    missing = [titles[row.structure] for row in statistics if not row.voxels]
    if missing and present:
        checks.append(QualityCheck("missing", NOTE, f"Not found: {', '.join(missing)}"))
    return tuple(sorted(checks, key=lambda check: check.severity != WARNING))


def norm_sources() -> dict[str, str]:
    """The publications behind the norms of volumes, by short name."""
    return dict(_norms()["sources"])


@functools.lru_cache(maxsize=1)
def _norms() -> dict:
    """The file of norms."""
    return json.loads(NORMS_PATH.read_text(encoding="utf-8"))


def _scan_checks(volume: Volume, *, spacing_mm: Sequence[float]):
    """Length from head to foot, and spacing."""
    length_mm = float(np.abs(volume.ijk_to_ras[2, :3]) @ np.array(volume.shape[::-1]))
    if length_mm < SHORT_SCAN_MM:
        yield QualityCheck("range", WARNING, f"The scan is only {length_mm:.0f} mm long from head to foot")
    widest_mm = max(volume.spacing_mm)
    if widest_mm > COARSE_SPACING * max(spacing_mm):
        yield QualityCheck("spacing", WARNING, f"Voxels are {widest_mm:.1f} mm apart; the model works at {max(spacing_mm):.1f} mm")


def _intensity_checks(volume: Volume, present: dict[str, StructureStatistics], *, titles: dict[str, str]):
    """Whether the values can be HU, in the whole volume and in the structures."""
    darkest = float(volume.array.min())
    if darkest >= DARKEST_OF_NO_AIR_HU:
        hint = "; 1024 may have to be subtracted" if darkest >= 0 else ""
        yield QualityCheck("intensity", WARNING, f"No voxel is as dark as air (minimum {darkest:.0f}): the values may not be HU{hint}")
    for name, row in present.items():
        low, high = _by_base_name(_norms()["intensity"]["hu"], name) or (-np.inf, np.inf)
        if not low <= row.mean <= high:
            yield QualityCheck("intensity", WARNING, f"Unusual HU: {titles[name]} has a mean of {row.mean:.0f} (expected {low} to {high})")


def _border_checks(present: dict[str, StructureStatistics], *, titles: dict[str, str]):
    """Organs that the edge of the volume cuts: at its side the field of view is too narrow; above and below every scan ends somewhere."""
    organs = {name: set(row.border_faces.split()) for name, row in present.items() if row.at_border and _base_name(name) in _WHOLE_ORGANS}
    for severity, words, faces in ((WARNING, "Cut at the side of the field of view", _SIDE_FACES), (NOTE, "Reaches the end of the scan", _END_FACES)):
        cut = [f"{titles[name]} ({', '.join(sorted(found & faces))})" for name, found in organs.items() if found & faces]
        if cut:
            yield QualityCheck("border", severity, f"{words}: {', '.join(cut)}")


def _volume_checks(present: dict[str, StructureStatistics], *, titles: dict[str, str]):
    """Whole organs outside the range of healthy adults."""
    for name, norm in _norms()["volumes"].items():
        row = present.get(name)
        # The volume of an organ that is cut says nothing.
        if row is not None and not row.at_border and not norm["low_ml"] <= row.volume_ml <= norm["high_ml"]:
            size = "small" if row.volume_ml < norm["low_ml"] else "large"
            expected = f"healthy adults {norm['low_ml']} to {norm['high_ml']} ml, {norm['source']}"
            yield QualityCheck("volume", WARNING, f"{titles[name].capitalize()} is {size}: {row.volume_ml:.0f} ml ({expected})")


def _side_checks(present: dict[str, StructureStatistics]):
    """Left and right of very different size; a pair of which only crumbs are in the scan says nothing."""
    for base, pair in _norms()["pairs"].items():
        rows = {side: present.get(f"{base}_{side}") for side in ("left", "right")}
        if None in rows.values() or any(row.at_border for row in rows.values()):
            continue
        larger, smaller = sorted(rows, key=lambda side: -rows[side].volume_ml)
        ratio = rows[larger].volume_ml / rows[smaller].volume_ml
        if ratio > pair["ratio"] and rows[larger].volume_ml >= pair["min_ml"]:
            yield QualityCheck(
                "sides",
                WARNING,
                f"The {larger} {base} is {ratio:.1f} times the {smaller} one ({rows[larger].volume_ml:.0f} and {rows[smaller].volume_ml:.0f} ml)",
            )


def _base_name(name: str) -> str:
    """'kidney' for kidney_left."""
    return name.removesuffix("_left").removesuffix("_right")


def _by_base_name(table: dict, name: str):
    """The entry of a structure or of its pair; None if there is none."""
    return table.get(name, table.get(_base_name(name)))
