"""What the panel may do and show, without Qt, torch or Slicer.

Everything here gives values and keys; the module file puts them into words, so that they can be translated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.memory import cache_limit_bytes, needed_memory_bytes
from NMSWSegment.files.model_grid import CanonicalFrame, canonical_frame
from NMSWSegment.files.rates import Rate
from NMSWSegment.files.roi import has_volume
from NMSWSegment.protocol import AUTO, UserError

AIR_HU = -200.0
"""A CT volume has voxels below this, air or at least lung and fat; an MR volume has none."""
"""Three axes this close to one plane have no volume."""


class Problem(Enum):
    """What stops a run, or what a person should know before it; in the order in which to tell."""

    NO_VOLUME = "no_volume"
    NOT_A_VOLUME = "not_a_volume"
    EMPTY_VOLUME = "empty_volume"
    COLOR_VOLUME = "color_volume"
    ONE_SLICE = "one_slice"
    NONLINEAR_TRANSFORM = "nonlinear_transform"
    BROKEN_GEOMETRY = "broken_geometry"
    UNIFORM_VOLUME = "uniform_volume"
    NO_MODEL = "no_model"
    VOLUME_TOO_LARGE = "volume_too_large"
    ROI_EMPTY = "roi_empty"
    ROI_OUTSIDE = "roi_outside"
    MEMORY_SHORT = "memory_short"
    UNLIKE_CT = "unlike_ct"

    @property
    def is_blocking(self) -> bool:
        """Whether a run is impossible; the others are advice."""
        return self not in (Problem.MEMORY_SHORT, Problem.UNLIKE_CT)


@dataclass(frozen=True)
class Finding:
    """A problem, with the values that its sentence shows."""

    problem: Problem
    values: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Geometry:
    """The voxels of a volume node, without the voxels."""

    shape: tuple[int, int, int]
    """KJI; has a 0 where the node has no voxels."""
    ijk_to_ras: np.ndarray
    """4 x 4, parent transforms included."""
    bytes_per_voxel: int = 2


@dataclass(frozen=True)
class Inputs:
    """What the panel knows before a run."""

    geometry: Geometry | None
    """None where no volume is chosen."""
    manifest: BundleManifest | None
    """None where no model is chosen."""
    num_patches: int | str | None = None
    """k as in SegmentOptions."""
    components: int = 1
    is_labelmap: bool = False
    is_transform_linear: bool = True
    intensity_range: tuple[float, float] | None = None
    """Lowest and highest voxel; None where it is not known."""
    roi_to_ras: Sequence[Sequence[float]] | None = None
    """As in SegmentOptions."""
    available_bytes: int | None = None
    """Before the worker was started: what a warm worker holds already is part of what it needs. None where it is not known."""


@dataclass(frozen=True)
class Work:
    """How much a run has to do."""

    candidates: int
    """N."""
    patches: int | None
    """k, clipped to the candidates that are left; None for auto, before any run has told."""
    canonical_voxels: int
    """Voxels of the volume at the model's spacing, before padding."""
    source_voxels: int
    """Voxels of the volume."""
    memory_bytes: int
    """Upper bound of what the worker takes on the CPU."""

    @property
    def share(self) -> float | None:
        """Patches as a share of those of a sliding window, 0 to 1."""
        return None if self.patches is None else self.patches / self.candidates


def problems(inputs: Inputs) -> tuple[Finding, ...]:
    """What stands against a run, the first thing to tell first; empty when all is well."""
    if inputs.geometry is None:
        found = [Finding(Problem.NO_VOLUME)]
    else:
        found = _volume_problems(inputs, inputs.geometry)
    if inputs.manifest is None:
        found.append(Finding(Problem.NO_MODEL))
    if not found:
        found = _work_problems(inputs)
    return tuple(found)


def work(
    geometry: Geometry,
    manifest: BundleManifest,
    *,
    num_patches: int | str | None,
    roi_to_ras: Sequence[Sequence[float]] | None = None,
    expected_patches: int | None = None,
    available_bytes: int | None = None,
) -> Work:
    """How much a run has to do.

    Args:
        geometry: of a volume in which `problems` finds nothing that blocks.
        num_patches: k as in SegmentOptions.
        roi_to_ras: as in SegmentOptions; patches are counted in the box around it, which may be a few more than the engine runs.
        expected_patches: those of the last run, for k = auto.
        available_bytes: what bounds the worker's memory of patches.

    Raises:
        UserError: the volume is too large for the model's spacing.
    """
    frame = canonical_frame(geometry.shape, geometry.ijk_to_ras, spacing_mm=manifest.spacing_mm)
    grid = CandidateGrid.covering(frame.shape, patch_size=manifest.patch_size, overlap=manifest.overlap)
    most = grid.num_candidates if roi_to_ras is None else _candidates_near(roi_to_ras, frame=frame, grid=grid)
    wanted = {AUTO: expected_patches, None: most}.get(num_patches, num_patches)
    patches = None if wanted is None else min(wanted, most)
    memory_bytes = needed_memory_bytes(
        frame,
        grid,
        bytes_per_voxel=geometry.bytes_per_voxel,
        num_classes=manifest.num_classes,
        coarse_factor=manifest.coarse_factor,
        num_patches=most if patches is None else patches,
        backbone=manifest.backbone,
        preset=manifest.architecture.get("preset", ""),
        cache_bytes=cache_limit_bytes(available_bytes),
    )
    return Work(
        candidates=grid.num_candidates,
        patches=patches,
        canonical_voxels=math.prod(frame.shape),
        source_voxels=math.prod(geometry.shape),
        memory_bytes=memory_bytes,
    )


def seconds(work: Work, rate: Rate, *, reused: int = 0) -> float | None:
    """How long a run will take; None while the number of patches is unknown.

    Args:
        reused: patches that the worker still has.
    """
    if work.patches is None:
        return None
    return max(0, work.patches - reused) * rate.patch_s + work.canonical_voxels * rate.voxel_s + work.source_voxels * rate.source_voxel_s


def _volume_problems(inputs: Inputs, geometry: Geometry) -> list[Finding]:
    """What makes a node no volume that can be segmented; at most one, because the others follow from it."""
    axes = geometry.ijk_to_ras[:3, :3]
    low, high = inputs.intensity_range or (-math.inf, math.inf)
    is_found = {
        Problem.NOT_A_VOLUME: inputs.is_labelmap,
        Problem.EMPTY_VOLUME: min(geometry.shape) < 1,
        Problem.COLOR_VOLUME: inputs.components != 1,
        Problem.ONE_SLICE: min(geometry.shape) == 1,
        Problem.NONLINEAR_TRANSFORM: not inputs.is_transform_linear,
        Problem.BROKEN_GEOMETRY: not np.isfinite(geometry.ijk_to_ras).all() or not has_volume(axes),
        Problem.UNIFORM_VOLUME: low == high,
    }
    values = {Problem.COLOR_VOLUME: {"components": inputs.components}, Problem.UNIFORM_VOLUME: {"intensity": low}}
    return [Finding(problem, values.get(problem, {})) for problem, is_so in is_found.items() if is_so][:1]


def _work_problems(inputs: Inputs) -> list[Finding]:
    """What a sound volume and a model have against each other, the region of interest and the computer."""
    geometry, manifest, roi_to_ras = inputs.geometry, inputs.manifest, inputs.roi_to_ras
    found = []
    if roi_to_ras is not None and not has_volume(np.asarray(roi_to_ras, dtype=float)[:3, :3]):
        found.append(Finding(Problem.ROI_EMPTY))
    elif roi_to_ras is not None and not _boxes_meet(roi_to_ras, geometry):
        found.append(Finding(Problem.ROI_OUTSIDE))
    try:
        needed = work(geometry, manifest, num_patches=inputs.num_patches, roi_to_ras=roi_to_ras, available_bytes=inputs.available_bytes).memory_bytes
    except UserError as error:
        return [Finding(Problem.VOLUME_TOO_LARGE, {"message": str(error)}), *found]
    if inputs.available_bytes is not None and needed > inputs.available_bytes:
        found.append(Finding(Problem.MEMORY_SHORT, {"needed_bytes": needed, "available_bytes": inputs.available_bytes}))
    if manifest.modality == "CT" and inputs.intensity_range is not None and inputs.intensity_range[0] > AIR_HU:
        found.append(Finding(Problem.UNLIKE_CT, {"lowest": inputs.intensity_range[0]}))
    return found


def _boxes_meet(roi_to_ras: Sequence[Sequence[float]], geometry: Geometry) -> bool:
    """Whether the upright boxes around the region of interest and around the volume overlap."""
    roi_low, roi_high = _bounds(np.asarray(roi_to_ras, dtype=float), low=np.full(3, -0.5), high=np.full(3, 0.5))
    low, high = _bounds(geometry.ijk_to_ras, low=np.full(3, -0.5), high=np.array(geometry.shape[::-1]) - 0.5)
    return bool((roi_low < high).all() and (low < roi_high).all())


def _candidates_near(roi_to_ras: Sequence[Sequence[float]], *, frame: CanonicalFrame, grid: CandidateGrid) -> int:
    """How many candidates overlap the upright box around the region of interest."""
    roi_to_ijk = np.linalg.inv(frame.ijk_to_ras) @ np.asarray(roi_to_ras, dtype=float)
    low_ijk, high_ijk = _bounds(roi_to_ijk, low=np.full(3, -0.5), high=np.full(3, 0.5))
    low, high = low_ijk[::-1] + 0.5, high_ijk[::-1] + 0.5  # ijk -> KJI; voxel centers -> voxel edges
    return int(((grid.starts < high) & (grid.starts + grid.patch_size > low)).all(1).sum())


def _bounds(matrix: np.ndarray, *, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates of a box after a 4 x 4."""
    corners = np.array([[x, y, z, 1] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
    points = (matrix @ corners.T)[:3]
    return points.min(1), points.max(1)
