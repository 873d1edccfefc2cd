"""3D Slicer module: segment a CT volume with a few full-resolution patches ("No More Sliding Window")."""

# This file and the folder NMSWSegment/ share a name, and Slicer executes the file as a plain module. With a search path
# of its own it is also the package, so that "from NMSWSegment.engine.segment import ..." works below and in scripts.
__path__ = [__file__.rpartition("NMSWSegment.py")[0] + "NMSWSegment"]
__version__ = "0.1.0"  # as in NMSWSegment/__init__.py, which Slicer never runs

import dataclasses
import importlib.util
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import slicer
import vtk
from slicer import vtkMRMLMarkupsROINode, vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode, vtkMRMLTableNode
from slicer.util import VTKObservationMixin

from NMSWSegment.files.bundle import (
    file_sha256,
    load_bundle,
)
from NMSWSegment.files.rates import Rate, Rates, rate_device
from NMSWSegment.files.resources import SAMPLE_NAME, SAMPLE_PATH, resources_folder
from NMSWSegment.panel import checks
from NMSWSegment.panel.application import (
    Choice,
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleWidget,
    WithinRange,
    _,
    details_argument,
    parameterNodeWrapper,
    translate,
)
from NMSWSegment.panel.messages import (
    batch_done_message,
    batch_failures_message,
    batch_progress_message,
    batch_question,
    check_message,
    died_message,
    done_message,
    estimate_message,
    exported_question,
    model_tooltip,
    no_structure_message,
    progress_message,
    structures_title,
)
from NMSWSegment.panel.packages import ensure_highdicom, ensure_openvino, ensure_torch
from NMSWSegment.panel.run_state import Run
from NMSWSegment.panel.self_test import NMSWSegmentTest
from NMSWSegment.protocol import AUTO, EXACT, OnProgress, SegmentOptions, UserError, ignore_progress

if hasattr(slicer, "app"):
    import qt

if TYPE_CHECKING:
    from NMSWSegment.engine.segment import SegmentResult
    from NMSWSegment.panel.volume_batch import BatchVolume

__all__ = ["NMSWSegment", "NMSWSegmentLogic", "NMSWSegmentTest", "NMSWSegmentWidget"]

MAX_PATCHES = 1000
MAX_ISLAND_ML = 100
LIVE_UPDATE_MS = 250
"""How long the slider has to rest before the result follows it."""
IDLE_MS = 10 * 60 * 1000
"""A worker that was not used for so long gives its memory back."""
RATES_KEY = "NMSWSegment/Rates"
TUTORIAL_URL = "https://github.com/NMSWSegment/SlicerNMSWSegment/blob/main/docs/tutorial.md"


class NMSWSegment(ScriptedLoadableModule):
    """What the application shows about the module."""

    def __init__(self, parent) -> None:
        super().__init__(parent)
        parent.title = _("NMSW Segment")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = []
        parent.contributors = ["NMSWSegment contributors"]
        parent.helpText = _(
            "<p>Segments a CT volume on an ordinary computer: a coarse network segments the whole volume and selects the patches where "
            "full resolution matters most; only those go through the full-resolution network.</p>"
            "<p>Choose an input volume and the number of patches, then click Segment. The outlines show which patches were run.</p>"
            '<p>See the <a href="{url}">tutorial</a> for more information. Not for clinical use.</p>'
        ).format(url=TUTORIAL_URL)
        parent.acknowledgementText = _(
            'The method is described in "No More Sliding Window: Efficient 3D Medical Image Segmentation with Differentiable Top-k '
            'Patch Sampling", MICCAI 2025, <a href="https://arxiv.org/abs/2501.10814">arXiv:2501.10814</a>; the backbone E2ENet in <a href="https://arxiv.org/abs/2312.04727">arXiv:2312.04727</a>.'
        )
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData() -> None:
    """Offer the packaged CT volume in the Sample Data module; it is copied from the extension, not downloaded."""
    import SampleData

    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="NMSWSegment",
        sampleName=SAMPLE_NAME,
        thumbnailFileName=str(resources_folder() / "Icons" / f"{SAMPLE_NAME}.png"),
        uris=SAMPLE_PATH.as_uri(),
        fileNames=SAMPLE_PATH.name,
        nodeNames=SAMPLE_NAME,
        # Sample Data reuses a file of the same name in its cache; the hash replaces one of an older version.
        checksums="SHA256:" + file_sha256(SAMPLE_PATH),
    )


@parameterNodeWrapper
class NMSWSegmentParameterNode:
    """What the scene remembers of the panel."""

    inputVolume: vtkMRMLScalarVolumeNode
    regionOfInterest: vtkMRMLMarkupsROINode
    outputSegmentation: vtkMRMLSegmentationNode
    model: str = SegmentOptions.bundle
    omittedStructures: list[str]
    numPatches: Annotated[float, WithinRange(0, MAX_PATCHES)] = 10
    autoPatches: bool = False
    liveUpdate: bool = True
    device: str = SegmentOptions.device
    runtime: str = SegmentOptions.runtime
    policy: Annotated[str, Choice(["greedy", "top_k"])] = "greedy"
    threads: Annotated[int, WithinRange(0, 256)] = 0
    minIslandMl: Annotated[float, WithinRange(0, MAX_ISLAND_ML)] = 0
    showPatches: bool = True
    showImportance: bool = False
    show3D: bool = False


class NMSWSegmentWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: it shows what panel/checks.py decides and what the Segmenter reports."""

    def __init__(self, parent=None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._parameterNode = None
        self._guiTag = None
        self.segmenter = None
        self._models = None
        self._timers = ()
        self._run = Run()
        self._choicesOfRun = ()
        self._workerComplaint = ""
        self._lastRunInfo = None
        self._status = ""
        self._availableBytes = None
        self._observedNodes = {}
        self._isCancelledByUser = False
        self._batch = None
        self._surfacesTask = None
        self._shownIn3D = set()

    # Life of the panel

    def setup(self) -> None:
        """Build the panel when the module is opened for the first time."""
        ScriptedLoadableModuleWidget.setup(self)
        from NMSWSegment.panel.model_section import ModelSection, setting
        from NMSWSegment.panel.segmenter import Segmenter

        uiWidget = slicer.util.loadUI(self.resourcePath("UI/NMSWSegment.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = NMSWSegmentLogic()
        self.segmenter = Segmenter(on_event=self.onWorkerEvent, on_log=self._log)
        self._rates = Rates.from_json(setting(RATES_KEY))
        self._liveTimer = _timer(LIVE_UPDATE_MS, self._updateLive)
        self._idleTimer = _timer(IDLE_MS, self._stopIdleWorker)
        self._timers = (self._liveTimer, self._idleTimer)
        self._models = ModelSection(self.ui, on_chosen=self.onModelOrDeviceChosen, on_log=self._log, close_worker=self.segmenter.close)
        self._connectWidgets()
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self.onSceneEndImport)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.NodeAboutToBeRemovedEvent, self.onNodeAboutToBeRemoved)
        self.initializeParameterNode()
        if self.parent.isEntered:  # reloaded: no enter() follows
            self._startWorker()

    def cleanup(self) -> None:
        """End the worker and let go of the scene when the application closes or the module is reloaded."""
        self._batch = None
        if self.segmenter:
            self.segmenter.close()
        self._stopSurfaces()
        for timer in self._timers:
            timer.stop()
        if self._models:
            self._models.close()
        self._setParameterNode(None)
        self.removeObservers()

    def enter(self) -> None:
        """Take up the scene's parameter node each time the module is opened, and warm the worker up."""
        self.initializeParameterNode()
        self._startWorker()

    def exit(self) -> None:
        """Let go of the parameter node when another module is opened; a run goes on."""
        self._setParameterNode(None)

    def onReload(self) -> None:
        """Drop the library too, so that a reload reads all of its files again."""
        for name in [name for name in sys.modules if name.startswith("NMSWSegment.")]:
            del sys.modules[name]
        super().onReload()

    def onSceneStartClose(self, caller=None, event=None) -> None:
        """Give up a run whose nodes go away, and let go of the parameter node."""
        self._liveTimer.stop()
        self._stopSurfaces()
        self._shownIn3D.clear()
        self._batch = None
        self.segmenter.abandon()
        self._run = Run()
        self._setParameterNode(None)
        self._showRunState("")

    def onSceneEndClose(self, caller=None, event=None) -> None:
        """Start again in the empty scene while the panel is open."""
        if self.parent.isEntered:
            self.initializeParameterNode()

    def onSceneEndImport(self, caller=None, event=None) -> None:
        """Show the settings of a scene that was loaded, and remove what a run left in one that was saved meanwhile."""
        from NMSWSegment.panel.overlays import remove_traces_of_run

        if not self.segmenter.is_running:
            remove_traces_of_run(slicer.mrmlScene)
        if self.parent.isEntered:
            self.initializeParameterNode()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeAboutToBeRemoved(self, caller, event, node) -> None:
        """Remove what is drawn over a volume together with it; the list of input volumes would go on to the importance map."""
        from NMSWSegment.panel.overlays import remove_overlays_of

        if not slicer.mrmlScene.IsClosing():
            remove_overlays_of(node)

    def initializeParameterNode(self) -> None:
        """Bind the panel to the scene's parameter node; the first volume is the first choice."""
        self._setParameterNode(self.logic.getParameterNode())
        if not self._parameterNode.inputVolume:
            from NMSWSegment.panel.volume_batch import volumes_of_scene

            volumes = volumes_of_scene(slicer.mrmlScene)
            if volumes:
                self._parameterNode.inputVolume = slicer.mrmlScene.GetNodeByID(volumes[0].node_id)

    def _setParameterNode(self, parameterNode: NMSWSegmentParameterNode | None) -> None:
        """Bind the panel to a parameter node, or to none."""
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._guiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameterNodeModified)
        self._parameterNode = parameterNode
        if self._models:
            self._models.parameter_node = parameterNode
        self._observeChosenNodes()
        if parameterNode:
            # connectGui() returns no tag in some versions, so that it cannot be undone; this does.
            bound = {widget.property("SlicerParameterName"): widget for widget in vars(self.ui).values() if widget.property("SlicerParameterName")}
            self._guiTag = parameterNode.connectParametersToGui(bound)
            self.addObserver(parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameterNodeModified)
            self.onParameterNodeModified()

    def _observeChosenNodes(self) -> None:
        """Follow the volume and the region of interest while a user moves or changes them."""
        node = self._parameterNode
        chosen = list(filter(None, (node.inputVolume, node.regionOfInterest))) if node else []
        if chosen == list(self._observedNodes):
            return
        for observed, tags in self._observedNodes.items():
            for tag in tags:
                observed.RemoveObserver(tag)
        events = (vtk.vtkCommand.ModifiedEvent, slicer.vtkMRMLTransformableNode.TransformModifiedEvent)
        # Not by addObserver(): VTKObservationMixin keeps all nodes that it ever observed, and with them their voxels.
        self._observedNodes = {observed: [observed.AddObserver(event, self.onChosenNodeModified) for event in events] for observed in chosen}

    def onChosenNodeModified(self, caller=None, event=None) -> None:
        """Show what the change means for the run."""
        self._updatePanel()

    def _connectWidgets(self) -> None:
        """What happens on a click; the widgets with a SlicerParameterName are bound by the parameter node."""
        ui = self.ui
        ui.segmentButton.connect("clicked(bool)", self.onSegmentButton)
        ui.sampleButton.connect("clicked(bool)", self.onSampleButton)
        ui.showPatchesCheckBox.connect("clicked(bool)", self._showOverlays)
        ui.showImportanceCheckBox.connect("clicked(bool)", self._showOverlays)
        ui.show3DCheckBox.connect("clicked(bool)", self.onShow3D)
        ui.segmentAllButton.connect("clicked(bool)", self.onSegmentAllButton)
        ui.installOpenvinoButton.connect("clicked(bool)", self.onInstallOpenvinoButton)
        ui.exportDicomButton.connect("clicked(bool)", self.onExportDicomButton)
        ui.regionOfInterestSelector.connect("nodeAddedByUser(vtkMRMLNode*)", self.onRegionOfInterestAdded)

    def onRegionOfInterestAdded(self, region: vtkMRMLMarkupsROINode) -> None:
        """A new region of interest is the whole volume, to be made smaller by its handles."""
        bounds = [0.0] * 6
        if self._parameterNode and self._parameterNode.inputVolume:
            self._parameterNode.inputVolume.GetRASBounds(bounds)
            region.SetCenterWorld([(low + high) / 2 for low, high in zip(bounds[::2], bounds[1::2])])
            region.SetSizeWorld([high - low for low, high in zip(bounds[::2], bounds[1::2])])

    def onModelOrDeviceChosen(self) -> None:
        """Show what the choice means for the run."""
        self._updatePanel()
        self._measure()

    # Running

    def onSampleButton(self, checked: bool = False) -> None:
        """Load the packaged volume, or choose it if it is in the scene already."""
        with slicer.util.tryWithErrorDisplay(_("The sample volume could not be loaded.")):
            sample = slicer.mrmlScene.GetFirstNodeByName(SAMPLE_NAME) or slicer.util.loadVolume(str(SAMPLE_PATH), {"name": SAMPLE_NAME})
            self._parameterNode.inputVolume = sample

    def onSegmentButton(self, checked: bool = False) -> None:
        """Start a run, or ask the one that is going on to stop, and with it all that were to follow."""
        if self.segmenter.is_running or self._batch is not None:
            self._isCancelledByUser = True
            if self._batch is not None:
                self._batch.cancel()
            self._cancel()
            self._showRunState(_("Cancelling..."))
            return
        with slicer.util.tryWithErrorDisplay(_("The segmentation could not be started.")):
            if ensure_torch():
                self._start(segmentation=self._outputToReplace())

    def onSegmentAllButton(self, checked: bool = False) -> None:
        """Segment the volumes of the scene one after the other, with the settings of now."""
        from NMSWSegment.panel.volume_batch import volumes_of_scene

        self._liveTimer.stop()  # a live update would start behind the question
        volumes = volumes_of_scene(slicer.mrmlScene)
        structures = self._models.structures()
        with slicer.util.tryWithErrorDisplay(_("The segmentation could not be started.")):
            if not volumes:
                slicer.util.infoDisplay(_("There is no volume in the scene. Load one or more CT volumes."))
            elif structures and not any(structures.values()):
                slicer.util.infoDisplay(no_structure_message())
            elif ensure_torch() and slicer.util.confirmYesNoDisplay(batch_question([volume.name for volume in volumes])):
                self.segmentVolumes(volumes)
        self._liveTimer.start()

    def segmentVolumes(self, volumes: "list[BatchVolume]") -> None:
        """Segment volumes one after the other, with the settings of now.

        Raises:
            UserError: another run goes on.
        """
        from NMSWSegment.panel.volume_batch import VolumeBatch

        if self.segmenter.is_running or self._batch is not None:
            raise UserError(_("A segmentation is running. Cancel it or wait until it is complete, then try again."))
        self._batch = VolumeBatch(volumes, self._options())
        self._startNextOfBatch()

    def _startNextOfBatch(self) -> None:
        """Start the next volume that can be segmented; after the last one, say what became of all."""
        from NMSWSegment.panel.volume_batch import hide_results

        batch = self._batch
        if batch is None:  # the scene was closed
            return
        node = self._parameterNode or self.logic.getParameterNode()
        while (turn := batch.next()) is not None:
            volume = slicer.mrmlScene.GetNodeByID(turn.node_id)
            if volume is None:
                batch.failed(_("It was deleted before its turn."))
                continue
            node.inputVolume, node.outputSegmentation = volume, None
            blocking = [
                check_message(check)
                for check in checks.input_checks(self._inputsOf(volume, batch.options.num_patches, batch.options.roi_to_ras))
                if check.severity is checks.Severity.ERROR
            ]
            if blocking:
                batch.failed(blocking[0])
                continue
            hide_results(slicer.mrmlScene, batch)
            slicer.util.setSliceViewerLayers(background=volume, fit=True)
            try:
                self._send(batch.options, volume=volume, segmentation=None)
                return
            except UserError as error:
                batch.failed(str(error))
        self._batch = None
        self._endRun(batch_done_message(len(batch.results), batch.total, is_cancelled=batch.is_cancelled))
        if batch.failures:
            slicer.util.warningDisplay(batch_failures_message(len(batch.results), batch.total, batch.failures))

    def _outputToReplace(self) -> vtkMRMLSegmentationNode | None:
        """The chosen output; None, for a new one, where a user wants to keep what it holds."""
        segmentation = self._parameterNode.outputSegmentation
        if segmentation is None or self.segmenter.is_untouched(segmentation):
            return segmentation
        question = _(
            "'{name}' contains segments that were edited or were not created by this module. Replace them?\n\n"
            "Yes: replace the segments. No: keep them and create a new segmentation for the result."
        ).format(name=segmentation.GetName())
        return segmentation if slicer.util.confirmYesNoDisplay(question) else None

    def _start(self, *, segmentation: vtkMRMLSegmentationNode | None, isLive: bool = False) -> None:
        """Send a run to the worker; a live one follows a change of k, and starts from the result that is there."""
        try:
            self._send(self._options(), volume=self._parameterNode.inputVolume, segmentation=segmentation, isLive=isLive)
        except UserError as error:
            slicer.util.errorDisplay(str(error))

    def _send(self, options: SegmentOptions, *, volume: vtkMRMLScalarVolumeNode, segmentation: vtkMRMLSegmentationNode | None, isLive: bool = False) -> None:
        """The same; raises UserError where nothing was started."""
        name = _("{volume} segmentation").format(volume=volume.GetName())
        runId = self.segmenter.start(volume, segmentation, options, output_name=name, coarse_first=not isLive)
        self._idleTimer.stop()
        self._stopSurfaces()
        self._isCancelledByUser = False
        self._workerComplaint = ""
        self._choicesOfRun = self._choices()
        self._run.start(runId, num_patches=options.num_patches, is_live=isLive)
        self._showRunState(_("Starting..."))

    def _updateLive(self) -> None:
        """Let the result follow the slider: run what is new, or stop a live run whose k is no longer wanted."""
        node = self._parameterNode
        if node is None or not node.liveUpdate or self._batch is not None:
            return
        if self.segmenter.is_running and self._run.is_live and self._run.num_patches != self._numPatches():
            self._cancel()
        elif node.outputSegmentation and self._run.wants_live_update(self._signature(self._choices()), self._numPatches()):
            with slicer.util.tryWithErrorDisplay(_("The segmentation could not be updated.")):
                self._start(segmentation=node.outputSegmentation, isLive=True)

    def _cancel(self) -> None:
        """Ask the run to stop."""
        self._run.request_cancel()
        self.segmenter.cancel()

    def _stopIdleWorker(self) -> None:
        """Give the memory back after a while without a run."""
        if not self.segmenter.is_running:
            self.segmenter.close()

    def _startWorker(self) -> None:
        """Start the worker where torch is there, so that devices, speed and the first run come sooner."""
        if self.segmenter.is_running or self.segmenter.worker.is_alive or importlib.util.find_spec("torch") is None:
            return
        try:
            self.segmenter.worker.start()
        except UserError as error:
            self._log(str(error))
        self._idleTimer.start()

    def onWorkerEvent(self, event: dict) -> None:
        """Show an event of the worker; the nodes are in place already."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_devices(self, event: dict) -> None:
        self._log(_("PyTorch {version} is ready.").format(version=event["torch"]))
        self._models.show_devices(event["devices"])
        self._models.show_runtimes(event["runtimes"])
        self._measure()

    def _on_rate(self, event: dict) -> None:
        self._rates.expect(event["bundle"], rate_device(event["device"], runtime=event["runtime"]), Rate(**event["rate"]))
        self._updatePanel()

    def _on_progress(self, event: dict) -> None:
        if self._run.progress(event["id"]):
            self._showProgress(event["fraction"], progress_message(event))

    def _on_coarse(self, event: dict) -> None:
        self._showOverlays()

    def _on_done(self, event: dict) -> None:
        node = self._parameterNode or self.logic.getParameterNode()
        node.outputSegmentation = event["segmentation"]
        runInfo = self._lastRunInfo = event["run_info"]
        rate = Rate.from_run_info(runInfo)
        if rate is not None:
            self._rates.learn(runInfo["bundle"]["name"], rate_device(runInfo["device"], runtime=runInfo["options"]["runtime"]), rate)
            qt.QSettings().setValue(RATES_KEY, self._rates.to_json())
        if runInfo["options"]["runtime"] != EXACT:
            self._log(runInfo["runtime_note"])
        if self._batch is not None:
            self._batch.done(event["segmentation"].GetID())
        self._run.done(event["id"], signature=self._signature(self._choicesOfRun))
        self._endRun(done_message(runInfo, device=self._models.device_title(runInfo["device"]), seconds=event["seconds"]))

    def _on_cancelled(self, event: dict) -> None:
        if self._run.cancelled(event["id"], by_user=self._isCancelledByUser):
            self._endRun(_("Cancelled. The previous result is kept."))

    def _on_error(self, event: dict) -> None:
        self._log(event["details"] or event["message"])
        if event["id"] is None:
            self._workerComplaint = event["message"]  # why it ends, if it does
        if event["id"] is None or not self._run.failed(event["id"]):
            return
        message = event["message"] if event["kind"] == "user" else _("The segmentation failed. Please report this with the details.")
        details = "" if event["kind"] == "user" else event["details"] or event["message"]
        self._failRun(_("The run failed. The previous result is kept."), message, details=details)

    def _on_stopped(self, event: dict) -> None:
        if self._run.cancelled(event["id"], by_user=False):
            if self._batch is not None:
                self._batch.failed(event["message"])
            self._endRun(event["message"])

    def _on_died(self, event: dict) -> None:
        self._log(_("The segmentation process ended: {reason}").format(reason=event["message"]))
        if self._run.worker_died():
            message = self._workerComplaint or died_message(event["message"])
            self._failRun(_("The run stopped. The previous result is kept."), message, details=event["details"])

    def _failRun(self, status: str, message: str, *, details: str) -> None:
        """Show how a run failed; of many volumes, all that failed are told at the end."""
        if self._batch is not None:
            self._batch.failed(message)
            self._endRun(status)
        else:
            self._endRun(status)
            slicer.util.errorDisplay(message, **details_argument(details))

    def _endRun(self, status: str) -> None:
        """Show how a run ended, and follow the slider if it moved meanwhile; of many volumes, go on with the next one."""
        if self._batch is not None:
            qt.QTimer.singleShot(0, self._startNextOfBatch)  # once the event that ended this run has been dealt with
            return
        self._idleTimer.start()
        self._showRunState(status)
        self._showOverlays()
        self._showSurfacesOfResult()
        self._liveTimer.start()

    def _measure(self) -> None:
        """Ask the worker how fast the chosen model is here, unless a run has shown it."""
        node = self._parameterNode
        if node and self._models.manifest and self.segmenter.worker.is_alive and not self.segmenter.is_running and self._rate() is None:
            self.segmenter.measure(bundle=node.model, device=node.device, threads=node.threads or None, runtime=node.runtime)

    # What the panel says

    def onParameterNodeModified(self, caller=None, event=None) -> None:
        """Show the settings, and let the result follow the slider."""
        node = self._parameterNode
        if node is None or self._models.is_filling:
            return
        self._observeChosenNodes()
        self._models.show_settings()
        self._updatePanel()
        self._liveTimer.start()

    def _updatePanel(self) -> None:
        """Show what the present settings mean, and whether they can be run."""
        node = self._parameterNode
        if node is None:
            return
        inputs = self._inputs()
        inputChecks = checks.input_checks(inputs)
        blocking = [check_message(check) for check in inputChecks if check.severity is checks.Severity.ERROR]
        structures = self._models.structures()
        if structures and not any(structures.values()):
            blocking.append(no_structure_message())
        advice = [check_message(check) for check in inputChecks if check.severity is checks.Severity.WARNING]
        lines = [*([] if blocking else [self._estimateMessage(inputs)]), *(f'<font color="red">{text}</font>' for text in advice)]
        self.ui.workLabel.text = "<br>".join(lines)
        self.ui.structuresSection.text = structures_title(chosen=sum(structures.values()), total=len(structures))
        self.ui.autoPatchesCheckBox.enabled = self._run.is_num_patches_enabled and node.policy == "greedy"
        self.ui.numPatchesSlider.enabled = self._run.is_num_patches_enabled and self._numPatches() != AUTO
        table = self._volumesTable()
        if self.ui.volumesTable.mrmlTableNode() is not table:  # the same again would reset selection and column widths
            self.ui.volumesTable.setMRMLTableNode(table)
        self.ui.volumesTable.visible = table is not None
        self.ui.editedLabel.visible = table is not None and self.segmenter.is_edited(node.outputSegmentation)
        self._updateExport()
        self.ui.segmentAllButton.enabled = self._run.are_settings_enabled and self._batch is None
        self.ui.segmentButton.enabled = self._run.is_button_enabled(is_blocked=bool(blocking))
        self.ui.segmentButton.toolTip = blocking[0] if blocking else _("Segment the input volume. The previous result is kept until the new one is complete.")
        if not self.segmenter.is_running:
            self.ui.statusLabel.text = blocking[0] if blocking else self._status

    def _updateExport(self) -> None:
        """Offer DICOM SEG below a result; where there can be none, the button says why."""
        from NMSWSegment.panel.dicom_export import export_obstacle, is_result

        button, segmentation = self.ui.exportDicomButton, self._parameterNode.outputSegmentation
        button.visible = is_result(segmentation)
        obstacle = export_obstacle(segmentation) if is_result(segmentation) else ""
        button.enabled = not obstacle and not self.segmenter.is_running
        button.toolTip = obstacle or _("Write the segments as a DICOM segmentation of the patient and study that the input volume was loaded from.")

    def _estimateMessage(self, inputs: checks.Inputs) -> str:
        """The line under the slider; the slider ends at the number of candidates, or at k."""
        estimate = checks.estimate_run(
            inputs.geometry,
            inputs.manifest,
            num_patches=inputs.num_patches,
            roi_to_ras=inputs.roi_to_ras,
            expected_patches=self._patchesOfLastRun(),
            available_bytes=inputs.available_bytes,
        )
        # a k that is too large for this volume runs every patch, and may suit the next volume
        self.ui.numPatchesSlider.maximum = max(1, min(estimate.candidates, MAX_PATCHES), int(self._parameterNode.numPatches))
        rate = self._rate()
        seconds = None if rate is None else checks.estimate_seconds(estimate, rate)
        self.ui.modelComboBox.toolTip = model_tooltip(self._models.manifest, seconds=seconds)
        return estimate_message(estimate, seconds=seconds)

    def _showRunState(self, status: str) -> None:
        """Turn the button into Cancel and back; the choices rest while a run goes on."""
        self._status = status
        isRunning = self.segmenter.is_running
        self.ui.progressBar.visible = isRunning
        for widget in (self.ui.volumeSection, self.ui.modelSection, self.ui.advancedSection):
            widget.enabled = self._run.are_settings_enabled or self._run.is_live
        self.ui.bundlesFolderLineEdit.enabled = self._run.are_settings_enabled  # another folder needs another worker
        self.ui.segmentButton.text = _("Cancel") if isRunning else _("Segment")
        self._showProgress(0, status)
        self._updatePanel()

    def _showProgress(self, fraction: float, text: str) -> None:
        """The bar and the line below it; of many volumes, which one it is."""
        if self._batch is not None:
            fraction, text = self._batch.fraction(fraction), batch_progress_message(self._batch.number, self._batch.total, self._batch.volume.name, text)
        self.ui.progressBar.value = round(100 * fraction)
        self.ui.statusLabel.text = text

    def _volumesTable(self) -> vtkMRMLTableNode | None:
        """The table of the chosen segmentation."""
        from NMSWSegment.panel.nodes import VOLUMES_ROLE

        segmentation = self._parameterNode.outputSegmentation
        return segmentation.GetNodeReference(VOLUMES_ROLE) if segmentation else None

    def _showOverlays(self, checked: bool = False) -> None:
        """Patches, importance map and table as the boxes say."""
        node = self._parameterNode
        if node is None or node.inputVolume is None:
            return
        from NMSWSegment.panel.nodes import volume_in_node
        from NMSWSegment.panel.overlays import hide_importance, set_patches_visible, show_importance

        set_patches_visible(slicer.mrmlScene, node.showPatches)
        hide_importance(slicer.mrmlScene)
        importance = self.segmenter.importance_of(node.inputVolume)
        if node.showImportance and importance is not None:
            try:
                show_importance(importance, parent_node=node.inputVolume, volume=volume_in_node(node.inputVolume))
            except UserError as error:  # since the run the volume was put under a non-linear transform
                node.showImportance = False
                slicer.util.errorDisplay(str(error))

    def onInstallOpenvinoButton(self, checked: bool = False) -> None:
        """Install OpenVINO if the user agrees; a new worker finds it."""
        with slicer.util.tryWithErrorDisplay(_("OpenVINO could not be installed.")):
            if ensure_openvino() and not self.segmenter.is_running:
                self.segmenter.close()
                self._startWorker()

    def onExportDicomButton(self, checked: bool = False) -> None:
        """Write the result as DICOM SEG, and offer it to the DICOM database."""
        from NMSWSegment.panel.dicom_export import add_to_database, write_dicom_seg

        segmentation = self._parameterNode.outputSegmentation
        with slicer.util.tryWithErrorDisplay(_("The DICOM segmentation could not be written.")):
            if not ensure_highdicom():
                return
            name = slicer.app.coreIOManager().forceFileNameValidCharacters(f"{segmentation.GetName()}.dcm")
            chosen = qt.QFileDialog.getSaveFileName(slicer.util.mainWindow(), _("Export DICOM SEG"), name, "DICOM (*.dcm)")
            if not chosen:
                return
            if not chosen.lower().endswith(".dcm"):
                chosen = f"{chosen}.dcm"
                if os.path.exists(chosen) and not slicer.util.confirmYesNoDisplay(
                    _("'{name}' exists already. Replace it?").format(name=os.path.basename(chosen))
                ):
                    return
            try:
                with slicer.util.WaitCursor():
                    path = write_dicom_seg(segmentation, chosen)
                if slicer.util.confirmYesNoDisplay(exported_question(str(path))):
                    add_to_database(path)
            except UserError as error:
                slicer.util.errorDisplay(str(error))

    def onShow3D(self, isShown: bool) -> None:
        """Show the result in the 3D views, or remove it from them."""
        from NMSWSegment.panel.surfaces import hide_surfaces

        self._stopSurfaces()
        node = self._parameterNode
        if isShown:
            self._showSurfacesOfResult()
        elif node.outputSegmentation:
            hide_surfaces(node.outputSegmentation)

    def _showSurfacesOfResult(self) -> None:
        """Show the result in the 3D views if the box says so; the end of a run does it for what changes meanwhile."""
        from NMSWSegment.panel.stepped_task import SteppedTask
        from NMSWSegment.panel.surfaces import has_surfaces, reveal_surfaces, show_surfaces_steps

        node = self._parameterNode or self.logic.getParameterNode()
        segmentation = node.outputSegmentation
        if not node.show3D or not segmentation or self.segmenter.is_running:
            return

        def onDone(isShown: bool) -> None:
            self._surfacesTask = None
            if isShown and segmentation.GetID() not in self._shownIn3D:
                self._shownIn3D.add(segmentation.GetID())
                resetThreeDViews()

        def onError(error: Exception) -> None:
            self._surfacesTask = None
            self._log(_("The 3D surfaces could not be created: {error}").format(error=error))

        self._stopSurfaces()
        reveal_surfaces(segmentation)
        if has_surfaces(segmentation):
            onDone(True)
        else:
            self._surfacesTask = SteppedTask(show_surfaces_steps(segmentation), on_done=onDone, on_error=onError)

    def _stopSurfaces(self) -> None:
        """Give up surfaces that are being made."""
        if self._surfacesTask is not None:
            self._surfacesTask.stop()
            self._surfacesTask = None

    def _log(self, text: str) -> None:
        """One more line of the log."""
        self.ui.logTextEdit.appendPlainText(text)

    # What is chosen

    def _numPatches(self) -> int | str:
        """k as in SegmentOptions."""
        node = self._parameterNode
        return AUTO if node.autoPatches and node.policy == "greedy" else int(node.numPatches)

    def _options(self) -> SegmentOptions:
        """What the panel says."""
        from NMSWSegment.panel.nodes import roi_to_ras

        node = self._parameterNode
        structures = self._models.structures()
        return SegmentOptions(
            bundle=node.model,
            num_patches=self._numPatches(),
            policy=node.policy,
            device=node.device,
            structures=() if all(structures.values()) else tuple(name for name, isChecked in structures.items() if isChecked),
            roi_to_ras=roi_to_ras(node.regionOfInterest) if node.regionOfInterest else None,
            threads=node.threads or None,
            runtime=node.runtime,
            min_island_ml=node.minIslandMl,
        )

    def _inputs(self) -> checks.Inputs:
        """What panel/checks.py has to know."""
        from NMSWSegment.panel.nodes import roi_to_ras

        node = self._parameterNode
        return self._inputsOf(node.inputVolume, self._numPatches(), roi_to_ras(node.regionOfInterest) if node.regionOfInterest else None)

    def _inputsOf(self, volume: vtkMRMLScalarVolumeNode | None, numPatches: int | str | None, roiToRas) -> checks.Inputs:
        """The same of any volume, with numPatches and roiToRas as in SegmentOptions."""
        from NMSWSegment.files.memory import available_memory_bytes
        from NMSWSegment.panel.nodes import volume_inputs

        if not self.segmenter.worker.is_alive:
            self._availableBytes = available_memory_bytes()  # what a worker holds is part of what it needs
        return dataclasses.replace(
            volume_inputs(volume), manifest=self._models.manifest, num_patches=numPatches, roi_to_ras=roiToRas, available_bytes=self._availableBytes
        )

    def _choices(self) -> tuple:
        """Everything but k that a result depends on."""
        from NMSWSegment.panel.nodes import volume_key

        node = self._parameterNode or self.logic.getParameterNode()
        try:
            volume = volume_key(node.inputVolume)
        except UserError:  # none, or one that cannot be segmented
            volume = None
        region = node.regionOfInterest.GetID() if node.regionOfInterest else None
        return (volume, region, node.model, tuple(node.omittedStructures), node.policy, node.device, node.threads, node.runtime, node.minIslandMl)

    def _signature(self, choices: tuple) -> tuple:
        """Choices, and the result itself: while it is the same, a live update loses nothing."""
        from NMSWSegment.panel.result import segments_state

        segmentation = (self._parameterNode or self.logic.getParameterNode()).outputSegmentation
        return (*choices, segmentation.GetID(), segments_state(segmentation)) if segmentation else choices

    def _rate(self) -> "Rate | None":
        """How fast the chosen model is on the chosen device."""
        if self._models.manifest is None:
            return None
        return self._rates.get(self._models.manifest.name, rate_device(self._models.device(), runtime=self._parameterNode.runtime))

    def _patchesOfLastRun(self) -> int | None:
        """How many patches Auto took last."""
        run_info = self._lastRunInfo
        return len(run_info["patches"]) if run_info and run_info["options"]["num_patches"] == AUTO else None


class NMSWSegmentLogic(ScriptedLoadableModuleLogic):
    """Segmentation of a volume node into a segmentation node, with or without a panel."""

    def getParameterNode(self) -> NMSWSegmentParameterNode:
        """The scene's one parameter node of this module."""
        return NMSWSegmentParameterNode(super().getParameterNode())

    def process(
        self,
        inputVolume: vtkMRMLScalarVolumeNode,
        outputSegmentation: vtkMRMLSegmentationNode,
        options: SegmentOptions | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> "SegmentResult":
        """Segment a volume node.

        Args:
            outputSegmentation: its content is replaced once the result is there; a run that stops leaves it as it was.
            options: None takes the defaults.
            on_progress: called before every stage and after every patch; may raise Cancelled.

        Returns:
            The engine's result: labelmap on the volume's grid, patches best first, JSON-ready run_info.

        Raises:
            UserError: the volume, the options or the bundle do not fit; the text says what to do.
        """
        from NMSWSegment.engine.segment import segment_volume
        from NMSWSegment.files.label_content import label_content
        from NMSWSegment.files.statistics import structure_statistics
        from NMSWSegment.panel.nodes import volume_from_node
        from NMSWSegment.panel.result import result_steps
        from NMSWSegment.panel.stepped_task import run_to_end

        started = time.perf_counter()
        options = options or SegmentOptions()
        if outputSegmentation is None:
            raise UserError(_("There is no output segmentation. Choose or create one."))
        volume = volume_from_node(inputVolume)
        bundle = load_bundle(options.bundle)
        result = segment_volume(volume, bundle, options=options, on_progress=on_progress)
        labels = bundle.manifest.labels
        statistics = [row.to_dict() for row in structure_statistics(result.labelmap, volume, labels=labels, patches=result.patches)]
        content = label_content(result.labelmap.array, labels=labels)
        steps = result_steps(
            result.labelmap,
            result.run_info,
            content,
            labels=labels,
            statistics=statistics,
            volume_node=inputVolume,
            segmentation_node=outputSegmentation,
            started=started,
        )
        run_to_end(steps)
        return result


def resetThreeDViews() -> None:
    """Fit the 3D views to what they show."""
    if slicer.app.layoutManager() is not None:  # None without a main window
        slicer.util.resetThreeDViews()


def _timer(milliseconds: int, callback) -> "qt.QTimer":
    """A timer that calls once when it was started and not started again for that long."""
    timer = qt.QTimer()
    timer.setSingleShot(True)
    timer.setInterval(milliseconds)
    timer.connect("timeout()", callback)
    return timer


def __getattr__(name: str) -> object:
    """`from NMSWSegment import segment` in scripts of the application too; only when it is asked for, because it loads torch."""
    if name in ("segment", "Segmentation"):
        from NMSWSegment.engine import segmentation

        return getattr(segmentation, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
