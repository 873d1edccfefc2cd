"""What became of a case."""

import socket
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from NMSWSegment.cohort.cases import Case

DONE, FAILED = "done", "failed"
OUTCOME_NAME = "outcome.json"
"""In the folder of a case that is done: its outcome, and what its quality sheet shows."""


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
        input=str(case.input),
        series=case.series or "",
        status=status,
        message=message,
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
