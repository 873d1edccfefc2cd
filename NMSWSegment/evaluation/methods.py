"""The methods of the comparison by name: NMSW at several k, the baselines, the ablations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from NMSWSegment.engine.segment import SegmentResult, segment_volume
from NMSWSegment.evaluation.baselines import (
    as_segment,
    nmsw_local_only,
    random_as_published,
    sliding_window,
    sliding_window_on_foreground,
    top_k_of_one_voxel,
    zoom_out,
)
from NMSWSegment.protocol import AUTO

Segment = Callable[..., SegmentResult]
"""(volume, bundle, *, options, on_progress, run_cache) -> SegmentResult, as segment.segment_volume."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    """Stable, for files and --methods."""
    title: str
    segment: Segment
    num_patches: int | str | None = 0
    policy: str = "greedy"
    uses_coarse: bool = True


def middle_k(ks: Sequence[int]) -> int:
    """The k that tables and pictures with room for one show; 0 where there is none."""
    return sorted(ks)[len(ks) // 2] if ks else 0


def comparison_methods(ks: tuple[int, ...]) -> dict[str, Method]:
    """Everything that the comparison runs, by name; ablations included."""
    sw = [
        Method("sw_0.50", "sliding window, overlap 0.5", partial(as_segment, method=partial(sliding_window, overlap=0.5)), uses_coarse=False),
        Method("sw_0.25", "sliding window, overlap 0.25", partial(as_segment, method=partial(sliding_window, overlap=0.25)), uses_coarse=False),
        Method("sw_foreground", "sliding window on foreground", partial(as_segment, method=sliding_window_on_foreground)),
        Method("zoom_out", "zoom-out, one patch a class", partial(as_segment, method=zoom_out)),
    ]
    by_k = [
        method
        for k in ks
        for method in (
            Method(f"random_published_{k}", f"random foreground as published, k = {k}", partial(as_segment, method=random_as_published), num_patches=k),
            Method(f"random_fair_{k}", f"random foreground, fair, k = {k}", segment_volume, num_patches=k, policy="random"),
            Method(f"top_k_{k}", f"NMSW top-k, k = {k}", segment_volume, num_patches=k, policy="top_k"),
            Method(f"greedy_{k}", f"NMSW greedy, k = {k}", segment_volume, num_patches=k),
            Method(f"no_weights_{k}", f"NMSW greedy without class weights, k = {k}", nmsw_local_only, num_patches=k),
            Method(f"one_voxel_{k}", f"NMSW top-k, background by one voxel, k = {k}", partial(as_segment, method=top_k_of_one_voxel), num_patches=k),
        )
    ]
    rest = [Method("auto", "NMSW greedy, k = auto", segment_volume, num_patches=AUTO), Method("all", "NMSW, k = all", segment_volume, num_patches=None)]
    return {method.name: method for method in (Method("coarse", "coarse net only, k = 0", segment_volume), *sw, *by_k, *rest)}
