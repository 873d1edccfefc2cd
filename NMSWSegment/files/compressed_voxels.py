"""What ITK does not tell about compressed MetaImage and NRRD files: that their voxels are damaged.

ITK takes what zlib gave up to the damage, and does not compare the checksum at the end.
"""

import re
import zlib
from pathlib import Path
from typing import NamedTuple

_HEADER_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 22


class _Stream(NamedTuple):
    """Where compressed voxels are."""

    path: Path
    first_byte: int


def is_intact(path: Path) -> bool:
    """Whether the compressed voxels of a MetaImage or NRRD file, or of the file beside it that it names, are complete.

    True where they are not compressed, or in a way that ITK checks.
    """
    decompressor = zlib.decompressobj(wbits=47)  # zlib or gzip
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
        stream = _nrrd_stream(path, head) if head.startswith(b"NRRD") else _meta_image_stream(path, head)
        if stream is None:
            return True
        with open(stream.path, "rb") as file:
            file.seek(stream.first_byte)
            while not decompressor.eof and (block := file.read(_BLOCK_BYTES)):
                while block and not decompressor.eof:
                    decompressor.decompress(block, _BLOCK_BYTES)
                    block = decompressor.unconsumed_tail
    except (OSError, zlib.error):
        return False
    return decompressor.eof


def _meta_image_stream(path: Path, head: bytes) -> _Stream | None:
    """Of a MetaImage file; None where it is not compressed."""
    data_file = re.search(rb"^ElementDataFile\s*=[ \t]*([^\r\n]*)\r?\n?", head, flags=re.MULTILINE)
    if data_file is None or not re.search(rb"^CompressedData\s*=\s*True", head[: data_file.start()], flags=re.MULTILINE | re.IGNORECASE):
        return None
    name = data_file[1].decode("utf-8", errors="replace").strip()
    return _Stream(path, data_file.end()) if name.upper() == "LOCAL" else _Stream(path.parent / name, 0)


def _nrrd_stream(path: Path, head: bytes) -> _Stream | None:
    """Of a NRRD file; None where it is not compressed with gzip, or spread over several files."""
    end = re.search(rb"\r?\n\r?\n", head)
    header = head[: end.start()] if end else head
    fields = {key.strip().lower(): value.strip() for key, value in re.findall(rb"^([^#:\r\n]+): ?([^\r\n]*)", header, flags=re.MULTILINE)}
    if fields.get(b"encoding", b"").lower() not in (b"gzip", b"gz") or fields.keys() & {b"line skip", b"lineskip"}:
        return None
    name = (fields.get(b"data file") or fields.get(b"datafile") or b"").decode("utf-8", errors="replace")
    if name:
        return None if name.startswith("LIST") or "%" in name else _Stream(path.parent / name, 0)
    return _Stream(path, end.end()) if end else None
