"""The cases of a cohort: found in a folder, or listed in a file."""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.output_file import file_ending
from NMSWSegment.files.run_checks import run_memory_bytes
from NMSWSegment.files.volume import VOLUME_ENDINGS, series_files, series_of_folder
from NMSWSegment.protocol import UserError, unknown_name

LIST_ENDINGS = (".csv", ".txt")
COLUMNS = ("input", "name", "series")
MARKER_NAME = "cohort.json"
"""A folder with this file holds results of a cohort; it is not searched for cases."""
_LABEL_WORDS = ("label", "mask", "seg")
_MAX_NAME = 80
_FILES_LOOKED_AT = 20
"""Of a folder, to see whether it holds DICOM files."""


@dataclass(frozen=True)
class Case:
    """One volume of a cohort."""

    name: str
    """Unique; names the folder of its results."""
    input: Path
    """Volume file, or folder of a DICOM series."""
    series: str | None = None
    """Series Instance UID, where the folder has several series."""


def find_cases(source: Path) -> list[Case]:
    """The cases of a folder or of a list, in the order of their paths or lines.

    Args:
        source: a folder, searched with its sub-folders for volume files and DICOM series (passed over are hidden ones, results of a cohort,
            folders named labels* or segmentations, and files named label*, mask* or seg*); or a .txt file with one path a line, or a .csv file with the column input
            and, if wanted, name and series. Paths in a list count from its folder.

    Raises:
        UserError: there is no case, or the list cannot be used.
    """
    if source.is_dir():
        found = [(path, "", series, _label_of(path, source) + suffix) for path, series, suffix in _walk(source)]
    elif source.is_file() and file_ending(source, LIST_ENDINGS):
        found = _listed(source)
    else:
        kind = "is neither a folder nor a list (.csv, .txt)" if source.exists() else "does not exist"
        raise UserError(f"'{source}' {kind}. Give a folder with volumes, or a list of their paths.")
    if not found:
        raise UserError(f"'{source}' holds no case. Give a folder with volume files ({', '.join(VOLUME_ENDINGS)}) or DICOM series, or a list of their paths.")
    return _named(found)


def case_memory_bytes(case: Case, manifest: BundleManifest, *, num_patches: int | None) -> int | None:
    """Upper bound of what a process takes for a case, from the header alone; None where it cannot be read, as the run itself will say.

    Args:
        num_patches: None is all of them.
    """
    try:
        shape, ijk_to_ras, bytes_per_voxel = _geometry(case)
        needed = run_memory_bytes(shape, ijk_to_ras, manifest, num_patches=num_patches, bytes_per_voxel=bytes_per_voxel)
    except (UserError, RuntimeError, OSError, ValueError):
        return None
    return needed + 2 * int(np.prod(shape))  # statistics and pictures


def _walk(folder: Path) -> Iterator[tuple[Path, str | None, str]]:
    """Path, series and what tells the series apart, of every volume below a folder."""
    for place, folder_names, file_names in os.walk(folder):
        place = Path(place)
        if MARKER_NAME in file_names:
            folder_names.clear()
            continue
        folder_names[:] = sorted(name for name in folder_names if not (name.startswith((".", "labels")) or name == "segmentations"))
        names = sorted(name for name in file_names if not name.startswith("."))
        volumes = [name for name in names if file_ending(name, (*VOLUME_ENDINGS, ".seg.nrrd")) in VOLUME_ENDINGS and not name.lower().startswith(_LABEL_WORDS)]
        for name in volumes:
            yield place / name, None, ""
        if not volumes and any(_is_dicom(place / name) for name in names[:_FILES_LOOKED_AT]):
            yield from _series(place)


def _series(folder: Path) -> Iterator[tuple[Path, str | None, str]]:
    """Every image series of a DICOM folder; the folder itself where that cannot be told, so that the case says why."""
    try:
        found = series_of_folder(folder)
    except UserError:
        found = []
    if len(found) < 2:
        yield folder, None, ""
        return
    for number, info in enumerate(found, start=1):
        yield folder, info.uid, f"_{number}_{info.description}"


def _is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark after its preamble."""
    try:
        with open(path, "rb") as stream:
            return path.is_file() and stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _listed(path: Path) -> list[tuple[Path, str, str | None, str]]:
    """Path, name, series and label of every line of a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list '{path}' cannot be read ({error}). Save it as UTF-8 text with one path a line.") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if path.suffix.lower() != ".csv":
        rows = [{"input": line.strip()} for line in lines]
    else:
        reader = csv.DictReader(lines)
        columns = [column.strip() for column in reader.fieldnames or []]
        for column in columns:
            if column not in COLUMNS:
                raise UserError(f"The list '{path.name}': {unknown_name('column', column, COLUMNS)}")
        if "input" not in columns:
            raise UserError(f"The list '{path.name}' has no column input. Its first line must be: input, or input,name,series.")
        rows = [{key.strip(): (value or "").strip() for key, value in row.items() if isinstance(value, str) or value is None} for row in reader]
    found = []
    for row in rows:
        place = path.parent / row["input"]
        found.append((place, row.get("name", ""), row.get("series") or None, _label_of(place, path.parent)))
    return found


def _label_of(path: Path, base: Path) -> str:
    """A path without its ending as words of a name; of a path elsewhere the last two parts."""
    ending = file_ending(path, VOLUME_ENDINGS) or ""
    try:
        parts = path.relative_to(base).parts
    except ValueError:
        parts = path.parts[-2:]
    label = "_".join(parts) or path.resolve().name
    return label[: len(label) - len(ending)] if ending else label


def _named(found: list[tuple[Path, str, str | None, str]]) -> list[Case]:
    """Cases with names that a file system takes and that no other case has."""
    names = [_safe(name or label) for _, name, _, label in found]
    counts = Counter(name.lower() for name in names)
    cases, seen = [], set()
    for (path, _, series, _), name in zip(found, names):
        key = (path.resolve(), series)
        if key in seen:
            raise UserError(f"The list names '{path}' twice. Name every volume once.")
        seen.add(key)
        if counts[name.lower()] > 1:  # the same for the same path, whatever else is there
            name = f"{name}-{hashlib.sha256(f'{path} {series}'.encode()).hexdigest()[:8]}"
        cases.append(Case(name=name, input=path.absolute(), series=series))  # workers may run in other folders
    return cases


def _safe(text: str) -> str:
    """Letters, digits, dot, dash and underscore only, at most 80; at its end as at its start no dot."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._ ")
    if len(name) > _MAX_NAME:
        name = f"{name[: _MAX_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name or f"case-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _geometry(case: Case) -> tuple[tuple[int, int, int], np.ndarray, int]:
    """Shape (KJI), 4 x 4 and bytes per voxel, from the header; the place in the world does not matter here, the directions do."""
    paths = series_files(case.input, series_uid=case.series) if case.input.is_dir() else [case.input]
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(paths[0]))
    reader.ReadImageInformation()
    size, spacing = list(reader.GetSize()[:3]), list(reader.GetSpacing()[:3])
    if len(paths) > 1:
        last = sitk.ImageFileReader()
        last.SetFileName(str(paths[-1]))
        last.ReadImageInformation()
        size[2] = len(paths)
        spacing[2] = float(np.linalg.norm(np.subtract(last.GetOrigin(), reader.GetOrigin()))) / (len(paths) - 1)
    direction = np.array(reader.GetDirection()).reshape(reader.GetDimension(), -1)[:3, :3]
    ijk_to_ras = np.eye(4)
    ijk_to_ras[:3, :3] = direction * np.array(spacing)
    bits = {"8-bit": 1, "16-bit": 2, "64-bit": 8}
    bytes_per_voxel = next((count for words, count in bits.items() if words in sitk.GetPixelIDValueAsString(reader.GetPixelID())), 4)
    return tuple(size[::-1]), ijk_to_ras, bytes_per_voxel
