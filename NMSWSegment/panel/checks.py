"""What the panel may do and show, without Qt, torch or Slicer.

Everything here gives values and keys; messages.py makes sentences of them, so that they can be translated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from NMSWSegment.files.boxes import bounds_after
from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.memory import cache_limit_bytes, needed_memory_bytes
from NMSWSegment.files.model_grid import ModelGrid, model_grid_around
from NMSWSegment.files.rates import Rate
from NMSWSegment.files.roi import has_volume
from NMSWSegment.protocol import AUTO, UserError

CT_HAS_VOXELS_BELOW_HU = -200.0
"""A CT volume has voxels below this, air or at least lung and fat; an MR volume has none."""
CT_LOWEST_HU = -4000.0
"""No CT volume has voxels below this; a lower value is a mark, such as -FLT_MAX."""


class Severity(Enum):
    """What an input check means for a run."""

    ERROR = "error"
    WARNING = "warning"


class CheckKind(Enum):
    """What stops a run, or what the user should know before it; the first one is shown first."""

    NO_VOLUME = "no_volume"
    NOT_A_VOLUME = "not_a_volume"
    IMPORTANCE_MAP = "importance_map"
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
    UNLIKE_MR = "unlike_mr"

    @property
    def severity(self) -> Severity:
        """An error makes a run impossible, a warning is advice."""
        return Severity.WARNING if self in (CheckKind.MEMORY_SHORT, CheckKind.UNLIKE_CT, CheckKind.UNLIKE_MR) else Severity.ERROR


@dataclass(frozen=True)
class InputCheck:
    """Something in the input that the user has to know, with the values that its message shows."""

    kind: CheckKind
    values: dict = field(default_factory=dict)

    @property
    def severity(self) -> Severity:
        """That of its kind."""
        return self.kind.severity


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
    is_importance_map: bool = False
    """Of an earlier run."""
    is_transform_linear: bool = True
    intensity_range: tuple[float, float] | None = None
    """Lowest and highest voxel; None where it is not known."""
    roi_to_ras: Sequence[Sequence[float]] | None = None
    """As in SegmentOptions."""
    available_bytes: int | None = None
    """Before the worker was started: what a warm worker holds already is part of what it needs. None where it is not known."""


@dataclass(frozen=True)
class RunEstimate:
    """How much a run has to do."""

    candidates: int
    """N."""
    patches: int | None
    """k, clipped to the candidates that are left; None for auto, before the first run."""
    model_voxels: int
    """Voxels of the volume at the model's spacing, before padding."""
    source_voxels: int
    """Voxels of the volume."""
    memory_bytes: int
    """Upper bound of what the worker takes on the CPU."""

    @property
    def share(self) -> float | None:
        """Patches as a share of those of a sliding window, 0 to 1."""
        return None if self.patches is None else self.patches / self.candidates


def input_checks(inputs: Inputs) -> tuple[InputCheck, ...]:
    """What the user has to know before a run, the most important first; empty when all is well."""
    if inputs.geometry is None:
        checks = [InputCheck(CheckKind.NO_VOLUME)]
    else:
        checks = _volume_checks(inputs, inputs.geometry)
    if inputs.manifest is None:
        checks.append(InputCheck(CheckKind.NO_MODEL))
    if not checks:
        checks = _run_checks(inputs)
    return tuple(checks)


def estimate_run(
    geometry: Geometry,
    manifest: BundleManifest,
    *,
    num_patches: int | str | None,
    roi_to_ras: Sequence[Sequence[float]] | None = None,
    expected_patches: int | None = None,
    available_bytes: int | None = None,
) -> RunEstimate:
    """How much a run has to do.

    Args:
        geometry: of a volume in which `input_checks` finds nothing that blocks.
        num_patches: k as in SegmentOptions.
        roi_to_ras: as in SegmentOptions; patches are counted in the box around it, which may be a few more than the engine runs.
        expected_patches: those of the last run, for k = auto.
        available_bytes: what bounds the worker's memory of patches.

    Raises:
        UserError: the volume is too large for the model's spacing.
    """
    model_grid = model_grid_around(geometry.shape, geometry.ijk_to_ras, spacing_mm=manifest.spacing_mm)
    grid = CandidateGrid.covering(model_grid.shape, patch_size=manifest.patch_size, overlap=manifest.overlap)
    most = grid.num_candidates if roi_to_ras is None else _candidates_near(roi_to_ras, model_grid=model_grid, grid=grid)
    wanted = {AUTO: expected_patches, None: most}.get(num_patches, num_patches)
    patches = None if wanted is None else min(wanted, most)
    memory_bytes = needed_memory_bytes(
        model_grid,
        grid,
        bytes_per_voxel=geometry.bytes_per_voxel,
        num_classes=manifest.num_classes,
        coarse_factor=manifest.coarse_factor,
        num_patches=most if patches is None else patches,
        backbone=manifest.backbone,
        preset=manifest.architecture.get("preset", ""),
        is_cascade=manifest.is_cascade,
        cache_bytes=cache_limit_bytes(available_bytes),
    )
    return RunEstimate(
        candidates=grid.num_candidates,
        patches=patches,
        model_voxels=math.prod(model_grid.shape),
        source_voxels=math.prod(geometry.shape),
        memory_bytes=memory_bytes,
    )


def estimate_seconds(estimate: RunEstimate, rate: Rate) -> float | None:
    """How long a run will take; None while the number of patches is unknown."""
    if estimate.patches is None:
        return None
    return estimate.patches * rate.patch_s + estimate.model_voxels * rate.voxel_s + estimate.source_voxels * rate.source_voxel_s


def _volume_checks(inputs: Inputs, geometry: Geometry) -> list[InputCheck]:
    """What makes a node no volume that can be segmented; at most one, because the others follow from it."""
    axes = geometry.ijk_to_ras[:3, :3]
    low, high = inputs.intensity_range or (-math.inf, math.inf)
    is_found = {
        CheckKind.NOT_A_VOLUME: inputs.is_labelmap,
        CheckKind.IMPORTANCE_MAP: inputs.is_importance_map,
        CheckKind.EMPTY_VOLUME: min(geometry.shape) < 1,
        CheckKind.COLOR_VOLUME: inputs.components != 1,
        CheckKind.ONE_SLICE: min(geometry.shape) == 1,
        CheckKind.NONLINEAR_TRANSFORM: not inputs.is_transform_linear,
        CheckKind.BROKEN_GEOMETRY: not np.isfinite(geometry.ijk_to_ras).all() or not has_volume(axes),
        CheckKind.UNIFORM_VOLUME: low == high,
    }
    values = {CheckKind.COLOR_VOLUME: {"components": inputs.components}, CheckKind.UNIFORM_VOLUME: {"intensity": low}}
    return [InputCheck(kind, values.get(kind, {})) for kind, is_so in is_found.items() if is_so][:1]


def _run_checks(inputs: Inputs) -> list[InputCheck]:
    """What a sound volume and a model have against each other, the region of interest and the computer."""
    geometry, manifest, roi_to_ras = inputs.geometry, inputs.manifest, inputs.roi_to_ras
    checks = []
    if roi_to_ras is not None and not has_volume(np.asarray(roi_to_ras, dtype=float)[:3, :3]):
        checks.append(InputCheck(CheckKind.ROI_EMPTY))
    elif roi_to_ras is not None and not _boxes_meet(roi_to_ras, geometry):
        checks.append(InputCheck(CheckKind.ROI_OUTSIDE))
    try:
        needed = estimate_run(geometry, manifest, num_patches=inputs.num_patches, roi_to_ras=roi_to_ras, available_bytes=inputs.available_bytes).memory_bytes
    except UserError as error:
        return [InputCheck(CheckKind.VOLUME_TOO_LARGE, {"message": str(error)}), *checks]
    if inputs.available_bytes is not None and needed > inputs.available_bytes:
        checks.append(InputCheck(CheckKind.MEMORY_SHORT, {"needed_bytes": needed, "available_bytes": inputs.available_bytes}))
    if inputs.intensity_range is not None:
        lowest = inputs.intensity_range[0]
        if manifest.modality == "CT" and lowest > CT_HAS_VOXELS_BELOW_HU:
            checks.append(InputCheck(CheckKind.UNLIKE_CT, {"lowest": lowest}))
        elif manifest.modality == "MR" and CT_LOWEST_HU < lowest < CT_HAS_VOXELS_BELOW_HU:
            checks.append(InputCheck(CheckKind.UNLIKE_MR, {"lowest": lowest}))
    return checks


def _boxes_meet(roi_to_ras: Sequence[Sequence[float]], geometry: Geometry) -> bool:
    """Whether the upright boxes around the region of interest and around the volume overlap."""
    roi_low, roi_high = bounds_after(np.asarray(roi_to_ras, dtype=float), low=-0.5, high=0.5)
    low, high = bounds_after(geometry.ijk_to_ras, low=-0.5, high=np.array(geometry.shape[::-1]) - 0.5)
    return bool((roi_low < high).all() and (low < roi_high).all())


def _candidates_near(roi_to_ras: Sequence[Sequence[float]], *, model_grid: ModelGrid, grid: CandidateGrid) -> int:
    """How many candidates overlap the upright box around the region of interest."""
    roi_to_ijk = np.linalg.inv(model_grid.ijk_to_ras) @ np.asarray(roi_to_ras, dtype=float)
    low_ijk, high_ijk = bounds_after(roi_to_ijk, low=-0.5, high=0.5)
    low, high = low_ijk[::-1] + 0.5, high_ijk[::-1] + 0.5  # ijk -> KJI; voxel centers -> voxel edges
    return int(((grid.starts < high) & (grid.starts + grid.patch_size > low)).all(1).sum())
