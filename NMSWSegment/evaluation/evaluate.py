"""Score a bundle on labelled cases, on each case's own grid, for several numbers of patches."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from NMSWSegment.bundle import Bundle, load_bundle
from NMSWSegment.engine import segment_volume
from NMSWSegment.evaluation.metrics import dice_per_class
from NMSWSegment.output_file import check_output_path, replaced_file
from NMSWSegment.protocol import SegmentOptions, UserError
from NMSWSegment.training.datasets import GEOMETRY_TOLERANCE_MM, read_decathlon
from NMSWSegment.training.losses import UNKNOWN_LABEL
from NMSWSegment.volume import Volume, read_volume


def evaluate(bundle: Bundle, cases: Sequence[tuple[str, Path, Path]], *, ks: Sequence[int | None], policy: str = "greedy", device: str = "cpu", threads: int | None = None) -> dict:
    """DSC per structure, case and k.

    Args:
        cases: (name, image path, label path); label values are the bundle's.
        ks: numbers of patches; None is all.

    Returns:
        {"bundle", "sha256", "policy", "cases": {name: {k: {"mean", "seconds", "candidates", "dsc": {structure: value}}}}};
        a structure that the case does not hold is left out.

    Raises:
        UserError: a label does not lie on its volume's grid, or holds a value that the bundle does not have.
    """
    scores: dict = {}
    for name, image_path, label_path in cases:
        volume, reference = read_volume(image_path), read_volume(label_path)
        _check_reference(reference, volume, num_classes=bundle.manifest.num_classes, name=name)
        scores[name] = {}
        for k in ks:
            started = time.perf_counter()
            result = segment_volume(volume, bundle, options=SegmentOptions(num_patches=k, policy=policy, device=device, threads=threads))
            seconds = time.perf_counter() - started
            dice = dice_per_class(result.labelmap.array, reference.array, num_classes=bundle.manifest.num_classes)[1:]
            scores[name]["all" if k is None else str(k)] = {
                "mean": round(float(np.nanmean(dice)), 4),
                "seconds": round(seconds, 2),
                "candidates": result.report["candidates"],
                "dsc": {label.name: round(float(value), 4) for label, value in zip(bundle.manifest.labels, dice) if not np.isnan(value)},
            }
    return {"bundle": bundle.manifest.name, "sha256": bundle.sha256, "policy": policy, "cases": scores}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw evaluate`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="name or folder of a bundle")
    parser.add_argument("--data", required=True, metavar="decathlon:FOLDER", help="labelled cases")
    parser.add_argument("--cases", default="", metavar="ID,...", help="only these cases (default: all labelled ones)")
    parser.add_argument("--k", default="0,5,10,all", metavar="N,...", help="numbers of patches (default: %(default)s)")
    parser.add_argument("--policy", default="greedy", choices=("greedy", "top_k", "random"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None, metavar="N")
    parser.add_argument("-o", "--output", type=Path, default=None, metavar="FILE.json", help="write the scores here too")


def run(arguments: argparse.Namespace) -> int:
    """`nmsw evaluate`."""
    if arguments.output:
        check_output_path(arguments.output, (".json",))
    kind, _, folder = arguments.data.partition(":")
    if kind != "decathlon" or not folder:
        raise UserError(f"--data is '{arguments.data}'. Write decathlon:FOLDER.")
    bundle = load_bundle(arguments.bundle)
    cases, label_names = read_decathlon(Path(folder))
    if list(label_names) != bundle.manifest.label_names:
        raise UserError(
            f"'{folder}' has the labels {', '.join(label_names)}, but bundle '{bundle.manifest.name}' has {', '.join(bundle.manifest.label_names)}. "
            "Bring the data to the bundle's list: the same names in the same order."
        )
    wanted = [name for name in arguments.cases.split(",") if name]
    unknown = set(wanted) - {case[0] for case in cases}
    if unknown:
        raise UserError(f"No case '{sorted(unknown)[0]}' in '{folder}'. It has: {', '.join(case[0] for case in cases)}.")
    ks = _patch_counts(arguments.k)
    scores = evaluate(bundle, [case for case in cases if not wanted or case[0] in wanted], ks=ks, policy=arguments.policy, device=arguments.device, threads=arguments.threads)
    for name, by_k in scores["cases"].items():
        for k, row in by_k.items():
            print(f"{name}  k={k} of {row['candidates']}  mean DSC {row['mean']:.3f}  {row['seconds']:.1f} s")
    if arguments.output:
        with replaced_file(arguments.output) as temporary:
            temporary.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return 0


def _check_reference(reference: Volume, volume: Volume, *, num_classes: int, name: str) -> None:
    """Raise UserError unless the reference labels lie on the volume's grid and are labels of the bundle."""
    if volume.shape != reference.shape or not np.allclose(volume.ijk_to_ras, reference.ijk_to_ras, atol=GEOMETRY_TOLERANCE_MM):
        raise UserError(f"Case '{name}': the label (shape {reference.shape}) and the volume ({volume.shape}, KJI) lie on different grids. Resample the label to the volume's grid.")
    strange = sorted(set(np.unique(reference.array).tolist()) - {*range(num_classes), UNKNOWN_LABEL})
    if strange:
        raise UserError(f"Case '{name}' holds the label value {strange[0]}, but the bundle has the labels 1 to {num_classes - 1}. Set such voxels to 0, or to 255 (unknown).")


def _patch_counts(text: str) -> list[int | None]:
    """The values of --k; None for 'all'."""
    words = [word.strip() for word in text.split(",")]
    strange = [word for word in words if word != "all" and not word.lstrip("-").isdigit()]
    if strange:
        raise UserError(f"--k holds '{strange[0]}'. Give whole numbers or 'all', for example 0,5,10,all.")
    return [None if word == "all" else int(word) for word in words]
