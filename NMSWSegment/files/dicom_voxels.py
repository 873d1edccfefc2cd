"""The voxels of a DICOM series, every slice with its own rescaling."""

from collections.abc import Callable

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files import dicom_file
from NMSWSegment.files.dicom_series import DicomSeries, DicomSlice
from NMSWSegment.files.output_file import check_name, letters_hint
from NMSWSegment.protocol import UserError


def read_voxels(series: DicomSeries, *, quiet: Callable) -> np.ndarray:
    """Intensities (K, J, I) in the smallest type that holds every slice.

    ITK's own reader of series takes the type of the first slice for all of them, and cuts off what a later slice has behind the point.

    Args:
        quiet: context manager that keeps the reader's own messages from the terminal.

    Raises:
        UserError: a file is damaged, is packed in a way that cannot be read, or has a name that the reader cannot be given.
    """
    voxels: np.ndarray | None = None
    frames: dict = {}
    for k, found in enumerate(series.slices):
        if not found.is_enhanced:
            values = _read(found, quiet=quiet)
        else:
            if found.path not in frames:
                frames[found.path] = _frames(series, found, quiet=quiet)
            values = frames[found.path][found.frame]
            if found.header.is_native:
                values = _rescaled(values, found.rescale)
        if values.shape != found.size:
            raise _damaged(found)
        if values.dtype == np.int32 and _fits(values, np.int16):
            values = values.astype(np.int16)  # GDCM gives four bytes where stored values and rescaling could need them
        if voxels is None:
            voxels = np.empty(series.shape, dtype=values.dtype)
        elif not np.can_cast(values.dtype, voxels.dtype):
            voxels = voxels.astype(np.result_type(values.dtype, voxels.dtype))
        voxels[k] = values
    return voxels


def _frames(series: DicomSeries, found: DicomSlice, *, quiet: Callable) -> np.ndarray:
    """All frames of a file, (frames, rows, columns): stored values if they are not compressed, else intensities."""
    if found.header.is_native:
        return _stored(found)
    if len({other.rescale for other in series.slices if other.path == found.path}) > 1:
        raise UserError(f"The frames of '{found.path}' are compressed, and each has a rescaling of its own. Export the series again, uncompressed.")
    frames = _read(found, quiet=quiet)
    return frames[None] if frames.ndim == 2 else frames


def _read(found: DicomSlice, *, quiet: Callable) -> np.ndarray:
    """The intensities of a file as GDCM reads them, (rows, columns), or with the frames in front."""
    check_name(found.path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(found.path))
    try:
        with quiet():
            image = reader.Execute()
    except RuntimeError as error:
        raise UserError(f"{_damaged(found)}{letters_hint(found.path)}") from error
    array = sitk.GetArrayFromImage(image)
    return array[0] if len(array) == 1 else array


def _stored(found: DicomSlice) -> np.ndarray:
    """The stored integers of all frames of a file, (frames, rows, columns)."""
    elements = found.header.elements
    allocated, is_signed = elements.integer(dicom_file.BITS_ALLOCATED), elements.integer(dicom_file.IS_SIGNED) == 1
    stored = elements.integer(dicom_file.BITS_STORED) or allocated
    if allocated not in (8, 16, 32) or not 0 < stored <= allocated:
        raise _damaged(found)
    order = ">" if elements.is_big_endian else "<"
    count = elements.num_frames * found.size[0] * found.size[1]
    try:
        with open(found.path, "rb") as stream:
            stream.seek(found.header.pixel_offset)
            values = np.fromfile(stream, dtype=f"{order}{'i' if is_signed else 'u'}{allocated // 8}", count=count)
    except OSError as error:  # it was there a moment ago
        raise _damaged(found) from error
    if len(values) < count:
        raise _damaged(found)
    values = values.astype(values.dtype.newbyteorder("="))
    if stored < allocated:  # bits above the stored ones may hold anything
        values = values << (allocated - stored) >> (allocated - stored)
    return values.reshape(-1, *found.size)


def _rescaled(stored: np.ndarray, rescale: tuple[float, float]) -> np.ndarray:
    """Stored values x slope + intercept, as integers where all of them are whole."""
    slope, intercept = rescale
    if slope.is_integer() and intercept.is_integer():
        values = stored.astype(np.int64) * int(slope) + int(intercept)
        return values.astype(next((dtype for dtype in (np.int16, np.int32) if _fits(values, dtype)), np.float64))
    return (stored * slope + intercept).astype(np.float32)


def _fits(values: np.ndarray, dtype: type) -> bool:
    """Whether integers stay the same in a dtype."""
    limits = np.iinfo(dtype)
    return limits.min <= values.min() and values.max() <= limits.max


def _damaged(found: DicomSlice) -> UserError:
    """The sentence for a slice that cannot be read."""
    return UserError(
        f"The DICOM file '{found.path}' cannot be read: it is damaged, or compressed in a way that is not known. Export the series again, uncompressed."
    )
