"""The run folder: options.json, checkpoint.pt, and what a resumed run needs of them."""

import json
import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from NMSWSegment.nets.nmsw_net import NMSWNet
from NMSWSegment.protocol import UserError
from NMSWSegment.training.options import OPTIONS_NAME, TrainOptions, changed_options
from NMSWSegment.training.sparse import FusionSparsity

CHECKPOINT_NAME = "checkpoint.pt"
AVERAGE_PREFIX = "module."
"""How torch's AveragedModel names the weights of its net."""


@dataclass
class TrainingState:
    """All that changes while a run goes on. Samples and noise follow from the seed and the iteration, so they are not part of it."""

    net: NMSWNet
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    sparsity: FusionSparsity | None = None
    average: torch.optim.swa_utils.AveragedModel | None = None
    """Moving average of the net."""
    iteration: int = 0
    """Optimizer steps so far."""


def check_run_folder(output: Path, options: TrainOptions, *, resume: bool) -> None:
    """Look before anything is loaded.

    Raises:
        UserError: there is a run already, or on resume none, or one with other options.
    """
    if not resume:
        if (output / OPTIONS_NAME).exists():
            raise UserError(f"'{output}' already holds a run. Add --resume to go on with it, or give another --output.")
        return
    changes = changed_options(load_run_options(output), options)
    if changes:
        raise UserError(f"The run in '{output}' was started with other options: {changes}. Resume with the old ones, or give another --output.")


def create_run(output: Path, options: TrainOptions) -> None:
    """Write the options of a new run.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / OPTIONS_NAME).write_text(json.dumps(asdict(options), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _disk_error(output, error) from error


def save_checkpoint(output: Path, state: TrainingState, *, label_names: list[str]) -> None:
    """Write the checkpoint beside the old one, then replace it: a kill at any moment leaves a whole one.

    Raises:
        UserError: it cannot be written; the old one is still there.
    """
    partial = output / (CHECKPOINT_NAME + ".partial")
    values = {
        "net": state.net.state_dict(),
        "average": state.average.state_dict() if state.average else None,
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "sparsity": state.sparsity.state_dict() if state.sparsity else None,
        "iteration": state.iteration,
        "label_names": list(label_names),
        "architecture": state.net.architecture.to_dict(),
    }
    try:
        torch.save(values, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut could leave the new name with old or no content
        os.replace(partial, output / CHECKPOINT_NAME)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError where the disk is full
        partial.unlink(missing_ok=True)
        raise _disk_error(output, error) from error


def restore_checkpoint(output: Path, state: TrainingState) -> None:
    """Go on where the checkpoint was written; at the beginning where the run was killed before its first checkpoint."""
    if not (output / CHECKPOINT_NAME).is_file():
        return
    checkpoint = load_checkpoint(output)
    load_weights(state.net, checkpoint["net"], run=output)
    if state.average:
        state.average.load_state_dict(checkpoint["average"])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.schedule.load_state_dict(checkpoint["schedule"])
    if state.sparsity:
        state.sparsity.load_state_dict(checkpoint["sparsity"])
    state.iteration = checkpoint["iteration"]


def load_checkpoint(run: Path) -> dict:
    """The checkpoint of a run: net, optimizer, schedule, sparsity, iteration, label_names, architecture.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(run) / CHECKPOINT_NAME
    if not path.is_file():
        raise UserError(
            f"'{run}' has no {CHECKPOINT_NAME}. Give the folder that 'nmsw train --output' wrote; the first checkpoint comes after --checkpoint-every iterations."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"'{path}' cannot be read: it is damaged or no checkpoint. Start the run again, or give another one.") from error


def load_weights(net: torch.nn.Module, weights: dict, *, run: Path | str) -> None:
    """Give a net the weights of a run.

    Raises:
        UserError: they are those of other nets, as of an earlier version.
    """
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"The weights of the run '{run}' are not those of this version's nets ({reason}). Train it again, or use the version that made it."
        ) from error


def trained_weights(checkpoint: dict) -> dict:
    """The weights that a run ends with: the moving average where it kept one. Channels that a sparse net left out stay left out."""
    if not checkpoint.get("average"):
        return checkpoint["net"]
    weights = {key.removeprefix(AVERAGE_PREFIX): value for key, value in checkpoint["average"].items() if key.startswith(AVERAGE_PREFIX)}
    if checkpoint["sparsity"]:  # what was pruned lately has not left the average yet
        weights = {key: value * (checkpoint["net"][key] != 0) if ".nodes." in key else value for key, value in weights.items()}
    return weights


def load_run_options(run: Path) -> TrainOptions:
    """The options a run was started with.

    Raises:
        UserError: there are none, or they are damaged.
    """
    path = Path(run) / OPTIONS_NAME
    if not path.is_file():
        raise UserError(f"'{run}' has no {OPTIONS_NAME}. Give the folder that 'nmsw train --output' wrote.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error}). Start the run again in another folder.") from error
    return TrainOptions.from_dict(values)


def _disk_error(output: Path, error: Exception) -> UserError:
    """The sentence for a disk that takes no more."""
    return UserError(
        f"The run folder '{output}' cannot be written ({str(error).splitlines()[0]}). Make room on the disk, then go on with --resume; the last checkpoint is still there."
    )
