"""The served side of the Slicer panel: a process that stays warm and speaks JSON, one object a line, UTF-8.

Requests on standard input:
    {"request": "measure", "bundle", "device", "threads", "runtime"}         -> rate; the runtime may be left out
    {"request": "segment", "id", "folder", "volume": {"key", "name", "ijk_to_ras"}, "send", "options", "coarse_first"}
        -> progress ..., coarse, progress ..., done; or cancelled, unknown_volume, error. With send, FOLDER/volume.npy holds the
        voxels (K, J, I); without, those of an earlier run with the same key and place are meant.
    {"request": "cancel"}                                                    the segmentations that were asked for before it
    {"request": "forget"}                                                    drop the volume and all that was computed of it
End of input: stop at once, wherever it is.

Events on standard output: ready (before torch is loaded), devices, rate, progress, coarse, done, cancelled, unknown_volume, and
error with kind "user" (the message is for the user) or "bug" (the details are a traceback). Results lie in the request's folder.

At file scope only what loads at once and prints nothing: standard output belongs to the protocol before any library comes in.
"""

import argparse
import json
import os
import queue
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from NMSWSegment import __version__
from NMSWSegment.protocol import EXACT, Cancelled, Progress, SegmentOptions, UserError

if TYPE_CHECKING:
    import numpy as np

    from NMSWSegment.engine.segment import CoarseResult
    from NMSWSegment.files.volume import Volume

PROGRESS_INTERVAL_S = 0.05
"""Progress inside one stage is sent at most this often."""
NICENESS = 5
"""The windows of the desktop, at 0, come first: the nets take every core."""
DONE, NO_TORCH = 0, 2
_SHOWN_BYTES = 1000
"""Of a line that is no request."""

Send = Callable[[dict], None]


def main(argv: list[str]) -> int:
    """`nmsw worker`, before anything but this file is imported."""
    parser = argparse.ArgumentParser(prog="nmsw worker", description="Serve the Slicer panel: JSON lines on standard input and output.")
    add_arguments(parser)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit_:  # --help ends so
        return int(exit_.code or DONE)
    return run(arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `nmsw worker`."""
    parser.add_argument("--folder", type=Path, default=None, metavar="FOLDER", help="folder of the panel's temporary files, removed when standard input ends")


def run(arguments: argparse.Namespace) -> int:
    """Serve until standard input ends."""
    return serve(folder=arguments.folder)


def serve(*, folder: Path | None = None) -> int:
    """Answer requests until standard input ends, which ends the process.

    Args:
        folder: removed at the end, for the case that the panel died and cannot do so itself.
    """
    requests, events = _taken_standard_streams()
    set_priority()
    send = _event_writer(events)
    send({"event": "ready", "pid": os.getpid(), "version": __version__})
    inbox = Inbox()
    threading.Thread(target=_read_requests, args=(requests, inbox, send, folder), daemon=True).start()
    try:
        import torch

        from NMSWSegment.engine.net_runtimes import TITLES, possible_runtimes
        from NMSWSegment.engine.runtime import available_devices, check_numpy

        check_numpy()
    except (ImportError, OSError, UserError) as error:  # OSError where a library of torch does not load on Windows
        message = str(error) if isinstance(error, UserError) else f"PyTorch cannot be loaded ({error}). Install it with the extension PyTorch, then restart."
        print(message, file=sys.stderr)
        send(_error_event(None, "user", message))
        return NO_TORCH
    runtimes = {name: TITLES[name] for name in (EXACT, *possible_runtimes())}
    send({"event": "devices", "devices": available_devices(), "runtimes": runtimes, "torch": torch.__version__})
    server = Server(inbox, send)
    while True:
        server.answer(*inbox.get())


class Inbox:
    """Requests in the order in which they came, numbered; a cancel overtakes those that wait, and spares those that come after it."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[int, dict]] = queue.SimpleQueue()
        self._last_number = 0
        self._cancelled_through = 0

    def put(self, request: dict) -> None:
        """Take a request; called by the thread that reads."""
        if request["request"] == "cancel":
            self._cancelled_through = self._last_number
        else:
            self._last_number += 1
            self._waiting.put((self._last_number, request))

    def get(self) -> tuple[int, dict]:
        """The next request and its number; waits for one."""
        return self._waiting.get()

    def is_cancelled(self, number: int) -> bool:
        """Whether a cancel came after this request."""
        return number <= self._cancelled_through


class Server:
    """Answers requests one after the other, with one session behind them."""

    def __init__(self, inbox: Inbox, send: Send) -> None:
        from NMSWSegment.engine.session import Session

        self._inbox = inbox
        self._send = send
        self._session = Session()

    def answer(self, number: int, request: dict) -> None:
        """Do what a request asks; whatever goes wrong becomes an event. One of the two process boundaries."""
        from NMSWSegment.engine.session import UnknownVolume

        run_id = request.get("id")
        try:
            kind = request["request"]
            if kind == "segment":
                self._segment(number, request)
            elif kind == "measure":
                self._measure(request)
            elif kind == "forget":
                self._session.forget()
            else:
                raise ValueError(f"unknown request '{kind}'")
        except Cancelled:
            self._send({"event": "cancelled", "id": run_id})
        except UnknownVolume:
            self._send({"event": "unknown_volume", "id": run_id})
        except UserError as error:
            self._send(_error_event(run_id, "user", str(error)))
        except Exception as error:
            self._send(_error_event(run_id, "bug", _one_line(error), traceback.format_exc()))

    def _segment(self, number: int, request: dict) -> None:
        """Run a segmentation and leave its labelmap in the folder of the request."""
        from NMSWSegment.files.bundle import load_bundle
        from NMSWSegment.files.label_content import label_content
        from NMSWSegment.files.statistics import structure_statistics

        folder, run_id = Path(request["folder"]), request["id"]
        on_progress = progress_events(self._send, run_id=run_id, is_cancelled=lambda: self._inbox.is_cancelled(number))
        on_progress(Progress("start", 0.0, "Starting"))
        options = SegmentOptions.from_dict(request["options"])
        bundle = load_bundle(options.bundle)
        key = json.dumps([request["volume"]["key"], request["volume"]["ijk_to_ras"]])
        volume = None
        if request["send"] and not self._session.holds(key):  # it may hold it, of a run that was cancelled
            self._session.forget()  # makes room
            volume = _read_volume(folder, request["volume"])
        coarse_ready = (lambda coarse: self._send(_coarse_event(coarse, folder=folder, run_id=run_id))) if request["coarse_first"] else None
        result = self._session.run(key, volume, bundle=bundle, options=options, on_progress=on_progress, coarse_ready=coarse_ready)
        rows = structure_statistics(result.labelmap, self._session.volume, labels=bundle.manifest.labels, patches=result.patches)
        _write_array(folder, "labels.npy", result.labelmap.array)
        done = {
            "event": "done",
            "id": run_id,
            "labelmap": "labels.npy",
            "content": asdict(label_content(result.labelmap.array, labels=bundle.manifest.labels)),  # here, where no window waits for it
            "statistics": [row.to_dict() for row in rows],
            "run_info": result.run_info,
            "holds": request["volume"]["key"],
        }
        self._send(done)

    def _measure(self, request: dict) -> None:
        """Open the nets and measure how fast they are."""
        from NMSWSegment.files.bundle import load_bundle

        bundle = load_bundle(request["bundle"])
        runtime = request.get("runtime", EXACT)
        device, rate = self._session.measure(bundle, device=request["device"], threads=request["threads"], runtime=runtime)
        self._send({"event": "rate", "bundle": bundle.manifest.name, "device": device, "runtime": runtime, "rate": asdict(rate)})


def set_priority() -> None:
    """Let the application, and all else on the computer, go first, but not by far.

    Slicer gives its child processes the lowest priority on Linux, with which a computer that has other work would hardly run the nets. Before any
    thread is started, because a priority belongs to a thread there and new threads inherit it.
    """
    try:
        if sys.platform == "win32":
            import ctypes

            below_normal = 0x4000  # BELOW_NORMAL_PRIORITY_CLASS
            kernel = ctypes.WinDLL("kernel32")
            kernel.GetCurrentProcess.restype = ctypes.c_void_p
            kernel.SetPriorityClass(ctypes.c_void_p(kernel.GetCurrentProcess()), below_normal)
        else:
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    except OSError:  # only an administrator, or a limit of the computer, allows a higher priority
        print(
            f"The process runs at the low priority that Slicer gave it (niceness {os.getpriority(os.PRIO_PROCESS, 0)}), so it is slow while other programs are "
            "busy. To change that, set the environment variable SLICER_BACKGROUND_THREAD_PRIORITY to 0 before starting Slicer.",
            file=sys.stderr,
            flush=True,
        )


def _taken_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """The process's standard input and output, for the protocol alone: whatever a library prints goes to standard error from now on,
    and what it reads is empty."""
    requests, events = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, events


def _event_writer(stream: BinaryIO) -> Send:
    """A function that writes one event as one line, from any thread; it ends the process when nobody reads any more."""
    lock = threading.Lock()

    def send(event: dict) -> None:
        line = memoryview((json.dumps(event) + "\n").encode("utf-8"))
        with lock:
            try:
                while line:
                    line = line[stream.write(line) :]  # a raw pipe may take a part
            except OSError:
                os._exit(DONE)

    return send


def _read_requests(stream: BinaryIO, inbox: Inbox, send: Send, folder: Path | None) -> None:
    """Hand the lines of standard input on. At its end the process ends, in the middle of a net too, which lets other threads run."""
    try:
        for line in stream:
            try:
                request = json.loads(line)
                if not isinstance(request, dict) or not isinstance(request.get("request"), str):
                    raise ValueError("not an object with the key 'request'")
            except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
                send(_error_event(None, "bug", f"A line is no request: {_one_line(error)}", line[:_SHOWN_BYTES].decode("utf-8", errors="replace")))
            else:
                inbox.put(request)
    finally:  # whatever happens to this thread: nothing outlives the panel
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(DONE)


def progress_events(send: Send, *, run_id: int, is_cancelled: Callable[[], bool]) -> Callable[[Progress], None]:
    """A progress callback that sends events, the first of every stage and then not too many."""
    last_stage, last_time = "", 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal last_stage, last_time
        if is_cancelled():
            raise Cancelled
        now = time.monotonic()
        if progress.stage != last_stage or now - last_time >= PROGRESS_INTERVAL_S:
            last_stage, last_time = progress.stage, now
            send({"event": "progress", "id": run_id} | asdict(progress))

    return on_progress


def _coarse_event(coarse: "CoarseResult", *, folder: Path, run_id: int) -> dict:
    """Leave the coarse result in the folder; the event that says so."""
    _write_array(folder, "coarse.npy", coarse.labelmap.array)
    _write_array(folder, "importance.npy", coarse.importance.array)
    importance = {"file": "importance.npy", "ijk_to_ras": coarse.importance.ijk_to_ras.tolist()}
    return {"event": "coarse", "id": run_id, "labelmap": "coarse.npy", "importance": importance, "candidates": coarse.candidates}


def _read_volume(folder: Path, volume_info: dict) -> "Volume":
    """The volume of a request.

    Raises:
        UserError: the file is not there, or a voxel is no number.
    """
    import numpy as np

    from NMSWSegment.files.volume import Volume
    from NMSWSegment.files.volume_checks import check_numbers

    try:
        array = np.load(folder / "volume.npy")
    except OSError as error:
        raise UserError(
            f"The volume cannot be read from the temporary folder '{folder}' ({error.strerror}). Segment again; if this comes back, look whether a "
            "program cleans that folder up."
        ) from error
    check_numbers(array, volume_info["name"])
    return Volume(array=array, ijk_to_ras=np.array(volume_info["ijk_to_ras"], dtype=np.float64), name=volume_info["name"])


def _write_array(folder: Path, name: str, array: "np.ndarray") -> None:
    """Write an array that is complete as soon as it has its name.

    Raises:
        UserError: the folder is gone, or cannot take it.
    """
    import numpy as np

    from NMSWSegment.files.output_file import replace_path

    temporary = folder / f".{name}"
    try:
        with open(temporary, "wb") as stream:
            np.save(stream, array)
        replace_path(temporary, folder / name)
    except OSError as error:
        raise UserError(
            f"The result cannot be written to the temporary folder '{folder}' ({error.strerror}). Make sure that it is there and the disk is not full, and segment again."
        ) from error


def _error_event(run_id: int | None, kind: str, message: str, details: str = "") -> dict:
    """The event of an error; it belongs to no run where the id is None."""
    return {"event": "error", "id": run_id, "kind": kind, "message": message, "details": details}


def _one_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
