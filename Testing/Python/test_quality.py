"""Quality checks: each trips on its own fault, and a plausible torso trips none."""

from dataclasses import replace

import numpy as np
import pytest

from NMSWSegment.cohort.quality import NOTE, WARNING, norm_sources, quality_checks
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.statistics import structure_statistics
from NMSWSegment.files.volume import Volume

ML = {"liver": 1500, "spleen": 200, "kidney_left": 170, "kidney_right": 160, "lung_left": 2200, "lung_right": 2600, "aorta": 150, "pancreas": 80}
HU = {"liver": 100, "spleen": 110, "kidney_left": 150, "kidney_right": 150, "lung_left": -800, "lung_right": -800, "aorta": 150, "pancreas": 90}
LABELS = coded_labels(list(ML))


def a_case(**changes):
    """Volume of 300 mm and statistics of a plausible torso; changes: structure=dict of fields."""
    volume = Volume(np.linspace(-1000, 1000, 60 * 8 * 8).reshape(60, 8, 8), np.diag([40.0, 40.0, 5.0, 1.0]))
    rows = structure_statistics(Volume(np.zeros(volume.shape, np.uint8), volume.ijk_to_ras), volume, labels=LABELS)
    rows = [replace(row, voxels=1000, volume_ml=float(ML[row.structure]), mean=float(HU[row.structure])) for row in rows]
    return volume, [replace(row, **changes.get(row.structure, {})) for row in rows]


def messages(volume, rows, *, spacing_mm=(3.0, 3.0, 40.0), severity=WARNING, modality="CT"):
    checks = quality_checks(volume, rows, labels=LABELS, modality=modality, spacing_mm=spacing_mm)
    return [check.message for check in checks if check.severity == severity]


def test_plausible_torso_gives_no_warning():
    assert messages(*a_case()) == [] and messages(*a_case(), severity=NOTE) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kidney_left": {"volume_ml": 250.0}, "kidney_right": {"volume_ml": 80.0}}, "The left kidney is 3.1 times the right one (250 and 80 ml)"),
        ({"liver": {"volume_ml": 2500.0}}, "Liver is large: 2500 ml (healthy adults 803 to 2183 ml, Henderson 1981)"),
        ({"spleen": {"volume_ml": 40.0}}, "Spleen is small: 40 ml (healthy adults 107 to 315 ml, Prassopoulos 1997)"),
        ({"lung_left": {"mean": -200.0}}, "Unusual HU: left lung has a mean of -200 (expected -950 to -400)"),
        (
            {"liver": {"at_border": True, "border_faces": "anterior inferior right", "volume_ml": 100.0}, "aorta": {"at_border": True, "border_faces": "left"}},
            "Cut at the side of the field of view: liver (anterior, right)",
        ),
    ],
)
def test_fault_gives_one_warning(changes, message):
    assert messages(*a_case(**changes)) == [message]


def test_end_of_the_scan_through_an_organ_is_a_note():
    case = a_case(liver={"at_border": True, "border_faces": "inferior", "volume_ml": 100.0}, kidney_left={"volume_ml": 12.0}, kidney_right={"volume_ml": 40.0})
    assert [message for message in messages(*case) if "kidney is small" not in message] == []
    assert messages(*case, severity=NOTE) == ["Reaches the end of the scan: liver (inferior)"]


def test_structures_that_are_not_there_are_a_note_and_nothing_at_all_is_a_warning():
    assert messages(*a_case(pancreas={"voxels": 0}), severity=NOTE) == ["Not found: pancreas"]
    volume, rows = a_case()
    assert messages(volume, [replace(row, voxels=0) for row in rows]) == ["No structure was found at all"]


def test_short_scan_wide_spacing_and_shifted_values_are_warned_of():
    volume, rows = a_case()
    short = Volume(volume.array[:8], volume.ijk_to_ras)
    assert messages(short, rows) == ["The scan is only 40 mm long from head to foot"]
    assert messages(volume, rows, spacing_mm=(3.0, 3.0, 3.0)) == ["Voxels are 40.0 mm apart; the model works at 3.0 mm"]
    shifted = Volume(volume.array + 1024, volume.ijk_to_ras)
    assert messages(shifted, rows) == ["No voxel is as dark as air (minimum 24): the values may not be HU; 1024 may have to be subtracted"]
    assert messages(shifted, rows, modality="MR") == []


def test_every_norm_names_a_publication():
    from NMSWSegment.cohort.quality import _norms

    assert {norm["source"] for norm in _norms()["volumes"].values()} == set(norm_sources())
    assert all(norm["low_ml"] < norm["high_ml"] for norm in _norms()["volumes"].values())
