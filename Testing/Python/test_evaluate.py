"""Scores of a bundle on labelled cases, and mistakes that would give wrong scores in silence."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from NMSWSegment import phantoms
from NMSWSegment.bundle import load_bundle
from NMSWSegment.evaluation import evaluate as evaluate_module
from NMSWSegment.evaluation.evaluate import evaluate
from NMSWSegment.protocol import UserError
from NMSWSegment.volume import Volume, write_volume

SHAPE = (30, 24, 34)


@pytest.fixture
def a_folder(tmp_path) -> Path:
    """Two cases at the tiny bundle's own spacing, the second without the spleen, in Decathlon layout."""
    ijk_to_ras = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)
    volume, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        reference = np.where(labels == 2, 0, labels) if name == "second" else labels
        write_volume(volume, tmp_path / name / "ct.nii.gz")
        write_volume(Volume(reference.astype(np.uint8), ijk_to_ras), tmp_path / name / "label.nii.gz")
    write_dataset(tmp_path, list(phantoms.ORGANS))
    return tmp_path


def write_dataset(folder: Path, names: list[str]) -> None:
    labels = {str(value): name for value, name in enumerate(["background", *names])}
    training = [{"image": f"{name}/ct.nii.gz", "label": f"{name}/label.nii.gz"} for name in ("first", "second")]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "training": training}))


def case(folder: Path, name: str = "first") -> tuple[str, Path, Path]:
    return name, folder / name / "ct.nii.gz", folder / name / "label.nii.gz"


def verb(folder: Path, bundle: Path, *more: str) -> int:
    """Run `nmsw evaluate` as the command line does."""
    parser = argparse.ArgumentParser()
    evaluate_module.add_arguments(parser)
    return evaluate_module.run(parser.parse_args([str(bundle), "--data", f"decathlon:{folder}", "--device", "cpu", "--threads", "1", *more]))


def test_more_patches_score_better_and_all_are_exact(a_tiny_bundle, a_folder):
    scores = evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(0, 3, None), threads=1)["cases"]["first"]
    assert list(scores) == ["0", "3", "all"]
    assert scores["all"]["dsc"] == {"liver": 1.0, "spleen": 1.0, "vertebrae": 1.0} and scores["all"]["mean"] == 1.0
    assert 0.4 < scores["0"]["mean"] < scores["3"]["mean"] < 1.0
    assert {row["candidates"] for row in scores.values()} == {3 * 2 * 4}
    assert scores["0"]["mean"] == pytest.approx(np.mean(list(scores["0"]["dsc"].values())), abs=1e-4)


def test_structure_that_the_case_does_not_hold_is_left_out(a_tiny_bundle, a_folder):
    row = evaluate(load_bundle(a_tiny_bundle), [case(a_folder, "second")], ks=(None,), threads=1)["cases"]["second"]["all"]
    assert row["dsc"] == {"liver": 1.0, "vertebrae": 1.0} and row["mean"] == 1.0


def test_unknown_voxels_do_not_count(a_tiny_bundle, a_folder):
    _, _, path = case(a_folder)
    _, labels = phantoms.phantom(SHAPE, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE))
    labels[labels == 2] = 255
    write_volume(Volume(labels, phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)), path)
    row = evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(None,), threads=1)["cases"]["first"]["all"]
    assert row["dsc"] == {"liver": 1.0, "vertebrae": 1.0}


def test_label_of_another_shape_says_to_resample(a_tiny_bundle, a_folder):
    write_volume(Volume(np.eye(3, dtype=np.uint8)[None].repeat(4, 0), np.eye(4)), a_folder / "first" / "label.nii.gz")
    with pytest.raises(UserError, match="'first'.*Resample the label to the volume's grid"):
        evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(0,), threads=1)


def test_mirrored_label_of_the_same_shape_is_not_scored_as_if_it_fitted(a_tiny_bundle, a_folder):
    _, labels = phantoms.phantom(SHAPE, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE))
    mirrored = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE) * np.array([[-1], [1], [1], [1]])
    write_volume(Volume(np.ascontiguousarray(labels[..., ::-1]), mirrored), a_folder / "first" / "label.nii.gz")
    with pytest.raises(UserError, match="'first'.*Resample the label to the volume's grid"):
        evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(0,), threads=1)


def test_label_value_that_the_bundle_does_not_have_is_named(a_tiny_bundle, a_folder):
    ijk_to_ras = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)
    _, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    write_volume(Volume(np.where(labels == 3, 7, labels).astype(np.uint8), ijk_to_ras), a_folder / "first" / "label.nii.gz")
    with pytest.raises(UserError, match="label value 7.*labels 1 to 3"):
        evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(0,), threads=1)


def test_verb_writes_what_it_prints(a_tiny_bundle, a_folder, capsys):
    output = a_folder / "scores.json"
    assert verb(a_folder, a_tiny_bundle, "--cases", "second", "--k", "0,all", "--policy", "top_k", "-o", str(output)) == 0
    scores = json.loads(output.read_text())
    assert scores["bundle"] == "tiny" and scores["sha256"] == load_bundle(a_tiny_bundle).sha256 and scores["policy"] == "top_k"
    assert list(scores["cases"]) == ["second"] and list(scores["cases"]["second"]) == ["0", "all"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("second  k=all of 24  mean DSC 1.000  ")


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        (["--cases", "frist"], "'frist'.*first, second"),
        (["--k", "0,some"], "'some'.*whole numbers or 'all'"),
        (["--k", "-1"], "Use 0 for the coarse net alone"),
        (["--data", "somewhere"], "Write decathlon:FOLDER"),
    ],
)
def test_verb_mistake_says_what_to_give(a_tiny_bundle, a_folder, more, fix):
    with pytest.raises(UserError, match=fix):
        verb(a_folder, a_tiny_bundle, *more)


def test_verb_data_with_the_labels_in_another_order_are_not_scored(a_tiny_bundle, a_folder):
    write_dataset(a_folder, ["spleen", "liver", "vertebrae"])
    with pytest.raises(UserError, match="spleen, liver, vertebrae.*liver, spleen, vertebrae.*to the bundle's list"):
        verb(a_folder, a_tiny_bundle)
