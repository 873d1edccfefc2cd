"""Memory: what the systems' own texts say, and an estimate that follows the engine's arrays."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import turned

from NMSWSegment.engine import blocked, resampling
from NMSWSegment.files import memory
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.memory import available_memory_bytes, cache_limit_bytes, needed_memory_bytes
from NMSWSegment.files.model_grid import model_grid_around

MEMINFO = "MemTotal:       24684324 kB\nMemFree:         1234567 kB\nMemAvailable:    8000000 kB\nBuffers:           54321 kB\n"
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               12345.
Pages active:                            400000.
Pages inactive:                          200000.
Pages speculative:                         5000.
Pages wired down:                        100000.
Pages purgeable:                           3000.
"Translation faults":                  99999999.
"""


def a_system(folder, files: dict) -> object:
    """A root folder with the given files in it."""
    for name, text in ({"proc/meminfo": MEMINFO} | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_linux_without_control_groups_is_mem_available(tmp_path):
    assert memory._available_on_linux(a_system(tmp_path, {})) == 8000000 * 1024


def test_linux_version_2_group_lowers_it_to_what_the_tightest_group_leaves(tmp_path):
    group = "sys/fs/cgroup/user.slice/app.scope"
    files = {
        "proc/self/cgroup": "0::/user.slice/app.scope\n",
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": "900\n",
        f"{group}/memory.stat": "anon 100\ninactive_file 50\n",
        "sys/fs/cgroup/user.slice/memory.max": "4000000000\n",
        "sys/fs/cgroup/user.slice/memory.current": "1500000000\n",
        "sys/fs/cgroup/user.slice/memory.stat": "anon 100\ninactive_file 300000000\nfile 7\n",
        "sys/fs/cgroup/memory.stat": "anon 1\n",
    }
    assert memory._available_on_linux(a_system(tmp_path, files)) == 4000000000 - 1500000000 + 300000000


def test_linux_version_1_group_counts_at_its_mount_in_a_container(tmp_path):
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "600000000\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000000\n",
    }
    assert memory._available_on_linux(a_system(tmp_path, files)) == 1500000000


def test_linux_group_without_a_limit_or_over_it_gives_no_nonsense(tmp_path):
    group = "sys/fs/cgroup"
    files = {"proc/self/cgroup": "0::/\n", f"{group}/memory.max": "max", f"{group}/memory.current": "9", f"{group}/memory.stat": ""}
    assert memory._available_on_linux(a_system(tmp_path, files)) == 8000000 * 1024
    assert memory._available_on_linux(a_system(tmp_path, files | {f"{group}/memory.max": "5"})) == 0


def test_macos_adds_free_inactive_and_purgeable_pages(monkeypatch):
    calls = []
    monkeypatch.setattr(memory.subprocess, "run", lambda command, **_: calls.append(command) or SimpleNamespace(stdout=VM_STAT))
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert available_memory_bytes() == (12345 + 200000 + 3000) * 16384
    assert calls == [["/usr/bin/vm_stat"]]


def test_windows_asks_with_the_documented_structure(monkeypatch):
    def fill(pointer):
        status = pointer._obj
        assert status.length == 64
        status.available = 5_000_000_000
        return 1

    kernel = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(memory.sys, "platform", "win32")
    assert available_memory_bytes() == 5_000_000_000
    kernel.GlobalMemoryStatusEx = lambda pointer: 0
    assert available_memory_bytes() is None


@pytest.mark.parametrize("error", [OSError("no such program"), subprocess.TimeoutExpired("vm_stat", 5), subprocess.CalledProcessError(1, "vm_stat")])
def test_available_is_none_where_it_cannot_be_found(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(memory.subprocess, "run", fail)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert available_memory_bytes() is None
    assert memory._parse_vm_stat("something else") is None
    monkeypatch.setattr(memory.sys, "platform", "plan9")
    assert available_memory_bytes() is None


@pytest.mark.skipif(sys.platform not in ("linux", "win32", "darwin"), reason="only there it can be found")
def test_available_on_this_computer_is_between_a_megabyte_and_100_terabytes():
    assert 1 << 20 < available_memory_bytes() < 100 << 40


def test_cache_limit_is_a_quarter_up_to_2_gb():
    assert cache_limit_bytes(4_000_000_000) == 1_000_000_000
    assert cache_limit_bytes(64_000_000_000) == cache_limit_bytes(None) == 2 << 30


def needed(shape, ijk_to_ras, *, spacing_mm=(3.0, 3.0, 3.0), coarse_factor=(2, 2, 2), **changes) -> int:
    model_grid = model_grid_around(shape, ijk_to_ras, spacing_mm=spacing_mm)
    grid = CandidateGrid.covering(model_grid.shape, patch_size=(64, 64, 64), overlap=0.5)
    return needed_memory_bytes(model_grid, grid, **({"bytes_per_voxel": 2, "num_classes": 25, "coarse_factor": coarse_factor, "num_patches": 10} | changes))


def upright(i, j, k) -> np.ndarray:
    return np.diag([i, j, k, 1.0])


@pytest.mark.parametrize(
    ("shape", "ijk_to_ras", "model", "measured_mib"),
    [
        # Peak resident set of a run on the CPU, torch 2.13, Linux, packaged bundle; two at 1.5 mm and coarse factor 3.
        ((102, 104, 150), upright(3, 3, 3), {}, 614),
        ((300, 300, 300), upright(1.5, 1.5, 1.5), {}, 681),
        ((400, 512, 512), upright(0.75, 0.75, 1), {}, 903),
        ((300, 300, 300), turned((1.5, 1.5, 1.5), (300, 300, 300), degrees=(0, 7, 10)), {}, 922),
        ((400, 512, 512), turned((1, 0.75, 0.75), (400, 512, 512), degrees=(0, 7, 10)), {}, 1093),
        ((400, 512, 512), upright(0.75, 0.75, 1), {"spacing_mm": (1.5, 1.5, 1.5), "coarse_factor": (3, 3, 3)}, 978),
        # The same of the worker, which shows the coarse result first and keeps the patches.
        ((102, 104, 150), upright(3, 3, 3), {"num_patches": 36, "cache_bytes": 2 << 30}, 1563),
    ],
)
def test_needed_is_an_upper_bound_within_a_fifth_of_measured_runs(shape, ijk_to_ras, model, measured_mib):
    assert measured_mib < needed(shape, ijk_to_ras, **model) / 2**20 < 1.2 * measured_mib


def test_needed_grows_with_what_a_run_holds():
    shape, ijk_to_ras = (120, 200, 300), upright(2.0, 2.5, 3.0)
    base = needed(shape, ijk_to_ras)
    assert needed(shape, ijk_to_ras, bytes_per_voxel=8) - base == pytest.approx(1.15 * 6 * 120 * 200 * 300, abs=2)
    assert needed(shape, ijk_to_ras, num_classes=50) > base
    assert needed(shape, ijk_to_ras, coarse_factor=(1, 1, 1)) > base
    # ten patches of 25 x 64^3 logits are 262 MB; with a next run all coarse logits stay, whatever the cache
    base, without_next = needed(shape, ijk_to_ras, cache_bytes=1), base
    assert base - without_next > 1.15 * 4 * 25 * 30_000
    assert needed(shape, ijk_to_ras, cache_bytes=1 << 30) - base == pytest.approx(1.15 * 10 * 25 * 64**3 * 4, abs=2)
    assert needed(shape, ijk_to_ras, cache_bytes=1000) - base == pytest.approx(1150, abs=3)


def test_needed_follows_the_local_net():
    shape, ijk_to_ras = (120, 200, 300), upright(2.0, 2.5, 3.0)
    rising = [
        needed(shape, ijk_to_ras, backbone=backbone, preset=preset)
        for backbone, preset in (("unet", "compact"), ("mednext", "compact"), ("swin_unetr", "paper"), ("e2enet", "paper"))
    ]
    assert rising == sorted(rising) and rising[0] < rising[2] < rising[3]
    assert needed(shape, ijk_to_ras, backbone="of tomorrow") == needed(shape, ijk_to_ras, backbone="e2enet", preset="small") == rising[-1]
    assert needed(shape, ijk_to_ras, backbone="e2enet", num_patches=0) == needed(shape, ijk_to_ras, num_patches=0)


# Largest resident set of one call beside what was there before, MB: torch 2.13, Linux, one thread, 25 classes at 64^3 (compact), 20 at 128^3 (paper).
@pytest.mark.parametrize(
    ("backbone", "preset", "side", "num_classes", "measured_mb"),
    [
        ("unet", "compact", 64, 25, 107),
        ("mednext", "compact", 64, 25, 272),
        ("swin_unetr", "compact", 64, 25, 168),
        ("e2enet", "compact", 64, 25, 268),
        ("unet", "paper", 128, 20, 552),
        ("mednext", "paper", 128, 20, 3163),
        ("swin_unetr", "paper", 128, 20, 3721),
        ("e2enet", "paper", 128, 20, 4011),
    ],
)
def test_net_bytes_are_an_upper_bound_of_measured_nets(backbone, preset, side, num_classes, measured_mb):
    found = memory._net_bytes(side**3, num_classes=num_classes, floats=memory._local_floats(backbone, preset)) / 1e6
    assert measured_mb < found < 1.35 * measured_mb


@pytest.mark.parametrize(
    ("backbone", "num_classes", "measured_mb"), [("unet", 25, 175), ("mednext", 25, 291), ("swin_unetr", 25, 168), ("e2enet", 25, 246), ("unet", 118, 315)]
)
def test_net_bytes_of_a_cascade_are_an_upper_bound_of_measured_nets(backbone, num_classes, measured_mb):
    """Measured like those above, compact nets, patches of 64, coarse factor 2."""
    floats = memory._local_floats(backbone, "compact", cascade_classes=num_classes)
    found = memory._net_bytes(64**3, num_classes=num_classes, floats=floats) / 1e6
    assert measured_mb < found < 1.5 * measured_mb


def test_needed_of_many_patches_counts_two_layers_of_blocks_not_all():
    grid = CandidateGrid.covering((4000, 240, 300), patch_size=(64, 64, 64), overlap=0.5)
    few, many, all_of_them = (memory._patch_bytes(grid, num_classes=25, num_patches=k, floats=55) for k in (1, 2500, 5000))
    assert many == all_of_them
    assert memory._patch_bytes(grid, num_classes=25, num_patches=0, floats=55) == 0
    # one patch of thousands hardly meets another, a row of 7 x 9 patches has two layers of 8 x 10 blocks in waiting
    assert all_of_them - few == (2 * 8 * 10 - 1) * 26 * 4 * 32**3


def test_needed_constants_are_those_of_the_stages():
    assert memory._SLAB_VOXELS == resampling.VOXELS_AT_ONCE
    assert memory._BLOCKED_BYTES == 12 * 4 * blocked.BLOCK_FLOATS


def test_averaged_source_is_as_large_as_in_the_engine():
    for shape, ijk_to_ras in (((13, 40, 31), upright(0.7, 0.9, 4.0)), ((20, 31, 17), turned((0.8, 1.1, 2.9), (20, 31, 17), permutation=(1, 2, 0)))):
        volume = resampling.Volume(array=np.zeros(shape, np.int16), ijk_to_ras=ijk_to_ras)
        averaged, _ = resampling.block_averaged(volume, spacing_mm=(3.0, 2.0, 2.5))
        assert memory._averaged_voxels(model_grid_around(shape, ijk_to_ras, spacing_mm=(3.0, 2.0, 2.5))) == averaged.numel()
