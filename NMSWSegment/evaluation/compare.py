"""`nmsw compare`: NMSW against honest baselines, on labelled cases or, for speed alone, on random weights."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from NMSWSegment.console import say
from NMSWSegment.evaluation import fusion_speed, runtime_speed, speed
from NMSWSegment.evaluation.cases import METRICS, add_case_arguments, find_cases, names_apart, read_case, was_held_out
from NMSWSegment.evaluation.charts import write_dsc_by_k, write_dsc_by_size, write_pareto
from NMSWSegment.evaluation.comparison_page import ABLATION_ONLY, comparison_page, put_into_page
from NMSWSegment.evaluation.comparison_run import CaseOfBundle, CompareOptions, labelmap_path, run_comparison
from NMSWSegment.evaluation.evaluate import make_folder, patch_counts
from NMSWSegment.evaluation.methods import Method, comparison_methods, middle_k
from NMSWSegment.evaluation.plots import write_errors
from NMSWSegment.evaluation.tables import csv_text, plain_sentence, structures_csv_text, summary_rows
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.output_file import replaced_file
from NMSWSegment.files.outputs import require_matplotlib
from NMSWSegment.files.volume import read_volume
from NMSWSegment.progress_bar import progress_bar
from NMSWSegment.protocol import OnProgress, PatchBox, UserError, unknown_name

ABLATIONS = {"policy": ("top_k", "greedy", "random_fair"), "class_weights": ("greedy", "no_weights"), "pooling": ("top_k", "one_voxel")}
"""Name -> methods at every k. The estimator and the k of training need a training run each and are not here."""
ERRORS_PICTURE = "errors.png"
PICTURES = ("pareto.png", "dsc_by_k.png", "dsc_by_size.png", ERRORS_PICTURE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw compare`."""
    parser.add_argument("--bundle", nargs="+", default=["torso-unet"], metavar="NAME", help="names or folders of bundles (default: torso-unet)")
    add_case_arguments(parser, required=False)
    parser.add_argument("--held-out", action="store_true", help="each bundle runs only on the cases that its training held out; all bundles make one table")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="tables, pictures and labelmaps; a stopped comparison goes on there")
    parser.add_argument("--k", default="5,10,30", metavar="N,...", help="numbers of patches (default: %(default)s)")
    parser.add_argument("--methods", default="", metavar="NAME,...", help="only these methods (default: all but what --ablate adds)")
    parser.add_argument("--ablate", default="", metavar="NAME,...", help=f"a further table each: {', '.join(ABLATIONS)}")
    parser.add_argument("--device", default="cpu", metavar="auto|cpu|cuda|mps", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: all physical cores)")
    parser.add_argument(
        "--docs",
        type=Path,
        default=None,
        metavar="FILE.md",
        help="put the page also into this file, between the lines <!-- FOLDER --> and <!-- /FOLDER -->, and the pictures beside it",
    )
    speed.add_arguments(parser)
    fusion_speed.add_arguments(parser)
    runtime_speed.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """`nmsw compare`."""
    make_folder(arguments.output)
    with progress_bar(is_transient=False) as on_progress:
        if arguments.speed:
            carry_out = speed.run_speed
        elif arguments.fusion:
            carry_out = fusion_speed.run_fusion
        elif arguments.runtimes:
            carry_out = runtime_speed.run_runtimes
        else:
            carry_out = _compare
        page, pictures, sentence = carry_out(arguments, on_progress=on_progress)
    _write_text(arguments.output / "table.md", page)
    if arguments.docs:
        _write_docs(page, pictures, docs=arguments.docs, folder=arguments.output)
    say(page)
    say(sentence)
    return 0


def chosen_methods(*, ks: Sequence[int], wanted: str, ablations: Sequence[str]) -> list[Method]:
    """The methods of a comparison, in the order of the table.

    Raises:
        UserError: a method does not exist.
    """
    every = comparison_methods(tuple(ks))
    names = [name for name in wanted.split(",") if name] or [name for name in every if not name.startswith(ABLATION_ONLY)]
    for name in names:
        if name not in every:
            raise UserError(unknown_name("method", name, list(every)))
    added = [f"{kind}_{k}" for ablation in ablations for k in ks for kind in ABLATIONS[ablation]]
    return [method for name, method in every.items() if name in (*names, *added)]


def _compare(arguments: argparse.Namespace, *, on_progress: OnProgress) -> tuple[str, list[str], str]:
    """Measure and write everything but the page: the page, its pictures, the sentence."""
    require_matplotlib("The plots need")
    if not arguments.data:
        raise UserError("There is nothing to compare on. Give --data decathlon:FOLDER, or --speed for speed without data.")
    ks = [k for k in patch_counts(arguments.k) if k is not None]
    ablations = [name for name in arguments.ablate.split(",") if name]
    for name in ablations:
        if name not in ABLATIONS:
            raise UserError(unknown_name("ablation", name, list(ABLATIONS)))
    methods = chosen_methods(ks=ks, wanted=arguments.methods, ablations=ablations)
    bundle_cases = _bundle_cases(arguments)
    options = CompareOptions(
        bundles={bundle_case.bundle.manifest.name: bundle_case.bundle.sha256 for bundle_case in bundle_cases},
        data=tuple(arguments.data),
        cases={
            name: tuple(bundle_case.case.files.name for bundle_case in bundle_cases if bundle_case.bundle.manifest.name == name)
            for name in dict.fromkeys(bundle_case.bundle.manifest.name for bundle_case in bundle_cases)
        },
        methods=tuple(method.name for method in methods),
        device=arguments.device,
        threads=arguments.threads,
        held_out=arguments.held_out,
    )
    results = run_comparison(bundle_cases, methods, options=options, folder=arguments.output, on_progress=on_progress)
    groups = table_groups(results["records"], held_out=arguments.held_out)
    pictures = []
    for number, (_, records) in enumerate(groups.items(), start=1):
        prefix = "" if len(groups) == 1 else f"{number}-"
        pictures += [f"{prefix}{name}" for name in _write_files(records, bundle_cases=bundle_cases, ks=ks, folder=arguments.output, prefix=prefix)]
    page = comparison_page(groups, results=results, ks=ks, ablations={name: ABLATIONS[name] for name in ablations}, pictures=pictures)
    return page, pictures, plain_sentence(summary_rows(next(iter(groups.values()))))


def table_groups(records: Sequence[dict], *, held_out: bool) -> dict[str, list[dict]]:
    """Records of each table by its title: one a bundle, or one for the folds of a cross-validation."""
    if held_out:
        pairs = dict.fromkeys(f"{record['bundle']} on {record['case']}" for record in records)
        return {f"Held-out cases: {', '.join(pairs)}": list(records)}
    return {f"Bundle {name}": [record for record in records if record["bundle"] == name] for name in dict.fromkeys(record["bundle"] for record in records)}


def _bundle_cases(arguments: argparse.Namespace) -> list[CaseOfBundle]:
    """Every bundle with its cases.

    Raises:
        UserError: two bundles have one name, or --held-out leaves nothing.
    """
    bundle_cases: list[CaseOfBundle] = []
    for source in arguments.bundle:
        bundle = load_bundle(source)
        if any(bundle_case.bundle.manifest.name == bundle.manifest.name for bundle_case in bundle_cases):
            raise UserError(f"Two bundles are named '{bundle.manifest.name}'. Export one of them under another name.")
        cases = find_cases(arguments.data, bundle.manifest, wanted=arguments.cases, split=arguments.split)
        if sentence := names_apart(cases, bundle.manifest):
            say(sentence)
        cases = [case for case in cases if not arguments.held_out or was_held_out(case.files.name, bundle.manifest)]
        if not cases:
            raise UserError(
                f"The training of bundle '{bundle.manifest.name}' held out none of the cases. Leave --held-out away, or give the cases that it held out."
            )
        bundle_cases += [CaseOfBundle(bundle=bundle, source=str(source), case=case) for case in cases]
    return bundle_cases


def _write_files(records: Sequence[dict], *, bundle_cases: Sequence[CaseOfBundle], ks: Sequence[int], folder: Path, prefix: str) -> list[str]:
    """Tables and pictures of one group; the names of the pictures without the prefix."""
    rows = summary_rows(records)
    _write_text(folder / f"{prefix}table.csv", csv_text(rows))
    _write_text(folder / f"{prefix}structures.csv", structures_csv_text(records, METRICS))
    _write_error_picture(records, bundle_cases=bundle_cases, ks=ks, path=folder / f"{prefix}{ERRORS_PICTURE}")
    if all(row.dsc is None for row in rows.values()):  # the cases show none of the classes
        return [ERRORS_PICTURE]
    write_pareto(rows, folder / f"{prefix}pareto.png")
    write_dsc_by_k(rows, folder / f"{prefix}dsc_by_k.png")
    write_dsc_by_size(records, ("coarse", f"greedy_{middle_k(ks)}", "all", "sw_0.50"), folder / f"{prefix}dsc_by_size.png")
    return list(PICTURES)


def _write_error_picture(records: Sequence[dict], *, bundle_cases: Sequence[CaseOfBundle], ks: Sequence[int], path: Path) -> None:
    """Where some methods err on the first case, and the patches they chose."""
    first = records[0]
    bundle_case = next(
        bundle_case for bundle_case in bundle_cases if (bundle_case.bundle.manifest.name, bundle_case.case.files.name) == (first["bundle"], first["case"])
    )
    volume, reference = read_case(bundle_case.case, bundle_case.bundle.manifest)
    k = middle_k(ks)
    results = []
    for record in records:
        if record["case"] == first["case"] and record["bundle"] == first["bundle"] and record["method"] in ("coarse", f"top_k_{k}", f"greedy_{k}", "sw_0.50"):
            labelmap = read_volume(labelmap_path(path.parent, bundle=record["bundle"], case=record["case"], method=record["method"]))
            results.append((record["title"], labelmap, [PatchBox.from_dict(patch) for patch in record["patches"]]))
    write_errors(volume, reference, results or [(first["title"], reference, ())], title=first["case"], path=path)


def _write_docs(page: str, pictures: Sequence[str], *, docs: Path, folder: Path) -> None:
    """Put the page into a file between two marks, its pictures into the folder of the file's name, the paths adapted."""
    name = folder.resolve().name
    beside = docs.with_suffix("")
    make_folder(beside)
    for picture in pictures:
        shutil.copyfile(folder / picture, beside / f"{name}-{picture}")
        page = page.replace(f"]({picture})", f"]({beside.name}/{name}-{picture})")
    _write_text(docs, put_into_page(docs, page, name=name))


def _write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
