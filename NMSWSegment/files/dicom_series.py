"""The one image series of a DICOM folder, its slices in order and checked for gaps, uneven spacing and tilt.

Positions are in the coordinates of the files; only distances between them are used, so the frame does not matter here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from NMSWSegment.protocol import UserError

# Objects that may have pixels and a position, but are results or documents about a series.
_DERIVED_MODALITIES = ("SEG", "RTDOSE", "RTSTRUCT", "RTIMAGE", "SR", "PR", "KO", "DOC")

# A gap that differs by more than this share of the usual one is no rounding of the scanner: those stay near 1 %.
_GAP_TOLERANCE = 0.1

# Sideways movement from the first to the last slice that cannot be seen at the spacing of a CT.
_DRIFT_MM = 0.5


@dataclass(frozen=True)
class DicomSlice:
    """One image file."""

    path: Path
    series_uid: str
    description: str
    size: tuple[int, ...]
    """Pixels along columns and rows, and frames."""
    axes: np.ndarray
    """Directions along a row and down a column, (2, 3)."""
    position_mm: np.ndarray
    """Center of the first pixel, (3,)."""
    is_localizer: bool

    @property
    def num_frames(self) -> int:
        """Slices in this file; more than 1 in an enhanced (multi-frame) object."""
        return int(self.size[2]) if len(self.size) > 2 else 1


@dataclass(frozen=True)
class SeriesInfo:
    """One image series of a folder, for a person to choose from."""

    uid: str
    """Series Instance UID."""
    description: str
    num_slices: int


def list_series(folder: Path, *, quiet: Callable) -> list[SeriesInfo]:
    """The image series of a folder in the order of their UIDs; scouts and single slices are left out where there is anything else.

    Raises:
        UserError: there is none.
    """
    volumes = _volumes(folder, quiet=quiet)
    return sorted((SeriesInfo(files[0].series_uid, files[0].description, _num_slices(files)) for files in volumes), key=lambda info: info.uid)


def find_series(folder: Path, *, quiet: Callable, series_uid: str | None = None) -> list[Path]:
    """Files of an image series in a folder, along the direction that rows x columns gives.

    Args:
        folder: searched without its sub-folders; files that are no DICOM images are passed over.
        quiet: context manager that keeps the reader's own messages from the terminal.
        series_uid: Series Instance UID; None takes the only series.

    Raises:
        UserError: there is no such series, or several to choose from, or its slices do not make a regular volume.
    """
    volumes = _volumes(folder, quiet=quiet)
    if series_uid is not None:
        chosen = [files for files in volumes if files[0].series_uid == series_uid]
        if not chosen:
            raise UserError(f"The folder '{folder}' has no image series with the UID '{series_uid}'. It has: {_listing(volumes)}.")
        return _ordered(chosen[0])
    if len(volumes) > 1:
        raise UserError(f"The folder '{folder}' has {len(volumes)} image series: {_listing(volumes)}. Choose one with --series UID.")
    return _ordered(volumes[0])


def _volumes(folder: Path, *, quiet: Callable) -> list[list[DicomSlice]]:
    """Slices of every image series in a folder."""
    with quiet():
        slices = [found for path in sorted(folder.iterdir()) if path.is_file() and (found := _read_slice(path))]
    series = {}
    for found in slices:
        series.setdefault(found.series_uid, []).append(found)
    # Scouts come with nearly every study; only a folder with nothing else keeps them.
    volumes = [files for files in series.values() if _num_slices(files) > 1 and not files[0].is_localizer]
    if not volumes:
        _raise_no_series(folder, list(series.values()))
    return volumes


def _read_slice(path: Path) -> DicomSlice | None:
    """What the header of a file says, or None if it is no DICOM image with a place in the patient."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if _has_pixels(path):
            raise UserError(f"The DICOM file '{path}' is damaged or compressed in a way that cannot be read. Export the series again, uncompressed.") from error
        return None
    tags = {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
    if tags.get("0008|0060") in _DERIVED_MODALITIES or not (tags.get("0020|0032") or reader.GetSize()[2] > 1):
        return None
    return DicomSlice(
        path=path,
        series_uid=tags.get("0020|000e", ""),
        description=tags.get("0008|103e", "without description"),
        size=reader.GetSize(),
        # SimpleITK gives the direction as a 3 x 3 matrix with the axes in its columns.
        axes=np.array(reader.GetDirection()).reshape(3, 3)[:, :2].T,
        position_mm=np.array(reader.GetOrigin()),
        is_localizer="LOCALIZER" in tags.get("0008|0008", ""),
    )


def _has_pixels(path: Path) -> bool:
    """Whether an unreadable file is a DICOM file with pixel data (7FE0,0010): an image that was meant to be read."""
    data = path.read_bytes()
    return data[128:132] == b"DICM" and b"\xe0\x7f\x10\x00" in data


def _num_slices(files: list[DicomSlice]) -> int:
    """Slices of a series over all its files."""
    return sum(found.num_frames for found in files)


def _listing(volumes: list[list[DicomSlice]], *, with_uid: bool = True) -> str:
    """Series for a sentence: 'Thorax 1.0' (310 slices, UID 1.2.3), 'Liver 3.0' (90 slices, UID 1.2.4)."""
    return ", ".join(f"'{files[0].description}' ({_num_slices(files)} slices{f', UID {files[0].series_uid}' if with_uid else ''})" for files in volumes)


def _raise_no_series(folder: Path, series: list[list[DicomSlice]]) -> None:
    """Say why there is nothing to read, and where there might be."""
    if series:
        raise UserError(f"The folder '{folder}' has single slices or localizers only: {_listing(series, with_uid=False)}. Give the folder of a whole series.")
    sub_folders = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    hint = f" Its sub-folders are not searched: {', '.join(sub_folders[:5])}." if sub_folders else ""
    raise UserError(
        f"The folder '{folder}' has no DICOM images.{hint} Give the folder that holds the slices of one series, or a NIfTI, NRRD or MetaImage file."
    )


def _ordered(files: list[DicomSlice]) -> list[Path]:
    """Files by position along the normal of the slices, after all checks."""
    if len(files) == 1:
        return [files[0].path]
    first = files[0]
    if any(found.size != first.size or not np.allclose(found.axes, first.axes, atol=1e-3) for found in files):
        raise UserError(f"The slices of series '{first.description}' differ in size or direction, so they are no volume. Export only the slices of one stack.")
    normal = np.cross(*first.axes)
    files = sorted(files, key=lambda found: float(found.position_mm @ normal))
    positions = np.stack([found.position_mm for found in files])  # (slices, 3)
    _check_gaps(positions @ normal, first.description)
    path_mm = positions[-1] - positions[0]
    drift_mm = float(np.linalg.norm(path_mm - (path_mm @ normal) * normal))
    if drift_mm > _DRIFT_MM:
        raise UserError(
            f"The slices of series '{first.description}' are shifted sideways by {drift_mm:.1f} mm from first to last (gantry tilt). "
            "Load it in 3D Slicer, whose DICOM module corrects the tilt, and save the volume as NRRD."
        )
    return [found.path for found in files]


def _check_gaps(distances_mm: np.ndarray, description: str) -> None:
    """Raise UserError unless the slices, sorted by distance along their normal, are evenly spaced."""
    gaps = np.diff(distances_mm)
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        num_repeated = int((gaps < 1e-3).sum())
        raise UserError(
            f"Series '{description}' has {num_repeated} slices at places where it already has one (phases or copies). Export one phase, each slice once."
        )
    if np.abs(gaps - usual).max() <= _GAP_TOLERANCE * usual:
        return
    widest = int(gaps.argmax())
    if gaps[widest] > 1.5 * usual:
        num_missing = int(np.maximum(np.rint(gaps / usual) - 1, 0).sum())
        raise UserError(
            f"Series '{description}' misses about {num_missing} of its slices: after slice {widest + 1} of {len(gaps) + 1} comes a gap of "
            f"{gaps[widest]:.2f} mm instead of {usual:.2f} mm. Export the series again, completely."
        )
    raise UserError(
        f"The slices of series '{description}' are unevenly spaced: {gaps.min():.2f} to {gaps.max():.2f} mm. Export a series with even spacing, "
        "or load it in 3D Slicer, whose DICOM module resamples it, and save the volume as NRRD."
    )
