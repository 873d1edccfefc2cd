"""Where a run's weights start: another run, the coarse net of another run, or a bundle, whose classes are matched by name."""

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from NMSWSegment.engine.runtime import read_archive
from NMSWSegment.files.bundle import Bundle, load_bundle
from NMSWSegment.nets.e2enet import with_all_channels
from NMSWSegment.nets.nmsw_net import Architecture, LocalNet, NMSWNet
from NMSWSegment.protocol import UserError
from NMSWSegment.training.label_checks import few
from NMSWSegment.training.options import SPARSE_BACKBONE, UPON_LOCAL, TrainOptions
from NMSWSegment.training.run_folder import TrainingState, load_best_checkpoint, load_run_options, load_weights, trained_weights

logger = logging.getLogger(__name__)

COARSE_PREFIX, LOCAL_PREFIX, CLASS_WEIGHTS = "coarse.", "local.", "class_weights"
IMPORTANCE_PREFIX, PRIOR_PREFIX = "coarse.importance_head.", "local.prior."
BACKGROUND = "background"


def kept_fusion_channels(options: TrainOptions) -> tuple[str, ...]:
    """What the fusion convolutions of a thinned out e2enet keep where a run without masks of its own goes on with it; empty for all (Architecture.fusion_channels).

    Such a run trains the narrow net as it is, in about a third of the time.

    Raises:
        UserError: what the run starts from cannot be read.
    """
    if options.backbone != SPARSE_BACKBONE or options.sparsity:
        return ()
    if options.initial_bundle:
        architecture = load_bundle(options.initial_bundle).manifest.architecture
    elif options.initial_run:
        architecture = load_best_checkpoint(Path(options.initial_run))["architecture"]
    else:
        return ()
    return Architecture(**architecture).fusion_channels


def load_initial_weights(state: TrainingState, options: TrainOptions, *, label_names: Sequence[str]) -> None:
    """Start from initial_bundle or initial_run (with its masks where both are sparse); then take the coarse net of coarse_run.

    Args:
        label_names: classes of the run without background, in label order.

    Raises:
        UserError: one of them cannot be read, or has nets of another size, other classes (runs), another backbone (not coarse_run), or another sparsity.
    """
    net = state.net
    if options.initial_bundle:
        bundle = load_bundle(options.initial_bundle)
        net.load_state_dict(_bundle_weights(bundle, net, label_names=label_names, needs_local=options.train in UPON_LOCAL))
        if state.sparsity and Architecture(**bundle.manifest.architecture).fusion_channels:
            state.sparsity.take_masks(net.local.backbone)
    if options.initial_run:
        checkpoint = _fitting_checkpoint("initial_run", options.initial_run, net.architecture, label_names=label_names)
        load_weights(net, trained_weights(checkpoint), run=options.initial_run)
        if state.sparsity and checkpoint["sparsity"]:
            if (sparsity := load_run_options(options.initial_run).sparsity) != options.sparsity:
                raise UserError(
                    f"The initial_run '{options.initial_run}' has sparsity {sparsity:g}, this run {options.sparsity:g}. Give the same --sparsity, or start from a run without."
                )
            state.sparsity.load_state_dict(checkpoint["sparsity"])
    if options.coarse_run:
        weights = trained_weights(_fitting_checkpoint("coarse_run", options.coarse_run, net.architecture, label_names=label_names))
        weights = {key.removeprefix(COARSE_PREFIX): value for key, value in weights.items() if key.startswith(COARSE_PREFIX)}
        load_weights(net.coarse, weights, run=options.coarse_run)
    if state.average:
        state.average.module.load_state_dict(net.state_dict())
    state.earlier_cases = sorted(_earlier_cases(options))


def case_digest(name: str) -> str:
    """What tells a case without its name, which may be that of a person: bundles are passed on."""
    return hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]


def learned_cases(checkpoint: dict, *, run: Path) -> set[str]:
    """Digests of the cases and anatomies that the weights of a run were trained on, there or in what it started from, as far as that is known."""
    earlier = checkpoint.get("earlier_cases")
    names = checkpoint.get("case_names", {}).get("training", ())
    return {*map(case_digest, names), *(_earlier_cases(load_run_options(run)) if earlier is None else earlier)}


def seen_sentence(state: TrainingState, held_out: Collection[str]) -> str:
    """A sentence about the held-out cases that what the run started from was trained on; empty where there is none."""
    seen = sorted(name for name in held_out if case_digest(name) in (state.earlier_cases or ()))
    if not seen:
        return ""
    return f"What this run starts from was trained on {len(seen)} of its held-out cases ({few(seen)}): their scores are too good, and the bundle will not call them held out."


def _earlier_cases(options: TrainOptions) -> set[str]:
    """learned_cases of all that a run starts from; older bundles do not say theirs."""
    cases = set(load_bundle(options.initial_bundle).manifest.training.get("case_digests", ())) if options.initial_bundle else set()
    for run in map(Path, filter(None, (options.initial_run, options.coarse_run))):
        try:
            cases |= learned_cases(load_best_checkpoint(run), run=run)
        except UserError as error:
            logger.warning("What the run '%s' was trained on is not known any more: %s", run, error)
    return cases


def _bundle_weights(bundle: Bundle, net: NMSWNet, *, label_names: Sequence[str], needs_local: bool) -> dict[str, Tensor]:
    """The weights of a bundle for a net of maybe other classes.

    A class that both know by name keeps its weights; a new one, an importance head that does not fit, and a local net of another backbone
    stay as the net has them.

    Args:
        needs_local: whether the run trains nothing of the local net, so that it must be the bundle's.

    Raises:
        UserError: the bundle's nets are of another kind or size.
    """
    manifest = bundle.manifest
    ours, theirs = net.architecture, Architecture(**manifest.architecture)
    if manifest.num_runs > 1:
        raise UserError(
            f"The bundle '{manifest.name}' is an ensemble of {manifest.num_runs} runs, which cannot be trained further. Start from one of its runs with --initial-run."
        )
    takes_local = theirs.backbone == ours.backbone
    if theirs.cascade and not ours.cascade and takes_local:
        raise UserError(
            f"The bundle '{manifest.name}' is a cascade, whose local net needs the coarse answer. Leave --no-cascade out, or start from another bundle."
        )
    becomes_cascade = ours.cascade and not theirs.cascade
    if theirs.preset != ours.preset or (needs_local and not takes_local):
        raise UserError(
            f"The bundle '{manifest.name}' has a {theirs.backbone} of size {theirs.preset}, this run a {ours.backbone} of size {ours.preset}. Leave --backbone and --preset out, or start from another bundle."
        )
    given = {COARSE_PREFIX + key: value for key, value in _archived(bundle.coarse_path).items()}
    if takes_local:
        given |= {LOCAL_PREFIX + key: value for key, value in _local_weights(bundle, theirs, fusion_channels=ours.fusion_channels).items()}
        given[CLASS_WEIGHTS] = torch.tensor(manifest.class_weights)
    else:
        logger.info("Of %s only the coarse net is taken: its local net is a %s, this run's a %s.", manifest.name, theirs.backbone, ours.backbone)
    their_names, our_names = [BACKGROUND, *manifest.label_names], [BACKGROUND, *label_names]
    has_same_classes = their_names == our_names
    takes_importance = has_same_classes and manifest.importance_has_entropy
    pairs = [(row, their_names.index(name)) for row, name in enumerate(our_names) if name in their_names]
    our_rows, their_rows = (torch.tensor(rows) for rows in zip(*pairs))
    weights, class_axes = dict(net.state_dict()), _class_axes(ours)
    for key, value in weights.items():
        if not takes_local and not key.startswith(COARSE_PREFIX):
            continue
        if (key.startswith(IMPORTANCE_PREFIX) and not takes_importance) or (becomes_cascade and key.startswith((PRIOR_PREFIX, CLASS_WEIGHTS))):
            continue
        if key not in given:
            raise UserError(f"The bundle '{manifest.name}' has no weights '{key}': another version made it. Start from a bundle of this version.")
        if becomes_cascade and key.startswith(LOCAL_PREFIX) and given[key].shape[1:] != value.shape[1:]:
            given[key] = _for_more_inputs(given[key], like=value)
        axis = class_axes.get(key)
        if axis is None or has_same_classes:
            weights[key] = given[key]
        else:
            weights[key] = value.cpu().index_copy(axis, our_rows, given[key].index_select(axis, their_rows))
    return weights


def _archived(path: Path) -> dict[str, Tensor]:
    """The parameters in a TorchScript archive, float32."""
    return {key: value.float() for key, value in read_archive(path).state_dict().items()}


def _local_weights(bundle: Bundle, architecture: Architecture, *, fusion_channels: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters of a bundle's local net; a thinned out e2enet that shall not stay so gets its other channels back, which nothing reads yet."""
    weights = _archived(bundle.local_path)
    if architecture.fusion_channels == fusion_channels:
        return weights
    sliced, whole = LocalNet(architecture), LocalNet(replace(architecture, fusion_channels=()))
    sliced.load_state_dict(weights)
    whole.backbone = with_all_channels(sliced.backbone, start=whole.backbone)
    return weights | {key: value for key, value in whole.state_dict().items() if key.startswith("backbone.")}


def _for_more_inputs(weight: Tensor, *, like: Tensor) -> Tensor:
    """A first convolution that reads the image as before, and of the channels behind it nothing yet."""
    return torch.cat([weight, weight.new_zeros(like.shape[0], like.shape[1] - weight.shape[1], *like.shape[2:])], dim=1)


def _class_axes(architecture: Architecture) -> dict[str, int]:
    """Which axis of a weight counts the classes, for those that have one."""
    with torch.device("meta"):
        one, other = (NMSWNet(replace(architecture, num_classes=count)).state_dict() for count in (architecture.num_classes, architecture.num_classes + 1))
    return {key: next(axis for axis, (a, b) in enumerate(zip(one[key].shape, other[key].shape)) if a != b) for key in one if one[key].shape != other[key].shape}


def _fitting_checkpoint(option: str, run: str, ours: Architecture, *, label_names: Sequence[str]) -> dict:
    """The checkpoint of a run whose nets can be used in these; the local net of a coarse_run may have any backbone.

    Raises:
        UserError: there is none, or its nets or classes are others.
    """
    checkpoint = load_best_checkpoint(Path(run))
    theirs = Architecture(**checkpoint["architecture"])
    if option == "coarse_run":
        theirs = replace(theirs, backbone=ours.backbone, cascade=ours.cascade, fusion_channels=ours.fusion_channels)
    if theirs.fusion_channels and theirs.backbone == ours.backbone and not ours.fusion_channels:
        raise UserError(f"The initial_run '{run}' trained an e2enet that was thinned out for good, which cannot get masks again. Leave --sparsity out.")
    if theirs != ours:
        raise UserError(
            f"The {option} '{run}' has other nets ({theirs.to_dict()}) than this run ({ours.to_dict()}). It needs the same classes and preset{', and the same backbone' if option == 'initial_run' else ''}."
        )
    if list(checkpoint["label_names"]) != list(label_names):
        raise UserError(f"The {option} '{run}' has classes of other names or in another order than this run. Bring both lists to one order.")
    return checkpoint
