"""From a run folder to a bundle: weights rounded to fp16, nets traced with plain operators, checked against the eager nets."""

import argparse
import copy
import json
import logging
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from NMSWSegment import __version__
from NMSWSegment.console import say
from NMSWSegment.engine.runtime import Nets, read_archive, resolve_device
from NMSWSegment.files.bundle import MANIFEST_NAME, BundleManifest, file_sha256, load_bundle
from NMSWSegment.files.output_file import draft_folder, replace_path
from NMSWSegment.nets.nmsw_net import Architecture, CoarseEnsemble, LocalEnsemble, NMSWNet
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.case_source import CaseSource
from NMSWSegment.training.calibration import calibrate
from NMSWSegment.training.datasets import find_data, open_validation_cases
from NMSWSegment.training.distributed import joined_group
from NMSWSegment.training.initial_weights import case_digest, learned_cases
from NMSWSegment.training.model_card import PICTURE_NAME, model_card
from NMSWSegment.training.monai_metadata import INFERENCE_PATH, METADATA_PATH, monai_inference, monai_metadata
from NMSWSegment.training.net_facts import net_facts
from NMSWSegment.training.options import TrainOptions
from NMSWSegment.training.run_folder import load_best_checkpoint, load_checkpoint, load_run_options, load_weights, trained_weights

logger = logging.getLogger(__name__)

PARITY_TOLERANCE = 1e-3  # logits; tracing changes no operator, so that only the order of sums may differ
PARITY_SEED = 0
TOGETHER = ("backbone", "preset", "cascade", "spacing_mm", "modality", "normalization", "intensity_points", "patch_size", "overlap", "coarse_factor")
"""What the runs of an ensemble must have in common."""
SOURCE_PATHS_SUFFIX = ".debug_pkl"


def export_bundle(
    runs: Path | Sequence[Path],
    output: Path,
    *,
    title: str = "",
    description: str = "",
    license: str = "",
    scores: tuple[Path, ...] = (),
    data_notes: tuple[Path, ...] = (),
    picture: Path | None = None,
    last: bool = False,
    calibrates: bool = False,
    device: str = "auto",
) -> Path:
    """Write the bundle of a run, or of an ensemble of runs; the folder's name becomes the bundle's name.

    Args:
        runs: run folder of `nmsw train`, or several with the same options but for their cases, weights and seed.
        output: bundle folder to create.
        license: of the weights; "" says that it is not stated.
        scores: files that `nmsw evaluate` wrote of cases that the weights were not trained on, for the model card.
        data_notes: JSON with "trained_on" (text) and "attributions" (list of texts); several are put one after the other.
        picture: PNG for the model card, for example a preview of 'nmsw segment'.
        calibrates: find the threshold of k = auto on the cases that all runs held out.
        device: where that is done.
        last: take the last checkpoint although the validation found an earlier one better.

    Raises:
        UserError: a run has no checkpoint, the runs do not go together, the output exists, a file of scores or notes cannot be used, or the
            exported nets disagree with the eager ones.
    """
    runs = [runs] if isinstance(runs, Path) else list(runs)
    if output.exists():
        raise UserError(f"'{output}' already exists. Remove it or give another folder.")
    if picture and not picture.is_file():
        raise UserError(f"There is no picture '{picture}'. Check the path, or leave --picture out.")
    trained = [_trained(run, last=last) for run in runs]
    _check_together(trained, runs)
    options, checkpoint, net, _ = trained[0]
    examples = parity_inputs(options, net.architecture)
    notes = [_read_object(path, advice="Write a JSON object with trained_on and attributions.") for path in data_notes]
    held_out = {}
    for path in scores:
        scored = _read_object(path, key="cases", advice="Give a file that 'nmsw evaluate --output' wrote.")["cases"]
        # A case that shows none of the classes has no mean, and no place in the table.
        held_out |= {case: by_k for case, by_k in scored.items() if all(row.get("mean") is not None for row in by_k.values())}
    learned = set().union(*(one.learned for one in trained))
    if not_held_out := sorted(name for name in held_out if case_digest(name) in learned):
        raise UserError(
            f"The scores are of cases that the weights were trained on: {', '.join(not_held_out)}. Held-out scores need others: "
            "give 'nmsw evaluate' --cases or --split, or leave --scores out."
        )
    manifest = {
        "name": output.name,
        "title": title or output.name,
        "description": description,
        **net_facts(options, net, label_names=checkpoint["label_names"]),
        "class_weights": tuple(torch.stack([one.net.class_weights.detach() for one in trained]).mean(0).tolist()),
        "num_runs": len(trained),
        "training": {
            "program": f"NMSWSegment {__version__}, torch {torch.__version__}",
            "iterations": checkpoint["iteration"],
            **(_validation_facts(checkpoint) if len(trained) == 1 else {}),
            "held_out": _held_out(trained),
            "case_digests": sorted(learned),
            "options": _public_options(options),
            "trained_on": "\n\n".join(note["trained_on"] for note in notes if "trained_on" in note),
        },
        "scores": held_out,
        "license": license or BundleManifest.license,
        "attributions": tuple(
            dict.fromkeys(
                [
                    *(text for one in trained for text in _inherited_attributions(one.options)),
                    *(text for note in notes for text in note.get("attributions", ())),
                ]
            )
        ),
    }
    nets = [one.net for one in trained]
    coarse = net.coarse if len(nets) == 1 else CoarseEnsemble([one.coarse for one in nets])
    local = net.local if len(nets) == 1 else LocalEnsemble([one.local for one in nets])
    if calibrates:
        found = calibrate(_as_nets(coarse, local, manifest, device=resolve_device(device)), _held_out_cases(trained))
        manifest |= {"auto_gain": found.auto_gain, "min_island_share": found.min_island_share}
        manifest["training"]["auto"] = [asdict(point) for point in found.points]
    return write_bundle(coarse, local, output=output, examples=examples, manifest=manifest, picture=picture, for_monai=True)


def _as_nets(coarse: nn.Module, local: nn.Module, manifest: dict, *, device: torch.device) -> Nets:
    """The nets that are about to be exported, on a device; the export itself goes on with those on the CPU."""
    on_device = (copy.deepcopy(net).to(device) for net in (coarse, local))
    return Nets(BundleManifest(**manifest, sha256={}), *on_device, device=device, on_cpu=lambda: (coarse, local))


def _held_out_cases(trained: "Sequence[_Trained]") -> list[CaseSource]:
    """Cases that all runs held out, read from where they lay when the first one was trained.

    Raises:
        UserError: there are none, they are gone, or they have other classes now.
    """
    options = replace(trained[0].options, hold_out=tuple(_held_out(trained)), fold=None, folds=0, splits="", validate_every=1)
    data = find_data(options)
    if list(data.label_names) != list(trained[0].checkpoint["label_names"]):
        raise UserError(f"The data {', '.join(options.data)} has other classes now than when the run was trained. Leave --calibrate out.")
    if not data.validation:
        raise UserError(
            "k = auto can be calibrated on labelled cases that neither the runs of the model nor what they started from were trained on, but there are none. "
            "Leave --calibrate out, or train every run and every stage without the same cases (--hold-out)."
        )
    with joined_group("cpu") as group:
        return open_validation_cases(options, data=data, group=group)


class _Trained(NamedTuple):
    """A run as it is exported."""

    options: TrainOptions
    checkpoint: dict
    net: NMSWNet
    """Weights rounded to fp16, without what a sparse e2enet left out."""
    learned: set[str]
    """Digests of the cases and anatomies that they were trained on."""


def _trained(run: Path, *, last: bool) -> _Trained:
    """Read a run."""
    options, checkpoint = load_run_options(run), load_checkpoint(run) if last else load_best_checkpoint(run)
    net = NMSWNet(Architecture(**checkpoint["architecture"]))
    load_weights(net, {key: value.half().float() for key, value in trained_weights(checkpoint).items()}, run=run)
    net.eval().slice_fusion()
    return _Trained(options=options, checkpoint=checkpoint, net=net, learned=learned_cases(checkpoint, run=run))


def _check_together(trained: Sequence[_Trained], runs: Sequence[Path]) -> None:
    """Raise UserError unless all runs can be one ensemble."""
    first = trained[0]
    for one, run in zip(trained, runs):
        if list(one.checkpoint["label_names"]) != list(first.checkpoint["label_names"]):
            raise UserError(f"The runs '{runs[0]}' and '{run}' have other classes, or another order of them. Export them one by one.")
        differing = [name for name in TOGETHER if getattr(one.options, name) != getattr(first.options, name)]
        if differing:
            raise UserError(f"The runs '{runs[0]}' and '{run}' differ in {', '.join(differing)}, so that they cannot be one ensemble. Export them one by one.")


def write_bundle(
    coarse: nn.Module,
    local: nn.Module,
    *,
    output: Path,
    examples: dict[str, list[tuple[Tensor, ...]]],
    manifest: dict,
    picture: Path | None = None,
    for_monai: bool = False,
) -> Path:
    """Trace, store in fp16, read back, compare, and only then put the folder in place.

    Args:
        coarse, local: eager nets with weights already rounded to fp16.
        examples: inputs of "coarse" and "local", several sizes each where the size may vary.
        manifest: fields of BundleManifest without the hashes.
        for_monai: also write what MONAI's bundle tools read.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with draft_folder(output.parent, prefix=f".{output.name}-") as folder:
        draft = folder / output.name
        draft.mkdir()
        for name, net in (("coarse", coarse), ("local", local)):
            path = draft / f"{name}.pt"
            with torch.no_grad(), warnings.catch_warnings(), path.open("wb") as stream:
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about size checks; check_parity tries other sizes
                torch.jit.save(torch.jit.trace(net.eval(), examples[name][0], check_trace=False).half(), stream)
            net.float()  # tracing shares the parameters with the eager net
            drop_source_paths(path)
            check_parity(net, path, examples[name])
        hashes = {path.name: file_sha256(path) for path in sorted(draft.iterdir())}
        complete = BundleManifest(**manifest, sha256=hashes)
        (draft / MANIFEST_NAME).write_text(complete.to_json(), encoding="utf-8")
        if for_monai:
            (draft / METADATA_PATH).parent.mkdir()
            for path, content in ((METADATA_PATH, monai_metadata(complete)), (INFERENCE_PATH, monai_inference())):
                (draft / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if picture:
            shutil.copyfile(picture, draft / PICTURE_NAME)
        (draft / "MODEL_CARD.md").write_text(model_card(complete, has_picture=picture is not None), encoding="utf-8")
        replace_path(draft, output)
    return output


def drop_source_paths(path: Path) -> None:
    """Take out of an archive where each line of its code came from: folders of the computer that traced it, which torch does not need."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist() if not name.endswith(SOURCE_PATHS_SUFFIX)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content)  # not compressed, dated 1980: bytes that do not depend on the day


def check_parity(net: nn.Module, path: Path, inputs: list[tuple[Tensor, ...]]) -> None:
    """Compare an archive with the eager net it came from.

    Raises:
        UserError: an output differs by more than PARITY_TOLERANCE.
    """
    archived = read_archive(path)
    for arguments in inputs:
        with torch.no_grad():
            expected, found = (outputs if isinstance(outputs, tuple) else (outputs,) for outputs in (net(*arguments), archived(*arguments)))
        for want, have in zip(expected, found):
            difference = float((want - have).abs().max()) if want.shape == have.shape else float("inf")
            if not difference <= PARITY_TOLERANCE:
                raise UserError(
                    f"The exported {path.name} disagrees with the trained net on an input of shape {tuple(arguments[0].shape)}: logits differ by {difference:.3g}, "
                    f"at most {PARITY_TOLERANCE:g} is allowed. Nothing was written; train in fp32, or report this with the run's options.json."
                )


def parity_inputs(options: TrainOptions, architecture: Architecture) -> dict[str, list[tuple[Tensor, ...]]]:
    """Random inputs of the sizes that inference uses: one patch and two; coarse volumes of two sizes, neither a cube.

    The coarse volumes leave more than one voxel at the net's bottom, where eager instance norm refuses a single one.
    """
    generator, coarse_multiple = torch.Generator().manual_seed(PARITY_SEED), architecture.coarse_multiple
    smallest = [-(-size // (factor * coarse_multiple)) * coarse_multiple for size, factor in zip(options.patch_size, options.coarse_factor)]
    coarse_shapes = [[length + coarse_multiple * more for length, more in zip(smallest, extra)] for extra in ((0, 0, 1), (2, 1, 3))]
    local = [(torch.rand(count, 1, *options.patch_size, generator=generator),) for count in (1, 2)]
    if architecture.cascade:
        part = [size // factor for size, factor in zip(options.patch_size, options.coarse_factor)]
        local = [(x, torch.log_softmax(4 * torch.randn(len(x), architecture.num_classes, *part, generator=generator), dim=1)) for (x,) in local]
    return {"coarse": [(torch.rand(1, 1, *shape, generator=generator),) for shape in coarse_shapes], "local": local}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw export`."""
    parser.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="run folder of 'nmsw train'; several, such as all folds, become an ensemble")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE", help="bundle folder to create; its name becomes the bundle's name")
    parser.add_argument("--last", action="store_true", help="the last weights, not those that were best in the validation")
    parser.add_argument("--calibrate", action="store_true", help="find out on the cases that all runs held out when k = auto stops")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda|mps", help="where --calibrate runs the nets (default: %(default)s)")
    parser.add_argument("--title", default="", help="name for people")
    parser.add_argument("--description", default="", help="one sentence for the model list")
    parser.add_argument("--license", default="", help="of the weights, for example CC-BY-4.0 (default: not stated)")
    parser.add_argument("--scores", type=Path, action="append", default=[], metavar="FILE.json", help="held-out scores that 'nmsw evaluate' wrote; repeat")
    parser.add_argument("--picture", type=Path, default=None, metavar="FILE.png", help="picture for the model card, for example a preview of 'nmsw segment'")
    parser.add_argument(
        "--data-notes",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.json",
        help='what the weights were trained on: {"trained_on": text, "attributions": [texts]}; repeat',
    )


def run(arguments: argparse.Namespace) -> int:
    """`nmsw export`."""
    bundle = export_bundle(
        arguments.run_folders,
        arguments.output,
        title=arguments.title,
        description=arguments.description,
        license=arguments.license,
        scores=tuple(arguments.scores),
        data_notes=tuple(arguments.data_notes),
        picture=arguments.picture,
        last=arguments.last,
        calibrates=arguments.calibrate,
        device=arguments.device,
    )
    megabytes = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 1e6
    training = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))["training"]
    validated = f", validation DSC {training['validation_dsc']:.3f}" if "validation_dsc" in training else ""
    say(f"Bundle of iteration {training['iterations']}{validated} written to {bundle} ({megabytes:.1f} MB); exported and trained nets agree.")
    return 0


def _inherited_attributions(options: TrainOptions) -> tuple[str, ...]:
    """Those of the bundle that the run, or one that it builds upon, started from: its data is in the weights still."""
    found = list(load_bundle(options.initial_bundle).manifest.attributions) if options.initial_bundle else []
    for earlier in filter(None, (options.initial_run, options.coarse_run)):
        try:
            found += _inherited_attributions(load_run_options(Path(earlier)))
        except UserError as error:
            logger.warning("Attributions of what the run '%s' started from are not known any more: %s", earlier, error)
    return tuple(dict.fromkeys(found))


def _held_out(trained: Sequence[_Trained]) -> list[str]:
    """Cases that all runs held out and that nothing they started from was trained on, sorted."""
    held_out = set.intersection(*({*one.options.hold_out, *one.checkpoint.get("case_names", {}).get("validation", ())} for one in trained))
    learned = set().union(*(one.learned for one in trained))
    return sorted(name for name in held_out if case_digest(name) not in learned)


def _validation_facts(checkpoint: dict) -> dict:
    """The validation score of a checkpoint, where it is that of the best iteration."""
    validation = checkpoint.get("validation", {})
    is_best = validation.get("best_score") is not None and validation["best_iteration"] == checkpoint["iteration"]
    return {"validation_dsc": round(validation["best_score"], 4)} if is_best else {}


def _public_options(options: TrainOptions) -> dict:
    """The run's options without the folders of the computer it ran on."""
    values = asdict(options)
    values["data"] = [entry.split(":", 1)[0] for entry in options.data]
    for name in ("initial_run", "initial_bundle", "coarse_run", "splits"):
        values[name] = Path(getattr(options, name)).name
    return json.loads(json.dumps(values))


def _read_object(path: Path, *, advice: str, key: str | None = None) -> dict:
    """The JSON object of a file, with a key that must be there."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}). {advice}") from error
    if not isinstance(values, dict) or (key is not None and key not in values):
        raise UserError(f"'{path}' does not hold what is needed. {advice}")
    return values
