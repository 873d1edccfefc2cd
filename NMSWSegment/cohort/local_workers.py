"""Cases on the processes of this computer.

One process per worker, which keeps the networks loaded. A process that dies takes its case along and is replaced; when this process
is killed, its workers end by themselves. A case starts when the memory for it is there; one that needs more than there is runs alone.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from NMSWSegment.cohort.case_run import CohortSettings, run_case
from NMSWSegment.cohort.cases import Case
from NMSWSegment.cohort.outcome import CaseOutcome, failed_outcome
from NMSWSegment.protocol import UserError

_POLL_S = 1.0
_EXIT_S = 5.0
_MOST_WORKERS_ON_WINDOWS = 30
"""`wait` takes no more than 63 handles there in Python 3.12 and older; a worker has two."""


@dataclass(frozen=True)
class Started:
    """A case is being worked on."""

    case: Case


@dataclass(frozen=True)
class Finished:
    """A case came to an end, good or bad."""

    case: Case
    outcome: CaseOutcome


@dataclass(frozen=True)
class WorkerPlan:
    """How many processes there are, and what each may use."""

    devices: tuple[str, ...]
    """One for each worker."""
    threads: int
    """Of each worker."""
    memory_bytes: int | None
    """Of all workers together; None where it is not known."""


def plan_workers(
    *, num_cases: int, cores: int, gpus: Sequence[str], device: str, workers: int | None, threads: int | None, memory_bytes: int | None
) -> WorkerPlan:
    """As many workers as there are GPUs, else cores; not more than cases.

    Processes side by side rather than threads of one process, because reading, statistics and pictures use one thread each.

    Args:
        gpus: devices for device "auto".
        device: what the user chose.
        workers, threads: what the user chose, threads for each worker; None leaves it to us.
        memory_bytes: available memory, of which a tenth stays free.
    """
    devices = tuple(gpus) if device == "auto" and gpus else (("cpu",) if device == "auto" else (device,))
    count = workers or (len(devices) if devices[0] != "cpu" else cores // (threads or 1))
    count = max(1, min(count, num_cases, _MOST_WORKERS_ON_WINDOWS if sys.platform == "win32" else count))
    return WorkerPlan(
        devices=tuple(devices[index % len(devices)] for index in range(count)),
        threads=threads or max(1, cores // count),
        memory_bytes=None if memory_bytes is None else int(0.9 * memory_bytes),
    )


def run_on_this_computer(
    cases: Sequence[Case], settings: CohortSettings, *, plan: WorkerPlan, needs_bytes: dict[str, int | None]
) -> Iterator[Started | Finished]:
    """Run all cases and tell about each when it starts and when it ends.

    Args:
        needs_bytes: memory by name of the case; None where it is not known.
    """
    waiting = list(cases)
    workers = [_Worker(settings, device=device, threads=plan.threads) for device in plan.devices]
    try:
        while waiting or any(worker.case for worker in workers):
            for worker in workers:
                if worker.case is None and waiting:
                    running = [other.case for other in workers if other.case]
                    index = _next_that_fits(waiting, running, plan=plan, needs_bytes=needs_bytes)
                    if index is not None:
                        case = waiting.pop(index)
                        worker.start(case)
                        yield Started(case)
            busy = [worker for worker in workers if worker.case]
            multiprocessing.connection.wait([source for worker in busy for source in worker.sources()], timeout=_POLL_S)
            for worker in busy:
                outcome = worker.outcome()
                if outcome is not None:
                    case, worker.case = worker.case, None
                    yield Finished(case, outcome)
    finally:
        for worker in workers:
            worker.stop()


def _next_that_fits(waiting: Sequence[Case], running: Sequence[Case], *, plan: WorkerPlan, needs_bytes: dict[str, int | None]) -> int | None:
    """The first waiting case for which there is memory beside those that run; any case where none runs."""
    if not running or plan.memory_bytes is None:
        return 0
    free = plan.memory_bytes - sum(needs_bytes.get(case.name) or 0 for case in running)
    return next((index for index, case in enumerate(waiting) if (needs_bytes.get(case.name) or 0) <= free), None)


class _Worker:
    """A process that takes one case after the other; started with its first one."""

    def __init__(self, settings: CohortSettings, *, device: str, threads: int) -> None:
        self.case: Case | None = None
        self._arguments = settings, device, threads
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: multiprocessing.connection.Connection | None = None

    def start(self, case: Case) -> None:
        """Hand a case to the process."""
        # Spawned, because torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        if self._process is None or not self._process.is_alive():
            try:
                self._connection, other = context.Pipe()
                process = context.Process(target=_serve, args=(other, *self._arguments), daemon=True, name="nmsw-cohort")
                process.start()
            except OSError as error:
                raise UserError(
                    f"The process of a worker could not be started ({error.strerror}). "
                    "Use fewer workers (--workers), close other programs, or allow more open files (ulimit -n)."
                ) from error
            self._process = process
            other.close()
        self.case = case
        try:
            self._connection.send(case)
        except OSError:  # it died between two cases; outcome() will say so
            pass

    def sources(self) -> list:
        """What to wait for."""
        return [self._connection, self._process.sentinel]

    def outcome(self) -> CaseOutcome | None:
        """The outcome of the case; None while it runs."""
        try:
            if self._connection.poll():
                return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_EXIT_S)
        if self._process.is_alive():
            return None
        return failed_outcome(self.case, _death_message(self._process.exitcode))

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is None:
            return
        self._connection.close()
        self._process.terminate()
        self._process.join(_EXIT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _death_message(exit_code: int | None) -> str:
    """Why a process may have died, for the user."""
    if exit_code == -getattr(signal, "SIGKILL", 9):
        return "Its process was killed, most likely because the computer ran out of memory. Use fewer workers (--workers), or crop the volume."
    return f"Its process ended unexpectedly (exit code {exit_code}). Run this case alone with 'nmsw segment' to see why."


def _serve(connection, settings: CohortSettings, device: str, threads: int) -> None:
    """The process: cases in, outcomes out, until the other end closes or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            case = connection.recv()
        except (EOFError, OSError):
            return
        outcome = run_case(case, settings, device=device, threads=threads)
        try:
            connection.send(outcome)
        except OSError:
            return


def _end_with_parent() -> None:
    """End this process when its parent was killed, in the middle of a case too."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
