"""Train the coarse net, the local net and the class weights together (paper section 4).

    for every volume of an iteration:
        x, labels <- a drawn sample             model grid, padded to its candidate grid
        losses <- the nets on x                 step.py, Eq. 7
    gradients of all volumes and processes -> one optimizer step
    now and then: the DSC on held-out cases     validation.py; the best weights are kept

A run folder holds options.json, checkpoint.pt, best.pt, TensorBoard logs and the cache of prepared cases; the same command with --resume
goes on where a killed run stopped, with the same samples.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from NMSWSegment.console import say
from NMSWSegment.data.case_cache import CaseCache
from NMSWSegment.data.training_sample import TrainingSample
from NMSWSegment.files.folder_lock import locked_folder
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.training_set import TrainingSet
from NMSWSegment.training.datasets import find_data, open_training_set, open_validation_cases
from NMSWSegment.training.distributed import ProcessGroup, joined_group
from NMSWSegment.training.initial_weights import load_initial_weights, seen_sentence
from NMSWSegment.training.iteration import check_precision, new_schedule, new_state, temperature, train_step
from NMSWSegment.training.monitor import Monitor
from NMSWSegment.training.options import TrainOptions, add_option_arguments, options_from_arguments
from NMSWSegment.training.plan import plan_lines
from NMSWSegment.training.run_folder import (
    BEST_NAME,
    TrainingState,
    check_run_folder,
    load_checkpoint,
    restore_checkpoint,
    save_checkpoint,
    write_run_options,
)
from NMSWSegment.training.validation import Validation, is_best, is_due, is_finished
from NMSWSegment.training.worker_processes import in_workers, lost_workers_explained

__all__ = ["TrainOptions", "load_checkpoint", "train"]

logger = logging.getLogger(__name__)

CACHE_NAME = "cache"


def train(
    options: TrainOptions,
    *,
    output: Path,
    device: str = "cpu",
    num_workers: int = 1,
    checkpoint_every: int = 200,
    log_every: int = 10,
    show_every: int = 500,
    resume: bool = False,
    cache: Path | None = None,
) -> None:
    """Run the training loop until options.iterations and leave the run folder behind.

    Args:
        output: run folder; shared by all processes.
        num_workers: processes that read cases and draw samples, for each process that trains; 0 does so in the training process, on its device.
        checkpoint_every, log_every, show_every: iterations between checkpoints, points, and pictures of the selection (0: none).
        cache: folder of prepared cases; None is the one in the run folder.

    Raises:
        UserError: the run folder holds a run (without resume) or other options (with it), or another process trains there, the data, the nets or the initial run
            cannot be used, or the disk is full.
    """
    with joined_group(device) as group, lost_workers_explained(), ExitStack() as held:
        check_precision(options, group.device)
        previous = check_run_folder(output, options, resume=resume)
        data = find_data(options)
        names = {"label_names": data.label_names, "case_names": {"training": data.training_names, "validation": data.validation_names}}
        state = new_state(options, num_classes=len(data.label_names) + 1, group=group)
        if resume and restore_checkpoint(output, state, **names):
            if state.iteration > options.iterations:
                raise UserError(
                    f"The run in '{output}' has {state.iteration} iterations already, but --iterations is {options.iterations}. Give as many or more."
                )
            if is_finished(state, options):
                _say(group, f"The run in '{output}' is finished: {_end(state, options)}")
                return
            state.schedule = new_schedule(state.optimizer, options, iteration=state.iteration)
        else:
            load_initial_weights(state, options, label_names=data.label_names)
        if sentence := seen_sentence(state, {*options.hold_out, *data.validation_names}):
            _say(group, sentence)
        drawn_on = group.device if num_workers == 0 else "cpu"
        case_cache = CaseCache(cache or output / CACHE_NAME)
        training_set = open_training_set(options, data=data, cache=case_cache, group=group, num_workers=num_workers, device=drawn_on)
        held_out = open_validation_cases(options, data=data, cache=case_cache, group=group, num_workers=num_workers)
        validation = Validation(held_out, options=options, label_names=training_set.label_names, group=group) if held_out else None
        group.wait()  # until every process has looked at the run folder
        if group.is_first:
            held.enter_context(locked_folder(output))
        if previous and previous.iterations != options.iterations:
            _say(group, _other_length(state, previous, options))
        if group.is_first and options != previous:  # only now: a start that failed leaves no run behind
            write_run_options(output, options)
        monitor = Monitor(output, options=options, label_names=training_set.label_names, first_iteration=state.iteration) if group.is_first else None
        samples = _samples(training_set, first=state.iteration, options=options, num_workers=num_workers, group=group)
        try:
            while not is_finished(state, options):
                tau = temperature(state.iteration, options)
                losses = group.sum_values(train_step(state, samples, options=options, tau=tau, group=group))
                score = validation.score(state) if validation and is_due(state.iteration, options) else None
                if score and is_best(state, score) and group.is_first:
                    save_checkpoint(output, state, **names, name=BEST_NAME)
                if monitor:
                    monitor.count(losses)
                if monitor and (score or state.iteration % log_every == 0):
                    monitor.log(state, tau=tau, score=score)
                if monitor and show_every and options.train != "local" and state.iteration % show_every == 0:
                    monitor.show_selection(state, training_set[0])
                if group.is_first and (state.iteration % checkpoint_every == 0 or is_finished(state, options)):
                    save_checkpoint(output, state, **names)
            if state.iteration < options.iterations:
                _say(group, f"The run ends here: {_end(state, options)}")
        finally:
            if monitor:
                monitor.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw train`: how to run, and one per option."""
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="run folder")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would do, time two iterations, write nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--cache", type=Path, default=None, metavar="FOLDER", help=f"prepared cases; several runs may share it (default: RUN/{CACHE_NAME})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that read cases and draw samples; 0 draws them on the device that trains, the fastest on a GPU (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the training process (default: all)")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="ITERATIONS", help="default: %(default)s")
    parser.add_argument("--log-every", type=int, default=10, metavar="ITERATIONS", help="default: %(default)s")
    parser.add_argument("--show-every", type=int, default=500, metavar="ITERATIONS", help="picture of the chosen patches; 0 for none (default: %(default)s)")
    add_option_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """`nmsw train`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = options_from_arguments(arguments)
    cache = arguments.cache or arguments.output / CACHE_NAME
    if arguments.dry_run:
        for line in plan_lines(options, output=arguments.output, cache=cache, device=arguments.device):
            say(line)
        return 0
    train(
        options,
        output=arguments.output,
        device=arguments.device,
        num_workers=arguments.workers,
        checkpoint_every=arguments.checkpoint_every,
        log_every=arguments.log_every,
        show_every=arguments.show_every,
        resume=arguments.resume,
        cache=cache,
    )
    return 0


def _samples(training_set: TrainingSet, *, first: int, options: TrainOptions, num_workers: int, group: ProcessGroup) -> Iterator[tuple[int, TrainingSample]]:
    """Number and sample of this process's volumes from iteration `first` on; a sample depends on the seed and its number alone."""
    numbers = [
        number
        for iteration in range(first, options.iterations)
        for number in group.share(range(iteration * options.batch_size, (iteration + 1) * options.batch_size))
    ]
    is_fetched = num_workers > 0 and group.device.type == "cuda"
    return zip(numbers, in_workers(training_set.__getitem__, numbers, num_workers=num_workers, pin_memory=is_fetched))


def _say(group: ProcessGroup, text: str) -> None:
    """A line of the first process."""
    if group.is_first:
        logger.info("%s", text)


def _end(state: TrainingState, options: TrainOptions) -> str:
    """Why a run is finished, and how it can go on all the same."""
    if state.iteration < options.iterations:
        return (
            f"{state.validations_since_best} validations in a row were no better than that of iteration {state.best_iteration} "
            f"(stopped at {state.iteration} of {options.iterations} iterations). To go on, resume it with a larger --patience."
        )
    return f"it has its {options.iterations} iterations. To go on, resume it with more --iterations."


def _other_length(state: TrainingState, previous: TrainOptions, options: TrainOptions) -> str:
    """What more or fewer iterations mean for the schedule."""
    rate = state.optimizer.param_groups[0]["lr"]
    return (
        f"The run goes on from iteration {state.iteration} to {options.iterations} instead of {previous.iterations}. From here on the learning rate and the temperature "
        f"are those of a run of {options.iterations} iterations; the learning rate is now {rate:.3g}."
    )
