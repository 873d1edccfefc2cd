"""The verbs of the command line: segment a volume, list the models, train and export new ones.

Exit codes: 0 done, 1 a bug, 2 something a user can fix, 130 stopped with Ctrl-C or by SIGTERM.
"""

import argparse
import difflib
import errno
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from NMSWSegment import __version__
from NMSWSegment.console import complain, forget_output, say, say_all
from NMSWSegment.files.boxes import label_boxes
from NMSWSegment.files.bundle import Bundle, Label, install_bundle, list_bundles, load_bundle, remove_bundle
from NMSWSegment.files.dicom_segmentation import DICOM_SEG_ENDINGS, Algorithm, check_dicom_export, export_dicom_seg
from NMSWSegment.files.output_file import check_name, check_output_path, file_ending, replaced_together
from NMSWSegment.files.outputs import PATCHES_ENDINGS, PREVIEW_ENDINGS, require_matplotlib, write_patches, write_preview
from NMSWSegment.files.run_checks import check_intensities, check_memory, check_modality
from NMSWSegment.files.statistics import STATISTICS_ENDINGS, structure_statistics, write_statistics
from NMSWSegment.files.volume import LABELMAP_ENDINGS, Volume, open_volume, write_labelmap
from NMSWSegment.interrupt import stopped_at_once
from NMSWSegment.progress_bar import progress_bar
from NMSWSegment.protocol import AUTO, RUNTIMES, Cancelled, Progress, SegmentOptions, UserError

if TYPE_CHECKING:
    from NMSWSegment.engine.segment import SegmentResult

DONE, BUG, USER_ERROR, STOPPED = 0, 1, 2, 130

REPORT_ENDINGS = (".json",)
_DESCRIPTION = "Fast segmentation of CT and MR volumes: a coarse pass over the whole volume, then only the patches that matter."

_EXAMPLES = """examples:
  nmsw segment ct.nii.gz -o labels.seg.nrrd
  nmsw segment dicom_folder -o labels.nii.gz --k 30 --structures liver,spleen --statistics organs.csv
  nmsw segment ct.nrrd -o labels.seg.nrrd --k all --preview result.png --patches patches.mrk.json
  nmsw segment-cohort folder -o results
  nmsw models
"""
# Modules with add_arguments(parser) and run(args); imported only when asked for, because most need the training extra.
_MODULE_VERBS = {
    "segment-cohort": ("NMSWSegment.cohort.cohort", "segment all volumes of a folder or a list"),
    "prepare": ("NMSWSegment.training.prepare", "collect what training reads of its data in one folder"),
    "train": ("NMSWSegment.training.train", "train the two nets of a new model"),
    "export": ("NMSWSegment.training.export", "make a bundle of a trained model"),
    "evaluate": ("NMSWSegment.evaluation.evaluate", "score a bundle on labelled cases"),
    "compare": ("NMSWSegment.evaluation.compare", "compare NMSW with sliding windows and other baselines"),
    "worker": ("NMSWSegment.engine.worker", "serve the Slicer panel"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are UserErrors, one sentence instead of a page."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}. Run '{self.prog} --help' for what is possible.")


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code.

    Args:
        argv: words after the program's name; None takes those of the process.
    """
    try:
        with _ends_as_ctrl_c():
            argv = sys.argv[1:] if argv is None else argv
            arguments, unknown = _parser(argv).parse_known_args(argv)
            if unknown:
                raise UserError(_unknown_argument(unknown[0], verb=argv[0], options=arguments.options))
            code = arguments.run(arguments)
            say_all()
            return code
    except SystemExit as exit_:  # --help and --version end so
        return int(exit_.code or DONE)
    except UserError as error:
        complain(str(error))
        return USER_ERROR
    except (KeyboardInterrupt, Cancelled):
        complain("Stopped.")
        return STOPPED
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EFBIG):
            return _bug()
        forget_output()
        complain(f"Something could not be written or printed ({error.strerror}). Make room on the disk, or leave the output open, and start again.")
        return USER_ERROR
    except MemoryError:
        complain("This computer ran out of memory. Crop the volume, or close other programs.")
        return USER_ERROR
    except Exception:  # the process boundary: whatever is left is ours to fix
        return _bug()


def _bug() -> int:
    """Tell of the exception that is being handled."""
    with suppress(OSError):
        traceback.print_exc()
    complain(f"This is a bug in NMSWSegment {__version__}. Please report it on the project page, with the lines above.")
    return BUG


def segment(arguments: argparse.Namespace) -> int:
    """The verb 'segment': everything is checked before the run, and written together after it."""
    options = run_options(arguments)
    bundle = load_bundle(options.bundle)
    outputs = _checked_outputs(arguments, bundle)
    # Engine last: it imports torch, which takes seconds that a misspelled option should not cost.
    try:
        with stopped_at_once():
            from NMSWSegment.engine.segment import segment_volume, structure_values
    except (ImportError, OSError) as error:  # OSError where a library of torch does not load on Windows
        if (getattr(error, "name", None) or "").startswith("NMSWSegment"):
            raise
        raise UserError(f"PyTorch cannot be loaded ({error}). Install it again, or close other programs if memory is short.") from error

    kept_values = structure_values(bundle.manifest, options.structures)
    started = time.perf_counter()
    with progress_bar(is_transient=True) as on_progress:
        on_progress(Progress("read", 0.0, f"Reading {arguments.input.name}"))
        volume = _checked_volume(arguments, bundle, options=options)
        read_s = time.perf_counter() - started
        result = segment_volume(volume, bundle, options=options, on_progress=on_progress)
        result.run_info["timings_s"] = {"read": round(read_s, 4)} | result.run_info["timings_s"]
        labels = [label for label in bundle.manifest.labels if label.value in kept_values]
        on_progress(Progress("write", 1.0, "Writing"))
        _write_outputs(outputs, arguments, volume=volume, result=result, labels=labels)
    try:
        for kind, path in outputs.items():
            say(f"{kind}: {path}")
        say(_summary(result, labels=labels, seconds=time.perf_counter() - started))
        say_all()
    except OSError as error:  # the files are there, which is what was asked for
        forget_output()
        complain(f"The files were written, but their list could not be printed ({error.strerror}).")
    return DONE


def _checked_volume(arguments: argparse.Namespace, bundle: Bundle, *, options: SegmentOptions) -> Volume:
    """The input, if the model and the computer can do with it; what the header tells is told before the voxels are read."""
    file = open_volume(arguments.input, series_uid=arguments.series)
    if not arguments.force_modality:
        check_modality(file, bundle.manifest)
    if not arguments.force_memory:
        check_memory(file.shape, file.ijk_to_ras, bundle.manifest, options=options, bytes_per_voxel=file.bytes_per_voxel)
    volume = file.read()
    if not arguments.force_modality:
        check_intensities(volume, bundle.manifest)
    return volume


def models(arguments: argparse.Namespace) -> int:
    """The verb 'models': a table of the installed bundles, or their manifests as JSON."""
    bundles = []
    for name in list_bundles():
        try:
            bundles.append(load_bundle(name))
        except UserError as error:  # one damaged model must not hide the others
            complain(str(error))
    if arguments.json:
        say(json.dumps([_model_info(bundle) for bundle in bundles], indent=2))
        return DONE
    if not bundles:
        say("No model is installed. Train one with 'nmsw train' and make a bundle of it with 'nmsw export'.")
        return DONE
    rows = [("name", "backbone", "structures", "spacing mm", "size MB", "held-out scores")]
    rows += [_model_row(bundle) for bundle in bundles]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    names_by_structures: dict[str, list[str]] = {}
    for bundle in bundles:
        names_by_structures.setdefault(", ".join(bundle.manifest.label_names), []).append(bundle.manifest.name)
    for structures, names in names_by_structures.items():
        say(f"\nStructures of {', '.join(names)}:\n  {structures}")
    return DONE


def install(arguments: argparse.Namespace) -> int:
    """The verb 'install': a bundle joins the installed ones, for the command line and the panel."""
    bundle = install_bundle(arguments.folder, replace=arguments.replace)
    say(f"Installed model {bundle.manifest.name} in {bundle.folder}")
    return DONE


def remove(arguments: argparse.Namespace) -> int:
    """The verb 'remove': delete a bundle that was installed."""
    remove_bundle(arguments.name)
    say(f"Removed model {arguments.name}")
    return DONE


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of all verbs; of the verbs with a module of their own only the chosen one fills in its options."""
    parser = _Parser(prog="nmsw", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"NMSWSegment {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    segment_parser = verbs.add_parser(
        "segment", help="segment a volume", description="Segment a CT or MR volume.", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_segment_arguments(segment_parser)
    models_parser = verbs.add_parser("models", help="list the installed models", description="List the installed models.")
    models_parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    models_parser.set_defaults(run=models)
    install_parser = verbs.add_parser(
        "install", help="install a model", description="Install a model. A model is a program: install only what comes from a source that you trust."
    )
    install_parser.add_argument("folder", type=Path, metavar="BUNDLE", help="folder that 'nmsw export' wrote")
    install_parser.add_argument("--replace", action="store_true", help="take the place of an installed model of the same name")
    install_parser.set_defaults(run=install)
    remove_parser = verbs.add_parser("remove", help="remove an installed model", description="Remove a model that was installed; packaged models stay.")
    remove_parser.add_argument("name", metavar="NAME", help="see 'nmsw models'")
    remove_parser.set_defaults(run=remove)
    for verb, (module_name, help_text) in _MODULE_VERBS.items():
        verb_parser = verbs.add_parser(verb, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        if argv[:1] == [verb]:
            module = _verb_module(module_name, verb=verb)
            module.add_arguments(verb_parser)
            verb_parser.set_defaults(run=module.run)
    for verb_parser in verbs.choices.values():
        verb_parser.set_defaults(options=list(verb_parser._option_string_actions))
    return parser


def _unknown_argument(found: str, *, verb: str, options: list[str]) -> str:
    """The sentence for a word that a verb does not know, with the nearest option."""
    nearest = difflib.get_close_matches(found.partition("=")[0], options, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"'nmsw {verb}' does not know '{found}'.{hint} Run 'nmsw {verb} --help' for what is possible."


def _add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb 'segment'."""
    parser.add_argument("input", type=Path, metavar="INPUT", help="volume: .nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd, or the folder of a DICOM series")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUTPUT",
        help="labelmap (.nii.gz, .nii), segmentation of 3D Slicer (.seg.nrrd), or of a DICOM series a DICOM segmentation (.dcm)",
    )
    parser.add_argument("--series", default=None, metavar="UID", help="DICOM series to segment, where the folder has several")
    add_run_arguments(parser)
    parser.add_argument("--force-memory", action="store_true", help="run although the memory that is free may not be enough")
    also = parser.add_argument_group("further output files")
    also.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE.csv|FILE.json",
        help="volume, intensity, surface, place of each structure, whether the edge of the volume cuts it, and how much of it was refined",
    )
    also.add_argument("--preview", type=Path, metavar="FILE.png", help="picture of three slices with the structures")
    also.add_argument("--patches", type=Path, metavar="FILE.mrk.json", help="chosen patches as Markups of 3D Slicer")
    also.add_argument("--report", type=Path, metavar="FILE.json", help="versions, options, times and patches of the run")
    parser.set_defaults(run=segment)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how to segment, for run_options; the defaults are those of SegmentOptions."""
    defaults = SegmentOptions()
    parser.add_argument("--bundle", default=defaults.bundle, metavar="NAME|FOLDER", help="model, see 'nmsw models' (default: %(default)s)")
    parser.add_argument(
        "--k",
        type=_patch_count,
        default=defaults.num_patches,
        metavar="N|all|auto",
        help="patches that are refined; 0 gives the coarse result, all the finest, auto as many as pay (default: %(default)s)",
    )
    parser.add_argument(
        "--policy",
        default=defaults.policy,
        metavar="greedy|top_k",
        help="how patches are chosen: best coverage, or highest importance as in the paper (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default=defaults.device, metavar="auto|cpu|cuda|mps", help="where the nets run; cuda:1 is the second GPU (default: %(default)s)"
    )
    parser.add_argument("--structures", default="", metavar="NAME,...", help="structures to keep, for example liver,spleen (default: all)")
    parser.add_argument(
        "--min-island-ml",
        type=float,
        default=defaults.min_island_ml,
        metavar="ML",
        help="remove parts of a structure that lie apart and are smaller than this (default: keep all)",
    )
    parser.add_argument("--force-modality", action="store_true", help="run although the volume is not what the model was trained on")
    parser.add_argument("--threads", type=int, default=defaults.threads, metavar="N", help="CPU threads (default: all physical cores)")
    parser.add_argument(
        "--runtime",
        default=defaults.runtime,
        metavar="|".join(RUNTIMES),
        help="what computes the local net on a CPU; auto takes the fastest whose answer agrees (default: %(default)s)",
    )


def _patch_count(text: str) -> int | str | None:
    """The value of --k: a whole number, None for 'all', or AUTO."""
    named = {"all": None, AUTO: AUTO}
    word = text.strip().lower()
    if word in named:
        return named[word]
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number nor 'all' or 'auto'") from error


def _verb_module(module_name: str, *, verb: str) -> ModuleType:
    """The module of a verb, or the way to install what it needs."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "NMSWSegment":
            raise
        raise UserError(
            f"'nmsw {verb}' needs the package '{error.name}', which is not installed. Install what training needs, in the project's folder, with: pip install \".[train]\""
        ) from error


def run_options(arguments: argparse.Namespace) -> SegmentOptions:
    """What the user chose; SegmentOptions checks it."""
    return SegmentOptions(
        bundle=arguments.bundle,
        num_patches=arguments.k,
        policy=arguments.policy,
        device=arguments.device,
        structures=tuple(name.strip() for name in arguments.structures.split(",") if name.strip()),
        min_island_ml=arguments.min_island_ml,
        threads=arguments.threads,
        runtime=arguments.runtime,
    )


def _checked_outputs(arguments: argparse.Namespace, bundle: Bundle) -> dict[str, Path]:
    """Files to write by kind, each possible, none twice and none of the input or of the model."""
    wanted = {
        "labelmap": (arguments.output, (*LABELMAP_ENDINGS, *DICOM_SEG_ENDINGS)),
        "statistics": (arguments.statistics, STATISTICS_ENDINGS),
        "preview": (arguments.preview, PREVIEW_ENDINGS),
        "patches": (arguments.patches, PATCHES_ENDINGS),
        "report": (arguments.report, REPORT_ENDINGS),
    }
    check_name(arguments.input)
    outputs = {kind: check_output_path(path, endings) for kind, (path, endings) in wanted.items() if path is not None}
    if arguments.preview is not None:
        require_matplotlib()
    if file_ending(arguments.output, DICOM_SEG_ENDINGS):
        check_dicom_export(arguments.input, series_uid=arguments.series)
    places = {}
    for kind, path in outputs.items():
        # samefile also sees through links and other spellings of the same place.
        is_slice = arguments.input.is_dir() and file_ending(path, DICOM_SEG_ENDINGS) and path.resolve().is_relative_to(arguments.input.resolve())
        if path.exists() and arguments.input.exists() and (is_slice or os.path.samefile(path, arguments.input)):
            raise UserError(f"The {kind} '{path}' would overwrite the input. Choose another name.")
        if path.exists() and path.resolve().is_relative_to(bundle.folder.resolve()):
            raise UserError(f"The {kind} '{path}' would overwrite a file of the model '{bundle.manifest.name}'. Choose another name.")
        place = path.resolve()
        if place in places:
            raise UserError(f"The {kind} and the {places[place]} have the same file '{path}'. Choose another name for one of them.")
        places[place] = kind
    return outputs


def _write_segmentation(path: Path, arguments: argparse.Namespace, *, result: "SegmentResult", labels: list[Label]) -> None:
    """The labelmap in the format that the ending asks for."""
    if file_ending(path, DICOM_SEG_ENDINGS):
        export_dicom_seg(result.labelmap, arguments.input, path, labels=labels, algorithm=Algorithm.from_run(result.run_info), series_uid=arguments.series)
    else:
        write_labelmap(result.labelmap, path, labels=labels)


def _write_outputs(outputs: dict[str, Path], arguments: argparse.Namespace, *, volume: Volume, result: "SegmentResult", labels: list[Label]) -> None:
    """Write all files; if one fails, none of them appears."""
    writers: dict[str, Callable[[Path], object]] = {
        "labelmap": lambda path: _write_segmentation(path, arguments, result=result, labels=labels),
        "statistics": lambda path: write_statistics(structure_statistics(result.labelmap, volume, labels=labels, patches=result.patches), path),
        "preview": lambda path: write_preview(volume, result.labelmap, labels=labels, patches=result.patches, path=path),
        "patches": lambda path: write_patches(result.patches, path),
        "report": lambda path: path.write_text(json.dumps(result.run_info, indent=2) + "\n", encoding="utf-8"),
    }
    with replaced_together(list(outputs.values())) as temporaries:
        for kind, temporary in zip(outputs, temporaries):
            writers[kind](temporary)


def _summary(result: "SegmentResult", *, labels: list[Label], seconds: float) -> str:
    """'5 of 7 structures in 12.3 s, 10 of 42 patches', and what was taken for air."""
    num_found = len(label_boxes(result.labelmap.array).keys() & {label.value for label in labels})
    text = f"{num_found} of {len(labels)} structures in {seconds:.1f} s, {len(result.patches)} of {result.run_info['candidates']} patches"
    share = result.run_info["zero_padding_share"]
    return f"{text}; {share:.0%} of the volume is filled with 0 at its borders, which was taken for air" if share else text


def _model_row(bundle: Bundle) -> tuple[str, ...]:
    """One line of the table."""
    info = _model_info(bundle)
    spacing = " x ".join(f"{length:g}" for length in info["spacing_mm"])
    scores = ", ".join(f"{case} {_mean_scores(by_k)}" for case, by_k in info["scores"].items())
    return info["name"], info["backbone"], str(len(info["structures"])), spacing, f"{info['size_bytes'] / 1e6:.1f}", scores or "none"


def _mean_scores(by_k: dict) -> str:
    """'DSC 0.712 (k=0) 0.745 (k=10)': mean over the structures of a held-out case."""
    return "DSC " + " ".join(f"{row['mean']:.3f} (k={k})" for k, row in by_k.items())


def _model_info(bundle: Bundle) -> dict:
    """JSON-ready description of a bundle; triples are in array order KJI."""
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "title": manifest.title,
        "description": manifest.description,
        "backbone": manifest.backbone,
        "modality": manifest.modality,
        "structures": manifest.label_names,
        "spacing_mm": list(manifest.spacing_mm),
        "size_bytes": sum(path.stat().st_size for path in bundle.folder.iterdir() if path.is_file()),
        "sha256": bundle.sha256,
        "scores": manifest.scores,
        "license": manifest.license,
        "attributions": list(manifest.attributions),
    }


@contextmanager
def _ends_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that was closed, end a run like Ctrl-C, so that nothing partial stays."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    try:
        previous = {end: signal.getsignal(end) for end in ends}
        for end in ends:
            if previous[end] != signal.SIG_IGN:  # nohup
                signal.signal(end, interrupt)
    except ValueError:  # only the main thread may do so; elsewhere the caller cares for signals
        yield
        return
    try:
        yield
    finally:
        for end in ends:
            signal.signal(end, previous[end] or signal.SIG_DFL)  # None where it was not set from Python
