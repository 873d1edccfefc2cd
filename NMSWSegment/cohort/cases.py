"""The cases of a cohort: found in a folder, or listed in a file."""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.dicom_file import DicomError, read_header
from NMSWSegment.files.output_file import check_name, file_ending
from NMSWSegment.files.run_checks import run_memory_bytes
from NMSWSegment.files.volume import VOLUME_ENDINGS, open_volume, series_of_folder
from NMSWSegment.protocol import UserError, unknown_name

LIST_ENDINGS = (".csv", ".txt")
COLUMNS = ("input", "name", "series")
MARKER_NAME, OUTCOMES_NAME, PAGE_NAME, STATISTICS_NAME = RESULT_NAMES = ("cohort.json", "cohort.csv", "quality.html", "statistics.csv")
"""Files in the output folder of a cohort; the marker tells that it is one."""
CASES_NAME, FAILED_NAME = "cases", "failed"
"""Folders in the output folder of a cohort."""
_MARKER_KEYS = ("options", "model_sha256", "format", "pictures")
_LABEL_NAME = re.compile(r"(?i:label|labels|labelmap|mask|masks|seg|segmentation|segmentations)(?![a-z])")
"""Files that hold labels begin with one of these words: seg.nrrd, seg-1.nii, maskLiver.nii, but not Segovia.nii."""
_MAX_NAME = 80

_BY_NAME, _LABEL_FOLDERS, _OTHER_KINDS = "segmentations by their names (label, mask, seg)", "folders of segmentations by their names", "files of other kinds"
_HIDDEN, _RESULTS, _LINKED_FOLDERS = "hidden volumes and folders", "folders with results of a cohort", "links to folders"
_UNREADABLE, _NO_FILE, _BESIDE = "folders that cannot be read", "pipes, devices and the like", "folders with DICOM files beside other volumes"
_SAME, _COMMENTS = "links to a volume that is a case already", "lines that begin with #"


@dataclass(frozen=True)
class Case:
    """One volume of a cohort."""

    name: str
    """Unique; names the folder of its results."""
    input: Path
    """Volume file, or folder of a DICOM series."""
    series: str | None = None
    """Series Instance UID, where the folder has several series."""


@dataclass(frozen=True)
class FoundCases:
    """What a folder or a list holds."""

    cases: tuple[Case, ...]
    """In the order of their paths or lines; at least one."""
    passed_over: dict[str, int]
    """How many files, folders and lines are no cases, by the reason."""

    @property
    def message(self) -> str:
        """What was passed over and why, in one line; '' where nothing was."""
        return _passed_over_message(self.passed_over)


def find_cases(source: Path) -> FoundCases:
    """The cases of a folder or of a list.

    Args:
        source: a folder, searched with its sub-folders for volume files and DICOM series (passed over are hidden ones, results of a cohort,
            folders named labels* or segmentations, and files whose first word is label, mask or seg); or a .txt file with one path a line, or a .csv file
            with the column input and, if wanted, name and series. Paths in a list count from its folder.

    Raises:
        UserError: there is no case, or the list cannot be used.
    """
    check_name(source)
    passed_over: Counter[str] = Counter()
    if source.is_dir():
        found = [(path, "", series, _label_of(path, source) + suffix) for path, series, suffix in _walk(source, passed_over)]
        found = _each_once(found, passed_over)
    elif source.is_file() and file_ending(source, LIST_ENDINGS):
        found = _listed(source, passed_over)
    else:
        kind = "is neither a folder nor a list (.csv, .txt)" if source.exists() else "does not exist"
        raise UserError(f"'{source}' {kind}. Give a folder with volumes, or a list of their paths.")
    if not found:
        message = f"'{source}' holds no case. {_passed_over_message(passed_over)}".rstrip()
        raise UserError(f"{message} Give a folder with volume files ({', '.join(VOLUME_ENDINGS)}) or DICOM series, or a list of their paths.")
    return FoundCases(tuple(_named(found)), dict(passed_over))


def read_marker(folder: Path) -> dict | None:
    """The settings of the cohort whose results a folder holds; None of any other folder."""
    if not os.path.isfile(folder / MARKER_NAME):  # a pipe would be waited for
        return None
    try:
        marker = json.loads((folder / MARKER_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return marker if isinstance(marker, dict) and all(key in marker for key in _MARKER_KEYS) else None


def case_memory_bytes(case: Case, manifest: BundleManifest, *, num_patches: int | None) -> int | None:
    """Upper bound of what a process takes for a case, from the header alone; None where it cannot be read, as the run itself will say.

    Args:
        num_patches: None is all of them.
    """
    try:
        file = open_volume(case.input, series_uid=case.series)
        needed = run_memory_bytes(file.shape, file.ijk_to_ras, manifest, num_patches=num_patches, bytes_per_voxel=file.bytes_per_voxel)
    except (UserError, RuntimeError, OSError, ValueError):
        return None
    return needed + 2 * int(np.prod(file.shape))  # statistics and pictures


def _walk(folder: Path, passed_over: Counter[str]) -> Iterator[tuple[Path, str | None, str]]:
    """Path, series and what tells the series apart, of every volume below a folder."""

    def count_unreadable(error: OSError) -> None:
        passed_over[_UNREADABLE] += 1

    for place, folder_names, file_names in os.walk(folder, onerror=count_unreadable):
        place = Path(place)
        own = ()
        if MARKER_NAME in file_names and read_marker(place):
            if place != folder:
                passed_over[_RESULTS] += 1
                folder_names.clear()
                continue
            own = (*RESULT_NAMES, CASES_NAME, FAILED_NAME)  # the results lie in the folder that is searched
        folder_names[:] = _searched_folders(place, [name for name in folder_names if name not in own], passed_over)
        yield from _volumes(place, sorted(name for name in file_names if name not in own), passed_over)


def _searched_folders(place: Path, names: list[str], passed_over: Counter[str]) -> list[str]:
    """Sub-folders that are searched, in order."""
    searched = []
    for name in sorted(names):
        if name.startswith("."):
            passed_over[_HIDDEN] += 1
        elif name.startswith("labels") or name == "segmentations":
            passed_over[_LABEL_FOLDERS] += 1
        elif (place / name).is_symlink():
            passed_over[_LINKED_FOLDERS] += 1
        else:
            searched.append(name)
    return searched


def _volumes(place: Path, names: list[str], passed_over: Counter[str]) -> Iterator[tuple[Path, str | None, str]]:
    """Every volume that lies directly in a folder, as of `_walk`."""
    volumes, others = [], []
    for name in names:
        ending = file_ending(name, (*VOLUME_ENDINGS, ".seg.nrrd"))
        if name.startswith("."):
            passed_over[_HIDDEN] += bool(ending)
        elif os.path.exists(place / name) and not os.path.isfile(place / name):
            passed_over[_NO_FILE] += 1
        elif not ending:
            others.append(name)
        elif ending == ".seg.nrrd" or _LABEL_NAME.match(name):
            passed_over[_BY_NAME] += 1
        else:
            volumes.append(name)
    for name in volumes:
        yield place / name, None, ""
    has_dicom = any(_is_dicom(place / name) for name in others)
    if has_dicom and not volumes:
        yield from _series(place)
    elif has_dicom:
        passed_over[_BESIDE] += 1
    else:
        passed_over[_OTHER_KINDS] += len(others)


def _series(folder: Path) -> Iterator[tuple[Path, str | None, str]]:
    """Every image series of a DICOM folder; the folder itself where that cannot be told, so that the case says why."""
    try:
        found = series_of_folder(folder)
    except UserError:
        found = []
    descriptions: dict[str, str] = {}
    for info in found:  # series that share a UID, or have none, are one case, which says why they cannot be told apart
        descriptions.setdefault(info.uid, info.description)
    if len(descriptions) < 2:
        yield folder, None, ""
        return
    for number, (uid, description) in enumerate(descriptions.items(), start=1):
        yield folder, uid, f"_{number}_{description}"


def _is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark after its preamble, or is an image without a preamble."""
    try:
        with open(path, "rb") as stream:
            if stream.read(132)[128:] == b"DICM":
                return True
        header = read_header(path)
    except (OSError, DicomError):
        return False
    return header is not None and header.pixel_offset is not None


def _each_once(found: list[tuple[Path, str, str | None, str]], passed_over: Counter[str]) -> list[tuple[Path, str, str | None, str]]:
    """What was found in a folder, without links to the same volumes."""
    first: dict[tuple, tuple] = {}
    for entry in found:
        path, _, series, _ = entry
        first.setdefault((os.path.realpath(path), series), entry)
    passed_over[_SAME] += len(found) - len(first)
    return list(first.values())


def _listed(path: Path, passed_over: Counter[str]) -> list[tuple[Path, str, str | None, str]]:
    """Path, name, series and label of every line of a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it has zero bytes, as UTF-16 text has")
    except (OSError, ValueError) as error:
        raise UserError(f"The list '{path}' cannot be read ({error}). Save it as UTF-8 text with one path a line.") from error
    filled = [line for line in text.splitlines() if line.strip()]
    lines = [line for line in filled if not _is_comment(line, path.parent)]
    passed_over[_COMMENTS] += len(filled) - len(lines)
    rows = _csv_rows(path, lines) if path.suffix.lower() == ".csv" else [{"input": line.strip()} for line in lines]
    found = []
    for row in rows:
        place = path.parent / row["input"]
        found.append((place, row.get("name", ""), row.get("series") or None, _label_of(place, path.parent)))
    return found


def _is_comment(line: str, folder: Path) -> bool:
    """Whether a line begins with # and does not name a volume that does."""
    return line.startswith("#") and not os.path.exists(folder / line.partition(",")[0].strip())


def _csv_rows(path: Path, lines: list[str]) -> list[dict[str, str]]:
    """The rows of a table with the columns COLUMNS."""
    reader = csv.DictReader(lines)
    try:
        columns = [column.strip() for column in reader.fieldnames or []]
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"The list '{path.name}' cannot be read after its line {reader.line_num} ({error}). Check its commas and quotes.") from error
    for column in columns:
        if column not in COLUMNS:
            raise UserError(f"The list '{path.name}': {unknown_name('column', column, COLUMNS)}")
    if "input" not in columns:
        raise UserError(f"The list '{path.name}' has no column input. Its first line must be: input, or input,name,series.")
    return [{key.strip(): (value or "").strip() for key, value in row.items() if isinstance(value, str) or value is None} for row in rows]


def _label_of(path: Path, base: Path) -> str:
    """A path without its ending as words of a name; of a path elsewhere the last two parts."""
    ending = file_ending(path, VOLUME_ENDINGS) or ""
    try:
        parts = path.relative_to(base).parts
    except ValueError:
        parts = path.parts[-2:]
    label = "_".join(parts) or Path(os.path.realpath(path)).name
    return label[: len(label) - len(ending)] if ending else label


def _named(found: list[tuple[Path, str, str | None, str]]) -> list[Case]:
    """Cases with names that a file system takes and that no other case has."""
    names = [_safe(name or label) for _, name, _, label in found]
    counts = Counter(name.lower() for name in names)
    cases, seen = [], set()
    for (path, _, series, _), name in zip(found, names):
        key = (os.path.realpath(path), series)  # Path.resolve fails on a link to itself
        if key in seen:
            raise UserError(f"The list names '{path}' twice. Name every volume once.")
        seen.add(key)
        if counts[name.lower()] > 1:  # the same for the same path, whatever else is there
            name = f"{name}-{_short_hash(f'{path} {series}')}"
        cases.append(Case(name=name, input=path.absolute(), series=series))  # workers may run in other folders
    return cases


def _safe(text: str) -> str:
    """Letters, digits, dot, dash and underscore only, at most 80; at its end as at its start no dot."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._ ")
    if len(name) > _MAX_NAME:
        name = f"{name[: _MAX_NAME - 9]}-{_short_hash(text)}"
    return name or f"case-{_short_hash(text)}"


def _short_hash(text: str) -> str:
    """Eight hexadecimal digits of a text; file names may hold what is not UTF-8."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()[:8]


def _passed_over_message(passed_over: dict[str, int]) -> str:
    """What was passed over and why; '' where nothing was."""
    parts = [f"{reason}: {count}" for reason, count in passed_over.items() if count]
    return f"Passed over: {'; '.join(parts)}." if parts else ""
