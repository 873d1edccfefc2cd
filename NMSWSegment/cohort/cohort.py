"""The verb segment-cohort: all volumes of a folder or list, on the processors of this computer or on Ray.

Every case is one folder that appears when it is complete, so that a run which was killed goes on where it stopped, and a case that
fails stops no other.
"""

import argparse
import csv
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from NMSWSegment import __version__
from NMSWSegment.cohort.case_run import PARTIAL_PREFIX, CohortSettings
from NMSWSegment.cohort.cases import (
    CASES_NAME,
    FAILED_NAME,
    MARKER_NAME,
    OUTCOMES_NAME,
    PAGE_NAME,
    RESULT_NAMES,
    STATISTICS_NAME,
    Case,
    case_memory_bytes,
    find_cases,
    read_marker,
)
from NMSWSegment.cohort.local_workers import Finished, Started, plan_workers, run_on_this_computer
from NMSWSegment.cohort.outcome import DONE, CaseOutcome, case_folder, finished_outcome, holds_outcome, tells_failure
from NMSWSegment.command_line import DONE as EXIT_DONE
from NMSWSegment.command_line import USER_ERROR, add_run_arguments, run_options
from NMSWSegment.console import complain, printable, say, say_all
from NMSWSegment.files.bundle import Bundle, load_bundle
from NMSWSegment.files.dicom_segmentation import DICOM_SEG_ENDINGS, check_dicom_export
from NMSWSegment.files.folder_lock import locked_folder
from NMSWSegment.files.memory import available_memory_bytes
from NMSWSegment.files.output_file import check_name, replaced_file
from NMSWSegment.files.outputs import require_matplotlib
from NMSWSegment.files.volume import LABELMAP_ENDINGS
from NMSWSegment.protocol import AUTO, UserError

_WRITE_INTERVAL_S = 5.0
"""The csv is written anew at most this often, and at the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw segment-cohort`."""
    parser.add_argument("source", type=Path, metavar="FOLDER|LIST", help="folder with volumes and DICOM series, or a list of them (.txt, .csv)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results; an interrupted run goes on there")
    parser.add_argument("--format", default=".seg.nrrd", choices=(*LABELMAP_ENDINGS, *DICOM_SEG_ENDINGS), help="of the segmentations (default: %(default)s)")
    add_run_arguments(parser)
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="cases at the same time (default: by GPUs, cores and memory)")
    parser.add_argument("--no-pictures", action="store_true", help="leave the quality sheets and the page out")
    parser.add_argument("--restart", action="store_true", help="remove the results of an earlier run with other options first")
    parser.add_argument(
        "--ray", nargs="?", const="auto", default=None, metavar="ADDRESS", help="run on a Ray cluster ('auto' finds it) or, with 'local', on Ray workers here"
    )


def run(arguments: argparse.Namespace) -> int:
    """Segment all cases; 2 where some failed."""
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"workers is {arguments.workers}. Use 1 or more, or leave it out.")
    options = run_options(arguments)
    bundle = load_bundle(options.bundle)
    _check_structures(bundle, options.structures)
    if not arguments.no_pictures:
        require_matplotlib("The quality sheets need", or_else=", or leave them out with --no-pictures")
    check_name(arguments.output.absolute())
    found = find_cases(arguments.source)
    cases = found.cases
    _check_inputs_stay(arguments.source, cases, output=arguments.output)
    if arguments.format in DICOM_SEG_ENDINGS:
        _check_dicom_export(cases)
    if Path(options.bundle).resolve() == bundle.folder:  # a folder, not a name; relative to where the user is
        options = replace(options, bundle=str(bundle.folder))
    settings = CohortSettings(
        output=arguments.output.absolute(),
        options=options,
        bundle_sha256=bundle.sha256,
        ending=arguments.format,
        with_pictures=not arguments.no_pictures,
        force_modality=arguments.force_modality,
    )
    with locked_folder(settings.output):
        _prepare(settings, restart=arguments.restart)
        if found.message:
            say(found.message)
        outcomes = {case.name: outcome for case in cases if (outcome := finished_outcome(settings.output, case))}
        waiting = [case for case in cases if case.name not in outcomes]
        if outcomes:
            say(f"{len(outcomes)} of {len(cases)} cases are done already.")
        say_all()
        writer = _Records(settings, cases, outcomes)
        try:
            if waiting:
                _run_cases(waiting, settings, bundle, arguments=arguments, writer=writer)
        except KeyboardInterrupt:
            complain(f"{len(outcomes)} of {len(cases)} cases came to an end. The same command goes on with the others.")
            raise
        finally:
            _remove_half_done(settings.output)
            unwritten = writer.write_all()
    return _told_end(settings, outcomes, num_cases=len(cases), unwritten=unwritten)


def _run_cases(waiting: Sequence[Case], settings: CohortSettings, bundle: Bundle, *, arguments: argparse.Namespace, writer: "_Records") -> None:
    """Run what is left, with a bar."""
    num_patches = None if settings.options.num_patches == AUTO else settings.options.num_patches
    needs_bytes = {case.name: case_memory_bytes(case, bundle.manifest, num_patches=num_patches) for case in waiting}
    plan = plan_workers(
        num_cases=len(waiting),
        cores=_num_cores(),
        gpus=_gpus() if settings.options.device == "auto" else (),
        device=settings.options.device,
        workers=arguments.workers,
        threads=settings.options.threads,
        memory_bytes=available_memory_bytes(),
    )
    if arguments.ray is None:
        events = run_on_this_computer(waiting, settings, plan=plan, needs_bytes=needs_bytes)
    else:
        from NMSWSegment.cohort.ray_workers import run_on_ray

        events = run_on_ray(waiting, settings, address=arguments.ray, plan=plan, needs_bytes=needs_bytes)
    with _bar(len(waiting)) as show:
        running: list[str] = []
        try:
            for event in events:
                if isinstance(event, Started):
                    running.append(event.case.name)
                    show(None, running)
                else:
                    running.remove(event.case.name)
                    writer.add(event)
                    show(event, running)
        finally:
            events.close()  # ends the processes now, not when the generator is collected


class _Records:
    """Outcomes on disk: the csv while the cohort runs, and at the end the page and the statistics of all cases too.

    A file that cannot be written, as one that a spreadsheet holds open on Windows, stops nothing.
    """

    def __init__(self, settings: CohortSettings, cases: Sequence[Case], outcomes: dict[str, CaseOutcome]) -> None:
        self._settings, self._cases, self._outcomes = settings, cases, outcomes
        self._tried_s = 0.0
        self._is_told = False

    def add(self, event: Finished) -> None:
        """Take an outcome."""
        self._outcomes[event.case.name] = event.outcome
        if time.monotonic() - self._tried_s < _WRITE_INTERVAL_S:
            return
        self._tried_s = time.monotonic()
        try:
            self._write_outcomes()
        except UserError as error:
            if not self._is_told:
                complain(f"{OUTCOMES_NAME} cannot be written now; is it open in another program? The cases go on, and it will be tried again. {error}")
            self._is_told = True

    def write_all(self) -> list[str]:
        """Write everything; the names of the files that could not be written."""
        files = {OUTCOMES_NAME: self._write_outcomes, STATISTICS_NAME: self._write_statistics}
        if self._settings.with_pictures:
            files[PAGE_NAME] = self._write_page
        unwritten = []
        for name, write in files.items():
            try:
                write()
            except UserError:
                unwritten.append(name)
        return unwritten

    def _write_outcomes(self) -> None:
        """What is known, in the order of the cases."""
        columns = [field.name for field in fields(CaseOutcome)]
        _write_csv(self._settings.output / OUTCOMES_NAME, columns, [outcome.to_dict() for outcome in self._known()])

    def _write_statistics(self) -> None:
        """Of the structures of all cases."""
        _write_csv(self._settings.output / STATISTICS_NAME, *_all_statistics(self._folders_of_done()))

    def _write_page(self) -> None:
        """For a person to look through."""
        from NMSWSegment.cohort.quality_page import write_cohort_page

        output = self._settings.output
        write_cohort_page(output / PAGE_NAME, self._known(), folder_of=self._folders_of_done(), title=f"Cohort {output.resolve().name}")

    def _known(self) -> list[CaseOutcome]:
        """In the order of the cases."""
        return [self._outcomes[case.name] for case in self._cases if case.name in self._outcomes]

    def _folders_of_done(self) -> dict[str, Path]:
        """Results by name of the case."""
        done = (case for case in self._cases if case.name in self._outcomes and self._outcomes[case.name].status == DONE)
        return {case.name: case_folder(self._settings.output, case) for case in done}


def _all_statistics(folders: dict[str, Path]) -> tuple[list[str], list[dict]]:
    """Columns and rows of the statistics of all cases."""
    rows, columns = [], ["case"]
    for name, folder in folders.items():
        with open(folder / STATISTICS_NAME, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows += [{"case": name} | row for row in reader]
            columns = ["case", *(reader.fieldnames or ())]
    return columns, rows


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Write a table atomically."""
    with replaced_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def _prepare(settings: CohortSettings, *, restart: bool) -> None:
    """Make the output folder this cohort's: its settings noted, what a killed run left half-done removed.

    Raises:
        UserError: it holds something else, or results that were made otherwise.
    """
    options = settings.options.to_dict()
    for name in ("bundle", "device", "threads"):  # the hash tells the model; the others change no result but for rounding
        options.pop(name)
    facts = {"options": options, "model_sha256": settings.bundle_sha256, "format": settings.ending, "pictures": settings.with_pictures}
    found = read_marker(settings.output)
    if found is None:
        _check_free(settings.output)
    elif {key: found.get(key) for key in facts} != facts:
        if not restart:
            different = ", ".join(sorted(key for key in facts if found.get(key) != facts[key]))
            raise UserError(
                f"The folder '{settings.output}' holds a cohort that was run with other settings ({different}). "
                "Choose another folder, give the same settings, or remove its results with --restart."
            )
        _remove_results(settings.output)
    try:
        (settings.output / CASES_NAME).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder '{settings.output / CASES_NAME}' cannot be made ({error.strerror}). Choose another output folder.") from error
    _remove_half_done(settings.output)
    with replaced_file(settings.output / MARKER_NAME) as temporary:
        temporary.write_text(json.dumps(facts | {"version": __version__}, indent=1) + "\n", encoding="utf-8")


def _check_free(output: Path) -> None:
    """Raise UserError if a folder without our marker holds anything with the name of what a cohort writes."""
    taken = [name for name in RESULT_NAMES if os.path.lexists(output / name)]
    taken += [name for name in (CASES_NAME, FAILED_NAME) if os.path.lexists(output / name) and not _is_empty_folder(output / name)]
    if taken:
        raise UserError(f"The folder '{output}' holds something else than a cohort: {', '.join(taken)}. Choose another output folder, or move these elsewhere.")


def _is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder without anything in it."""
    try:
        return not any(path.iterdir())
    except OSError:
        return False


def _remove_results(output: Path) -> None:
    """Remove the folders of cases and the details of failures, but nothing that somebody else put there."""
    for folder in (output / CASES_NAME).glob("*"):
        if holds_outcome(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for path in (output / FAILED_NAME).glob("*.txt"):
        if tells_failure(path):
            path.unlink(missing_ok=True)


def _remove_half_done(output: Path) -> None:
    """Remove what processes left that were stopped in the middle of a case."""
    for partial in (output / CASES_NAME).glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _bar(total: int) -> Iterator:
    """A function (event or None, names of running cases) that draws a bar on a terminal, else prints one line per finished case."""
    started, finished, failed = time.monotonic(), 0, 0

    def left() -> str:
        return f"about {_duration((time.monotonic() - started) / finished * (total - finished))} left" if finished else "time left unknown"

    def count(event: Finished | None) -> None:
        nonlocal finished, failed
        if event is not None:
            finished += 1
            failed += event.outcome.status != DONE

    def line(event: Finished | None, running: Sequence[str]) -> None:
        count(event)
        if event is not None:
            outcome = event.outcome
            what = f"{outcome.seconds:.1f} s, {outcome.warnings} warnings" if outcome.status == DONE else f"FAILED: {outcome.message}"
            say(f"[{finished}/{total}] {outcome.case}: {what}; {left()}")
            say_all()

    rich_parts = _rich() if sys.stderr.isatty() else None
    if rich_parts is None:
        yield line
        return
    bar, task = rich_parts(total)

    def draw(event: Finished | None, running: Sequence[str]) -> None:
        count(event)
        if event is not None and event.outcome.status != DONE:
            bar.console.print(printable(f"{event.outcome.case} failed: {event.outcome.message}", sys.stderr), markup=False, highlight=False)
        shown = ", ".join(running[:3]) + (f" and {len(running) - 3} more" if len(running) > 3 else "")
        bar.update(task, completed=finished, description=f"{failed} failed, {left()}; {shown}" if failed else f"{left()}; {shown}")

    with bar:
        yield draw


def _rich():
    """A function that makes a bar of rich; None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None

    def made(total: int):
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        return bar, bar.add_task("Starting", total=total)

    return made


def _told_end(settings: CohortSettings, outcomes: dict[str, CaseOutcome], *, num_cases: int, unwritten: Sequence[str]) -> int:
    """Print what became of the cohort; the exit code."""
    failed = [outcome for outcome in outcomes.values() if outcome.status != DONE]
    num_warned = sum(outcome.warnings > 0 for outcome in outcomes.values())
    say(f"outcomes: {settings.output / OUTCOMES_NAME}")
    if settings.with_pictures:
        say(f"quality: {settings.output / PAGE_NAME}")
    say(f"{num_cases - len(failed)} of {num_cases} cases done, {num_warned} of them with warnings.")
    if failed:
        complain(
            f"{len(failed)} of {num_cases} cases failed, the first: {failed[0].case}: {failed[0].message} "
            "Mend them and run the same command again: it does only what is left."
        )
    if unwritten:
        complain(
            f"Could not be written: {', '.join(unwritten)}. Close these files in other programs, make sure that the disk is not full, and run the same command "
            "again: it takes what is done as it is."
        )
    return USER_ERROR if failed or unwritten else EXIT_DONE


def _check_inputs_stay(source: Path, cases: Sequence[Case], *, output: Path) -> None:
    """Raise UserError if a result would be written over the list or a volume, before anything runs."""
    for name in RESULT_NAMES:
        if os.path.realpath(source) == os.path.realpath(output / name):
            raise UserError(f"The list '{source}' would be replaced by the {name} of the results. Rename the list, or choose another output folder.")
    own = [Path(os.path.realpath(output / name)) for name in (CASES_NAME, FAILED_NAME)]
    for path in (source, *(case.input for case in cases)):
        if any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in own):
            raise UserError(f"The input '{path}' lies where the results of '{output}' are written. Choose another output folder.")


def _check_dicom_export(cases: Sequence[Case]) -> None:
    """Raise UserError if no case can be written as DICOM, before any case runs."""
    series = next((case.input for case in cases if os.path.isdir(case.input)), None)
    if series is None:
        check_name(cases[0].input)
    check_dicom_export(series or cases[0].input, with_headers=False)


def _check_structures(bundle: Bundle, structures: Sequence[str]) -> None:
    """Raise UserError on a structure that the model does not know, before any case runs."""
    from NMSWSegment.protocol import unknown_name

    for name in structures:
        if name not in bundle.manifest.label_names:
            raise UserError(unknown_name(f"structure of bundle {bundle.manifest.name}", name, bundle.manifest.label_names))


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """GPUs that torch can use."""
    from NMSWSegment.engine.runtime import available_devices

    return [name for name in available_devices() if name != "cpu"]


def _duration(seconds: float) -> str:
    """'40 s', '12 min', '3 h 20 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
