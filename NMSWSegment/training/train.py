"""Train the coarse net, the local net and the class weights together (paper section 4).

    for every volume of an iteration:
        x, labels <- a drawn sample             canonical frame, padded to its candidate grid
        losses <- the nets on x                 step.py, Eq. 7
    gradients of all volumes and processes -> one optimizer step

A run folder holds options.json, checkpoint.pt, TensorBoard logs and the cache of prepared cases; the same command with --resume
goes on where a killed run stopped, with the same samples.
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch

from NMSWSegment.nets.backbones import check_patch_size, memory_format
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet
from NMSWSegment.protocol import UserError
from NMSWSegment.training.case_cache import CaseCache
from NMSWSegment.training.datasets import TrainingSet, find_data, open_training_set, sample_generator
from NMSWSegment.training.distributed import Team, joined_team
from NMSWSegment.training.monitor import Monitor
from NMSWSegment.training.options import TrainOptions, add_option_arguments, options_from_arguments
from NMSWSegment.training.run_folder import (
    TrainingState,
    check_run_folder,
    create_run,
    load_checkpoint,
    load_initial_weights,
    restore_checkpoint,
    save_checkpoint,
)
from NMSWSegment.training.sparse import FusionSparsity, SparsityOptions
from NMSWSegment.training.step import Losses, prepare, trained_parameters, volume_losses
from NMSWSegment.training.synthesis import TrainingSample

__all__ = ["TrainOptions", "load_checkpoint", "train"]

logger = logging.getLogger(__name__)

CACHE_NAME = "cache"
NOISE = 1
"""Purpose of a sample's generator: Gumbel noise and random patches."""


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
        num_workers: processes that draw samples, for each process that trains.
        checkpoint_every, log_every, show_every: iterations between checkpoints, points, and pictures of the selection (0: none).
        cache: folder of prepared cases; None is the one in the run folder.

    Raises:
        UserError: the run folder holds a run (without resume) or other options (with it), the data, the nets or the initial run
            cannot be used, or the disk is full.
    """
    with joined_team(device) as team:
        check_run_folder(output, options, resume=resume)
        data = find_data(options)
        state = new_state(options, num_classes=len(data.label_names) + 1, team=team)
        if resume:
            restore_checkpoint(output, state)
        else:
            load_initial_weights(state, options)
        training_set = open_training_set(options, data=data, cache=CaseCache(cache or output / CACHE_NAME), team=team)
        team.wait()  # until every process has looked at the run folder
        if team.is_first and not resume:  # only now: a start that failed leaves no run behind
            create_run(output, options)
        monitor = Monitor(output, options=options, label_names=training_set.label_names, first_iteration=state.iteration) if team.is_first else None
        samples = _samples(training_set, first=state.iteration, options=options, num_workers=num_workers, team=team)
        try:
            while state.iteration < options.iterations:
                tau = temperature(state.iteration, options)
                losses = team.sum_values(train_step(state, samples, options=options, tau=tau, team=team))
                if monitor and state.iteration % log_every == 0:
                    monitor.log(state, losses, tau=tau)
                if monitor and show_every and options.train != "local" and state.iteration % show_every == 0:
                    monitor.show_selection(state, training_set[0])
                if team.is_first and (state.iteration % checkpoint_every == 0 or state.iteration == options.iterations):
                    save_checkpoint(output, state, label_names=training_set.label_names)
        finally:
            if monitor:
                monitor.close()


def temperature(iteration: int, options: TrainOptions) -> float:
    """tau of the differentiable top-k: exponentially from tau_start to tau_end."""
    return options.tau_start * (options.tau_end / options.tau_start) ** (iteration / options.iterations)


def train_step(state: TrainingState, samples: Iterator[tuple[int, TrainingSample]], *, options: TrainOptions, tau: float, team: Team) -> torch.Tensor:
    """One optimizer step on this process's share of the volumes; its share of the mean losses, in the order of Losses' fields."""
    share = 1 / options.batch_size
    values = torch.zeros(len(fields(Losses)), device=team.device)
    state.optimizer.zero_grad()
    for _ in team.share(range(options.batch_size)):
        number, sample = next(samples)
        x, labels, grid = prepare(sample, options)
        generator = sample_generator(seed=options.seed, number=number, purpose=NOISE)
        losses = volume_losses(state.net, x.to(team.device), labels.to(team.device), grid=grid, options=options, tau=tau, generator=generator)
        (losses.total * share).backward()
        values += losses.values() * share
    parameters = [parameter for parameter in state.net.parameters() if parameter.requires_grad]
    team.sum_gradients(parameters)
    state.iteration += 1
    norm = torch.nn.utils.clip_grad_norm_(parameters, options.gradient_clip)
    if torch.isfinite(norm):  # the same on all processes, because the gradients are
        state.optimizer.step()
        if state.sparsity:
            state.sparsity.step(state.iteration)
    else:  # seen now and then in bf16 on the CPU; one such step would ruin all weights
        logger.warning("%6d  the gradient is not finite; this step is left out", state.iteration)
    state.schedule.step()
    return values


def new_state(options: TrainOptions, *, num_classes: int, team: Team) -> TrainingState:
    """New nets, the same on every process, with their optimizer.

    Raises:
        UserError: the nets do not take the patch size, or there are more processes than volumes.
    """
    if options.batch_size < team.size:
        raise UserError(f"There are {team.size} processes for batch_size {options.batch_size}. Give --batch-size {team.size} or more, or start fewer processes.")
    architecture = Architecture(num_classes=num_classes, backbone=options.backbone, preset=options.preset)
    check_patch_size(options.backbone, preset=options.preset, patch_size=options.patch_size)
    torch.manual_seed(options.seed)
    net = NMSWNet(architecture).to(team.device).train()
    net.coarse.to(memory_format=torch.channels_last_3d)  # a UNet
    net.local.to(memory_format=memory_format(options.backbone))
    optimizer = torch.optim.AdamW(trained_parameters(net, options), lr=options.learning_rate, weight_decay=options.weight_decay)
    warmup = options.warmup if options.warmup * options.iterations > 1 else 0.0  # a warm-up of one step divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=options.learning_rate, total_steps=options.iterations, pct_start=warmup, cycle_momentum=False)
    thinned = SparsityOptions(iterations=options.iterations, sparsity=options.sparsity, update_every=options.sparsity_update_every) if options.sparsity else None
    sparsity = FusionSparsity(net.local.backbone, optimizer, options=thinned, seed=options.seed) if thinned else None
    return TrainingState(net=net, optimizer=optimizer, schedule=schedule, sparsity=sparsity)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw train`: how to run, and one per option."""
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="run folder")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would do, time two iterations, write nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--cache", type=Path, default=None, metavar="FOLDER", help=f"prepared cases; several runs may share it (default: RUN/{CACHE_NAME})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw samples (default: %(default)s)")
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
        from NMSWSegment.training.plan import plan_lines  # plan.py itself needs this module

        for line in plan_lines(options, output=arguments.output, cache=cache, device=arguments.device):
            print(line)
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


def _samples(training_set: TrainingSet, *, first: int, options: TrainOptions, num_workers: int, team: Team) -> Iterator[tuple[int, TrainingSample]]:
    """Number and sample of this process's volumes from iteration `first` on; a sample depends on the seed and its number alone."""
    numbers = [number for iteration in range(first, options.iterations) for number in team.share(range(iteration * options.batch_size, (iteration + 1) * options.batch_size))]
    loader = torch.utils.data.DataLoader(
        training_set,
        sampler=numbers,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_one_thread,
    )
    return iter(zip(numbers, loader))


def _one_thread(worker_index: int) -> None:
    """Workers draw on one thread each."""
    torch.set_num_threads(1)
