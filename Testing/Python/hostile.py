"""Inputs that no program should have to read, and the count of how they ended."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from NMSWSegment.protocol import UserError

SHAPE = (6, 7, 8)
"""KJI."""


class Tally:
    """How many inputs were tried, and how they ended."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()

    def __call__(self, call: Callable[[], object]) -> object:
        """The value of a call, or its UserError if that is one clear sentence or two; anything else passes through and fails the test."""
        try:
            value = call()
        except UserError as error:
            text = str(error)
            assert text.isprintable() or "\\x1b" not in text
            assert "\n" not in text and text.endswith(".") and 30 < len(text) < 600, text
            self.ends["clear errors"] += 1
            return error
        self.ends["right"] += 1
        return value

    def line(self) -> str:
        """'Hostile inputs: 312 tried, 40 right, 272 clear errors'."""
        return f"Hostile inputs: {self.ends.total()} tried, {self.ends['right']} right, {self.ends['clear errors']} clear errors, 0 tracebacks, 0 wrong answers"


def voxels(shape=SHAPE, *, dtype=np.int16, seed: int = 0) -> np.ndarray:
    """Asymmetric intensities, air included."""
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(dtype)


def a_slice(index: int, *, array: np.ndarray, series: str = "1.2.3"):
    """One CT slice of a series of int16 with an intercept of -1024, 2.5 mm apart."""
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = f"{series}.{index + 1}"
    found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        "SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "SeriesDescription": "Thorax", "PatientID": "1", "PatientName": "A", "StudyInstanceUID": "1.2",
        "SeriesInstanceUID": series, "InstanceNumber": str(index + 1), "ImagePositionPatient": [10, -20, 2.5 * index],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [0.9, 0.7], "SliceThickness": 2.5, "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "Rows": array.shape[0], "Columns": array.shape[1], "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelRepresentation": 0, "RescaleIntercept": -1024, "RescaleSlope": 1,
    }  # fmt: skip
    for key, value in values.items():
        setattr(found, key, value)
    found.PixelData = (array + 1024).astype("<u2").tobytes()
    return found


def write_slices(folder: Path, *, change: Callable | None = None, size=SHAPE[1:], num_slices: int = 6, series: str = "1.2.3", prefix: str = "") -> np.ndarray:
    """A series in which `change(slice, index)` may do harm; returns its intensities (K, J, I)."""
    folder.mkdir(exist_ok=True)
    array = voxels((num_slices, *size), seed=num_slices)
    for index in range(num_slices):
        found = a_slice(index, array=array[index], series=series)
        if change is None or change(found, index) is not False:
            found.save_as(folder / f"{prefix}{index:03d}.dcm", enforce_file_format=False)
    return array


def an_enhanced_object(array: np.ndarray, *, positions_mm, slopes=None, intercepts=None, series: str = "1.2.9", number: int = 1):
    """An Enhanced CT of the stored values `array` (frames, rows, columns) uint16, frames at LPS (10, -20, position)."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    found = a_slice(number - 1, array=np.zeros(array.shape[1:], np.int16), series=series)
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleIntercept", "RescaleSlope"):
        delattr(found, key)
    found.NumberOfFrames = len(array)
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([_item(PixelSpacing=[0.9, 0.7], SliceThickness=2.5)])
    shared.PlaneOrientationSequence = Sequence([_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])
    found.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for index, position in enumerate(positions_mm):
        slope, intercept = (values[index] if values is not None else default for values, default in ((slopes, 1), (intercepts, -1024)))
        frame = Dataset()
        frame.PlanePositionSequence = Sequence([_item(ImagePositionPatient=[10, -20, float(position)])])
        frame.PixelValueTransformationSequence = Sequence([_item(RescaleIntercept=intercept, RescaleSlope=slope, RescaleType="HU")])
        frames.append(frame)
    found.PerFrameFunctionalGroupsSequence = Sequence(frames)
    found.PixelData = array.astype("<u2").tobytes()
    return found


def save(found, path: Path) -> Path:
    """Write a DICOM object; its folder is made."""
    path.parent.mkdir(exist_ok=True)
    found.save_as(path, enforce_file_format=False)
    return path


def _item(**values):
    """An item of a sequence."""
    from pydicom.dataset import Dataset

    item = Dataset()
    for key, value in values.items():
        setattr(item, key, value)
    return item
