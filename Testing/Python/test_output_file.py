"""Output files where other programs, virus scanners and Windows come in between."""

import locale
import os
import sys
from pathlib import Path

import pytest

import NMSWSegment
from NMSWSegment.files import output_file
from NMSWSegment.files.output_file import (
    check_output_path,
    draft_folder,
    letters_hint,
    new_folder,
    replace_folder,
    replace_path,
    replaced_together,
    use_utf8_names,
)
from NMSWSegment.protocol import UserError


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


def held(monkeypatch, *, times: float, source: str = "*", target: str = "*") -> list:
    """Let renaming paths of these names fail so many times; the calls that failed."""
    calls, replace = [], os.replace

    def fail_at_first(one, other):
        if Path(one).match(source) and Path(other).match(target) and len(calls) < times:
            calls.append(one)
            refuse()
        replace(one, other)

    monkeypatch.setattr("os.replace", fail_at_first)
    return calls


@pytest.fixture
def on_windows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(output_file, "_HELD_S", 0.3)


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ("import tempfile", {"panel/dicom_export.py", "panel/segmenter.py", "panel/self_test.py"}),  # in the application's own folder
        ("os.replace(", {"files/output_file.py"}),
        ("os.rename(", set()),
        ("shutil.move(", set()),
    ],
)
def test_everything_takes_the_ways_that_work_on_windows(words, files):
    package = Path(NMSWSegment.__file__).parent
    assert {path.relative_to(package).as_posix() for path in package.rglob("*.py") if words in path.read_text(encoding="utf-8")} == files


@pytest.mark.parametrize("make", [lambda folder: new_folder(folder, prefix="."), lambda folder: check_output_path(folder / "a.csv", (".csv",))])
def test_folder_that_cannot_be_written_fails_at_once(tmp_path, monkeypatch, make):
    calls = []
    for name in ("open", "mkdir"):
        monkeypatch.setattr(os, name, lambda *_, **__: calls.append(name) or refuse())
    with pytest.raises((PermissionError, UserError), match="Permission denied"):
        make(tmp_path)
    assert len(calls) == 1


def test_output_that_another_program_has_open_is_refused_before_the_run(tmp_path, monkeypatch):
    (tmp_path / "table.csv").write_text("old")
    monkeypatch.setattr(output_file, "open", refuse, raising=False)
    with pytest.raises(UserError, match="write-protected, or another program has it open.*close that program"):
        check_output_path(tmp_path / "table.csv", (".csv",))
    assert texts(tmp_path) == {"table.csv": "old"}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere, and Windows has other permissions")
def test_write_protected_output_is_refused_before_the_run(tmp_path):
    (tmp_path / "table.csv").write_text("old")
    (tmp_path / "table.csv").chmod(0o400)
    with pytest.raises(UserError, match="write-protected"):
        check_output_path(tmp_path / "table.csv", (".csv",))


def test_file_that_a_virus_scanner_looks_at_is_renamed_a_moment_later(tmp_path, monkeypatch, on_windows):
    (tmp_path / "a").write_text("new")
    calls = held(monkeypatch, times=2)
    replace_path(tmp_path / "a", tmp_path / "b")
    assert texts(tmp_path) == {"b": "new"} and len(calls) == 2


def test_file_that_stays_open_is_not_waited_for_without_end(tmp_path, monkeypatch, on_windows):
    (tmp_path / "a").write_text("new")
    held(monkeypatch, times=float("inf"))
    with pytest.raises(PermissionError):
        replace_path(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(sys, "platform", "linux")
    calls = held(monkeypatch, times=1)
    with pytest.raises(PermissionError):
        replace_path(tmp_path / "a", tmp_path / "b")
    assert len(calls) == 1


@pytest.mark.parametrize("has_links", [True, False])
def test_older_file_that_stays_open_leaves_no_second_one(tmp_path, monkeypatch, has_links):
    (tmp_path / "a.txt").write_text("old a")
    (tmp_path / "b.txt").write_text("old b")
    held(monkeypatch, times=float("inf"), target="b.txt")
    if not has_links:  # FAT, network drives
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match="could not be written"), replaced_together([tmp_path / "a.txt", tmp_path / "b.txt"]) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert texts(tmp_path) == {"a.txt": "old a", "b.txt": "old b"}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()])
def test_older_folder_returns_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, error):
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace = os.replace

    def fail(source, target):
        if source.name == "new":
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        replace_folder(tmp_path / "new", tmp_path / "place", aside=tmp_path / "old")
    assert texts(tmp_path / "place") == {"file": "place"} and not (tmp_path / "old").exists()
    monkeypatch.undo()
    replace_folder(tmp_path / "new", tmp_path / "place", aside=tmp_path / "old")
    assert texts(tmp_path / "place") == {"file": "new"} and texts(tmp_path / "old") == {"file": "place"}


def test_draft_is_gone_whatever_happens(tmp_path):
    with pytest.raises(ZeroDivisionError), draft_folder(tmp_path, prefix=".draft-") as folder:
        (folder / "file").write_text("half")
        1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [None, locale.Error("unsupported locale setting")])
def test_names_are_utf8_for_c_libraries_on_windows(monkeypatch, error):
    chosen = []

    def choose(category, name):
        chosen.append((category, name))
        if error:
            raise error

    monkeypatch.setattr(locale, "setlocale", choose)
    use_utf8_names()
    assert not chosen or os.name == "nt"
    monkeypatch.setattr(sys, "platform", "win32")
    use_utf8_names()
    assert chosen[-1] == (locale.LC_CTYPE, ".UTF-8")


def test_letters_of_a_path_are_named_on_windows_only(monkeypatch):
    for platform, names in (("linux", []), ("win32", ["größe/ct.nii", "患者.nii"])):
        monkeypatch.setattr(sys, "platform", platform)
        assert [name for name in ("größe/ct.nii", "患者.nii", "plain/ct.nii") if "try a folder with plain letters" in letters_hint(Path(name))] == names
