"""Fixtures: a phantom with exact labels and a tiny bundle whose nets are known in closed form."""

import io
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, while other tests run beside them

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hostile import Tally  # noqa: E402
from torch import nn  # noqa: E402

from NMSWSegment.files import phantoms  # noqa: E402
from NMSWSegment.files.labels import coded_labels  # noqa: E402

torch.set_num_threads(1)

TINY_POINTS = ((-1000.0, 0.0), (1000.0, 1.0))
TINY_GAIN = 400.0


class NearestIntensity(nn.Module):
    """A 1 x 1 net whose arg max is the class with the nearest typical intensity: -(x - m)^2 up to a common term."""

    def __init__(self, intensities: list[float], *, with_importance: bool) -> None:
        super().__init__()
        means = torch.tensor([(value + 1000) / 2000 for value in intensities])
        self.head = nn.Conv3d(1, len(means), kernel_size=1)
        self.head.weight.data = (2 * TINY_GAIN * means).reshape(-1, 1, 1, 1, 1)
        self.head.bias.data = -TINY_GAIN * means**2
        for parameter in self.head.parameters():
            parameter.data = parameter.data.half().float()
        self.importance_head = nn.Conv3d(1, 1, kernel_size=1) if with_importance else None
        if self.importance_head is not None:
            self.importance_head.weight.data.fill_(4.0)
            self.importance_head.bias.data.zero_()

    def forward(self, x):
        logits = self.head(x)
        return logits if self.importance_head is None else (logits, self.importance_head(x))


@pytest.fixture
def can_link(tmp_path) -> None:
    """Skip where this computer makes no symbolic links, as Windows without the right to."""
    try:
        (tmp_path / "link").symlink_to(tmp_path)
    except OSError:
        pytest.skip("symbolic links cannot be made here")
    (tmp_path / "link").unlink()


def windows_pipe(monkeypatch) -> io.BytesIO:
    """Print into a pipe as on Windows, which knows Western letters only; what is printed."""
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", pipe)
    return pipe.buffer


@pytest.fixture(scope="session")
def a_tiny_bundle(tmp_path_factory) -> Path:
    """A real bundle at 6 mm with patches of 16 voxels: background, liver, spleen, vertebrae by intensity."""
    from NMSWSegment.training.export import write_bundle

    intensities = [phantoms.BODY_HU, *(hu for _, _, hu in phantoms.ORGANS.values())]
    torch.manual_seed(0)
    manifest = {
        "name": "tiny",
        "title": "Tiny",
        "description": "Classifies by intensity; for tests.",
        "backbone": "unet",
        "modality": "CT",
        "spacing_mm": (6.0, 6.0, 6.0),
        "intensity_points": TINY_POINTS,
        "patch_size": (16, 16, 16),
        "overlap": 0.5,
        "coarse_factor": (2, 2, 2),
        "coarse_multiple": 3,
        "labels": coded_labels(list(phantoms.ORGANS)),
        "class_weights": (10.0,) * (len(phantoms.ORGANS) + 1),
        "architecture": {},
    }
    examples = {"coarse": [(torch.rand(1, 1, 8, 12, 16),)], "local": [(torch.rand(1, 1, 16, 16, 16),)]}
    coarse, local = NearestIntensity(intensities, with_importance=True), NearestIntensity(intensities, with_importance=False)
    return write_bundle(coarse, local, output=tmp_path_factory.mktemp("bundles") / "tiny", examples=examples, manifest=manifest)


def turned(spacing_mm, shape, *, degrees=(20.0, -15.0, 10.0), mirror=(1, 1, 1), permutation=(0, 1, 2)) -> np.ndarray:
    """4 x 4 of an oblique grid centered on the origin: rotations about R, A, S, then mirrored and permuted index axes."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        a, b = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    directions = (rotation * np.array(mirror))[:, list(permutation)]
    ijk_to_ras = np.eye(4)
    ijk_to_ras[:3, :3] = directions * np.array(spacing_mm[::-1])
    ijk_to_ras[:3, 3] = -ijk_to_ras[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return ijk_to_ras


@pytest.fixture
def a_phantom():
    """An upright phantom at 6 mm, anisotropic in shape: (volume, labels)."""
    shape = (54, 36, 52)
    return phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))


TALLY = Tally()


@pytest.fixture(scope="session")
def tally() -> Tally:
    """Counts hostile inputs over all files of tests."""
    return TALLY


def pytest_sessionfinish(session) -> None:
    """Where tests run in several processes, give the count to the first one."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = dict(TALLY.ends)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Add the count of a process that has ended."""
    TALLY.ends.update(getattr(node, "workeroutput", {}).get("tally", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    """One line about the hostile inputs, where some were tried."""
    if TALLY.ends:
        terminalreporter.write_line(TALLY.line())
