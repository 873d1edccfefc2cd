"""One row of the speed table, measured with random weights.

The local net runs on the first few windows only; then its last answer stands in for the others, so that everything around it (stitching,
memory) is real, and the time of the nets is extrapolated.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from NMSWSegment.engine.aggregation import CoarseUpsampler
from NMSWSegment.engine.resampling import coarse_input
from NMSWSegment.engine.runtime import Nets, reproducible, resolve_device
from NMSWSegment.engine.segment import CoarsePass, choose, refine, timed
from NMSWSegment.evaluation.baselines import MethodRun, slide
from NMSWSegment.evaluation.costs import coarse_shape, run_costs
from NMSWSegment.evaluation.measurement import peak_memory_bytes
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.model_grid import model_grid_around
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet
from NMSWSegment.protocol import SegmentOptions, UserError, ignore_progress

GEOMETRY = {"paper": (128, 3), "compact": (64, 2)}
"""Preset -> side of a patch, coarse factor."""
OVERLAP = 0.5
SEED = 0
METHODS = {"sw_0.50": None, "nmsw_5": 5, "nmsw_10": 10, "nmsw_30": 30, "nmsw_all": None}
"""Method -> patches; None is all windows."""


@dataclass(frozen=True)
class SpeedOptions:
    """One table."""

    shape: tuple[int, int, int]
    """Voxels at the model's spacing, KJI."""
    classes: int
    preset: str
    backbone: str
    windows: int
    """Windows of each method that really go through the local net."""
    device: str
    threads: int | None

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or self.windows < 1 or self.classes < 2:
            raise UserError(
                f"--shape {' '.join(map(str, self.shape))}, --windows {self.windows}, --classes {self.classes} cannot be measured. Use positive numbers, and at least 2 classes."
            )

    @property
    def architecture(self) -> Architecture:
        """Of both nets."""
        return Architecture(num_classes=self.classes, backbone=self.backbone, preset=self.preset)

    @property
    def grid(self) -> CandidateGrid:
        """Of all candidates."""
        return CandidateGrid.covering(self.shape, patch_size=(GEOMETRY[self.preset][0],) * 3, overlap=OVERLAP, coarse_factor=(GEOMETRY[self.preset][1],) * 3)


class FirstCalls(nn.Module):
    """A net that computes a few calls, with their seconds, and repeats its last answer afterwards."""

    def __init__(self, net: nn.Module, *, limit: int) -> None:
        super().__init__()
        self.net, self.limit, self.seconds_per_patch = net, limit, []
        self.last = torch.empty(0)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """(B, 1, P, P, P) and what else the net takes -> (B, C, P, P, P)."""
        if len(self.seconds_per_patch) >= self.limit:
            return self.last[:1].repeat(len(x), 1, 1, 1, 1)  # a copy each, because MONAI weights answers in place
        started = time.perf_counter()
        answer = self.net(x, *more)
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seconds_per_patch.append((time.perf_counter() - started) / len(x))
        self.last = answer.clone()
        return answer


def measure_speed(method: str, options: SpeedOptions) -> dict:
    """One row, JSON-ready, measured in this process: seconds by stage, windows, measured windows, MACs and memory."""
    torch.manual_seed(SEED)
    device = resolve_device(options.device)
    manifest = _manifest(options)
    net = NMSWNet(options.architecture).eval().to(device)
    local = FirstCalls(net.local, limit=options.windows)
    nets = Nets(manifest=manifest, coarse_net=net.coarse, local_net=local, device=device)
    run = MethodRun(nets=nets, options=SegmentOptions(num_patches=METHODS[method]), on_progress=ignore_progress)
    x = torch.rand(1, 1, *options.grid.padded_shape)
    with reproducible(options.threads), torch.inference_mode():
        if method.startswith("sw"):
            x = x[(..., *(slice(0, length) for length in options.shape))].contiguous()
            windows = slide(x, run, grid=options.grid, overlap=OVERLAP)[1]
        else:
            coarse = _coarse_pass(x, run, options=options)
            with timed(run.timings, "select"):
                selection = choose(coarse, options=run.options)
            refine(coarse, selection, nets, timings=run.timings)
            windows = len(selection.indices)
    return {
        "method": method,
        "windows": windows,
        "seconds_per_patch": [round(seconds, 4) for seconds in local.seconds_per_patch],
        "seconds": {stage: round(seconds, 3) for stage, seconds in run.timings.items() if stage != "patches"},
        "peak_memory_bytes": peak_memory_bytes(),
        "gpu_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def measure_earlier(method: str, options: SpeedOptions, *, folder: Path) -> dict:
    """The same row measured by the NMSWSegment of another folder, in a process of its own.

    Raises:
        UserError: it cannot measure this.
    """
    script = (
        "import json, sys; from NMSWSegment.evaluation import speed_measurement as s; method, k, options = json.loads(sys.argv[1]); s.METHODS[method] = k; "
        "print(json.dumps(s.measure_speed(method, s.SpeedOptions(**options | {'shape': tuple(options['shape'])}))))"
    )
    request = json.dumps([method, METHODS[method], asdict(options)])
    done = subprocess.run(
        [sys.executable, "-c", script, request],
        env=os.environ | {"PYTHONPATH": str(folder.resolve())},
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise UserError(f"The version in '{folder}' cannot measure this ({reason}). Give another one with --before, or leave it out.")
    return json.loads(done.stdout.splitlines()[-1])


def speed_macs(method: str, options: SpeedOptions, *, windows: int) -> tuple[int, int]:
    """True MACs of a row as it runs here, and the paper's count of the published nets.

    Both coarse nets see the volume divided by the coarse factor, up to a multiple that the net takes.
    """
    uses_coarse = not method.startswith("sw")
    manifest = _manifest(options)
    costs = run_costs(options.architecture, coarse_shape=coarse_shape(options.shape, manifest=manifest), patch_size=options.grid.patch_size)
    return costs.true.total(windows, uses_coarse=uses_coarse), costs.paper.total(windows, uses_coarse=uses_coarse)


def _coarse_pass(x: Tensor, run: MethodRun, *, options: SpeedOptions) -> CoarsePass:
    """The coarse net really runs; its logits are replaced by smooth ones, because those of random weights would make every cell a mixed one."""
    with timed(run.timings, "coarse"):
        logits, importance_map = run.nets.coarse(coarse_input(x, grid=options.grid))
    shape = tuple(logits.shape[1:])
    del logits  # else there would be two of them
    logits = _phantom_logits(shape, classes=options.classes)
    with timed(run.timings, "upsample"):
        labels = CoarseUpsampler(logits, grid=options.grid).labels()
    model_grid = model_grid_around(options.grid.padded_shape, np.eye(4), spacing_mm=(1.0, 1.0, 1.0))
    return CoarsePass(x=x, model_grid=model_grid, grid=options.grid, coarse_logits=logits, importance_map=importance_map, coarse_labels=labels)


def _phantom_logits(shape: tuple[int, int, int], *, classes: int) -> Tensor:
    """Logits (C, d, h, w) of a phantom that fills the volume, blurred over three voxels."""
    spacing_mm = [2 * radius / length for radius, length in zip(phantoms.BODY_RADII_MM[::-1], shape)]
    labels = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras(spacing_mm, shape))[1]
    logits = torch.zeros(classes, *shape)
    for value in range(min(classes, int(labels.max()) + 1)):
        is_class = torch.from_numpy(labels == value).float()[None, None]
        logits[value] = 10 * nn.functional.avg_pool3d(is_class, 3, stride=1, padding=1, count_include_pad=False)[0, 0]
    return logits


def _manifest(options: SpeedOptions) -> BundleManifest:
    """A manifest for nets that are in no bundle."""
    side, factor = GEOMETRY[options.preset]
    return BundleManifest(
        name="random",
        title="random weights",
        description="",
        backbone=options.backbone,
        modality="CT",
        spacing_mm=(1.0, 1.0, 1.0),
        intensity_points=((0.0, 0.0), (1.0, 1.0)),
        patch_size=(side,) * 3,
        overlap=OVERLAP,
        coarse_factor=(factor,) * 3,
        coarse_multiple=options.architecture.coarse_multiple,
        labels=coded_labels([f"class_{value}" for value in range(1, options.classes)]),
        class_weights=(0.0,) * options.classes,
        sha256={},
        architecture=options.architecture.to_dict(),
    )
