"""The header of one DICOM file: its elements up to the pixel data, and where the pixel data lie.

SimpleITK gives neither the sequences of an enhanced object (the places of its frames) nor the length of the pixel data, and it reads a
large file whole before it says that it is no DICOM. Nothing in a file is trusted here: every length is compared with the file.

Source: DICOM PS3.5 (encoding), PS3.10 (file format).
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"

_PIXEL_DATA = 0x7FE00010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG_TYPES = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
"""Value representations with a length of four bytes."""
_MAX_DEPTH = 16
"""Sequences within sequences; an enhanced object has four."""
_MAX_VALUE_BYTES = 1 << 16
"""Of one value that is kept; the longest that is asked for is a description."""

_IMAGE_CLASSES = tuple(f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "20", "128", "128.1", "130"))
"""Storage of CT, MR, NM and PET images, enhanced and converted ones included."""

SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230
PLANE_POSITION, PLANE_ORIENTATION, PIXEL_MEASURES, VALUE_TRANSFORMATION = 0x00209113, 0x00209116, 0x00289110, 0x00289145
_SEQUENCES = frozenset((SHARED_GROUPS, FRAME_GROUPS, PLANE_POSITION, PLANE_ORIENTATION, PIXEL_MEASURES, VALUE_TRANSFORMATION))

TRANSFER_SYNTAX, MEDIA_CLASS, OBJECT_CLASS = 0x00020010, 0x00020002, 0x00080016
IMAGE_TYPE, MODALITY, SERIES_DESCRIPTION = 0x00080008, 0x00080060, 0x0008103E
PATIENT_NAME, PATIENT_ID = 0x00100010, 0x00100020
STUDY_UID, SERIES_UID, ACQUISITION_NUMBER, POSITION, ORIENTATION = 0x0020000D, 0x0020000E, 0x00200012, 0x00200032, 0x00200037
SAMPLES, PHOTOMETRIC, NUM_FRAMES, ROWS, COLUMNS, PIXEL_SPACING = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011, 0x00280030
BITS_ALLOCATED, BITS_STORED, HIGH_BIT, IS_SIGNED, INTERCEPT, SLOPE = 0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00281052, 0x00281053
_KEPT = frozenset((
    OBJECT_CLASS, IMAGE_TYPE, MODALITY, SERIES_DESCRIPTION, PATIENT_NAME, PATIENT_ID, STUDY_UID, SERIES_UID, ACQUISITION_NUMBER, POSITION, ORIENTATION,
    SAMPLES, PHOTOMETRIC, NUM_FRAMES, ROWS, COLUMNS, PIXEL_SPACING, BITS_ALLOCATED, BITS_STORED, HIGH_BIT, IS_SIGNED, INTERCEPT, SLOPE,
))  # fmt: skip


class DicomError(ValueError):
    """A file that begins as DICOM and breaks off, contradicts itself, or is packed in a way that is not read here."""


@dataclass(frozen=True)
class Elements:
    """Elements of one data set: raw values and sequences by tag (group << 16 | element)."""

    values: dict[int, bytes]
    sequences: dict[int, list["Elements"]]
    is_big_endian: bool = False

    def text(self, tag: int) -> str:
        """A value as text without padding; '' where it is missing."""
        return self.values.get(tag, b"").decode("latin-1").strip(" \0")

    def integer(self, tag: int) -> int | None:
        """An unsigned short (US); None where it is missing."""
        value = self.values.get(tag, b"")
        return struct.unpack_from(">H" if self.is_big_endian else "<H", value)[0] if len(value) >= 2 else None

    def numbers(self, tag: int) -> tuple[float, ...]:
        """Decimal or integer strings (DS, IS); empty where it is missing or one of them is no number."""
        try:
            return tuple(float(part) for part in self.text(tag).split("\\"))
        except ValueError:
            return ()

    @property
    def num_frames(self) -> int:
        """Frames of the object; 1 where it does not say.

        Raises:
            DicomError: it is no whole number, or one that no file has.
        """
        number = (self.numbers(NUM_FRAMES) or (1.0,))[0]
        if not (number.is_integer() and abs(number) < 1 << 31):  # inf and nan are no integers
            raise DicomError(f"its number of frames is '{self.text(NUM_FRAMES)}'")
        return int(number)

    def first(self, tag: int) -> "Elements":
        """The first item of a sequence; no elements where it is missing."""
        items = self.sequences.get(tag)
        return items[0] if items else Elements({}, {})


@dataclass(frozen=True)
class DicomHeader:
    """What a DICOM file says before its pixels."""

    elements: Elements
    transfer_syntax: str
    pixel_offset: int | None
    """First byte of the pixel data in the file; None in an object without pixels."""
    pixel_bytes: int | None
    """Length of the pixel data; None where they are compressed or missing."""

    @property
    def is_native(self) -> bool:
        """Whether the pixels are not compressed."""
        return self.transfer_syntax in (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG)


def read_header(path: Path) -> DicomHeader | None:
    """The header of a file; None if it is no DICOM file.

    Raises:
        DicomError: the file begins as DICOM, but cannot be followed.
        OSError: the file cannot be read.
    """
    num_bytes = path.stat().st_size
    with open(path, "rb") as stream:
        start = _start(stream.read(132 + 8))
        if start is None:
            return None
        stream.seek(start)
        try:
            return _header(stream, num_bytes)
        except struct.error as error:
            raise DicomError("it ends in the middle of its header") from error


def _start(head: bytes) -> int | None:
    """Where the first element is; None if this is no DICOM file."""
    if head[128:132] == b"DICM":
        return 132
    # Old archives hold bare data sets, which begin with group 8, or 2, and a short first value.
    if len(head) < 8 or struct.unpack_from("<H", head)[0] not in (0x0002, 0x0008):
        return None
    is_explicit = head[4:6].isalpha() and head[4:6].isupper()
    length = struct.unpack_from("<H", head, 6)[0] if is_explicit else struct.unpack_from("<I", head, 4)[0]
    return 0 if length <= 64 else None


def _header(stream: BinaryIO, num_bytes: int) -> DicomHeader | None:
    """The header from the first element on; None of an object without pixels that cannot be followed."""
    reader = _Reader(stream, num_bytes)
    values: dict[int, bytes] = {}
    at = stream.tell()
    has_preamble = at > 0
    while stream.read(2) == b"\x02\0":  # the meta group, always explicit
        stream.seek(at)
        tag, type_, length = reader.element(is_explicit=True)
        reader.check(length)
        values[tag] = stream.read(length)
        at = stream.tell()
    stream.seek(at)
    syntax = values.get(TRANSFER_SYNTAX, b"").decode("latin-1").strip(" \0")
    if not syntax:
        head = stream.read(6)
        stream.seek(at)
        syntax = EXPLICIT_LITTLE if head[4:6].isalpha() and head[4:6].isupper() else IMPLICIT_LITTLE
    if syntax == _DEFLATED:
        raise DicomError("it is deflated")
    reader.order = ">" if syntax == EXPLICIT_BIG else "<"
    media_class = values.get(MEDIA_CLASS, b"").decode("latin-1").strip(" \0")
    try:
        elements, pixel_length = reader.data_set(end=num_bytes, is_explicit=syntax != IMPLICIT_LITTLE)
    except (DicomError, struct.error):
        if not media_class or media_class in _IMAGE_CLASSES:
            raise
        return None  # a report or the like, which somebody may have padded or cut: none of our business
    if pixel_length is None:
        object_class = elements.text(OBJECT_CLASS) or media_class
        if (has_preamble and not object_class) or object_class in _IMAGE_CLASSES:
            raise DicomError("it ends before its pixels")
        return DicomHeader(elements, syntax, None, None)
    offset = stream.tell()
    if pixel_length == _UNDEFINED:
        return DicomHeader(elements, syntax, offset, None)
    if pixel_length > num_bytes - offset:
        raise DicomError("its pixels end early")
    return DicomHeader(elements, syntax, offset, pixel_length)


class _Reader:
    """Walks through the elements of a stream."""

    def __init__(self, stream: BinaryIO, num_bytes: int) -> None:
        self.stream = stream
        self.num_bytes = num_bytes
        self.order = "<"

    def element(self, *, is_explicit: bool) -> tuple[int, bytes, int]:
        """Tag, value representation (b'' where it is implicit) and length of the next element."""
        group, number = struct.unpack(self.order + "HH", self.stream.read(4))
        tag = group << 16 | number
        if not is_explicit or group == 0xFFFE:
            return tag, b"", struct.unpack(self.order + "I", self.stream.read(4))[0]
        type_ = self.stream.read(2)
        if type_ in _LONG_TYPES:
            self.stream.read(2)
            return tag, type_, struct.unpack(self.order + "I", self.stream.read(4))[0]
        return tag, type_, struct.unpack(self.order + "H", self.stream.read(2))[0]

    def check(self, length: int) -> None:
        """Raise DicomError if a value of this length does not fit into the file."""
        if length > self.num_bytes - self.stream.tell():
            raise DicomError("a value is longer than the file")

    def data_set(self, *, end: int, is_explicit: bool, depth: int = 0) -> tuple[Elements, int | None]:
        """Elements up to `end`, the end of the item or the pixel data, whose length comes second (None where there are none)."""
        values: dict[int, bytes] = {}
        sequences: dict[int, list[Elements]] = {}
        elements = Elements(values, sequences, is_big_endian=self.order == ">")
        if depth > _MAX_DEPTH:
            raise DicomError("its sequences are nested too deeply")
        last_tag = -1
        while end - self.stream.tell() >= 8:
            tag, type_, length = self.element(is_explicit=is_explicit)
            if tag == _ITEM_END:
                return elements, None
            if tag < last_tag and depth == 0:
                raise DicomError("its elements are out of order")
            last_tag = tag
            if tag == _PIXEL_DATA and depth == 0:
                return elements, length
            if length == _UNDEFINED:
                # of unknown type: an implicit sequence, whatever the file is
                items = self.items(end=self.num_bytes, is_explicit=is_explicit and type_ != b"UN", depth=depth + 1, is_kept=tag in _SEQUENCES)
                if tag in _SEQUENCES:
                    sequences[tag] = items
                continue
            self.check(length)
            if tag in _SEQUENCES and type_ in (b"SQ", b"UN", b""):
                at = self.stream.tell() + length
                sequences[tag] = self.items(end=at, is_explicit=is_explicit and type_ != b"UN", depth=depth + 1, is_kept=True)
                self.stream.seek(at)
            elif tag in _KEPT and length <= _MAX_VALUE_BYTES:
                values[tag] = self.stream.read(length)
            else:
                self.stream.seek(length, os.SEEK_CUR)
        return elements, None

    def items(self, *, end: int, is_explicit: bool, depth: int, is_kept: bool) -> list[Elements]:
        """The items of a sequence, or of nothing where they are only passed over."""
        found = []
        while end - self.stream.tell() >= 8:
            tag, _, length = self.element(is_explicit=is_explicit)
            if tag == _SEQUENCE_END:
                return found
            if tag != _ITEM:
                raise DicomError("a sequence holds something else than items")
            if length == _UNDEFINED:
                found.append(self.data_set(end=self.num_bytes, is_explicit=is_explicit, depth=depth)[0])
                continue
            self.check(length)
            at = self.stream.tell() + length
            if is_kept:
                found.append(self.data_set(end=at, is_explicit=is_explicit, depth=depth)[0])
            self.stream.seek(at)
        return found
