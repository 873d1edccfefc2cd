"""Prepared cases on disk, so that a case of a hundred masks is combined once and a case larger than memory is no matter.

An entry is named by everything that decides it: files with their sizes and times, classes. It is complete or not there,
and its voxels are checked against a checksum whenever they are read; what does not fit is made again.
"""

import hashlib
import json
import logging
import shutil
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from NMSWSegment.data.body_extent import BodyExtent
from NMSWSegment.data.prepared_case import CaseRequest, PreparedCase, prepare_case
from NMSWSegment.files.output_file import draft_folder, replace_folder
from NMSWSegment.protocol import UserError

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Raised when prepare_case gives something else for the same files."""
ENTRY_INFO_NAME = "case.json"
_ARRAYS = ("intensity", "labels")
_KEY_LENGTH = 16


class CaseCache:
    """A folder of prepared cases; several processes may share it."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: made when the first case is stored."""
        self.folder = Path(folder)

    def entry(self, request: CaseRequest) -> Path:
        """Where a case is, or will be.

        Raises:
            UserError: a file of the case is not there.
        """
        parts = [CACHE_FORMAT, request.label_names, request.unknown_value]
        for path in (request.files.image, *request.label_paths):
            try:
                state = path.stat()
            except OSError as error:
                raise UserError(f"Case '{request.files.name}' has no file '{path}'. Put it back, or leave the case out with --hold-out.") from error
            parts.append((str(path.absolute()), state.st_size, state.st_mtime_ns))
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_LENGTH]
        return self.folder / f"{request.files.name}-{key}"

    def holds(self, request: CaseRequest) -> bool:
        """Whether the entry of a case is there; raises as `entry`."""
        return _is_complete(self.entry(request))

    def ensure(self, request: CaseRequest) -> Path:
        """The entry of a case, made now if it is not there.

        Raises:
            UserError: the case cannot be used (see prepare_case), or the entry cannot be written.
        """
        entry = self.entry(request)
        if not _is_complete(entry):
            self._store(prepare_case(request), entry)
        return entry

    def load(self, request: CaseRequest, entry: Path) -> PreparedCase:
        """A case from its entry; a damaged entry is made again from the case's files."""
        try:
            return read_entry(entry)
        except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
            logger.warning("The cache entry '%s' is damaged (%s); the case is read again", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
        case = prepare_case(request)
        self._store(case, self.entry(request))
        return case

    def _store(self, case: PreparedCase, entry: Path) -> None:
        """Write an entry under another name, then put it in place."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with draft_folder(self.folder, prefix=".partial-") as place:
                draft = place / entry.name
                draft.mkdir()
                write_entry(case, draft)
                try:
                    replace_folder(draft, entry, aside=place / "old")
                except OSError:
                    if not _is_complete(entry):  # otherwise another process was faster, with the same content
                        raise
        except OSError as error:
            megabytes = (case.intensity.nbytes + case.labels.nbytes) / 1e6
            raise UserError(
                f"A case of {megabytes:.0f} MB cannot be stored in '{self.folder}' ({error}). Make room on the disk, or give another folder with --cache."
            ) from error


def write_entry(case: PreparedCase, folder: Path) -> None:
    """The arrays, and their checksums."""
    checksums = {}
    for name in _ARRAYS:
        array = np.ascontiguousarray(getattr(case, name))
        np.save(folder / f"{name}.npy", array)
        checksums[name] = zlib.crc32(array)
    info = {"spacing_mm": case.spacing_mm, "direction": case.direction, "extent": asdict(case.extent), "checksums": checksums}
    info["label_voxels"] = label_voxels(case.labels)
    (folder / ENTRY_INFO_NAME).write_text(json.dumps(info), encoding="utf-8")


def read_entry(folder: Path) -> PreparedCase:
    """A prepared case; ValueError when a checksum does not fit."""
    info = json.loads((folder / ENTRY_INFO_NAME).read_text(encoding="utf-8"))
    arrays = {name: np.load(folder / f"{name}.npy") for name in _ARRAYS}
    for name, array in arrays.items():
        if zlib.crc32(array) != info["checksums"][name]:
            raise ValueError(f"the checksum of {name} does not fit")
    extent = {key: json_tuples(value) for key, value in info["extent"].items()}
    return PreparedCase(**arrays, spacing_mm=tuple(info["spacing_mm"]), direction=json_tuples(info["direction"]), extent=BodyExtent(**extent))


def entry_label_voxels(folder: Path) -> dict[int, int]:
    """label_voxels of an entry; entries of earlier versions, which do not hold them, are counted."""
    info = json.loads((folder / ENTRY_INFO_NAME).read_text(encoding="utf-8"))
    if "label_voxels" in info:
        return {int(value): count for value, count in info["label_voxels"].items()}
    return label_voxels(np.load(folder / "labels.npy", mmap_mode="r"))


def label_voxels(labels: np.ndarray) -> dict[int, int]:
    """Voxels of every label that a labelmap (uint8) holds."""
    counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in labels)  # slice by slice, because counting takes eight bytes a voxel
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _is_complete(entry: Path) -> bool:
    """Whether all files of an entry are there; their content is checked when it is read."""
    return all((entry / name).is_file() for name in (ENTRY_INFO_NAME, *(f"{name}.npy" for name in _ARRAYS)))


def json_tuples(value: object) -> object:
    """JSON lists as tuples, at any depth, also inside an object."""
    if isinstance(value, dict):
        return {key: json_tuples(item) for key, item in value.items()}
    return tuple(json_tuples(item) for item in value) if isinstance(value, list) else value
