"""What a run would do, before it does it: cases, classes, grid, nets, memory, time, files. Writes nothing."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from NMSWSegment.data.prepared_case import Header, check_headers, prepare_case
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.model_grid import model_grid_around
from NMSWSegment.samples.prepared_set import prepared_grid, read_anatomy, read_prepared_case
from NMSWSegment.training.datasets import TrainingData, find_data, open_training_set, open_validation_cases
from NMSWSegment.training.distributed import ProcessGroup, joined_group
from NMSWSegment.training.fingerprint import fingerprint_lines, geometry_lines, read_fingerprint
from NMSWSegment.training.initial_weights import load_initial_weights, seen_sentence
from NMSWSegment.training.iteration import check_precision, new_state, temperature, train_step
from NMSWSegment.training.label_checks import few
from NMSWSegment.training.options import OPTIONS_NAME, TrainOptions
from NMSWSegment.training.run_folder import CHECKPOINT_NAME, TrainingState
from NMSWSegment.training.validation import Validation

TIMED_ITERATIONS = 2
CASES_TIMED = 2
_BYTES_PER_PARAMETER = 12  # float32: weight and the two moments of AdamW
_BYTES_PER_VOXEL = 3  # int16 intensity, uint8 label


def plan_lines(options: TrainOptions, *, output: Path, cache: Path, device: str) -> Iterator[str]:
    """The plan, line by line, the slow part (two timed iterations) last.

    Args:
        output, cache, device: as in train.train; nothing is written there.

    Raises:
        UserError: whatever would stop the run: data, headers that do not fit, nets that do not take the patch, an initial run that does not fit.
    """
    data = find_data(options)
    headers = [check_headers(request) for request in data.requests]
    for case in data.validation:
        if not isinstance(case, Path):
            check_headers(case)
    with joined_group(device) as group:
        check_precision(options, group.device)
        long_enough = replace(options, iterations=max(options.iterations, TIMED_ITERATIONS))  # a learning-rate schedule has an end
        state = new_state(long_enough, num_classes=len(data.label_names) + 1, group=group)
        load_initial_weights(state, options, label_names=data.label_names)
        yield from _data_lines(data, headers, options)
        if sentence := seen_sentence(state, {*options.hold_out, *data.validation_names}):
            yield f"Warning     {sentence}"
        yield from _class_lines(data)
        coarse, local = (sum(parameter.numel() for parameter in net.parameters()) for net in (state.net.coarse, state.net.local))
        yield f"Nets        {options.backbone} ({options.preset}), trains: {options.train}; coarse {coarse / 1e6:.2f} M, local {local / 1e6:.2f} M parameters"
        yield f"Run         {options.iterations} iterations, batch size {options.batch_size}, processes {group.size}, on {group.device.type}, {options.precision}, augmentation {options.augmentation}"
        yield from _file_lines(output, cache, headers, num_parameters=coarse + local)
        yield f"Timing      {TIMED_ITERATIONS} iterations on the first cases ..."
        seconds, draw_seconds = _timed(state, data, options=options, group=group)
        yield f"Time        {seconds:.2f} s an iteration: {_duration(seconds * options.iterations)} for all, if samples do not keep it waiting"
        yield f"            {draw_seconds:.2f} s to draw a process's samples of one iteration: {max(1, math.ceil(draw_seconds / seconds))} workers keep up"
        yield from _validation_lines(state, data, options=options, group=group, seconds=seconds)
        yield f"Memory      {_gigabytes(_peak_bytes(group.device))} at most so far{' on the GPU' if group.device.type == 'cuda' else ' in this process; every worker takes its own'}"
        yield "Nothing was written. Voxels were read of some cases only; label values of the others are checked when the run starts."


def _data_lines(data: TrainingData, headers: Sequence[Header], options: TrainOptions) -> Iterator[str]:
    """Cases, classes, grid."""
    names = [request.files.name for request in data.requests] + [entry.name for entry in data.prepared_cases]
    yield f"Cases       {len(names)} labelled {options.modality} ({few(names)}), {len(data.anatomies)} anatomies, {data.num_held_out} held out"
    yield f"Classes     {len(data.label_names)}: {', '.join(data.label_names)}"
    yield f"Grid        patches of {_times(options.patch_size)} voxels of {_times(options.spacing_mm)} mm, overlap {options.overlap:g}, coarse factor {_times(options.coarse_factor)}"
    grids = [(header.shape, header.ijk_to_lps) for header in headers] + [prepared_grid(entry) for entry in data.prepared_cases]
    if not grids:
        return
    yield from geometry_lines(grids)
    shapes = [model_grid_around(*grid, spacing_mm=options.spacing_mm).shape for grid in grids]  # LPS or RAS: as many voxels
    counts = [CandidateGrid.covering(shape, patch_size=options.patch_size, overlap=options.overlap).num_candidates for shape in shapes]
    yield f"Candidates  {min(counts)} / {np.median(counts):g} / {max(counts)} a volume (fewest, median, most)"
    small = [name for name, shape in zip(names, shapes) if any(length < size for length, size in zip(shape, options.patch_size))]
    if small:
        yield f"Warning     {len(small)} cases are smaller than a patch along some axis and are padded: {few(small)}"
    if options.augmentation == "scan" and max(math.prod(shape) for shape in shapes) > options.max_sample_voxels:
        yield f"Warning     samples hold at most {options.max_sample_voxels} voxels, fewer than the largest case ({max(math.prod(shape) for shape in shapes)}); raise --max-sample-voxels or use --augmentation paper"


def _class_lines(data: TrainingData) -> Iterator[str]:
    """What a sample of the cases holds."""
    cases = [(request.files.name, partial(prepare_case, request)) for request in data.requests]
    cases += [(entry.name, partial(read_prepared_case, entry)) for entry in data.prepared_cases]
    if cases:
        anatomies = (read_anatomy(path, num_labels=len(data.label_names) + 1) for path in data.anatomies)
        anatomy_labels = {tissue.label for anatomy in anatomies for tissue in anatomy.tissues}
        fingerprint = read_fingerprint(cases, num_classes=len(data.label_names) + 1)
        yield from fingerprint_lines(fingerprint, label_names=data.label_names, num_cases=len(cases), anatomy_labels=anatomy_labels)


def _validation_lines(state: TrainingState, data: TrainingData, *, options: TrainOptions, group: ProcessGroup, seconds: float) -> Iterator[str]:
    """What is validated on, and the share of the time that it will take.

    Args:
        seconds: of an iteration.
    """
    if not data.validation:
        yield "Validation  none: no labelled case is held out (--hold-out, or --fold with --folds or --splits)"
        return
    if not options.validate_every:
        yield "Validation  none: --validate-every is 0"
        return
    (case,) = open_validation_cases(options, data=replace(data, validation=data.validation[:1]), group=group)
    score = Validation([case], options=options, label_names=data.label_names, group=group).score(state)
    num_cases = min(options.validation_cases, len(data.validation))
    share = num_cases * score.seconds / (num_cases * score.seconds + options.validate_every * seconds * group.size)
    yield f"Validation  on {num_cases} of {len(data.validation)} held-out cases ({few(data.validation_names)}) every {options.validate_every} iterations: {score.seconds:.1f} s a case, {100 * share:.1f} % of the time"


def _file_lines(output: Path, cache: Path, headers: Sequence[Header], *, num_parameters: int) -> Iterator[str]:
    """What will be written where, and how large."""
    checkpoint_bytes = num_parameters * _BYTES_PER_PARAMETER
    yield f"Writes      {output / OPTIONS_NAME}, {output / CHECKPOINT_NAME} ({_gigabytes(checkpoint_bytes)}, twice while it is replaced), TensorBoard files"
    if headers:
        yield f"            {cache}: about {_gigabytes(sum(math.prod(header.shape) for header in headers) * _BYTES_PER_VOXEL)} of prepared cases, twice that where fine slices are averaged"


def _timed(state: TrainingState, data: TrainingData, *, options: TrainOptions, group: ProcessGroup) -> tuple[float, float]:
    """Seconds of an iteration and of drawing its samples; of the last one, because the first warms up."""
    first_cases = replace(data, requests=data.requests[:CASES_TIMED], prepared_cases=data.prepared_cases[:CASES_TIMED], anatomies=data.anatomies[:CASES_TIMED])
    training_set = open_training_set(options, data=first_cases)
    for iteration in range(TIMED_ITERATIONS):
        started = time.perf_counter()
        numbers = group.share(range(iteration * options.batch_size, (iteration + 1) * options.batch_size))
        samples = [(number, training_set[number]) for number in numbers]
        drawn = time.perf_counter()
        float(train_step(state, iter(samples), options=options, tau=temperature(0, options), group=group).sum())  # waits for the GPU
        stepped = time.perf_counter()
    return stepped - drawn, drawn - started


def _peak_bytes(device: torch.device) -> int:
    """Most memory that was in use: of the GPU, or of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _times(values: Sequence[float]) -> str:
    """'64 x 64 x 32'."""
    return " x ".join(f"{value:g}" for value in values)


def _gigabytes(num_bytes: int) -> str:
    """'1.53 GB'; what is not known says so."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes else "not known on this system,"


def _duration(seconds: float) -> str:
    """'3 h 25 min' or '12 min'."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(minutes, 1)} min"
