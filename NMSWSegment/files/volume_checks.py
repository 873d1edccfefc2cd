"""What makes a file no volume that can be segmented, told in sentences; looked at before voxels are read."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files.memory import available_memory_bytes
from NMSWSegment.protocol import UserError

SHEAR_TOLERANCE = 1e-3
"""Cosine between two voxel axes; 0.001 moves the far end of a 500 mm axis by half a millimeter."""

_SPACING_RANGE_MM = (1e-4, 100.0)
"""Nothing that a patient is shown with has larger voxels; the model grid of a few such voxels would fill the memory."""
_FARTHEST_MM = 1e6
"""From the origin; what lies beyond is damage, and would be rounded in float32."""

RESAMPLE_HINT = "Resample it to a regular grid first, for example with 'Resample Scalar/Vector/DWI Volume' in 3D Slicer."


def check_readable(path: Path) -> None:
    """Raise UserError unless the file may be read and has something in it."""
    try:
        with open(path, "rb") as stream:
            if not stream.read(1):
                raise UserError(f"'{path.name}' is empty. Copy or export it again.")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}). Ask for the permission to read it, or copy it.") from error


def check_header(reader: sitk.ImageFileReader, path: Path) -> None:
    """Raise UserError unless the header that a reader has looked at describes one 3-D scalar volume."""
    size = reader.GetSize()
    if reader.GetNumberOfComponents() != 1:
        raise UserError(
            f"'{path.name}' has {reader.GetNumberOfComponents()} values per voxel (color or vector), but one is needed. "
            "Extract one component with 'Vector to Scalar Volume' in 3D Slicer."
        )
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise UserError(f"'{path.name}' has complex voxels. Save their magnitude as a volume.")
    if any(length > 1 for length in size[3:]):
        raise UserError(
            f"'{path.name}' is {len(size)}-D (size {times(size)}): a sequence of volumes. Save one 3-D volume of it, for example one phase or time point."
        )
    if len(size) < 3 or min(size[:3]) == 1:
        raise UserError(f"'{path.name}' is one slice (size {times(size)}). Give the whole volume, with at least 2 voxels along each axis.")


def check_geometry(ijk_to_ras: np.ndarray, path: Path) -> None:
    """Raise UserError unless the voxels lie on a grid with right angles, at a place and of a size that a scanner gives."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(ijk_to_ras[:3, :3], axis=0)
        axes = ijk_to_ras[:3, :3] / lengths
        shear = np.abs(axes.T @ axes - np.eye(3)).max()
    low, high = _SPACING_RANGE_MM
    if np.isfinite(lengths).all() and not (low <= lengths.min() and lengths.max() <= high):
        raise UserError(
            f"The voxels of '{path.name}' are {times(f'{length:.3g}' for length in lengths)} mm large; {low:g} to {high:g} mm are expected. "
            "Correct the spacing, for example in 3D Slicer."
        )
    if not np.abs(ijk_to_ras[:3, 3]).max() <= _FARTHEST_MM:  # "not <=" catches NaN
        place = ", ".join(f"{value:.3g}" for value in ijk_to_ras[:3, 3])
        raise UserError(f"The first voxel of '{path.name}' lies at ({place}) mm. Correct the origin, for example with 'Center volume' in 3D Slicer.")
    if not shear < SHEAR_TOLERANCE:
        raise UserError(f"The voxel axes of '{path.name}' are not at right angles to each other. {RESAMPLE_HINT}")


def check_memory(shape: Sequence[int], path: Path, *, bytes_per_voxel: int) -> None:
    """Raise UserError if the voxels alone (shape KJI) are more than the memory holds."""
    num_bytes, available_bytes = int(np.prod(shape, dtype=float)) * bytes_per_voxel, available_memory_bytes()
    if available_bytes is not None and num_bytes > available_bytes:
        raise UserError(
            f"'{path.name}' has {times(shape[::-1])} voxels, which are {num_bytes / 1e9:.1f} GB; {available_bytes / 1e9:.1f} GB of memory are free. "
            "Crop the volume, or close other programs."
        )


def signature(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written again or replaced; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def changed_error(path: Path) -> UserError:
    """The sentence for a file that was written by somebody else at the same time."""
    return UserError(f"'{path.name}' was changed while it was read. Wait until it is complete, and start again.")


def damaged_error(path: Path) -> UserError:
    """The sentence for a file that the reader refuses."""
    return UserError(f"'{path.name}' cannot be read: it is damaged, incomplete or not of the format its ending says. Copy or export it again.")


def check_numbers(array: np.ndarray, name: str) -> None:
    """Raise UserError for NaN and infinite voxels."""
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise nonfinite_error(name, int((~np.isfinite(array)).sum()))


def nonfinite_error(name: str, num_bad: int) -> UserError:
    """The sentence for NaN and infinite voxels."""
    return UserError(f"'{name}' has {num_bad} voxels that are no number (NaN or infinite). Replace them, for example by -1024 (air), and start again.")


def times(size: Iterable[int | str]) -> str:
    """'512 x 512 x 90' for a sentence."""
    return " x ".join(str(length) for length in size)
