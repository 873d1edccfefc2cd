"""`nmsw compare --speed`: seconds, MACs and memory with random weights, the setting of the paper's Table 2."""

import argparse
import statistics
from pathlib import Path

import numpy as np

from NMSWSegment.evaluation.comparison_page import machine_paragraph
from NMSWSegment.evaluation.comparison_run import open_results, write_results
from NMSWSegment.evaluation.measurement import in_own_process
from NMSWSegment.evaluation.speed_measurement import METHODS, SpeedOptions, measure_earlier, measure_speed, speed_macs
from NMSWSegment.evaluation.tables import markdown
from NMSWSegment.files.memory import available_memory_bytes
from NMSWSegment.nets.backbones import BACKBONES, NUM_FEATURES
from NMSWSegment.protocol import OnProgress, Progress, UserError

COMPARED = "nmsw_10"
"""The method that --before measures."""
STAGES = ("coarse", "upsample", "select", "patches", "aggregate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw compare --speed`."""
    group = parser.add_argument_group("speed without data")
    group.add_argument("--speed", action="store_true", help="random weights on a random volume: seconds, MACs and memory only")
    group.add_argument("--shape", nargs=3, type=int, default=(480, 480, 480), metavar="N", help="voxels, slices first (default: 480 480 480)")
    group.add_argument("--classes", type=int, default=20, metavar="N", help="classes with background (default: %(default)s)")
    group.add_argument("--preset", default="paper", choices=tuple(NUM_FEATURES), help="size of the nets (default: %(default)s)")
    group.add_argument("--backbone", default="unet", choices=BACKBONES, help="local net (default: %(default)s)")
    group.add_argument(
        "--before", type=Path, default=None, metavar="FOLDER", help="folder of an earlier version: its seconds by stage beside those of this one, k = 10"
    )
    group.add_argument(
        "--windows", type=int, default=3, metavar="N", help="windows of each method that are measured; the others are extrapolated (default: %(default)s)"
    )


def run_speed(arguments: argparse.Namespace, *, on_progress: OnProgress) -> tuple[str, list[str], str]:
    """The page, no pictures, and a sentence."""
    options = SpeedOptions(
        shape=tuple(arguments.shape),
        classes=arguments.classes,
        preset=arguments.preset,
        backbone=arguments.backbone,
        windows=arguments.windows,
        device=arguments.device,
        threads=arguments.threads,
    )
    folder: Path = arguments.output
    if arguments.before is not None and not (arguments.before / "NMSWSegment").is_dir():
        raise UserError(f"'{arguments.before}' holds no folder NMSWSegment. Give the folder of an earlier version with --before, or leave it out.")
    results = open_results(folder, options=options, device=options.device, threads=options.threads)
    done = {record["method"] for record in results["records"]}
    for number, method in enumerate(METHODS):
        if method in done:
            continue
        on_progress(Progress("compare", number / len(METHODS), f"{options.backbone}: {_title(method)}"))
        _check_memory(method, options)
        record = in_own_process(measure_speed, method, options)
        macs, paper_macs = speed_macs(method, options, windows=record["windows"])
        results["records"].append(record | {"macs": macs, "paper_macs": paper_macs})
        write_results(results, folder)
    if arguments.before is not None and "before" not in results:
        on_progress(Progress("compare", 1.0, f"{options.backbone}: {_title(COMPARED)}, earlier version"))
        results["before"] = measure_earlier(COMPARED, options, folder=arguments.before)
        write_results(results, folder)
    return speed_page(results, options), [], speed_sentence(results["records"])


def speed_page(results: dict, options: SpeedOptions) -> str:
    """The Markdown page."""
    size = " x ".join(map(str, options.shape))
    parts = [
        f"### Speed: {options.backbone}, preset {options.preset}, {size} voxels, {options.classes} classes\n",
        machine_paragraph(results),
        "Random weights; the coarse logits that are up-sampled are those of an ellipsoid phantom, as smooth as a trained net's. Stitching, up-sampling and memory are "
        "measured with all windows; seconds marked * extrapolate the local net, by the median of all measured windows. TMACs (paper) count the published nets in "
        "the paper's way.\n",
        speed_table(results["records"]),
        "Seconds by stage, and what is not a net as a share of the nets:\n",
        stage_table(results["records"]),
        *([f"Seconds of {_title(COMPARED)} before and after, measured one after the other:\n", before_table(results)] if "before" in results else []),
        f"**{speed_sentence(results['records'])}**\n",
    ]
    return "\n".join(parts)


def speed_table(records: list[dict]) -> str:
    """A row a method."""
    totals = total_seconds(records)
    lines = []
    for record in records:
        stages, total = record["seconds"], totals[record["method"]]
        mark = "*" if len(record["seconds_per_patch"]) < record["windows"] else ""
        before = sum(stages.get(stage, 0.0) for stage in ("coarse", "upsample", "select"))
        memory = [f"{value / 1e9:.1f}" if value is not None else "-" for value in (record["peak_memory_bytes"], record["gpu_memory_bytes"])]
        seconds = [f"{total:.1f}{mark}", f"{before:.1f}", f"{total - before - stages['aggregate']:.1f}{mark}", f"{stages['aggregate']:.1f}"]
        relative = f"{100 * total / totals['sw_0.50']:.1f} %" if "sw_0.50" in totals else "-"
        counts = [str(record["windows"]), str(len(record["seconds_per_patch"]))]
        lines.append([_title(record["method"]), *counts, *seconds, f"{record['macs'] / 1e12:.3f}", f"{record['paper_macs'] / 1e12:.2f}", *memory, relative])
    header = ("method", "windows", "measured", "seconds", "coarse", "patches", "stitching", "TMACs", "TMACs (paper)", "peak GB", "GPU GB", "time of SW 0.5")
    return markdown(header, lines)


def stage_table(records: list[dict]) -> str:
    """A row for each method with a coarse pass."""
    per_patch_s = _patch_seconds(records)
    lines = []
    for record in records:
        if "coarse" in record["seconds"]:
            stages = record["seconds"] | {"patches": record["windows"] * per_patch_s}
            nets = stages["coarse"] + stages["patches"]
            rest = sum(stages.values()) - nets
            lines.append((_title(record["method"]), *(f"{stages[stage]:.2f}" for stage in STAGES), f"{100 * rest / nets:.0f} %"))
    return markdown(("method", *STAGES, "not nets"), lines)


def before_table(results: dict) -> str:
    """A row a stage, and the peak memory."""
    after = next(record for record in results["records"] if record["method"] == COMPARED)
    rows = []
    for stage in STAGES:
        pair = [
            statistics.median(record["seconds_per_patch"]) * record["windows"] if stage == "patches" else record["seconds"][stage]
            for record in (results["before"], after)
        ]
        rows.append((stage, *(f"{seconds:.2f} s" for seconds in pair), f"{pair[0] / max(pair[1], 1e-3):.1f}"))
    peaks = [record["peak_memory_bytes"] for record in (results["before"], after)]
    if all(peaks):
        rows.append(("peak memory", *(f"{peak / 1e9:.1f} GB" for peak in peaks), f"{peaks[0] / peaks[1]:.1f}"))
    return markdown(("stage", "before", "after", "before / after"), rows)


def total_seconds(records: list[dict]) -> dict[str, float]:
    """Seconds by method. All methods share the net, so that the median over all measured windows stands for each of them."""
    per_patch_s = _patch_seconds(records)
    return {record["method"]: sum(record["seconds"].values()) + record["windows"] * per_patch_s for record in records}


def speed_sentence(records: list[dict]) -> str:
    """What k = 5 saves, in plain words."""
    totals = total_seconds(records)
    if not {"sw_0.50", "nmsw_5"} <= totals.keys():
        return "There is no sentence without both the sliding window and k = 5."
    return f"On this computer k = 5 takes {_duration(totals['nmsw_5'])} where a sliding window takes {_duration(totals['sw_0.50'])}: {100 * totals['nmsw_5'] / totals['sw_0.50']:.1f} % of its time."


def _patch_seconds(records: list[dict]) -> float:
    """Of the local net for one patch."""
    return statistics.median(seconds for record in records for seconds in record["seconds_per_patch"])


def _check_memory(method: str, options: SpeedOptions) -> None:
    """Raise UserError where the C float volumes of a sliding window do not fit: the system would end other programs, too."""
    needed = 4 * (options.classes + 4) * float(np.prod(options.shape)) + 2e9
    available = available_memory_bytes()
    if method.startswith("sw") and available is not None and needed > available:
        raise UserError(
            f"The sliding window needs about {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are free. Use a smaller --shape, fewer --classes, or close other programs."
        )


def _title(method: str) -> str:
    """'NMSW, k = 5'."""
    return "sliding window, overlap 0.5" if method.startswith("sw") else f"NMSW, k = {method.partition('_')[2]}"


def _duration(seconds: float) -> str:
    """'42 s', '6.5 min'."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
