"""Prepared data: the same samples as from the original folders, on a computer that does not have them."""

import shutil

import pytest
import torch

pytest.importorskip("monai")

from conftest import windows_pipe  # noqa: E402
from test_datasets import a_folder, run_options  # noqa: E402, F401
from test_train import a_data_folder, tiny_options  # noqa: E402

from NMSWSegment.command_line import main  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.samples.prepared_set import write_prepared_set  # noqa: E402
from NMSWSegment.training.datasets import find_data, open_training_set  # noqa: E402
from NMSWSegment.training.plan import plan_lines  # noqa: E402
from NMSWSegment.training.run_folder import load_checkpoint  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402


def test_prepared_data_gives_the_same_samples_without_the_original_files(a_folder, tmp_path, capsys):  # noqa: F811
    options = run_options(a_folder)
    originals = open_training_set(options)
    words = ["prepare", *(word for entry in options.data for word in ("--data", entry)), "--output", str(tmp_path / "prepared")]
    assert main(words) == 0
    assert f"2 cases and 2 anatomies in {tmp_path / 'prepared'}. Train with --data prepared:" in capsys.readouterr().out
    expected = [originals[number] for number in range(6)]
    shutil.rmtree(a_folder / "cases")
    shutil.rmtree(a_folder / "anatomies")
    prepared = open_training_set(run_options(a_folder, data=(f"prepared:{tmp_path / 'prepared'}",)))
    assert prepared.label_names == ["liver", "spleen"]
    for number, sample in enumerate(expected):
        found = prepared[number]
        assert found.name == sample.name and torch.equal(found.intensity, sample.intensity) and torch.equal(found.labels, sample.labels)
    held_out = find_data(run_options(a_folder, data=(f"prepared:{tmp_path / 'prepared'}",), hold_out=("one", "three")))
    assert [path.name for path in held_out.prepared_cases + held_out.anatomies] == ["two", "four"] and held_out.num_held_out == 2


def test_verb_prints_any_name_into_a_pipe_of_windows(a_folder, tmp_path, monkeypatch):  # noqa: F811
    printed = windows_pipe(monkeypatch)
    words = [word for entry in run_options(a_folder).data for word in ("--data", entry)]
    assert main(["prepare", *words, "--output", str(tmp_path / "肝臓")]) == 0
    assert rb"\u809d\u81d3. Train with" in printed.getvalue()


def test_run_on_prepared_data_equals_the_run_on_the_folder(tmp_path):
    folder = a_data_folder(tmp_path / "data")
    options = tiny_options(folder, train="local", iterations=2)
    train(options, output=tmp_path / "original", num_workers=0)
    assert main(["prepare", "--data", options.data[0], "--output", str(tmp_path / "prepared")]) == 0
    prepared = tiny_options(folder, train="local", iterations=2, data=(f"prepared:{tmp_path / 'prepared'}",))
    train(prepared, output=tmp_path / "run", num_workers=0)
    found, expected = (load_checkpoint(tmp_path / name)["net"] for name in ("run", "original"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    lines = list(plan_lines(prepared, output=tmp_path / "plan", cache=tmp_path / "cache", device="cpu"))
    assert any("2 labelled CT (one, two)" in line for line in lines) and any("Candidates  12 / 12 / 12" in line for line in lines)


def test_prepared_data_that_is_damaged_or_in_the_way_says_what_to_do(tmp_path):
    data = f"decathlon:{a_data_folder(tmp_path / 'data')}"
    with pytest.raises(UserError, match="holds no prepared data. Give a folder that 'nmsw prepare --output' wrote"):
        find_data(tiny_options(tmp_path, data=(f"prepared:{tmp_path / 'data'}",)))
    assert main(["prepare", "--data", data, "--output", str(tmp_path / "prepared")]) == 0
    assert main(["prepare", "--data", data, "--output", str(tmp_path / "prepared")]) == 2
    (tmp_path / "prepared" / "cases" / "one" / "labels.npy").write_bytes(b"torn")
    with pytest.raises(UserError, match="is damaged.*Write it again with 'nmsw prepare'"):
        training_set = open_training_set(tiny_options(tmp_path, data=(f"prepared:{tmp_path / 'prepared'}",)))
        [training_set[number] for number in range(8)]


def test_two_cases_of_one_name_are_not_prepared_into_one(tmp_path):
    folder = a_data_folder(tmp_path / "data")
    training_set = open_training_set(tiny_options(folder))
    case = training_set._cases[0]._load()
    with pytest.raises(UserError, match="Two cases or anatomies are named 'one'"):
        write_prepared_set(tmp_path / "prepared", label_names=("liver",), modality="CT", cases=[("one", case), ("one", case)], anatomies=[])
    assert not (tmp_path / "prepared").exists() and not list(tmp_path.glob(".partial*"))
