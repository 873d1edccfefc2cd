"""The progress of a command on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from NMSWSegment.console import complain, printable
from NMSWSegment.protocol import OnProgress, Progress, ignore_progress


@contextmanager
def progress_bar(*, is_transient: bool) -> Iterator[OnProgress]:
    """A progress callback that draws a bar, or writes lines where rich is missing.

    Args:
        is_transient: the bar goes when the block ends, and nothing is written where standard error is no terminal; otherwise
            it stays, and a file gets lines.
    """
    if is_transient and not sys.stderr.isatty():
        yield ignore_progress
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield _write_line
        return
    if not sys.stderr.isatty():
        yield _write_line
        return
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Bar(*columns, console=Console(stderr=True), transient=is_transient) as bar:
        task = bar.add_task("Starting", total=1.0)
        yield lambda progress: bar.update(task, completed=progress.fraction, description=printable(progress.message))


def _write_line(progress: Progress) -> None:
    """'12% what is going on'."""
    complain(f"{progress.fraction:4.0%} {progress.message}", prefix="")
