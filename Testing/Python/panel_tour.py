"""A tour through the panel: drives it by clicks, takes its pictures for the docs, and prints what a person waits for.

    python Testing/Python/panel_tour.py [PICTURE_FOLDER]

Outside the application, with the stand-ins for its widgets; the worker process, the model and the sample volume are the real ones.
"""

import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["NMSW_BUNDLES"] = tempfile.mkdtemp()  # the packaged models alone

import slicer  # noqa: E402
from PySide6.QtCore import QTimer  # noqa: E402
from standins.application import Application  # noqa: E402

PICTURE_WIDTH = 500
HEARTBEAT_MS = 5
TIMEOUT_S = 120


def main(folder: Path) -> None:
    """Walk through the panel once."""
    folder.mkdir(parents=True, exist_ok=True)
    with Application() as app:
        app.load_module(ROOT / "NMSWSegment.py")
        app.startup_completed()
        gaps = Gaps()
        opened = time.perf_counter()
        widget = app.open_panel("NMSWSegment")
        tell("panel opened", time.perf_counter() - opened)
        app.save_picture(widget, folder / "panel-before.png", width=PICTURE_WIDTH)
        app.wait_until(lambda: widget._rate() is not None, TIMEOUT_S)
        tell("worker warm, devices and speed known", time.perf_counter() - opened)
        widget.ui.sampleButton.click()
        node = widget.logic.getParameterNode()
        node.device = "cpu"
        print(f"sample volume: {widget.ui.workLabel.text}")
        first_run(app, widget, folder, gaps)
        app.save_picture(widget, folder / "panel-after.png", width=PICTURE_WIDTH)
        gaps.longest_s()
        for num_patches in (10, 5, 20):
            change_k(app, widget, num_patches)
        tell("  longest stand-still of the event loop, CPU time", gaps.longest_s())
        show_3d(app, widget, gaps)
        cancel(app, widget)
        kill(app, widget)
        print(f"torch in the worker: {widget.ui.logTextEdit.plainText.splitlines()[0]}")
    print(f"{platform.platform()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")


class Gaps:
    """Notices how long the event loop stands still, by a timer that should ring every few milliseconds.

    In CPU seconds of this thread, which other programs on the computer do not lengthen.
    """

    def __init__(self) -> None:
        self._last, self._longest = time.thread_time(), 0.0
        self._timer = QTimer()
        self._timer.timeout.connect(self._ring)
        self._timer.start(HEARTBEAT_MS)

    def longest_s(self) -> float:
        """The longest gap since the last call."""
        longest, self._longest, self._last = self._longest, 0.0, time.thread_time()
        return longest

    def _ring(self) -> None:
        now = time.thread_time()
        self._longest, self._last = max(self._longest, now - self._last), now


def show_3d(app: Application, widget, gaps: Gaps) -> None:
    """Closed surfaces of all structures."""
    clicked = time.perf_counter()
    widget.ui.show3DCheckBox.click()
    app.wait_until(lambda: has_surfaces(widget), TIMEOUT_S)
    tell("click on 3D -> surfaces", time.perf_counter() - clicked)
    tell("  longest stand-still of the event loop, CPU time", gaps.longest_s())
    change_k(app, widget, 10)
    tell("  longest stand-still of the event loop, CPU time", gaps.longest_s())
    widget.ui.show3DCheckBox.click()


def has_surfaces(widget) -> bool:
    """Whether the result is in the 3D views."""
    return widget.logic.getParameterNode().outputSegmentation.GetSegmentation().ContainsRepresentation("Closed surface")


def first_run(app: Application, widget, folder: Path, gaps: Gaps) -> None:
    """Five patches from the click on; a picture while it runs."""
    widget.logic.getParameterNode().numPatches = 5
    gaps.longest_s()
    clicked = time.perf_counter()
    widget.ui.segmentButton.click()
    app.wait_until(lambda: slicer.mrmlScene.GetFirstNodeByName("NMSW coarse result"), TIMEOUT_S)
    tell("click -> coarse result", time.perf_counter() - clicked)
    tell("  longest stand-still of the event loop, CPU time", gaps.longest_s())
    app.save_picture(widget, folder / "panel-during.png", width=PICTURE_WIDTH)
    gaps.longest_s()  # the picture took its time
    wait_for_run(app, widget)
    tell("click -> final result, k = 5", time.perf_counter() - clicked)
    tell("  longest stand-still of the event loop, CPU time", gaps.longest_s())


def change_k(app: Application, widget, num_patches: int) -> None:
    """Move the slider and wait until the result has followed."""
    segmentation = widget.logic.getParameterNode().outputSegmentation
    before = segmentation.GetAttribute("NMSW.NumPatches")
    moved = time.perf_counter()
    widget.ui.numPatchesSlider.value = num_patches
    app.wait_until(lambda: segmentation.GetAttribute("NMSW.NumPatches") == str(num_patches), TIMEOUT_S)
    tell(f"slider k = {before} -> {num_patches}, {segmentation.GetAttribute('NMSW.PatchesReused')} patches reused", time.perf_counter() - moved)
    wait_for_run(app, widget)


def cancel(app: Application, widget) -> None:
    """Cancel in the middle of all patches."""
    start_all(app, widget)
    clicked = time.perf_counter()
    widget.ui.segmentButton.click()
    wait_for_run(app, widget)
    tell("click on Cancel -> answer", time.perf_counter() - clicked)
    print(f"  status: {widget.ui.statusLabel.text}")


def kill(app: Application, widget) -> None:
    """Kill the worker in the middle of a run, then run again."""
    start_all(app, widget)
    os.kill(widget.segmenter.worker.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    killed = time.perf_counter()
    wait_for_run(app, widget)
    tell("kill of the worker -> message", time.perf_counter() - killed)
    print(f"  message: {app.dialogs[-1].text.splitlines()[0]}")
    widget.logic.getParameterNode().numPatches = 5
    clicked = time.perf_counter()
    widget.ui.segmentButton.click()
    wait_for_run(app, widget)
    tell("next run with a new worker, k = 5", time.perf_counter() - clicked)


def start_all(app: Application, widget) -> None:
    """Start a run of all patches of another structure choice, and wait for its first patch."""
    node = widget.logic.getParameterNode()
    node.liveUpdate = False
    node.numPatches = widget.ui.numPatchesSlider.maximum
    widget.ui.segmentButton.click()
    app.wait_until(lambda: widget.ui.statusLabel.text.startswith("Patch "), TIMEOUT_S)


def wait_for_run(app: Application, widget) -> None:
    """Let the application go on until the run is over."""
    app.wait_until(lambda: not widget.segmenter.is_running, TIMEOUT_S)
    app.process_events()


def tell(what: str, seconds: float) -> None:
    """One measured time."""
    print(f"{what}: {seconds:.2f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
