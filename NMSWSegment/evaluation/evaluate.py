"""Score a bundle on labelled cases, on each case's own grid, for several numbers of patches."""

import argparse
import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path

from NMSWSegment.console import say
from NMSWSegment.data.prepared_case import CaseRequest
from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.evaluation.cases import METRICS, add_case_arguments, find_cases, names_apart, not_held_out, read_case, score_labelmap
from NMSWSegment.evaluation.plots import write_side_by_side
from NMSWSegment.files.bundle import Bundle, load_bundle
from NMSWSegment.files.output_file import check_output_path, replaced_file
from NMSWSegment.files.outputs import require_matplotlib
from NMSWSegment.protocol import SegmentOptions, UserError
from NMSWSegment.training.model_card import shown

CSV_HEADER = ("case", "k", "structure", *METRICS)


def evaluate(
    bundle: Bundle,
    cases: Sequence[CaseRequest],
    *,
    ks: Sequence[int | None],
    policy: str = "greedy",
    device: str = "cpu",
    threads: int | None = None,
    pictures: Path | None = None,
) -> dict:
    """DSC, NSD and HD95 per structure, case and k.

    Args:
        cases: of find_cases; label values are the bundle's.
        ks: numbers of patches; None is all.
        pictures: folder for CASE-kN.png, reference and result side by side.

    Returns:
        {"bundle", "sha256", "policy", "cases": {name: {k: {"mean", "seconds", "candidates", "dsc": {structure: value}, ...}}}}, with everything
        of score_labelmap; a structure that the case does not hold is left out.

    Raises:
        UserError: a case cannot be used, see read_case.
    """
    scores: dict = {}
    for case in cases:
        name = case.files.name
        volume, reference = read_case(case, bundle.manifest)
        scores[name] = {}
        for k in ks:
            started = time.perf_counter()
            result = segment_volume(volume, bundle, options=SegmentOptions(num_patches=k, policy=policy, device=device, threads=threads))
            run_info = {"seconds": round(time.perf_counter() - started, 2), "candidates": result.run_info["candidates"]}
            k_name = "all" if k is None else str(k)
            scores[name][k_name] = run_info | score_labelmap(result.labelmap, reference, manifest=bundle.manifest)
            if pictures:
                title = f"{name}, {bundle.manifest.name}, k = {k_name}"
                write_side_by_side(volume, reference, result.labelmap, labels=bundle.manifest.labels, title=title, path=pictures / f"{name}-k{k_name}.png")
    return {"bundle": bundle.manifest.name, "sha256": bundle.sha256, "policy": policy, "cases": scores}


def write_csv(scores: dict, path: Path) -> None:
    """One row a case, k and structure; HD95 of a structure that was missed is 'inf'.

    Raises:
        UserError: the file cannot be written.
    """
    with replaced_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(CSV_HEADER)
        for case, by_k in scores["cases"].items():
            for k, row in by_k.items():
                for structure in row["dsc"]:
                    values = [row[metric].get(structure, "") for metric in METRICS]
                    writer.writerow((case, k, structure, *("inf" if value is None else value for value in values)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw evaluate`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="name or folder of a bundle")
    add_case_arguments(parser, required=True)
    parser.add_argument("--k", default="0,5,10,all", metavar="N,...", help="numbers of patches (default: %(default)s)")
    parser.add_argument("--policy", default="greedy", choices=("greedy", "top_k", "random"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None, metavar="N")
    parser.add_argument("-o", "--output", type=Path, default=None, metavar="FILE.json", help="write the scores here too")
    parser.add_argument("--csv", type=Path, default=None, metavar="FILE.csv", help="one row a case, k and structure")
    parser.add_argument("--pictures", type=Path, default=None, metavar="FOLDER", help="three slices of every case and k, reference and result side by side")


def run(arguments: argparse.Namespace) -> int:
    """`nmsw evaluate`."""
    for path, ending in ((arguments.output, ".json"), (arguments.csv, ".csv")):
        if path:
            check_output_path(path, (ending,))
    if arguments.pictures:
        require_matplotlib("The pictures need")
        make_folder(arguments.pictures)
    bundle = load_bundle(arguments.bundle)
    cases = find_cases(arguments.data, bundle.manifest, wanted=arguments.cases, split=arguments.split)
    ks = patch_counts(arguments.k)
    if sentence := names_apart(cases, bundle.manifest):
        say(sentence)
    if arguments.split == "train" and (sentence := not_held_out(cases, bundle.manifest)):
        say(sentence)
    scores = evaluate(bundle, cases, ks=ks, policy=arguments.policy, device=arguments.device, threads=arguments.threads, pictures=arguments.pictures)
    if arguments.output:
        with replaced_file(arguments.output) as temporary:
            temporary.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    if arguments.csv:
        write_csv(scores, arguments.csv)
    for name, by_k in scores["cases"].items():
        for k, row in by_k.items():
            say(f"{name}  k={k} of {row['candidates']}  mean DSC {shown(row['mean'])}  NSD 2 mm {shown(row['mean_nsd_2mm'])}  {row['seconds']:.1f} s")
    return 0


def make_folder(folder: Path) -> None:
    """Make a folder that may exist already.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder '{folder}' cannot be made ({error.strerror}). Choose a place that you may write to.") from error


def patch_counts(text: str) -> list[int | None]:
    """The values of --k; None for 'all'.

    Raises:
        UserError: a word is neither a whole number nor 'all'.
    """
    words = [word.strip() for word in text.split(",")]
    unexpected = [word for word in words if word != "all" and not word.lstrip("-").isdigit()]
    if unexpected:
        raise UserError(f"--k holds '{unexpected[0]}'. Give whole numbers or 'all', for example 0,5,10,all.")
    return [None if word == "all" else int(word) for word in words]
