"""Work in processes of their own: samples that are drawn, cases that are read. torch's DataLoader starts them; they end with this process."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from NMSWSegment.files.output_file import use_utf8_names
from NMSWSegment.protocol import UserError


def in_workers(function: Callable, items: Sequence, *, num_workers: int, pin_memory: bool = False) -> Iterator:
    """function(item) of every item, in their order; each worker is two items ahead, 0 workers are this process.

    Args:
        function, items: can be pickled, because there are systems where a process starts with nothing.
        pin_memory: put results where a GPU fetches them by itself.

    Raises:
        UserError: as the function does.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    loader = torch.utils.data.DataLoader(
        _Results(function), sampler=items, batch_size=None, num_workers=num_workers, worker_init_fn=_start_worker, pin_memory=pin_memory
    )
    for result in loader:
        if isinstance(result, UserError):
            raise result
        yield result


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Turn what torch says when a worker was killed, at whatever moment, into a sentence with the way out."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"A worker process was lost, most likely because the memory of this computer or of /dev/shm is full ({str(error).splitlines()[0].strip()}). "
            "Use fewer --workers, or give it more memory."
        ) from error


@dataclass(frozen=True)
class _Results(torch.utils.data.Dataset):
    """The results of a function as a data set; a UserError is one of them, because a loader would put the traceback into its sentence."""

    function: Callable

    def __getitem__(self, item: object) -> object:
        try:
            return self.function(item)
        except UserError as error:
            return error


def _start_worker(worker_index: int) -> None:
    """Ctrl-C, SIGTERM and SIGHUP reach all processes; the first one decides."""
    use_utf8_names()
    sys.excepthook = lambda *_: None  # through which a thread of multiprocessing would print that nobody fetches a result any more
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        with suppress(AttributeError):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
