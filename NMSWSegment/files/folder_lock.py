"""A folder in which one run works at a time."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from NMSWSegment.protocol import UserError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_LOCKED_BYTE = 1 << 30
"""Beyond what is in the file: on Windows nobody else can read a byte that is locked."""
_IS_LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the system gives the lock back however this process ends. Some network drives have no locks.

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

                stream.seek(_LOCKED_BYTE)
                msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _IS_LOCKED:
                raise UserError(f"Another run works in the folder '{folder}'. Wait for its end, or choose another folder.") from error
            logger.warning("The folder '%s' cannot be locked (%s). Start no other run there until this one has ended.", folder, error.strerror)
        yield
    finally:
        stream.close()
