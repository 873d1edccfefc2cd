"""A volume with its place in the patient: read from disk, write back; the only file with LPS coordinates."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files.bundle import Label
from NMSWSegment.files.dicom_series import SeriesInfo, find_series, list_series
from NMSWSegment.files.nifti_file import nonfinite_voxels
from NMSWSegment.files.output_file import check_output_path, file_ending, replaced_file
from NMSWSegment.protocol import UserError

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
LABELMAP_ENDINGS = (".nii.gz", ".nii", ".seg.nrrd")

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

# Cosine between two voxel axes; 0.001 moves the far end of a 500 mm axis by half a millimetre.
_SHEAR_TOLERANCE = 1e-3

_RESAMPLE_HINT = "Resample it to a regular grid first, for example with 'Resample Scalar/Vector/DWI Volume' in 3D Slicer."


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


def read_volume(path: str | Path, *, series_uid: str | None = None) -> Volume:
    """Read a scalar 3-D volume in its own dtype.

    Args:
        path: a NIfTI, NRRD or MetaImage file, or the folder of a DICOM series.
        series_uid: Series Instance UID, where the folder has several series.

    Raises:
        UserError: there is no such file, it is damaged, or it holds something else than one regular 3-D scalar volume.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file or folder '{path}'. Check the spelling of the path.")
    if path.is_dir():
        return _checked(_read_dicom(path, series_uid=series_uid), path)
    if series_uid is not None:
        raise UserError(f"A series is chosen of a DICOM folder, but '{path.name}' is a file. Give the folder, or leave --series out.")
    ending = file_ending(path, VOLUME_ENDINGS)
    if ending is None:
        raise UserError(f"'{path.name}' has an ending that is not known. Give one of {', '.join(VOLUME_ENDINGS)}, or the folder of a DICOM series.")
    image = _read_image(path)
    if ending in (".nii", ".nii.gz"):
        _check_nifti(path)
    return _checked(_volume_from_image(image, name=path.name[: -len(ending)]), path)


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
    present = set(np.unique(labelmap.array).tolist()) - {0}
    unknown = present - {label.value for label in labels}
    if labelmap.array.dtype != np.uint8 or unknown:
        raise ValueError(f"a labelmap is uint8 and has only known labels; this one is {labelmap.array.dtype} with unknown {sorted(unknown)}")
    image = _image_from_volume(labelmap)
    if file_ending(path, LABELMAP_ENDINGS) == ".seg.nrrd":
        for key, text in _segmentation_fields(labelmap.array, [label for label in labels if label.value in present]).items():
            image.SetMetaData(key, text)
    _write_image(image, path)


def _read_image(path: Path) -> sitk.Image:
    """One file as a 3-D scalar image, after a look at its header."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with _quiet_itk():
            reader.ReadImageInformation()
            _check_header(reader, path)
            # A fourth axis of one voxel is common and harmless; extracting size 0 removes it.
            reader.SetExtractSize([*reader.GetSize()[:3], *([0] * (reader.GetDimension() - 3))])
            return reader.Execute()
    except RuntimeError as error:
        if "orthonormal" in str(error) or "determinant is 0" in str(error):
            raise UserError(f"The voxel axes of '{path.name}' are not at right angles to each other. {_RESAMPLE_HINT}") from error
        raise UserError(f"'{path.name}' cannot be read: it is damaged, incomplete or not of the format its ending says. Copy or export it again.") from error


def _check_header(reader: sitk.ImageFileReader, path: Path) -> None:
    """Raise UserError unless the header describes one 3-D scalar volume."""
    size = reader.GetSize()
    if reader.GetNumberOfComponents() != 1:
        raise UserError(
            f"'{path.name}' has {reader.GetNumberOfComponents()} values per voxel (color or vector), but one is needed. "
            "Extract one component with 'Vector to Scalar Volume' in 3D Slicer."
        )
    if any(length > 1 for length in size[3:]):
        raise UserError(
            f"'{path.name}' is {len(size)}-D (size {_times(size)}): a sequence of volumes. Save one 3-D volume of it, for example one phase or time point."
        )
    if len(size) < 3 or min(size[:3]) == 1:
        raise UserError(f"'{path.name}' is one slice (size {_times(size)}). Give the whole volume, with at least 2 voxels along each axis.")


def _check_nifti(path: Path) -> None:
    """Raise UserError for what ITK passes over in a NIfTI file."""
    num_bad = nonfinite_voxels(path)
    if num_bad is None:
        raise UserError(f"'{path.name}' is damaged or incomplete: its voxels end early. Copy or export it again.")
    if num_bad:
        raise _nonfinite_error(path, num_bad)


def _nonfinite_error(path: Path, num_bad: int) -> UserError:
    """The sentence for NaN and infinite voxels."""
    return UserError(f"'{path.name}' has {num_bad} voxels that are no number (NaN or infinite). Replace them, for example by -1024 (air), and save it again.")


def series_files(folder: Path, *, series_uid: str | None = None) -> list[Path]:
    """Files of a DICOM series in the order of the planes k of its volume; errors as in read_volume."""
    return find_series(folder, quiet=_quiet_itk, series_uid=series_uid)


def series_of_folder(folder: str | Path) -> list[SeriesInfo]:
    """The image series of a DICOM folder, for a person to choose from.

    Raises:
        UserError: there is none.
    """
    return list_series(Path(folder), quiet=_quiet_itk)


def _read_dicom(folder: Path, *, series_uid: str | None) -> Volume:
    """A series of a DICOM folder."""
    paths = [str(path) for path in series_files(folder, series_uid=series_uid)]
    if len(paths) == 1:
        # Multi-frame object: one file is the whole volume.
        return _volume_from_image(_read_image(Path(paths[0])), name=folder.name)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(paths)
    try:
        with _quiet_itk():
            image = reader.Execute()
    except RuntimeError as error:
        raise UserError(f"The DICOM series in '{folder}' cannot be read: a slice is damaged or unlike the others. Export the series again.") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(
            f"The DICOM series in '{folder}' is in color ({image.GetNumberOfComponentsPerPixel()} values per voxel). Give a series with one value per voxel."
        )
    return _volume_from_image(image, name=folder.name)


def _checked(volume: Volume, path: Path) -> Volume:
    """The volume itself, if there is something to segment in it."""
    axes = volume.ijk_to_ras[:3, :3] / np.linalg.norm(volume.ijk_to_ras[:3, :3], axis=0)
    if not np.abs(axes.T @ axes - np.eye(3)).max() < _SHEAR_TOLERANCE:  # "not <" catches NaN
        raise UserError(f"The voxel axes of '{path.name}' are not at right angles to each other. {_RESAMPLE_HINT}")
    low, high = volume.array.min(), volume.array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _nonfinite_error(path, int((~np.isfinite(volume.array)).sum()))
    if low == high:
        raise UserError(f"All voxels of '{path.name}' are {low}: there is nothing to segment. Check that the right file was exported.")
    return volume


def _volume_from_image(image: sitk.Image, *, name: str) -> Volume:
    """A Volume from a 3-D scalar image."""
    ijk_to_lps = np.eye(4)
    ijk_to_lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    ijk_to_lps[:3, 3] = image.GetOrigin()
    # LPS (SimpleITK) -> RAS (Slicer)
    return Volume(array=sitk.GetArrayFromImage(image), ijk_to_ras=_LPS_TO_RAS @ ijk_to_lps, name=name)


def _image_from_volume(volume: Volume) -> sitk.Image:
    """The inverse of `_volume_from_image`."""
    # RAS (Slicer) -> LPS (SimpleITK); the flip is its own inverse.
    ijk_to_lps = _LPS_TO_RAS @ volume.ijk_to_ras
    spacing_mm_ijk = np.linalg.norm(ijk_to_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array))
    image.SetSpacing(spacing_mm_ijk.tolist())
    image.SetDirection((ijk_to_lps[:3, :3] / spacing_mm_ijk).ravel().tolist())
    image.SetOrigin(ijk_to_lps[:3, 3].tolist())
    return image


def _write_image(image: sitk.Image, path: Path) -> None:
    """Write an image atomically; SimpleITK chooses the format by the ending."""
    with replaced_file(path) as temporary:
        try:
            with _quiet_itk():
                sitk.WriteImage(image, str(temporary), useCompression=path.suffix != ".nii")
        except RuntimeError as error:
            raise UserError(f"'{path}' could not be written. Check that the disk is not full and that the folder may be written to.") from error


def _segmentation_fields(labels_kji: np.ndarray, labels: Sequence[Label]) -> dict[str, str]:
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
            f"Segment{index}_Extent": _extent_ijk(labels_kji == label.value),
            f"Segment{index}_Tags": f"TerminologyEntry:{label.terminology}|",
        }
    return fields


def _extent_ijk(is_inside: np.ndarray) -> str:
    """First and last voxel along I, J and K of a label that has voxels, as Slicer writes it."""
    bounds = []
    for axis in (2, 1, 0):
        others = tuple(other for other in range(3) if other != axis)
        hit = np.flatnonzero(is_inside.any(axis=others))
        bounds += [str(hit[0]), str(hit[-1])]
    return " ".join(bounds)


def _times(size: Sequence[int]) -> str:
    """'512 x 512 x 90' for a sentence."""
    return " x ".join(str(length) for length in size)


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
