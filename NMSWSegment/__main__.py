"""python -m NMSWSegment, and the program nmsw."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code.

    Args:
        argv: words after the program's name; None takes those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["worker"]:
        # Past the other verbs: nothing they import may print into the pipe of the panel, or keep it waiting.
        from NMSWSegment.engine import worker

        return worker.main(arguments[1:])
    from NMSWSegment import command_line

    return command_line.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
