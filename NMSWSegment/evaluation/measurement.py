"""One method on one volume in a process of its own: seconds by stage, cold and warm, and peak memory."""

import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

import NMSWSegment
from NMSWSegment.engine.runtime import available_devices, resolve_device, thread_count
from NMSWSegment.engine.segment import RunCache, timed
from NMSWSegment.evaluation.methods import Method
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.volume import read_volume, write_labelmap
from NMSWSegment.protocol import SegmentOptions, UserError

STAGES = ("read", "load", "canonical", "coarse", "upsample", "select", "patches", "aggregate", "restore", "write")
RUNS = ("cold", "warm")
"""The first run of a process, which opens the nets, and the second one, which has them."""

Result = TypeVar("Result")


def measure(method: Method, *, bundle: str, image: Path, labelmap: Path, device: str, threads: int | None) -> dict:
    """Segment a file twice in this process and write the labelmap.

    Args:
        bundle: name or folder.
        image: volume to read.
        labelmap: .nii.gz to write.

    Returns:
        JSON-ready: windows (patches through the local net), candidates, patches (boxes, best first), device, peak_memory_bytes (of the process
        after the cold run, so that nothing of the second is in it), gpu_memory_bytes or None, and seconds_cold, seconds_warm by stage. The start of
        Python and its imports are in neither.

    Raises:
        UserError: as segment.segment_volume.
    """
    loaded, run_cache, measured = load_bundle(bundle), RunCache(), {}
    options = SegmentOptions(bundle=bundle, num_patches=method.num_patches, policy=method.policy, device=device, threads=threads)
    on_gpu = resolve_device(device).type == "cuda"
    for run in RUNS:
        timings: dict[str, float] = {}
        with timed(timings, "read"):
            volume = read_volume(image)
        result = method.segment(volume, loaded, options=options, run_cache=run_cache)
        timings |= result.run_info["timings_s"]
        with timed(timings, "write"):
            write_labelmap(result.labelmap, labelmap, labels=loaded.manifest.labels)
        measured[f"seconds_{run}"] = {stage: round(timings.get(stage, 0.0), 4) for stage in STAGES}
        if run == "cold":
            measured["peak_memory_bytes"] = peak_memory_bytes()
            measured["gpu_memory_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else None
        run_cache = RunCache(nets=run_cache.nets)
    return measured | {
        "windows": result.run_info.get("windows", len(result.patches)),
        "candidates": result.run_info["candidates"],
        "device": result.run_info["device"],
        "patches": [asdict(patch) for patch in result.patches],
    }


def in_own_process(function: Callable[..., Result], *arguments: object, **options: object) -> Result:
    """Call a function in a fresh process that ends with it; its exceptions come back.

    Raises:
        UserError: the process died, most often for lack of memory.
    """
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(function, *arguments, **options).result()
            except BaseException:  # Ctrl-C must not wait for the end of a long method
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "The process of a method ended without a result, most often because memory ran out. Close other programs, or leave the method out with --methods."
        ) from error


def peak_memory_bytes() -> int | None:
    """Largest resident set of this process so far; None where that cannot be found out.

    On Linux not from getrusage, which also remembers the process that started this one.
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine_info(*, device: str, threads: int | None) -> dict:
    """What figures depend on besides the method, JSON-ready."""
    return {
        "processor": _processor_name(),
        "device": available_devices()[str(resolve_device(device))],
        "threads": thread_count(threads),
        "platform": platform.platform(),
        "NMSWSegment": NMSWSegment.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def today() -> str:
    """'2026-01-31'."""
    return time.strftime("%Y-%m-%d")


def json_text(values: dict) -> str:
    """The text of a JSON file."""
    return json.dumps(values, indent=1) + "\n"


def _processor_name() -> str:
    """As the system calls it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
