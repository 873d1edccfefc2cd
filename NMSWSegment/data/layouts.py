"""Folders of labelled CT as they are downloaded: which cases they hold, and what their classes are called.

    decathlon          dataset.json with labels and a training list of image and label
    nnunet             nnU-Net 2 raw data: imagesTr/<case>_0000<ending>, labelsTr/<case><ending>, dataset.json
    word               imagesTr, labelsTr, imagesVal, labelsVal, ...: 16 organs
    totalsegmentator   <case>/ct.nii.gz, <case>/segmentations/<class>.nii.gz, meta.csv with a split column

Only lists and headers are looked at here; voxels are read by prepared_case.py.
"""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from NMSWSegment.data.totalsegmentator import subset_classes
from NMSWSegment.data.training_sample import UNKNOWN_LABEL
from NMSWSegment.protocol import UserError

DATASET_NAME = "dataset.json"
CT = "CT"
SPLITS = {"train": "Tr", "val": "Val", "test": "Ts"}
"""Splits, and what the folders of WORD and nnU-Net call them."""
WORD_LABEL_NAMES = (
    "liver",
    "spleen",
    "kidney_left",
    "kidney_right",
    "stomach",
    "gallbladder",
    "esophagus",
    "pancreas",
    "duodenum",
    "colon",
    "intestine",
    "adrenal_gland",
    "rectum",
    "urinary_bladder",
    "head_of_femur_left",
    "head_of_femur_right",
)
"""WORD's labels 1 to 16 under the names of anatomy.json. Source: Luo et al. 2022, WORD, table 2; its left is the patient's left."""


class CaseFiles(NamedTuple):
    """One labelled CT on disk."""

    name: str
    image: Path
    label: Path
    """A labelmap, or a folder with one mask <class>.nii.gz per class."""


@dataclass(frozen=True)
class Cases:
    """The labelled cases of one folder."""

    files: tuple[CaseFiles, ...]
    label_names: tuple[str, ...]
    """Classes in label order, background left out."""
    unknown_value: int = UNKNOWN_LABEL
    """Label of voxels whose class nobody knows."""
    modality: str = ""
    """CT, or what the data set calls its intensities, such as MRI or T2; empty where it does not say."""


def read_cases(argument: str, *, subset: str = "", split: str = "train") -> Cases:
    """The cases of a KIND:FOLDER argument.

    Args:
        argument: the kind is one of KINDS.
        subset: classes of totalsegmentator, see subset_classes.
        split: train, val or test; a decathlon folder has labels for train only.

    Raises:
        UserError: the argument, the folder or its lists cannot be used, or no case is there.
    """
    kind, _, name = argument.partition(":")
    folder = Path(name)
    if kind not in KINDS or not name:
        raise UserError(f"'{argument}' is not KIND:FOLDER. Write decathlon:FOLDER for labelled CT, or another kind: {', '.join(KINDS)}.")
    if not folder.is_dir():
        raise UserError(f"There is no folder '{folder}'. Check the path after '{kind}:'; {DATASET_NAME} or the cases lie directly in it.")
    if subset and kind != "totalsegmentator":
        raise UserError(f"--subset '{subset}' chooses classes of totalsegmentator, but the data is '{argument}'. Leave it out.")
    cases = KINDS[kind](folder, subset, split)
    if not cases.files:
        raise UserError(f"'{folder}' holds no case of the split '{split}' in the layout '{kind}'. Check the folder, or give another kind: {', '.join(KINDS)}.")
    return cases


def read_decathlon(folder: Path) -> tuple[list[CaseFiles], tuple[str, ...]]:
    """The labelled cases of a folder in Medical Segmentation Decathlon or nnU-Net layout.

    A case is named by its image file, or by the image's folder where several images share a file name.

    Args:
        folder: holds dataset.json.

    Returns:
        The cases in the order of the list, and the label names in label order, background left out.

    Raises:
        UserError: dataset.json is missing or malformed, or it lists a file that is not there.
    """
    path = dataset_file(folder)
    values = read_json(path)
    try:
        pairs = (
            [(folder / entry["image"], folder / entry["label"]) for entry in values["training"]]
            if "training" in values
            else _nnunet_pairs(folder, values, split="train")
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"The training list of '{path}' is malformed ({error!r}). Each entry needs image and label, paths relative to the folder.") from error
    _check_files(pairs, source=f"'{path}' lists", folder=folder)
    stems = [image.name.split(".")[0].removesuffix("_0000") for image, _ in pairs]
    names = stems if len(set(stems)) == len(stems) else [image.parent.name for image, _ in pairs]
    if len(set(names)) < len(names):
        raise UserError(f"Several cases of '{path}' have the same name ({', '.join(sorted(names)[:4])}, ...). Give the image files different names.")
    cases = [CaseFiles(name=name, image=image, label=label) for name, (image, label) in zip(names, pairs)]
    return cases, read_label_names(path)


def read_label_names(path: Path) -> tuple[str, ...]:
    """Label names of a dataset.json in label order, background left out.

    Raises:
        UserError: the file is malformed, or the labels are not numbered 0, 1, 2, ... with background first.
    """
    return _names_and_unknown(path)[0]


def read_modality(path: Path) -> str:
    """What a dataset.json calls its intensities (channel_names of nnU-Net 2, modality of the Decathlon): CT for any kind of CT, empty where it does not say."""
    values = read_json(path)
    channels = values.get("channel_names", values.get("modality")) or {}
    names = [str(name) for name in (channels.values() if isinstance(channels, dict) else [channels])]
    return CT if names and all(re.search(r"\bct|ct\b", name, flags=re.IGNORECASE) for name in names) else ", ".join(names)


def dataset_file(folder: Path, *, also: Sequence[Path] = ()) -> Path:
    """The dataset.json of a folder, or of the first of other folders that has one.

    Raises:
        UserError: none has.
    """
    for place in (folder, *also):
        if (place / DATASET_NAME).is_file():
            return place / DATASET_NAME
    raise UserError(f"'{folder}' has no {DATASET_NAME}, so its labels have no names. Give the folder that holds it, or write one in Decathlon style.")


def read_json(path: Path) -> dict:
    """The object of a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}). Correct it in a text editor.") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no JSON object. Write one in Decathlon style, with labels and training.")
    return values


def _decathlon(folder: Path, subset: str, split: str) -> Cases:
    """A Decathlon folder; its test images have no labels."""
    files, label_names = read_decathlon(folder) if split == "train" else ((), read_label_names(dataset_file(folder)))
    return Cases(files=tuple(files), label_names=label_names, modality=read_modality(dataset_file(folder)))


def _nnunet(folder: Path, subset: str, split: str) -> Cases:
    """A dataset of nnU-Net 2's raw data, one channel; its label 'ignore' is unknown."""
    path = dataset_file(folder)
    values = read_json(path)
    channels = values.get("channel_names", {"0": "CT"})
    if len(channels) != 1:
        raise UserError(
            f"'{path}' has {len(channels)} channels ({', '.join(map(str, channels.values()))}), but one is needed. Make a dataset of one of them alone."
        )
    if "file_ending" not in values:
        raise UserError(f"'{path}' has no file_ending, as nnU-Net 2 writes it. Add it, or use decathlon:{folder} for a dataset with a training list.")
    label_names, unknown = _names_and_unknown(path)
    pairs = _nnunet_pairs(folder, values, split=split)
    _check_files(pairs, source=f"The labels of '{folder}' need", folder=folder)
    ending = values["file_ending"]
    files = tuple(CaseFiles(label.name.removesuffix(ending), image, label) for image, label in pairs)
    return Cases(files=files, label_names=label_names, unknown_value=unknown, modality=read_modality(path))


def _word(folder: Path, subset: str, split: str) -> Cases:
    """The folder of WORD (WORD-V0.1.0); the classes are known, its dataset.json is not needed."""
    images = sorted(_visible(folder / f"images{SPLITS[split]}", "*.nii.gz"))
    pairs = [(image, folder / f"labels{SPLITS[split]}" / image.name) for image in images]
    _check_files(pairs, source=f"The images of '{folder}' need", folder=folder)
    files = tuple(CaseFiles(image.name.split(".")[0], image, label) for image, label in pairs)
    return Cases(files=files, label_names=WORD_LABEL_NAMES, modality=CT)


def _totalsegmentator(folder: Path, subset: str, split: str) -> Cases:
    """The folder of the TotalSegmentator dataset 2; without meta.csv all of its cases are for training."""
    label_names = subset_classes(subset)
    splits = _meta_splits(folder / "meta.csv") if (folder / "meta.csv").is_file() else {}
    files = []
    for image in sorted(folder.glob("*/ct.nii.gz")):
        name = image.parent.name
        if splits.get(name, "train") != split:
            continue
        masks = image.parent / "segmentations"
        _check_files([(masks / f"{label}.nii.gz", image) for label in label_names], source=f"Case '{name}' needs", folder=folder)
        files.append(CaseFiles(name=name, image=image, label=masks))
    return Cases(files=tuple(files), label_names=label_names, modality=CT)


def _meta_splits(path: Path) -> dict[str, str]:
    """Split by case from TotalSegmentator's meta.csv (semicolons)."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=";")
        if not {"image_id", "split"} <= set(reader.fieldnames or ()):
            raise UserError(
                f"'{path}' has the columns {', '.join(reader.fieldnames or ())}, but image_id and split are needed, separated by semicolons. Take the dataset's own meta.csv."
            )
        return {row["image_id"]: row["split"] for row in reader}


def _nnunet_pairs(folder: Path, values: dict, *, split: str) -> list[tuple[Path, Path]]:
    """Image and label of every case in nnU-Net's raw layout: imagesTr/NAME_0000.ENDING and labelsTr/NAME.ENDING.

    An image without a label is listed too, so that its case is missed and not forgotten; of the test split only the labelled ones are cases.
    """
    ending, images, labels = values["file_ending"], folder / f"images{SPLITS[split]}", folder / f"labels{SPLITS[split]}"
    names = {path.name.removesuffix(ending) for path in _visible(labels, f"*{ending}")}
    if split != "test":
        names |= {path.name.removesuffix(f"_0000{ending}") for path in _visible(images, f"*_0000{ending}")}
    return [(images / f"{name}_0000{ending}", labels / f"{name}{ending}") for name in sorted(names)]


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern without the hidden ones, such as '._case.nii.gz', which macOS lays beside a file on foreign disks."""
    return [path for path in folder.glob(pattern) if not path.name.startswith(".")]


def _names_and_unknown(path: Path) -> tuple[tuple[str, ...], int]:
    """Label names of a dataset.json without background and 'ignore', and the value of unknown voxels."""
    labels = read_json(path).get("labels")
    try:
        # Decathlon: {"1": "liver"}; nnU-Net 2: {"liver": 1}, {"ignore": 2}
        numbered = (
            {int(key): str(value) for key, value in labels.items()}
            if all(str(key).isdigit() for key in labels)
            else {int(value): key for key, value in labels.items()}
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f'\'{path}\' has no usable labels ({error!r}). Write them as {{"0": "background", "1": "liver", ...}}.') from error
    ignored = [number for number, name in numbered.items() if name == "ignore"]
    unknown = ignored[0] if ignored else UNKNOWN_LABEL
    numbered.pop(unknown, None)
    if sorted(numbered) != list(range(len(numbered))) or len(numbered) < 2:
        raise UserError(f"The labels of '{path}' are numbered {sorted(numbered)}. Number them 0, 1, 2, ... with background as 0.")
    return tuple(numbered[number] for number in range(1, len(numbered))), unknown


def _check_files(pairs: Sequence[tuple[Path, Path]], *, source: str, folder: Path) -> None:
    """Raise UserError on the first file that is not there."""
    for file in (file for pair in pairs for file in pair):
        if not file.is_file():
            raise UserError(f"{source} '{file.relative_to(folder)}', which is not there. Put the file back, or take its case out of the list.")


KINDS = {"decathlon": _decathlon, "nnunet": _nnunet, "word": _word, "totalsegmentator": _totalsegmentator}
