"""The served side of the panel, as a real process: its lines, its files, and how it stops."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import turned

from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.engine.worker import NICENESS, Inbox, progress_events
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.protocol import Progress, SegmentOptions

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0

# A library that prints, and a local net that takes a minute inside torch.
NOISY_AND_SLOW = """
import os, sys
from NMSWSegment.engine import worker

def local(*inputs):
    import torch
    print("patch", flush=True)
    torch.linalg.svd(torch.rand(6000, 6000))

class NoisyServer(worker.Server):
    def __init__(self, inbox, send):
        print("a library says hello")
        os.write(1, b"and so does one in C\\n")
        super().__init__(inbox, send)
        from NMSWSegment.engine.runtime import Nets
        Nets.local = local

worker.Server = NoisyServer
sys.exit(worker.main(sys.argv[1:]))
"""


# A torch that was built for another numpy, as on Macs with an Intel processor.
WITHOUT_NUMPY = """
import sys, torch
from NMSWSegment.engine import worker

def numpy(tensor):
    raise RuntimeError("Numpy is not available")

torch.Tensor.numpy = numpy
sys.exit(worker.main(sys.argv[1:]))
"""


class Client:
    """The panel's end of a worker."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.lines: queue.Queue[bytes] = queue.Queue()
        self.log: list[str] = []
        threading.Thread(target=lambda: [self.lines.put(line) for line in self.process.stdout], daemon=True).start()
        threading.Thread(target=lambda: self.log.extend(line.decode().rstrip() for line in self.process.stderr), daemon=True).start()

    def ask(self, request: dict | bytes) -> None:
        line = request if isinstance(request, bytes) else json.dumps(request).encode()
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def event(self) -> dict:
        return json.loads(self.lines.get(timeout=TIMEOUT_S))

    def events_until(self, *kinds: str) -> list[dict]:
        events = [self.event()]
        while events[-1]["event"] not in kinds:
            events.append(self.event())
        return events

    def leave(self) -> float:
        """Close the input; the seconds until the process has ended."""
        started = time.monotonic()
        self.process.stdin.close()
        self.process.wait(timeout=TIMEOUT_S)
        return time.monotonic() - started


@pytest.fixture(scope="module")
def a_worker():
    """A worker that has said hello."""
    client = Client("-m", "NMSWSegment", "worker")
    assert client.event() == {"event": "ready", "pid": client.process.pid, "version": "0.1.0"}
    devices = client.event()
    assert devices["event"] == "devices" and "cpu" in devices["devices"] and devices["torch"]
    assert devices["runtimes"]["exact"] == "PyTorch (float32)" and "auto" not in devices["runtimes"]
    yield client
    assert client.leave() < 5 and client.process.returncode == 0


@pytest.fixture(scope="module")
def volume():
    shape = (54, 42, 36)
    return phantoms.phantom(shape, ijk_to_ras=turned((6.0, 7.0, 8.0), shape, degrees=(10, -5, 15)))[0]


@pytest.fixture
def segment_request(a_tiny_bundle, volume, tmp_path):
    """A function that makes a request and, where the volume is sent, its file."""
    count = iter(range(100, 200))

    def make(*, key="ct", send=True, coarse_first=False, folder=tmp_path, **options) -> dict:
        if send:
            np.save(folder / "volume.npy", volume.array)
        options = {"bundle": str(a_tiny_bundle), "device": "cpu", "threads": 1, "num_patches": 5} | options
        facts = {"key": key, "name": "CT", "ijk_to_ras": volume.ijk_to_ras.tolist()}
        return {"request": "segment", "id": next(count), "folder": str(folder), "volume": facts, "send": send, "options": options, "coarse_first": coarse_first}

    return make


def options_of(request: dict) -> SegmentOptions:
    return SegmentOptions.from_dict(request["options"])


def test_coarse_result_then_labels_then_more_and_fewer_patches(a_worker, a_tiny_bundle, volume, segment_request, tmp_path):
    bundle = load_bundle(a_tiny_bundle)
    a_worker.ask({"request": "forget"})
    for index, (k, num_reused) in enumerate(((5, 0), (10, 5), (5, 5))):
        request = segment_request(num_patches=k, send=index == 0, coarse_first=index == 0)
        a_worker.ask(request)
        *events, done = a_worker.events_until("done", "error")
        expected = segment_volume(volume, bundle, options=options_of(request))
        assert done["labelmap"] == "labels.npy" and done["holds"] == "ct" and done["id"] == request["id"]
        assert np.array_equal(np.load(tmp_path / "labels.npy"), expected.labelmap.array)
        assert done["run_info"]["patches_reused"] == num_reused
        assert [patch["candidate"] for patch in done["run_info"]["patches"]] == [patch.candidate for patch in expected.patches]
        progress = [event for event in events if event["event"] == "progress"]
        assert all(event["id"] == request["id"] for event in events)
        assert [event["fraction"] for event in progress] == sorted(event["fraction"] for event in progress)
        assert progress[-1] | {"message": ""} == {
            "event": "progress",
            "id": request["id"],
            "stage": "done",
            "fraction": 1.0,
            "message": "",
            "done": 0,
            "total": 0,
        }
        coarse = [event for event in events if event["event"] == "coarse"]
        assert len(coarse) == (index == 0)
        if coarse:
            options = SegmentOptions.from_dict(request["options"] | {"num_patches": 0})
            assert np.array_equal(np.load(tmp_path / coarse[0]["labelmap"]), segment_volume(volume, bundle, options=options).labelmap.array)
            importance = np.load(tmp_path / coarse[0]["importance"]["file"])
            assert importance.dtype == np.float32 and importance.max() == 1
            np.testing.assert_allclose(np.diag(coarse[0]["importance"]["ijk_to_ras"]), [12, 12, 12, 1])
            assert coarse[0]["candidates"] == done["run_info"]["candidates"]
    assert not list(tmp_path.glob(".*"))


def test_volume_that_is_not_held_is_asked_for(a_worker, segment_request, volume):
    a_worker.ask({"request": "forget"})
    request = segment_request(send=False)
    a_worker.ask(request)
    assert a_worker.events_until("unknown_volume")[-1]["id"] == request["id"]
    a_worker.ask(request | {"send": True, "folder": segment_request()["folder"]})
    a_worker.events_until("done")
    a_worker.ask(segment_request())  # sent although it is held, as after a run that was cancelled
    assert a_worker.events_until("done")[-1]["run_info"]["patches_reused"] == 5
    moved = segment_request(send=False)
    moved["volume"]["ijk_to_ras"][0][3] += 1.0
    a_worker.ask(moved)  # the same voxels in another place
    assert a_worker.events_until("done", "unknown_volume")[-1]["event"] == "unknown_volume"


def test_cancel_leaves_no_result_and_spares_the_next_run(a_worker, segment_request, tmp_path):
    a_worker.ask({"request": "cancel"})  # nothing runs: ignored
    first, waiting, last = (segment_request(key=f"cancel {n}", num_patches=None) for n in range(3))
    for request in (first, waiting, {"request": "cancel"}, last):
        a_worker.ask(request)
    ends = [a_worker.events_until("done", "cancelled", "error")[-1] for _ in range(3)]
    assert [(event["event"], event["id"]) for event in ends[1:]] == [("cancelled", waiting["id"]), ("done", last["id"])]
    assert ends[0]["event"] in ("cancelled", "done") and ends[0]["id"] == first["id"]  # it may have been faster than the cancel


def test_mistakes_are_one_sentence_and_the_worker_lives_on(a_worker, segment_request, tmp_path):
    elsewhere = tmp_path / "gone"
    far_away = [[10, 0, 0, 5000], [0, 10, 0, 0], [0, 0, 10, 0], [0, 0, 0, 1]]
    cases = [
        (segment_request(structures=["livr"]), "Did you mean 'liver'"),
        (segment_request(num_patch=3), "Did you mean 'num_patches'"),
        (segment_request(bundle="nothing"), "A folder that 'nmsw export' wrote"),
        (segment_request(roi_to_ras=far_away), "or choose no region of interest"),
        (segment_request(key="elsewhere") | {"folder": str(elsewhere)}, "Segment again"),
        ({"request": "measure", "bundle": "nothing", "device": "auto", "threads": 1}, "A folder that 'nmsw export' wrote"),
    ]
    for request, fix in cases:
        a_worker.ask(request)
        error = a_worker.events_until("error", "done")[-1]
        assert error["kind"] == "user" and fix in error["message"] and error["details"] == ""
        assert error["id"] == request.get("id")
    a_worker.ask(segment_request())
    assert a_worker.events_until("error", "done")[-1]["event"] == "done"


def test_folder_that_vanished_before_the_result_is_a_sentence(a_worker, segment_request, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    a_worker.ask(segment_request(folder=folder))
    a_worker.events_until("done")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    a_worker.ask(segment_request(send=False) | {"folder": str(folder)})
    error = a_worker.events_until("error", "done")[-1]
    assert error["kind"] == "user" and "cannot be written to the temporary folder" in error["message"]


def test_volume_with_nan_is_refused(a_worker, segment_request, volume, tmp_path):
    request = segment_request(key="nan")
    array = volume.array.copy()
    array[3, 4, 5] = np.nan
    np.save(tmp_path / "volume.npy", array)
    a_worker.ask(request)
    error = a_worker.events_until("error", "done")[-1]
    assert error["kind"] == "user" and "has 1 voxels that are no number" in error["message"]


@pytest.mark.parametrize("line", [b"{not json", b"[1, 2]", b'{"id": 3}', b'"caf\xe9"', b'{"request": "sing"}', b'{"request": "segment", "id": 5}'])
def test_line_that_is_no_request_is_a_bug_and_the_worker_lives_on(a_worker, line):
    a_worker.ask(line)
    error = a_worker.event()
    assert error["event"] == "error" and error["kind"] == "bug" and error["message"]


def test_measure_tells_the_rate(a_worker, a_tiny_bundle):
    a_worker.ask({"request": "measure", "bundle": str(a_tiny_bundle), "device": "auto", "threads": None})
    event = a_worker.event()
    assert (event["event"], event["bundle"], event["runtime"]) == ("rate", "tiny", "exact") and event["device"]
    assert set(event["rate"]) == {"patch_s", "voxel_s", "source_voxel_s"} and min(event["rate"].values()) > 0


def test_printing_libraries_do_not_break_the_lines_and_end_of_input_stops_a_busy_net(segment_request, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    client = Client("-c", NOISY_AND_SLOW, "--folder", str(folder))
    client.ask(segment_request(folder=folder))
    assert [client.event()["event"] for _ in range(2)] == ["ready", "devices"]
    while "patch" not in client.log:
        if not client.lines.empty():
            assert client.event()["event"] == "progress"
        time.sleep(0.02)
    time.sleep(0.2)  # well inside of torch
    assert client.leave() < 1.0
    assert client.log[:2] == ["a library says hello", "and so does one in C"]
    assert not folder.exists()


@pytest.mark.parametrize("error", ["ImportError", "OSError"])  # where a library of torch does not load on Windows
def test_ready_comes_before_torch_and_its_absence_is_told(tmp_path, error):
    (tmp_path / "torch.py").write_text(f"import time; time.sleep(0.5); raise {error}('no torch here')")
    client = Client("-m", "NMSWSegment", "worker", PYTHONPATH=str(tmp_path))
    assert client.event()["event"] == "ready"
    assert client.process.poll() is None
    error = client.event()
    assert error["kind"] == "user" and error["id"] is None and "no torch here). Install it" in error["message"]
    assert client.process.wait(timeout=TIMEOUT_S) == 2
    client.process.stdin.close()


def test_torch_that_goes_with_another_numpy_is_told_and_ends_the_worker():
    client = Client("-c", WITHOUT_NUMPY)
    ready, error = client.event(), client.event()
    assert ready["event"] == "ready" and error["kind"] == "user" and error["id"] is None and 'pip_install("numpy<2") and restart' in error["message"]
    assert client.process.wait(timeout=TIMEOUT_S) == 2
    client.process.stdin.close()


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="Windows has no niceness")
@pytest.mark.parametrize("inherited", [0, 19])
def test_low_priority_that_slicer_gives_is_undone_where_the_system_permits(inherited):
    script = (
        f"import os; os.setpriority(os.PRIO_PROCESS, 0, {inherited}); from NMSWSegment.engine.worker import set_priority; set_priority(); print(os.nice(0))"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    if "SLICER_BACKGROUND_THREAD_PRIORITY" in ended.stderr:  # said where the system refuses
        assert int(ended.stdout) == inherited == 19
    else:
        assert int(ended.stdout) == NICENESS


def test_cancel_counts_for_all_that_was_asked_before_it_and_nothing_after():
    inbox = Inbox()
    inbox.put({"request": "cancel"})
    for number in range(4):
        if number == 2:
            inbox.put({"request": "cancel"})
        inbox.put({"request": "segment", "id": number})
    taken = [inbox.get() for _ in range(4)]
    assert [(request["id"], inbox.is_cancelled(number)) for number, request in taken] == [(0, True), (1, True), (2, False), (3, False)]


def test_progress_is_told_at_every_stage_and_not_too_often_within_one():
    sent = []
    on_progress = progress_events(sent.append, run_id=1, is_cancelled=lambda: False)
    on_progress(Progress("coarse", 0.1, ""))
    for done in range(1, 200):
        on_progress(Progress("patches", 0.5, "", done=done, total=200))
    on_progress(Progress("restore", 0.9, ""))
    assert [event["stage"] for event in sent] == ["coarse", "patches", "restore"]
    assert sent[1]["done"] == 1
    time.sleep(0.06)
    on_progress(Progress("restore", 0.95, ""))
    assert len(sent) == 4


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="not on Windows")
def test_worker_lets_the_application_go_first(a_worker):
    assert os.getpriority(os.PRIO_PROCESS, a_worker.process.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
