"""Ctrl-C while libraries are loaded: numpy, ITK and torch may lose it, or print pages of their own."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 130


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once. Only for blocks that leave nothing half done."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # a program that has other plans with Ctrl-C keeps them
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_) -> None:
    """Say so and leave."""
    try:
        os.write(2, b"nmsw: Stopped.\n")
    finally:
        os._exit(STOPPED)
