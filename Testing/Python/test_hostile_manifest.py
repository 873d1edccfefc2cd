"""Manifests that somebody wrote by hand, or that want to do harm: every one is refused with the key, and none hides the other models."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from NMSWSegment.__main__ import main
from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.files.bundle import BundleManifest, file_sha256, load_bundle
from NMSWSegment.protocol import SegmentOptions, UserError

WRONG_TYPES = [None, True, "text", "", 3.7, -1, 0, float("nan"), float("inf"), 10**400, [], {}, [[]], [None], {"a": 1}, [1, 2], ["a", "b", "c"], [1, 2, True]]
TEXT_KEYS = {"title", "description", "backbone", "license", "modality", "name"}

CHANGES = {
    "label 0": ("labels.0.value", 0, r"labels\[0\].value"),
    "label twice": ("labels.1.value", 1, r"labels\[1\].value' of the bundle manifest is 1, but must be 2"),
    "label 300": ("labels.2.value", 300, r"labels\[2\].value"),
    "label true": ("labels.0.value", True, r"labels\[0\].value"),
    "label without a name": ("labels.0.name", " ", r"labels\[0\].name"),
    "label name twice": ("labels.1.name", "liver", r"labels\[1\].name.*another name"),
    "label name a number": ("labels.1.name", 5, r"labels\[1\].name"),
    "color of two": ("labels.0.color", [1, 2], r"labels\[0\].color"),
    "color too bright": ("labels.0.color", [1, 2, 256], r"labels\[0\].color\[2\]"),
    "color of text": ("labels.0.color", "red", r"labels\[0\].color"),
    "code without meaning": ("labels.0.type", {"scheme": "SCT", "value": "1"}, r"labels\[0\].type.*lacks 'meaning'"),
    "code of a number": ("labels.0.type.value", 1, r"labels\[0\].type.value"),
    "code with more": ("labels.0.type.color", 1, "Unknown key in a code of the bundle manifest 'color'"),
    "spacing -3": ("spacing_mm", [3, 3, -3], r"spacing_mm\[2\]"),
    "spacing 0": ("spacing_mm", [0, 3, 3], r"spacing_mm\[0\]"),
    "spacing nan": ("spacing_mm", [3, float("nan"), 3], r"spacing_mm\[1\]"),
    "spacing of two": ("spacing_mm", [3, 3], "spacing_mm"),
    "spacing of text": ("spacing_mm", "333", "spacing_mm"),
    "nan weights": ("class_weights.1", float("nan"), r"class_weights\[1\]"),
    "text weights": ("class_weights.1", "1", r"class_weights\[1\]"),
    "infinite weights": ("class_weights.1", float("inf"), r"class_weights\[1\]"),
    "too few weights": ("class_weights", [1.0], "1 class weights for 4 classes"),
    "overlap .99": ("overlap", 0.99, "'overlap'.*from 0 to 0.9"),
    "overlap 1": ("overlap", 1, "'overlap'"),
    "overlap -1": ("overlap", -1, "'overlap'"),
    "overlap that does not divide": ("overlap", 0.3, "'overlap'.*whole part of a patch"),
    "patch 0": ("patch_size", [16, 16, 0], r"patch_size\[2\]"),
    "patch of a fraction": ("patch_size", [16, 16, 16.5], r"patch_size\[2\]"),
    "patch too large": ("patch_size", [4096, 4096, 4096], "patch_size"),
    "factor 0": ("coarse_factor", [2, 0, 2], r"coarse_factor\[1\]"),
    "factor of a fraction": ("coarse_factor", [2, 2, 1.5], r"coarse_factor\[2\]"),
    "multiple 0": ("coarse_multiple", 0, "coarse_multiple"),
    "one intensity": ("intensity_points", [[0, 0]], "intensity_points"),
    "intensities that fall": ("intensity_points", [[10, 0], [0, 1]], "intensity_points.*rise"),
    "intensities that stay": ("intensity_points", [[10, 0], [10, 1]], "intensity_points.*rise"),
    "intensity nan": ("intensity_points", [[float("nan"), 0], [0, 1]], "intensity_points"),
    "value above 1": ("intensity_points", [[0, 0], [10, 2]], "intensity_points.*0 to 1"),
    "hash of text": ("sha256", "abc", "sha256"),
    "hash of a number": ("sha256", {"coarse.pt": 1, "local.pt": 2}, "sha256.coarse.pt"),
    "scores without mean": ("scores", {"case": {"10": {"seconds": 1}}}, "scores.case.10.*lacks 'mean'"),
    "scores of text": ("scores", {"case": {"10": {"mean": "high"}}}, "scores.case.10.mean"),
    "scores of a list": ("scores", {"case": [1, 2]}, "scores.case"),
    "attributions of a text": ("attributions", "one", "attributions"),
    "architecture of a text": ("architecture", "unet", "architecture"),
    "preset of a number": ("architecture", {"preset": 3}, "architecture.preset"),
    "ensemble of nothing": ("num_runs", 0, "num_runs.*whole number from 1"),
    "auto that never begins": ("auto_gain", 1.5, "auto_gain.*from 0 to 1"),
    "islands larger than the structure": ("min_island_share", 1.5, "min_island_share.*from 0 to 1"),
    "cascade that is a word": ("architecture", {"cascade": "yes"}, "architecture.cascade.*true or false"),
    "normalization of tomorrow": ("normalization", "histogram", "normalization.*one of fixed, percentiles, zscore"),
    "format of a list": ("format_version", [1], "format"),
}


def values_of(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


def changed(values: dict, place: str, value: object) -> dict:
    """The values with one place changed: 'labels.0.name'."""
    values = copy.deepcopy(values)
    *path, last = place.split(".")
    target = values
    for key in path:
        target = target[int(key) if isinstance(target, list) else key]
    target[int(last) if isinstance(target, list) else last] = value
    return values


@pytest.mark.parametrize("symptom", CHANGES)
def test_manifest_is_refused_with(a_tiny_bundle, tally, symptom):
    place, value, sentence = CHANGES[symptom]
    error = tally(lambda: BundleManifest.from_dict(changed(values_of(a_tiny_bundle), place, value)))
    assert isinstance(error, UserError), "it was accepted"
    with pytest.raises(UserError, match=sentence):
        raise error


def test_every_key_of_a_wrong_type_is_refused_by_name(a_tiny_bundle, tally):
    values = values_of(a_tiny_bundle)
    for key in values:
        for wrong in WRONG_TYPES:
            error = tally(lambda key=key, wrong=wrong: BundleManifest.from_dict({**values, key: wrong}))
            if isinstance(error, UserError):
                assert key in str(error) or key == "format_version" or "class weights" in str(error)
            else:
                # what is right: a text where a text is meant, an empty object, a number within the range
                assert (
                    (key in TEXT_KEYS and isinstance(wrong, str))
                    or (key in ("training", "architecture", "sha256", "scores") and isinstance(wrong, dict))
                    or (key in ("overlap", "auto_gain", "min_island_share") and wrong == 0 and wrong is not False)
                    or (key == "importance_has_entropy" and wrong is True)
                    or (key == "attributions" and isinstance(wrong, list))
                    or (key == "format_version" and wrong is True)
                ), (key, wrong)


def test_every_missing_key_is_named(a_tiny_bundle, tally):
    values = values_of(a_tiny_bundle)
    for key in set(values) - {
        "importance_has_entropy",
        "normalization",
        "num_runs",
        "auto_gain",
        "min_island_share",
        "training",
        "scores",
        "license",
        "attributions",
        "format_version",
    }:
        error = tally(lambda key=key: BundleManifest.from_dict({name: value for name, value in values.items() if name != key}))
        assert f"'{key}'" in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"text"', "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "\x00" * 10, '{"name": NaN}'])
def test_manifest_that_is_no_object_is_refused(a_tiny_bundle, tmp_path, tally, text):
    folder = shutil.copytree(a_tiny_bundle, tmp_path / "bundle")
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    assert isinstance(tally(lambda: load_bundle(folder)), UserError)


def test_manifest_that_is_no_text_is_refused(a_tiny_bundle, tmp_path, tally):
    folder = shutil.copytree(a_tiny_bundle, tmp_path / "bundle")
    (folder / "manifest.json").write_bytes(bytes(range(256)))
    assert isinstance(tally(lambda: load_bundle(folder)), UserError)


def test_bad_models_of_a_person_do_not_hide_the_others(a_tiny_bundle, tmp_path, tally, capsys, monkeypatch):
    monkeypatch.setenv("NMSW_BUNDLES", str(tmp_path / "own"))
    values = values_of(a_tiny_bundle)
    for index, (place, value, _) in enumerate(CHANGES.values()):
        folder = shutil.copytree(a_tiny_bundle, tmp_path / "own" / f"bad{index}")
        (folder / "manifest.json").write_text(json.dumps(changed(values, place, value)))
    (tmp_path / "own" / "deep").mkdir()
    (tmp_path / "own" / "deep" / "manifest.json").write_text("[" * 100_000)
    assert main(["models"]) == 0
    output, errors = capsys.readouterr()
    assert "torso-unet" in output and "bad" not in output and "Traceback" not in errors
    assert len(errors.splitlines()) == len(CHANGES) + 1
    assert main(["models", "--json"]) == 0


class Constant(nn.Module):
    """A net that gives what a bundle's net must not give."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x):
        if self.mode == "one voxel":
            return x.new_zeros((1, 4, 1, 1, 1))
        if self.mode == "too few classes":
            return x.expand(-1, 2, -1, -1, -1).contiguous()
        if self.mode == "nan":
            return (x * float("nan")).expand(-1, 4, -1, -1, -1).contiguous()
        return torch.matmul(x.new_zeros((2, 3)), x.new_zeros((2, 3)))  # cannot be computed


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [("one voxel", r"gives \(1, 4, 1, 1, 1\).*but must give"), ("too few classes", "but must give"), ("nan", "no numbers"), ("error", "does not run")],
)
def test_net_that_gives_something_else_is_refused(a_tiny_bundle, a_phantom, tmp_path, tally, mode, sentence):
    folder = shutil.copytree(a_tiny_bundle, tmp_path / "bundle")
    torch.jit.script(_scriptable(mode)).save(str(folder / "local.pt"))
    values = values_of(folder)
    values["sha256"]["local.pt"] = file_sha256(folder / "local.pt")
    (folder / "manifest.json").write_text(json.dumps(values))
    volume, _ = a_phantom
    error = tally(lambda: segment_volume(volume, load_bundle(folder), options=SegmentOptions(num_patches=2, device="cpu", threads=1)))
    with pytest.raises(UserError, match=f"local net of model 'tiny' .*{sentence}.*Export the bundle again|local net of model 'tiny' {sentence}"):
        raise error


def _scriptable(mode: str) -> nn.Module:
    """The module as an archive can hold it."""
    return Constant(mode)
