"""python -m NMSWSegment, and the program nmsw."""

import os
import sys

from NMSWSegment.files.output_file import use_utf8_names
from NMSWSegment.interrupt import stopped_at_once


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code.

    Args:
        argv: words after the program's name; None takes those of the process.
    """
    _open_standard_streams()
    use_utf8_names()
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["worker"]:
        # Past the other verbs: nothing they import may print into the pipe of the panel, or keep it waiting.
        from NMSWSegment.engine import worker

        return worker.main(arguments[1:])
    with stopped_at_once():
        from NMSWSegment import command_line
    return command_line.main(arguments)


def _open_standard_streams() -> None:
    """Give a process that was started without input, output or error ones that lead nowhere.

    Otherwise the next file that is opened takes their numbers, and gets what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
