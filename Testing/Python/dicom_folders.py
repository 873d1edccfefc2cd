"""DICOM series for the tests, written with pydicom: every attribute that a CT scanner writes, on any grid."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from NMSWSegment.files.volume import Volume

STUDY_UID, FRAME_UID = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"


def write_ct_series(
    volume: Volume,
    folder: Path,
    *,
    series_uid: str | None = None,
    description: str = "Thorax 2.5",
    without: tuple[str, ...] = (),
    instead: dict[str, object] | None = None,
) -> str:
    """One file per plane of a volume in HU, in an order of names that says nothing; returns the Series Instance UID.

    Args:
        volume: (K, J, I), right-handed.
        without: keywords that are left out of every file.
        instead: values by keyword that every file has instead of the usual ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series_uid = series_uid or generate_uid()[:56].rstrip(".")
    axes = volume.ijk_to_ras[:3, :3] * np.array([[-1.0], [-1.0], [1.0]])  # RAS -> LPS
    origin = volume.ijk_to_ras[:3, 3] * (-1, -1, 1)
    directions = axes / np.linalg.norm(axes, axis=0)
    for k in np.random.default_rng(0).permutation(volume.shape[0]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = f"{series_uid}.{k + 1}"
        dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        values = {
            "SpecificCharacterSet": "ISO_IR 100", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "StudyDate": "20240131", "StudyTime": "101112", "AccessionNumber": "A1",
            "Modality": "CT", "Manufacturer": "Phantom", "ReferringPhysicianName": "", "SeriesDescription": description, "PatientName": "Müller^Anna",
            "PatientID": "P-17", "PatientBirthDate": "19600229", "PatientSex": "F", "SliceThickness": f"{volume.spacing_mm[0]:.6g}",
            "StudyInstanceUID": STUDY_UID, "SeriesInstanceUID": series_uid, "StudyID": "S1", "SeriesNumber": 3, "InstanceNumber": int(k) + 1,
            "FrameOfReferenceUID": FRAME_UID, "ImagePositionPatient": [f"{value:.8g}" for value in origin + axes[:, 2] * k],
            "ImageOrientationPatient": [f"{value:.8f}" for value in directions[:, :2].T.ravel()],
            "PixelSpacing": [f"{length:.8g}" for length in volume.spacing_mm[1:]], "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
            "Rows": volume.shape[1], "Columns": volume.shape[2], "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1,
            "RescaleIntercept": -24, "RescaleSlope": 1, "RescaleType": "HU",
        }  # fmt: skip
        for keyword, value in (values | (instead or {})).items():
            if keyword not in without:
                setattr(dataset, keyword, value)
        dataset.PixelData = (np.rint(volume.array[k]).astype(np.int16) + 24).tobytes()
        number = int(np.random.default_rng(int(k)).integers(1, 10**9))
        pydicom.dcmwrite(folder / f"IM{series_uid[-4:]}-{number:010d}", dataset, enforce_file_format=True)
    return series_uid
