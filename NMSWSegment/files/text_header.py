"""What ITK does not tell about MetaImage and NRRD files: which voxels are missing or damaged, and which header fields it passes over.

ITK takes what zlib gave up to the damage, does not compare the checksum at the end, and leaves arbitrary voxels where a stream or
a list of files is too short. Some file names crash it or keep it waiting for ever.
"""

import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from NMSWSegment.files.volume_checks import check_readable, damaged_error
from NMSWSegment.protocol import UserError

_HEADER_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 22

_TURNED_SPACES = ("rast", "right-anterior-superior-time", "last", "left-anterior-superior-time")
"""ITK takes their coordinates for left-posterior-superior."""
_MILLIMETERS = ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "", "???")
"""The last two say nothing, and millimeters are usual."""

_SHOWN_LETTERS = 80
"""Of a name in a header, which may be of any length."""

_SAVE_IN_SLICER = "for example in 3D Slicer."


@dataclass(frozen=True)
class TextHeader:
    """The header of a MetaImage or NRRD file, or of one whose voxels are in other files."""

    path: Path
    is_nrrd: bool
    fields: dict[str, str]
    """Keys of NRRD are in small letters; those of MetaImage are as ITK wants them."""
    num_bytes: int
    """Of the header: here voxels in the same file begin."""
    data_file: str
    """What the header says of the files with the voxels; '' where they are in the same file."""
    lines: tuple[str, ...]
    """Complete lines behind the header, for a list of files."""


class _Stream(NamedTuple):
    """Where compressed voxels are."""

    path: Path
    first_byte: int
    num_bytes: int | None
    """None where it goes to the end of the file."""


def read_text_header(path: Path) -> TextHeader | None:
    """The header of a MetaImage or NRRD file; None where it is none, or breaks off, which ITK tells."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise damaged_error(path) from error
    return _nrrd_header(path, head) if head.startswith(b"NRRD") else _meta_image_header(path, head)


def check_data_files(header: TextHeader) -> None:
    """To be called before ITK sees the file.

    Raises:
        UserError: the voxels are in files that are missing or no files, too few or too many, or stored in a way that is not read.
    """
    name = header.path.name
    if header.is_nrrd and header.fields.get("encoding", "").lower() in ("bzip2", "bz2"):
        raise UserError(
            f"The voxels of '{name}' are compressed with bzip2, which cannot be read here. Save it with the encoding gzip or raw, {_SAVE_IN_SLICER}"
        )
    names = _file_names(header)
    if not header.is_nrrd:
        _check_meta_image_storage(header, is_several=names is not None)
    for data_name in [header.data_file] if names is None else names:
        if data_name:
            _check_data_file(header.path.parent / data_name, header.path)


def check_units(header: TextHeader) -> None:
    """To be called for a 3-D scalar volume.

    Raises:
        UserError: the header does not give the size of the voxels, not in mm, or their place in a space that ITK takes for another.
    """
    name, fields = header.path.name, header.fields
    if (space := fields.get("space", "")).lower() in _TURNED_SPACES:
        raise UserError(
            f"'{name}' gives its place in the space '{space}', which cannot be read here. Save one time point of it as a 3-D volume, {_SAVE_IN_SLICER}"
        )
    if header.is_nrrd:
        units = re.findall(r'"([^"]*)"', fields.get("space units") or fields.get("units", ""))[:3]
    else:
        units = [fields.get("DistanceUnits", "").replace("?", "")]
    if other := [unit for unit in units if unit.strip().lower() not in _MILLIMETERS]:
        raise UserError(f"'{name}' gives lengths in '{other[0]}', but millimeters are needed. Save it with its spacing and origin in mm, {_SAVE_IN_SLICER}")
    if not _has_spacing(header):
        keys = "'space directions' or 'spacings'" if header.is_nrrd else "'ElementSpacing'"
        raise UserError(f"'{name}' does not say how large its voxels are. Add {keys} to its header, or export it again from the original.")


def is_intact(header: TextHeader, *, num_bytes: int) -> bool:
    """Whether the compressed voxels of a file, or of the file beside it that it names, are complete.

    True where they are not compressed, or in a way that ITK checks.

    Args:
        header: of the file.
        num_bytes: of all voxels, decompressed.
    """
    stream = _nrrd_stream(header) if header.is_nrrd else _meta_image_stream(header)
    if stream is None:
        return True
    num_found = 0
    decompressor = zlib.decompressobj(wbits=47)  # zlib or gzip
    try:
        for block in _blocks(stream):
            while block:
                if decompressor.eof:
                    # Only ITK's reader of NRRD goes on to a second gzip stream; anything else at the end is passed over.
                    if not (header.is_nrrd and block.startswith(b"\x1f\x8b")):
                        return num_found >= num_bytes
                    decompressor = zlib.decompressobj(wbits=47)
                num_found += len(decompressor.decompress(block, _BLOCK_BYTES))
                block = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    except (OSError, zlib.error):
        return False
    return decompressor.eof and num_found >= num_bytes


def _meta_image_header(path: Path, head: bytes) -> TextHeader | None:
    """ITK reads no field behind ElementDataFile."""
    last = re.search(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*([^\r\n]*)\r?\n?", head, flags=re.MULTILINE)
    if last is None:
        return None
    fields = _fields(re.findall(rb"^[ \t]*(\w+)[ \t]*[=:][ \t]*([^\r\n]*)", head[: last.start()], flags=re.MULTILINE))
    data_file = _text(last[1])
    is_here = data_file in ("LOCAL", "Local", "local")
    return TextHeader(path, False, fields, last.end(), "" if is_here else data_file, () if is_here else _lines(head[last.end() :]))


def _nrrd_header(path: Path, head: bytes) -> TextHeader | None:
    """An empty line ends it; without one the voxels are in other files."""
    end = re.search(rb"\r?\n\r?\n", head)
    header = head[: end.start()] if end else head
    fields = {key.lower(): text for key, text in _fields(re.findall(rb"^([^#:\r\n]+):(?!=) ?([^\r\n]*)", header, flags=re.MULTILINE)).items()}
    data_file = fields.get("data file") or fields.get("datafile") or ""
    if end is None and not data_file:
        return None
    listed = re.search(rb"^data ?file: ?LIST[^\r\n]*\r?\n", header, flags=re.MULTILINE)
    return TextHeader(path, True, fields, end.end() if end else len(head), data_file, _lines(header[listed.end() :] + b"\n") if listed else ())


def _fields(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Keys and values as text."""
    return {_text(key): _text(value) for key, value in pairs}


def _text(data: bytes) -> str:
    """Without blanks at its ends."""
    return data.decode("utf-8", errors="replace").strip()


def _lines(data: bytes) -> tuple[str, ...]:
    """Up to the last line break: ITK's reader of MetaImage passes over a line without one."""
    lines = [_text(line) for line in data.split(b"\n")[:-1]]
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


def _file_names(header: TextHeader) -> Iterator[str] | None:
    """Names of several files with voxels; None where there is one.

    Raises:
        UserError: they are not as many as the slices, or their names follow a pattern that ITK cannot be trusted with.
    """
    words = header.data_file.split()
    if header.data_file.startswith("LIST"):
        if not header.is_nrrd and words[1:] not in ([], [str(len(_shape_ijk(header)) - 1)]):
            raise _pattern_error(header)
        _check_num_files(header, len(header.lines))
        return iter(header.lines)
    if not re.search(r"%\d*d\S*\s+\S" if header.is_nrrd else "%", header.data_file):
        return None
    numbers = _file_numbers(header, words[1:])
    # Anything else than one number crashes ITK, which hands the pattern to printf.
    if numbers is None or not re.fullmatch(r"[^%]*%0?\d?\d?d[^%]*", words[0]):
        raise _pattern_error(header)
    _check_num_files(header, len(numbers))
    return (words[0] % number for number in numbers)


def _file_numbers(header: TextHeader, words: list[str]) -> range | None:
    """Numbers that a pattern of names runs through: 'first last step'; None where they are not understood.

    MetaImage may leave out last and step, or all three; of two numbers ITK makes a division by zero, and it cannot count down.
    """
    if not all(re.fullmatch(r"[+-]?\d{1,9}", word) for word in words):
        return None
    numbers = [int(word) for word in words]
    if not header.is_nrrd and len(numbers) < 2:
        first = numbers[0] if numbers else 1
        return range(first, first + _shape_ijk(header)[-1])
    if len(numbers) not in ((3, 4) if header.is_nrrd else (3,)) or numbers[2] == 0 or (numbers[2] < 0 and not header.is_nrrd):
        return None
    first, last, step = numbers[:3]
    return range(first, last + (1 if step > 0 else -1), step)


def _check_num_files(header: TextHeader, num_files: int) -> None:
    """Raise UserError if a MetaImage has another number of slices; of NRRD, ITK tells."""
    if not header.is_nrrd and num_files != (num_slices := _shape_ijk(header)[-1]):
        raise UserError(
            f"'{header.path.name}' has {num_slices} slices but names {num_files} files. Export it again with all its files; in a list, the last name needs a line break, too."
        )


def _pattern_error(header: TextHeader) -> UserError:
    """The sentence for names of files that are not understood."""
    return UserError(
        f"'{header.path.name}' names the files with its voxels by '{header.data_file[:_SHOWN_LETTERS]}', which cannot be read here. "
        f"Give one number such as %03d, and first, last and step, as in 'ct%03d.raw 1 90 1', or save the volume as one file, {_SAVE_IN_SLICER}"
    )


def _shape_ijk(header: TextHeader) -> list[int]:
    """Of a MetaImage."""
    try:
        shape = [int(float(word)) for word in header.fields["DimSize"].split()[: int(header.fields["NDims"])]]
    except (KeyError, ValueError, OverflowError) as error:
        raise damaged_error(header.path) from error
    if not shape:
        raise damaged_error(header.path)
    return shape


def _check_meta_image_storage(header: TextHeader, *, is_several: bool) -> None:
    """Raise UserError where ITK would take other bytes for the voxels."""
    name, header_size = header.path.name, _number(header, "HeaderSize")
    if (header_size > 0 and not header.data_file and header_size != header.num_bytes) or (header_size == -1 and _is_compressed(header)):
        raise UserError(f"'{name}' gives a HeaderSize of {header_size}, but its voxels do not begin there. Write it again without this line in its header.")
    if is_several and _is_compressed(header):
        raise UserError(f"The compressed voxels of '{name}' are in several files, which cannot be read here. Write it again as one file, or not compressed.")
    if not header.data_file and _is_compressed(header) and _number(header, "CompressedDataSize") <= 0:
        raise UserError(
            f"'{name}' does not say how many bytes its compressed voxels are (CompressedDataSize), so that they cannot be read. "
            "Write it again with this line in its header, or not compressed."
        )
    for key, plain in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if (text := header.fields.get(key, "")) and not _is_number(text, plain):
            raise UserError(
                f"'{name}' gives the {key} {text[:_SHOWN_LETTERS]}, which is not applied here. Write it again with it applied to the voxels, and without this line."
            )


def _check_data_file(path: Path, header_path: Path) -> None:
    """Raise UserError unless a file with voxels may be read: ITK waits for ever for a pipe."""
    if not os.path.exists(path):
        raise UserError(
            f"The voxels of '{header_path.name}' are in the file '{path.name[:_SHOWN_LETTERS]}', which is not there. Copy the header together with its data files."
        )
    if not os.path.isfile(path):
        raise UserError(f"The voxels of '{header_path.name}' are in '{path}', which is no file, but a folder, device, pipe or the like. Export it again.")
    check_readable(path)


def _has_spacing(header: TextHeader) -> bool:
    """Whether the header gives the size of a voxel; ITK takes 1 mm otherwise."""
    fields = header.fields
    if not header.is_nrrd:
        return "ElementSpacing" in fields or "ElementSize" in fields
    spacings = [word for word in fields.get("spacings", "").split() if word.lower() != "nan"]
    return fields.get("space directions", "").count("(") >= 3 or len(spacings) >= 3


def _is_compressed(header: TextHeader) -> bool:
    """Of a MetaImage; ITK looks at the first letter."""
    return header.fields.get("CompressedData", "")[:1] in ("T", "t", "1")


def _number(header: TextHeader, key: str) -> int:
    """Of a field of a MetaImage; 0 where it is missing or no number."""
    found = re.match(r"[+-]?\d{1,18}", header.fields.get(key, ""))
    return int(found[0]) if found else 0


def _is_number(text: str, number: float) -> bool:
    """Whether a text says just that."""
    try:
        return float(text) == number
    except ValueError:
        return False


def _meta_image_stream(header: TextHeader) -> _Stream | None:
    """None where the voxels are not compressed."""
    if not _is_compressed(header):
        return None
    num_bytes = _number(header, "CompressedDataSize")
    path, first_byte = (header.path.parent / header.data_file, max(_number(header, "HeaderSize"), 0)) if header.data_file else (header.path, header.num_bytes)
    return _Stream(path, first_byte, num_bytes if num_bytes > 0 else None)


def _nrrd_stream(header: TextHeader) -> _Stream | None:
    """None where the voxels are not compressed with gzip, or spread over several files."""
    fields = header.fields
    if fields.get("encoding", "").lower() not in ("gzip", "gz") or fields.keys() & {"line skip", "lineskip"} or _file_names(header) is not None:
        return None
    return _Stream(header.path.parent / header.data_file, 0, None) if header.data_file else _Stream(header.path, header.num_bytes, None)


def _blocks(stream: _Stream) -> Iterator[bytes]:
    """The compressed bytes."""
    left = stream.num_bytes
    with open(stream.path, "rb") as file:
        file.seek(stream.first_byte)
        while block := file.read(_BLOCK_BYTES if left is None else min(_BLOCK_BYTES, left)):
            left = None if left is None else left - len(block)
            yield block
