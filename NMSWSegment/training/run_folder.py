"""The run folder: options.json, checkpoint.pt, and what a resumed run needs of them."""

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from NMSWSegment.files.output_file import replace_path, replaced_file
from NMSWSegment.nets.nmsw_net import NMSWNet
from NMSWSegment.protocol import UserError
from NMSWSegment.training.options import OPTIONS_NAME, TrainOptions, changed_options
from NMSWSegment.training.sparse import FusionSparsity

CHECKPOINT_NAME, BEST_NAME = "checkpoint.pt", "best.pt"
VALIDATION_KEYS = ("best_score", "best_iteration", "validations_since_best")
AVERAGE_PREFIX = "module."
"""How torch's AveragedModel names the weights of its net."""


@dataclass
class TrainingState:
    """All that changes while a run goes on. Samples and noise follow from the seed and the iteration, so they are not part of it."""

    net: NMSWNet
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    """Of the learning rate; follows from the options and the iteration."""
    sparsity: FusionSparsity | None = None
    average: torch.optim.swa_utils.AveragedModel | None = None
    """Moving average of the net."""
    iteration: int = 0
    """Optimizer steps so far."""
    best_score: float | None = None
    """Highest validation score so far; None before the first."""
    best_iteration: int = 0
    """Where it was."""
    validations_since_best: int = 0
    earlier_cases: list[str] | None = None
    """Digests of the cases and anatomies that what the run started from was trained on; None where an older version began the run and did not write them down."""


def check_run_folder(output: Path, options: TrainOptions, *, resume: bool) -> TrainOptions | None:
    """The options that the run has had so far, None for a new one; looks before anything is loaded.

    Raises:
        UserError: there is a run already, or on resume none, or one with other options than a resumed run may change.
    """
    if not resume:
        if (output / OPTIONS_NAME).exists():
            raise UserError(f"'{output}' already holds a run. Add --resume to go on with it, or give another --output.")
        return None
    previous = load_run_options(output)
    changes = changed_options(previous, options)
    if changes:
        raise UserError(f"The run in '{output}' was started with other options: {changes}. Resume with the old ones, or give another --output.")
    return previous


def write_run_options(output: Path, options: TrainOptions) -> None:
    """Write the options of a run that begins or goes on.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replaced_file(output / OPTIONS_NAME) as temporary:
            temporary.write_text(json.dumps(asdict(options), indent=2) + "\n", encoding="utf-8")
    except (OSError, UserError) as error:
        raise _disk_error(output, error) from error


def save_checkpoint(
    output: Path, state: TrainingState, *, label_names: Sequence[str], case_names: Mapping[str, Sequence[str]] = {}, name: str = CHECKPOINT_NAME
) -> None:
    """Write the checkpoint beside the old one, then replace it: a kill at any moment leaves a whole one.

    Args:
        case_names: "training" and "validation": of everything that is trained on, in the order that decides the samples, and validated on.
        name: CHECKPOINT_NAME or BEST_NAME.

    Raises:
        UserError: it cannot be written; the old one is still there.
    """
    partial = output / f"{name}.partial"
    values = {
        "net": state.net.state_dict(),
        "average": state.average.state_dict() if state.average else None,
        "optimizer": state.optimizer.state_dict(),
        "sparsity": state.sparsity.state_dict() if state.sparsity else None,
        "iteration": state.iteration,
        "validation": {key: getattr(state, key) for key in VALIDATION_KEYS},
        "label_names": list(label_names),
        "case_names": {role: list(names) for role, names in case_names.items()},
        "earlier_cases": state.earlier_cases,
        "architecture": state.net.architecture.to_dict(),
    }
    try:
        torch.save(values, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut could leave the new name with old or no content
        replace_path(partial, output / name)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError where the disk is full
        partial.unlink(missing_ok=True)
        raise _disk_error(output, error) from error


def restore_checkpoint(output: Path, state: TrainingState, *, label_names: Sequence[str], case_names: Mapping[str, Sequence[str]]) -> bool:
    """Go on where the checkpoint was written; False where the run was killed before its first checkpoint and begins again.

    Args:
        label_names, case_names: of the data that is given now, as in save_checkpoint.

    Raises:
        UserError: the data are others, or the weights are not those of these nets.
    """
    if not (output / CHECKPOINT_NAME).is_file():
        return False
    checkpoint = load_checkpoint(output)
    if list(checkpoint["label_names"]) != list(label_names):
        raise UserError(
            f"The run in '{output}' has the classes {', '.join(checkpoint['label_names'])}, the data {', '.join(label_names)}. Give the data that it had."
        )
    for role, names in checkpoint.get("case_names", {}).items():
        if names != list(case_names[role]):
            raise UserError(
                f"The {role} cases are not those that the run in '{output}' began with: {_difference(names, case_names[role])}. A resumed run needs the same cases; their folder may be another."
            )
    load_weights(state.net, checkpoint["net"], run=output)
    if state.average:
        state.average.load_state_dict(checkpoint["average"])
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    if state.sparsity:
        state.sparsity.load_state_dict(checkpoint["sparsity"])
    state.iteration = checkpoint["iteration"]
    for key, value in checkpoint.get("validation", {}).items():
        setattr(state, key, value)
    state.earlier_cases = checkpoint.get("earlier_cases")
    return True


def load_checkpoint(run: Path, name: str = CHECKPOINT_NAME) -> dict:
    """A checkpoint of a run: net, average, optimizer, sparsity, iteration, validation, label_names, case_names, earlier_cases, architecture.

    Args:
        name: CHECKPOINT_NAME, the last one, or BEST_NAME.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(run) / name
    if not path.is_file():
        raise UserError(
            f"'{run}' has no {name}. Give the folder that 'nmsw train --output' wrote; the first checkpoint comes after --checkpoint-every iterations."
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


def load_best_checkpoint(run: Path) -> dict:
    """The checkpoint that a run gives to others: the best one where it was validated, else the last one.

    Raises:
        UserError: as load_checkpoint.
    """
    return load_checkpoint(run, BEST_NAME if (Path(run) / BEST_NAME).is_file() else CHECKPOINT_NAME)


def current_weights(state: TrainingState) -> dict:
    """trained_weights of a run as it is now."""
    average, sparsity = (part.state_dict() if part else None for part in (state.average, state.sparsity))
    return trained_weights({"net": state.net.state_dict(), "average": average, "sparsity": sparsity})


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


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What two lists of names do not share."""
    parts = [(set(before) - set(now), "is missing"), (set(now) - set(before), "is new")]
    return (
        ", ".join(f"'{min(names)}'{f' and {len(names) - 1} more' if len(names) > 1 else ''} {what}" for names, what in parts if names)
        or "their order is another"
    )


def _disk_error(output: Path, error: Exception) -> UserError:
    """The sentence for a disk that takes no more."""
    what_is_left = "then go on with --resume; the last checkpoint is still there" if (output / CHECKPOINT_NAME).is_file() else "then start again"
    resume = " with --resume" if what_is_left == "then start again" and (output / OPTIONS_NAME).is_file() else ""
    return UserError(f"The run folder '{output}' cannot be written ({str(error).splitlines()[0]}). Make room on the disk, {what_is_left}{resume}.")
