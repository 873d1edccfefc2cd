"""Output files: checked before a long run, complete or not there at all after it.

Everything that the program leaves for a person goes through `replaced_together`: written under a name that nobody can foresee, flushed to the
disk, and only then put in place; what was there before returns if anything fails.
"""

import locale
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from NMSWSegment.protocol import UserError

_SHOWN_LETTERS = 300
"""Of a path that is too long for the system."""
_HELD_S = 3.0
"""For so long a virus scanner or an indexer may look at a file that was just written, which Windows neither renames nor removes meanwhile."""


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
    check_name(path)
    if path.is_dir():
        raise UserError(f"The output '{path}' is a folder. Give a file name that ends in {_either(endings)}.")
    if file_ending(path, endings) is None:
        raise UserError(f"The output '{path}' has an ending that cannot be written here. Use {_either(endings)}.")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"The output folder '{folder}' does not exist. Create it, or choose another folder.")
    if path.exists():
        if not path.is_file():
            raise UserError(f"The output '{path}' is no file, but a device, pipe or the like. Choose another name.")
        try:
            with open(path, "r+b"):
                pass
        except OSError as error:
            raise UserError(
                f"The output '{path}' exists and is write-protected, or another program has it open. "
                "Remove the protection, close that program, or choose another name."
            ) from error
    try:
        # Only a real file tells: os.access knows neither Windows permissions nor read-only network shares.
        _patiently(_new_file(path).unlink)
    except OSError as error:
        raise UserError(f"No file can be written in the folder '{folder}' ({error.strerror}). Choose a folder that you may write to.") from error
    return path


def file_ending(path: str | Path, endings: Sequence[str]) -> str | None:
    """The longest of `endings` that the file name ends in, whatever its case; None if there is none or nothing before it."""
    name = Path(path).name.lower()
    fitting = [ending for ending in endings if name.endswith(ending) and len(name) > len(ending)]
    return max(fitting, key=len, default=None)


def check_name(path: Path) -> None:
    """Make sure that a path can be followed, and that it can be given to ITK as UTF-8.

    Raises:
        UserError: the name is too long, is not UTF-8, or is a link that leads to itself.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        shown = str(path).encode("utf-8", errors="backslashreplace").decode("utf-8")
        raise UserError(f"The name '{shown}' has characters that are not UTF-8. Rename the file or folder.") from error
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        shown = str(path) if len(str(path)) <= _SHOWN_LETTERS else f"{str(path)[:_SHOWN_LETTERS]}..."
        raise UserError(f"'{shown}' cannot be used ({reason}). Choose another name or folder.") from error


def use_utf8_names() -> None:
    """Let C libraries such as ITK open files by their UTF-8 names on Windows, too, where they would take them for names in the code page of the country.

    For processes of our own only, because it holds for a whole process. Windows before 10 (1803) cannot.
    """
    if sys.platform == "win32":
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, ".UTF-8")


def letters_hint(path: Path) -> str:
    """What to add to a sentence about a path that ITK refused; empty unless its letters may be the reason, as on Windows."""
    if sys.platform != "win32" or str(path).isascii():
        return ""
    return " Its path has letters beyond A to Z, which may be the reason, too: try a folder with plain letters."


def new_folder(parent: Path, *, prefix: str, mode: int = 0o700) -> Path:
    """A new folder with a name that nobody can foresee.

    Unlike tempfile, it fails at once where the parent cannot be written: on Windows, tempfile takes that for a name in use and tries others for
    hours (cpython issue 66305).
    """
    folder = Path(parent) / f"{prefix}{secrets.token_hex(8)}"
    folder.mkdir(mode=mode)
    return folder


@contextmanager
def draft_folder(parent: Path, *, prefix: str) -> Iterator[Path]:
    """A new folder to fill what is then put in place; it is gone at the end, with all that is still in it."""
    folder = new_folder(parent, prefix=prefix, mode=0o777)  # on Windows, what comes out of a private folder stays private
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_path(source: Path, target: Path) -> None:
    """os.replace, with patience on Windows; raises OSError as it does."""
    _patiently(lambda: os.replace(source, target))


def replace_folder(source: Path, target: Path, *, aside: Path) -> None:
    """Let a complete folder take the place of an older one, if there is one, which returns if that fails.

    Args:
        aside: the new name of the older one, which is for the caller to remove; on the same disk.

    Raises:
        OSError: the folder did not take the place.
    """
    was_there = os.path.lexists(target)
    if was_there:
        replace_path(target, aside)
    try:
        replace_path(source, target)
    except BaseException:
        if was_there:
            replace_path(aside, target)
        raise


@contextmanager
def replaced_together(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary files that take the places of `paths` when the block ends well, all of them or none.

    Each lies in the folder of its path, so that taking its place is one step of the file system, and ends as its path does, because
    writers choose the format by it. A file that is replaced hands its mode on; until the last one is in place, all old ones are kept.

    Raises:
        UserError: a file could not be written or put in place.
    """
    paths = [Path(path) for path in paths]
    temporaries: list[Path] = []
    placed: list[tuple[Path, bool, Path | None]] = []  # path, whether it was there, second name of what was there
    try:
        for path in paths:
            temporaries.append(_new_file(path))
        yield temporaries
        for temporary, path in zip(temporaries, paths):
            _finish(temporary, path)
        for temporary, path in zip(temporaries, paths):
            was_there = path.is_file() or path.is_symlink()
            placed.append((path, was_there, _second_name(path) if was_there and len(paths) > 1 else None))
            replace_path(temporary, path)
        for folder in {path.parent for path in paths}:
            _flush(folder)
    except BaseException as error:
        # BaseException: Ctrl-C must leave nothing behind either.
        try:
            _restore(placed, temporaries)
        finally:
            _restore(placed, temporaries)  # the rest, where a second Ctrl-C came into the first
        if isinstance(error, OSError):
            raise UserError(f"The output could not be written ({error}). Check that the disk is not full and that the folder may be written to.") from error
        raise
    for _, _, old in placed:
        if old is not None:
            with suppress(OSError):
                old.unlink()


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """One temporary file that takes the place of `path` when the block ends well."""
    with replaced_together([Path(path)]) as (temporary,):
        yield temporary


def _patiently(step: Callable[[], object]) -> None:
    """Take a step, again and again for a while where Windows refuses it."""
    last = time.monotonic() + _HELD_S
    while True:
        try:
            step()
            return
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > last:
                raise
        time.sleep(0.1)


def _new_file(path: Path) -> Path:
    """A new empty file beside `path`, with a name that nobody can foresee and the ending of `path`.

    O_EXCL follows no link, which somebody else may have laid into a shared folder.
    """
    ending = re.search(r"(\.[A-Za-z0-9]{1,8}){0,2}$", path.name)[0].lower()
    temporary = path.parent / f".nmsw-{secrets.token_hex(8)}{ending}"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    return temporary


def _finish(temporary: Path, path: Path) -> None:
    """Flush a written file to the disk; it takes over the mode of the one that it replaces."""
    _flush(temporary)
    with suppress(FileNotFoundError):
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk; a folder only where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network drives cannot flush a folder
            raise
    finally:
        os.close(handle)


def _second_name(path: Path) -> Path:
    """Another name for a file that is about to be replaced; a copy where the file system has no second names."""
    second = path.parent / f".nmsw-{secrets.token_hex(8)}.old"
    try:
        os.link(path, second, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(path, second)
    return second


def _restore(placed: Sequence[tuple[Path, bool, Path | None]], temporaries: Sequence[Path]) -> None:
    """Put every old file back, and remove what was written."""
    for temporary, (path, was_there, old) in zip(temporaries, placed):
        with suppress(OSError):
            if old is not None:
                if not temporary.exists():  # else it has not taken the place, and the old file is still there
                    replace_path(old, path)
                old.unlink(missing_ok=True)  # two names of one file stay two
            elif not was_there:
                path.unlink(missing_ok=True)
    for temporary in temporaries:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _either(endings: Sequence[str]) -> str:
    """'a', 'b' or 'c' for a sentence."""
    quoted = [f"'{ending}'" for ending in endings]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
