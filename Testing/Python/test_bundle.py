"""Bundles: what is refused, with the way out, and names for people and for Slicer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import NMSWSegment.bundle as bundle_module
from NMSWSegment.bundle import BundleManifest, Code, Label, list_bundles, load_bundle
from NMSWSegment.labels import coded_labels
from NMSWSegment.protocol import UserError


def manifest_values(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def a_copy(a_tiny_bundle, tmp_path) -> Path:
    """A bundle that a test may damage."""
    return shutil.copytree(a_tiny_bundle, tmp_path / "copy")


def test_manifest_comes_back_from_json_unchanged(a_tiny_bundle):
    manifest = replace(
        load_bundle(a_tiny_bundle).manifest,
        labels=coded_labels(["kidney_left", "kidney_right", "something_else"]),
        training={"iterations": 3},
        scores={"case": {"0": {"mean": 0.5}}},
        attributions=("a", "b"),
    )
    assert BundleManifest.from_dict(json.loads(manifest.to_json())) == manifest


def test_manifest_counts_background_as_a_class(a_tiny_bundle):
    manifest = load_bundle(a_tiny_bundle).manifest
    assert manifest.num_classes == 4 and manifest.label_names == ["liver", "spleen", "vertebrae"]
    assert [label.value for label in manifest.labels] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"spacing": [1, 1, 1]}, "Did you mean 'spacing_mm'"),
        ({"format_version": 2}, "Update NMSWSegment or export the bundle again"),
        ({"class_weights": [0.0, 0.0]}, "2 class weights for 4 classes. Export the bundle again"),
        ({"intensity_points": [[0, 0, 1]]}, "incomplete or malformed.*Export the bundle again"),
        ({"patch_size": 16}, "incomplete or malformed.*Export the bundle again"),
    ],
)
def test_manifest_with_a_bad_value_says_what_to_do(a_tiny_bundle, change, fix):
    with pytest.raises(UserError, match=fix):
        BundleManifest.from_dict(manifest_values(a_tiny_bundle) | change)


@pytest.mark.parametrize("key", ["labels", "spacing_mm", "sha256", "architecture", "name"])
def test_manifest_without_a_key_names_it(a_tiny_bundle, key):
    values = manifest_values(a_tiny_bundle)
    del values[key]
    with pytest.raises(UserError, match=f"{key}.*Export the bundle again"):
        BundleManifest.from_dict(values)


@pytest.mark.parametrize(("change", "fix"), [({"colour": [1, 2, 3]}, "Did you mean 'color'"), ({"type": {"scheme": "SCT"}}, "Export the bundle again")])
def test_manifest_with_a_bad_label_says_what_to_do(a_tiny_bundle, change, fix):
    values = manifest_values(a_tiny_bundle)
    values["labels"][1] |= change
    with pytest.raises(UserError, match=fix):
        BundleManifest.from_dict(values)


def test_load_gives_the_folder_and_the_hash_of_the_manifest(a_copy):
    bundle = load_bundle(a_copy)
    assert bundle.folder == a_copy.resolve() and bundle.coarse_path.is_file() and bundle.local_path.is_file()
    assert bundle.sha256 == bundle_module.file_sha256(a_copy / "manifest.json")


def test_load_changed_file_is_refused_by_name(a_copy):
    archive = a_copy / "local.pt"
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"'local\.pt' of bundle 'tiny' was changed.*Install the bundle again"):
        load_bundle(a_copy)


def test_load_missing_file_is_refused_by_name(a_copy):
    (a_copy / "coarse.pt").unlink()
    with pytest.raises(UserError, match=r"lacks the file 'coarse\.pt'. Install the bundle again"):
        load_bundle(a_copy)


def test_load_broken_manifest_says_so(a_copy):
    (a_copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON.*Install the bundle again"):
        load_bundle(a_copy)


def test_load_folder_without_manifest_says_which_folder_to_give(tmp_path):
    with pytest.raises(UserError, match="is not a bundle.*Give the folder that 'nmsw export' wrote"):
        load_bundle(tmp_path)


def test_load_by_name_finds_installed_bundles_and_lists_them(a_tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "BUNDLES_FOLDER", tmp_path)
    for name in ("torso-b", "torso-a"):
        shutil.copytree(a_tiny_bundle, tmp_path / name)
    (tmp_path / "no-bundle").mkdir()
    assert list_bundles(tmp_path) == ["torso-a", "torso-b"]
    assert load_bundle("torso-b").folder == (tmp_path / "torso-b").resolve()
    with pytest.raises(UserError, match="Did you mean 'torso-.'.*Choose from: torso-a, torso-b.*A folder that 'nmsw export' wrote works too"):
        load_bundle("torso-c")


def test_list_without_any_bundle_is_empty(tmp_path):
    assert list_bundles(tmp_path / "nothing") == []


@pytest.mark.parametrize(("name", "title"), [("kidney_right", "right kidney"), ("lung_upper_lobe_left", "left lung upper lobe"), ("liver", "liver"), ("left_atrium", "left atrium")])
def test_label_title_is_for_a_person(name, title):
    assert replace(coded_labels(["liver"])[0], name=name).title == title


def test_label_terminology_is_what_slicer_writes():
    organ, kidney, right = Code("SCT", "123037004", "Anatomical Structure"), Code("SCT", "64033007", "Kidney"), Code("SCT", "24028007", "Right")
    label = Label(value=1, name="kidney_right", color=(1, 2, 3), category=organ, type=kidney, modifier=right)
    start = "Segmentation category and type - DICOM master list~SCT^123037004^Anatomical Structure~SCT^64033007^Kidney~"
    end = "~Anatomic codes - DICOM master list~^^~^^"
    assert label.terminology == f"{start}SCT^24028007^Right{end}"
    assert replace(label, modifier=None).terminology == f"{start}^^{end}"
