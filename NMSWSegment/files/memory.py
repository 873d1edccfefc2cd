"""Memory: how much this computer can give, and how much a run takes at its peak.

Needs no torch, so that the panel can warn before anything is loaded.
"""

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.model_grid import GRID_TOLERANCE, ModelGrid, moves_with

MAX_CACHE_BYTES = 2 << 30
"""Most that the worker spends on the logits of patches for the next run; of little memory it takes a quarter."""

# Measured with torch 2.13 on Linux x86-64 and the packaged bundle: peak resident set of every stage by itself, upright and
# oblique volumes of 1.6 to 105 million voxels. The factors follow from the code of the stages (how many arrays live at
# once); those of the nets are upper bounds, one patch of the preset's size on one thread, random weights.
_WORKER_BYTES = 385_000_000  # Python, numpy, SimpleITK, torch and both nets
_SLAB_VOXELS = 1 << 21  # resampling.VOXELS_AT_ONCE: what resampling and restoring hold at once
_RESAMPLE_SLAB_BYTES, _RESAMPLE_OBLIQUE_SLAB_BYTES = 28, 115  # an oblique volume needs three coordinates for every voxel
_RESTORE_SLAB_BYTES, _RESTORE_OBLIQUE_SLAB_BYTES = 40, 140
_RESTORE_CHUNK_BYTES = 45_000_000  # eight corners of 2^16 voxels, compared with each other
_BLOCKED_BYTES = 12 * 4 * (1 << 17)  # arrays of blocked.BLOCK_FLOATS that one pass has at a time, two threads
_OVERLAPPING = 4.0  # blocks that wait, as a multiple of the share of the candidates that are chosen
_ALLOCATOR = 1.15  # freed memory that is not given back between the stages; the largest excess over the sum was 13 %
_NET_BYTES = 50_000_000  # of a net, whatever its input
_PRIOR_FLOATS = 34  # of a cascade's local net: the channels beside the image, before and after they are put together
_NET_FLOATS = {  # of a net, per input voxel beside one float a class, by backbone and preset; the coarse net is a UNet
    "unet": {"compact": 55, "paper": 55},
    "mednext": {"compact": 200, "paper": 380},
    "swin_unetr": {"compact": 100, "paper": 440},
    "e2enet": {"compact": 200, "paper": 480},
}


def available_memory_bytes() -> int | None:
    """Memory that a new process can have without swapping; None where that cannot be found out.

    On Linux never more than the control group of this process may still take.
    """
    find = {"linux": _available_on_linux, "win32": _available_on_windows, "darwin": _available_on_macos}.get(sys.platform)
    try:
        return find() if find else None
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None


def cache_limit_bytes(available_bytes: int | None) -> int:
    """Most that the logits of patches may take: 2 GB, or a quarter of what is available."""
    return MAX_CACHE_BYTES if available_bytes is None else min(MAX_CACHE_BYTES, available_bytes // 4)


def needed_memory_bytes(
    model_grid: ModelGrid,
    grid: CandidateGrid,
    *,
    bytes_per_voxel: int,
    num_classes: int,
    coarse_factor: tuple[int, int, int],
    num_patches: int,
    backbone: str = "unet",
    preset: str = "compact",
    is_cascade: bool = False,
    cache_bytes: int = 0,
) -> int:
    """Upper bound of what a process takes at the peak of a run on the CPU, the volume, torch and the nets included.

    Args:
        model_grid: of the volume.
        grid: of the model grid.
        bytes_per_voxel: of the volume's own dtype.
        num_classes: C, with background.
        num_patches: how many go through the local net.
        backbone, preset: of the local net; names that are not known count as the most demanding one.
        is_cascade: whether the local net reads the coarse logits too.
        cache_bytes: most that is spent on the logits of patches for the next run; 0 for a run without a next one.

    On a GPU the nets work in its own memory, so that this is more than is taken.
    """
    source, model, padded = (int(np.prod(shape, dtype=float)) for shape in (model_grid.source_shape, model_grid.shape, grid.padded_shape))
    coarse = int(np.prod([-(-length // factor) for length, factor in zip(model_grid.shape, coarse_factor)], dtype=float))
    patch_logits = 4 * num_classes * int(np.prod(grid.patch_size))
    stays = 4 * padded + 4 * (num_classes + 1) * coarse  # x, coarse logits, importance map
    # without a next run only what the patches need of the coarse logits stays: aggregation.patch_upsamplers
    parts = num_patches * int(np.prod([-(-size // factor) + 1 for size, factor in zip(grid.patch_size, coarse_factor)]))
    refined = stays if cache_bytes else stays - 4 * num_classes * max(0, coarse - parts)
    to_source = np.linalg.inv(model_grid.ijk_to_ras) @ model_grid.source_ijk_to_ras
    is_oblique = bool(moves_with(to_source, shape=model_grid.source_shape).sum() > 3)
    restore_slab_bytes = _RESTORE_OBLIQUE_SLAB_BYTES if is_oblique else _RESTORE_SLAB_BYTES
    stages = [
        _resample_bytes(model_grid, is_oblique=is_oblique) + 4 * padded,
        stays + _net_bytes(coarse, num_classes=num_classes, floats=_NET_FLOATS["unet"]["paper"]),
        stays + 60 * coarse + _BLOCKED_BYTES,  # selection: presence and entropy, some maps in float64
        stays + 30 * coarse + 3 * padded + _BLOCKED_BYTES,  # up-sampling: cells, labels with a margin, their copy
        refined
        + 2 * padded
        + _BLOCKED_BYTES
        + _patch_bytes(
            grid, num_classes=num_classes, num_patches=num_patches, floats=_local_floats(backbone, preset, cascade_classes=num_classes if is_cascade else 0)
        ),
        refined + 3 * padded + 5 * model + _RESTORE_CHUNK_BYTES + restore_slab_bytes * min(_SLAB_VOXELS, source) + source,  # ... and the labelmap
        max(bytes_per_voxel, 4) * source,  # of the files: ITK's copy of the voxels; the labelmap, ITK's copy of it, what is read back, and a compressed part
    ]
    cache = min(cache_bytes, num_patches * patch_logits)
    return int(_WORKER_BYTES + _ALLOCATOR * (bytes_per_voxel * source + max(stages) + cache))


def _resample_bytes(model_grid: ModelGrid, *, is_oblique: bool) -> int:
    """Source slab, averaged source, slab of the model grid."""
    source, model = np.prod(model_grid.source_shape, dtype=float), np.prod(model_grid.shape, dtype=float)
    slab_bytes = _RESAMPLE_OBLIQUE_SLAB_BYTES if is_oblique else _RESAMPLE_SLAB_BYTES
    return int(4 * min(_SLAB_VOXELS, source) + 4 * _averaged_voxels(model_grid) + slab_bytes * min(_SLAB_VOXELS, model))


def _averaged_voxels(model_grid: ModelGrid) -> float:
    """Voxels of the source after the averaging of resampling.block_averaged."""
    axes = model_grid.source_ijk_to_ras[:3, :3]
    source_mm_ijk = np.linalg.norm(axes, axis=0)
    directions = np.abs(axes / source_mm_ijk)
    target_mm_ijk = directions.T @ np.array(model_grid.spacing_mm[::-1]) / directions.sum(0)
    factors_ijk = np.maximum(np.floor(target_mm_ijk / source_mm_ijk + GRID_TOLERANCE), 1)
    return float(np.prod(np.ceil(np.array(model_grid.source_shape[::-1]) / factors_ijk)))


def _local_floats(backbone: str, preset: str, *, cascade_classes: int = 0) -> int:
    """Of the local net; the most there is for a name that is not known.

    Args:
        cascade_classes: classes whose coarse logits it interpolates to every voxel of the patch; 0 for none.
    """
    most = max(floats for presets in _NET_FLOATS.values() for floats in presets.values())
    prior = _PRIOR_FLOATS + cascade_classes if cascade_classes else 0
    return _NET_FLOATS.get(backbone, {}).get(preset, most) + prior


def _net_bytes(voxels: int, *, num_classes: int, floats: int) -> int:
    """What a net takes for one input, its output included."""
    return _NET_BYTES + 4 * (num_classes + floats) * voxels


def _patch_bytes(grid: CandidateGrid, *, num_classes: int, num_patches: int, floats: int) -> int:
    """The blocks that wait for patches, and one patch in the net or on its way into the blocks."""
    if num_patches == 0:
        return 0
    blocks_per_axis = [size // step for size, step in zip(grid.patch_size, grid.stride)]
    # Patches come in candidate order, so that the blocks in waiting lie in the layers of one row of patches.
    blocks_in_layers = blocks_per_axis[0] * int(np.prod([count + per_patch - 1 for count, per_patch in zip(grid.counts[1:], blocks_per_axis[1:])]))
    # A block waits only where several of the chosen patches cover it; with few patches of many that is seldom.
    share = min(1.0, _OVERLAPPING * num_patches / grid.num_candidates)
    blocks = min(num_patches * int(np.prod(blocks_per_axis)), int(np.ceil(share * blocks_in_layers)))
    patch_voxels = int(np.prod(grid.patch_size))
    one_patch = max(_net_bytes(patch_voxels, num_classes=num_classes, floats=floats), 2 * 4 * num_classes * patch_voxels)  # before and after the log-softmax
    return blocks * 4 * (num_classes + 1) * int(np.prod(grid.stride)) + one_patch


def _available_on_linux(root: Path = Path("/")) -> int | None:
    """MemAvailable, or what the control groups leave if that is less."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), flags=re.MULTILINE)
    limits = list(_left_in_groups(root)) + ([int(found[1]) * 1024] if found else [])
    return max(0, min(limits)) if limits else None


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group around this process, version 2 or 1, still lets it take."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names, reclaimable = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            mount, names, reclaimable = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
        else:
            continue
        inside = mount / path.lstrip("/")
        # Up to the mount, because any group above may be the tightest; in a container the path may not exist, only the mount.
        for group in (inside, *inside.parents):
            if group.is_relative_to(mount):
                yield from _left_in_group(group, *names, reclaimable=reclaimable)


def _left_in_group(group: Path, limit_name: str, usage_name: str, *, reclaimable: str) -> Iterator[int]:
    """Limit minus use of one control group, nothing where none is set; cached files count as free."""
    try:
        limit, usage = (group / limit_name).read_text().strip(), int((group / usage_name).read_text())
        statistics = (group / "memory.stat").read_text()
    except OSError:  # the root group has no such files
        return
    cached = re.search(rf"^{reclaimable} (\d+)", statistics, flags=re.MULTILINE)
    if limit != "max":
        yield int(limit) - usage + (int(cached[1]) if cached else 0)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API; the names are ours, the order is not."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_with_page_file", ctypes.c_uint64),
        ("available_with_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended", ctypes.c_uint64),
    ]


def _available_on_windows() -> int | None:
    """Available physical memory."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    is_told = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.available) if is_told else None


def _available_on_macos() -> int | None:
    """Pages that are free or that the system gives away first."""
    return _parse_vm_stat(subprocess.run(["/usr/bin/vm_stat"], capture_output=True, encoding="utf-8", timeout=5, check=True).stdout)


def _parse_vm_stat(text: str) -> int | None:
    """Free, inactive and purgeable pages in bytes, from what vm_stat prints."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = dict(re.findall(r"^Pages (free|inactive|purgeable):\s+(\d+)", text, flags=re.MULTILINE))
    return int(page[1]) * sum(map(int, pages.values())) if page and "free" in pages else None
