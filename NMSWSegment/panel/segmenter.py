"""A segmentation from the click to the node, in the worker process, while the application stays alive.

The input crosses as a file in the worker's temporary folder, the coarse result is laid over the slice views, and the output is
touched only when everything is there: a run that is cancelled or fails leaves what the user had. The result then enters the scene
in short steps, so that Slicer stays responsive.
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
import qt
import slicer
import vtk

from NMSWSegment.files.bundle import Bundle, load_bundle
from NMSWSegment.files.label_content import LabelContent
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.application import _
from NMSWSegment.panel.nodes import node_to_world_matrix, volume_from_node, volume_key
from NMSWSegment.panel.overlays import hide_previous_result, remove_traces_of_run, show_coarse_result
from NMSWSegment.panel.result import is_as_made, result_steps, segments_state
from NMSWSegment.panel.stepped_task import SteppedTask
from NMSWSegment.panel.worker_client import Worker
from NMSWSegment.protocol import SegmentOptions, UserError

ENDINGS = ("done", "cancelled", "error", "died")
"""Events of the worker after which a run is over."""

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
    keep_visibility: bool
    """Of the segments that a user has hidden."""
    scene: "slicer.vtkMRMLScene"
    observation: int = 0
    finishing: SteppedTask | None = None
    """The result on its way into the scene."""


class Segmenter:
    """Starts runs, and turns the events of the worker into nodes before it passes them on.

    At the end of a run exactly one of the events done, cancelled, error, died and stopped comes. "done" carries the node,
    segmentation, and seconds; "stopped" says in its message that a node of the run was deleted.
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
            coarse_first: show the coarse result as soon as it is there, and all segments at the end; without it, segments that are hidden stay hidden.

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
        volume_info = {"key": volume_key(volume_node), "name": volume.name, "ijk_to_ras": volume.ijk_to_ras.tolist()}
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
            request=request, ijk_to_ras=volume.ijk_to_ras, folder=folder, started=time.perf_counter(), keep_visibility=not coarse_first,
            scene=volume_node.GetScene(),
        )  # fmt: skip
        self._observe_scene(self._active)
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

    def measure(self, *, bundle: str, device: str, threads: int | None, runtime: str) -> None:
        """Warm the nets up and ask how fast they are; the event "rate" follows."""
        self._worker.send({"request": "measure", "bundle": bundle, "device": device, "threads": threads, "runtime": runtime})

    def close(self) -> None:
        """End the worker; nothing of it stays. A result that has arrived still enters the scene; else no event follows."""
        self._finish_now()
        self._worker.stop()
        self._end_run()

    def is_untouched(self, segmentation_node: "slicer.vtkMRMLSegmentationNode") -> bool:
        """Whether a segmentation is empty or exactly as a run left it, in this session or before the scene was saved, so that replacing it loses nothing."""
        state = segments_state(segmentation_node)
        return not state or self._own_states.get(segmentation_node.GetID()) == state or is_as_made(segmentation_node)

    def is_edited(self, segmentation_node: "slicer.vtkMRMLSegmentationNode") -> bool:
        """Whether a result of this session was edited since; of another session's it is not known."""
        made = self._own_states.get(segmentation_node.GetID())
        return made is not None and made != segments_state(segmentation_node)

    def _send(self, volume: Volume, *, is_sent: bool) -> None:
        """Send the request of the run, with the voxels unless the worker has them."""
        active = self._active
        if is_sent:
            try:
                np.save(active.folder / "volume.npy", volume.array)
            except OSError as error:
                raise UserError(
                    _(
                        "The volume could not be written to the temporary folder '{folder}' ({reason}). Free some space there, or choose another folder in "
                        "Edit > Application Settings > Modules > Temporary directory."
                    ).format(folder=active.folder.parent.parent, reason=error.strerror)
                ) from error
        self._worker.send(active.request | {"send": is_sent})

    def _handle(self, event: dict) -> None:
        """Bring what an event carries into the scene, then pass it on."""
        active = self._active
        kind = event["event"]
        if event.get("id") is not None and (active is None or event["id"] != active.run_id):
            return  # of a run that was given up
        if kind == "died":
            self._finish_now()  # the result was here before the worker went
            active = self._active
        try:
            if kind == "unknown_volume":
                self._send(volume_from_node(active.volume_node), is_sent=True)
                return
            if kind == "coarse":
                self._show_coarse(event)
            if kind == "done":
                self._start_finishing(event)
                return
        except Exception as error:  # the boundary between Qt's event loop and us
            event = _error_event(active, error)
        if event["event"] in ENDINGS and kind not in ENDINGS:
            self._worker.cancel()
        self._pass_on(event)

    def _pass_on(self, event: dict) -> None:
        """End the run where the event ends it, then pass the event on."""
        active = self._active
        if active is not None and event["event"] in ENDINGS and (event["id"] == active.run_id or event["event"] == "died"):
            self._end_run()
        self._on_event(event)

    def _show_coarse(self, event: dict) -> None:
        """The coarse result over the slice views; the previous result is hidden meanwhile."""
        active = self._active
        importance = event["importance"]
        ijk_to_node = np.linalg.inv(node_to_world_matrix(active.volume_node)) @ np.array(importance["ijk_to_ras"])  # world -> node
        self._importance = active.volume_node.GetID(), Volume(array=np.load(active.folder / importance["file"]), ijk_to_ras=ijk_to_node)
        labelmap = Volume(array=np.load(active.folder / event["labelmap"]), ijk_to_ras=active.ijk_to_ras)
        show_coarse_result(labelmap, labels=active.bundle.manifest.labels, reference_node=active.volume_node)
        if active.segmentation_node is not None:
            hide_previous_result(active.segmentation_node)

    def _start_finishing(self, event: dict) -> None:
        """Bring the result into the scene, step by step; the event "done" comes after the last one."""
        active = self._active
        labelmap = Volume(array=np.load(active.folder / event["labelmap"]), ijk_to_ras=active.ijk_to_ras)

        def on_new_node(node) -> None:
            active.segmentation_node = node

        def steps():
            remove_traces_of_run(active.scene)
            yield
            return (
                yield from result_steps(
                    labelmap, event["run_info"], LabelContent(**event["content"]), labels=active.bundle.manifest.labels, statistics=event["statistics"],
                    volume_node=active.volume_node, key=active.request["volume"]["key"], segmentation_node=active.segmentation_node,
                    output_name=active.output_name, started=active.started,
                    keep_visibility=active.keep_visibility, on_new_node=on_new_node,
                )
            )  # fmt: skip

        def on_done(value) -> None:
            node, seconds = value
            self._own_states[node.GetID()] = segments_state(node)
            self._pass_on(event | {"segmentation": node, "seconds": seconds})

        active.finishing = SteppedTask(steps(), on_done=on_done, on_error=lambda error: self._pass_on(_error_event(active, error)))

    def _finish_now(self) -> None:
        """Bring the rest of a result that has arrived into the scene at once."""
        if self._active is not None and self._active.finishing is not None:
            self._active.finishing.finish()

    def _observe_scene(self, active: _ActiveRun) -> None:
        """Stop the run when one of its nodes is deleted."""

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def on_node_removed(caller, event, node) -> None:
            if node is active.volume_node or (node is not None and node is active.segmentation_node):
                self._stop_without(node, active)

        active.observation = active.scene.AddObserver(active.scene.NodeAboutToBeRemovedEvent, on_node_removed)

    def _stop_without(self, node: "slicer.vtkMRMLNode", active: _ActiveRun) -> None:
        """Stop the run because a node of it is about to be deleted."""
        if node is active.volume_node and active.finishing is not None:
            self._finish_now()  # all that is missing is some steps, and the volume is still there
        if self._active is not active:
            return
        if node is active.volume_node:
            message = _("The input volume was deleted, so the run was stopped.")
        else:
            message = _("The output segmentation was deleted, so the run was stopped.")
        self._worker.cancel()
        self._end_run()
        event = {"event": "stopped", "id": active.run_id, "message": message}
        qt.QTimer.singleShot(0, lambda: self._on_event(event))  # once the node is gone

    def _end_run(self) -> None:
        """Drop what only the run needed."""
        active, self._active = self._active, None
        if active is None:
            return
        if active.finishing is not None:
            active.finishing.stop()
        active.scene.RemoveObserver(active.observation)
        remove_traces_of_run(active.scene)
        shutil.rmtree(active.folder, ignore_errors=True)


def _error_event(active: _ActiveRun | None, error: Exception) -> dict:
    """The event of an exception, while it is handled."""
    run_id = active.run_id if active is not None else None
    if isinstance(error, UserError):
        return {"event": "error", "id": run_id, "kind": "user", "message": str(error), "details": ""}
    _logger.error("a result or an event could not be handled", exc_info=error)
    details = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return {"event": "error", "id": run_id, "kind": "bug", "message": str(error), "details": details}
