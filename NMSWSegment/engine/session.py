"""What stays in memory between runs, so that a larger k runs only new patches and a smaller one only aggregates again."""

from collections.abc import Callable

import numpy as np
import torch

from NMSWSegment.engine.patch_cache import PatchCache
from NMSWSegment.engine.runtime import OutOfMemory, free_cached_memory, open_nets, reproducible, resolve_device, thread_count
from NMSWSegment.engine.segment import CoarseResult, RunCache, SegmentResult, segment_volume
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import Bundle, BundleManifest
from NMSWSegment.files.memory import available_memory_bytes, cache_limit_bytes
from NMSWSegment.files.rates import Rate
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import EXACT, OnProgress, SegmentOptions, ignore_progress

PLANNING_S = 1.0
"""Far above what torch takes to plan a net at its first call; a measurement that is longer need not be repeated."""


class UnknownVolume(KeyError):
    """The session does not hold the volume of this key; give the volume itself."""


class Session:
    """Runs one segmentation after the other and keeps what the next one can use: the nets, and for the last volume the coarse pass
    and the logits of its patches. A result is the same, bit for bit, whether anything was kept or not (on a GPU: as long as its
    batches fall alike, otherwise up to rounding)."""

    def __init__(self, *, max_patch_bytes: int | None = None) -> None:
        """Args: max_patch_bytes: for logits of patches; None suits the memory that is available now."""
        budget = cache_limit_bytes(available_memory_bytes()) if max_patch_bytes is None else max_patch_bytes
        self._run_cache = RunCache(patches=PatchCache(max_bytes=budget))
        self._key: tuple[str, torch.device | None, str, int] = ("", None, "", 0)  # bundle, device, runtime and threads of what is kept
        self._volume_key: str | None = None
        self._volume: Volume | None = None

    def run(
        self,
        volume_key: str,
        volume: Volume | None,
        *,
        bundle: Bundle,
        options: SegmentOptions,
        on_progress: OnProgress = ignore_progress,
        coarse_ready: Callable[[CoarseResult], None] | None = None,
    ) -> SegmentResult:
        """As segment.segment_volume, with everything that earlier runs left and that still fits.

        Args:
            volume_key: names the voxels and their place; another key is another volume.
            volume: None is the volume that an earlier run with this key brought.

        Raises:
            UnknownVolume: the volume is None and the session does not hold it.
            UserError: as segment.segment_volume.
        """
        if volume is None and not self.holds(volume_key):
            raise UnknownVolume(volume_key)
        self._keep_what_fits(bundle, device=options.device, threads=options.threads, runtime=options.runtime)
        if not self.holds(volume_key):
            self._take_volume(volume_key, volume)
        try:
            return segment_volume(self._volume, bundle, options=options, on_progress=on_progress, run_cache=self._run_cache, coarse_ready=coarse_ready)
        except OutOfMemory:
            self.forget()
            raise
        finally:
            if self._run_cache.nets:
                free_cached_memory(self._run_cache.nets.device)  # the application draws on the same GPU

    def measure(self, bundle: Bundle, *, device: str, threads: int | None, runtime: str = EXACT) -> tuple[str, Rate]:
        """Segment a small volume and look at the clock; the nets stay for the runs to come.

        Returns:
            The device that the nets really ran on, and how fast it is.
        """
        self._keep_what_fits(bundle, device=device, threads=threads, runtime=runtime)
        with reproducible(threads):
            self._run_cache.nets = nets = self._run_cache.nets or open_nets(bundle, device=device, runtime=runtime)
        volume = _finer_phantom(bundle.manifest)
        options = SegmentOptions(num_patches=None, device=device, threads=threads, runtime=runtime)
        for _ in range(2):
            run_info = segment_volume(volume, bundle, options=options, run_cache=RunCache(nets=nets)).run_info
            if sum(run_info["timings_s"].values()) > PLANNING_S:
                break
        return run_info["device"], Rate.of_whole_run(run_info)

    def holds(self, volume_key: str) -> bool:
        """Whether a run with this key needs no volume."""
        return volume_key == self._volume_key

    @property
    def volume(self) -> Volume | None:
        """The volume of the last run; None after forget."""
        return self._volume

    def forget(self) -> None:
        """Drop the volume and everything that was computed of it; the nets stay."""
        self._volume_key = self._volume = None
        self._drop_results()

    def _keep_what_fits(self, bundle: Bundle, *, device: str, threads: int | None, runtime: str) -> None:
        """Drop the nets of another bundle or device, and results of other nets or of another number of threads."""
        key = (bundle.sha256, resolve_device(device), runtime, thread_count(threads))
        if key[:3] != self._key[:3] or (runtime != EXACT and key != self._key):  # other runtimes are prepared for a number of threads
            self._run_cache.nets = None
        if key != self._key:
            # Threads share out the sums, so that the last digits of a logit may depend on their number.
            self._drop_results()
        self._key = key

    def _take_volume(self, volume_key: str, volume: Volume) -> None:
        """Another volume. Nets that lacked memory for the last one get the GPU back."""
        self._drop_results()
        self._volume_key, self._volume = volume_key, volume
        if self._run_cache.nets and self._run_cache.nets.device_steps:
            self._run_cache.nets = None

    def _drop_results(self) -> None:
        """Drop what was computed of the volume."""
        self._run_cache.coarse = None
        self._run_cache.patches.clear()


def _finer_phantom(manifest: BundleManifest) -> Volume:
    """A phantom of the size of one patch, in voxels of half the model's spacing: volumes worth a segmentation are finer than the model."""
    ijk_to_ras = phantoms.upright_ijk_to_ras(manifest.spacing_mm, manifest.patch_size)
    volume, _ = phantoms.phantom(manifest.patch_size, ijk_to_ras=ijk_to_ras)
    array = volume.array.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    return Volume(array=array, ijk_to_ras=ijk_to_ras @ np.diag([0.5, 0.5, 0.5, 1.0]))
