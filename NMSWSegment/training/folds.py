"""Which cases a run learns from and which it is validated on: k folds by name, or nnU-Net's splits_final.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from NMSWSegment.protocol import UserError, unknown_name
from NMSWSegment.training.options import TrainOptions


@dataclass(frozen=True)
class CaseRoles:
    """Names of cases and anatomies that are not trained on; everything else is."""

    validation: frozenset[str]
    """What the run is validated on."""
    left_out: frozenset[str]
    """What takes no part at all."""


def case_roles(options: TrainOptions, *, case_names: Sequence[str], anatomy_names: Sequence[str]) -> CaseRoles:
    """The roles of all cases of a run; an anatomy has the role of the case of the same name, and is for training where there is none.

    Without a fold the held-out cases are the validation cases; with one they take no part.

    Raises:
        UserError: a name does not exist, there are fewer cases than folds, or the file of splits cannot be used.
    """
    known = sorted({*case_names, *anatomy_names})
    for name in options.hold_out:
        if name not in known:
            raise UserError(unknown_name("held-out id", name, known))
    held_out = frozenset(options.hold_out)
    if options.fold is None:
        return CaseRoles(validation=held_out, left_out=frozenset())
    names = sorted(set(case_names) - held_out)
    if options.splits:
        training, validation = _read_split(Path(options.splits), fold=options.fold, names=sorted(set(case_names)))
        return CaseRoles(validation=validation - held_out, left_out=held_out | (frozenset(names) - training - validation))
    if len(names) < options.folds:
        raise UserError(f"There are {len(names)} labelled cases for {options.folds} folds. Give --folds {max(len(names), 2)} or fewer, or more --data.")
    return CaseRoles(validation=frozenset(names[options.fold :: options.folds]), left_out=held_out)


def _read_split(path: Path, *, fold: int, names: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Training and validation names of a fold in nnU-Net's splits_final.json."""
    try:
        splits = [(frozenset(split["train"]), frozenset(split["val"])) for split in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise UserError(f"The splits '{path}' cannot be read ({error.strerror}). Give nnU-Net's splits_final.json after --splits.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'\'{path}\' is no list of splits ({error!r}). Write them as nnU-Net does: [{{"train": ["a", "b"], "val": ["c"]}}, ...].') from error
    if fold >= len(splits):
        raise UserError(f"'{path}' has {len(splits)} splits, but --fold is {fold}. Give a number from 0 to {len(splits) - 1}.")
    training, validation = splits[fold]
    for name in sorted(training | validation):
        if name not in names:
            raise UserError(unknown_name(f"case in '{path}'", name, list(names)))
    if training & validation:
        raise UserError(f"Split {fold} of '{path}' has '{min(training & validation)}' for training and for validation. Take it out of one of the two lists.")
    if not validation:
        raise UserError(f"Split {fold} of '{path}' has no case for validation. Put some in its list val, or give another --fold.")
    return training, validation
