"""NMSW inference on one page: model grid -> coarse -> selection -> patches -> labels -> the volume's own grid."""

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

import NMSWSegment
from NMSWSegment.engine.aggregation import CoarseUpsampler, StreamingAggregator, patch_upsamplers
from NMSWSegment.engine.patch_cache import PatchCache
from NMSWSegment.engine.resampling import coarse_ijk_to_ras, coarse_input, padding_of, restore_labelmap, to_model_grid
from NMSWSegment.engine.runtime import Nets, memory_explained, open_nets, reproducible
from NMSWSegment.engine.selection import Selection, select
from NMSWSegment.files.bundle import Bundle, BundleManifest
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.islands import remove_islands
from NMSWSegment.files.model_grid import ModelGrid
from NMSWSegment.files.padding import Padding
from NMSWSegment.files.roi import voxels_in_roi
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import AUTO_GAIN, OnProgress, PatchBox, Progress, SegmentOptions, UserError, ignore_progress, unknown_name

PATCHES_FROM, PATCHES_TO = 0.2, 0.9  # share of the progress bar that the patches take
ROI_MARGIN_VOXELS = 1.0  # coarse voxels; with it every patch counts that reaches a model voxel whose label is seen inside the region


@dataclass(frozen=True)
class CoarsePass:
    """Everything that is known after the coarse net; the input of the refinement."""

    x: Tensor
    """Volume on the model grid, (1, 1, D, H, W)."""
    model_grid: ModelGrid
    grid: CandidateGrid
    coarse_logits: Tensor
    """(C, d, h, w)."""
    importance_map: Tensor
    """(d, h, w) logits."""
    coarse_labels: Tensor
    """arg max of the up-sampled coarse logits, (D, H, W) uint8."""
    padding: Padding | None = None
    """Of the volume."""

    @property
    def coarse_ijk_to_ras(self) -> np.ndarray:
        """4 x 4 of the coarse voxels."""
        return coarse_ijk_to_ras(self.model_grid, grid=self.grid)


@dataclass(frozen=True)
class CoarseResult:
    """What can be shown while the patches are still running."""

    labelmap: Volume
    """The result of k = 0, as in SegmentResult."""
    importance: Volume
    """p(z | x_low) per coarse voxel as a share of the largest, float32 in (0, 1], on the coarse grid."""
    candidates: int
    """N."""


@dataclass(frozen=True)
class SegmentResult:
    """What a run gives."""

    labelmap: Volume
    """uint8 on the volume's own grid; values are the bundle's label values, 0 is background."""
    patches: tuple[PatchBox, ...]
    """Best first."""
    run_info: dict
    """JSON-ready: versions, device, bundle, options, timings in seconds of what was really done, zero_padding_share (of the volume's voxels: padding
    with 0, taken for air), canonical_voxels (before the grid's own padding), candidates, patches, patches_reused, device steps, runtime (name, speedup, agreement) and a sentence about it."""


@dataclass
class RunCache:
    """What earlier runs left for this one, and this one for the next. Whoever hands it on takes out what no longer fits (session.py)."""

    nets: Nets | None = None
    """Of the bundle and device."""
    coarse: CoarsePass | None = None
    """Of the volume, with these nets and threads."""
    keeps_coarse: bool = True
    """Whether there may be a next run; without one, memory is saved."""
    patches: PatchCache = field(default_factory=lambda: PatchCache(max_bytes=0))
    """Of the volume, with these nets and threads."""


def segment_volume(
    volume: Volume,
    bundle: Bundle,
    *,
    options: SegmentOptions = SegmentOptions(),
    on_progress: OnProgress = ignore_progress,
    run_cache: RunCache | None = None,
    coarse_ready: Callable[[CoarseResult], None] | None = None,
) -> SegmentResult:
    """Segment a volume. The same input gives the same answer, bit for bit, on the same computer.

    Args:
        volume: intensity, (K, J, I); any orientation, spacing and size.
        on_progress: called before every stage and after every patch; may raise Cancelled.
        run_cache: results of earlier runs to take over; filled as far as this run comes, also when it is cancelled.
        coarse_ready: called with the coarse result before the patches run; None saves the time that it takes.

    Raises:
        UserError: a structure or device of the options does not exist, the region of interest is not on the volume, the volume
            does not suit the bundle, or memory ran out.
    """
    run_cache = run_cache or RunCache(keeps_coarse=False)
    timings: dict[str, float] = {}
    keep = structure_values(bundle.manifest, options.structures)
    with reproducible(options.threads), memory_explained(volume.shape):
        threads = torch.get_num_threads()
        in_roi = _voxels_in_roi(volume, options=options, timings=timings)
        _fill_run_cache(run_cache, volume, bundle, options=options, on_progress=on_progress, timings=timings)
        nets, coarse = run_cache.nets, run_cache.coarse
        if coarse_ready:
            on_progress(Progress("preview", PATCHES_FROM, "Writing the coarse labels to the volume's grid"))
            with timed(timings, "preview"):
                preview = coarse_result(coarse, options=options, manifest=bundle.manifest, in_roi=in_roi, name=volume.name)
            coarse_ready(preview)
            del preview  # a labelmap as large as the volume
        with timed(timings, "select"):
            selection = choose(coarse, options=options, focus_classes=keep if options.structures else (), auto_gain=bundle.manifest.auto_gain)
        upsamplers = None
        if not run_cache.keeps_coarse:
            upsamplers = patch_upsamplers(coarse.coarse_logits, indices=selection.indices, grid=coarse.grid)
            coarse, run_cache.coarse = replace(coarse, coarse_logits=coarse.coarse_logits.new_empty(0)), None
        num_reused = sum(index in run_cache.patches for index in selection.indices)
        labels = refine(coarse, selection, nets, upsamplers=upsamplers, patches=run_cache.patches, on_progress=on_progress, timings=timings)
        on_progress(Progress("restore", PATCHES_TO, "Writing labels to the volume's grid"))
        with timed(timings, "restore"):
            labelmap = _restored(labels, coarse, options=options, manifest=bundle.manifest, in_roi=in_roi, name=volume.name)
    patches = patch_boxes(selection, grid=coarse.grid, model_grid=coarse.model_grid)
    run_info = {
        "bundle": {"name": bundle.manifest.name, "sha256": bundle.sha256},
        "options": options.to_dict(),
        "device": str(nets.device),
        "threads": threads,
        "device_steps": list(nets.device_steps),
        "runtime": asdict(nets.runtime),
        "runtime_note": nets.runtime.sentence(),
        "versions": {
            "NMSWSegment": NMSWSegment.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "volume": {"name": volume.name, "shape_kji": list(volume.shape), "spacing_mm_kji": list(volume.spacing_mm)},
        "zero_padding_share": 0.0 if coarse.padding is None else round(coarse.padding.share_of_zeros, 4),
        "canonical_voxels": int(np.prod(coarse.model_grid.shape)),
        "candidates": coarse.grid.num_candidates,
        "timings_s": {stage: round(seconds, 4) for stage, seconds in timings.items()},
        "patches": [asdict(patch) for patch in patches],
        "patches_reused": num_reused,
    }
    on_progress(Progress("done", 1.0, "Done"))
    return SegmentResult(labelmap=labelmap, patches=patches, run_info=run_info)


def coarse_pass(volume: Volume, nets: Nets, *, on_progress: OnProgress = ignore_progress, timings: dict[str, float] | None = None) -> CoarsePass:
    """Model grid and coarse net: what every k of the same volume shares."""
    timings = {} if timings is None else timings
    on_progress(Progress("canonical", 0.05, "Resampling the volume to the model's spacing"))
    with timed(timings, "canonical"):
        padding = padding_of(volume, nets.manifest)
        x, model_grid, grid = to_model_grid(volume, nets.manifest, padding=padding)
    on_progress(Progress("coarse", 0.12, "Coarse pass over the whole volume"))
    with timed(timings, "coarse"):
        coarse_logits, importance_map = nets.coarse(coarse_input(x, grid=grid))
    with timed(timings, "upsample"):
        coarse_labels = CoarseUpsampler(coarse_logits, grid=grid).labels()
    return CoarsePass(
        x=x, model_grid=model_grid, grid=grid, coarse_logits=coarse_logits, importance_map=importance_map, coarse_labels=coarse_labels, padding=padding
    )


def coarse_result(coarse: CoarsePass, *, options: SegmentOptions, manifest: BundleManifest, in_roi: np.ndarray | None, name: str) -> CoarseResult:
    """The answer without patches, and where the coarse net sees reason for them.

    Args:
        in_roi: voxels of the volume in the region of interest, (K, J, I) bool; None keeps all.
        name: of the volume.
    """
    relative = torch.exp(coarse.importance_map - coarse.importance_map.max())
    importance = Volume(array=relative.numpy(), ijk_to_ras=coarse.coarse_ijk_to_ras, name=name)
    return CoarseResult(
        labelmap=_restored(coarse.coarse_labels, coarse, options=options, manifest=manifest, in_roi=in_roi, name=name),
        importance=importance,
        candidates=coarse.grid.num_candidates,
    )


def choose(coarse: CoarsePass, *, options: SegmentOptions, focus_classes: tuple[int, ...] = (), auto_gain: float = AUTO_GAIN) -> Selection:
    """The candidates to run, best first.

    Args:
        auto_gain: of the bundle, for k = auto.
    """
    in_roi = None
    if options.roi_to_ras is not None:
        mask = voxels_in_roi(coarse.importance_map.shape, ijk_to_ras=coarse.coarse_ijk_to_ras, roi_to_ras=options.roi_to_ras, margin_voxels=ROI_MARGIN_VOXELS)
        in_roi = torch.from_numpy(mask)
    return select(
        coarse.coarse_logits,
        coarse.importance_map,
        grid=coarse.grid,
        num_patches=options.num_patches,
        policy=options.policy,
        focus_classes=focus_classes,
        in_roi=in_roi,
        auto_gain=auto_gain,
    )


def refine(
    coarse: CoarsePass,
    selection: Selection,
    nets: Nets,
    *,
    upsamplers: dict[int, CoarseUpsampler] | None = None,
    patches: PatchCache | None = None,
    on_progress: OnProgress = ignore_progress,
    timings: dict[str, float] | None = None,
) -> Tensor:
    """Run the chosen patches and aggregate: labels (D, H, W) uint8 of the padded volume on the model grid.

    Patches run in candidate order, not in rank order: it keeps the fewest blocks in memory, and the answer depends only
    on the set of patches.

    Args:
        upsamplers: `patch_upsamplers` of the selection; emptied on the way. None takes all coarse logits.
        patches: logits that need not be computed again; takes those that are new.
    """
    timings = {} if timings is None else timings
    patches = PatchCache(max_bytes=0) if patches is None else patches
    order = sorted(selection.indices)
    on_progress(Progress("patches", PATCHES_FROM, f"Refining {len(order)} of {coarse.grid.num_candidates} patches", total=len(order)))
    with timed(timings, "aggregate"):
        class_weights = torch.tensor(nets.manifest.class_weights)
        if upsamplers is None:
            upsamplers = dict.fromkeys(selection.indices, CoarseUpsampler(coarse.coarse_logits, grid=coarse.grid))
        aggregator = StreamingAggregator(upsamplers, grid=coarse.grid, class_weights=class_weights, coarse_labels=coarse.coarse_labels)
    logits_of_patches = _patch_logits(coarse, order, nets, upsamplers=upsamplers, patches=patches, timings=timings)
    for done in range(1, len(order) + 1):
        index, logits = next(logits_of_patches)
        with timed(timings, "aggregate"):
            aggregator.add(index, logits)
        del logits  # before the next patch takes as much
        fraction = PATCHES_FROM + (PATCHES_TO - PATCHES_FROM) * done / len(order)
        on_progress(Progress("patches", fraction, f"Patch {done} of {len(order)}", done=done, total=len(order)))
    return aggregator.finish()


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to a stage."""
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started


def patch_boxes(selection: Selection, *, grid: CandidateGrid, model_grid: ModelGrid) -> tuple[PatchBox, ...]:
    """The chosen patches in the world, clipped to the model grid of the volume, best first."""
    boxes = []
    for rank, (index, importance) in enumerate(zip(selection.indices, selection.importance), start=1):
        start = grid.starts[index]
        stop = np.minimum(start + np.array(grid.patch_size), np.array(model_grid.shape))
        edges_ijk = np.stack([start, stop])[:, ::-1] - 0.5  # KJI voxels -> ijk edges
        edges_ras = edges_ijk @ model_grid.ijk_to_ras[:3, :3].T + model_grid.ijk_to_ras[:3, 3]
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


def _fill_run_cache(
    run_cache: RunCache, volume: Volume, bundle: Bundle, *, options: SegmentOptions, on_progress: OnProgress, timings: dict[str, float]
) -> None:
    """Open the nets and run the coarse pass, unless an earlier run did."""
    if run_cache.nets is None:
        on_progress(Progress("load", 0.0, f"Loading model {bundle.manifest.name}"))
        with timed(timings, "load"):
            run_cache.nets = open_nets(bundle, device=options.device, runtime=options.runtime)
    if run_cache.coarse is None:
        run_cache.coarse = coarse_pass(volume, run_cache.nets, on_progress=on_progress, timings=timings)


def _voxels_in_roi(volume: Volume, *, options: SegmentOptions, timings: dict[str, float]) -> np.ndarray | None:
    """Voxels of the volume in the region of interest, (K, J, I) bool; None where there is none."""
    if options.roi_to_ras is None:
        return None
    with timed(timings, "roi"):
        return voxels_in_roi(volume.shape, ijk_to_ras=volume.ijk_to_ras, roi_to_ras=options.roi_to_ras)


def _patch_logits(
    coarse: CoarsePass, order: list[int], nets: Nets, *, upsamplers: dict[int, CoarseUpsampler], patches: PatchCache, timings: dict[str, float]
) -> Iterator[tuple[int, Tensor]]:
    """Candidate and local logits of every candidate of `order`, from the cache or, in batches, from the local net.

    Args:
        upsamplers: of the candidates that have not been aggregated yet.
    """
    missing = [index for index in order if index not in patches]
    ready: dict[int, Tensor] = {}
    for index in order:
        if index in missing:
            batch = missing[: nets.batch_size]
            missing = missing[nets.batch_size :]
            with timed(timings, "patches"):
                boxes = [coarse.grid.slices(other) for other in batch]
                parts = [upsamplers[other].part(box) for other, box in zip(batch, boxes)] if nets.manifest.is_cascade else None
                logits = nets.local(torch.stack([coarse.x[0, 0][box] for box in boxes]), parts)
            for other, patch in zip(batch, logits):
                patches.put(other, patch, wanted=order)
                ready[other] = patch
            del logits, patch  # whoever gets them may let them go
        yield index, ready.pop(index) if index in ready else patches.get(index)


def _restored(labels: Tensor, coarse: CoarsePass, *, options: SegmentOptions, manifest: BundleManifest, in_roi: np.ndarray | None, name: str) -> Volume:
    """Labels (D, H, W) on the volume's own grid, without what is not to be kept."""
    inside = tuple(slice(0, length) for length in coarse.model_grid.shape)  # without the grid's padding, where islands would grow together
    kept = _kept(labels[inside].contiguous(), structure_values(manifest, options.structures))
    if manifest.min_island_share:
        remove_islands(kept.numpy(), min_share=manifest.min_island_share)
    labelmap = restore_labelmap(kept, coarse.model_grid, padding=coarse.padding)
    if in_roi is not None:
        labelmap.array[~in_roi] = 0
    if options.min_island_ml:
        remove_islands(labelmap.array, min_voxels=1000 * options.min_island_ml / math.prod(labelmap.spacing_mm))
    return Volume(array=labelmap.array, ijk_to_ras=labelmap.ijk_to_ras, name=name)


def _kept(labels: Tensor, keep: tuple[int, ...]) -> Tensor:
    """Labels with everything but the values to keep turned into background."""
    table = torch.zeros(256, dtype=torch.uint8)
    table[list(keep)] = torch.tensor(keep, dtype=torch.uint8)
    kept = torch.empty_like(labels)
    for source, target in zip(labels, kept):  # slice by slice, because an index takes eight bytes a voxel
        torch.index_select(table, 0, source.flatten().int(), out=target.view(-1))
    return kept
