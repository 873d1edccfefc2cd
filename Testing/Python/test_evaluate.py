"""Scores of a bundle on labelled cases, and mistakes that would give wrong scores in silence."""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import turned, windows_pipe
from training_folders import a_case, write_totalsegmentator

from NMSWSegment.data.layouts import CaseFiles
from NMSWSegment.data.prepared_case import CaseRequest
from NMSWSegment.evaluation import evaluate as evaluate_module
from NMSWSegment.evaluation.cases import find_cases, read_case, score_labelmap
from NMSWSegment.evaluation.evaluate import evaluate, write_csv
from NMSWSegment.evaluation.plots import MISSED, WRONG, error_colors, paired_slices
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.volume import Volume, write_volume
from NMSWSegment.protocol import UserError

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


def case(folder: Path, name: str = "first") -> CaseRequest:
    files = CaseFiles(name, folder / name / "ct.nii.gz", folder / name / "label.nii.gz")
    return CaseRequest(files=files, label_names=tuple(phantoms.ORGANS))


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
    path = case(a_folder).files.label
    _, labels = phantoms.phantom(SHAPE, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE))
    labels[labels == 2] = 255
    write_volume(Volume(labels, phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)), path)
    row = evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(None,), threads=1)["cases"]["first"]["all"]
    assert row["dsc"] == {"liver": 1.0, "vertebrae": 1.0}


def test_label_of_another_shape_says_to_resample(a_tiny_bundle, a_folder):
    write_volume(Volume(np.eye(3, dtype=np.uint8)[None].repeat(4, 0), np.eye(4)), a_folder / "first" / "label.nii.gz")
    with pytest.raises(UserError, match="'first' do not lie on the same grid.*Resample the label to the image"):
        evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(0,), threads=1)


def test_mirrored_label_of_the_same_shape_is_not_scored_as_if_it_fitted(a_tiny_bundle, a_folder):
    _, labels = phantoms.phantom(SHAPE, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE))
    mirrored = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE) * np.array([[-1], [1], [1], [1]])
    write_volume(Volume(np.ascontiguousarray(labels[..., ::-1]), mirrored), a_folder / "first" / "label.nii.gz")
    with pytest.raises(UserError, match="'first' do not lie on the same grid.*Resample the label to the image"):
        evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(0,), threads=1)


def test_label_value_that_the_bundle_does_not_have_is_named(a_tiny_bundle, a_folder):
    ijk_to_ras = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)
    _, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    write_volume(Volume(np.where(labels == 3, 7, labels).astype(np.uint8), ijk_to_ras), a_folder / "first" / "label.nii.gz")
    with pytest.raises(UserError, match="'first' holds .7., but the list of labels ends at 3"):
        evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(0,), threads=1)


def test_verb_writes_what_it_prints(a_tiny_bundle, a_folder, capsys):
    output = a_folder / "scores.json"
    assert verb(a_folder, a_tiny_bundle, "--cases", "second", "--k", "0,all", "--policy", "top_k", "-o", str(output)) == 0
    scores = json.loads(output.read_text(encoding="utf-8"))
    assert scores["bundle"] == "tiny" and scores["sha256"] == load_bundle(a_tiny_bundle).sha256 and scores["policy"] == "top_k"
    assert list(scores["cases"]) == ["second"] and list(scores["cases"]["second"]) == ["0", "all"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("second  k=all of 24  mean DSC 1.000  NSD 2 mm 1.000  ")


def test_verb_says_which_cases_the_bundle_may_have_been_trained_on(a_tiny_bundle, a_folder, tmp_path, capsys):
    assert verb(a_folder, a_tiny_bundle, "--k", "0") == 0
    assert capsys.readouterr().out.startswith(
        "Not held out: first, second. The bundle may have been trained on them, so that the scores are too good.\nfirst  k=0"
    )
    bundle = shutil.copytree(a_tiny_bundle, tmp_path / "held-out")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"training": {"held_out": ["first"]}}), encoding="utf-8")
    assert verb(a_folder, bundle, "--k", "0") == 0
    assert capsys.readouterr().out.startswith("Not held out: second. ")
    assert verb(a_folder, bundle, "--k", "0", "--cases", "first") == 0
    assert capsys.readouterr().out.startswith("first  k=0")


def test_verb_does_not_doubt_cases_of_another_split(a_tiny_bundle, tmp_path, capsys):
    write_totalsegmentator(tmp_path, splits={"s0001": "train", "s0002": "test"}, classes=("liver", "spleen"))
    parser = argparse.ArgumentParser()
    evaluate_module.add_arguments(parser)
    words = [str(a_tiny_bundle), "--data", f"totalsegmentator:{tmp_path}", "--split", "test", "--device", "cpu", "--threads", "1", "--k", "0"]
    assert evaluate_module.run(parser.parse_args(words)) == 0
    assert "Not held out" not in capsys.readouterr().out


def test_verb_prints_any_name_into_a_pipe_of_windows_after_its_files_are_written(a_tiny_bundle, a_folder, monkeypatch):
    printed = windows_pipe(monkeypatch)
    row = {"candidates": 24, "mean": 1.0, "mean_nsd_2mm": None, "seconds": 1.0}
    monkeypatch.setattr(evaluate_module, "evaluate", lambda *arguments, **options: {"cases": {"肝臓": {"0": row}}})
    relabel(a_folder, ["aorta", "spleen"])
    assert verb(a_folder, a_tiny_bundle, "-o", str(a_folder / "scores.json")) == 0
    assert rb"\u809d\u81d3  k=0 of 24" in printed.getvalue() and b"Not scored: " in printed.getvalue()

    def full(text):
        if "k=0" in text:
            raise OSError("nobody reads")

    monkeypatch.setattr(evaluate_module, "say", full)
    with pytest.raises(OSError):
        verb(a_folder, a_tiny_bundle, "-o", str(a_folder / "again.json"))
    assert json.loads((a_folder / "again.json").read_text(encoding="utf-8"))["cases"]["肝臓"]


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


def relabel(folder: Path, names: list[str]) -> None:
    """Number the labels of the first case in the order of some names; classes that are not among them become background."""
    ijk_to_ras = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)
    _, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    table = np.array([0, *(names.index(name) + 1 if name in names else 0 for name in phantoms.ORGANS)], dtype=np.uint8)
    write_volume(Volume(table[labels], ijk_to_ras), folder / "first" / "label.nii.gz")
    write_dataset(folder, names)


@pytest.mark.parametrize(
    ("names", "scored", "sentence"),
    [
        (["spleen", "liver", "vertebrae"], {"liver", "spleen", "vertebrae"}, ""),
        (["vertebrae", "liver"], {"liver", "vertebrae"}, "Not scored: spleen only in the bundle 'tiny'.\n"),
        (["aorta", "spleen"], {"spleen"}, "Not scored: liver, vertebrae only in the bundle 'tiny'; aorta only in the data.\n"),
    ],
)
def test_verb_scores_the_classes_that_bundle_and_data_both_know_by_name(a_tiny_bundle, a_folder, capsys, names, scored, sentence):
    relabel(a_folder, names)
    assert verb(a_folder, a_tiny_bundle, "--cases", "first", "--k", "all", "-o", str(a_folder / "scores.json")) == 0
    printed = capsys.readouterr().out
    seen = "Not held out: first. The bundle may have been trained on them, so that the scores are too good.\n"
    assert printed.startswith(sentence + seen + "first  k=all") and "mean DSC 1.000" in printed
    assert json.loads((a_folder / "scores.json").read_text(encoding="utf-8"))["cases"]["first"]["all"]["dsc"] == dict.fromkeys(scored, 1.0)


def test_verb_without_a_class_in_common_says_both_lists(a_tiny_bundle, a_folder):
    write_dataset(a_folder, ["aorta"])
    with pytest.raises(UserError, match="no class in common: aorta; and liver, spleen, vertebrae. Give the classes of the data the bundle's names"):
        verb(a_folder, a_tiny_bundle)


def test_surface_scores_stand_beside_the_dice(a_tiny_bundle, a_folder):
    rows = evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(0, None), threads=1)["cases"]["first"]
    assert rows["all"]["nsd_2mm"] == rows["all"]["nsd_2voxels"] == {"liver": 1.0, "spleen": 1.0, "vertebrae": 1.0}
    assert rows["all"]["hd95_mm"] == {"liver": 0.0, "spleen": 0.0, "vertebrae": 0.0} and rows["all"]["mean_hd95_mm"] == 0
    # the coarse result is off by 2 mm more often than by two voxels of 6 mm
    for structure in phantoms.ORGANS:
        assert rows["0"]["nsd_2mm"][structure] < rows["0"]["nsd_2voxels"][structure] <= 1.0 and rows["0"]["hd95_mm"][structure] >= 6


def test_structure_predicted_elsewhere_scores_0_with_its_distance(a_tiny_bundle, a_folder):
    path = case(a_folder).files.label
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:4, 3:6, 4:8] = 2  # air, which nothing takes for a spleen
    write_volume(Volume(labels, phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)), path)
    row = evaluate(load_bundle(a_tiny_bundle), [case(a_folder)], ks=(None,), threads=1)["cases"]["first"]["all"]
    assert row["dsc"] == row["nsd_2mm"] == {"spleen": 0.0} and row["hd95_mm"]["spleen"] > 50


def test_missed_structure_has_no_place_in_the_mean_of_hd95():
    ijk_to_ras = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)
    _, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    manifest = SimpleNamespace(num_classes=4, spacing_mm=(6.0, 6.0, 6.0), labels=coded_labels(list(phantoms.ORGANS)))
    scores = score_labelmap(Volume(np.where(labels == 2, 0, labels), ijk_to_ras), Volume(labels, ijk_to_ras), manifest=manifest)
    assert scores["hd95_mm"] == {"liver": 0.0, "spleen": None, "vertebrae": 0.0} and scores["mean_hd95_mm"] == 0
    assert scores["nsd_2mm"]["spleen"] == scores["dsc"]["spleen"] == 0


def test_csv_holds_a_row_for_every_structure_and_inf_for_a_missed_one(tmp_path):
    row = {
        "dsc": {"liver": 0.5, "spleen": 0.0},
        "nsd_2mm": {"liver": 0.25, "spleen": 0.0},
        "nsd_2voxels": {"liver": 1.0},
        "hd95_mm": {"liver": 3.0, "spleen": None},
    }
    write_csv({"cases": {"first": {"all": row}}}, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text(encoding="utf-8").splitlines() == [
        "case,k,structure,dsc,nsd_2mm,nsd_2voxels,hd95_mm",
        "first,all,liver,0.5,0.25,1.0,3.0",
        "first,all,spleen,0.0,0.0,,inf",
    ]


def test_ignore_label_of_nnunet_is_unknown(a_tiny_bundle, tmp_path):
    ijk_to_ras = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)
    volume, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    write_volume(volume, tmp_path / "imagesTr" / "body_0000.nii.gz")
    write_volume(Volume(np.where(labels == 2, 4, labels).astype(np.uint8), ijk_to_ras), tmp_path / "labelsTr" / "body.nii.gz")
    names = {"background": 0, "liver": 1, "spleen": 2, "vertebrae": 3, "ignore": 4}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii.gz", "numTraining": 1}))
    bundle = load_bundle(a_tiny_bundle)
    cases = find_cases([f"nnunet:{tmp_path}"], bundle.manifest)
    assert evaluate(bundle, cases, ks=(None,), threads=1)["cases"]["body"]["all"]["dsc"] == {"liver": 1.0, "vertebrae": 1.0}


def test_masks_of_totalsegmentator_are_scored_on_the_split_that_is_asked_for(tmp_path):
    write_totalsegmentator(tmp_path, splits={"s0001": "train", "s0002": "test"}, classes=("liver", "spleen", "gallbladder"))
    manifest = SimpleNamespace(
        name="organs", label_names=["liver", "spleen"], num_classes=3, spacing_mm=(6.0, 6.0, 6.0), labels=coded_labels(["liver", "spleen"])
    )
    (found,) = find_cases([f"totalsegmentator:{tmp_path}"], manifest, split="test")
    volume, reference = read_case(found, manifest)
    assert found.files.name == "s0002" and volume.ijk_to_ras[0, 0] < 0  # stored from right to left
    _, labels = a_case(mirrored=True)
    assert np.array_equal(reference.array, np.where(labels < 3, labels, 0))
    assert score_labelmap(reference, reference, manifest=manifest)["dsc"] == {"liver": 1.0, "spleen": 1.0}


def test_bundle_with_other_names_than_totalsegmentator_says_which(tmp_path):
    write_totalsegmentator(tmp_path, splits={"s0001": "train"})
    with pytest.raises(UserError, match="no class in common: spleen, .*; and leber"):
        find_cases([f"totalsegmentator:{tmp_path}"], SimpleNamespace(name="organs", label_names=["leber"], spacing_mm=(6.0, 6.0, 6.0)))


def test_verb_draws_reference_and_result_of_every_k(a_tiny_bundle, a_folder):
    assert verb(a_folder, a_tiny_bundle, "--cases", "first", "--k", "0,all", "--pictures", str(a_folder / "pictures")) == 0
    assert sorted(path.name for path in (a_folder / "pictures").iterdir()) == ["first-k0.png", "first-kall.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (a_folder / "pictures").iterdir())


def test_paired_slices_of_an_oblique_volume_show_the_same_places():
    ijk_to_ras = turned((5.0, 4.0, 3.0), (20, 24, 30), mirror=(1, -1, 1), permutation=(1, 2, 0))
    volume, labels = phantoms.phantom((20, 24, 30), ijk_to_ras=ijk_to_ras)
    reference = Volume(labels, ijk_to_ras)
    for view, (found, missing) in paired_slices(volume, reference, [reference, Volume(np.zeros_like(labels), ijk_to_ras)]):
        np.testing.assert_array_equal(found, view.labels)
        assert not missing.any() and view.labels.any()
        for value, (_, _, hu) in enumerate(phantoms.ORGANS.values(), start=1):
            inside = view.intensities[view.labels == value]
            assert len(inside) == 0 or abs(np.median(inside) - hu) < 1


def test_error_colors_leave_unknown_voxels_and_agreement_alone():
    reference = np.array([[0, 1, 1, 255, 0, 2]])
    found = np.array([[0, 1, 0, 1, 1, 1]])
    colors = error_colors(found, reference)[0]
    assert [tuple(color) == (0, 0, 0, 0) for color in colors] == [True, True, False, True, False, False]
    np.testing.assert_allclose(colors[2], MISSED)
    np.testing.assert_allclose(colors[[4, 5]], [WRONG, WRONG])
