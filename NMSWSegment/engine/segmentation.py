"""Segment from Python in three lines: `segment` and what it gives. The command line and the panel use the same engine."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from NMSWSegment.engine.runtime import Nets, open_nets, reproducible
from NMSWSegment.engine.segment import RunCache, segment_volume, structure_values
from NMSWSegment.files.bundle import Bundle, Label, load_bundle
from NMSWSegment.files.dicom_segmentation import DICOM_SEG_ENDINGS, Algorithm, export_dicom_seg
from NMSWSegment.files.output_file import file_ending
from NMSWSegment.files.run_checks import check_intensities, check_modality
from NMSWSegment.files.statistics import StructureStatistics, structure_statistics
from NMSWSegment.files.volume import Volume, open_volume, write_labelmap
from NMSWSegment.files.volume_checks import check_numbers
from NMSWSegment.protocol import OnProgress, PatchBox, SegmentOptions, UserError, ignore_progress


@dataclass(frozen=True)
class Segmentation:
    """A segmented volume."""

    volume: Volume
    """What was segmented."""
    labelmap: Volume
    """Labels on the grid of the volume, (K, J, I) uint8; 0 is background."""
    labels: tuple[Label, ...]
    """What the integers mean."""
    patches: tuple[PatchBox, ...]
    """Those that were refined, best first."""
    run_info: dict
    """JSON-ready: model and hash, options, device, versions, seconds by stage."""
    source: Path | None = None
    """File or folder that the volume was read from."""
    series: str | None = None
    """UID of the DICOM series."""

    def statistics(self) -> tuple[StructureStatistics, ...]:
        """Volume, intensity, surface, place, border and refined share of every structure."""
        return structure_statistics(self.labelmap, self.volume, labels=self.labels, patches=self.patches)

    def save(self, path: str | Path) -> Path:
        """Write the labels as .seg.nrrd (3D Slicer), .nii.gz, .nii, or, of a DICOM series, as a DICOM segmentation .dcm.

        Raises:
            UserError: the file cannot be written.
        """
        path = Path(path)
        if not file_ending(path, DICOM_SEG_ENDINGS):
            write_labelmap(self.labelmap, path, labels=self.labels)
            return path
        if self.source is None:
            raise UserError("A DICOM segmentation refers to the DICOM images it was made from. Give segment() the folder of the series instead of a volume.")
        return export_dicom_seg(self.labelmap, self.source, path, labels=self.labels, algorithm=Algorithm.from_run(self.run_info), series_uid=self.series)


def segment(
    volume: str | Path | Volume,
    *,
    model: str = SegmentOptions.bundle,
    k: int | str | None = SegmentOptions.num_patches,
    structures: Sequence[str] = (),
    device: str = SegmentOptions.device,
    policy: str = SegmentOptions.policy,
    min_island_ml: float = SegmentOptions.min_island_ml,
    threads: int | None = None,
    runtime: str = SegmentOptions.runtime,
    series: str | None = None,
    force_modality: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Segmentation:
    """Segment a CT volume.

    Args:
        volume: a NIfTI, NRRD or MetaImage file, the folder of a DICOM series, or a Volume.
        model: name of an installed model, or a model folder.
        k: patches that are refined; 0 gives the coarse result, "all" or None the finest, "auto" as many as pay.
        structures: names to keep; empty keeps all.
        device: auto, cpu, cuda, cuda:N or mps.
        policy: greedy or top_k, how patches are chosen.
        min_island_ml: parts of a structure that lie apart and are smaller are removed; 0 keeps all.
        threads: CPU threads; None is all physical cores.
        runtime: exact, or what computes the local net on a CPU, see SegmentOptions.
        series: Series Instance UID, where a DICOM folder has several series.
        force_modality: run although the volume is not what the model was trained on.
        on_progress: called with a Progress before every stage and after every patch; may raise Cancelled.

    Raises:
        UserError: something that a user can fix; the text says what to do.
    """
    options = SegmentOptions(
        bundle=str(model),
        num_patches=None if k == "all" else k,
        policy=policy,
        device=device,
        structures=tuple(structures),
        min_island_ml=min_island_ml,
        threads=threads,
        runtime=runtime,
    )
    return segment_with_options(volume, load_bundle(options.bundle), options=options, series=series, force_modality=force_modality, on_progress=on_progress)


def segment_with_options(
    volume: str | Path | Volume,
    bundle: Bundle,
    *,
    options: SegmentOptions,
    series: str | None = None,
    force_modality: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Segmentation:
    """As `segment`, with a model that is already checked. The networks of the last model stay in memory for the next call."""
    kept_values = structure_values(bundle.manifest, options.structures)
    source = None if isinstance(volume, Volume) else Path(volume)
    if source is not None:
        file = open_volume(source, series_uid=series)
        if not force_modality:
            check_modality(file, bundle.manifest)
        volume = file.read()
    else:
        check_numbers(volume.array, volume.name)
    if not force_modality:
        check_intensities(volume, bundle.manifest)
    nets = _open_nets(bundle.folder, bundle.sha256, options.device, options.runtime, options.threads)
    try:
        result = segment_volume(volume, bundle, options=options, on_progress=on_progress, run_cache=RunCache(nets=nets, keeps_coarse=False))
    finally:
        if nets.device_steps:  # another volume may fit where this one did not
            _open_nets.cache_clear()
    labels = tuple(label for label in bundle.manifest.labels if label.value in kept_values)
    return Segmentation(volume=volume, labelmap=result.labelmap, labels=labels, patches=result.patches, run_info=result.run_info, source=source, series=series)


@functools.lru_cache(maxsize=1)
def _open_nets(folder: Path, sha256: str, device: str, runtime: str, threads: int | None) -> Nets:
    """The networks of a model, loaded once; the hash notices a model that was replaced, and a runtime is prepared for a number of threads."""
    with reproducible(threads):
        return open_nets(load_bundle(str(folder)), device=device, runtime=runtime)
