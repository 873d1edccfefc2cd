"""Cohorts: what is left of a run that was killed, broken cases, dying processes, locks, pages."""

import csv
import errno
import html.parser
import io
import json
import locale
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from NMSWSegment.__main__ import main
from NMSWSegment.cohort import local_workers
from NMSWSegment.cohort.case_run import CohortSettings, _put_in_place, run_case
from NMSWSegment.cohort.cases import Case, find_cases
from NMSWSegment.cohort.cohort import _duration, _prepare
from NMSWSegment.cohort.local_workers import WorkerPlan, plan_workers
from NMSWSegment.cohort.outcome import case_folder, failed_outcome, finished_outcome, input_facts
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.folder_lock import locked_folder
from NMSWSegment.files.volume import Volume, read_volume, write_volume
from NMSWSegment.protocol import SegmentOptions, UserError

ROOT = Path(__file__).resolve().parents[2]


def write_cases(folder: Path, *, count: int, broken: int = 1) -> None:
    """Small phantoms case0.nii.gz, ..., the last of them broken."""
    folder.mkdir()
    shape = (30, 24, 34)
    volume, _ = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((10.0, 10.0, 9.0), shape))
    for index in range(count):
        write_volume(Volume(np.roll(volume.array, index, axis=2).astype(np.int16), volume.ijk_to_ras), folder / f"case{index}.nii.gz")
    for index in range(count - broken, count):
        path = folder / f"case{index}.nii.gz"
        path.write_bytes(path.read_bytes()[:300])


def settings_for(output: Path, bundle: Path, **changes) -> CohortSettings:
    """Settings of a quick cohort."""
    options = SegmentOptions(bundle=str(bundle), num_patches=2, device="cpu")
    settings = CohortSettings(output=output, options=options, bundle_sha256=load_bundle(str(bundle)).sha256, ending=".nii.gz", with_pictures=False)
    (output / "cases").mkdir(parents=True, exist_ok=True)
    return replace(settings, **changes)


def words(folder: Path, output: Path, bundle: Path, *more: str) -> list[str]:
    """Of the command line."""
    options = ["--bundle", str(bundle), "--device", "cpu", "--k", "2", "--format", ".nii.gz", "--no-pictures", *more]
    return ["segment-cohort", str(folder), "-o", str(output), *options]


def rows_of(path: Path) -> list[dict]:
    """Of a csv file."""
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_cohort_of_ten_killed_with_signal_9_goes_on_and_one_broken_case_stops_nothing(tmp_path, a_tiny_bundle):
    folder, output = tmp_path / "in", tmp_path / "out"
    write_cases(folder, count=10)
    command = [sys.executable, "-m", "NMSWSegment", *words(folder, output, a_tiny_bundle, "--workers", "2")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    finished = lambda: sorted((output / "cases").glob("case*"))  # noqa: E731
    deadline = time.monotonic() + 60
    while len(finished()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    kept = {path.name: (path / "outcome.json").stat().st_mtime_ns for path in finished()}
    assert 2 <= len(kept) < 9

    second = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, env=environment)

    assert second.returncode == 2, second.stdout + second.stderr
    assert f"{len(kept)} of 10 cases are done already." in second.stdout
    assert "9 of 10 cases done" in second.stdout and "1 of 10 cases failed, the first: case9:" in second.stderr and "Copy or export it again" in second.stderr
    for name, changed in kept.items():
        assert (output / "cases" / name / "outcome.json").stat().st_mtime_ns == changed
    assert sorted(path.name for path in (output / "cases").iterdir()) == [f"case{index}" for index in range(9)]  # nothing half-done
    outcomes = rows_of(output / "cohort.csv")
    assert [(row["case"], row["status"]) for row in outcomes] == [(f"case{index}", "done" if index < 9 else "failed") for index in range(10)]
    statistics = rows_of(output / "statistics.csv")
    assert len(statistics) == 27 and {row["case"] for row in statistics} == {f"case{index}" for index in range(9)}
    assert np.unique(read_volume(output / "cases" / "case0" / "segmentation.nii.gz").array).tolist() == [0, 1, 2, 3]


def test_stopped_cohort_says_how_to_go_on_and_leaves_nothing_half_done(tmp_path, a_tiny_bundle, monkeypatch, capfd):
    write_cases(tmp_path / "in", count=2, broken=0)

    def stopped(cases, settings, **options):
        (settings.output / "cases" / ".partial-case0-1").mkdir()
        yield local_workers.Started(cases[0])
        raise KeyboardInterrupt

    monkeypatch.setattr("NMSWSegment.cohort.cohort.run_on_this_computer", stopped)
    assert main(words(tmp_path / "in", tmp_path / "out", a_tiny_bundle)) == 130
    assert "0 of 2 cases came to an end. The same command goes on with the others." in capfd.readouterr().err
    assert not list((tmp_path / "out" / "cases").iterdir()) and rows_of(tmp_path / "out" / "cohort.csv") == []


def test_dicom_segmentation_of_a_case_that_is_no_dicom_fails_before_it_is_segmented(tmp_path, a_tiny_bundle, monkeypatch):
    pytest.importorskip("highdicom", reason="the extra dicom is not installed")
    write_cases(tmp_path / "in", count=1, broken=0)
    monkeypatch.setattr("NMSWSegment.engine.segmentation.segment_volume", None)
    outcome = run_case(find_cases(tmp_path / "in").cases[0], settings_for(tmp_path / "out", a_tiny_bundle, ending=".dcm"), device="cpu", threads=1)
    assert outcome.status == "failed" and "refers to the DICOM images" in outcome.message


@pytest.mark.parametrize(("kind", "message"), [("user", "is damaged"), ("bug", "This is a bug (ZeroDivisionError"), ("memory", "ran out of memory")])
def test_failing_case_leaves_an_outcome_and_nothing_half_done(tmp_path, a_tiny_bundle, monkeypatch, kind, message):
    write_cases(tmp_path / "in", count=1, broken=int(kind == "user"))
    settings = settings_for(tmp_path / "out", a_tiny_bundle)

    def fail(*arguments, **options):
        raise {"bug": ZeroDivisionError("x"), "memory": MemoryError()}[kind]

    if kind != "user":
        monkeypatch.setattr("NMSWSegment.engine.segmentation.segment_volume", fail)
    case = find_cases(tmp_path / "in").cases[0]
    outcome = run_case(case, settings, device="cpu", threads=1)
    assert outcome.status == "failed" and message in outcome.message and outcome.case == "case0"
    assert not list((tmp_path / "out" / "cases").iterdir())
    details = tmp_path / "out" / "failed" / "case0.txt"
    assert details.exists() == (kind == "bug")
    if kind == "bug":
        assert "ZeroDivisionError" in details.read_text(encoding="utf-8")
        monkeypatch.undo()
        assert run_case(case, settings, device="cpu", threads=1).status == "done" and not details.exists()


def test_changed_input_of_the_same_name_is_done_again(tmp_path, a_tiny_bundle):
    write_cases(tmp_path / "in", count=2, broken=0)
    settings = settings_for(tmp_path / "out", a_tiny_bundle)
    first, second = find_cases(tmp_path / "in").cases
    run_case(first, settings, device="cpu", threads=1)
    assert finished_outcome(settings.output, first).status == "done"
    other = replace(second, name=first.name)
    assert finished_outcome(settings.output, other) is None
    assert run_case(other, settings, device="cpu", threads=1).input == str(second.input)
    assert finished_outcome(settings.output, other).status == "done" and len(list((settings.output / "cases").iterdir())) == 1


def test_worker_process_that_is_killed_costs_its_case_only(tmp_path, a_tiny_bundle):
    write_cases(tmp_path / "in", count=2, broken=0)
    settings = settings_for(tmp_path / "out", a_tiny_bundle)
    plan = WorkerPlan(devices=("cpu",), threads=1, memory_bytes=None)
    workers, original = [], local_workers._Worker

    class Watched(original):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            workers.append(self)

    local_workers._Worker = Watched
    try:
        outcomes = []
        for event in local_workers.run_on_this_computer(find_cases(tmp_path / "in").cases, settings, plan=plan, needs_bytes={}):
            if isinstance(event, local_workers.Started) and event.case.name == "case0":
                workers[0]._process.kill()
            elif isinstance(event, local_workers.Finished):
                outcomes.append((event.case.name, event.outcome.status, "process" in event.outcome.message))
    finally:
        local_workers._Worker = original
    assert outcomes == [("case0", "failed", True), ("case1", "done", False)]
    assert not workers[0]._process.is_alive()


def test_case_waits_until_there_is_memory_beside_those_that_run():
    cases = [Case(name, Path(name)) for name in ("big", "small", "unknown", "giant")]
    needs = {"big": 70, "small": 20, "unknown": None, "giant": 500}
    plan = WorkerPlan(devices=("cpu",) * 4, threads=1, memory_bytes=100)
    fits = lambda waiting, running: local_workers._next_that_fits(waiting, running, plan=plan, needs_bytes=needs)  # noqa: E731
    assert fits(cases, []) == 0
    assert fits([cases[3], cases[1]], [cases[0]]) == 1  # past the giant
    assert fits([cases[3]], [cases[2]]) is None
    assert fits([cases[3]], []) == 0  # alone, whatever the estimate


@pytest.mark.parametrize(
    ("arguments", "devices", "threads"),
    [
        ({}, ("cpu",) * 8, 1),
        ({"num_cases": 3}, ("cpu",) * 3, 2),
        ({"workers": 2}, ("cpu",) * 2, 4),
        ({"threads": 4}, ("cpu",) * 2, 4),
        ({"gpus": ("cuda:0", "cuda:1")}, ("cuda:0", "cuda:1"), 4),
        ({"gpus": ("cuda:0", "cuda:1"), "workers": 3}, ("cuda:0", "cuda:1", "cuda:0"), 2),
        ({"gpus": ("cuda:0",), "device": "cpu"}, ("cpu",) * 8, 1),
        ({"cores": 1, "num_cases": 1}, ("cpu",), 1),
    ],
)
def test_plan_has_as_many_workers_as_gpus_or_cores_but_not_more_than_cases(arguments, devices, threads):
    defaults = {"num_cases": 100, "cores": 8, "gpus": (), "device": "auto", "workers": None, "threads": None, "memory_bytes": 1000}
    plan = plan_workers(**defaults | arguments)
    assert (plan.devices, plan.threads, plan.memory_bytes) == (devices, threads, 900)


@pytest.mark.parametrize(("workers", "threads"), [(None, 2), (40, 2)])
def test_plan_has_no_more_workers_than_windows_can_wait_for(monkeypatch, workers, threads):
    monkeypatch.setattr(sys, "platform", "win32")
    plan = plan_workers(num_cases=100, cores=64, gpus=(), device="auto", workers=workers, threads=None, memory_bytes=None)
    assert (len(plan.devices), plan.threads) == (30, threads)


def test_other_settings_are_refused_until_a_restart_is_asked_for(tmp_path, a_tiny_bundle):
    write_cases(tmp_path / "in", count=1, broken=0)
    settings = settings_for(tmp_path / "out", a_tiny_bundle)
    case = find_cases(tmp_path / "in").cases[0]
    _prepare(settings, restart=False)
    run_case(case, settings, device="cpu", threads=1)
    elsewhere = replace(settings, options=replace(settings.options, device="cuda", threads=3, bundle="another path of the same model"))
    _prepare(elsewhere, restart=False)
    assert finished_outcome(settings.output, case)
    other = replace(settings, options=replace(settings.options, num_patches=1))
    with pytest.raises(UserError, match=r"other settings \(options\).*--restart"):
        _prepare(other, restart=False)
    assert finished_outcome(settings.output, case)
    _prepare(other, restart=True)
    assert finished_outcome(settings.output, case) is None


def test_second_run_in_the_same_folder_is_refused(tmp_path, a_tiny_bundle, capfd):
    write_cases(tmp_path / "in", count=1, broken=0)
    with locked_folder(tmp_path / "out"):
        assert main(words(tmp_path / "in", tmp_path / "out", a_tiny_bundle)) == 2
    assert "Another run works in the folder" in capfd.readouterr().err
    with locked_folder(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        (["--workers", "0"], "Use 1 or more"),
        (["--structures", "livr"], "Did you mean 'liver'"),
        (["--format", ".png"], "nmsw segment-cohort --help"),
        (["--format", ".dcm"], "refers to the DICOM images"),
    ],
)
def test_cohort_mistake_is_one_sentence_before_any_case_runs(tmp_path, a_tiny_bundle, capfd, more, fix):
    if ".dcm" in more:
        pytest.importorskip("highdicom", reason="the extra dicom is not installed")
    write_cases(tmp_path / "in", count=1, broken=0)
    assert main(words(tmp_path / "in", tmp_path / "out", a_tiny_bundle, *more)) == 2
    assert fix in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def runs_here(monkeypatch) -> None:
    """Let cohorts run in this process, which saves the start of another one."""

    def run_here(cases, settings, **options):
        for case in cases:
            yield local_workers.Started(case)
            yield local_workers.Finished(case, run_case(case, settings, device="cpu", threads=1))

    monkeypatch.setattr("NMSWSegment.cohort.cohort.run_on_this_computer", run_here)


def test_table_that_a_spreadsheet_holds_open_stops_nothing_and_the_same_command_writes_it(tmp_path, a_tiny_bundle, monkeypatch, capfd):
    runs_here(monkeypatch)
    write_cases(tmp_path / "in", count=3, broken=0)
    monkeypatch.setattr("NMSWSegment.cohort.cohort._WRITE_INTERVAL_S", 0.0)
    replace_file = os.replace

    def locked(source, target):  # as Windows does
        if Path(target).name == "cohort.csv":
            raise PermissionError(errno.EACCES, "Access is denied")
        replace_file(source, target)

    with monkeypatch.context() as windows:
        windows.setattr(os, "replace", locked)
        assert main(words(tmp_path / "in", tmp_path / "out", a_tiny_bundle)) == 2
    output, errors = capfd.readouterr()
    assert "3 of 3 cases done" in output and errors.count("cohort.csv cannot be written now") == 1
    assert "Could not be written: cohort.csv. Close these files in other programs" in errors and "run the same command again" in errors
    assert {row["case"] for row in rows_of(tmp_path / "out" / "statistics.csv")} == {"case0", "case1", "case2"}
    assert not (tmp_path / "out" / "cohort.csv").exists()

    assert main(words(tmp_path / "in", tmp_path / "out", a_tiny_bundle)) == 0
    assert "3 of 3 cases are done already." in capfd.readouterr().out and [row["status"] for row in rows_of(tmp_path / "out" / "cohort.csv")] == ["done"] * 3


@pytest.mark.parametrize("source", ["study/cases", "study/cases/p1", "list.txt"])
def test_patients_in_study_cases_are_not_deleted_when_the_output_is_study(tmp_path, a_tiny_bundle, capfd, source):
    for name in ("p1", "p2"):
        (tmp_path / "study" / "cases" / name).mkdir(parents=True)
        (tmp_path / "study" / "cases" / name / "ct.nii.gz").write_bytes(b"precious")
    (tmp_path / "list.txt").write_text("study/cases/p2/ct.nii.gz\n")
    assert main(words(tmp_path / source, tmp_path / "study", a_tiny_bundle)) == 2
    error = capfd.readouterr().err
    assert "lies where the results of" in error and "Choose another output folder" in error
    files = sorted(path.relative_to(tmp_path / "study").as_posix() for path in (tmp_path / "study").rglob("*") if path.is_file())
    assert files == ["cases/p1/ct.nii.gz", "cases/p2/ct.nii.gz"]


@pytest.mark.parametrize("content", [None, "{}", '{"outcome": "of an election"}'])
def test_foreign_folder_in_the_place_of_a_case_is_kept(tmp_path, a_tiny_bundle, content):
    write_cases(tmp_path / "in", count=1, broken=0)
    settings = settings_for(tmp_path / "out", a_tiny_bundle)
    case = find_cases(tmp_path / "in").cases[0]
    foreign = case_folder(settings.output, case)
    foreign.mkdir()
    (foreign / "slice.dcm").write_bytes(b"precious")
    if content is not None:
        (foreign / "outcome.json").write_text(content)
    outcome = run_case(case, settings, device="cpu", threads=1)
    assert outcome.status == "failed" and "Move it elsewhere" in outcome.message
    assert (foreign / "slice.dcm").read_bytes() == b"precious" and list((settings.output / "cases").iterdir()) == [foreign]


def test_older_results_return_where_the_new_ones_cannot_take_their_place(tmp_path, monkeypatch):
    new, target = tmp_path / ".partial-a", tmp_path / "a"
    for folder in (new, target):
        folder.mkdir()
        (folder / "outcome.json").write_text(json.dumps({"outcome": {"case": folder.name}}))
    replace = os.replace

    def refuse_the_new_ones(source, target):
        if source == new:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    with monkeypatch.context() as patches, pytest.raises(PermissionError):
        patches.setattr(os, "replace", refuse_the_new_ones)
        _put_in_place(new, target)
    assert json.loads((target / "outcome.json").read_text(encoding="utf-8")) == {"outcome": {"case": "a"}} and new.is_dir()
    _put_in_place(new, target)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and ".partial-a" in (target / "outcome.json").read_text(encoding="utf-8")


def test_workers_open_names_of_all_countries_on_windows(tmp_path, a_tiny_bundle, monkeypatch):
    write_cases(tmp_path / "in", count=1)
    chosen = []
    monkeypatch.setattr("locale.setlocale", lambda *arguments: chosen.append(arguments))
    monkeypatch.setattr(sys, "platform", "win32")
    run_case(find_cases(tmp_path / "in").cases[0], settings_for(tmp_path / "out", a_tiny_bundle), device="cpu", threads=1)
    assert chosen == [(locale.LC_CTYPE, ".UTF-8")]


def test_folder_on_a_drive_without_locks_is_used_all_the_same(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl", reason="Windows has other locks")
    for number, is_taken in ((errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EAGAIN, True)):
        caplog.clear()
        monkeypatch.setattr(fcntl, "flock", lambda *_, number=number: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        with pytest.raises(UserError, match="Another run works") if is_taken else nullcontext(), locked_folder(tmp_path / "out"):
            assert not is_taken
        assert ("cannot be locked" in caplog.text) == (not is_taken)


def test_lock_on_windows_lets_others_read_the_file(tmp_path, monkeypatch):
    places = []
    msvcrt = SimpleNamespace(LK_NBLCK=2, locking=lambda number, mode, count: places.append((os.lseek(number, 0, os.SEEK_CUR), count)))
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    with monkeypatch.context() as patches:
        patches.setattr(os, "name", "nt")
        with locked_folder(tmp_path):
            pass
    assert places == [(1 << 30, 1)] and (tmp_path / ".lock").stat().st_size == 0


def test_restart_removes_our_results_and_no_foreign_files(tmp_path, a_tiny_bundle):
    write_cases(tmp_path / "in", count=1, broken=0)
    settings = settings_for(tmp_path / "out", a_tiny_bundle)
    _prepare(settings, restart=False)
    case = find_cases(tmp_path / "in").cases[0]
    run_case(case, settings, device="cpu", threads=1)
    (settings.output / "failed").mkdir()
    (settings.output / "cases" / "mine").mkdir()
    files = {"cases/mine/ct.nii.gz": "mine", "cases/notes.txt": "mine", "failed/mine.txt": "mine", "failed/case9.txt": "Traceback (most recent call last):\n"}
    for name, text in files.items():
        (settings.output / name).write_text(text)
    _prepare(replace(settings, ending=".nii"), restart=True)
    left = sorted(path.relative_to(settings.output).as_posix() for path in settings.output.rglob("*") if path.is_file())
    assert left == ["cases/mine/ct.nii.gz", "cases/notes.txt", "cohort.json", "failed/mine.txt"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("cohort.json", "[]"), ("cohort.json", '{"mine": 1}'), ("cohort.json", "{"), ("statistics.csv", "mine"), ("quality.html", "mine"), ("cohort.csv", "mine"),
     ("cases", "a file"), ("cases/p1/slice.dcm", "mine"), ("failed/p1.txt", "mine")],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--restart"]])
def test_output_folder_of_somebody_else_is_refused_and_kept(tmp_path, a_tiny_bundle, capfd, name, text, more):
    write_cases(tmp_path / "in", count=1, broken=0)
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert main(words(tmp_path / "in", tmp_path / "out", a_tiny_bundle, *more)) == 2
    error = capfd.readouterr().err
    assert f"holds something else than a cohort: {name.partition('/')[0]}. Choose another output folder" in error and "--restart" not in error
    assert path.read_text(encoding="utf-8") == text and [found.name for found in (tmp_path / "out").iterdir() if found.name != ".lock"] == [
        name.partition("/")[0]
    ]


def test_cases_that_became_a_file_is_one_sentence(tmp_path, a_tiny_bundle):
    settings = settings_for(tmp_path / "out", a_tiny_bundle)
    _prepare(settings, restart=False)
    (settings.output / "cases").rmdir()
    (settings.output / "cases").touch()
    with pytest.raises(UserError, match="cases' cannot be made .* Choose another output folder"):
        _prepare(settings, restart=False)


def test_list_named_cohort_csv_in_the_output_folder_is_not_replaced(tmp_path, a_tiny_bundle, capfd):
    write_cases(tmp_path / "study", count=1, broken=0)
    (tmp_path / "study" / "cohort.csv").write_text("input,name\ncase0.nii.gz,anna\n")
    assert main(words(tmp_path / "study" / "cohort.csv", tmp_path / "study", a_tiny_bundle)) == 2
    assert "would be replaced by the cohort.csv of the results. Rename the list" in capfd.readouterr().err
    assert (tmp_path / "study" / "cohort.csv").read_text(encoding="utf-8") == "input,name\ncase0.nii.gz,anna\n"


def test_folder_that_is_its_own_output_is_gone_on_with(tmp_path, a_tiny_bundle, monkeypatch, capfd):
    runs_here(monkeypatch)
    write_cases(tmp_path / "study", count=2, broken=0)
    assert main(words(tmp_path / "study", tmp_path / "study", a_tiny_bundle)) == 0
    assert main(words(tmp_path / "study", tmp_path / "study", a_tiny_bundle)) == 0
    assert "2 of 2 cases are done already." in capfd.readouterr().out
    assert [(row["case"], row["status"]) for row in rows_of(tmp_path / "study" / "cohort.csv")] == [("case0", "done"), ("case1", "done")]


def test_output_folder_named_like_its_model_is_not_taken_for_the_model(tmp_path, a_tiny_bundle, monkeypatch, capfd):
    runs_here(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NMSW_BUNDLES", str(a_tiny_bundle.parent))
    for count in (1, 2):
        write_cases(tmp_path / f"in{count}", count=count, broken=0)
        assert main(words(Path(f"in{count}"), Path(a_tiny_bundle.name), Path(a_tiny_bundle.name))) == 0, capfd.readouterr().err
    assert [row["status"] for row in rows_of(tmp_path / a_tiny_bundle.name / "cohort.csv")] == ["done", "done"]


@pytest.mark.skipif(sys.platform == "win32", reason="names are UTF-16 there")
def test_file_name_that_is_not_utf8_fails_alone_and_on_an_ascii_console(tmp_path, a_tiny_bundle, monkeypatch):
    runs_here(monkeypatch)
    write_cases(tmp_path / "ü", count=2, broken=1)
    try:
        os.rename(tmp_path / "ü" / "case1.nii.gz", os.fsencode(tmp_path / "ü") + b"/m\xfcller.nii.gz")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "ü" / "damaged.nii.gz").write_bytes(b"no")
    ascii_streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", ascii_streams[0])
    monkeypatch.setattr(sys, "stderr", ascii_streams[1])
    assert main(words(tmp_path / "ü", tmp_path / "out", a_tiny_bundle)) == 2
    output, errors = (stream.buffer.getvalue().decode("ascii") for stream in ascii_streams)
    assert (
        "1 of 3 cases done" in output
        and "m\\udcfcller.nii.gz' has characters that are not UTF-8. Rename the file" in output
        and "2 of 3 cases failed" in errors
    )
    rows = rows_of(tmp_path / "out" / "cohort.csv")
    assert [(row["case"], row["status"]) for row in rows] == [("case0", "done"), ("damaged", "failed"), ("m_ller", "failed")]
    assert rows[2]["input"].endswith("/ü/m\\udcfcller.nii.gz")


def test_changed_input_or_missing_result_is_done_again(tmp_path, a_tiny_bundle):
    write_cases(tmp_path / "in", count=1, broken=0)
    settings = settings_for(tmp_path / "out", a_tiny_bundle)
    case = find_cases(tmp_path / "in").cases[0]
    folder = case_folder(settings.output, case)

    def is_finished_after(change) -> bool:
        assert run_case(case, settings, device="cpu", threads=1).status == "done" and finished_outcome(settings.output, case)
        change()
        return finished_outcome(settings.output, case) is not None

    def without(key):
        facts = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        del facts[key]
        (folder / "outcome.json").write_text(json.dumps(facts))

    assert not is_finished_after(lambda: os.utime(case.input, (1, 1)))
    assert not is_finished_after(lambda: write_volume(Volume(read_volume(case.input).array[4:], np.eye(4)), case.input))
    assert not is_finished_after((folder / "segmentation.nii.gz").unlink)
    assert not is_finished_after((folder / "statistics.csv").unlink)
    assert not is_finished_after(lambda: without("titles"))
    assert not is_finished_after(lambda: (folder / "outcome.json").write_text((folder / "outcome.json").read_text(encoding="utf-8")[:100]))
    assert is_finished_after(lambda: without("input_facts"))  # written by an earlier version


def test_changed_folder_of_slices_is_noticed(tmp_path):
    (tmp_path / "p1").mkdir()
    for name, changed in (("a", 5), ("b", 7), ("cohort.json", 9), (".DS_Store", 9)):
        (tmp_path / "p1" / name).touch()
        os.utime(tmp_path / "p1" / name, (changed, changed))
    case = Case("p1", tmp_path / "p1")
    assert input_facts(case) == {"files": 2, "changed_ms": 7000}
    (tmp_path / "p1" / "a").unlink()
    assert input_facts(case) == {"files": 1, "changed_ms": 7000}
    assert input_facts(Case("gone", tmp_path / "gone")) is None


def test_changed_voxels_beside_their_header_are_noticed(tmp_path):
    for name, text, changed in (("ct[1].mhd", "12", 5), ("ct[1].raw", "123", 7), ("ct[2].raw", "1234", 9), ("ct[1].nii", "12345", 9)):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (changed, changed))
    assert input_facts(Case("a", tmp_path / "ct[1].nii")) == {"bytes": 5, "changed_ms": 9000}
    (tmp_path / "ct[1].nii").unlink()
    assert input_facts(Case("a", tmp_path / "ct[1].mhd")) == {"bytes": 5, "changed_ms": 7000}
    (tmp_path / "ct[1].mhd").unlink()
    assert input_facts(Case("a", tmp_path / "ct[1].mhd")) is None


def test_too_few_open_files_for_a_worker_is_one_sentence(tmp_path, a_tiny_bundle, monkeypatch):
    def refused(process):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", refused)
    settings = settings_for(tmp_path / "out", a_tiny_bundle)
    plan = WorkerPlan(devices=("cpu",), threads=1, memory_bytes=None)
    with pytest.raises(UserError, match=r"Too many open files.*ulimit -n"):
        list(local_workers.run_on_this_computer([Case("a", tmp_path / "a.nii.gz")], settings, plan=plan, needs_bytes={}))


def test_list_line_of_5000_letters_is_one_sentence_for_dicom_too(tmp_path, a_tiny_bundle, monkeypatch, capfd):
    pytest.importorskip("highdicom", reason="the extra dicom is not installed")
    runs_here(monkeypatch)
    (tmp_path / "list.txt").write_text("x" * 5000 + "\n")
    for format_, fix in ((".dcm", "Choose another name or folder"), (".nii.gz", "1 of 1 cases failed, the first: xxx")):
        assert main([*words(tmp_path / "list.txt", tmp_path / "out", a_tiny_bundle), "--format", format_]) == 2
        error = capfd.readouterr().err
        assert fix in error and "File name too long" in error


class Page(html.parser.HTMLParser):
    """What an HTML page holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_sheet_and_page_are_whole_in_themselves_and_list_warnings_first(tmp_path, a_tiny_bundle):
    pytest.importorskip("matplotlib")
    from NMSWSegment.cohort.quality_page import write_cohort_page

    write_cases(tmp_path / "in", count=2, broken=0)
    settings = settings_for(tmp_path / "out", a_tiny_bundle, with_pictures=True)
    good, other = find_cases(tmp_path / "in").cases
    volume = read_volume(other.input)
    write_volume(Volume(volume.array[13:17], volume.ijk_to_ras), other.input)  # 40 mm long
    outcomes = [run_case(case, settings, device="cpu", threads=1) for case in (good, other)]
    outcomes.append(failed_outcome(Case("<b>odd</b>", Path("odd")), 'It is "odd" & <i>broken</i>'))
    assert [outcome.status for outcome in outcomes] == ["done", "done", "failed"]
    outcomes[0] = replace(outcomes[0], warnings=0)
    assert outcomes[1].warnings > 0

    folder = case_folder(settings.output, other)
    assert {path.name for path in folder.iterdir()} == {
        "outcome.json", "preview.png", "report.json", "segmentation.nii.gz", "sheet.html", "statistics.csv", "thumbnail.jpg"
    }  # fmt: skip
    sheet = Page(folder / "sheet.html")
    assert "The scan is only 40 mm long from head to foot" in sheet.text and "Henderson" in sheet.text
    assert all(link.startswith("data:image/png;base64,") for link in sheet.links) and len(sheet.links) == 1

    done = {case.name: case_folder(settings.output, case) for case in (good, other)}
    write_cohort_page(settings.output / "quality.html", outcomes, folder_of=done, title="Cohort")
    page = Page(settings.output / "quality.html")
    assert [attributes["data-case"] for tag, attributes in page.tags if tag == "tr" and "data-case" in attributes] == ["<b>odd</b>", "case1", "case0"]
    assert 'It is "odd" & <i>broken</i>' in page.text and not [tag for tag, _ in page.tags if tag in ("i", "b", "link")]
    local = [link for link in page.links if not link.startswith("data:image/jpeg;base64,")]
    assert local == ["cases/case1/sheet.html", "cases/case0/sheet.html"] and all((settings.output / link).exists() for link in local)
    assert "3 cases: 2 done, 1 failed" in page.text


def test_cohort_on_two_local_ray_workers_gives_what_local_processes_give(tmp_path, a_tiny_bundle, capfd):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    write_cases(tmp_path / "in", count=3)
    code = main(words(tmp_path / "in", tmp_path / "ray", a_tiny_bundle, "--workers", "2", "--ray", "local"))
    output, errors = capfd.readouterr()
    if "Ray could not be started here" in errors:
        pytest.skip("this computer is too busy for Ray, which gives its processes 30 s to start")
    assert code == 2 and "2 of 3 cases done" in output
    assert [row["status"] for row in rows_of(tmp_path / "ray" / "cohort.csv")] == ["done", "done", "failed"]
    settings = settings_for(tmp_path / "here", a_tiny_bundle)
    for case in find_cases(tmp_path / "in").cases[:2]:
        run_case(case, settings, device="cpu", threads=1)
        arrays = [read_volume(case_folder(tmp_path / place, case) / "segmentation.nii.gz").array for place in ("ray", "here")]
        np.testing.assert_array_equal(*arrays)


def test_ray_that_cannot_be_reached_or_started_is_one_sentence(tmp_path, a_tiny_bundle, capfd, monkeypatch):
    class Ray:
        @staticmethod
        def init(**options):
            raise Exception("The current node timed out during startup.")

    monkeypatch.setitem(sys.modules, "ray", Ray)
    write_cases(tmp_path / "in", count=1, broken=0)
    for place, fix in (("local", "leave --ray out"), ("10.0.0.1:6379", "There is no Ray cluster at '10.0.0.1:6379'")):
        assert main(words(tmp_path / "in", tmp_path / "out", a_tiny_bundle, "--ray", place)) == 2
        assert fix in capfd.readouterr().err


def test_missing_ray_names_the_extra(tmp_path, a_tiny_bundle, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_cases(tmp_path / "in", count=1, broken=0)
    assert main(words(tmp_path / "in", tmp_path / "out", a_tiny_bundle, "--ray")) == 2
    assert "pip install ray" in capfd.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(12.3, "12 s"), (600, "10 min"), (12000, "3 h 20 min")])
def test_durations_are_told_in_fitting_units(seconds, text):
    assert _duration(seconds) == text
