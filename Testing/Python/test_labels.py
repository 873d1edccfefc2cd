"""labels: codes and colors for label names."""

import json

import pytest

from NMSWSegment.files.bundle import Code
from NMSWSegment.files.labels import ANATOMY_PATH, MAX_LABELS, coded_labels, codes_of_terminology
from NMSWSegment.protocol import UserError

TORSO = (
    "lung_right lung_left heart aorta liver spleen kidney_right kidney_left stomach gallbladder pancreas small_bowel colon urinary_bladder esophagus "
    "trachea vertebrae ribs sternum sacrum hip_right hip_left femur_right femur_left"
).split()


def test_coded_labels_torso_all_coded_in_order_with_distinct_colors():
    labels = coded_labels(TORSO)

    assert [label.value for label in labels] == list(range(1, 25))
    assert [label.name for label in labels] == TORSO
    assert {label.category.meaning for label in labels} == {"Anatomical Structure"}
    assert len({label.color for label in labels}) == 24
    assert {label.name: label.type.value for label in labels if label.name in ("liver", "spleen", "aorta")} == {
        "liver": "10200004",
        "spleen": "78961009",
        "aorta": "15825003",
    }


@pytest.mark.parametrize("name", ["kidney_left", "left_kidney", "Kidney_L", "left kidney", "LEFT-KIDNEY"])
def test_coded_labels_side_in_any_spelling_becomes_the_modifier(name):
    (label,) = coded_labels([name])

    assert label.name == name
    assert (label.type.value, label.modifier.value, label.modifier.meaning) == ("64033007", "7771000", "Left")


@pytest.mark.parametrize(
    ("name", "value", "side"),
    [
        ("Head_of_femur_R", "2812003", "Right"),
        ("rib_left_3", "25888004", "Left"),
        ("heart_atrium_left", "82471001", None),
        ("lung_middle_lobe_right", "72481006", None),
        ("vertebrae_T12", "23215003", None),
        ("postcava", "64131007", None),
    ],
)
def test_coded_labels_names_of_other_data_sets(name, value, side):
    (label,) = coded_labels([name])

    assert label.type.value == value
    assert (label.modifier.meaning if label.modifier else None) == side


def test_coded_labels_unknown_structures_get_the_generic_code_and_their_own_colors():
    names = [f"thing_{number}" for number in range(60)] + TORSO

    labels = coded_labels(names)

    assert (labels[0].category.meaning, labels[0].type.value, labels[0].modifier) == ("Tissue", "113343008", None)
    assert len({label.color for label in labels}) == len(names)
    assert labels == coded_labels(names)


def test_coded_labels_terminology_of_a_sided_organ_is_slicers_entry():
    (label,) = coded_labels(["lung_right"])

    assert label.terminology == (
        "Segmentation category and type - DICOM master list~SCT^123037004^Anatomical Structure~SCT^39607008^Lung~SCT^24028007^Right"
        "~Anatomic codes - DICOM master list~^^~^^"
    )


def test_codes_of_terminology_are_those_of_the_label_and_generic_where_an_entry_is_empty():
    for label in coded_labels(["lung_right", "liver", "gizmo"]):
        assert codes_of_terminology(label.terminology) == (label.category, label.type, label.modifier)
    generic = (Code("SCT", "85756007", "Tissue"), Code("SCT", "113343008", "Organ"), None)
    assert codes_of_terminology("") == generic
    assert codes_of_terminology("Segmentation category and type~^^~^^~^^~Anatomic codes~^^~^^") == generic


@pytest.mark.parametrize(
    ("names", "fix"),
    [(["liver", "liver"], "its own name"), (["liver", " "], "Give every label a name"), ([f"l{number}" for number in range(MAX_LABELS + 1)], "two bundles")],
)
def test_coded_labels_impossible_names_say_what_to_do(names, fix):
    with pytest.raises(UserError, match=fix):
        coded_labels(names)


def test_anatomy_table_is_well_formed():
    content = json.loads(ANATOMY_PATH.read_text(encoding="utf-8"))
    for name, structure in content["structures"].items():
        assert structure["value"].isdigit() and 6 <= len(structure["value"]) <= 9, name
        assert structure["meaning"], name
        assert len(structure["color"]) == 3 and all(0 <= channel <= 255 for channel in structure["color"]), name
    assert set(content["aliases"].values()) <= set(content["structures"])
    assert not set(content["aliases"]) & set(content["structures"])
