"""Tiny folders of labelled CT in the layouts of the data sets that are downloaded: liver right, spleen left, spine behind, world coordinates."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from NMSWSegment.data.layouts import WORD_LABEL_NAMES
from NMSWSegment.files import phantoms
from NMSWSegment.files.volume import Volume, write_volume

SHAPE = (26, 20, 24)
SPACING_MM = (6.0, 6.0, 6.0)


def a_case(*, mirrored: bool = False) -> tuple[Volume, np.ndarray]:
    """A CT of the phantom with its labels 1 liver, 2 spleen, 3 vertebrae, (K, J, I); mirrored ones store the left side first."""
    ijk_to_ras = phantoms.upright_ijk_to_ras(SPACING_MM, SHAPE)
    volume, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    if mirrored:
        flip = np.diag([-1.0, 1, 1, 1])
        flip[0, 3] = SHAPE[2] - 1
        volume, labels = Volume(np.ascontiguousarray(volume.array[:, :, ::-1]), ijk_to_ras @ flip), np.ascontiguousarray(labels[:, :, ::-1])
    return Volume(volume.array.astype(np.int16), volume.ijk_to_ras), labels.astype(np.uint8)


def write_array(array: np.ndarray, like: Volume, path: Path) -> None:
    """An array on the grid of a volume; unlike write_labelmap it may hold any number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(Volume(array, like.ijk_to_ras), path)


def write_totalsegmentator(folder: Path, *, splits: dict[str, str], classes: tuple[str, ...] = ("liver", "spleen", "vertebrae_L1", "gallbladder")) -> Path:
    """sXXXX/ct.nii.gz, sXXXX/segmentations/<class>.nii.gz, meta.csv; the gallbladder is empty everywhere."""
    for name in splits:
        volume, labels = a_case(mirrored=name.endswith("2"))
        write_array(volume.array, volume, folder / name / "ct.nii.gz")
        for value, label in enumerate(classes, start=1):
            write_array((labels == value).astype(np.uint8), volume, folder / name / "segmentations" / f"{label}.nii.gz")
    rows = [f"{name};50;f;chest;{split}" for name, split in splits.items()]
    (folder / "meta.csv").write_text("\n".join(["image_id;age;gender;study_type;split", *rows]) + "\n", encoding="utf-8")
    return folder


def write_word(folder: Path, *, splits: dict[str, str]) -> Path:
    """imagesTr/word_0001.nii.gz, labelsTr/word_0001.nii.gz, imagesVal, ...; only liver and spleen are there."""
    for name, split in splits.items():
        volume, labels = a_case(mirrored=name.endswith("2"))
        write_array(volume.array, volume, folder / f"images{split}" / f"{name}.nii.gz")
        write_array(np.where(labels < 3, labels, 0).astype(np.uint8), volume, folder / f"labels{split}" / f"{name}.nii.gz")
    values = {"labels": {"0": "background"} | {str(value): name for value, name in enumerate(WORD_LABEL_NAMES, start=1)}}
    (folder / "dataset.json").write_text(json.dumps(values))
    return folder


def write_nnunet(folder: Path, *, names: tuple[str, ...], ignore: bool = False, labels: tuple[str, ...] = ("liver", "spleen", "vertebrae")) -> Path:
    """imagesTr/<name>_0000.nii.gz, labelsTr/<name>.nii.gz, dataset.json; with ignore the last label is 'ignore'."""
    label_names = (*labels[:2], "ignore") if ignore else labels
    labels_by_name = {"background": 0} | {name: value for value, name in enumerate(label_names, start=1)}
    for name in names:
        volume, label_array = a_case()
        write_array(volume.array, volume, folder / "imagesTr" / f"{name}_0000.nii.gz")
        write_array(label_array, volume, folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": labels_by_name, "numTraining": len(names), "file_ending": ".nii.gz"})
    )
    return folder


def centroid_ras(labels: np.ndarray, value: int, ijk_to_ras: np.ndarray) -> np.ndarray:
    """Mean place of a label, RAS mm."""
    return (ijk_to_ras @ np.array([*np.argwhere(labels == value).mean(0)[::-1], 1.0]))[:3]


def read_array(path: Path) -> np.ndarray:
    """The voxels of a file, (K, J, I)."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
