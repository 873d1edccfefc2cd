"""What became of a case, and the folder of its results."""

import glob
import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from NMSWSegment.cohort.cases import CASES_NAME, FAILED_NAME, RESULT_NAMES, STATISTICS_NAME, Case

DONE, FAILED = "done", "failed"
OUTCOME_NAME = "outcome.json"
"""In the folder of a case that is done: its outcome, and what its quality sheet shows."""
INPUT_FACTS = "input_facts"
_NEEDED_FACTS = ("outcome", "checks", "statistics", "titles")
"""Without these keys, an outcome.json is not whole."""
_OUTCOME_START = re.compile(r'\{\s*"outcome":\s*\{\s*"case":')
"""How every outcome.json of ours begins; a crash of the computer may have cut off the rest."""
_FAILURE_START = "Traceback (most recent call last):"
_START_LETTERS = 100
_HEADER_ENDINGS = (".mhd", ".nhdr", ".hdr", ".img")
"""Of files whose voxels may be in another one."""


@dataclass(frozen=True)
class CaseOutcome:
    """What became of a case; the row of the csv."""

    case: str
    input: str
    series: str
    status: str
    """DONE or FAILED."""
    message: str
    """Why it failed, for the user."""
    warnings: int
    """Quality checks that were not passed."""
    patches: int
    """Refined patches."""
    seconds: float
    finished: str
    """Local time, ISO 8601."""
    host: str
    device: str

    def to_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self)


def case_outcome(case: Case, *, status: str, seconds: float, message: str = "", warnings: int = 0, patches: int = 0, device: str = "") -> CaseOutcome:
    """The row of a case, with when and where."""
    return CaseOutcome(
        case=case.name,
        input=_writable(str(case.input)),
        series=case.series or "",
        status=status,
        message=_writable(message),
        warnings=warnings,
        patches=patches,
        seconds=round(seconds, 2),
        finished=datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        host=socket.gethostname(),
        device=device,
    )


def failed_outcome(case: Case, message: str, *, seconds: float = 0.0) -> CaseOutcome:
    """The outcome of a case that did not come to an end."""
    return case_outcome(case, status=FAILED, message=message, seconds=seconds)


def case_folder(output: Path, case: Case) -> Path:
    """Where the results of a case lie."""
    return output / CASES_NAME / case.name


def failure_path(output: Path, case: Case) -> Path:
    """The file with the details of a failure."""
    return output / FAILED_NAME / f"{case.name}.txt"


def holds_outcome(folder: Path) -> bool:
    """Whether a folder is one that we made for a case; only those are replaced or removed."""
    return not folder.is_symlink() and bool(_OUTCOME_START.match(_first_letters(folder / OUTCOME_NAME)))


def tells_failure(path: Path) -> bool:
    """Whether a file is one that we wrote about a failure."""
    return _first_letters(path).startswith(_FAILURE_START)


def input_facts(case: Case) -> dict | None:
    """What tells a changed input: size and time of a file, number of files and newest time of a folder; None where it cannot be looked at."""
    try:
        if not case.input.is_dir():
            found = [path.stat() for path in _files_of(case.input)]
            return {
                "bytes": sum(file.st_size for file in found),
                "changed_ms": max(file.st_mtime_ns for file in found) // 1_000_000,
            }  # what all network drives keep
        # The results lie in the same folder where OUT is the input.
        files = [entry.stat() for entry in os.scandir(case.input) if entry.is_file() and entry.name not in RESULT_NAMES and not entry.name.startswith(".")]
    except (OSError, ValueError):
        return None
    return {"files": len(files), "changed_ms": max((file.st_mtime_ns for file in files), default=0) // 1_000_000}


def _files_of(path: Path) -> list[Path]:
    """A file, and those beside it that have its name with another ending where it may be but a header."""
    if path.suffix.lower() not in _HEADER_ENDINGS:
        return [path]
    return [path, *(other for other in path.parent.glob(f"{glob.escape(path.stem)}.*") if other.name != path.name and other.is_file())]


def finished_outcome(output: Path, case: Case) -> CaseOutcome | None:
    """The outcome of a case that an earlier run has finished for the same input; None if it is still to be done, or a file of it is missing."""
    folder = case_folder(output, case)
    if not holds_outcome(folder):
        return None
    try:
        facts = json.loads((folder / OUTCOME_NAME).read_text(encoding="utf-8"))
        outcome = CaseOutcome(**facts["outcome"])
        is_whole = all(key in facts for key in _NEEDED_FACTS) and (folder / STATISTICS_NAME).is_file() and any(folder.glob("segmentation.*"))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    then, now = facts.get(INPUT_FACTS), input_facts(case)  # None in an outcome.json of an earlier version
    is_same = (outcome.input, outcome.series) == (_writable(str(case.input)), case.series or "") and (then is None or now is None or then == now)
    return outcome if is_whole and is_same else None


def _writable(text: str) -> str:
    """Text that can be written as UTF-8, which the names of some files cannot."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _first_letters(path: Path) -> str:
    """The beginning of a text file; '' of anything else."""
    try:
        if not path.is_file():
            return ""
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(_START_LETTERS)
    except OSError:
        return ""
