"""Training data: the labelled volumes and anatomies of a run, found, checked and opened."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from NMSWSegment.data.case_cache import CaseCache, entry_label_voxels, label_voxels
from NMSWSegment.data.layouts import CT, KINDS, CaseFiles, Cases, dataset_file, read_cases, read_label_names, read_modality
from NMSWSegment.data.prepared_case import CaseRequest, PreparedCase, prepare_case
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.augment import PaperIntensity
from NMSWSegment.samples.case_memory import CaseMemory
from NMSWSegment.samples.case_source import CaseSource
from NMSWSegment.samples.pathology import ABDOMINAL_WORDS, BONE_WORDS, LUNG_WORDS, labels_with
from NMSWSegment.samples.prepared_set import prepared_entries, read_anatomy, read_prepared_case
from NMSWSegment.samples.synthesis import MAP_NAME, AnatomySource, PreparedAnatomy, SynthesisOptions
from NMSWSegment.samples.training_set import TrainingSet, check_not_empty
from NMSWSegment.training.distributed import ProcessGroup
from NMSWSegment.training.folds import case_roles
from NMSWSegment.training.label_checks import label_warnings
from NMSWSegment.training.options import MR, TrainOptions
from NMSWSegment.training.worker_processes import in_workers

logger = logging.getLogger(__name__)

ANATOMIES, PREPARED = "anatomies", "prepared"


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and what it is validated on; lists only, no voxel is read yet."""

    requests: tuple[CaseRequest, ...]
    """Labelled volumes."""
    prepared_cases: tuple[Path, ...]
    """Labelled volumes in folders of prepared data."""
    anatomies: tuple[Path, ...]
    """Folders of tissue maps, prepared or not."""
    label_names: tuple[str, ...]
    """Classes without background, in label order."""
    num_held_out: int
    """Cases and anatomies that are not trained on."""
    validation: tuple[CaseRequest | Path, ...] = ()
    """Labelled CT that is not trained on, sorted by name: requests, and cases in folders of prepared data."""

    @property
    def training_names(self) -> list[str]:
        """Names of everything that is trained on, in the order that decides the samples."""
        return [_name(source) for source in (*self.requests, *self.prepared_cases, *self.anatomies)]

    @property
    def validation_names(self) -> list[str]:
        """Names of the cases to validate on."""
        return [_name(source) for source in self.validation]


def find_data(options: TrainOptions) -> TrainingData:
    """All cases and anatomies of a run.

    Raises:
        UserError: a data argument, folder or list cannot be used, the data is of another modality, label lists differ, a held-out id does not
            exist, the folds do not fit, or nothing is left to train on.
    """
    label_names, requests, prepared, anatomies = None, [], [], []
    for argument in options.data:
        kind, _, folder = argument.partition(":")
        if kind == PREPARED:
            entries, folders = prepared_entries(Path(folder))
            prepared += entries
            anatomies += folders
            names, modality = read_label_names(dataset_file(Path(folder))), read_modality(dataset_file(Path(folder)))
        elif kind == ANATOMIES:
            anatomies += read_anatomies(Path(folder))
            names, modality = read_label_names(dataset_file(Path(folder), also=(Path(folder).parent,))), CT
        else:
            cases = read_cases(argument, subset=options.subset)
            requests += [_request(files, cases) for files in cases.files]
            names, modality = cases.label_names, cases.modality
        if modality and (modality == CT) != (options.modality == CT):
            raise UserError(
                f"The data '{argument}' is {modality}, but the modality of the run is {options.modality}. Give --modality {MR if options.modality == CT else CT}, or leave this data out: one run learns one modality."
            )
        if label_names is not None and names != label_names:
            raise UserError(
                f"The label names of '{folder}' differ from those of the data before it ({_first_difference(label_names, names)}). Bring all data to one list."
            )
        label_names = names
    if anatomies and options.modality != CT:
        raise UserError(f"Anatomies are synthesized as CT, but the modality of the run is {options.modality}. Leave them out.")
    labelled = [*requests, *prepared]
    roles = case_roles(options, case_names=[_name(case) for case in labelled], anatomy_names=[_name(anatomy) for anatomy in anatomies])
    held_out = roles.validation | roles.left_out
    used = [tuple(source for source in sources if _name(source) not in held_out) for sources in (requests, prepared, anatomies)]
    num_used = sum(map(len, used))
    check_not_empty(range(num_used))
    validation = tuple(sorted((case for case in labelled if _name(case) in roles.validation), key=_name))
    return TrainingData(*used, label_names=label_names, num_held_out=len(labelled) + len(anatomies) - num_used, validation=validation)


def open_training_set(
    options: TrainOptions,
    *,
    data: TrainingData | None = None,
    cache: CaseCache | None = None,
    group: ProcessGroup | None = None,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> TrainingSet:
    """Check every case and anatomy and make their samples available.

    Args:
        options: of the run.
        data: what to open; None is find_data(options).
        cache: where prepared cases are kept; None keeps them in memory.
        group: processes that share the work of filling the cache.
        num_workers: of each of these processes, for the same work.
        device: where samples are drawn.

    Raises:
        UserError: a case or an anatomy cannot be used, or the cache cannot be written.
    """
    data = data or find_data(options)
    if cache and group:
        _fill_cache(data.requests, cache=cache, group=group, num_workers=num_workers)
    paper_intensity = PaperIntensity(window=_bounds(options)) if options.augmentation == "paper" else None
    memory = CaseMemory(spacing_mm=options.spacing_mm, bounds=_bounds(options), normalization=options.normalization, device=device)
    anatomies = [read_anatomy(path, num_labels=len(data.label_names) + 1) for path in data.anatomies]
    cases = [*data.requests, *data.prepared_cases]
    if cache:
        _check_labels(cases, anatomies, cache=cache, label_names=data.label_names, is_first=group is None or group.is_first)
    return TrainingSet(
        cases=[CaseSource(_name(case), _loader(case, cache), memory=memory, paper_intensity=paper_intensity) for case in cases],
        anatomies=[AnatomySource(anatomy, device=device) for anatomy in anatomies],
        label_names=data.label_names,
        options=SynthesisOptions(
            spacing_mm=options.spacing_mm,
            max_voxels=options.max_sample_voxels,
            abdominal_labels=labels_with(data.label_names, ABDOMINAL_WORDS),
            lung_labels=labels_with(data.label_names, LUNG_WORDS),
            bone_labels=labels_with(data.label_names, BONE_WORDS),
        ),
        real_fraction=options.real_fraction,
        seed=options.seed,
    )


def open_validation_cases(
    options: TrainOptions, *, data: TrainingData, group: ProcessGroup, cache: CaseCache | None = None, num_workers: int = 0
) -> list[CaseSource]:
    """The cases to validate on, checked; none where the run validates nothing. They are read again at every validation.

    Raises:
        UserError: as open_training_set.
    """
    if not options.validate_every:
        return []
    places = np.linspace(0, len(data.validation) - 1, min(options.validation_cases, len(data.validation))).round().astype(int)
    chosen = [data.validation[place] for place in places]
    if cache:
        _fill_cache([case for case in chosen if isinstance(case, CaseRequest)], cache=cache, group=group, num_workers=num_workers)
    memory = CaseMemory(spacing_mm=options.spacing_mm, bounds=_bounds(options), normalization=options.normalization, device=group.device, max_bytes=0)
    return [CaseSource(_name(case), _loader(case, cache), memory=memory) for case in chosen]


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


def _bounds(options: TrainOptions) -> tuple[float, float]:
    """Intensities beyond which the nets see nothing."""
    return options.intensity_points[0][0], options.intensity_points[-1][0]


def _request(files: CaseFiles, cases: Cases) -> CaseRequest:
    """A case of the run."""
    return CaseRequest(files=files, label_names=cases.label_names, unknown_value=cases.unknown_value)


def _name(source: CaseRequest | Path) -> str:
    """What a case or an anatomy is called."""
    return source.name if isinstance(source, Path) else source.files.name


def _check_labels(
    cases: Sequence[CaseRequest | Path], anatomies: Sequence[PreparedAnatomy], *, cache: CaseCache, label_names: Sequence[str], is_first: bool
) -> None:
    """Log what is odd about the labels; UserError where a case has none."""
    counted = [(_name(case), _label_voxels(case, cache)) for case in cases]
    anatomy_labels = {tissue.label for anatomy in anatomies for tissue in anatomy.tissues}
    for sentence in label_warnings(counted, anatomy_labels=anatomy_labels, label_names=label_names):
        if is_first:
            logger.warning("%s", sentence)


def _label_voxels(case: CaseRequest | Path, cache: CaseCache) -> dict[int, int]:
    """Voxels of every label of a case; one whose entry is damaged is read as training would read it."""
    try:
        return entry_label_voxels(case if isinstance(case, Path) else cache.ensure(case))
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError):
        return label_voxels(_loader(case, cache)().labels)


def _fill_cache(requests: Sequence[CaseRequest], *, cache: CaseCache, group: ProcessGroup, num_workers: int) -> None:
    """Read what is not in the cache yet, each process its share."""
    missing = [request for request in group.share(requests) if not cache.holds(request)]
    for number, _ in enumerate(in_workers(cache.ensure, missing, num_workers=min(num_workers, len(missing))), start=1):
        logger.info("Case %s is read, %d of %d", missing[number - 1].files.name, number, len(missing))
    group.wait()


def _loader(case: CaseRequest | Path, cache: CaseCache | None) -> Callable[[], PreparedCase]:
    """What reads a case, checked now: from prepared data, from the cache, or from memory where there is none."""
    if isinstance(case, Path):
        return partial(read_prepared_case, case)
    if cache:
        return partial(cache.load, case, cache.ensure(case))
    prepared = prepare_case(case)
    return lambda: prepared


def _first_difference(first: Sequence[str], second: Sequence[str]) -> str:
    """The first label in which two lists differ."""
    for value, (one, other) in enumerate(zip(first, second), start=1):
        if one != other:
            return f"label {value} is '{one}' and '{other}'"
    return f"{len(first)} and {len(second)} labels"
