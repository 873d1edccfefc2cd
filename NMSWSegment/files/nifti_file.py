"""What ITK does not tell about a NIfTI file: that it breaks off, which voxels are no number, and that its header contradicts itself.

ITK reads a truncated file without a word and leaves arbitrary voxels at its end; NaN and infinite voxels it turns into 0. Of the three
places that a header may give (pixdim, qform, sform) it chooses one without a word, too.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from NMSWSegment.files.volume_checks import RESAMPLE_HINT, SHEAR_TOLERANCE, damaged_error, times
from NMSWSegment.protocol import UserError

_BLOCK_BYTES = 1 << 22
_HEADER_BYTES = 348
_FIRST_VOXEL_BYTE = 352
"""Of a file without extensions; ITK reads from byte 348 where the header says less, nothing included."""
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
"""Datatype codes that numpy reads as one number."""
_SPACING_TOLERANCE = 0.01
_PLACE_TOLERANCE_VOXELS = 0.5
_GZIP_RATIO = 1100
"""No gzip stream holds more bytes for each of its own."""

_SAVE_AGAIN = "Load it in 3D Slicer, look whether it lies right, and save it again."


@dataclass(frozen=True)
class NiftiHeader:
    """The fields of a NIfTI-1 header that say where the voxels are, in the file and in the patient."""

    shape_ijk: tuple[int, ...]
    dtype: np.dtype | None
    """Of the voxels in the file; None where numpy has none."""
    first_byte: int
    spacing_ijk_mm: tuple[float, ...]
    """pixdim of the first three axes."""
    qform: np.ndarray | None
    """4 x 4, ijk to RAS; None where its code is 0."""
    sform: np.ndarray | None
    """4 x 4, ijk to RAS; None where its code is 0."""
    scaling: tuple[float, float]
    """Slope and intercept."""

    @property
    def num_bytes(self) -> int | None:
        """Of all voxels."""
        return None if self.dtype is None else math.prod(self.shape_ijk) * self.dtype.itemsize


def read_header(path: Path) -> NiftiHeader:
    """The checked header of a NIfTI file.

    Raises:
        UserError: it is damaged, contradicts itself, or is of a kind that is not read.
    """
    try:
        with _opened(path) as stream:
            data = stream.read(_HEADER_BYTES)
    except (EOFError, zlib.error, OSError) as error:  # gzip's own errors are OSErrors
        raise damaged_error(path) from error
    header = _parsed(data, path)
    _check_geometry(header, path)
    _check_length(header, path)
    return header


def nonfinite_voxels(path: Path, header: NiftiHeader) -> int | None:
    """How many voxels are NaN or infinite; None if the file is incomplete or its compression is damaged.

    Raises:
        UserError: something else follows the compressed voxels.
    """
    num_bytes = num_bad = 0
    is_float = header.dtype is not None and header.dtype.kind == "f"
    try:
        with _opened(path) as stream:
            stream.seek(header.first_byte)
            # To the end, although it costs a second decompression: only there gzip keeps its checksum.
            while block := stream.read(_BLOCK_BYTES):
                num_bytes += len(block)
                if is_float:
                    values = np.frombuffer(block, dtype=header.dtype, count=len(block) // header.dtype.itemsize)
                    num_bad += int(np.count_nonzero(~np.isfinite(values)))
    except (EOFError, OSError, zlib.error) as error:
        if "Not a gzipped file" in str(error):  # of what follows: the beginning was read with the header
            raise UserError(f"'{path.name}' goes on behind its compressed voxels with something that is not gzip. Copy or export it again.") from error
        return None
    return num_bad if num_bytes >= (header.num_bytes or 0) else None


def holds_voxels(path: Path, array: np.ndarray) -> bool:
    """Whether a file that was just written holds the bytes of a contiguous array and ends well; ITK's reader would guess at a cut one."""
    expected = memoryview(array).cast("B")
    at = 0
    try:
        header = read_header(path)
        with _opened(path) as stream:
            stream.seek(header.first_byte)
            while block := stream.read(_BLOCK_BYTES):
                if block != expected[at : at + len(block)]:
                    return False
                at += len(block)
    except (UserError, EOFError, OSError, zlib.error):
        return False
    return at == len(expected)


def _opened(path: Path) -> BinaryIO:
    """The uncompressed bytes of a file."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _parsed(data: bytes, path: Path) -> NiftiHeader:
    """The fields of 348 bytes.

    Source: nifti1.h of the NIfTI standard.
    """
    if len(data) < _HEADER_BYTES:
        raise damaged_error(path)
    sizes = {order: struct.unpack_from(order + "i", data)[0] for order in "<>"}
    if 540 in sizes.values():
        raise UserError(f"'{path.name}' is NIfTI-2, which cannot be read here. Save it as NIfTI-1 (.nii.gz) or NRRD, for example in 3D Slicer.")
    order = next((order for order, size in sizes.items() if size == 348), None)
    if order is None or data[344:347] != b"n+1":
        raise damaged_error(path)

    def field(code: str, at: int) -> tuple:
        return struct.unpack_from(order + code, data, at)

    dim, (datatype,), pixdim, (offset, slope, intercept) = field("8h", 40), field("h", 70), field("8f", 76), field("3f", 108)
    (qform_code, sform_code), quatern, rows = field("2h", 252), field("6f", 256), field("12f", 280)
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1 or not 0 <= offset < 1 << 40:
        raise damaged_error(path)
    if offset < _FIRST_VOXEL_BYTE:
        raise UserError(
            f"The voxels of '{path.name}' begin at byte {offset:g} (vox_offset), which is within its header of {_FIRST_VOXEL_BYTE} bytes. Convert it again from the original."
        )
    sform = np.vstack([np.array(rows).reshape(3, 4), [0, 0, 0, 1]]) if sform_code > 0 else None
    return NiftiHeader(
        shape_ijk=dim[1 : dim[0] + 1],
        dtype=np.dtype(order + _DTYPES[datatype]) if datatype in _DTYPES else None,
        first_byte=int(offset),
        spacing_ijk_mm=pixdim[1:4],
        qform=_qform(quatern, pixdim) if qform_code > 0 else None,
        sform=sform,
        scaling=(slope, intercept),
    )


def _qform(quatern: tuple[float, ...], pixdim: tuple[float, ...]) -> np.ndarray:
    """4 x 4 of a quaternion (b, c, d), an offset and the voxel sizes."""
    b, c, d = quatern[:3]
    a = math.sqrt(max(0.0, 1.0 - b * b - c * c - d * d))
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    matrix[:3, :3] *= np.array([pixdim[1], pixdim[2], pixdim[3] * (-1.0 if pixdim[0] < 0 else 1.0)])
    matrix[:3, 3] = quatern[3:]
    return matrix


def _check_geometry(header: NiftiHeader, path: Path) -> None:
    """Raise UserError unless the header gives one place for the voxels."""
    spacing = np.array(header.spacing_ijk_mm)
    if len(header.shape_ijk) < 3:
        return  # refused as one slice
    if not all(math.isfinite(value) for value in header.scaling):
        raise UserError(f"The intensities of '{path.name}' are scaled by {header.scaling[0]:g} and {header.scaling[1]:g}. {_SAVE_AGAIN}")
    slope, intercept = header.scaling
    if slope == 0 and intercept != 0:  # not scaled, says the standard; ITK adds the intercept
        raise UserError(
            f"It is not clear whether the intensities of '{path.name}' are to be scaled: scl_slope is 0 but scl_inter {intercept:g}. "
            "Convert it again from the original, or set scl_slope to 1 if the intercept is to be added, and scl_inter to 0 if not."
        )
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise UserError(f"The voxels of '{path.name}' have the size {_shown(spacing)} mm (pixdim). {_SAVE_AGAIN}")
    for name, matrix in (("qform", header.qform), ("sform", header.sform)):
        if matrix is not None and not np.isfinite(matrix).all():
            raise UserError(f"The place of '{path.name}' in space is no number ({name}, offset {_shown(matrix[:3, 3])} mm). {_SAVE_AGAIN}")
    if header.sform is None:
        return
    lengths = np.linalg.norm(header.sform[:3, :3], axis=0)
    axes = header.sform[:3, :3] / np.maximum(lengths, 1e-30)
    if not np.abs(axes.T @ axes - np.eye(3)).max() < SHEAR_TOLERANCE:
        raise UserError(f"The voxel axes of '{path.name}' are not at right angles to each other (sform). {RESAMPLE_HINT}")
    if not np.allclose(lengths, spacing, rtol=_SPACING_TOLERANCE, atol=0):
        raise UserError(f"'{path.name}' gives two voxel sizes: {_shown(spacing)} mm (pixdim) and {_shown(lengths)} mm (sform). {_SAVE_AGAIN}")
    if header.qform is not None and (apart_mm := _apart_mm(header)) > _PLACE_TOLERANCE_VOXELS * lengths.min():
        raise UserError(
            f"'{path.name}' gives two places for its voxels (qform and sform), up to {apart_mm:.3g} mm apart: the first voxel is at "
            f"{_shown(header.qform[:3, 3])} mm or at {_shown(header.sform[:3, 3])} mm. {_SAVE_AGAIN}"
        )


def _apart_mm(header: NiftiHeader) -> float:
    """How far qform and sform take a corner of the volume apart."""
    ends = np.array(header.shape_ijk[:3]) - 1
    corners = np.array([[i, j, k, 1] for i in (0, ends[0]) for j in (0, ends[1]) for k in (0, ends[2])]).T
    return float(np.linalg.norm(((header.qform - header.sform) @ corners)[:3], axis=0).max())


def _check_length(header: NiftiHeader, path: Path) -> None:
    """Raise UserError if the file cannot hold as many voxels as it says, before memory is taken for them."""
    on_disk = path.stat().st_size
    most = on_disk * _GZIP_RATIO if path.name.lower().endswith(".gz") else on_disk - header.first_byte
    if header.num_bytes is not None and header.num_bytes > most:
        raise UserError(f"'{path.name}' is damaged or incomplete: its voxels end early. Copy or export it again.")


def _shown(values) -> str:
    """'0.7 x 0.9 x 2.5' for a sentence."""
    return times(f"{value:g}" for value in values)
