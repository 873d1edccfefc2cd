"""`nmsw compare --fusion`: one patch through E2ENet dense, with masked fusion, and with what the masks left out sliced away, side by side."""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from NMSWSegment.engine.runtime import reproducible, resolve_device
from NMSWSegment.evaluation.comparison_page import machine_paragraph
from NMSWSegment.evaluation.comparison_run import open_results, write_results
from NMSWSegment.evaluation.measurement import in_own_process
from NMSWSegment.evaluation.speed_measurement import GEOMETRY, SEED, FirstCalls
from NMSWSegment.evaluation.tables import markdown
from NMSWSegment.nets.e2enet import fusion_convolutions, without_unused_channels
from NMSWSegment.nets.macs import count_macs
from NMSWSegment.nets.nmsw_net import Architecture, LocalNet
from NMSWSegment.protocol import OnProgress, Progress
from NMSWSegment.training.sparse import SPARSITIES, FusionSparsity, SparsityOptions


@dataclass(frozen=True)
class FusionOptions:
    """One table."""

    classes: int
    preset: str
    rounds: int
    """Times that each net runs, one after the other in turn."""
    device: str
    threads: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag of `nmsw compare --fusion`; the others are those of --speed."""
    parser.add_argument(
        "--fusion",
        action="store_true",
        help="E2ENet dense, masked and sliced on one patch, random weights; with --preset, --classes, --windows (rounds) of --speed",
    )


def run_fusion(arguments: argparse.Namespace, *, on_progress: OnProgress) -> tuple[str, list[str], str]:
    """The page, no pictures, and a sentence."""
    options = FusionOptions(classes=arguments.classes, preset=arguments.preset, rounds=arguments.windows, device=arguments.device, threads=arguments.threads)
    folder: Path = arguments.output
    results = open_results(folder, options=options, device=options.device, threads=options.threads)
    if not results["records"]:
        on_progress(Progress("compare", 0.0, "E2ENet dense, masked, sliced"))
        results["records"] = in_own_process(measure_fusion, options)
        write_results(results, folder)
    return fusion_page(results, options), [], fusion_sentence(results["records"])


def measure_fusion(options: FusionOptions) -> list[dict]:
    """A row a net, JSON-ready: sparsity, parameters, MACs of a patch, seconds of every round, largest difference to the masked net."""
    device = resolve_device(options.device)
    side = GEOMETRY[options.preset][0]
    patch = torch.rand(1, 1, side, side, side, generator=torch.Generator().manual_seed(SEED)).to(device)
    records, nets = [], []
    with reproducible(options.threads), torch.inference_mode():
        for kind, sparsity, net in _nets(options):
            nets.append(net.to(device))
            records.append({"kind": kind, "sparsity": sparsity, "parameters": _used_parameters(net), "macs": count_macs(net, tuple(patch.shape))})
            if kind == "sliced":  # follows the masked net that it was made of
                records[-1]["difference"] = float((net(patch) - nets[-2](patch)).abs().max())
        timed_nets = [FirstCalls(net, limit=options.rounds) for net in nets]
        for _ in range(options.rounds):
            for net in timed_nets:
                net(patch)
    return [record | {"seconds": [round(seconds, 4) for seconds in net.seconds_per_patch]} for record, net in zip(records, timed_nets)]


def fusion_page(results: dict, options: FusionOptions) -> str:
    """The Markdown page."""
    side = GEOMETRY[options.preset][0]
    parts = [
        f"### Sparse fusion: e2enet, preset {options.preset}, one patch of {side} x {side} x {side} voxels, {options.classes} classes\n",
        machine_paragraph(results),
        f"Random weights and random masks of whole input channels; seconds are the median of {options.rounds} rounds in which all nets took turns. Parameters are those that are not masked.\n",
        fusion_table(results["records"]),
        f"**{fusion_sentence(results['records'])}**\n",
    ]
    return "\n".join(parts)


def fusion_table(records: list[dict]) -> str:
    """A row a net, compared with the dense one."""
    dense_s = statistics.median(records[0]["seconds"])
    lines = []
    for record in records:
        seconds = statistics.median(record["seconds"])
        name = record["kind"] if record["sparsity"] == 0 else f"{record['kind']}, S = {record['sparsity']:g}"
        difference = f"{record['difference']:.1e}" if "difference" in record else "-"
        lines.append(
            [name, f"{record['parameters'] / 1e6:.2f}", f"{record['macs'] / 1e9:.1f}", f"{seconds:.3f}", f"{100 * seconds / dense_s:.0f} %", difference]
        )
    return markdown(("net", "parameters (M)", "GMACs", "seconds", "time of dense", "largest difference to masked"), lines)


def fusion_sentence(records: list[dict]) -> str:
    """What slicing saves, in plain words."""
    medians = {(record["kind"], record["sparsity"]): statistics.median(record["seconds"]) for record in records}
    dense_s = medians["dense", 0.0]
    shares = ", ".join(f"{100 * seconds / dense_s:.0f} % at S = {sparsity:g}" for (kind, sparsity), seconds in medians.items() if kind == "sliced")
    masked = [100 * seconds / dense_s for (kind, _), seconds in medians.items() if kind == "masked"]
    return f"On this computer the masked nets take {min(masked):.0f} to {max(masked):.0f} % of the dense net's time; with the masked channels sliced away it is {shares}."


def _nets(options: FusionOptions) -> list[tuple[str, float, nn.Module]]:
    """Kind, sparsity, net: dense, then masked and sliced for every sparsity of the paper, all from the same random weights."""
    architecture = Architecture(num_classes=options.classes, backbone="e2enet", preset=options.preset)

    def new() -> LocalNet:
        torch.manual_seed(SEED)
        return LocalNet(architecture).eval()

    nets = [("dense", 0.0, new())]
    for sparsity in SPARSITIES:
        masked, sliced = new(), new()
        for net in (masked, sliced):
            FusionSparsity(net.backbone, torch.optim.SGD(net.parameters()), options=SparsityOptions(iterations=1, sparsity=sparsity), seed=SEED)
        sliced.backbone = without_unused_channels(sliced.backbone)
        nets += [("masked", sparsity, masked), ("sliced", sparsity, sliced)]
    return nets


def _used_parameters(net: LocalNet) -> int:
    """Parameters that no mask leaves out; random weights are not 0."""
    masked = sum(int((conv.weight == 0).sum()) for conv in fusion_convolutions(net.backbone).values())
    return sum(parameter.numel() for parameter in net.parameters()) - masked
