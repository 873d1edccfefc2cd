"""What this computer may keep for the next start and compute again at any time: a folder of the user's own, written in one step."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from NMSWSegment.files.output_file import draft_folder, replace_folder

logger = logging.getLogger(__name__)

CACHE_FOLDER_VARIABLE = "NMSW_CACHE"


def user_cache_folder() -> Path:
    """Where the cache lies; it need not exist."""
    chosen = os.environ.get(CACHE_FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        return parent / "NMSWSegment" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "NMSWSegment"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "NMSWSegment"


def cached_folder(name: str) -> Path | None:
    """The complete folder of a name in the cache; None where there is none, or where others than the user may have written it."""
    folder = user_cache_folder() / name
    try:
        return folder if folder.is_dir() and all(_is_private(path) for path in (folder.parent, folder)) else None
    except OSError:
        return None


def put_in_cache(name: str, fill: Callable[[Path], object]) -> Path | None:
    """Fill a folder of the cache, all of it or nothing; one that is there is replaced, unless another process has a file of it open (on Windows).

    Args:
        fill: writes the files into an empty folder.

    Returns:
        The folder; None where the cache cannot be written, which costs time and nothing else.
    """
    parent = user_cache_folder()
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with draft_folder(parent, prefix=".filling-") as place:
            draft = place / name
            draft.mkdir(mode=0o700)
            fill(draft)
            replace_folder(draft, parent / name, aside=place / "old")
    except OSError as error:  # the disk is full, or another process was faster
        logger.info("'%s' could not be kept in the cache '%s' (%s)", name, parent, error)
    return cached_folder(name)


def _is_private(path: Path) -> bool:
    """Whether only the user can have written there; Windows keeps the user's folders private by itself."""
    if os.name != "posix":
        return True
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
