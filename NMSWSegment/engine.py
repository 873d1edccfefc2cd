"""NMSW inference on one page: canonical -> coarse -> selection -> patches -> labels -> the volume's own grid."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

import NMSWSegment
from NMSWSegment.aggregation import StreamingAggregator
from NMSWSegment.bundle import Bundle, BundleManifest
from NMSWSegment.canonical import coarse_input, restore_labelmap, to_canonical
from NMSWSegment.frame import CanonicalFrame
from NMSWSegment.grid import CandidateGrid
from NMSWSegment.protocol import PatchBox, Progress, Report, SegmentOptions, UserError, ignore_progress, unknown_name
from NMSWSegment.runtime import Nets, open_nets, reproducible
from NMSWSegment.selection import Selection, select
from NMSWSegment.volume import Volume

PATCHES_FROM, PATCHES_TO = 0.2, 0.9  # share of the progress bar that the patches take


@dataclass(frozen=True)
class CoarsePass:
    """Everything that is known after the coarse net; the input of the refinement."""

    x: Tensor
    """Canonical volume, (1, 1, D, H, W)."""
    frame: CanonicalFrame
    grid: CandidateGrid
    coarse_logits: Tensor
    """(C, d, h, w)."""
    importance_map: Tensor
    """(d, h, w) logits."""


@dataclass(frozen=True)
class SegmentResult:
    """What a run gives."""

    labelmap: Volume
    """uint8 on the volume's own grid; values are the bundle's label values, 0 is background."""
    patches: tuple[PatchBox, ...]
    """Best first."""
    report: dict
    """JSON-ready: versions, device, bundle, options, timings in seconds, candidates, patches, device steps."""


def segment_volume(volume: Volume, bundle: Bundle, *, options: SegmentOptions = SegmentOptions(), report: Report = ignore_progress) -> SegmentResult:
    """Segment a volume. The same input gives the same answer, bit for bit, on the same computer.

    Args:
        volume: intensity, (K, J, I); any orientation, spacing and size.
        report: called before every stage and after every patch; may raise Cancelled.

    Raises:
        UserError: a structure or device of the options does not exist, or the volume does not suit the bundle.
    """
    keep = structure_values(bundle.manifest, options.structures)
    timings: dict[str, float] = {}
    with reproducible(options.threads):
        threads = torch.get_num_threads()
        report(Progress("load", 0.0, f"Loading model {bundle.manifest.name}"))
        with _timed(timings, "load"):
            nets = open_nets(bundle, device=options.device)
        coarse = coarse_pass(volume, nets, report=report, timings=timings)
        with _timed(timings, "select"):
            selection = choose(coarse, options=options, focus_classes=keep if options.structures else ())
        labels = refine(coarse, selection, nets, report=report, timings=timings)
        report(Progress("restore", PATCHES_TO, "Writing labels to the volume's grid"))
        with _timed(timings, "restore"):
            labelmap = restore_labelmap(_kept(labels, keep), coarse.frame)
    patches = patch_boxes(selection, grid=coarse.grid, frame=coarse.frame)
    facts = {
        "bundle": {"name": bundle.manifest.name, "sha256": bundle.sha256},
        "options": options.to_dict(),
        "device": str(nets.device),
        "threads": threads,
        "device_steps": nets.device_steps,
        "versions": {"NMSWSegment": NMSWSegment.__version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(), "platform": platform.platform()},
        "volume": {"name": volume.name, "shape_kji": list(volume.shape), "spacing_mm_kji": list(volume.spacing_mm)},
        "candidates": coarse.grid.num_candidates,
        "timings_s": {stage: round(seconds, 4) for stage, seconds in timings.items()},
        "patches": [asdict(patch) for patch in patches],
    }
    report(Progress("done", 1.0, "Done"))
    return SegmentResult(labelmap=Volume(array=labelmap.array, ijk_to_ras=labelmap.ijk_to_ras, name=volume.name), patches=patches, report=facts)


def coarse_pass(volume: Volume, nets: Nets, *, report: Report = ignore_progress, timings: dict[str, float] | None = None) -> CoarsePass:
    """Canonical frame and coarse net: what every k of the same volume shares."""
    timings = {} if timings is None else timings
    report(Progress("canonical", 0.05, "Resampling the volume to the model's spacing"))
    with _timed(timings, "canonical"):
        x, frame, grid = to_canonical(volume, nets.manifest)
    report(Progress("coarse", 0.12, "Coarse pass over the whole volume"))
    with _timed(timings, "coarse"):
        coarse_logits, importance_map = nets.coarse(coarse_input(x, coarse_factor=nets.manifest.coarse_factor))
    return CoarsePass(x=x, frame=frame, grid=grid, coarse_logits=coarse_logits, importance_map=importance_map)


def choose(coarse: CoarsePass, *, options: SegmentOptions, focus_classes: tuple[int, ...] = ()) -> Selection:
    """The candidates to run, best first."""
    return select(coarse.coarse_logits, coarse.importance_map, grid=coarse.grid, num_patches=options.num_patches, policy=options.policy, focus_classes=focus_classes)


def refine(coarse: CoarsePass, selection: Selection, nets: Nets, *, report: Report = ignore_progress, timings: dict[str, float] | None = None) -> Tensor:
    """Run the chosen patches and aggregate: labels (D, H, W) uint8 of the padded canonical volume.

    Patches run in candidate order, not in rank order: it keeps the fewest blocks in memory, and the answer depends only
    on the set of patches.
    """
    timings = {} if timings is None else timings
    total = len(selection.indices)
    report(Progress("patches", PATCHES_FROM, f"Refining {total} of {coarse.grid.num_candidates} patches"))
    with _timed(timings, "aggregate"):
        class_weights = torch.tensor(nets.manifest.class_weights)
        aggregator = StreamingAggregator(coarse.coarse_logits, indices=selection.indices, grid=coarse.grid, class_weights=class_weights)
    for done, index in enumerate(sorted(selection.indices), start=1):
        with _timed(timings, "patches"):
            logits = nets.local(coarse.x[0, 0][coarse.grid.slices(index)])
        with _timed(timings, "aggregate"):
            aggregator.add(index, logits)
        report(Progress("patches", PATCHES_FROM + (PATCHES_TO - PATCHES_FROM) * done / total, f"Patch {done} of {total}", done=done, total=total))
    return aggregator.finish()


def patch_boxes(selection: Selection, *, grid: CandidateGrid, frame: CanonicalFrame) -> tuple[PatchBox, ...]:
    """The chosen patches in the world, clipped to the volume's frame, best first."""
    boxes = []
    for rank, (index, importance) in enumerate(zip(selection.indices, selection.importance), start=1):
        start = grid.starts[index]
        stop = np.minimum(start + np.array(grid.patch_size), np.array(frame.shape))
        edges_ijk = np.stack([start, stop])[:, ::-1] - 0.5  # KJI voxels -> ijk edges
        edges_ras = edges_ijk @ frame.ijk_to_ras[:3, :3].T + frame.ijk_to_ras[:3, 3]
        center, size = edges_ras.mean(0), edges_ras[1] - edges_ras[0]
        boxes.append(PatchBox(rank=rank, candidate=int(index), importance=importance, center_ras=tuple(map(float, center)), size_mm=tuple(map(float, size))))
    return tuple(boxes)


def structure_values(manifest: BundleManifest, structures: tuple[str, ...]) -> tuple[int, ...]:
    """Label values of the named structures; of all when none is named.

    Raises:
        UserError: the bundle has no such structure.
    """
    values = {label.name: label.value for label in manifest.labels}
    for name in structures:
        if name not in values:
            raise UserError(unknown_name(f"structure of bundle {manifest.name}", name, manifest.label_names))
    return tuple(values[name] for name in structures) or tuple(values.values())


def _kept(labels: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Labels with everything but the values to keep turned into background."""
    table = torch.zeros(256, dtype=torch.uint8)
    table[list(keep)] = torch.tensor(keep, dtype=torch.uint8)
    return table[labels.long()]


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to a stage."""
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
