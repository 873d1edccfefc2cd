"""What a volume and a model have against each other, looked at before a run: modality, intensities, memory. Needs no torch."""

from collections.abc import Sequence

import numpy as np

from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.memory import available_memory_bytes, needed_memory_bytes
from NMSWSegment.files.model_grid import model_grid_around
from NMSWSegment.files.volume import Volume, VolumeFile
from NMSWSegment.protocol import AUTO, SegmentOptions, UserError

AIR_AND_LUNG_HU = (-1100.0, -200.0)
"""Every CT has voxels here: air around or in the body, or at least lung or fat at their border. MR, stored values without rescaling and
HU + 1024 have none, but for a padding of one value."""
AIR_HU = -1000.0
"""The one value that may be all there is of air, where the outside of a body was set to it."""
FAT_HU = (-150.0, -50.0)
"""What a crop inside of a body has where it has no air."""
SOFT_TISSUE_HU = (-150.0, 300.0)
"""What every body has; rescaled twice, it lies in the range of air."""
LEAST_SHARE = 0.01
"""Of the voxels; less than any CT of a body has of soft tissue, or a crop of fat."""


def check_modality(file: VolumeFile, manifest: BundleManifest) -> None:
    """Raise UserError if a DICOM series is of another modality than the model's."""
    if file.modality and file.modality != manifest.modality:
        raise UserError(
            f"'{file.name}' is {file.modality}, but model '{manifest.name}' was trained on {manifest.modality}. Choose another model (see 'nmsw models'), "
            "or run it nevertheless with --force-modality."
        )


def check_intensities(volume: Volume, manifest: BundleManifest) -> None:
    """Raise UserError if the model takes CT and the voxels are no Hounsfield units, or if it takes MR and they are."""
    low, high = AIR_AND_LUNG_HU
    if manifest.modality == "MR" and len(_air_values(volume.array, least_voxels=LEAST_SHARE * volume.array.size)) > 1:
        raise UserError(
            f"'{volume.name}' looks like a CT in Hounsfield units: it has air and lung between {low:g} and {high:g}. But model '{manifest.name}' was trained on MR. "
            "Choose another model (see 'nmsw models'), or run it nevertheless with --force-modality."
        )
    if manifest.modality != "CT" or (_has(volume.array, SOFT_TISSUE_HU) and (_has_air(volume.array) or _has(volume.array, FAT_HU))):
        return
    raise UserError(
        f"'{volume.name}' is hardly a CT in Hounsfield units, which model '{manifest.name}' was trained on: there are hardly any voxels between {SOFT_TISSUE_HU[0]:g} and "
        f"{SOFT_TISSUE_HU[1]:g} (soft tissue), or neither between {low:g} and {high:g} (air, lung) nor between {FAT_HU[0]:g} and {FAT_HU[1]:g} (fat); "
        f"they go from {volume.array.min():g} to {volume.array.max():g}. Export it with its rescaling, or run it nevertheless with --force-modality."
    )


def _has(array: np.ndarray, bounds: tuple[float, float]) -> bool:
    """Whether LEAST_SHARE of the voxels lie between two values; looks no further than it has to."""
    (low, high), missing = bounds, LEAST_SHARE * array.size
    for piece in array:
        missing -= np.count_nonzero((piece > low) & (piece < high))
        if missing <= 0:
            return True
    return False


def _has_air(array: np.ndarray) -> bool:
    """Whether there is air or lung, and not only a padding."""
    values = _air_values(array, least_voxels=1)
    return len(values) > 1 or values == {AIR_HU}


def _air_values(array: np.ndarray, *, least_voxels: float) -> set[float]:
    """Some of the values of air and lung, one only if there is no other; none where fewer voxels have them. Looks no further than it has to."""
    low, high = AIR_AND_LUNG_HU
    count, values = 0, set()
    for piece in array:
        found = piece[(piece > low) & (piece < high)]
        if found.size:
            count += found.size
            values |= {float(found.min()), float(found.max())}
        if len(values) > 1 and count >= least_voxels:
            break
    return values if count >= least_voxels else set()


def run_memory_bytes(shape: Sequence[int], ijk_to_ras: np.ndarray, manifest: BundleManifest, *, num_patches: int | None, bytes_per_voxel: int) -> int:
    """Upper bound of what a run on the CPU takes for a volume, from its header alone.

    Args:
        shape: voxels of the volume, KJI.
        ijk_to_ras: 4 x 4 of the volume.
        num_patches: None is all of them.

    Raises:
        UserError: the volume is too large for the model.
    """
    model_grid = model_grid_around(shape, ijk_to_ras, spacing_mm=manifest.spacing_mm)
    grid = CandidateGrid.covering(model_grid.shape, patch_size=manifest.patch_size, overlap=manifest.overlap)
    return needed_memory_bytes(
        model_grid,
        grid,
        bytes_per_voxel=bytes_per_voxel,
        num_classes=manifest.num_classes,
        coarse_factor=manifest.coarse_factor,
        num_patches=grid.num_candidates if num_patches is None else min(num_patches, grid.num_candidates),
        backbone=manifest.backbone,
        preset=manifest.architecture.get("preset", ""),
        is_cascade=manifest.is_cascade,
    )


def check_memory(shape: Sequence[int], ijk_to_ras: np.ndarray, manifest: BundleManifest, *, options: SegmentOptions, bytes_per_voxel: int) -> None:
    """Raise UserError if a run on the CPU may need more memory than is free, or the volume is too large for the model.

    Args:
        shape: voxels of the volume, KJI.
        ijk_to_ras: 4 x 4 of the volume.
    """
    num_patches = None if options.num_patches == AUTO else options.num_patches
    needed_bytes = run_memory_bytes(shape, ijk_to_ras, manifest, num_patches=num_patches, bytes_per_voxel=bytes_per_voxel)
    available_bytes = available_memory_bytes()
    if available_bytes is not None and needed_bytes > available_bytes:
        size = " x ".join(str(length) for length in reversed(tuple(shape)))
        raise UserError(
            f"A run with {size} voxels may need {needed_bytes / 1e9:.1f} GB of memory, but {available_bytes / 1e9:.1f} GB are free. Close other programs, crop "
            "the volume, or try it nevertheless with --force-memory."
        )
