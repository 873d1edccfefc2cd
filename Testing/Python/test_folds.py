"""Which cases are for training and which for validation: held-out ids, k folds by name, nnU-Net's splits."""

import json
from pathlib import Path

import pytest

pytest.importorskip("monai")

from test_datasets import a_folder, run_options  # noqa: E402, F401
from test_train import tiny_options  # noqa: E402
from training_folders import write_nnunet  # noqa: E402

from NMSWSegment.command_line import main  # noqa: E402
from NMSWSegment.evaluation.cases import was_held_out  # noqa: E402
from NMSWSegment.files.bundle import load_bundle  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training.datasets import find_data  # noqa: E402
from NMSWSegment.training.export import export_bundle  # noqa: E402
from NMSWSegment.training.folds import case_roles  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402

NAMES = ["e", "a", "d", "c", "b"]


def roles(**changes):
    anatomies = changes.pop("anatomies", [])
    return case_roles(tiny_options(Path("data"), **changes), case_names=NAMES, anatomy_names=anatomies)


def splits_file(folder: Path, *splits: dict) -> str:
    (folder / "splits_final.json").write_text(json.dumps(splits))
    return str(folder / "splits_final.json")


def test_folds_deal_out_the_sorted_names_and_each_case_is_validated_once():
    folds = [roles(fold=fold, folds=2).validation for fold in (0, 1)]
    assert folds == [{"a", "c", "e"}, {"b", "d"}]
    assert roles().validation == roles().left_out == frozenset()


def test_held_out_cases_take_no_part_in_the_folds():
    found = [roles(fold=fold, folds=2, hold_out=("a", "x"), anatomies=["x"]) for fold in (0, 1)]
    assert [role.validation for role in found] == [{"b", "d"}, {"c", "e"}] and all(role.left_out == {"a", "x"} for role in found)
    assert roles(hold_out=("a",)).validation == {"a"}


def test_anatomy_follows_the_case_of_its_name(a_folder):  # noqa: F811
    (a_folder / "anatomies" / "three").rename(a_folder / "anatomies" / "one")
    options = run_options(a_folder)
    held = find_data(tiny_options(a_folder, data=options.data, fold=0, folds=2))
    assert held.validation_names == ["one"] and held.training_names == ["two", "four"] and held.num_held_out == 2
    other = find_data(tiny_options(a_folder, data=options.data, fold=1, folds=2))
    assert other.validation_names == ["two"] and other.training_names == ["one", "four", "one"]


def test_splits_of_nnunet_say_who_is_validated_and_leave_out_who_is_in_no_list(tmp_path):
    path = splits_file(tmp_path, {"train": ["a"], "val": ["b"]}, {"train": ["a", "b"], "val": ["c", "d"]})
    first, second = (roles(splits=path, fold=fold) for fold in (0, 1))
    assert first.validation == {"b"} and first.left_out == {"c", "d", "e"}
    assert second.validation == {"c", "d"} and second.left_out == {"e"}


def test_names_of_splits_are_those_of_nnunets_folder(tmp_path):
    folder = write_nnunet(tmp_path / "Dataset001_CT", names=("case_1", "case_2", "case_3"))
    path = splits_file(tmp_path, {"train": ["case_1", "case_3"], "val": ["case_2"]})
    data = find_data(tiny_options(folder, data=(f"nnunet:{folder}",), splits=path, fold=0))
    assert data.training_names == ["case_1", "case_3"] and data.validation_names == ["case_2"]


@pytest.mark.parametrize(
    ("splits", "fold", "fix"),
    [
        ([{"train": ["a"], "val": ["bb"]}], 0, "Unknown case in .*'bb'.*Did you mean 'b'"),
        ([{"train": ["a", "b"], "val": ["b"]}], 0, "has 'b' for training and for validation. Take it out of one"),
        ([{"train": ["a"], "val": ["b"]}], 3, "has 1 splits, but --fold is 3. Give a number from 0 to 0"),
        ([{"train": ["a"], "val": []}], 0, "no case for validation"),
        ({"train": ["a"]}, 0, "is no list of splits.*Write them as nnU-Net does"),
        ([["a"]], 0, "is no list of splits"),
    ],
)
def test_splits_that_cannot_be_used_say_what_to_change(tmp_path, splits, fold, fix):
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match=fix):
        roles(splits=str(tmp_path / "splits.json"), fold=fold)


def test_splits_that_are_not_there_say_what_to_give(tmp_path):
    with pytest.raises(UserError, match="cannot be read.*Give nnU-Net's splits_final.json"):
        roles(splits=str(tmp_path / "nowhere.json"), fold=0)


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"fold": 0}, "Give --fold together with --folds K, or with --splits FILE"),
        ({"fold": 0, "folds": 2, "splits": "x"}, "Give --fold together with"),
        ({"folds": 5}, "Add --fold I"),
        ({"fold": 5, "folds": 5}, "Folds are numbered from 0"),
        ({"fold": 0, "folds": 1}, "at least 2 of them"),
        ({"fold": 0, "folds": 6}, "There are 5 labelled cases for 6 folds. Give --folds 5 or fewer"),
        ({"fold": 0, "folds": 2, "hold_out": ("z",)}, "Unknown held-out id 'z'"),
    ],
)
def test_impossible_fold_says_what_to_give(changes, fix):
    with pytest.raises(UserError, match=fix):
        roles(**changes)


def test_flags_train_a_fold_whose_bundle_knows_what_was_held_out(a_folder, tmp_path):  # noqa: F811
    words = f"train --data decathlon:{a_folder} --output {tmp_path / 'run'} --fold 1 --folds 2 --iterations 1 --workers 0 --device cpu"
    small = "--spacing 6 6 6 --patch-size 16 16 16 --coarse-factor 1 1 1 --top-k-patches 1 --random-patches 1"
    assert main([*words.split(), *small.split()]) == 0
    assert (tmp_path / "run" / "best.pt").is_file()
    manifest = load_bundle(export_bundle(tmp_path / "run", tmp_path / "bundle")).manifest
    assert [was_held_out(name, manifest) for name in ("one", "two")] == [False, True]
    assert manifest.training["options"]["folds"] == 2


def test_splits_may_move_on_resume_but_the_cases_may_not_change(a_folder, tmp_path):  # noqa: F811
    split = {"train": ["one"], "val": ["two"]}
    path = Path(splits_file(tmp_path, split))
    values = {"data": (f"decathlon:{a_folder}",), "fold": 0, "iterations": 1, "validate_every": 0}
    train(tiny_options(a_folder, splits=str(path), **values), output=tmp_path / "run", num_workers=0)
    moved = path.rename(tmp_path / "moved.json")
    train(tiny_options(a_folder, splits=str(moved), **values), output=tmp_path / "run", num_workers=0, resume=True)
    moved.write_text(json.dumps([{"train": split["val"], "val": split["train"]}]))
    with pytest.raises(UserError, match="training cases are not those.*'one' is missing, 'two' is new.*needs the same cases"):
        train(tiny_options(a_folder, splits=str(moved), **values), output=tmp_path / "run", num_workers=0, resume=True)
