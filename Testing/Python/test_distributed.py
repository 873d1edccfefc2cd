"""Several processes, and processes that are killed: the same run as one that nothing happens to. Real processes, the real command."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch

pytest.importorskip("monai")
pytest.importorskip("tensorboard")

from test_train import a_data_folder, tiny_options  # noqa: E402

from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training.distributed import ProcessGroup, joined_group  # noqa: E402
from NMSWSegment.training.iteration import new_state  # noqa: E402
from NMSWSegment.training.run_folder import BEST_NAME, load_checkpoint  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--spacing 6 6 6 --patch-size 16 16 16 --coarse-factor 1 1 1 --top-k-patches 1 --random-patches 1 --seed 3 --device cpu --threads 1 --log-every 1 --show-every 0"


def a_process(data: Path, output: Path, flags: str, *, launcher: Sequence[str] = (), is_group: bool = False, **environment: str) -> subprocess.Popen:
    """`nmsw train` on its own, or started by a launcher; is_group: with its workers a group that signals can be sent to."""
    words = [sys.executable, *launcher, "-m", "NMSWSegment", "train", "--data", f"decathlon:{data}", "--output", str(output), *FLAGS.split(), *flags.split()]
    places = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        words, env=os.environ | places | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", start_new_session=is_group
    )


def a_port() -> str:
    """One that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def curves(run: Path) -> dict[str, list[float]]:
    """Every loss in the TensorBoard files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    return {tag: [point.value for point in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag.startswith("loss/")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return a_data_folder(tmp_path_factory.mktemp("data"))


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun asks for a libuv that torch does not have there")
@pytest.mark.parametrize("part", ["both", "coarse", "local"])
def test_torchrun_on_two_computers_gives_losses_and_weights_of_one_process(data, tmp_path, part):
    # two launchers that know each other by address only, each with one process, as in docs/training.md
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{a_port()}"]
    launchers = [["-m", "torch.distributed.run", *meeting, "--local-addr", address] for address in ("127.0.0.1", "127.0.0.2")]
    flags = f"--iterations 3 --batch-size 3 --workers 0 --hold-out two --train {part}"  # three volumes: the first process has two of them, and the validation
    processes = [a_process(data, tmp_path / "two", flags, launcher=launcher) for launcher in launchers]
    train(tiny_options(data, iterations=3, batch_size=3, hold_out=("two",), train=part), output=tmp_path / "one", num_workers=0, log_every=1, show_every=0)
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    found, expected = curves(tmp_path / "two"), curves(tmp_path / "one")
    assert set(found) == {f"loss/{name}" for name in ("coarse", "high", "patch", "entropy", "ranking", "total")} and len(found["loss/total"]) == 3
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5)
    weights, wanted = (load_checkpoint(tmp_path / name)["net"] for name in ("two", "one"))
    differences = torch.cat([(weights[key] - value).abs().flatten() for key, value in wanted.items()])
    # sums run in another order; Adam divides by the gradient's size, so where it is nearly 0 a weight may differ by a part of a step (3e-4)
    assert differences.max() < 1e-4 and differences.mean() < 1e-7
    scores = [load_checkpoint(tmp_path / name, BEST_NAME)["validation"]["best_score"] for name in ("two", "one")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert len(list((tmp_path / "two").glob("events*"))) == 1  # only the first process writes


def test_run_killed_and_resumed_equals_one_that_was_not(data, tmp_path):
    process = a_process(data, tmp_path / "killed", "--iterations 5 --checkpoint-every 1 --workers 1")
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.communicate(timeout=300)
    stopped_at = load_checkpoint(tmp_path / "killed")["iteration"]
    assert 1 <= stopped_at < 5 and process.returncode != 0
    options = tiny_options(data, iterations=5)
    train(options, output=tmp_path / "killed", num_workers=0, log_every=1, show_every=0, resume=True)
    train(options, output=tmp_path / "straight", num_workers=0, log_every=1, show_every=0)
    found, expected = load_checkpoint(tmp_path / "killed"), load_checkpoint(tmp_path / "straight")
    assert found["iteration"] == expected["iteration"] == 5
    assert [key for key, value in expected["net"].items() if not torch.equal(found["net"][key], value)] == []
    moments = [(found["optimizer"]["state"][key]["exp_avg_sq"], state["exp_avg_sq"]) for key, state in expected["optimizer"]["state"].items()]
    assert all(torch.equal(one, other) for one, other in moments)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no process groups")
def test_sigterm_of_the_whole_job_ends_a_run_as_ctrl_c_does(data, tmp_path):
    """What SLURM sends at the end of the time, or by scancel: to the run and to its workers."""
    process = a_process(data, tmp_path / "run", "--iterations 100000 --checkpoint-every 1 --workers 2", is_group=True)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "nmsw: Stopped." and "Traceback" not in output and "DataLoader" not in output
    assert load_checkpoint(tmp_path / "run")["iteration"] >= 1


def test_error_of_one_process_ends_all_with_a_sentence_each(tmp_path):
    folder = a_data_folder(tmp_path / "data")
    label = sitk.ReadImage(str(folder / "two" / "label.nii.gz"))
    sitk.WriteImage(label + 90, str(folder / "two" / "label.nii.gz"))  # of the second process
    port = a_port()
    flags = "--iterations 1 --batch-size 2 --workers 0"
    processes = [a_process(folder, tmp_path / "run", flags, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT=port) for rank in (0, 1)]
    first, second = (process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], first + second
    assert "The label of case 'two' holds [90" in second and "Traceback" not in second
    assert "Another process of this run has ended" in first and "Traceback" not in first and first.isascii()  # torch ends such words with an emoji
    assert not (tmp_path / "run" / "options.json").exists()


def test_team_shares_everything_once():
    groups = [ProcessGroup(device=torch.device("cpu"), rank=rank, size=3) for rank in range(3)]
    assert [list(group.share(range(7))) for group in groups] == [[0, 3, 6], [1, 4], [2, 5]]


def test_more_processes_than_volumes_says_what_to_give(data):
    with pytest.raises(UserError, match="3 processes for batch_size 2. Give --batch-size 3 or more"):
        new_state(tiny_options(data, batch_size=2), num_classes=4, group=ProcessGroup(device=torch.device("cpu"), size=3))


@pytest.mark.parametrize(("has_nccl", "backend"), [(True, "nccl"), (False, "gloo")])  # torch for Windows has none
def test_gpus_talk_through_nccl_where_torch_has_it(monkeypatch, has_nccl, backend):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **options: chosen.append(name))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with joined_group("cuda") as group:
        assert group.device == torch.device("cuda:1") and chosen == [backend]


def test_process_without_a_gpu_of_its_own_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="as many processes as GPUs"), joined_group("cuda"):
        pass
