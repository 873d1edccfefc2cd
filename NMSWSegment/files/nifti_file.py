"""What ITK does not report about a NIfTI file: that it breaks off, and which voxels are no number.

ITK reads a truncated file without a word and leaves arbitrary voxels at its end; NaN and infinite voxels it turns into 0.
"""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_BLOCK_BYTES = 1 << 22
_HEADER_BYTES = 540
"""Of NIfTI-2; the 348 of NIfTI-1 lie within, because its voxels start at 352 and are never so few."""


@dataclass(frozen=True)
class NiftiHeader:
    """The few fields of a NIfTI-1 or NIfTI-2 header that say where the voxels are."""

    dtype: np.dtype | None
    """Type of the voxels if it is a floating-point one that numpy reads, else None."""
    first_byte: int
    num_bytes: int
    """Of all voxels."""


def nonfinite_voxels(path: Path) -> int | None:
    """How many voxels are NaN or infinite; None if the file is incomplete or its compression is damaged.

    Args:
        path: a NIfTI file with header and voxels in one, gzip-compressed if it ends in `.gz`.
    """
    opened = gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")
    try:
        with opened as stream:
            header = _parsed(stream.read(_HEADER_BYTES))
            stream.seek(header.first_byte)
            num_bytes = num_bad = 0
            # To the end, although it costs a second decompression: only there gzip keeps its checksum.
            while block := stream.read(_BLOCK_BYTES):
                num_bytes += len(block)
                if header.dtype is not None:
                    values = np.frombuffer(block, dtype=header.dtype, count=len(block) // header.dtype.itemsize)
                    num_bad += int(np.count_nonzero(~np.isfinite(values)))
    except (EOFError, OSError, zlib.error, struct.error):
        return None
    return num_bad if num_bytes >= header.num_bytes else None


def _parsed(data: bytes) -> NiftiHeader:
    """Read dim, datatype, bitpix and vox_offset.

    Source: nifti1.h and nifti2.h of the NIfTI standard.
    """
    order = "<" if struct.unpack_from("<i", data)[0] in (348, 540) else ">"
    if struct.unpack_from(order + "i", data)[0] == 348:
        dim, (datatype, bitpix), (offset,) = (struct.unpack_from(order + code, data, at) for code, at in (("8h", 40), ("2h", 70), ("f", 108)))
    else:
        dim, (datatype, bitpix), (offset,) = (struct.unpack_from(order + code, data, at) for code, at in (("8q", 16), ("2h", 12), ("q", 168)))
    # dim[0] counts the axes, their lengths follow; datatype 16 is float32, 64 is float64.
    num_bytes = math.prod(dim[1 : dim[0] + 1]) * bitpix // 8
    dtype = np.dtype(f"{order}f{bitpix // 8}") if datatype in (16, 64) else None
    return NiftiHeader(dtype=dtype, first_byte=int(offset), num_bytes=num_bytes)
