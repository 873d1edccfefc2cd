"""A volume with its place in the patient: read from disk, write back; the only file with LPS coordinates."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files.boxes import label_boxes
from NMSWSegment.files.bundle import Label
from NMSWSegment.files.dicom_series import SeriesInfo, find_series, list_series
from NMSWSegment.files.dicom_voxels import read_voxels
from NMSWSegment.files.nifti_file import NiftiHeader, holds_voxels, nonfinite_voxels, read_header
from NMSWSegment.files.output_file import check_name, check_output_path, file_ending, letters_hint, replaced_file
from NMSWSegment.files.text_header import check_data_files, check_units, is_intact, read_text_header
from NMSWSegment.files.volume_checks import (
    RESAMPLE_HINT,
    changed_error,
    check_geometry,
    check_header,
    check_memory,
    check_numbers,
    check_readable,
    damaged_error,
    nonfinite_error,
    signature,
)
from NMSWSegment.protocol import UserError

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
LABELMAP_ENDINGS = (".nii.gz", ".nii", ".seg.nrrd")

_IMAGE_IO = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
"""Named, because ITK otherwise looks at the contents, and hands a DICOM file that is called .nrrd to another reader."""

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_MOST_COMPRESSION = 1100
"""No deflated stream holds more bytes for each of its own."""


@dataclass(frozen=True)
class Volume:
    """Voxels and where they lie.

    The array is (K, J, I), any real dtype; `ijk_to_ras` is 4 x 4 float64 and maps the index (i, j, k) of a voxel center to
    world millimetres, right-anterior-superior.
    """

    array: np.ndarray
    ijk_to_ras: np.ndarray
    name: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels, KJI."""
        return tuple(self.array.shape)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centers along the array axes, KJI."""
        lengths = np.linalg.norm(self.ijk_to_ras[:3, :3], axis=0)
        return tuple(float(length) for length in lengths[::-1])


@dataclass(frozen=True)
class VolumeFile:
    """A volume on disk: its header is read and checked, its voxels are not."""

    path: Path
    name: str
    shape: tuple[int, int, int]
    """Voxels, KJI."""
    ijk_to_ras: np.ndarray
    """4 x 4."""
    bytes_per_voxel: int
    modality: str
    """CT, MR, PT, ... of a DICOM series; '' where the file does not say."""
    read_array: Callable[[], np.ndarray]
    """The voxels, (K, J, I)."""

    def read(self) -> Volume:
        """The volume.

        Raises:
            UserError: the voxels are damaged, are more than the memory holds, or nothing can be segmented in them.
        """
        check_memory(self.shape, self.path, bytes_per_voxel=self.bytes_per_voxel)
        volume = Volume(array=self.read_array(), ijk_to_ras=self.ijk_to_ras, name=self.name)
        if volume.shape != self.shape:
            raise changed_error(self.path)
        return _checked(volume, self.path)


def read_volume(path: str | Path, *, series_uid: str | None = None) -> Volume:
    """Read a scalar 3-D volume in its own dtype.

    Args:
        path: a NIfTI, NRRD or MetaImage file, or the folder of a DICOM series.
        series_uid: Series Instance UID, where the folder has several series.

    Raises:
        UserError: there is no such file, it is damaged, or it holds something else than one regular 3-D scalar volume.
    """
    return open_volume(path, series_uid=series_uid).read()


def open_volume(path: str | Path, *, series_uid: str | None = None) -> VolumeFile:
    """Read the header of a scalar 3-D volume; everything that it shows to be wrong is told before a voxel is read.

    Args:
        path, series_uid: as for read_volume.

    Raises:
        UserError: as read_volume.
    """
    path = Path(path)
    check_name(path)
    if not path.exists():
        raise UserError(f"There is no file or folder '{path}'. Check the spelling of the path.")
    if path.is_dir():
        return _open_dicom(path, series_uid=series_uid)
    if series_uid is not None:
        raise UserError(f"A series is chosen of a DICOM folder, but '{path.name}' is a file. Give the folder, or leave --series out.")
    if not path.is_file():
        raise UserError(f"'{path}' is no file, but a device, pipe or the like. Give a file on the disk.")
    ending = file_ending(path, VOLUME_ENDINGS)
    if ending is None:
        raise UserError(f"'{path.name}' has an ending that is not known. Give one of {', '.join(VOLUME_ENDINGS)}, or the folder of a DICOM series.")
    return _open_file(path, ending)


def series_files(folder: Path, *, series_uid: str | None = None) -> list[Path]:
    """Files of a DICOM series in the order of the planes k of its volume; errors as in read_volume."""
    return find_series(folder, series_uid=series_uid).paths


def series_of_folder(folder: str | Path) -> list[SeriesInfo]:
    """The image series of a DICOM folder, for a person to choose from.

    Raises:
        UserError: there is none.
    """
    return list_series(Path(folder))


def write_volume(volume: Volume, path: str | Path) -> None:
    """Write a volume in its own dtype, atomically, in any format that `read_volume` reads from one file.

    Raises:
        UserError: the file cannot be written.
    """
    path = check_output_path(path, (".nii.gz", ".nii", ".nrrd", ".mha"))
    _write_image(_image_from_volume(volume), path)


def write_labelmap(labelmap: Volume, path: str | Path, *, labels: Sequence[Label]) -> None:
    """Write a labelmap atomically, as plain integers (NIfTI) or as a segmentation of 3D Slicer (`.seg.nrrd`).

    Args:
        labelmap: labels, uint8, (K, J, I); 0 is background.
        path: file that ends in one of LABELMAP_ENDINGS.
        labels: what the integers mean; those without a voxel are left out of a `.seg.nrrd`.

    Raises:
        UserError: the file cannot be written.
        ValueError: the labelmap is not uint8 or has an integer that is in no label.
    """
    path = check_output_path(path, LABELMAP_ENDINGS)
    if labelmap.array.dtype != np.uint8:
        raise ValueError(f"a labelmap is uint8; this one is {labelmap.array.dtype}")
    boxes = label_boxes(labelmap.array)
    if unknown := sorted(boxes.keys() - {label.value for label in labels}):
        raise ValueError(f"a labelmap has only known labels; this one has unknown {unknown}")
    image = _image_from_volume(labelmap)
    if file_ending(path, LABELMAP_ENDINGS) == ".seg.nrrd":
        for key, text in _segmentation_fields([label for label in labels if label.value in boxes], boxes=boxes).items():
            image.SetMetaData(key, text)
    _write_image(image, path)


def _open_file(path: Path, ending: str) -> VolumeFile:
    """The header of one file."""
    check_readable(path)
    nifti = read_header(path) if ending in (".nii", ".nii.gz") else None
    text_header = read_text_header(path) if nifti is None else None
    if text_header is not None:
        check_data_files(text_header)
    for matrix in (nifti.sform, nifti.qform) if nifti else ():
        if matrix is not None:
            check_geometry(matrix, path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_IMAGE_IO[ending])
    reader.SetFileName(str(path))
    with _explained(path, ending):
        reader.ReadImageInformation()
    check_header(reader, path)
    if text_header is not None:
        check_units(text_header)
    # A fourth axis of one voxel is common and harmless; extracting size 0 removes it.
    size = reader.GetSize()
    reader.SetExtractSize([*size[:3], *([0] * (len(size) - 3))])
    dimension = len(size)
    direction = np.array(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
    ijk_to_ras = _ijk_to_ras(direction, spacing_mm_ijk=reader.GetSpacing()[:3], origin_lps=reader.GetOrigin()[:3])
    check_geometry(ijk_to_ras, path)
    bytes_per_voxel = sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
    num_bytes = int(np.prod(size, dtype=float)) * bytes_per_voxel
    if ending in (".nrrd", ".mha") and num_bytes > path.stat().st_size * _MOST_COMPRESSION:
        raise damaged_error(path)
    before = signature(path)

    def read_array() -> np.ndarray:
        with _explained(path, ending):
            image = reader.Execute()
        if nifti is not None:
            _check_nifti_voxels(path, nifti)
        if text_header is not None and not is_intact(text_header, num_bytes=num_bytes):
            raise damaged_error(path)
        if signature(path) != before:
            raise changed_error(path)
        return sitk.GetArrayFromImage(image)

    return VolumeFile(
        path=path,
        name=path.name[: -len(ending)],
        shape=tuple(size[2::-1]),
        ijk_to_ras=ijk_to_ras,
        bytes_per_voxel=bytes_per_voxel,
        modality="",
        read_array=read_array,
    )


def _open_dicom(folder: Path, *, series_uid: str | None) -> VolumeFile:
    """The header of a series of a DICOM folder."""
    series = find_series(folder, series_uid=series_uid)
    ijk_to_ras = _LPS_TO_RAS @ series.ijk_to_lps  # LPS (DICOM) -> RAS (Slicer)
    check_geometry(ijk_to_ras, folder)
    return VolumeFile(
        path=folder,
        name=folder.absolute().name,
        shape=series.shape,
        ijk_to_ras=ijk_to_ras,
        bytes_per_voxel=series.bytes_per_voxel,
        modality=series.modality,
        read_array=lambda: read_voxels(series, quiet=_quiet_itk),
    )


@contextmanager
def _explained(path: Path, ending: str) -> Iterator[None]:
    """Turn what ITK says of a file into a sentence."""
    try:
        with _quiet_itk():
            yield
    except RuntimeError as error:
        text = str(error)
        if "orthonormal" in text or "determinant is 0" in text:
            raise UserError(f"The voxel axes of '{path.name}' are not at right angles to each other. {RESAMPLE_HINT}") from error
        if not path.name.endswith(ending):
            raise UserError(f"'{path.name}' cannot be read: the reader knows '{ending}' in small letters only. Rename the file.") from error
        if "allocate" in text or "bad_alloc" in text:
            raise UserError(f"'{path.name}' does not fit into the memory of this computer. Crop the volume, or close other programs.") from error
        raise UserError(f"{damaged_error(path)}{letters_hint(path)}") from error


def _check_nifti_voxels(path: Path, header: NiftiHeader) -> None:
    """Raise UserError for what ITK passes over in the voxels of a NIfTI file."""
    num_bad = nonfinite_voxels(path, header)
    if num_bad is None:
        raise UserError(f"'{path.name}' is damaged or incomplete: its voxels end early. Copy or export it again.")
    if num_bad:
        raise nonfinite_error(path.name, num_bad)


def _checked(volume: Volume, path: Path) -> Volume:
    """The volume itself, if there is something to segment in it."""
    check_numbers(volume.array, path.name)
    low = volume.array.min()
    if low == volume.array.max():
        raise UserError(f"All voxels of '{path.name}' are {low}: there is nothing to segment. Check that the right file was exported.")
    return volume


def _ijk_to_ras(direction: np.ndarray, *, spacing_mm_ijk: Sequence[float], origin_lps: Sequence[float]) -> np.ndarray:
    """4 x 4 from what SimpleITK says of an image; the axes are the columns of the direction."""
    ijk_to_lps = np.eye(4)
    ijk_to_lps[:3, :3] = direction * np.array(spacing_mm_ijk)
    ijk_to_lps[:3, 3] = origin_lps
    return _LPS_TO_RAS @ ijk_to_lps  # LPS (SimpleITK) -> RAS (Slicer)


def _image_from_volume(volume: Volume) -> sitk.Image:
    """An image of SimpleITK; the inverse of `_ijk_to_ras` for its place."""
    # RAS (Slicer) -> LPS (SimpleITK); the flip is its own inverse.
    ijk_to_lps = _LPS_TO_RAS @ volume.ijk_to_ras
    spacing_mm_ijk = np.linalg.norm(ijk_to_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array))
    image.SetSpacing(spacing_mm_ijk.tolist())
    image.SetDirection((ijk_to_lps[:3, :3] / spacing_mm_ijk).ravel().tolist())
    image.SetOrigin(ijk_to_lps[:3, 3].tolist())
    return image


def _write_image(image: sitk.Image, path: Path) -> None:
    """Write an image atomically, and read it back; the ending chooses the format."""
    with replaced_file(path) as temporary:
        try:
            with _quiet_itk():
                sitk.WriteImage(image, str(temporary), useCompression=temporary.suffix != ".nii")
                _check_written(image, temporary)
        except RuntimeError as error:
            raise UserError(
                f"The voxels could not be written to the folder '{path.parent}'. Check that the disk is not full and that the folder may be written to."
                f"{letters_hint(path)}"
            ) from error


def _check_written(image: sitk.Image, path: Path) -> None:
    """Raise RuntimeError unless a file holds an image: ITK's NIfTI writer does not tell of a full disk."""
    array = sitk.GetArrayViewFromImage(image)
    if file_ending(path, VOLUME_ENDINGS) in (".nii", ".nii.gz"):
        is_same = holds_voxels(path, array)
    else:
        found = sitk.ReadImage(str(path))  # has a name, because a view does not keep its image
        read = sitk.GetArrayViewFromImage(found)
        # Bytes, not numbers: a voxel that is no number equals itself. Slice by slice, to save memory.
        is_same = read.shape == array.shape and all(np.array_equal(one.view(np.uint8), other.view(np.uint8)) for one, other in zip(read, array))
    if not is_same:
        raise RuntimeError("the file holds something else than was written")


def _segmentation_fields(labels: Sequence[Label], *, boxes: dict[int, tuple[slice, slice, slice]]) -> dict[str, str]:
    """Key-value pairs that make a NRRD file a segmentation in 3D Slicer.

    Source: vtkMRMLSegmentationStorageNode of 3D Slicer; all segments share layer 0 because they do not overlap.
    """
    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for index, label in enumerate(labels):
        fields |= {
            f"Segment{index}_ID": label.name,
            f"Segment{index}_Name": label.title,
            f"Segment{index}_NameAutoGenerated": "0",
            f"Segment{index}_Color": " ".join(f"{channel / 255:.6g}" for channel in label.color),
            f"Segment{index}_ColorAutoGenerated": "0",
            f"Segment{index}_LabelValue": str(label.value),
            f"Segment{index}_Layer": "0",
            f"Segment{index}_Extent": _extent_ijk(boxes[label.value]),
            f"Segment{index}_Tags": f"TerminologyEntry:{label.terminology}|",
        }
    return fields


def _extent_ijk(box: tuple[slice, slice, slice]) -> str:
    """First and last voxel along I, J and K, as Slicer writes it."""
    return " ".join(f"{side.start} {side.stop - 1}" for side in box[::-1])


@contextmanager
def _quiet_itk() -> Iterator[None]:
    """Keep ITK's own warnings from the terminal: the reader says what is wrong in its own messages.

    The format libraries below ITK (MetaIO, GDCM, NIfTI) print to the file descriptor itself, past SimpleITK's switch.
    """
    was_shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        saved = os.dup(2)
    except OSError:  # a window application without a terminal has no descriptor to keep quiet
        saved = None
    if saved is not None:
        if sys.stderr is not None:
            sys.stderr.flush()
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        if saved is not None:
            os.dup2(saved, 2)
            os.close(saved)
        sitk.ProcessObject.SetGlobalWarningDisplay(was_shown)
