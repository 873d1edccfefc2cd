"""One labelled CT as training reads it: checked, axes turned to S-A-R, masks of single classes combined; its own voxels, at no model spacing yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from NMSWSegment.data.body_extent import BodyExtent, measure_body
from NMSWSegment.data.layouts import CaseFiles
from NMSWSegment.data.training_sample import UNKNOWN_LABEL
from NMSWSegment.files import nifti_file
from NMSWSegment.files.boxes import voxel_corners
from NMSWSegment.files.orientation import Triple_mm, to_sar
from NMSWSegment.files.output_file import file_ending, letters_hint
from NMSWSegment.files.volume import Volume, read_volume
from NMSWSegment.protocol import UserError

GEOMETRY_TOLERANCE_MM = 0.1
BODY_THRESHOLD_HU = -300.0
LABEL_LANDMARKS = {"lung": ("lung",), "liver": ("liver",), "hip": ("hip", "femur")}


@dataclass(frozen=True)
class CaseRequest:
    """Everything that decides a prepared case."""

    files: CaseFiles
    label_names: tuple[str, ...]
    """Classes without background, in label order."""
    unknown_value: int = UNKNOWN_LABEL
    """Label on disk of voxels whose class nobody knows."""

    @property
    def label_paths(self) -> tuple[Path, ...]:
        """The labelmap, or the masks in label order."""
        label = self.files.label
        return tuple(label / f"{name}.nii.gz" for name in self.label_names) if label.is_dir() else (label,)


@dataclass(frozen=True)
class PreparedCase:
    """Voxels on the case's own grid, array axes growing to superior, anterior, right."""

    intensity: np.ndarray
    """As in the file, HU for CT, (D, H, W), int16 where that is exact, else float32."""
    labels: np.ndarray
    """0..C-1 or 255 for unknown, (D, H, W) uint8."""
    spacing_mm: Triple_mm
    extent: BodyExtent
    direction: tuple[tuple[float, float, float], ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    """Rows: how superior, anterior and right of the world run along the array's axes; the identity unless the scan is oblique."""

    @property
    def ijk_to_ras(self) -> np.ndarray:
        """4 x 4; the first voxel lies at the world's origin."""
        return ijk_to_ras_of(self.spacing_mm, self.direction)


def ijk_to_ras_of(spacing_mm: Triple_mm, direction: Sequence[Sequence[float]]) -> np.ndarray:
    """4 x 4 of a prepared case's spacing and direction; the first voxel lies at the world's origin."""
    result = np.eye(4)
    result[:3, :3] = np.array(direction)[::-1, ::-1] * np.array(spacing_mm[::-1])
    return result


@dataclass(frozen=True)
class Header:
    """Where a file says its voxels lie; in the file's own frame, LPS, because headers are only compared with each other."""

    shape: tuple[int, int, int]
    """Voxels, KJI."""
    spacing_mm: Triple_mm
    """KJI."""
    ijk_to_lps: np.ndarray

    def difference(self, other: "Header") -> str:
        """What is different in another header, for a sentence; empty when its voxels lie in the same places."""
        if self.shape != other.shape:
            return f"{_times(self.shape)} and {_times(other.shape)} voxels"
        if not np.allclose(self.spacing_mm, other.spacing_mm, atol=GEOMETRY_TOLERANCE_MM / max(self.shape)):
            return f"voxels of {_times(self.spacing_mm)} and {_times(other.spacing_mm)} mm"
        distance_mm = np.linalg.norm(((self.ijk_to_lps - other.ijk_to_lps) @ voxel_corners(self.shape).T)[:3], axis=0).max()
        return f"places that are up to {distance_mm:.1f} mm apart" if distance_mm > GEOMETRY_TOLERANCE_MM else ""


def read_header(path: Path) -> Header:
    """The header of a volume file, without its voxels.

    Raises:
        UserError: the file cannot be read.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"'{path}' cannot be read: it is damaged or not of the format its ending says. Copy or export it again.{letters_hint(path)}") from error
    ijk_to_lps = np.eye(4)
    number = reader.GetDimension()
    ijk_to_lps[:3, :3] = np.array(reader.GetDirection()).reshape(number, number)[:3, :3] * np.array(reader.GetSpacing()[:3])
    ijk_to_lps[:3, 3] = reader.GetOrigin()[:3]
    return Header(shape=tuple(reader.GetSize()[2::-1]), spacing_mm=tuple(reader.GetSpacing()[2::-1]), ijk_to_lps=ijk_to_lps)


def check_headers(request: CaseRequest) -> Header:
    """The header of the image.

    Raises:
        UserError: a label file is missing or lies on another grid than the image.
    """
    image = read_header(request.files.image)
    for path in request.label_paths:
        if not path.is_file():
            raise UserError(f"Case '{request.files.name}' has no label file '{path}'. Put it back, or leave the case out.")
        difference = image.difference(read_header(path))
        if difference:
            raise UserError(
                f"Image and label '{path.name}' of case '{request.files.name}' do not lie on the same grid: {difference}. Resample the label to the image with nearest neighbor."
            )
    return image


def prepare_case(request: CaseRequest) -> PreparedCase:
    """Read a case.

    Raises:
        UserError: a file is missing or damaged, image and label do not lie on the same grid, or a label is outside the list.
    """
    check_headers(request)
    volume = read_volume(request.files.image)
    labels, _, _ = to_sar(Volume(array=read_labels(request), ijk_to_ras=volume.ijk_to_ras))
    intensity, spacing_mm, direction = to_sar(volume)
    landmarks = {key: torch.from_numpy(_slices_with(labels, request.label_names, words)) for key, words in LABEL_LANDMARKS.items()}
    extent = measure_body(torch.from_numpy(intensity > BODY_THRESHOLD_HU), landmarks, spacing_mm=spacing_mm)
    return PreparedCase(intensity=_compact(intensity), labels=labels, spacing_mm=spacing_mm, extent=extent, direction=direction)


def read_labels(request: CaseRequest) -> np.ndarray:
    """Labels of a case on the grid of its image, (K, J, I) uint8, 255 for unknown; where masks overlap, the later class wins.

    Raises:
        UserError: a label file is damaged, or holds a value that is not in the list.
    """
    paths = request.label_paths
    if not request.files.label.is_dir():
        return _checked_labels(_voxels(paths[0]), request)
    labels = None
    for value, path in enumerate(paths, start=1):
        mask = _voxels(path) > 0
        labels = np.zeros(mask.shape, np.uint8) if labels is None else labels
        labels[mask] = value
    return labels


def _voxels(path: Path) -> np.ndarray:
    """The voxels of a label file; unlike an image it may be 0 everywhere."""
    damaged = UserError(f"'{path}' cannot be read: it is damaged or incomplete. Copy or export it again.{letters_hint(path)}")
    if file_ending(path, (".nii", ".nii.gz")) and nifti_file.nonfinite_voxels(path, nifti_file.read_header(path)) is None:
        raise damaged  # ITK takes what is there of a file that breaks off
    try:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).reshape(read_header(path).shape)
    except RuntimeError as error:
        raise damaged from error


def _checked_labels(voxels: np.ndarray, request: CaseRequest) -> np.ndarray:
    """Labels as uint8, unknown ones as 255; UserError on a voxel that is no label."""
    num_labels = len(request.label_names) + 1
    known = {*range(num_labels), request.unknown_value}
    unexpected = [value for value in np.unique(voxels).tolist() if value not in known]
    if unexpected:
        raise UserError(
            f"The label of case '{request.files.name}' holds {unexpected[:5]}, but the list of labels ends at {num_labels - 1}. "
            "Add the class there, or set those voxels to 0 or to 255 (unknown)."
        )
    return np.where(voxels == request.unknown_value, UNKNOWN_LABEL, voxels).astype(np.uint8)


def _slices_with(labels: np.ndarray, label_names: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """Which slices hold a label whose name contains one of the words, (D) bool."""
    chosen = np.zeros(256, dtype=bool)
    chosen[[number for number, name in enumerate(label_names, start=1) if any(word in name.lower() for word in words)]] = True
    return chosen[labels].any(axis=(1, 2))


def _compact(intensity: np.ndarray) -> np.ndarray:
    """int16 where no value changes: half of the disk and of the reading."""
    limits = np.iinfo(np.int16)
    rounded = intensity.clip(limits.min, limits.max).astype(np.int16)
    return rounded if np.array_equal(rounded, intensity) else intensity


def _times(values: Sequence[float]) -> str:
    """'1.5 x 0.8 x 0.8' for a sentence."""
    return " x ".join(f"{value:g}" for value in values)
