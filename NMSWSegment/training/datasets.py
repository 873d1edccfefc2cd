"""Training data: labelled CT and anatomies on disk, and the endless, reproducible sequence of samples drawn from them.

Sample n depends on the seed and on n alone, so that workers and resumed runs see the same sequence.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.protocol import UserError, unknown_name
from NMSWSegment.training.acquisition import AIR_HU, HU_RANGE, add_noise, blur, cut_field_of_view, lower_resolution
from NMSWSegment.training.losses import UNKNOWN_LABEL
from NMSWSegment.training.scan_range import measure_body, random_box, read_canonical
from NMSWSegment.training.synthesis import MAP_NAME, AnatomySource, SynthesisOptions, TrainingSample
from NMSWSegment.training.warp import Triple_mm, apply_along_axes, averaging_matrix, chance, is_outside, nearest_flat_index, random_warp, uniform

if TYPE_CHECKING:
    from NMSWSegment.training.train import TrainOptions

DATASET_NAME = "dataset.json"
BODY_HU = -300.0
GEOMETRY_TOLERANCE_MM = 0.1
LANDMARK_WORDS = {"lung": ("lung",), "liver": ("liver",), "hip": ("hip", "femur")}
GAMMA_WINDOW_HU = (-250.0, 500.0)
"""The gamma works inside this window, the paper's; its range is narrower than the paper's, which would turn a liver into fat (1.35: 40 to -50 HU)."""


class CaseFiles(NamedTuple):
    """One labelled CT on disk."""

    name: str
    image: Path
    label: Path


class CaseSource:
    """One labelled CT, loaded once; every draw is a warped, re-contrasted and re-scanned part of it."""

    def __init__(self, files: CaseFiles, *, label_names: Sequence[str], spacing_mm: Triple_mm) -> None:
        """Read image and label.

        Args:
            files: where they are.
            label_names: classes without background, in label order.
            spacing_mm: model spacing, KJI; a finer image is averaged to it, as inference does.

        Raises:
            UserError: image and label do not lie on the same grid, or a label is outside the list.
        """
        self.name = files.name
        image, self._spacing_mm, image_ijk_to_ras = read_canonical(files.image)
        labels, _, label_ijk_to_ras = read_canonical(files.label)
        if image.shape != labels.shape or not np.allclose(image_ijk_to_ras, label_ijk_to_ras, atol=GEOMETRY_TOLERANCE_MM):
            raise UserError(
                f"Image and label of case '{self.name}' do not lie on the same grid ({image.shape} and {labels.shape} voxels). "
                "Resample the label to the image with nearest neighbor."
            )
        _check_labels(labels, num_labels=len(label_names) + 1, name=self.name)
        self._labels = torch.from_numpy(labels.astype(np.uint8))
        intensity = torch.from_numpy(image.astype(np.float32))
        factors = [max(1.0, step / own) for step, own in zip(spacing_mm, self._spacing_mm)]
        self._intensity = apply_along_axes(intensity, tuple(averaging_matrix(size, width_voxels=width) for size, width in zip(intensity.shape, factors)))
        landmarks = {key: _holds(self._labels, label_names, words) for key, words in LANDMARK_WORDS.items()}
        self._extent = measure_body(self._intensity > BODY_HU, landmarks, spacing_mm=self._spacing_mm)

    def draw(self, generator: torch.Generator, options: SynthesisOptions) -> TrainingSample:
        """A random sample; the same state of the generator gives the same one.

        Image (trilinear) and labels (nearest) share one warp. Labels are 255 above and below the scan, 0 beside it.
        """
        box_mm = random_box(self._extent, min_range_mm=options.min_range_mm, generator=generator)
        warp = random_warp(box_mm, limits=options.warp, spacing_mm=options.spacing_mm, max_voxels=options.max_voxels, generator=generator)
        index = warp.source_index(self._spacing_mm)
        flat = nearest_flat_index(index, shape=tuple(self._labels.shape))
        labels = self._labels.reshape(-1).index_select(0, flat).reshape(warp.shape)
        intensity = _trilinear(self._intensity, index)
        beside = is_outside(index, size=self._labels.shape[1], axis=1) | is_outside(index, size=self._labels.shape[2], axis=2)
        intensity[beside], labels[beside] = AIR_HU, 0
        labels[is_outside(index, size=self._labels.shape[0], axis=0)] = UNKNOWN_LABEL
        body = intensity > BODY_HU
        intensity = _recontrasted(intensity, labels, generator)
        intensity = _rescanned(intensity, body, spacing_mm=options.spacing_mm, generator=generator)
        if chance(generator, options.circular_share):
            cut_field_of_view(intensity, labels, generator=generator)
        return TrainingSample(name=self.name, intensity=intensity.clamp_(*HU_RANGE), labels=labels)


class TrainingSet(torch.utils.data.Dataset):
    """Sample n of an endless random sequence, for every n >= 0; labels as `label_names` says."""

    def __init__(
        self, *, cases: Sequence[CaseSource], anatomies: Sequence[AnatomySource], label_names: Sequence[str], options: SynthesisOptions, real_fraction: float = 0.35, seed: int = 0
    ) -> None:
        """Mix sources.

        Args:
            cases: labelled CT; every case is equally likely.
            anatomies: every anatomy is equally likely.
            label_names: classes without background, in label order.
            options: how samples are drawn.
            real_fraction: share of samples from cases where there are both kinds.
            seed: the sequence.

        Raises:
            UserError: there is no source at all, or the fraction is no share.
        """
        if not cases and not anatomies:
            raise UserError("There is nothing to train on: every case and anatomy is held out, or the folders are empty. Give more --data or hold out less.")
        if not 0 <= real_fraction <= 1:
            raise UserError(f"real_fraction is {real_fraction}, but it is a share. Use a number from 0 to 1.")
        self.label_names = list(label_names)
        self._cases, self._anatomies, self._options = list(cases), list(anatomies), options
        self._real_fraction, self._seed = real_fraction, seed

    def __getitem__(self, number: int) -> TrainingSample:
        """Sample `number`."""
        state = np.random.SeedSequence([self._seed, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> 1))
        is_real = chance(generator, self._real_fraction) if self._cases and self._anatomies else bool(self._cases)
        sources = self._cases if is_real else self._anatomies
        source = sources[int(torch.randint(len(sources), (), generator=generator))]
        return source.draw(generator, self._options)


def open_training_set(options: "TrainOptions") -> TrainingSet:
    """Load all data of a run except what is held out.

    Raises:
        UserError: a data argument, folder or file cannot be used, label lists differ, or a held-out id does not exist.
    """
    found, label_names, cases, anatomies = [], None, [], []
    for argument in options.data:
        kind, _, folder = argument.partition(":")
        if kind not in ("decathlon", "anatomies") or not folder:
            raise UserError(f"'{argument}' is not KIND:FOLDER. Write decathlon:FOLDER for labelled CT or anatomies:FOLDER for anatomies.")
        names = read_label_names(_dataset_file(Path(folder), kind))
        if label_names is not None and names != label_names:
            raise UserError(f"The label names of '{folder}' differ from those of the data before it. Bring all {DATASET_NAME} files to one list.")
        label_names = names
        if kind == "decathlon":
            files, _ = read_decathlon(Path(folder))
            found += [case.name for case in files]
            cases += [case for case in files if case.name not in options.hold_out]
        else:
            folders = read_anatomies(Path(folder))
            found += [path.name for path in folders]
            anatomies += [path for path in folders if path.name not in options.hold_out]
    for name in options.hold_out:
        if name not in found:
            raise UserError(unknown_name("held-out id", name, sorted(set(found))))
    return TrainingSet(
        cases=[CaseSource(files, label_names=label_names, spacing_mm=options.spacing_mm) for files in cases],
        anatomies=[AnatomySource(path, num_labels=len(label_names) + 1) for path in anatomies],
        label_names=label_names or (),
        options=SynthesisOptions(spacing_mm=options.spacing_mm),
        real_fraction=options.real_fraction,
        seed=options.seed,
    )


def read_decathlon(folder: Path, *, exclude: Sequence[str] = ()) -> tuple[list[CaseFiles], tuple[str, ...]]:
    """The labelled cases of a folder in Medical Segmentation Decathlon or nnU-Net layout.

    A case is named by its image file, or by the image's folder where several images share a file name.

    Args:
        folder: holds dataset.json.
        exclude: names of cases to leave out.

    Returns:
        The cases in the order of the list, and the label names in label order, background left out.

    Raises:
        UserError: dataset.json is missing or malformed, or it lists a file that is not there.
    """
    path = _dataset_file(folder, "decathlon")
    values = _read_json(path)
    try:
        pairs = [(folder / entry["image"], folder / entry["label"]) for entry in values["training"]] if "training" in values else _nnunet_pairs(folder, values)
    except (KeyError, TypeError) as error:
        raise UserError(f"The training list of '{path}' is malformed ({error!r}). Each entry needs image and label, paths relative to the folder.") from error
    for file in (file for pair in pairs for file in pair):
        if not file.is_file():
            raise UserError(f"'{path}' lists '{file.relative_to(folder)}', which is not there. Put the file back, or take its case out of the list.")
    stems = [image.name.split(".")[0].removesuffix("_0000") for image, _ in pairs]
    names = stems if len(set(stems)) == len(stems) else [image.parent.name for image, _ in pairs]
    if len(set(names)) < len(names):
        raise UserError(f"Several cases of '{path}' have the same name ({', '.join(sorted(names)[:4])}, ...). Give the image files different names.")
    cases = [CaseFiles(name=name, image=image, label=label) for name, (image, label) in zip(names, pairs) if name not in exclude]
    return cases, read_label_names(path)


def read_label_names(path: Path) -> tuple[str, ...]:
    """Label names of a dataset.json in label order, background left out.

    Raises:
        UserError: the file is malformed, or the labels are not numbered 0, 1, 2, ... with background first.
    """
    labels = _read_json(path).get("labels")
    try:
        # Decathlon: {"1": "liver"}; nnU-Net 2: {"liver": 1}
        numbered = {int(key): str(value) for key, value in labels.items()} if all(str(key).isdigit() for key in labels) else {int(value): key for key, value in labels.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' has no usable labels ({error!r}). Write them as {{\"0\": \"background\", \"1\": \"liver\", ...}}.") from error
    if sorted(numbered) != list(range(len(numbered))) or len(numbered) < 2:
        raise UserError(f"The labels of '{path}' are numbered {sorted(numbered)}. Number them 0, 1, 2, ... with background as 0.")
    return tuple(numbered[number] for number in range(1, len(numbered)))


def read_anatomies(folder: Path) -> tuple[Path, ...]:
    """The anatomy folders in a folder, sorted by name.

    Raises:
        UserError: there is none.
    """
    found = tuple(sorted(path.parent for path in folder.glob(f"*/{MAP_NAME}")))
    if not found:
        raise UserError(f"'{folder}' holds no anatomies. Give the folder whose sub-folders hold {MAP_NAME} and tissues.json.")
    return found


def _trilinear(intensity: Tensor, index: Tensor) -> Tensor:
    """Intensity at continuous source indices (3, D, H, W), the border repeated beyond it, (D, H, W)."""
    grid = torch.stack([2 * index[axis] / max(intensity.shape[axis] - 1, 1) - 1 for axis in (2, 1, 0)], dim=-1)
    return torch.nn.functional.grid_sample(intensity[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)[0, 0]


def _recontrasted(intensity: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Another scanner and contrast phase: shift, scale, gamma in the soft-tissue window, and a shift of each class."""
    if chance(generator, 0.5):
        shift_hu = torch.randn(256, generator=generator) * uniform(generator, 5, 30)
        shift_hu[[0, UNKNOWN_LABEL]] = 0.0
        intensity = intensity + shift_hu[labels.int()]
    if chance(generator, 0.3):
        low, high = GAMMA_WINDOW_HU
        share = ((intensity - low) / (high - low)).clamp(0, 1)
        intensity = intensity + (share ** uniform(generator, 0.88, 1.14) - share) * (high - low)
    return (intensity - AIR_HU) * uniform(generator, 0.96, 1.04) + AIR_HU + uniform(generator, -15, 15)


def _rescanned(intensity: Tensor, body: Tensor, *, spacing_mm: Triple_mm, generator: torch.Generator) -> Tensor:
    """Sometimes lower resolution, more blur, more noise; a real scan already has its own."""
    if chance(generator, 0.2):
        intensity = lower_resolution(intensity, generator=generator)
    if chance(generator, 0.35):
        intensity = blur(intensity, spacing_mm=spacing_mm, generator=generator)
    if chance(generator, 0.5):
        add_noise(intensity, body, generator=generator)
    return intensity


def _holds(labels: Tensor, label_names: Sequence[str], words: Sequence[str]) -> Tensor:
    """Which slices hold a label whose name contains one of the words, (D) bool."""
    chosen = torch.zeros(256, dtype=torch.bool)
    chosen[[number for number, name in enumerate(label_names, start=1) if any(word in name.lower() for word in words)]] = True
    return chosen[labels.int()].any(dim=2).any(dim=1)


def _check_labels(labels: np.ndarray, *, num_labels: int, name: str) -> None:
    """Raise UserError on a voxel that is no label."""
    found = np.unique(labels)
    strange = [value for value in found.tolist() if not (value in range(num_labels) or value == UNKNOWN_LABEL)]
    if strange:
        raise UserError(f"The label of case '{name}' holds {strange}, but {DATASET_NAME} ends at {num_labels - 1}. Add the class there, or set those voxels to 0 or to 255 (unknown).")


def _dataset_file(folder: Path, kind: str) -> Path:
    """The dataset.json of a data folder; anatomies may share the one beside their folder."""
    places = (folder, folder.parent) if kind == "anatomies" else (folder,)
    for place in places:
        if (place / DATASET_NAME).is_file():
            return place / DATASET_NAME
    raise UserError(f"'{folder}' has no {DATASET_NAME}, so its labels have no names. Give the folder that holds it, or write one in Decathlon style.")


def _read_json(path: Path) -> dict:
    """The object of a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}). Correct it in a text editor.") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no JSON object. Write one in Decathlon style, with labels and training.")
    return values


def _nnunet_pairs(folder: Path, values: dict) -> list[tuple[Path, Path]]:
    """Image and label of every case in nnU-Net's raw layout: imagesTr/NAME_0000.ENDING and labelsTr/NAME.ENDING."""
    ending = values["file_ending"]
    return [(folder / "imagesTr" / f"{path.name.removesuffix(ending)}_0000{ending}", path) for path in sorted((folder / "labelsTr").glob(f"*{ending}"))]
