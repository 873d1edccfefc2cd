"""`nmsw compare --runtimes`: what computes the local net of a bundle, side by side: seconds of a patch, and how equal the answers are."""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from NMSWSegment.data.metrics import dice_per_class
from NMSWSegment.engine.net_runtimes import TITLES, LocalNet, Unusable, possible_runtimes, prepared_runtime, probe_inputs
from NMSWSegment.engine.runtime import Nets, open_nets, reproducible
from NMSWSegment.engine.segment import RunCache, segment_volume
from NMSWSegment.evaluation.comparison_page import machine_paragraph
from NMSWSegment.evaluation.comparison_run import open_results, write_results
from NMSWSegment.evaluation.measurement import in_own_process
from NMSWSegment.evaluation.speed_measurement import FirstCalls
from NMSWSegment.evaluation.tables import markdown
from NMSWSegment.files.bundle import Bundle, load_bundle
from NMSWSegment.files.resources import SAMPLE_PATH
from NMSWSegment.files.volume import read_volume
from NMSWSegment.protocol import EXACT, OnProgress, Progress, SegmentOptions

NUM_PATCHES = 10


@dataclass(frozen=True)
class RuntimeOptions:
    """One table."""

    bundles: tuple[str, ...]
    rounds: int
    """Patches that each runtime computes, all in turn."""
    threads: int | None
    device: str = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag of `nmsw compare --runtimes`; the others are --bundle and --windows (rounds)."""
    parser.add_argument(
        "--runtimes", action="store_true", help="what can compute the local nets of --bundle on this computer: seconds of a patch, equality on the sample CT"
    )


def run_runtimes(arguments: argparse.Namespace, *, on_progress: OnProgress) -> tuple[str, list[str], str]:
    """The page, no pictures, and a sentence."""
    options = RuntimeOptions(bundles=tuple(arguments.bundle), rounds=arguments.windows, threads=arguments.threads)
    folder: Path = arguments.output
    results = open_results(folder, options=options, device=options.device, threads=options.threads)
    for number, name in enumerate(options.bundles):
        if not any(record["bundle"] == name for record in results["records"]):
            on_progress(Progress("compare", number / len(options.bundles), f"{name}: runtimes"))
            results["records"] += in_own_process(measure_runtimes, name, options)
            write_results(results, folder)
    return runtimes_page(results, options), [], runtimes_sentence(results["records"])


def measure_runtimes(name: str, options: RuntimeOptions) -> list[dict]:
    """A row a runtime of one bundle, JSON-ready: seconds of every patch, agreement on the probe patch, and DSC with the exact labels of the sample CT.

    Or, where a runtime cannot be used, the reason.
    """
    bundle = load_bundle(name)
    inputs = probe_inputs(bundle.manifest)
    with reproducible(options.threads):
        nets = open_nets(bundle, device="cpu")
        with torch.inference_mode():
            expected = nets.local_net(*inputs)
        runtimes, records = {EXACT: nets.local_net}, [{"bundle": name, "runtime": EXACT}]
        for runtime in possible_runtimes():
            record = {"bundle": name, "runtime": runtime}
            try:
                runtimes[runtime], choice = prepared_runtime(runtime, bundle, nets.local_net, inputs=inputs, expected=expected)
                record["agreement"] = choice.agreement
            except Unusable as error:
                record["unusable"] = str(error)
            records.append(record)
        timed_nets = {runtime: FirstCalls(net, limit=options.rounds) for runtime, net in runtimes.items()}
        with torch.inference_mode():
            for _ in range(options.rounds):
                for net in timed_nets.values():
                    net(*inputs)
        labelmaps = {runtime: _sample_labels(bundle, nets, net, threads=options.threads) for runtime, net in runtimes.items()}
    for record in records:
        if (runtime := record["runtime"]) in runtimes:
            scores = dice_per_class(labelmaps[runtime], labelmaps[EXACT], num_classes=bundle.manifest.num_classes)[1:]
            present = scores[scores == scores]
            seconds = [round(each, 6) for each in timed_nets[runtime].seconds_per_patch]
            record |= {"seconds": seconds, "mean_dsc": float(present.mean()), "least_dsc": float(present.min())}
    return records


def runtimes_page(results: dict, options: RuntimeOptions) -> str:
    """The Markdown page."""
    rows = []
    for record in results["records"]:
        title = TITLES[record["runtime"]]
        if "unusable" in record:
            rows.append([record["bundle"], title, "-", "-", "-", f"not usable: {record['unusable']}"])
            continue
        agreement = f"{record['agreement']:.4f}" if "agreement" in record else "-"
        dsc = f"{record['mean_dsc']:.4f} ({record['least_dsc']:.4f})"
        rows.append(
            [record["bundle"], title, f"{statistics.median(record['seconds']):.3f}", f"{_times_as_fast(record, results['records']):.2f}", agreement, dsc]
        )
    parts = [
        "### What computes the local net\n",
        machine_paragraph(results),
        f"Seconds are the median of {options.rounds} patches, all runtimes in turn. Same label: share of the voxels of one patch of a phantom. DSC: labels of the sample CT "
        f"with k = {NUM_PATCHES} against those of {TITLES[EXACT]}, mean over its structures and the least of them.\n",
        markdown(("bundle", "runtime", "seconds a patch", "times as fast", "same label", "mean DSC (least)"), rows),
        f"**{runtimes_sentence(results['records'])}**\n",
    ]
    return "\n".join(parts)


def runtimes_sentence(records: list[dict]) -> str:
    """The fastest runtime of every bundle, in plain words."""
    parts = []
    for name in dict.fromkeys(record["bundle"] for record in records):
        best = max((record for record in records if record["bundle"] == name and "seconds" in record), key=lambda record: _times_as_fast(record, records))
        parts.append(f"{name} {TITLES[best['runtime']]}, {_times_as_fast(best, records):.1f} times as fast as {TITLES[EXACT]}")
    return f"Fastest on this computer: {'; '.join(parts)}."


def _times_as_fast(record: dict, records: list[dict]) -> float:
    """Over torch in float32 for the same bundle."""
    exact = next(other for other in records if other["bundle"] == record["bundle"] and other["runtime"] == EXACT)
    return statistics.median(exact["seconds"]) / statistics.median(record["seconds"])


def _sample_labels(bundle: Bundle, nets: Nets, local_net: LocalNet, *, threads: int | None) -> Tensor:
    """Labels of the sample CT with another local net, (K, J, I)."""
    own = Nets(manifest=bundle.manifest, coarse_net=nets.coarse_net, local_net=local_net, device=nets.device)
    options = SegmentOptions(num_patches=NUM_PATCHES, device="cpu", threads=threads)
    return segment_volume(read_volume(SAMPLE_PATH), bundle, options=options, run_cache=RunCache(nets=own)).labelmap.array
