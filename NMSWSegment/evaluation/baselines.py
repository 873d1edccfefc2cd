"""The methods that NMSW is compared with, and NMSW itself, all with the signature of segment.segment_volume.

Every method shares the model grid, the nets, the threads and the way back to the volume's grid, so that rows of a table differ only
in what goes through the local net and how it is put together (docs/deviations.md, D32).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from NMSWSegment.engine.aggregation import CoarseUpsampler, patch_window
from NMSWSegment.engine.resampling import padding_of, restore_labelmap, to_model_grid
from NMSWSegment.engine.runtime import Nets, memory_explained, open_nets, reproducible
from NMSWSegment.engine.segment import CoarsePass, RunCache, SegmentResult, coarse_pass, patch_boxes, refine, segment_volume, timed
from NMSWSegment.engine.selection import Selection, candidate_importance, class_presence, shows_foreground
from NMSWSegment.files.bundle import Bundle, BundleManifest
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.model_grid import ModelGrid
from NMSWSegment.files.padding import Padding
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import OnProgress, PatchBox, Progress, SegmentOptions, ignore_progress

LOCAL_ONLY = 10.0
"""c of Eq. 6 with which the patches replace the coarse answer: sigmoid(10) = 0.99995, the largest that the formula allows."""
RANDOM_SEED = 0


@dataclass
class Answer:
    """What a baseline computes."""

    labels: Tensor
    """(D, H, W) uint8 of the volume on the model grid, padded or not."""
    model_grid: ModelGrid
    padding: Padding | None
    """Of the volume."""
    windows: int
    """Patches that went through the local net."""
    candidates: int
    patches: tuple[PatchBox, ...] = ()


@dataclass
class MethodRun:
    """What a baseline works with."""

    nets: Nets
    options: SegmentOptions
    on_progress: OnProgress
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, named as in the engine."""

    def coarse(self, volume: Volume) -> CoarsePass:
        """The engine's coarse pass."""
        return coarse_pass(volume, self.nets, on_progress=self.on_progress, timings=self.timings)

    @property
    def is_cascade(self) -> bool:
        """Whether the local net needs the coarse answer."""
        return self.nets.manifest.is_cascade

    def local(self, patches: Tensor, parts: Sequence[Tensor] | None, *, done: int, total: int) -> Tensor:
        """Local logits (B, C, P, P, P) of patches (B, P, P, P) and, for a cascade, their coarse logits (C, P/r, P/r, P/r)."""
        self.on_progress(Progress("patches", 0.2 + 0.7 * done / max(total, 1), f"Patch {done + 1} of {total}", done=done, total=total))
        with timed(self.timings, "patches"):
            return self.nets.local(patches, parts)


def sliding_window(volume: Volume, run: MethodRun, *, overlap: float) -> Answer:
    """The local net everywhere; the class weights have no part, and the coarse net only where the local net of a cascade reads its answer.

    It runs on the volume on the model grid before padding, where it needs the fewest windows; that of a cascade on the padded volume, where
    every window begins with a whole coarse voxel.
    """
    if run.is_cascade:
        coarse = run.coarse(volume)
        upsampler = CoarseUpsampler(coarse.coarse_logits, grid=coarse.grid)
        labels, windows = slide(coarse.x, run, grid=coarse.grid, overlap=overlap, upsampler=upsampler)
        return Answer(labels=labels, model_grid=coarse.model_grid, padding=coarse.padding, windows=windows, candidates=coarse.grid.num_candidates)
    run.on_progress(Progress("canonical", 0.05, "Resampling the volume to the model's spacing"))
    with timed(run.timings, "canonical"):
        padding = padding_of(volume, run.nets.manifest)
        x, model_grid, grid = to_model_grid(volume, run.nets.manifest, padding=padding)
        x = x[(..., *(slice(0, length) for length in model_grid.shape))]
    labels, windows = slide(x, run, grid=grid, overlap=overlap)
    return Answer(labels=labels, model_grid=model_grid, padding=padding, windows=windows, candidates=grid.num_candidates)


def slide(x: Tensor, run: MethodRun, *, grid: CandidateGrid, overlap: float, upsampler: CoarseUpsampler | None = None) -> tuple[Tensor, int]:
    """Labels (D, H, W) uint8 and number of windows of MONAI's sliding_window_inference with Gaussian weights on x (1, 1, D, H, W).

    Args:
        upsampler: of the coarse logits that a cascade's windows read.
    """
    from monai.inferers import sliding_window_inference

    windows = 0

    def run_windows(patches: Tensor, places: list[list[slice]]) -> Tensor:
        nonlocal windows
        windows += len(patches)
        parts = [upsampler.part(place[-3:]) for place in places] if upsampler else None
        return run.local(patches[:, 0], parts, done=windows - len(patches), total=grid.num_candidates)

    started = time.perf_counter()
    with torch.inference_mode():  # MONAI weights the nets' answers in place
        logits = sliding_window_inference(x, grid.patch_size, run.nets.batch_size, run_windows, overlap=overlap, mode="gaussian", with_coord=True)
        labels = logits[0].max(0).indices.to(torch.uint8)
    run.timings["aggregate"] = time.perf_counter() - started - run.timings["patches"]
    return labels, windows


def sliding_window_on_foreground(volume: Volume, run: MethodRun) -> Answer:
    """The windows of a sliding window at the bundle's overlap whose footprint shows foreground in the coarse result; background elsewhere."""
    coarse = run.coarse(volume)
    with timed(run.timings, "select"):
        chosen = torch.nonzero(footprint_foreground(coarse.coarse_logits, grid=coarse.grid)).flatten().tolist()
    with timed(run.timings, "aggregate"):
        window = patch_window(coarse.grid.patch_size)
        total = torch.zeros(len(coarse.coarse_logits), *coarse.grid.padded_shape)
    upsampler = CoarseUpsampler(coarse.coarse_logits, grid=coarse.grid)
    for done, index in enumerate(chosen):
        box = coarse.grid.slices(index)
        logits = run.local(coarse.x[0, 0][box][None], [upsampler.part(box)] if run.is_cascade else None, done=done, total=len(chosen))[0]
        with timed(run.timings, "aggregate"):
            total[(slice(None), *box)] += window * logits
    with timed(run.timings, "aggregate"):
        labels = total.max(0).indices.to(torch.uint8)  # all zero where no window came, and the lowest of equal classes is background
    return Answer(labels=labels, model_grid=coarse.model_grid, padding=coarse.padding, windows=len(chosen), candidates=coarse.grid.num_candidates)


def random_as_published(volume: Volume, run: MethodRun) -> Answer:
    """Random foreground of the published code: a candidate counts by one nearest coarse voxel, noise ranks, patches replace the coarse answer.

    The published noise is unseeded; here it is the same at every run.
    """
    coarse = run.coarse(volume)
    with timed(run.timings, "select"):
        survivors = torch.nonzero(one_voxel_foreground(coarse.coarse_logits, grid=coarse.grid)).flatten()
        uniform = torch.rand(coarse.grid.num_candidates, generator=torch.Generator().manual_seed(RANDOM_SEED), dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
        ranked = survivors[torch.argsort(gumbel[survivors], descending=True, stable=True)]
    return _refined(coarse, ranked, replace(run, nets=_local_only(run.nets)))


def top_k_of_one_voxel(volume: Volume, run: MethodRun) -> Answer:
    """The paper's top-k with the published background: a candidate counts by one nearest coarse voxel, and is never run if that is background."""
    coarse = run.coarse(volume)
    with timed(run.timings, "select"):
        survivors = torch.nonzero(one_voxel_foreground(coarse.coarse_logits, grid=coarse.grid)).flatten()
        importance = candidate_importance(coarse.importance_map.double(), grid=coarse.grid)
        ranked = survivors[torch.argsort(importance[survivors], descending=True, stable=True)]
    return _refined(coarse, ranked, run)


def nmsw_local_only(
    volume: Volume, bundle: Bundle, *, options: SegmentOptions, on_progress: OnProgress = ignore_progress, run_cache: RunCache | None = None
) -> SegmentResult:
    """NMSW without class weights: where a patch lies, it replaces the coarse answer."""
    return segment_volume(volume, replace(bundle, manifest=_with_local_only(bundle.manifest)), options=options, on_progress=on_progress, run_cache=run_cache)


def zoom_out(volume: Volume, run: MethodRun) -> Answer:
    """One call of the local net per class of the coarse result: its box, zoomed to the size of a patch.

    Each side of the box is grown to a patch at least, so that nothing is magnified. The logits are zoomed back; a voxel belongs to a class
    where that class is the arg max in its own box, to the most probable one where boxes disagree, and to background elsewhere.
    """
    coarse = run.coarse(volume)
    labels = torch.zeros_like(coarse.coarse_labels)
    confidence = torch.zeros(labels.shape)
    classes = [value for value in torch.unique(coarse.coarse_labels).tolist() if value]
    for done, value in enumerate(classes):
        with timed(run.timings, "select"):
            box = grown_box(coarse.coarse_labels == value, least=coarse.grid.patch_size)
            patch = torch.nn.functional.interpolate(coarse.x[(..., *box)], size=coarse.grid.patch_size, mode="trilinear")
            parts = [_zoomed_part(coarse, box)] if run.is_cascade else None
        logits = run.local(patch[0], parts, done=done, total=len(classes))
        with timed(run.timings, "aggregate"):
            logits = torch.nn.functional.interpolate(logits, size=[side.stop - side.start for side in box], mode="trilinear")[0]
            share = torch.exp(logits[value] - torch.logsumexp(logits, dim=0))
            is_better = (logits.max(0).indices == value) & (share > confidence[box])
            labels[box][is_better] = value
            confidence[box][is_better] = share[is_better]
    return Answer(labels=labels, model_grid=coarse.model_grid, padding=coarse.padding, windows=len(classes), candidates=coarse.grid.num_candidates)


def as_segment(
    volume: Volume,
    bundle: Bundle,
    *,
    method: Callable[[Volume, MethodRun], Answer],
    options: SegmentOptions,
    on_progress: OnProgress = ignore_progress,
    run_cache: RunCache | None = None,
) -> SegmentResult:
    """Run a baseline between the same opening of the nets and the same restoring as the engine.

    Raises:
        UserError: as segment.segment_volume.
    """
    run_cache = run_cache or RunCache()
    timings: dict[str, float] = {}
    with reproducible(options.threads), memory_explained(volume.shape):
        if run_cache.nets is None:
            with timed(timings, "load"):
                run_cache.nets = open_nets(bundle, device=options.device)
        answer = method(volume, MethodRun(nets=run_cache.nets, options=options, on_progress=on_progress, timings=timings))
        on_progress(Progress("restore", 0.9, "Writing labels to the volume's grid"))
        with timed(timings, "restore"):
            labelmap = restore_labelmap(answer.labels, answer.model_grid, padding=answer.padding)
    run_info = {
        "timings_s": {stage: round(seconds, 4) for stage, seconds in timings.items()},
        "candidates": answer.candidates,
        "windows": answer.windows,
        "device": str(run_cache.nets.device),
    }
    return SegmentResult(labelmap=replace(labelmap, name=volume.name), patches=answer.patches, run_info=run_info)


def footprint_foreground(coarse_logits: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Candidates that show foreground anywhere in their footprint, as in selection.select, (N,) bool."""
    return shows_foreground(class_presence(coarse_logits), grid=grid)


def one_voxel_foreground(coarse_logits: Tensor, *, grid: CandidateGrid) -> Tensor:
    """Candidates whose one nearest coarse voxel is foreground, as in the published code, (N,) bool."""
    is_foreground = (coarse_logits.max(0).indices > 0).float()
    return torch.nn.functional.interpolate(is_foreground[None, None], size=grid.counts, mode="nearest").flatten() > 0


def grown_box(mask: Tensor, *, least: tuple[int, int, int]) -> tuple[slice, slice, slice]:
    """The box of a mask, each side grown about its middle to `least` voxels and moved inside the volume, which is at least as large."""
    found = torch.nonzero(mask)
    box = []
    for first, last, size, length in zip(found.min(0).values.tolist(), found.max(0).values.tolist(), least, mask.shape):
        extent = max(last + 1 - first, size)
        start = min(max((first + last + 1 - extent) // 2, 0), length - extent)
        box.append(slice(start, start + extent))
    return tuple(box)


def _zoomed_part(coarse: CoarsePass, box: tuple[slice, slice, slice]) -> Tensor:
    """What a cascade reads of a box that is zoomed to a patch, (C, P/r, P/r, P/r)."""
    upsampled = CoarseUpsampler(coarse.coarse_logits, grid=coarse.grid).region(box)
    size = [length // factor for length, factor in zip(coarse.grid.patch_size, coarse.grid.coarse_factor)]
    return torch.nn.functional.interpolate(upsampled[None], size=size, mode="trilinear")[0]


def _refined(coarse: CoarsePass, ranked: Tensor, run: MethodRun) -> Answer:
    """The engine's refinement of the first k candidates of a ranking."""
    pi = torch.softmax(candidate_importance(coarse.importance_map.double(), grid=coarse.grid), dim=0)
    chosen = ranked[: run.options.num_patches].tolist()
    selection = Selection(indices=tuple(chosen), importance=tuple(float(pi[index]) for index in chosen))
    labels = refine(coarse, selection, run.nets, on_progress=run.on_progress, timings=run.timings)
    patches = patch_boxes(selection, grid=coarse.grid, model_grid=coarse.model_grid)
    return Answer(
        labels=labels, model_grid=coarse.model_grid, padding=coarse.padding, windows=len(chosen), candidates=coarse.grid.num_candidates, patches=patches
    )


def _local_only(nets: Nets) -> Nets:
    """The same nets with class weights that leave the coarse answer out."""
    return replace(nets, manifest=_with_local_only(nets.manifest))


def _with_local_only(manifest: BundleManifest) -> BundleManifest:
    """The manifest with c = LOCAL_ONLY for every class."""
    return replace(manifest, class_weights=(LOCAL_ONLY,) * manifest.num_classes)
