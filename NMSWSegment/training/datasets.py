"""Training data: the labelled volumes and anatomies of a run, found, checked and opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from NMSWSegment.data.case_cache import CaseCache
from NMSWSegment.data.layouts import KINDS, CaseFiles, Cases, channel_name, dataset_file, read_cases, read_json, read_label_names
from NMSWSegment.data.prepared_case import CaseRequest, PreparedCase, prepare_case
from NMSWSegment.protocol import UserError, unknown_name
from NMSWSegment.samples.augment import PaperAugmentation
from NMSWSegment.samples.case_memory import CaseMemory
from NMSWSegment.samples.case_source import CaseSource
from NMSWSegment.samples.pathology import ABDOMINAL_WORDS, LUNG_WORDS, labels_with
from NMSWSegment.samples.prepared_set import prepared_entries, read_anatomy, read_prepared_case
from NMSWSegment.samples.synthesis import MAP_NAME, AnatomySource, SynthesisOptions
from NMSWSegment.samples.training_set import TrainingSet, check_not_empty
from NMSWSegment.training.distributed import ProcessGroup
from NMSWSegment.training.options import CT, MR, TrainOptions

ANATOMIES, PREPARED = "anatomies", "prepared"


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from, held-out ids left out; lists only, no voxel is read yet."""

    requests: tuple[CaseRequest, ...]
    """Labelled volumes."""
    prepared_cases: tuple[Path, ...]
    """Labelled volumes in folders of prepared data."""
    anatomies: tuple[Path, ...]
    """Folders of tissue maps, prepared or not."""
    label_names: tuple[str, ...]
    """Classes without background, in label order."""
    num_held_out: int


def find_data(options: TrainOptions) -> TrainingData:
    """All cases and anatomies of a run except what is held out.

    Raises:
        UserError: a data argument, folder or list cannot be used, the data is of another modality, label lists differ, a held-out id does not exist, or nothing is left.
    """
    found, label_names, requests, prepared, anatomies = [], None, [], [], []
    for argument in options.data:
        kind, _, folder = argument.partition(":")
        if kind == PREPARED:
            entries, folders = prepared_entries(Path(folder))
            found += [path.name for path in (*entries, *folders)]
            prepared += [path for path in entries if path.name not in options.hold_out]
            anatomies += [path for path in folders if path.name not in options.hold_out]
            names, channel = read_label_names(dataset_file(Path(folder))), channel_name(read_json(dataset_file(Path(folder))))
        elif kind == ANATOMIES:
            folders = read_anatomies(Path(folder))
            found += [path.name for path in folders]
            anatomies += [path for path in folders if path.name not in options.hold_out]
            names, channel = read_label_names(dataset_file(Path(folder), also=(Path(folder).parent,))), CT
        else:
            cases = read_cases(argument, subset=options.subset)
            found += [files.name for files in cases.files]
            requests += [_request(files, cases) for files in cases.files if files.name not in options.hold_out]
            names, channel = cases.label_names, cases.channel
        if channel and (channel.upper() == CT) != (options.modality == CT):
            raise UserError(
                f"The data '{argument}' is {channel}, but the modality of the run is {options.modality}. Give --modality {MR if options.modality == CT else CT}, or leave this data out: one run learns one modality."
            )
        if label_names is not None and names != label_names:
            raise UserError(
                f"The label names of '{folder}' differ from those of the data before it ({_first_difference(label_names, names)}). Bring all data to one list."
            )
        label_names = names
    for name in options.hold_out:
        if name not in found:
            raise UserError(unknown_name("held-out id", name, sorted(set(found))))
    if anatomies and options.modality != CT:
        raise UserError(f"Anatomies are synthesized as CT, but the modality of the run is {options.modality}. Leave them out.")
    used = (tuple(requests), tuple(prepared), tuple(anatomies))
    check_not_empty([*requests, *prepared, *anatomies])
    return TrainingData(*used, label_names=label_names, num_held_out=len(found) - sum(map(len, used)))


def open_training_set(
    options: TrainOptions,
    *,
    data: TrainingData | None = None,
    cache: CaseCache | None = None,
    group: ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> TrainingSet:
    """Check every case and anatomy and make their samples available.

    Args:
        options: of the run.
        data: what to open; None is find_data(options).
        cache: where prepared cases are kept; None keeps them in memory.
        group: processes that share the work of filling the cache.
        device: where samples are drawn.

    Raises:
        UserError: a case or an anatomy cannot be used, or the cache cannot be written.
    """
    data = data or find_data(options)
    if cache and group:
        for request in group.share(data.requests):
            cache.ensure(request)
        group.wait()
    bounds = (options.intensity_points[0][0], options.intensity_points[-1][0])
    augmentation = PaperAugmentation(window=bounds) if options.augmentation == "paper" else None
    memory = CaseMemory(spacing_mm=options.spacing_mm, bounds=bounds, normalization=options.normalization, device=device)
    loaders = [(request.files.name, _loader(request, cache)) for request in data.requests]
    loaders += [(entry.name, partial(read_prepared_case, entry)) for entry in data.prepared_cases]
    return TrainingSet(
        cases=[CaseSource(name, load, memory=memory, augmentation=augmentation) for name, load in loaders],
        anatomies=[AnatomySource(read_anatomy(path, num_labels=len(data.label_names) + 1), device=device) for path in data.anatomies],
        label_names=data.label_names,
        options=SynthesisOptions(
            spacing_mm=options.spacing_mm,
            max_voxels=options.max_sample_voxels,
            abdominal_labels=labels_with(data.label_names, ABDOMINAL_WORDS),
            lung_labels=labels_with(data.label_names, LUNG_WORDS),
        ),
        real_fraction=options.real_fraction,
        seed=options.seed,
    )


def read_anatomies(folder: Path) -> tuple[Path, ...]:
    """The anatomy folders in a folder, sorted by name.

    Raises:
        UserError: there is none.
    """
    found = tuple(sorted(path.parent for path in folder.glob(f"*/{MAP_NAME}")))
    if not found:
        raise UserError(
            f"'{folder}' holds no anatomies. Give the folder whose sub-folders hold {MAP_NAME} and tissues.json, or another kind: {', '.join(KINDS)}."
        )
    return found


def _request(files: CaseFiles, cases: Cases) -> CaseRequest:
    """A case of the run."""
    return CaseRequest(files=files, label_names=cases.label_names, unknown_value=cases.unknown_value)


def _loader(request: CaseRequest, cache: CaseCache | None) -> Callable[[], PreparedCase]:
    """What reads a case, checked now: from the cache, or from memory where there is none."""
    if cache:
        return partial(cache.load, request, cache.ensure(request))
    case = prepare_case(request)
    return lambda: case


def _first_difference(first: Sequence[str], second: Sequence[str]) -> str:
    """The first label in which two lists differ."""
    for value, (one, other) in enumerate(zip(first, second), start=1):
        if one != other:
            return f"label {value} is '{one}' and '{other}'"
    return f"{len(first)} and {len(second)} labels"
