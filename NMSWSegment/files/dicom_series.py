"""The one image series of a DICOM folder, its slices in order and checked for gaps, uneven spacing, sideways shifts and tilt.

A slice is one file, or one frame of an enhanced (multi-frame) object. Positions are in the coordinates of the files (LPS).
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from NMSWSegment.files import dicom_file
from NMSWSegment.files.dicom_file import DicomError, DicomHeader, Elements
from NMSWSegment.protocol import UserError

# Objects that may have pixels and a position, but are results or documents about a series.
_DERIVED_MODALITIES = ("SEG", "RTDOSE", "RTSTRUCT", "RTIMAGE", "SR", "PR", "KO", "DOC")

# A gap that differs by more than this share of the usual one is no rounding of the scanner: those stay near 1 %.
_GAP_TOLERANCE = 0.1

# Of the spacing: how far a slice may lie from its place at an even spacing, where every gap by itself is within the tolerance.
_PLACE_TOLERANCE = 0.5

# Sideways movement of slices that cannot be seen at the spacing of a CT.
_DRIFT_MM = 0.5

# Every frame of compressed pixels begins with a tag and a length.
_LEAST_FRAME_BYTES = 8

# Cosines of the two axes of a slice, and how much their length may differ from 1.
_AXES_TOLERANCE = 1e-3

_EXPORT_AGAIN = "Export the series again, completely and uncompressed."
_EVEN_SPACING = "Export a series with even spacing, or load it in 3D Slicer, whose DICOM module resamples it, and save the volume as NRRD."


@dataclass(frozen=True)
class DicomSlice:
    """One file, or one frame of a file."""

    path: Path
    frame: int
    """Of the file, from 0."""
    header: DicomHeader
    size: tuple[int, int]
    """Rows and columns."""
    axes: np.ndarray | None
    """Directions along a row and down a column, (2, 3); None where the file has none."""
    position_mm: np.ndarray | None
    """Center of the first pixel, (3,); None where the file has none."""
    spacing_mm: tuple[float, float] | None
    """Between rows and between columns; None where the file has none."""
    rescale: tuple[float, float]
    """Slope and intercept from stored values to intensities."""

    @property
    def is_enhanced(self) -> bool:
        """Whether places and rescaling are in sequences, one item a frame."""
        return bool(self.header.elements.sequences)

    @property
    def is_localizer(self) -> bool:
        """Whether it is a scout."""
        return "LOCALIZER" in self.header.elements.text(dicom_file.IMAGE_TYPE)

    @property
    def series_key(self) -> tuple:
        """What slices of one volume have in common. UIDs may be empty after a poor anonymization, so that there is more than those."""
        tags = (dicom_file.PATIENT_ID, dicom_file.PATIENT_NAME, dicom_file.STUDY_UID, dicom_file.SERIES_UID, dicom_file.SERIES_DESCRIPTION)
        return (*(self.header.elements.text(tag) for tag in tags), self.is_localizer)


@dataclass(frozen=True)
class DicomSeries:
    """The slices of a volume along rows x columns."""

    slices: tuple[DicomSlice, ...]
    spacing_k_mm: float
    """Between slices."""

    @property
    def paths(self) -> list[Path]:
        """Files in the order of the planes k, each once."""
        return list(dict.fromkeys(found.path for found in self.slices))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels, KJI."""
        return len(self.slices), *self.slices[0].size

    @property
    def ijk_to_lps(self) -> np.ndarray:
        """4 x 4."""
        first = self.slices[0]
        row_mm, column_mm = first.spacing_mm
        along_row, down_column = (axis / np.linalg.norm(axis) for axis in first.axes)
        matrix = np.eye(4)
        matrix[:3, 0], matrix[:3, 1] = along_row * column_mm, down_column * row_mm
        matrix[:3, 2] = np.cross(along_row, down_column) * self.spacing_k_mm
        matrix[:3, 3] = first.position_mm
        return matrix

    @property
    def modality(self) -> str:
        """CT, MR, PT, ...; '' where the files do not say."""
        return self.slices[0].header.elements.text(dicom_file.MODALITY)

    @property
    def bytes_per_voxel(self) -> int:
        """Of the stored values; what they are rescaled to may take more."""
        return (self.slices[0].header.elements.integer(dicom_file.BITS_ALLOCATED) or 16) // 8 or 1


@dataclass(frozen=True)
class SeriesInfo:
    """One image series of a folder, for a person to choose from."""

    uid: str
    """Series Instance UID."""
    description: str
    num_slices: int


def list_series(folder: Path) -> list[SeriesInfo]:
    """The image series of a folder in the order of their UIDs; scouts and single slices are left out where there is anything else.

    Raises:
        UserError: there is none, or a file cannot be read.
    """
    return sorted((SeriesInfo(_uid(slices), _description(slices), len(slices)) for slices in _volumes(folder)), key=lambda info: info.uid)


def find_series(folder: Path, *, series_uid: str | None = None) -> DicomSeries:
    """An image series in a folder, without its voxels.

    Args:
        folder: searched without its sub-folders; hidden files and those that are no DICOM images are passed over.
        series_uid: Series Instance UID; None takes the only series.

    Raises:
        UserError: there is no such series, or several to choose from, its slices do not make a regular volume, or a file cannot be read.
    """
    volumes = _volumes(folder)
    if series_uid is not None:
        chosen = [slices for slices in volumes if _uid(slices) == series_uid]
        if not chosen:
            raise UserError(f"The folder '{folder}' has no image series with the UID '{series_uid}'. It has: {_listing(volumes)}.")
        volumes = chosen
    if len(volumes) > 1:
        has_own_uids = len({_uid(slices) for slices in volumes}) == len(volumes)
        advice = "Choose one with --series UID." if has_own_uids else "Put each into a folder of its own, or export again what belongs together."
        raise UserError(f"The folder '{folder}' has {len(volumes)} image series: {_listing(volumes)}. {advice}")
    return _ordered(volumes[0])


def _volumes(folder: Path) -> list[list[DicomSlice]]:
    """Slices of every image series in a folder.

    Raises:
        UserError: there is none, or a file cannot be read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    except OSError as error:
        raise UserError(f"The folder '{folder}' cannot be read ({error.strerror}). Ask for the permission to read it, or copy it.") from error
    series: dict[tuple, list[DicomSlice]] = {}
    for path in paths:
        for found in _read_slices(path):
            series.setdefault(found.series_key, []).append(found)
    # Scouts come with nearly every study; only a folder with nothing else keeps them.
    images = [slices for slices in series.values() if not slices[0].is_localizer]
    volumes = [slices for slices in images if len(slices) > 1]
    volumes += [slices for slices in images if len(slices) == 1 and any(_is_of_stack(slices[0], others) for others in volumes)]
    placed = [slices for slices in volumes if any(found.position_mm is not None for found in slices)]
    if volumes and not placed:
        raise UserError(
            f"The images of series {_listing(volumes, with_uid=False)} do not say where they lie (no Image Position), so their order and spacing are unknown. "
            "Export the original series, or load it in 3D Slicer and save the volume as NRRD."
        )
    if not placed:
        _raise_no_series(folder, list(series.values()))
    return placed


def _is_of_stack(found: DicomSlice, others: list[DicomSlice]) -> bool:
    """Whether a single slice has the series UID, size and direction of others, so that only a text such as the description sets it apart."""
    first = others[0]
    if not _uid([found]) or _uid([found]) != _uid(others) or found.position_mm is None or found.axes is None or first.axes is None:
        return False
    return found.size == first.size and np.allclose(found.axes, first.axes, atol=_AXES_TOLERANCE)


def _read_slices(path: Path) -> list[DicomSlice]:
    """The slices of a file; none if it is no DICOM image of a patient."""
    try:
        header = dicom_file.read_header(path)
        if header is None or header.elements.text(dicom_file.MODALITY) in _DERIVED_MODALITIES:
            return []
        return _slices(path, header)
    except DicomError as error:
        raise UserError(f"The DICOM file '{path}' is damaged or compressed in a way that cannot be read ({error}). {_EXPORT_AGAIN}") from error
    except OSError as error:
        raise UserError(f"The file '{path}' cannot be read ({error.strerror}). Ask for the permission to read it, or take it out of the folder.") from error


def _slices(path: Path, header: DicomHeader) -> list[DicomSlice]:
    """The slices of a DICOM object; none if it is no image."""
    elements = header.elements
    rows, columns = elements.integer(dicom_file.ROWS), elements.integer(dicom_file.COLUMNS)
    if header.pixel_offset is None:
        if rows or columns:
            raise DicomError("its pixels are missing")
        return []
    num_frames = elements.num_frames
    bits, samples = elements.integer(dicom_file.BITS_ALLOCATED), elements.integer(dicom_file.SAMPLES) or 1
    if not (rows and columns and bits and num_frames > 0):
        raise DicomError(f"it says that it has {rows} rows and {columns} columns of {bits} bits in {num_frames} frames")
    num_bytes = rows * columns * num_frames * samples * bits // 8
    if header.pixel_bytes is not None and header.pixel_bytes < num_bytes:
        raise DicomError(f"it says {rows} x {columns} pixels, which are {num_bytes} bytes, and holds {header.pixel_bytes}")
    if header.pixel_bytes is None and num_frames * _LEAST_FRAME_BYTES > (packed_bytes := path.stat().st_size - header.pixel_offset):
        raise DicomError(f"it says that it has {num_frames} frames, and holds {packed_bytes} bytes of pixels")
    frame_groups = elements.sequences.get(dicom_file.FRAME_GROUPS, [])
    is_enhanced = bool(frame_groups or dicom_file.SHARED_GROUPS in elements.sequences)
    if is_enhanced and len(frame_groups) not in (0, num_frames):
        raise DicomError(f"it has {num_frames} frames, and the places of {len(frame_groups)}")
    if num_frames > 1 and not is_enhanced:
        return [_slice(path, frame, header, Elements({}, {}), Elements({}, {})) for frame in range(num_frames)]
    shared = elements.first(dicom_file.SHARED_GROUPS)
    return [_slice(path, frame, header, frame_groups[frame] if frame_groups else Elements({}, {}), shared) for frame in range(num_frames)]


def _slice(path: Path, frame: int, header: DicomHeader, own: Elements, shared: Elements) -> DicomSlice:
    """One slice: what its frame says, else what all frames share, else what the object says at its top."""
    top = header.elements
    is_single = top.num_frames == 1

    def numbers(group: int, tag: int, count: int) -> np.ndarray | None:
        for elements in (own.first(group), shared.first(group), *([top] if is_single or tag != dicom_file.POSITION else [])):
            if elements.text(tag):
                found = elements.numbers(tag)
                if len(found) != count or not np.isfinite(found).all():
                    raise DicomError(f"its element {tag >> 16:04x},{tag & 0xFFFF:04x} is '{elements.text(tag)}'")
                return np.array(found)
        return None

    axes = numbers(dicom_file.PLANE_ORIENTATION, dicom_file.ORIENTATION, 6)
    spacing = numbers(dicom_file.PIXEL_MEASURES, dicom_file.PIXEL_SPACING, 2)
    slope, intercept = (numbers(dicom_file.VALUE_TRANSFORMATION, tag, 1) for tag in (dicom_file.SLOPE, dicom_file.INTERCEPT))
    return DicomSlice(
        path=path,
        frame=frame,
        header=header,
        size=(top.integer(dicom_file.ROWS), top.integer(dicom_file.COLUMNS)),
        axes=None if axes is None else axes.reshape(2, 3),
        position_mm=numbers(dicom_file.PLANE_POSITION, dicom_file.POSITION, 3),
        spacing_mm=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        rescale=(1.0 if slope is None else float(slope[0]), 0.0 if intercept is None else float(intercept[0])),
    )


def _description(slices: list[DicomSlice]) -> str:
    """The name of a series for a person."""
    return slices[0].header.elements.text(dicom_file.SERIES_DESCRIPTION) or "without description"


def _uid(slices: list[DicomSlice]) -> str:
    """The Series Instance UID of a series."""
    return slices[0].header.elements.text(dicom_file.SERIES_UID)


def _listing(volumes: list[list[DicomSlice]], *, with_uid: bool = True) -> str:
    """Series for a sentence: 'Thorax 1.0' (310 slices, UID 1.2.3), 'Liver 3.0' (90 slices, UID 1.2.4)."""
    return ", ".join(f"'{_description(slices)}' ({len(slices)} slices{f', UID {_uid(slices)}' if with_uid else ''})" for slices in volumes)


def _raise_no_series(folder: Path, series: list[list[DicomSlice]]) -> None:
    """Say why there is nothing to read, and where there might be."""
    if series:
        raise UserError(f"The folder '{folder}' has single slices or localizers only: {_listing(series, with_uid=False)}. Give the folder of a whole series.")
    sub_folders = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    hint = f" Its sub-folders are not searched: {', '.join(sub_folders[:5])}." if sub_folders else ""
    raise UserError(
        f"The folder '{folder}' has no DICOM images.{hint} Give the folder that holds the slices of one series, or a NIfTI, NRRD or MetaImage file."
    )


def _ordered(slices: list[DicomSlice]) -> DicomSeries:
    """Slices by position along their normal, after all checks."""
    name = _description(slices)
    first = _checked_slices(slices, name)
    normal = np.cross(*first.axes)
    slices = sorted(slices, key=lambda found: float(found.position_mm @ normal))
    positions = np.stack([found.position_mm for found in slices])  # (slices, 3)
    _check_gaps(positions @ normal, name)
    _check_acquisitions(slices, name)
    _check_sideways(positions, normal, name)
    return DicomSeries(slices=tuple(slices), spacing_k_mm=float((positions[-1] - positions[0]) @ normal) / (len(slices) - 1))


def _checked_slices(slices: list[DicomSlice], name: str) -> DicomSlice:
    """The first slice, if every slice says what a volume needs and all say the same."""
    missing = {
        "position (Image Position)": [found.position_mm is None for found in slices],
        "direction (Image Orientation)": [found.axes is None for found in slices],
        "pixel size (Pixel Spacing)": [found.spacing_mm is None for found in slices],
    }
    for what, is_missing in missing.items():
        if any(is_missing):
            raise UserError(f"{sum(is_missing)} of {len(slices)} slices of series '{name}' have no {what}. {_EXPORT_AGAIN}")
    modalities = Counter(text.upper() for found in slices if (text := found.header.elements.text(dicom_file.MODALITY)))
    if len(modalities) > 1:
        listing = ", ".join(f"{count} of {modality}" for modality, count in modalities.most_common())
        raise UserError(f"Series '{name}' mixes slices of several modalities: {listing}. Put each into a folder of its own.")
    for found in slices:
        _check_bits(found)
        if not np.abs(found.axes @ found.axes.T - np.eye(2)).max() < _AXES_TOLERANCE:
            raise UserError(
                f"The directions of rows and columns in '{found.path}' are not at right angles or not of length 1 (Image Orientation "
                f"{_numbers(found.axes.ravel())}). {_EXPORT_AGAIN}"
            )
        if not min(found.spacing_mm) > 0:
            raise UserError(f"The pixels in '{found.path}' have the size {_numbers(found.spacing_mm)} mm (Pixel Spacing). {_EXPORT_AGAIN}")
        if found.rescale[0] == 0:
            raise UserError(f"The intensities in '{found.path}' are multiplied by 0 (Rescale Slope). {_EXPORT_AGAIN}")
    samples = max(found.header.elements.integer(dicom_file.SAMPLES) or 1 for found in slices)
    photometric = {found.header.elements.text(dicom_file.PHOTOMETRIC) for found in slices}
    if samples > 1 or photometric & {"PALETTE COLOR", "RGB"}:
        raise UserError(f"Series '{name}' is in color ({samples} values per voxel). Give a series with one value per voxel.")
    if "MONOCHROME1" in photometric:
        raise UserError(f"Series '{name}' is stored as a negative (MONOCHROME1), so it is unknown whether dark means little or much. Export it as MONOCHROME2.")
    first = slices[0]
    if any(found.size != first.size or not np.allclose(found.axes, first.axes, atol=_AXES_TOLERANCE) for found in slices):
        raise UserError(f"The slices of series '{name}' differ in size or direction, so they are no volume. Export only the slices of one stack.")
    sizes_mm = Counter(found.spacing_mm for found in slices)
    if not np.allclose([*sizes_mm], first.spacing_mm, rtol=1e-3, atol=0):
        usual, other = (size for size, _ in (sizes_mm.most_common(1)[0], sizes_mm.most_common()[-1]))
        raise UserError(f"The slices of series '{name}' have pixels of several sizes: {_numbers(usual)} mm and {_numbers(other)} mm. {_EXPORT_AGAIN}")
    return first


def _check_bits(found: DicomSlice) -> None:
    """Raise UserError unless the stored bits of a slice are the lowest ones; a file that does not say so is taken to have them there."""
    elements = found.header.elements
    stored, high = elements.integer(dicom_file.BITS_STORED) or elements.integer(dicom_file.BITS_ALLOCATED), elements.integer(dicom_file.HIGH_BIT)
    if high not in (None, stored - 1):
        raise UserError(
            f"The intensities in '{found.path}' have {stored} bits, the highest of which is bit {high} instead of bit {stored - 1} (High Bit), "
            f"so they would be read wrongly. {_EXPORT_AGAIN}"
        )


def _check_acquisitions(slices: list[DicomSlice], name: str) -> None:
    """Raise UserError if slices of several acquisitions alternate, e.g. two phases half a slice apart.

    One acquisition per table position or per slice is usual, and in MR the odd and the even slices of one volume may be two.
    """
    first = slices[0].header.elements
    numbers = [text for found in slices if (text := found.header.elements.text(dicom_file.ACQUISITION_NUMBER))]
    distinct = list(dict.fromkeys(numbers))
    num_changes = sum(one != other for one, other in zip(numbers, numbers[1:]))
    num_returns = num_changes - (len(distinct) - 1)  # to an acquisition that was left before
    if first.text(dicom_file.MODALITY).upper() != "MR" and len(distinct) > 1 and num_returns > (len(numbers) - 1) / 2:
        raise UserError(
            f"The slices of series '{name}' alternate between {len(distinct)} acquisitions (Acquisition Number {', '.join(distinct[:5])}), "
            "so they are several phases in one. Export one acquisition only."
        )


def _check_sideways(positions_mm: np.ndarray, normal: np.ndarray, name: str) -> None:
    """Raise UserError unless the slices, (slices, 3) in order, lie straight above each other."""
    from_first_mm = positions_mm - positions_mm[0]
    heights_mm = from_first_mm @ normal
    sideways_mm = from_first_mm - heights_mm[:, None] * normal
    off_line_mm = np.linalg.norm(sideways_mm - np.outer(heights_mm / heights_mm[-1], sideways_mm[-1]), axis=1)
    if off_line_mm.max() > _DRIFT_MM:
        raise UserError(
            f"The slices of series '{name}' are shifted sideways against each other: they lie up to {off_line_mm.max():.1f} mm off the straight line "
            "from the first to the last one. Export only the slices of one stack."
        )
    drift_mm = float(np.linalg.norm(sideways_mm[-1]))
    if drift_mm > _DRIFT_MM:
        raise UserError(
            f"The slices of series '{name}' are shifted sideways by {drift_mm:.1f} mm from first to last (gantry tilt). "
            "Load it in 3D Slicer, whose DICOM module corrects the tilt, and save the volume as NRRD."
        )


def _check_gaps(distances_mm: np.ndarray, name: str) -> None:
    """Raise UserError unless the slices, sorted by distance along their normal, are evenly spaced."""
    gaps = np.diff(distances_mm)
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        num_repeated = int((gaps < 1e-3).sum())
        raise UserError(f"Series '{name}' has {num_repeated} slices at places where it already has one (phases or copies). Export one phase, each slice once.")
    if np.abs(gaps - usual).max() <= _GAP_TOLERANCE * usual:
        _check_places(distances_mm, name)
        return
    widest = int(gaps.argmax())
    if gaps[widest] > 1.5 * usual:
        num_missing = int(np.maximum(np.rint(gaps / usual) - 1, 0).sum())
        raise UserError(
            f"Series '{name}' misses about {num_missing} of its slices: after slice {widest + 1} of {len(gaps) + 1} comes a gap of "
            f"{gaps[widest]:.2f} mm instead of {usual:.2f} mm. Export the series again, completely."
        )
    raise UserError(f"The slices of series '{name}' are unevenly spaced: {gaps.min():.2f} to {gaps.max():.2f} mm. {_EVEN_SPACING}")


def _check_places(distances_mm: np.ndarray, name: str) -> None:
    """Raise UserError if small differences between the gaps add up to a wrong place."""
    num_slices = len(distances_mm)
    off_mm = np.abs(distances_mm - np.linspace(distances_mm[0], distances_mm[-1], num_slices))
    spacing_mm = (distances_mm[-1] - distances_mm[0]) / (num_slices - 1)
    farthest = int(off_mm.argmax())
    if off_mm[farthest] > _PLACE_TOLERANCE * spacing_mm:
        raise UserError(
            f"The slices of series '{name}' are unevenly spaced: slice {farthest + 1} of {num_slices} lies {off_mm[farthest]:.1f} mm from its place "
            f"at an even spacing of {spacing_mm:.2f} mm. {_EVEN_SPACING}"
        )


def _numbers(values) -> str:
    """'0.7 x 0.9' for a sentence."""
    return " x ".join(f"{value:g}" if math.isfinite(value) else str(value) for value in values)
