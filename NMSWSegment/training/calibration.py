"""How little the next patch may promise before k = auto stops, and whether small islands go, found on the cases that a run held out.

every held-out case: the coarse pass, then every patch once
for each threshold: the patches that k = auto would take, their DSC, and the share of the expected error that they cover
the largest threshold whose mean DSC is as good as that of all patches, but for TOLERANCE
islands go where the DSC of all patches is better without them, and that of no structure worse by more than TOLERANCE (nnU-Net asks the same)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from NMSWSegment.data.metrics import dice_per_class
from NMSWSegment.data.training_sample import UNKNOWN_LABEL, TrainingSample
from NMSWSegment.engine.patch_cache import PatchCache
from NMSWSegment.engine.runtime import Nets, reproducible
from NMSWSegment.engine.segment import CoarsePass, choose, coarse_pass, refine
from NMSWSegment.engine.selection import Selection
from NMSWSegment.files.islands import remove_islands
from NMSWSegment.files.memory import available_memory_bytes, cache_limit_bytes
from NMSWSegment.protocol import AUTO, SegmentOptions, UserError
from NMSWSegment.samples.case_source import CaseSource
from NMSWSegment.training.validation import as_volume

THRESHOLDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
"""Values of auto_gain that are tried."""
TOLERANCE = 0.003
"""DSC that may be lost against all patches."""
ISLAND_SHARE = 0.05
"""Value of min_island_share that is tried."""


@dataclass(frozen=True)
class AutoPoint:
    """What one choice of the patches gives, means over the cases."""

    auto_gain: float | None
    """The threshold; None where all patches or none are taken."""
    patches: float
    candidates: float
    predicted: float
    """Share of the expected error that the patches cover."""
    dsc: float


@dataclass(frozen=True)
class Calibration:
    """What the held-out cases say."""

    auto_gain: float
    min_island_share: float
    points: tuple[AutoPoint, ...]
    """From no patch over all thresholds to all patches."""


def calibrate(nets: Nets, cases: Sequence[CaseSource]) -> Calibration:
    """Choose the threshold of k = auto, and whether islands go. A case that shows none of the structures has no DSC, and counts for nothing.

    Raises:
        UserError: no case shows a structure.
    """
    with reproducible(None):
        measured = [_measured(nets, sample) for sample in (source.whole() for source in cases) if _shows_structures(sample)]
    if not measured:
        raise UserError(
            f"k = auto can be calibrated on held-out cases that show the structures, but none of {len(cases)} does. "
            "Leave --calibrate out, or correct the labels of these cases."
        )
    rows, dice, dice_without_islands = zip(*measured)
    points = tuple(AutoPoint(gain, *row) for gain, row in zip((None, *THRESHOLDS[::-1], None), np.mean(rows, axis=0).tolist()))
    enough = [point.auto_gain for point in points[1:-1] if point.dsc >= points[-1].dsc - TOLERANCE]
    return Calibration(
        auto_gain=enough[0] if enough else THRESHOLDS[0],
        min_island_share=ISLAND_SHARE if is_better_without(np.array(dice), np.array(dice_without_islands)) else 0.0,
        points=points,
    )


def is_better_without(dice: np.ndarray, dice_without_islands: np.ndarray) -> bool:
    """Whether the mean is better without islands, and no structure worse by more than TOLERANCE; both (cases, structures), NaN where a case has none."""
    is_known = ~np.isnan(dice)
    gains = np.where(is_known, dice_without_islands - dice, 0.0)
    return bool(gains.sum() > 0 and (gains.sum(0) / np.maximum(is_known.sum(0), 1)).min() >= -TOLERANCE)


def _shows_structures(sample: TrainingSample) -> bool:
    """Whether a case has voxels that are neither background nor unknown."""
    return bool(((sample.labels > 0) & (sample.labels != UNKNOWN_LABEL)).any())


def _measured(nets: Nets, sample: TrainingSample) -> tuple[list[tuple[float, float, float, float]], np.ndarray, np.ndarray]:
    """Patches, candidates, share of the expected error and DSC of one case, in the order of the points; and, of all patches, DSC by structure with
    and without islands."""
    coarse = coarse_pass(as_volume(sample, nets.manifest.spacing_mm), nets)
    reference = sample.labels.cpu().numpy()
    inside = tuple(slice(0, length) for length in reference.shape)
    cache = PatchCache(max_bytes=cache_limit_bytes(available_memory_bytes()))
    rows = []
    for num_patches, gain in ((0, 0.0), *((AUTO, gain) for gain in THRESHOLDS[::-1]), (None, 0.0)):
        selection = choose(coarse, options=SegmentOptions(num_patches=num_patches), auto_gain=gain)
        labels = refine(coarse, selection, nets, patches=cache)[inside].numpy()
        dice = dice_per_class(labels, reference, num_classes=nets.manifest.num_classes)[1:]
        rows.append((len(selection.indices), coarse.grid.num_candidates, _covered_share(coarse, selection), float(np.nanmean(dice))))
    remove_islands(labels := np.ascontiguousarray(labels), min_share=ISLAND_SHARE)
    return rows, dice, dice_per_class(labels, reference, num_classes=nets.manifest.num_classes)[1:]


def _covered_share(coarse: CoarsePass, selection: Selection) -> float:
    """Share of the expected error, of all that candidates could cover, that lies in the chosen ones."""
    mass = np.exp(coarse.importance_map.double().numpy())
    covered = np.zeros(mass.shape, dtype=bool)
    for index in selection.indices:
        covered[tuple(slice(side.start // r, -(-side.stop // r)) for side, r in zip(coarse.grid.slices(index), coarse.grid.coarse_factor))] = True
    return float(mass[covered].sum() / mass.sum())
