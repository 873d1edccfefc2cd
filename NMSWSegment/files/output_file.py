"""Output files: checked before a long run, complete or not there at all after it."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from NMSWSegment.protocol import UserError


def check_output_path(path: str | Path, endings: Sequence[str]) -> Path:
    """Make sure that a file can be written, before the work that it is to hold is done.

    Args:
        path: the file to write; it may exist and is then replaced.
        endings: the endings that the writer knows, e.g. (".nii.gz", ".nii").

    Returns:
        The path as a Path.

    Raises:
        UserError: the ending is unknown, the path is a folder, or its folder is missing or not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"The output '{path}' is a folder. Give a file name that ends in {_either(endings)}.")
    if file_ending(path, endings) is None:
        raise UserError(f"The output '{path}' has an ending that cannot be written here. Use {_either(endings)}.")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"The output folder '{folder}' does not exist. Create it, or choose another folder.")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"The output '{path}' exists and is write-protected. Remove the protection, or choose another name.")
    try:
        # Only a real file tells: os.access knows neither Windows permissions nor read-only network shares.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"No file can be written in the folder '{folder}' ({error.strerror}). Choose a folder that you may write to.") from error
    return path


def file_ending(path: str | Path, endings: Sequence[str]) -> str | None:
    """The longest of `endings` that the file name ends in, whatever its case; None if there is none or nothing before it."""
    name = Path(path).name.lower()
    fitting = [ending for ending in endings if name.endswith(ending) and len(name) > len(ending)]
    return max(fitting, key=len, default=None)


@contextmanager
def replaced_together(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary files that take the places of `paths` when the block ends well, all of them or none.

    Each lies in the folder of its path, so that taking its place is one step of the file system, and keeps the whole name at its
    end, because writers choose the format by it.

    Raises:
        UserError: a file could not be written or put in place.
    """
    temporaries = [path.parent / f".{os.getpid()}-{index}-{path.name}" for index, path in enumerate(paths)]
    placed = []
    try:
        yield temporaries
        for temporary, path in zip(temporaries, paths):
            os.replace(temporary, path)
            placed.append(path)
    except BaseException as error:
        # BaseException: Ctrl-C must leave nothing behind either.
        for path in [*temporaries, *placed]:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"The output could not be written ({error}). Check that the disk is not full and that the folder may be written to.") from error
        raise


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """One temporary file that takes the place of `path` when the block ends well."""
    with replaced_together([Path(path)]) as (temporary,):
        yield temporary


def _either(endings: Sequence[str]) -> str:
    """'a', 'b' or 'c' for a sentence."""
    quoted = [f"'{ending}'" for ending in endings]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
