"""The command line, __main__.py and command_line.py: what it writes, says and returns, and that nothing is left when it fails."""

import csv
import json
import locale
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from NMSWSegment import command_line
from NMSWSegment.__main__ import main
from NMSWSegment.files import phantoms
from NMSWSegment.files.volume import Volume, read_volume, write_volume
from NMSWSegment.protocol import Cancelled, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def a_case(tmp_path) -> Path:
    """A folder with a small oblique-free phantom as ct.nii.gz."""
    shape = (30, 24, 34)
    volume, _ = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((10.0, 10.0, 9.0), shape))
    write_volume(volume, tmp_path / "ct.nii.gz")
    return tmp_path


def arguments(folder: Path, bundle: Path, *more: str) -> list[str]:
    """Words of a quick segmentation."""
    return [
        "segment",
        str(folder / "ct.nii.gz"),
        "-o",
        str(folder / "labels.nii.gz"),
        "--bundle",
        str(bundle),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--k",
        "2",
        *more,
    ]


def names(folder: Path) -> set[str]:
    """Files that are there, hidden ones included."""
    return {path.name for path in folder.iterdir()}


def test_segment_writes_all_files_and_one_line_for_each(a_case, a_tiny_bundle, capfd):
    more = {"statistics": "s.csv", "preview": "p.png", "patches": "p.mrk.json", "report": "r.json"}
    pytest.importorskip("matplotlib")
    words = [word for kind, name in more.items() for word in (f"--{kind}", str(a_case / name))]
    assert main(arguments(a_case, a_tiny_bundle, *words)) == 0
    output, errors = capfd.readouterr()
    lines = output.splitlines()
    assert lines[:-1] == [f"labelmap: {a_case / 'labels.nii.gz'}", *(f"{kind}: {a_case / name}" for kind, name in more.items())]
    assert re.fullmatch(r"3 of 3 structures in \d+\.\d s, 2 of \d+ patches", lines[-1])
    assert errors == ""
    assert names(a_case) == {"ct.nii.gz", "labels.nii.gz", *more.values()}
    labelmap = read_volume(a_case / "labels.nii.gz")
    np.testing.assert_array_equal(labelmap.ijk_to_ras, read_volume(a_case / "ct.nii.gz").ijk_to_ras)
    with open(a_case / "s.csv", newline="", encoding="utf-8") as stream:
        rows = {row["structure"]: row for row in csv.DictReader(stream)}
    assert int(rows["liver"]["voxels"]) == (labelmap.array == 1).sum() > 0
    assert float(rows["liver"]["center_r_mm"]) > 40 and float(rows["spleen"]["center_r_mm"]) < -40
    report = json.loads((a_case / "r.json").read_text(encoding="utf-8"))
    assert report["options"]["num_patches"] == 2
    assert [markup["center"] for markup in json.loads((a_case / "p.mrk.json").read_text(encoding="utf-8"))["markups"]] == [
        patch["center_ras"] for patch in report["patches"]
    ]


def test_segment_all_patches_and_chosen_structures(a_case, a_tiny_bundle, capsys):
    words = arguments(a_case, a_tiny_bundle, "--structures", "vertebrae, liver", "--policy", "top_k", "--report", str(a_case / "r.json"))
    words[words.index("2")] = "all"
    words[words.index(str(a_case / "labels.nii.gz"))] = str(a_case / "labels.seg.nrrd")
    assert main(words) == 0
    assert set(np.unique(read_volume(a_case / "labels.seg.nrrd").array)) == {0, 1, 3}
    report = json.loads((a_case / "r.json").read_text(encoding="utf-8"))
    assert report["options"]["num_patches"] is None and len(report["patches"]) == report["candidates"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 of 2 structures")


def test_segment_auto_chooses_the_number_of_patches(a_case, a_tiny_bundle):
    words = arguments(a_case, a_tiny_bundle, "--report", str(a_case / "r.json"))
    words[words.index("2")] = "auto"
    assert main(words) == 0
    report = json.loads((a_case / "r.json").read_text(encoding="utf-8"))
    assert report["options"]["num_patches"] == "auto" and 0 < len(report["patches"]) < report["candidates"]


def test_segment_existing_output_is_replaced(a_case, a_tiny_bundle):
    (a_case / "labels.nii.gz").write_text("old")
    assert main(arguments(a_case, a_tiny_bundle)) == 0
    assert read_volume(a_case / "labels.nii.gz").array.any()


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        (["--k", "-3"], "Use 0 for the coarse net alone"),
        (["--k", "2.5"], "neither a whole number nor 'all' or 'auto'"),
        (["--policy", "gredy"], "Did you mean 'greedy'"),
        (["--structures", "livr"], "Did you mean 'liver'"),
        (["--threads", "0"], "Use 1 or more"),
        (["--bundle", "nothing"], "A folder that 'nmsw export' wrote"),
        (["--device", "abacus"], "abacus"),
        (["--statistics", "{folder}/s.txt"], "Use '.csv'"),
        (["--patches", "{folder}/p.json"], "Use '.mrk.json'"),
        (["--preview", "{folder}/nowhere/p.png"], "Create it"),
        (["--report", "{folder}"], "Give a file name that ends in '.json'"),
        (["-o", "{folder}/ct.nii.gz"], "would overwrite the input"),
        (["-o", "{folder}/labels.png"], "Use '.nii.gz', '.nii', '.seg.nrrd' or '.dcm'"),
        (["--polcy", "greedy"], "does not know '--polcy'. Did you mean '--policy'? Run 'nmsw segment --help'"),
    ],
)
def test_segment_mistake_is_one_sentence_and_leaves_nothing(a_case, a_tiny_bundle, capfd, more, fix):
    before = (a_case / "ct.nii.gz").read_bytes()
    assert main(arguments(a_case, a_tiny_bundle, *(word.format(folder=a_case) for word in more))) == 2
    output, errors = capfd.readouterr()
    assert output == "" and len(errors.splitlines()) == 1
    assert fix in errors
    assert names(a_case) == {"ct.nii.gz"}
    assert (a_case / "ct.nii.gz").read_bytes() == before


def test_segment_output_that_links_to_the_input_is_refused(a_case, a_tiny_bundle, capfd, can_link):
    (a_case / "link.nii.gz").symlink_to(a_case / "ct.nii.gz")
    before = (a_case / "ct.nii.gz").read_bytes()
    assert main(arguments(a_case, a_tiny_bundle, "-o", str(a_case / "link.nii.gz"))) == 2
    assert "would overwrite the input" in capfd.readouterr().err
    assert names(a_case) == {"ct.nii.gz", "link.nii.gz"} and (a_case / "ct.nii.gz").read_bytes() == before


def test_segment_two_outputs_in_one_file_are_refused(a_case, a_tiny_bundle, capsys, monkeypatch):
    monkeypatch.chdir(a_case)
    # Kinds have endings of their own today; the check must not depend on that.
    monkeypatch.setattr(command_line, "REPORT_ENDINGS", (".mrk.json",))
    assert main(arguments(a_case, a_tiny_bundle, "--patches", "a.mrk.json", "--report", str(a_case / "a.mrk.json"))) == 2
    assert "Choose another name for one of them" in capsys.readouterr().err


@pytest.mark.parametrize("array", [np.zeros((4, 5, 6), np.int16), np.full((4, 5, 6), np.nan, np.float32)])
def test_segment_bad_volume_is_refused_without_output(a_case, a_tiny_bundle, capfd, array):
    write_volume(Volume(array, np.eye(4)), a_case / "ct.nii.gz")
    assert main(arguments(a_case, a_tiny_bundle)) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert names(a_case) == {"ct.nii.gz"}


def test_segment_preview_without_matplotlib_is_refused_before_the_run(a_case, a_tiny_bundle, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command_line, "open_volume", lambda path: pytest.fail("the run began"))
    assert main(arguments(a_case, a_tiny_bundle, "--preview", str(a_case / "p.png"))) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("The disk is full. Make room."), 2), (KeyboardInterrupt(), 130), (Cancelled(), 130), (ZeroDivisionError(), 1)]
)
def test_segment_failure_of_the_last_file_takes_the_others_away(a_case, a_tiny_bundle, capsys, monkeypatch, error, code):
    def fail(*_, **__):
        raise error

    (a_case / "s.csv").write_text("old")
    monkeypatch.setattr(command_line, "write_patches", fail)
    assert main(arguments(a_case, a_tiny_bundle, "--statistics", str(a_case / "s.csv"), "--patches", str(a_case / "p.mrk.json"))) == code
    assert names(a_case) == {"ct.nii.gz", "s.csv"}
    assert (a_case / "s.csv").read_text(encoding="utf-8") == "old"
    output, errors = capsys.readouterr()
    assert output == ""
    assert ("Traceback" in errors and "Please report it" in errors) == (code == 1)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP"))])
def test_segment_stopped_by_a_signal_returns_130_and_leaves_nothing(a_case, a_tiny_bundle, name):
    # The engine waits in a patch until the signal comes.
    program = (
        "import sys, time, NMSWSegment.engine.segment as engine\n"
        "from NMSWSegment.__main__ import main\n"
        "def wait(*_, **__):\n    print('running', flush=True)\n    time.sleep(60)\n"
        "engine.segment_volume = wait\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, *arguments(a_case, a_tiny_bundle)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert run.stdout.readline() == "running\n"
    started = time.monotonic()
    os.kill(run.pid, getattr(signal, name))
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 130 and "Stopped" in errors and "Traceback" not in errors
    assert time.monotonic() - started < 10
    assert names(a_case) == {"ct.nii.gz"}


def test_output_that_is_a_slice_of_the_input_or_a_file_of_the_model_is_refused(a_case, a_tiny_bundle, tmp_path, capfd):
    slices = tmp_path / "series"
    slices.mkdir()
    (slices / "0003.dcm").write_bytes(b"a slice")
    manifest = (a_tiny_bundle / "manifest.json").read_bytes()
    for more, sentence in (
        ([str(slices), "-o", str(slices / "0003.dcm")], "would overwrite the input"),
        (
            [str(a_case / "ct.nii.gz"), "-o", str(a_case / "labels.nii.gz"), "--report", str(a_tiny_bundle / "manifest.json")],
            "would overwrite a file of the model",
        ),
    ):
        assert main(["segment", *more, "--bundle", str(a_tiny_bundle), "--device", "cpu"]) == 2
        assert sentence in capfd.readouterr().err
    assert (slices / "0003.dcm").read_bytes() == b"a slice" and (a_tiny_bundle / "manifest.json").read_bytes() == manifest


def test_progress_is_drawn_in_a_terminal_only(a_case, a_tiny_bundle, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if rich were missing
    assert main(arguments(a_case, a_tiny_bundle)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  0% Reading ct.nii.gz" and lines[-1] == "100% Writing"
    monkeypatch.delitem(sys.modules, "rich.console")
    assert main(arguments(a_case, a_tiny_bundle)) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_models_lists_facts_and_scores(a_tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "list_bundles", lambda: [str(a_tiny_bundle)])
    assert main(["models"]) == 0
    header, row, *rest = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "backbone", "structures", "spacing", "mm", "size", "MB", "held-out", "scores"]
    assert row.split()[:8] == ["tiny", "unet", "3", "6", "x", "6", "x", "6"]
    assert rest == ["", "Structures of tiny:", "  liver, spleen, vertebrae"]
    assert main(["models", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["structures"] == ["liver", "spleen", "vertebrae"] and facts["size_bytes"] > 1000


def test_models_shows_the_mean_of_each_held_out_case_and_k(a_tiny_bundle, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(a_tiny_bundle, tmp_path / "scored")
    values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    rows = {k: {"mean": mean, "seconds": 1.0, "candidates": 27, "dsc": {"liver": mean}} for k, mean in (("0", 0.7123), ("10", 0.745))}
    values["scores"] = {"one": rows, "two": {"all": rows["10"]}}
    (folder / "manifest.json").write_text(json.dumps(values))
    monkeypatch.setattr(command_line, "list_bundles", lambda: [str(folder)])
    assert main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("  one DSC 0.712 (k=0) 0.745 (k=10), two DSC 0.745 (k=all)")
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["scores"] == values["scores"]


def test_models_without_any_says_how_to_get_one(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "list_bundles", list)
    assert main(["models"]) == 0
    assert "nmsw export" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["train", "export", "evaluate"])
def test_training_verb_without_its_packages_names_the_extra(capsys, monkeypatch, verb):
    def missing(name):
        raise ModuleNotFoundError("No module named 'monai'", name="monai")

    monkeypatch.setattr(command_line.importlib, "import_module", missing)
    assert main([verb, "--help"]) == 2
    assert "'monai'" in (errors := capsys.readouterr().err) and 'pip install ".[train]"' in errors


@pytest.mark.parametrize("words", [["--help"], ["segment", "--help"], ["models", "--help"], ["--version"], ["worker", "--help"]])
def test_help_and_version_are_exit_code_0(capsys, words):
    assert main(words) == 0
    assert "NMSWSegment" in (output := capsys.readouterr().out) or "nmsw" in output


def test_program_opens_names_of_all_countries_on_windows(monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr("locale.setlocale", lambda *arguments: chosen.append(arguments))
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["--version"]) == 0 and chosen == [(locale.LC_CTYPE, ".UTF-8")]


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"    {verb} " in output for verb in ("segment", "models", "worker", "train", "export", "evaluate"))


@pytest.mark.parametrize("words", [[], ["segmnt"], ["segment"]])
def test_wrong_words_are_exit_code_2(capsys, words):
    assert main(words) == 2
    assert "--help" in capsys.readouterr().err


def test_install_and_remove_change_what_models_lists(a_tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NMSW_BUNDLES", str(tmp_path / "own"))
    assert main(["install", str(a_tiny_bundle)]) == 0
    assert main(["models", "--json"]) == 0
    assert "tiny" in [facts["name"] for facts in json.loads(capsys.readouterr().out.partition("\n")[2])]
    assert main(["install", str(a_tiny_bundle)]) == 2
    assert "Remove it first" in capsys.readouterr().err
    assert main(["install", str(a_tiny_bundle), "--replace"]) == 0
    assert main(["remove", "tiny"]) == 0
    assert main(["remove", "tiny"]) == 2
    assert list((tmp_path / "own").iterdir()) == []


def test_models_one_damaged_model_does_not_hide_the_others(a_tiny_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NMSW_BUNDLES", str(tmp_path / "own"))
    main(["install", str(a_tiny_bundle)])
    (tmp_path / "own" / "tiny" / "local.pt").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["models"]) == 0
    output, errors = capsys.readouterr()
    assert "torso-unet" in output and "tiny" not in output
    assert "Install the bundle again" in errors
