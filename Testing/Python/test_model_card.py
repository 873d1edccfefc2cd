"""The model card says what stands in the manifest."""

from dataclasses import replace

from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.training.model_card import model_card

SCORES = {
    "one": {
        "0": {"mean": 0.4444, "seconds": 1.0, "candidates": 27, "dsc": {"liver": 0.25, "spleen": 0.75}},
        "all": {"mean": 0.9, "seconds": 2.0, "candidates": 27, "dsc": {"liver": 0.8, "spleen": 1.0}},
    },
    "two": {"5": {"mean": 0.5, "seconds": 1.0, "candidates": 12, "dsc": {"liver": 0.5}}},
}


def a_card(folder, **changes) -> list[str]:
    return model_card(replace(load_bundle(folder).manifest, **changes)).splitlines()


def test_card_has_one_table_of_scores_per_case(a_tiny_bundle):
    lines = a_card(a_tiny_bundle, scores=SCORES)
    start = lines.index("Case `one`, DSC by number of patches k (of 27 candidates), on the case's own grid:")
    assert lines[start + 2 : start + 7] == [
        "| structure | k = 0 | k = all |",
        "|---|---|---|",
        "| liver | 0.250 | 0.800 |",
        "| spleen | 0.750 | 1.000 |",
        "| **mean** | **0.444** | **0.900** |",
    ]
    assert "| **mean** | **0.500** |" in lines[lines.index("Case `two`, DSC by number of patches k (of 12 candidates), on the case's own grid:") :]


def test_card_shows_a_dash_for_a_case_that_shows_none_of_the_classes(a_tiny_bundle):
    nothing = {"0": {"mean": None, "candidates": 8, "dsc": {}}, "all": {"mean": None, "candidates": 8, "dsc": {}}}
    assert "| **mean** | **-** | **-** |" in a_card(a_tiny_bundle, scores={"empty": nothing})


def test_card_without_scores_says_that_none_were_measured(a_tiny_bundle):
    lines = a_card(a_tiny_bundle)
    assert lines[lines.index("## Held-out scores") + 2] == "None were measured."


def test_card_lists_structures_class_weights_and_attributions(a_tiny_bundle):
    lines = a_card(
        a_tiny_bundle,
        class_weights=(0.0, -1.5, 2.25, 3.0),
        attributions=("Data A, CC BY 4.0", "Data B"),
        training={"trained_on": "Two scans.", "iterations": 1700, "program": "X 1"},
    )
    assert "- Structures (3): liver, spleen, vertebrae" in lines
    start = lines.index("| background | 0.00 |")
    assert lines[start + 1 : start + 4] == ["| liver | -1.50 |", "| spleen | 2.25 |", "| vertebrae | 3.00 |"]
    assert lines[-2:] == ["- Data A, CC BY 4.0", "- Data B"]
    assert "Two scans." in lines and any(line.startswith("1700 iterations with X 1") for line in lines)


def test_card_says_research_and_geometry(a_tiny_bundle):
    lines = a_card(a_tiny_bundle, spacing_mm=(5.0, 2.5, 1.0), patch_size=(16, 32, 48))
    assert lines[0] == "# Tiny" and "**A research model. Not for clinical use.**" in lines
    assert any("model spacing 5 x 2.5 x 1 mm (S, A, R); patch 16 x 32 x 48 voxels, overlap 0.5" in line for line in lines)


def test_card_shows_the_picture_that_lies_beside_it(a_tiny_bundle):
    manifest = load_bundle(a_tiny_bundle).manifest
    assert "](overlay.png)" in model_card(manifest, has_picture=True)
    assert "overlay.png" not in model_card(manifest)
