"""A segmentation from the click to the node, in the worker process, while the application stays alive.

The input crosses as a file in the worker's temporary folder, the coarse result appears in a node of its own, and the
output is touched only when everything is there: a run that is cancelled or fails leaves what the user had.
"""

import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import slicer

from NMSWSegment.files.bundle import Bundle, load_bundle
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.nodes import node_to_world_matrix, volume_from_node
from NMSWSegment.panel.overlays import remove_coarse_result, remove_node, show_coarse_result
from NMSWSegment.panel.result import apply_result, new_segmentation_node, segments_state
from NMSWSegment.panel.worker_client import Worker
from NMSWSegment.protocol import SegmentOptions, UserError

ENDINGS = ("done", "cancelled", "error", "died")
"""Events after which a run is over."""

_logger = logging.getLogger(__name__)


@dataclass
class _ActiveRun:
    """The run that is going on."""

    run_id: int
    volume_node: "slicer.vtkMRMLScalarVolumeNode"
    segmentation_node: "slicer.vtkMRMLSegmentationNode | None"
    output_name: str
    bundle: Bundle
    request: dict
    ijk_to_ras: np.ndarray
    folder: Path
    started: float
    coarse_node: "slicer.vtkMRMLSegmentationNode | None" = None
    hidden_node: "slicer.vtkMRMLSegmentationNode | None" = None
    """The previous result, hidden while the coarse one is shown."""


class Segmenter:
    """Starts runs, and turns the events of the worker into nodes before it passes them on.

    At the end of a run exactly one of the events done, cancelled, error and died comes. "done" carries the node,
    segmentation, and seconds.
    """

    def __init__(self, *, on_event: Callable[[dict], None], on_log: Callable[[str], None]) -> None:
        """Args: on_event: takes every event of the worker; on_log: takes every line of its log."""
        self._on_event = on_event
        self._worker = Worker(on_event=self._handle, on_log=on_log)
        self._active: _ActiveRun | None = None
        self._run_count = 0
        self._own_states: dict[str, tuple] = {}
        self._importance: tuple[str, Volume] | None = None

    @property
    def is_running(self) -> bool:
        """Whether a run is going on."""
        return self._active is not None

    @property
    def worker(self) -> Worker:
        """The process beside the application."""
        return self._worker

    def importance_of(self, volume_node: "slicer.vtkMRMLScalarVolumeNode") -> Volume | None:
        """Importance map of the last run, 0 to 1 on coarse voxels, in the coordinates of the node; None if that was another volume."""
        return self._importance[1] if self._importance and self._importance[0] == volume_node.GetID() else None

    def start(
        self,
        volume_node: "slicer.vtkMRMLScalarVolumeNode",
        segmentation_node: "slicer.vtkMRMLSegmentationNode | None",
        options: SegmentOptions,
        *,
        output_name: str,
        coarse_first: bool = True,
    ) -> int:
        """Start a run and return its id.

        Args:
            segmentation_node: its content is replaced at the end; None makes a new one then.
            output_name: name of the new one.
            coarse_first: show the coarse result as soon as it is there.

        Raises:
            UserError: the volume, the bundle or the temporary folder will not do; nothing was started.
            ValueError: a run is going on.
        """
        if self.is_running:
            raise ValueError("a run is going on")
        volume = volume_from_node(volume_node)
        bundle = load_bundle(options.bundle)
        self._worker.start()
        self._run_count += 1
        folder = Path(tempfile.mkdtemp(dir=self._worker.folder))
        volume_info = {"key": _volume_key(volume_node, volume), "name": volume.name, "ijk_to_ras": volume.ijk_to_ras.tolist()}
        request = {
            "request": "segment",
            "id": self._run_count,
            "folder": str(folder),
            "volume": volume_info,
            "options": options.to_dict(),
            "coarse_first": coarse_first,
        }
        self._active = _ActiveRun(
            run_id=self._run_count, volume_node=volume_node, segmentation_node=segmentation_node, output_name=output_name, bundle=bundle,
            request=request, ijk_to_ras=volume.ijk_to_ras, folder=folder, started=time.perf_counter(),
        )  # fmt: skip
        try:
            self._send(volume, is_sent=self._worker.holds != volume_info["key"])
        except UserError:
            self._end_run()
            raise
        return self._run_count

    def cancel(self) -> None:
        """Stop the run; the event "cancelled" follows within a second."""
        self._worker.cancel()

    def abandon(self) -> None:
        """Forget the run and the volume without another event: the scene goes away."""
        if self._active is not None:
            self._worker.cancel()
            self._end_run()
        if self._worker.is_alive:
            self._worker.send({"request": "forget"})
            self._worker.holds = None
        self._importance = None
        self._own_states.clear()

    def measure(self, *, bundle: str, device: str, threads: int | None) -> None:
        """Warm the nets up and ask how fast they are; the event "rate" follows."""
        self._worker.send({"request": "measure", "bundle": bundle, "device": device, "threads": threads})

    def close(self) -> None:
        """End the worker; nothing of it stays, no event follows."""
        self._worker.stop()
        self._end_run()

    def is_untouched(self, segmentation_node: "slicer.vtkMRMLSegmentationNode") -> bool:
        """Whether a segmentation is empty or exactly as a run of this session left it, so that replacing it loses nothing."""
        state = segments_state(segmentation_node)
        return not state or self._own_states.get(segmentation_node.GetID()) == state

    def _send(self, volume: Volume, *, is_sent: bool) -> None:
        """Send the request of the run, with the voxels unless the worker has them."""
        active = self._active
        if is_sent:
            try:
                np.save(active.folder / "volume.npy", volume.array)
            except OSError as error:
                raise UserError(
                    f"The volume could not be written to the temporary folder '{active.folder.parent.parent}' ({error.strerror}). Free some space there, or choose "
                    "another folder in Edit > Application Settings > Modules > Temporary directory."
                ) from error
        self._worker.send(active.request | {"send": is_sent})

    def _handle(self, event: dict) -> None:
        """Bring what an event carries into the scene, then pass it on."""
        active = self._active
        kind = event["event"]
        if event.get("id") is not None and (active is None or event["id"] != active.run_id):
            return  # of a run that was given up
        try:
            if kind == "unknown_volume":
                self._send(volume_from_node(active.volume_node), is_sent=True)
                return
            if kind == "coarse":
                self._show_coarse(event)
            if kind == "done":
                event = event | self._finish(event)
        except UserError as error:
            event = {"event": "error", "id": active.run_id, "kind": "user", "message": str(error), "details": ""}
        except Exception as error:  # the boundary between Qt's event loop and us
            _logger.exception("event %s", kind)
            event = {"event": "error", "id": active.run_id, "kind": "bug", "message": str(error), "details": traceback.format_exc()}
        if active is not None and event["event"] in ENDINGS and (event["id"] == active.run_id or event["event"] == "died"):
            if kind not in ENDINGS:
                self._worker.cancel()
            self._end_run()
        self._on_event(event)

    def _show_coarse(self, event: dict) -> None:
        """The coarse result in a node of its own; the previous result is hidden meanwhile."""
        active = self._active
        if active.volume_node.GetScene() is None:
            return
        importance = event["importance"]
        ijk_to_node = np.linalg.inv(node_to_world_matrix(active.volume_node)) @ np.array(importance["ijk_to_ras"])  # world -> node
        self._importance = active.volume_node.GetID(), Volume(array=np.load(active.folder / importance["file"]), ijk_to_ras=ijk_to_node)
        labelmap = Volume(array=np.load(active.folder / event["labelmap"]), ijk_to_ras=active.ijk_to_ras)
        active.coarse_node = show_coarse_result(labelmap, labels=active.bundle.manifest.labels, reference_node=active.volume_node)
        if active.segmentation_node is not None and active.segmentation_node.GetDisplayVisibility():
            active.segmentation_node.SetDisplayVisibility(False)
            active.hidden_node = active.segmentation_node

    def _finish(self, event: dict) -> dict:
        """The result in its node; what the event says besides."""
        active = self._active
        labelmap = Volume(array=np.load(active.folder / event["labelmap"]), ijk_to_ras=active.ijk_to_ras)
        created = None
        if active.segmentation_node is None and active.volume_node.GetScene() is not None:
            created = active.segmentation_node = new_segmentation_node(active.volume_node, name=active.output_name)
        try:
            seconds = apply_result(
                labelmap, event["run_info"], labels=active.bundle.manifest.labels, statistics=event["statistics"], volume_node=active.volume_node,
                segmentation_node=active.segmentation_node, started=active.started,
            )  # fmt: skip
        except BaseException:
            if created is not None:
                remove_node(created)
            raise
        self._own_states[active.segmentation_node.GetID()] = segments_state(active.segmentation_node)
        return {"segmentation": active.segmentation_node, "seconds": seconds}

    def _end_run(self) -> None:
        """Drop what only the run needed."""
        active, self._active = self._active, None
        if active is None:
            return
        if active.coarse_node is not None and active.coarse_node.GetScene() is not None:
            remove_coarse_result(active.coarse_node)
        if active.hidden_node is not None and active.hidden_node.GetScene() is not None:
            active.hidden_node.SetDisplayVisibility(True)
        shutil.rmtree(active.folder, ignore_errors=True)


def _volume_key(node: "slicer.vtkMRMLScalarVolumeNode", volume: Volume) -> str:
    """Names these voxels in this place: VTK's modification counter is unique in a session."""
    image = node.GetImageData()
    stamp = max(image.GetMTime(), image.GetPointData().GetScalars().GetMTime())
    return f"{node.GetID()} {stamp} {volume.ijk_to_ras.tobytes().hex()}"
