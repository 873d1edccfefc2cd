"""A folder in which one run works at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from NMSWSegment.protocol import UserError

LOCK_NAME = ".lock"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the system gives the lock back however this process ends.

    Raises:
        UserError: another run works there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / LOCK_NAME, "a+b")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"The output folder '{folder}' cannot be used ({error.strerror}). Choose a folder that you may write to.") from error
    try:
        try:
            if os.name == "nt":
                import msvcrt

                stream.seek(0)
                msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"Another run works in the folder '{folder}'. Wait for its end, or choose another folder.") from error
        yield
    finally:
        stream.close()
