"""What the command line prints: always in one piece, whatever the names in it and wherever it goes."""

import os
import sys
from typing import TextIO


def say(text: str) -> None:
    """Print a line on standard output.

    Raises:
        OSError: the output is full, or nobody reads it any more.
    """
    print(printable(text, sys.stdout))


def say_all() -> None:
    """Hand on what `say` printed; raises as `say`."""
    sys.stdout.flush()


def complain(text: str, *, prefix: str = "nmsw: ") -> None:
    """Print a line on standard error, if that is possible."""
    try:
        print(printable(prefix + text, sys.stderr), file=sys.stderr, flush=True)
    except (OSError, ValueError):  # full or closed: there is nobody left to tell
        pass


def forget_output() -> None:
    """Let what could not be printed go nowhere, so that the end of the process does not try once more."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass


def printable(text: str, stream: TextIO | None = None) -> str:
    """The text without control characters, which a terminal would obey, and without letters that the stream does not know.

    Names of files and descriptions of DICOM series may hold anything.
    """
    text = "".join(character if character.isprintable() or character in "\n\t" else f"\\x{ord(character):02x}" for character in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
