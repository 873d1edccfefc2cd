"""The page of a comparison: what was measured where, the tables, and what they say."""

from collections.abc import Sequence
from pathlib import Path

from NMSWSegment.engine.selection import RANDOM_POLICY_SEED
from NMSWSegment.evaluation.baselines import RANDOM_SEED
from NMSWSegment.evaluation.methods import middle_k
from NMSWSegment.evaluation.tables import REFERENCE_METHOD, losses, main_table, plain_sentence, stage_table, structure_table, summary_rows
from NMSWSegment.protocol import UserError

ABLATION_ONLY = ("no_weights_", "one_voxel_")
"""Methods that only the tables of the ablations show."""
CAPTIONS = {
    "pareto.png": "Accuracy against time and against MACs; further left and higher is better",
    "dsc_by_k.png": "Accuracy by the number of patches",
    "dsc_by_size.png": "Accuracy by the size of a structure",
    "errors.png": "Where the methods err: missed red, wrong yellow, chosen patches outlined",
}
NOTES = """\
How to read it: seconds are those of one run in a process of its own, reading and writing the files included, the start of Python not; *cold* opens the
nets, *warm* has them. DSC, NSD and HD95 are means over the structures that a case holds, on the case's own grid, ± is the standard deviation over
cases; unknown voxels count for nothing, and HD95 leaves out structures that were missed altogether. TMACs are the multiply-accumulates of the nets as they run;
the paper counts transposed convolutions at the size of their output. Peak GB is the resident set of the process, about 0.6 GB of it Python, torch and MONAI.
The sliding windows use this bundle's local net; that of a cascade reads the coarse answer in every window. Patches are stitched on the CPU.
"""


def comparison_page(groups: dict[str, list[dict]], *, results: dict, ks: Sequence[int], ablations: dict[str, tuple[str, ...]], pictures: Sequence[str]) -> str:
    """The Markdown page.

    Args:
        groups: records by title of the table.
        results: what run_comparison gave.
        ablations: name -> kinds of methods that it compares, at every k.
        pictures: file names.
    """
    parts = [machine_paragraph(results), NOTES]
    for number, (title, records) in enumerate(groups.items(), start=1):
        every = summary_rows(records)
        reference = every.get(REFERENCE_METHOD)
        rows = {name: row for name, row in every.items() if not (ablations and name.startswith(ABLATION_ONLY))}
        k = middle_k(ks)
        parts += [f"### {title}\n", _seen_sentence(records), f"**{plain_sentence(rows)}**\n", main_table(rows, reference=reference)]
        parts += ["Where NMSW loses: " + (" ".join(losses(rows)) or "no other method here is at least as accurate in clearly less time (5 %).") + "\n"]
        prefix = "" if len(groups) == 1 else f"{number}-"
        parts += [
            f"![{CAPTIONS[name.removeprefix(prefix)]}]({name})\n" for name in pictures if name.startswith(prefix) and name.removeprefix(prefix) in CAPTIONS
        ]
        parts += ["Seconds by stage, warm:\n", stage_table(rows)]
        for metric, name in (("dsc", "DSC"), ("nsd_2mm", "NSD at 2 mm")):
            parts += [
                f"{name} by structure, mean ± standard deviation over cases:\n",
                structure_table(records, ("coarse", f"top_k_{k}", f"greedy_{k}", "all", "sw_0.50"), metric=metric),
            ]
        for ablation, kinds in ablations.items():
            wanted = {f"{kind}_{k}" for kind in kinds for k in ks}
            parts += [
                f"Ablation {ablation.replace('_', ' ')}:\n",
                main_table({name: row for name, row in every.items() if name in wanted}, reference=reference),
            ]
    return "\n".join(parts)


def machine_paragraph(results: dict) -> str:
    """Where, when and with which versions and seeds."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("NMSWSegment", "torch", "numpy", "python"))
    return (
        f"Measured on {results['date']}: {machine['processor']}, device {machine['device']}, {machine['threads']} CPU thread(s), {machine['platform']}; {versions}. "
        f"Seeds: {RANDOM_SEED} for random foreground as published, {RANDOM_POLICY_SEED} for the policy random; nothing else is random.\n"
    )


def put_into_page(path: Path, page: str, *, name: str) -> str:
    """The text of a file with a page between its marks.

    Raises:
        UserError: the file cannot be read, or does not have the marks.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}). Give a Markdown file that holds the lines {first} and {last}.") from error
    before, found, rest = text.partition(first)
    _, found_last, after = rest.partition(last)
    if not (found and found_last):
        raise UserError(f"'{path}' does not hold the lines {first} and {last}. Write them where the page shall stand, or name --output otherwise.")
    return f"{before}{first}\n\n{page}\n{last}{after}"


def _seen_sentence(records: Sequence[dict]) -> str:
    """Whether the cases were part of training."""
    held_out = {record["case"]: record["held_out"] for record in records}
    if all(held_out.values()):
        return "Every case was held out of the training of the bundle that ran on it.\n"
    seen = ", ".join(name for name, was_out in held_out.items() if not was_out)
    return f"**Not held out: {seen}. The bundle may have been trained on them, so that the scores are too good; time and the order of the methods still say something.**\n"
