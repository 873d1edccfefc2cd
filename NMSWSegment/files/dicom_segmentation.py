"""A labelmap as DICOM segmentation (DICOM SEG), with the patient, the study and the slices it was made from.

Written by highdicom (extra "dicom"), which is imported when it is needed. DICOM positions are LPS.
"""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from NMSWSegment import __version__
from NMSWSegment.files.bundle import Code, Label
from NMSWSegment.files.output_file import check_output_path, replaced_file
from NMSWSegment.files.volume import Volume, series_files
from NMSWSegment.protocol import UserError

DICOM_SEG_ENDINGS = (".dcm",)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_GRID_TOLERANCE_VOXELS = 0.25
"""Scanners round the positions of slices; a grid that is off by a voxel is off by 1."""
_SERIES_NUMBER_STEP = 1000
"""Added to the number of the source series, so that the segmentation is listed behind the images."""
_HIGHEST_SERIES_NUMBER = 2**31 - 1
"""Of an integer string (IS)."""
_SAME_UIDS = {"StudyInstanceUID": "Study Instance UID", "SeriesInstanceUID": "Series Instance UID", "FrameOfReferenceUID": "Frame of Reference UID"}
"""By keyword; a segmentation refers to its source by these, so they are the same in every file."""
_OWN_UIDS = {"SOPClassUID": "SOP Class UID", "SOPInstanceUID": "SOP Instance UID"}
"""By keyword; it refers to each file by these."""
_FRAME_GROUPS = "PerFrameFunctionalGroupsSequence"
_WAY_OUT = "Export the original series again, or write .seg.nrrd or .nii.gz."
_PATIENT_AND_STUDY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")
"""Must be in the file, though they may be empty; anonymized files often lack them."""


@dataclass(frozen=True)
class Algorithm:
    """What made the segmentation, as it is written into the file."""

    name: str
    version: str = __version__
    parameters: dict[str, str] = field(default_factory=dict)
    is_edited: bool = False
    """Whether a user changed the result; the segments are then marked semi-automatic."""

    @classmethod
    def from_run(cls, run_info: dict) -> "Algorithm":
        """Of a run, from the run_info of the engine."""
        options, bundle = run_info["options"], run_info["bundle"]
        num_patches = "all" if options["num_patches"] is None else str(options["num_patches"])
        version = run_info["versions"]["NMSWSegment"]
        return cls.of_bundle(
            bundle["name"], sha256=bundle["sha256"], k=num_patches, policy=options["policy"], patches=len(run_info["patches"]), version=version
        )

    @classmethod
    def of_bundle(cls, name: str, *, sha256: str, k: str, policy: str, patches: int, version: str, is_edited: bool = False) -> "Algorithm":
        """Model, its hash, and how many patches were chosen how; k is a number, "auto" or "all"."""
        parameters = {"model_sha256": sha256, "k": k, "policy": policy, "patches": str(patches)}
        return cls(name=f"NMSWSegment {name}", version=version, parameters=parameters, is_edited=is_edited)


@dataclass(frozen=True)
class _Source:
    """The slices that a segmentation refers to."""

    instances: list
    """pydicom datasets without pixels, in the order of the volume; one where a file holds all slices."""
    frame_order: np.ndarray
    """Plane k of the grid lies in frame `frame_order[k]`."""
    shape: tuple[int, int, int]
    """Voxels, KJI."""
    ijk_to_ras: np.ndarray


def check_dicom_export(source: str | Path | Sequence[Path], *, series_uid: str | None = None, with_headers: bool = True) -> None:
    """Raise UserError if no DICOM SEG can be made of a result; to be asked before a long run.

    A folder whose series cannot be read, or has to be chosen first, passes: reading it says more.

    Args:
        source: what was segmented; for a DICOM series its folder or its files.
        series_uid: Series Instance UID, where the folder has several series.
        with_headers: whether to look into the files; not where others are to be segmented too and one must not stop all.
    """
    if importlib.util.find_spec("highdicom") is None:
        raise UserError("Writing DICOM needs the package highdicom, which is not installed. Install it with: pip install highdicom")
    if isinstance(source, (str, Path)) and not Path(source).is_dir():
        raise UserError(
            f"A DICOM segmentation refers to the DICOM images it was made from, but the input '{source}' is not a folder with a DICOM series. "
            "Give that folder as the input, or write .seg.nrrd or .nii.gz."
        )
    if with_headers:
        _check_references(_instances(_known_files(source, series_uid=series_uid), keywords=[*_SAME_UIDS, *_OWN_UIDS, _FRAME_GROUPS]))


def export_dicom_seg(
    labelmap: Volume, source: str | Path | Sequence[Path], output: str | Path, *, labels: Sequence[Label], algorithm: Algorithm, series_uid: str | None = None
) -> Path:
    """Write a labelmap as one DICOM SEG object with a binary segment for each structure that has voxels.

    Args:
        labelmap: labels, (K, J, I) uint8, on the voxels of the series; the order and direction of its axes may differ.
        source: folder of the DICOM series that was segmented, or all its files in any order.
        output: file that ends in .dcm.
        labels: structures; values of the labelmap that are not listed are left out.
        series_uid: Series Instance UID, where the folder has several series.

    Raises:
        UserError: highdicom is missing, the folder does not hold the series, the labelmap lies on another grid or is empty, the headers lack
            what a segmentation needs, or the file cannot be written.
    """
    output = check_output_path(output, DICOM_SEG_ENDINGS)
    check_dicom_export(source, series_uid=series_uid, with_headers=False)  # they are read in a moment
    source = _source(source, series_uid=series_uid)
    present = set(np.unique(labelmap.array).tolist())
    labels = [label for label in labels if label.value in present]
    if not labels:
        raise UserError("There is no structure in the result, and a DICOM segmentation cannot be empty. Check the volume and the choice of structures.")
    # Segments are numbered 1, 2, ... without a gap.
    numbers = np.zeros(256, dtype=np.uint8)
    numbers[[label.value for label in labels]] = np.arange(1, len(labels) + 1)
    planes = numbers[_on_source_grid(labelmap, source)]
    frames = np.empty_like(planes)
    frames[source.frame_order] = planes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom on values of the source that are not quite to the standard
        segmentation = _segmentation(frames, source.instances, labels=labels, algorithm=algorithm)
        with replaced_file(output) as temporary:
            segmentation.save_as(temporary)
    return output


def _source(source: str | Path | Sequence[Path], *, series_uid: str | None) -> _Source:
    """Headers and grid of a series."""
    instances = _instances(series_files(Path(source), series_uid=series_uid) if isinstance(source, (str, Path)) else source)
    _check_references(instances)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for instance in instances:
                _complete(instance)
            return _source_of(instances)
        except (AttributeError, ValueError, TypeError, KeyError, IndexError) as error:
            raise _lacking_error(error) from error


def _known_files(source: str | Path | Sequence[Path], *, series_uid: str | None) -> Sequence[Path]:
    """The files of a series; none where it cannot be read or is not the only one."""
    if not isinstance(source, (str, Path)):
        return source
    with suppress(UserError):
        return series_files(Path(source), series_uid=series_uid)
    return []


def _instances(paths: Sequence[Path], *, keywords: list[str] | None = None) -> list:
    """Headers as pydicom datasets; only some elements where keywords are given. Old archives have files without a preamble, hence `force`."""
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=keywords) for path in paths]


def _check_references(instances: list) -> None:
    """Raise UserError unless a segmentation can refer to every file, and to each of them alone."""
    num_files = len(instances)
    if num_files > 1 and any(_FRAME_GROUPS in instance for instance in instances):
        raise UserError(
            f"The DICOM series lies in {num_files} multi-frame files, and a DICOM segmentation can refer to one only. "
            "Give a folder with one of them, or write .seg.nrrd or .nii.gz."
        )
    for keyword, name in (_SAME_UIDS | _OWN_UIDS).items():
        uids = Counter(str(instance.get(keyword) or "") for instance in instances)
        if num_lacking := uids[""]:
            raise UserError(f"{num_lacking} of {num_files} files of the DICOM series have no {name}, by which a segmentation refers to them. {_WAY_OUT}")
        if keyword in _SAME_UIDS and len(uids) > 1:
            raise UserError(f"The files of the DICOM series have {len(uids)} different {name}s, and a segmentation can refer to one only. {_WAY_OUT}")
        if keyword == "SOPInstanceUID" and len(uids) < num_files:
            uid, count = uids.most_common(1)[0]
            raise UserError(f"{count} files of the DICOM series have the same {name} '{uid}', so a segmentation cannot refer to each of them. {_WAY_OUT}")


def _complete(instance) -> None:
    """Bring the header of a slice to what highdicom expects: UTF-8, and empty where it lacks what may be empty."""
    instance.decode()
    instance.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _PATIENT_AND_STUDY:
        if keyword not in instance:
            setattr(instance, keyword, None)
    if instance.PatientSex not in ("M", "F", "O"):
        instance.PatientSex = None


def _source_of(instances: list) -> _Source:
    """The grid of the slices; a single file holds all of them as frames."""
    first = instances[0]
    if len(instances) == 1 and _FRAME_GROUPS in first:
        frames, shared = list(first.PerFrameFunctionalGroupsSequence), first.SharedFunctionalGroupsSequence[0]
        positions = np.array([frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames], dtype=float)
        orientation = _group("PlaneOrientationSequence", frames[0], shared).ImageOrientationPatient
        measures = _group("PixelMeasuresSequence", frames[0], shared)
    else:
        positions = np.array([instance.ImagePositionPatient for instance in instances], dtype=float)
        orientation, measures = first.ImageOrientationPatient, first
    along_row, down_column = np.array(orientation, dtype=float).reshape(2, 3)
    order = np.argsort(positions @ np.cross(along_row, down_column), kind="stable")
    ijk_to_lps = np.eye(4)
    ijk_to_lps[:3, 0], ijk_to_lps[:3, 1] = along_row * float(measures.PixelSpacing[1]), down_column * float(measures.PixelSpacing[0])
    ijk_to_lps[:3, 2] = (positions[order[-1]] - positions[order[0]]) / max(len(positions) - 1, 1)
    ijk_to_lps[:3, 3] = positions[order[0]]
    if not measures.get("SliceThickness"):  # may be empty in the source, but not in a segmentation
        measures.SliceThickness = f"{np.linalg.norm(ijk_to_lps[:3, 2]):.8g}"
    # LPS (DICOM) -> RAS (Slicer)
    return _Source(instances, frame_order=order, shape=(len(positions), int(first.Rows), int(first.Columns)), ijk_to_ras=_LPS_TO_RAS @ ijk_to_lps)


def _group(keyword: str, frame, shared):
    """A functional group of a frame, or the one that all frames share."""
    return getattr(frame if keyword in frame else shared, keyword)[0]


def _on_source_grid(labelmap: Volume, source: _Source) -> np.ndarray:
    """The labels with the axes of the source, (K, J, I).

    Raises:
        UserError: the voxels of the two are not the same.
    """
    to_source = np.linalg.inv(source.ijk_to_ras) @ labelmap.ijk_to_ras
    steps = np.rint(to_source[:3, :3])  # which axis of the source an axis of the labelmap is, and in which direction
    axes_ijk = np.abs(steps).argmax(axis=1)  # by axis of the source
    is_permutation = bool((np.abs(steps).sum(0) == 1).all() and (np.abs(steps).sum(1) == 1).all())
    if is_permutation:
        array = np.transpose(labelmap.array, [2 - axes_ijk[2 - axis] for axis in range(3)])
        is_reversed = [steps[2 - axis, axes_ijk[2 - axis]] < 0 for axis in range(3)]
        array = array[tuple(slice(None, None, -1 if is_back else 1) for is_back in is_reversed)]
        expected = np.eye(4)
        expected[:3, :3] = steps
        expected[:3, 3] = [array.shape[2 - axis] - 1 if is_reversed[2 - axis] else 0 for axis in range(3)]
        ends_ijk = np.array([[i, j, k, 1] for i in (0, labelmap.shape[2] - 1) for j in (0, labelmap.shape[1] - 1) for k in (0, labelmap.shape[0] - 1)])
        if array.shape == source.shape and np.abs(ends_ijk @ (to_source - expected).T).max() <= _GRID_TOLERANCE_VOXELS:
            return array
    raise UserError(
        f"The segmentation ({_times(labelmap.shape)} voxels) does not lie on the voxels of the DICOM series ({_times(source.shape)}). "
        "Segment the series itself, not a cropped, resampled or moved copy of it."
    )


def _segmentation(frames: np.ndarray, instances: list, *, labels: Sequence[Label], algorithm: Algorithm):
    """The DICOM object; frames (K, J, I) hold segment numbers in the order of the source's frames."""
    import highdicom
    from pydicom.sr.codedict import codes

    source = instances[0]
    identification = highdicom.AlgorithmIdentificationSequence(
        name=algorithm.name, version=algorithm.version, family=codes.DCM.ArtificialIntelligence, source="NMSWSegment", parameters=algorithm.parameters
    )
    kind = highdicom.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC if algorithm.is_edited else highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC
    try:
        return highdicom.seg.Segmentation(
            source_images=instances,
            pixel_array=frames,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_description(label, number, identification=identification, kind=kind) for number, label in enumerate(labels, start=1)],
            series_instance_uid=highdicom.UID(),
            series_number=_series_number(source),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="NMSWSegment",
            manufacturer_model_name=algorithm.name,
            software_versions=algorithm.version,
            device_serial_number=algorithm.parameters.get("model_sha256", "unknown")[:16],
            content_label="SEGMENTATION",
            content_description="Research segmentation, not for clinical use",
            series_description=f"Segmentation by {algorithm.name}"[:64],
        )
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise _lacking_error(error) from error


def _series_number(source) -> int:
    """A number behind that of the source; the step alone where the source has none, or none that leaves room."""
    try:
        number = int(source.get("SeriesNumber") or 0) + _SERIES_NUMBER_STEP
    except (TypeError, ValueError):
        return _SERIES_NUMBER_STEP
    return number if 1 <= number <= _HIGHEST_SERIES_NUMBER else _SERIES_NUMBER_STEP


def _description(label: Label, number: int, *, identification, kind):
    """A segment: name, SNOMED CT codes with the side as a modifier, color, and the algorithm."""
    import highdicom

    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label.title,
        segmented_property_category=_concept(label.category),
        segmented_property_type=_concept(label.type),
        algorithm_type=kind,
        algorithm_identification=identification,
        tracking_uid=highdicom.UID(),
        tracking_id=label.name,
        display_color=highdicom.color.CIELabColor.from_rgb(*label.color),
    )
    if label.modifier is not None:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [_concept(label.modifier)]
    return description


def _concept(code: Code):
    """A code of ours as one of highdicom."""
    from highdicom.sr import CodedConcept

    return CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


def _lacking_error(error: Exception) -> UserError:
    """The sentence for headers that are too poor."""
    if isinstance(error, AttributeError) and error.name:
        what = f"no {error.name}"
    else:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"The headers of the DICOM series lack what a segmentation must refer to ({what}). {_WAY_OUT}")


def _times(shape: Sequence[int]) -> str:
    """'512 x 512 x 90' of a KJI shape."""
    return " x ".join(str(length) for length in reversed(tuple(shape)))
