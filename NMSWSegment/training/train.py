"""Train the coarse net, the local net and the class weights together (paper section 4).

    x, labels <- a drawn sample             canonical frame, padded to its candidate grid
    coarse logits, importance <- coarse(x_low)
    patches <- differentiable top-k + random candidates
    y_high <- aggregate(coarse logits, local(patches))
    loss = seg(y_low) + seg(y_high) + mean_k seg(y_patch_k) - lambda H(pi)          Eq. 7

A run folder holds options.json, checkpoint.pt and TensorBoard logs; the same command with --resume goes on where a killed
run stopped, with the same samples.
"""

import argparse
import json
import logging
import os
import pickle
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from NMSWSegment.aggregation import aggregate, mixing_weights
from NMSWSegment.canonical import coarse_input, normalize_intensity, pad_to_grid, run_coarse
from NMSWSegment.grid import CandidateGrid
from NMSWSegment.nets.backbones import known_preset
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet
from NMSWSegment.protocol import UserError, reject_unknown_keys
from NMSWSegment.selection import candidate_importance, differentiable_top_k
from NMSWSegment.training.datasets import TrainingSample, TrainingSet, open_training_set
from NMSWSegment.training.losses import UNKNOWN_LABEL, entropy, segmentation_loss

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.pt"
OPTIONS_NAME = "options.json"
ESTIMATORS = ("gate", "scale")
CT_INTENSITY_POINTS = ((-1000.0, 0.0), (-200.0, 0.2), (300.0, 0.85), (1500.0, 1.0))


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides a run; stored in the run folder and compared on resume."""

    data: tuple[str, ...]
    """KIND:FOLDER, KIND being decathlon (labelled CT) or anatomies (CT synthesized on the fly)."""
    hold_out: tuple[str, ...] = ()
    """Ids of cases and anatomies that take no part in training."""
    backbone: str = "unet"
    preset: str = "compact"
    spacing_mm: tuple[float, float, float] = (3.0, 3.0, 3.0)
    """Model spacing, KJI."""
    intensity_points: tuple[tuple[float, float], ...] = CT_INTENSITY_POINTS
    """See BundleManifest.intensity_points."""
    patch_size: tuple[int, int, int] = (64, 64, 64)
    overlap: float = 0.5
    coarse_factor: tuple[int, int, int] = (2, 2, 2)
    iterations: int = 150_000
    """Optimizer steps; one volume each. The paper: 300 epochs of 500."""
    learning_rate: float = 3e-4
    weight_decay: float = 1e-5
    warmup: float = 0.2
    """Share of the iterations over which the learning rate rises; a cosine brings it down."""
    gradient_clip: float = 1.0
    top_k_patches: int = 3
    random_patches: int = 1
    estimator: str = "gate"
    """gate: the gradient of the selection is the patch's benefit; scale: through the patch's intensity, as published."""
    tau_start: float = 2.0
    tau_end: float = 0.33
    entropy_weight: float = 1e-4
    """lambda of Eq. 7."""
    real_fraction: float = 0.35
    """Share of samples drawn from labelled CT where both kinds of data are given."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast)."""
    seed: int = 0
    initial_run: str = ""
    """Run folder whose weights to start from."""

    def __post_init__(self) -> None:
        known_preset(self.preset)
        if self.estimator not in ESTIMATORS:
            raise UserError(f"Unknown estimator '{self.estimator}'. Choose from: {', '.join(ESTIMATORS)}.")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"Unknown precision '{self.precision}'. Choose from: fp32, bf16.")
        if self.iterations < 1 or self.top_k_patches + self.random_patches < 1:
            raise UserError("iterations and top_k_patches + random_patches must be at least 1.")

    @classmethod
    def from_dict(cls, values: dict) -> "TrainOptions":
        """Options from the JSON of a run folder."""
        reject_unknown_keys(cls, values, where=OPTIONS_NAME)
        return cls(**{key: _tupled(value) for key, value in values.items()})


@dataclass(frozen=True)
class Losses:
    """The terms of Eq. 7 for one volume; scalars."""

    coarse: Tensor
    high: Tensor
    patch: Tensor
    entropy: Tensor
    total: Tensor


def prepare(sample: TrainingSample, options: TrainOptions) -> tuple[Tensor, Tensor, CandidateGrid]:
    """x (1, 1, D, H, W) in [0, 1], labels (D, H, W) with padding unknown, and the grid: what inference would make of it."""
    grid = CandidateGrid.covering(tuple(sample.intensity.shape), patch_size=options.patch_size, overlap=options.overlap)
    x = pad_to_grid(normalize_intensity(sample.intensity, options.intensity_points), grid=grid, value=0)
    return x[None, None], pad_to_grid(sample.labels, grid=grid, value=UNKNOWN_LABEL), grid


def training_losses(net: NMSWNet, x: Tensor, labels: Tensor, *, grid: CandidateGrid, options: TrainOptions, tau: float, generator: torch.Generator) -> Losses:
    """Eq. 7 for one volume.

    Args:
        x: (1, 1, D, H, W); labels: (D, H, W), 255 unknown.
        generator: draws the Gumbel noise and the random candidates (CPU).
    """
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=options.precision == "bf16")
    with autocast:
        x_low = coarse_input(x, coarse_factor=options.coarse_factor)
        coarse_logits, importance_map = run_coarse(net.coarse, x_low, multiple=net.architecture.coarse_multiple)
    coarse_logits, importance_map = coarse_logits.float(), importance_map.float()[0, 0]
    importance = candidate_importance(importance_map, grid=grid)
    indices, soft_weights = differentiable_top_k(importance, k=options.top_k_patches, tau=tau, generator=generator)
    indices, soft_weights = _with_random(indices, soft_weights, grid=grid, count=options.random_patches, generator=generator)
    crops = torch.stack([x[(0, slice(None), *grid.slices(index))] for index in indices])
    if options.estimator == "scale":
        crops = crops * soft_weights[:, None, None, None, None]
    with autocast:
        patch_logits = net.local(crops)
    patch_logits = patch_logits.float()
    patch_labels = torch.stack([labels[grid.slices(index)] for index in indices])
    gates = 1 + soft_weights - soft_weights.detach() if options.estimator == "gate" else None
    y_high, is_first = _high_on_patches(coarse_logits[0].detach(), patch_logits, indices=indices, grid=grid, class_weights=net.class_weights, gates=gates)
    coarse_labels = torch.nn.functional.interpolate(labels[None, None].float(), size=coarse_logits.shape[2:], mode="nearest-exact")[0].to(labels.dtype)
    coarse = segmentation_loss(coarse_logits, coarse_labels)
    high = segmentation_loss(y_high, patch_labels, mask=is_first)
    patch = torch.stack([segmentation_loss(p[None], q[None]) for p, q in zip(patch_logits, patch_labels)]).mean()
    spread = entropy(importance)
    return Losses(coarse=coarse, high=high, patch=patch, entropy=spread, total=coarse + high + patch - options.entropy_weight * spread)


def train(options: TrainOptions, *, output: Path, device: str = "cpu", num_workers: int = 1, checkpoint_every: int = 200, resume: bool = False) -> None:
    """Run the training loop until options.iterations and leave the run folder behind.

    Raises:
        UserError: the run folder holds a run (without resume) or other options (with it), or the data or the initial run
            cannot be used.
    """
    from torch.utils.tensorboard import SummaryWriter

    _check_run_folder(output, options, resume=resume)
    training_set = open_training_set(options)
    torch.manual_seed(options.seed)
    architecture = Architecture(num_classes=len(training_set.label_names) + 1, backbone=options.backbone, preset=options.preset)
    net = NMSWNet(architecture).to(device, memory_format=torch.channels_last_3d).train()  # a sixth faster in bf16
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    warmup = options.warmup if options.warmup * options.iterations > 1 else 0.0  # a warm-up of one step divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=options.learning_rate, total_steps=options.iterations, pct_start=warmup, cycle_momentum=False)
    generator = torch.Generator().manual_seed(options.seed)
    first = _restore(output, net, optimizer, schedule, generator) if resume else 0
    if not first and options.initial_run:
        _load_initial_weights(net, Path(options.initial_run))
    if not resume:  # only now: a start that failed leaves nothing behind
        output.mkdir(parents=True, exist_ok=True)
        (output / OPTIONS_NAME).write_text(json.dumps(asdict(options), indent=2) + "\n", encoding="utf-8")
    samples = _loader(training_set, first=first, options=options, num_workers=num_workers)
    started = time.monotonic()
    with SummaryWriter(str(output)) as writer:
        for iteration, sample in enumerate(samples, start=first):
            tau = options.tau_start * (options.tau_end / options.tau_start) ** (iteration / options.iterations)
            x, labels, grid = prepare(sample, options)
            losses = training_losses(net, x.to(device), labels.to(device), grid=grid, options=options, tau=tau, generator=generator)
            optimizer.zero_grad()
            losses.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), options.gradient_clip)
            if torch.isfinite(norm):
                optimizer.step()
            else:  # seen now and then in bf16 on the CPU; one such step would ruin all weights
                logger.warning("%6d  the gradient is not finite; this step is left out", iteration + 1)
            schedule.step()
            if (iteration + 1) % 10 == 0:
                _log(writer, net, losses, iteration=iteration + 1, tau=tau, seconds=(time.monotonic() - started) / (iteration + 1 - first))
            if (iteration + 1) % checkpoint_every == 0 or iteration + 1 == options.iterations:
                _save(output, net, optimizer, schedule, generator, iteration=iteration + 1, label_names=training_set.label_names)


def load_checkpoint(run: Path) -> dict:
    """The checkpoint of a run: net, optimizer, schedule, generator, iteration, label_names, architecture.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(run) / CHECKPOINT_NAME
    if not path.is_file():
        raise UserError(f"'{run}' has no {CHECKPOINT_NAME}. Give the folder that 'nmsw train --output' wrote; the first checkpoint comes after --checkpoint-every iterations.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"'{path}' cannot be read: it is damaged or no checkpoint. Start the run again, or give another one.") from error


def load_run_options(run: Path) -> TrainOptions:
    """The options a run was started with."""
    path = Path(run) / OPTIONS_NAME
    if not path.is_file():
        raise UserError(f"'{run}' has no {OPTIONS_NAME}. Give the folder that 'nmsw train --output' wrote.")
    return TrainOptions.from_dict(json.loads(path.read_text(encoding="utf-8")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw train`: one per option, with its default, and how to run it."""
    parser.add_argument("--data", action="append", required=True, metavar="KIND:FOLDER", help="decathlon:FOLDER or anatomies:FOLDER; repeat to mix")
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="run folder")
    parser.add_argument("--hold-out", default="", metavar="ID,...", help="cases and anatomies to leave out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw samples (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the training process (default: all)")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="ITERATIONS", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--spacing", type=float, nargs=3, default=None, metavar=("S", "A", "R"), help="model spacing in mm (default: 3 3 3)")
    for field in fields(TrainOptions):
        if field.type in (int, float, str):
            parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=field.default, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """`nmsw train`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    values = {field.name: getattr(arguments, field.name) for field in fields(TrainOptions) if hasattr(arguments, field.name)}
    values["data"] = tuple(arguments.data)
    values["hold_out"] = tuple(name for name in arguments.hold_out.split(",") if name)
    if arguments.spacing:
        values["spacing_mm"] = tuple(arguments.spacing)
    train(TrainOptions(**values), output=arguments.output, device=arguments.device, num_workers=arguments.workers, checkpoint_every=arguments.checkpoint_every, resume=arguments.resume)
    return 0


def _high_on_patches(coarse_logits: Tensor, patch_logits: Tensor, *, indices: list[int], grid: CandidateGrid, class_weights: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_high on the chosen patches (K, C, P, P, P), and which of their voxels no earlier patch has (K, P, P, P).

    Elsewhere y_high is y_up, which the coarse term already trains.
    """
    seen = torch.zeros(grid.padded_shape, dtype=torch.bool, device=coarse_logits.device)
    high, is_first = [], []
    for index in indices:
        box = grid.slices(index)
        high.append(aggregate(coarse_logits, patch_logits, indices=indices, grid=grid, class_weights=class_weights, box=box, gates=gates)[0])
        is_first.append(~seen[box])
        seen[box] = True
    return torch.stack(high), torch.stack(is_first)


def _with_random(indices: list[int], soft_weights: Tensor, *, grid: CandidateGrid, count: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Append uniformly drawn candidates that are not chosen yet, with soft weight 1."""
    rest = [index for index in torch.randperm(grid.num_candidates, generator=generator).tolist() if index not in indices][:count]
    return indices + rest, torch.cat([soft_weights, soft_weights.new_ones(len(rest))])


def _loader(training_set: TrainingSet, *, first: int, options: TrainOptions, num_workers: int) -> torch.utils.data.DataLoader:
    """Samples first .. iterations - 1 in order; sample n depends on the seed and n alone, so that a resumed run sees the same."""
    return torch.utils.data.DataLoader(
        training_set,
        sampler=range(first, options.iterations),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_one_thread,
    )


def _one_thread(worker_index: int) -> None:
    """Workers draw on one thread each."""
    torch.set_num_threads(1)


def _check_run_folder(output: Path, options: TrainOptions, *, resume: bool) -> None:
    """Raise UserError unless there is no run yet, or the same one on resume."""
    if resume:
        stored = load_run_options(output)
        changed = [field.name for field in fields(TrainOptions) if getattr(stored, field.name) != getattr(options, field.name)]
        if changed:
            details = ", ".join(f"{name} was {getattr(stored, name)!r}, is {getattr(options, name)!r}" for name in changed)
            raise UserError(f"The run in '{output}' was started with other options: {details}. Resume with the old ones, or give another --output.")
        return
    if (output / OPTIONS_NAME).exists():
        raise UserError(f"'{output}' already holds a run. Add --resume to go on with it, or give another --output.")


def _load_initial_weights(net: NMSWNet, run: Path) -> None:
    """Start from the weights of another run."""
    checkpoint = load_checkpoint(run)
    if checkpoint["architecture"] != net.architecture.to_dict():
        raise UserError(f"The initial_run '{run}' has other nets ({checkpoint['architecture']}) than this run ({net.architecture.to_dict()}). It needs the same classes, backbone and preset.")
    net.load_state_dict(checkpoint["net"])


def _restore(output: Path, net: NMSWNet, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, generator: torch.Generator) -> int:
    """Load the checkpoint; the iteration to go on with (0 when the run was killed before its first checkpoint)."""
    if not (output / CHECKPOINT_NAME).is_file():
        return 0
    checkpoint = load_checkpoint(output)
    net.load_state_dict(checkpoint["net"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    schedule.load_state_dict(checkpoint["schedule"])
    generator.set_state(checkpoint["generator"])
    return checkpoint["iteration"]


def _save(output: Path, net: NMSWNet, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, generator: torch.Generator, *, iteration: int, label_names: list[str]) -> None:
    """Write the checkpoint beside the old one, then replace it: a kill at any moment leaves a whole one."""
    partial = output / (CHECKPOINT_NAME + ".partial")
    torch.save(
        {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": generator.get_state(),
            "iteration": iteration,
            "label_names": list(label_names),
            "architecture": net.architecture.to_dict(),
        },
        partial,
    )
    os.replace(partial, output / CHECKPOINT_NAME)


def _log(writer: "torch.utils.tensorboard.SummaryWriter", net: NMSWNet, losses: Losses, *, iteration: int, tau: float, seconds: float) -> None:
    """One line and one set of TensorBoard points."""
    values = {field.name: float(getattr(losses, field.name).detach()) for field in fields(losses)}
    for name, value in values.items():
        writer.add_scalar(f"loss/{name}", value, iteration)
    writer.add_scalar("tau", tau, iteration)
    writer.add_scalar("seconds_per_iteration", seconds, iteration)
    writer.add_scalar("class_weight/mean", float(mixing_weights(net.class_weights.detach()).mean()), iteration)
    text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
    logger.info("%6d  %s  tau %.2f  %.2f s", iteration, text, tau, seconds)


def _tupled(value: object) -> object:
    """JSON lists as tuples, at any depth."""
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value
