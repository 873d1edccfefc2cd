"""A run in a real memory control group of Linux, as a container has it: it fits, it is refused, or the kernel ends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "Resources" / "SampleData" / "cptac_pda_3mm.nii.gz"
OLD = b"an older result"
MB = 1_000_000


def own_group() -> tuple[Path, str]:
    """The memory control group of this process and the name of its limit; skips the test where a group below it cannot be made."""
    if not Path("/proc/self/cgroup").is_file():
        pytest.skip("this system has no control groups")
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
    path = next((path for _, controllers, path in lines if not controllers), "")
    return Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max"


@pytest.fixture
def a_group():
    """A new control group with a limit file, and a function that runs nmsw in it."""
    parent, limit_name = own_group()
    group = parent / f"nmsw-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    try:
        if not (group / limit_name).is_file():
            pytest.skip("the memory of control groups below this one is not controlled here")

        def run(*arguments: str, limit_mb: int) -> subprocess.CompletedProcess:
            (group / limit_name).write_text(str(limit_mb * MB))
            enter = f"import os, runpy, sys; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); sys.argv[0] = 'nmsw'; runpy.run_module('NMSWSegment', run_name='__main__')"
            return subprocess.run([sys.executable, "-c", enter, *arguments], cwd=ROOT, capture_output=True, encoding="utf-8")

        yield run
    finally:
        group.rmdir()


def segment_sample(output: Path) -> tuple[str, ...]:
    """Arguments of a run whose output file is there already."""
    output.write_bytes(OLD)
    return "segment", str(SAMPLE), "-o", str(output), "--k", "2", "--threads", "1"


def test_run_in_a_group_with_enough_memory_is_done(a_group, tmp_path):
    done = a_group(*segment_sample(tmp_path / "labels.nii.gz"), limit_mb=2000)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "labels.nii.gz").stat().st_size > 10_000


def test_run_in_a_small_group_is_refused_with_what_the_group_has_left(a_group, tmp_path):
    done = a_group(*segment_sample(tmp_path / "labels.nii.gz"), limit_mb=500)
    assert done.returncode == 2
    assert "may need 0." in done.stderr and "GB are free. Close other programs, crop the volume" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["labels.nii.gz"] and (tmp_path / "labels.nii.gz").read_bytes() == OLD


def test_run_that_the_kernel_ends_leaves_the_older_file_and_nothing_else(a_group, tmp_path):
    done = a_group(*segment_sample(tmp_path / "labels.nii.gz"), "--force-memory", limit_mb=350)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["labels.nii.gz"] and (tmp_path / "labels.nii.gz").read_bytes() == OLD
