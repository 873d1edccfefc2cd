"""One iteration of a run: the nets with their optimizer, and a step on one batch of volumes."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import fields

import torch

from NMSWSegment.data.training_sample import TrainingSample
from NMSWSegment.engine.aggregation import CLASS_WEIGHT_BOUNDS
from NMSWSegment.nets.backbones import check_patch_size, memory_format
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.training_set import sample_generator
from NMSWSegment.training.distributed import ProcessGroup
from NMSWSegment.training.initial_weights import kept_fusion_channels
from NMSWSegment.training.options import SGD, TrainOptions
from NMSWSegment.training.run_folder import TrainingState
from NMSWSegment.training.sparse import FusionSparsity, SparsityOptions
from NMSWSegment.training.step import Losses, TrainingVolume, prepare, trained_parameters, volume_losses

logger = logging.getLogger(__name__)

CLASS_WEIGHT_RATE = 30.0
"""Learning rate of c of Eq. 6 under AdamW as a multiple of the nets': a step is about as large as the rate, and c has to move by whole units (D24)."""
SGD_MOMENTUM, POLYNOMIAL_POWER = 0.99, 0.9
"""Source: nnU-Net (Isensee et al. 2021); E2ENet, section 4.1, uses both."""
NOISE = 1
"""Purpose of a sample's generator: Gumbel noise and random patches."""


def new_state(options: TrainOptions, *, num_classes: int, group: ProcessGroup) -> TrainingState:
    """New nets, the same on every process, with their optimizer.

    Raises:
        UserError: the nets do not take the patch size, or there are more processes than volumes.
    """
    if options.batch_size < group.size:
        raise UserError(
            f"There are {group.size} processes for batch_size {options.batch_size}. Give --batch-size {group.size} or more, or start fewer processes."
        )
    architecture = Architecture(
        num_classes=num_classes,
        backbone=options.backbone,
        preset=options.preset,
        cascade=options.cascade,
        fusion_channels=kept_fusion_channels(options),
    )
    check_patch_size(options.backbone, preset=options.preset, patch_size=options.patch_size)
    torch.manual_seed(options.seed)
    net = NMSWNet(architecture).to(group.device).train()
    if group.device.type == "cuda" or options.precision == "bf16":  # in fp32 without AVX-512 channels last costs the coarse net two fifths more
        net.coarse.to(memory_format=torch.channels_last_3d)
    net.local.to(memory_format=memory_format(options.backbone))
    optimizer = _new_optimizer(net, options, fused=group.device.type == "cuda")
    sparsified = (
        SparsityOptions(iterations=options.iterations, sparsity=options.sparsity, update_every=options.sparsity_update_every) if options.sparsity else None
    )
    sparsity = FusionSparsity(net.local.backbone, optimizer, options=sparsified, seed=options.seed) if sparsified else None
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=moving_average(options.ema)) if options.ema else None
    return TrainingState(net=net, optimizer=optimizer, schedule=new_schedule(optimizer, options), sparsity=sparsity, average=average)


def moving_average(decay: float) -> Callable[[list[torch.Tensor], list[torch.Tensor], torch.Tensor], None]:
    """How AveragedModel takes the weights of another step into the average.

    The decay of step n is (1 + n) / (10 + n) at most: an average over the last tenth of the run, so that a short run does not export its first weights.
    """

    @torch.no_grad()
    def take_in(averages: list[torch.Tensor], weights: list[torch.Tensor], num_averaged: torch.Tensor) -> None:
        share = 1 - min(decay, (1 + int(num_averaged)) / (10 + int(num_averaged)))
        for average, weight in zip(averages, weights):
            average.lerp_(weight, share) if average.is_floating_point() else average.copy_(weight)

    return take_in


def new_schedule(optimizer: torch.optim.Optimizer, options: TrainOptions, *, iteration: int = 0) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of a run of options.iterations from an iteration on; what came before does not matter."""
    if options.optimizer == SGD:
        for group in optimizer.param_groups:
            group["initial_lr"] = options.learning_rate * group["rate"]
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: max(0.0, 1 - done / options.iterations) ** POLYNOMIAL_POWER, last_epoch=iteration - 1)
    warmup = options.warmup if options.warmup * options.iterations > 1 else 0.0  # a warm-up of one step divides by zero
    max_lr = [options.learning_rate * group["rate"] for group in optimizer.param_groups]  # see _parameter_groups
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=max_lr, total_steps=options.iterations, pct_start=warmup, cycle_momentum=False, last_epoch=iteration - 1
    )


def _new_optimizer(net: NMSWNet, options: TrainOptions, *, fused: bool) -> torch.optim.Optimizer:
    """What the options say, for what the run trains."""
    groups = _parameter_groups(net, options)
    if options.optimizer == SGD:
        return torch.optim.SGD(groups, lr=options.learning_rate, weight_decay=options.weight_decay, momentum=SGD_MOMENTUM, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=fused)


def _parameter_groups(net: NMSWNet, options: TrainOptions) -> list[dict]:
    """What the run trains: weights of the nets, and the class weights at a rate and without a decay of their own."""
    trained = trained_parameters(net, options)
    nets = [parameter for parameter in trained if parameter is not net.class_weights]
    groups = [{"params": nets, "rate": 1.0}] if nets else []
    if len(nets) < len(trained):
        groups.append({"params": [net.class_weights], "rate": 1.0 if options.optimizer == SGD else CLASS_WEIGHT_RATE, "weight_decay": 0.0})
    return groups


def train_step(state: TrainingState, samples: Iterator[tuple[int, TrainingSample]], *, options: TrainOptions, tau: float, group: ProcessGroup) -> torch.Tensor:
    """One optimizer step on this process's share of the volumes; its share of the mean losses, in the order of Losses' fields."""
    values = torch.zeros(len(fields(Losses)), device=group.device)
    state.optimizer.zero_grad()
    for _ in group.share(range(options.batch_size)):  # one volume after the other: the losses do not depend on which ones a process has
        volume = _on_device(*next(samples), options=options, device=group.device)
        losses = volume_losses(state.net, volume, options=options, tau=tau)
        (losses.total / options.batch_size).backward()
        values += losses.values() / options.batch_size
    parameters = [parameter for parameter in state.net.parameters() if parameter.requires_grad]
    group.sum_gradients(parameters)
    state.iteration += 1
    norm = torch.nn.utils.clip_grad_norm_(parameters, options.gradient_clip)
    if torch.isfinite(norm):  # the same on all processes, because the gradients are
        state.optimizer.step()
        with torch.no_grad():  # beyond its bounds c has no gradient, and would stay there for good
            state.net.class_weights.clamp_(*CLASS_WEIGHT_BOUNDS)
        if state.sparsity:
            state.sparsity.step(state.iteration)
        if state.average:
            state.average.update_parameters(state.net)
    else:  # one such step would ruin all weights
        logger.warning("%6d  the gradient is not finite; this step is left out", state.iteration)
    state.schedule.step()
    return values


def check_precision(options: TrainOptions, device: torch.device) -> None:
    """Raise UserError for bf16 on a CPU that only emulates it: gradients there differ from run to run and are sometimes not finite."""
    if options.precision == "bf16" and device.type == "cpu" and not has_amx():
        raise UserError("precision is bf16 on a CPU without AMX, where its gradients are not reproducible. Use --precision fp32, or a GPU with --device cuda.")


def has_amx() -> bool:
    """Whether the processor multiplies bf16 matrices itself; there bf16 trains at twice the speed of fp32, the same bit for bit in every run (measured)."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # torch before 2.5 does not tell


def temperature(iteration: int, options: TrainOptions) -> float:
    """tau of the differentiable top-k: exponentially from tau_start to tau_end."""
    return options.tau_start * (options.tau_end / options.tau_start) ** (iteration / options.iterations)


def _on_device(number: int, sample: TrainingSample, *, options: TrainOptions, device: torch.device) -> TrainingVolume:
    """A drawn sample as the nets take it, with the generator of its number."""
    x, labels, grid = prepare(sample.to(device), options)
    return TrainingVolume(x=x, labels=labels, grid=grid, generator=sample_generator(seed=options.seed, number=number, purpose=NOISE))
