"""3D Slicer module: segment a CT volume with a few full-resolution patches ("No More Sliding Window")."""

# This file and the folder NMSWSegment/ share a name, and Slicer executes the file as a plain module. With a search path
# of its own it is also the package, so that "from NMSWSegment.engine.segment import ..." works below and in scripts.
__path__ = [__file__.rpartition("NMSWSegment.py")[0] + "NMSWSegment"]
__version__ = "0.1.0"  # as in NMSWSegment/__init__.py, which Slicer never runs

import dataclasses
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import slicer
import vtk
from slicer import vtkMRMLMarkupsROINode, vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode, vtkMRMLTableNode
from slicer.util import VTKObservationMixin

from NMSWSegment.files.bundle import (
    BUNDLES_FOLDER,
    USER_FOLDER_VARIABLE,
    file_sha256,
    install_bundle,
    list_bundles,
    load_bundle,
    remove_bundle,
    user_bundles_folder,
)
from NMSWSegment.files.rates import Rate, Rates
from NMSWSegment.panel import checks
from NMSWSegment.panel.messages import (
    died_text,
    done_text,
    finding_text,
    model_summary,
    model_tooltip,
    progress_text,
    structures_title,
    torch_missing_text,
    work_text,
)
from NMSWSegment.panel.run_state import Run
from NMSWSegment.protocol import AUTO, Report, SegmentOptions, UserError, ignore_progress

if hasattr(slicer, "app"):
    import ctk
    import qt
    from slicer.i18n import tr as _
    from slicer.parameterNodeWrapper import Choice, WithinRange, parameterNodeWrapper
    from slicer.ScriptedLoadableModule import (
        ScriptedLoadableModule,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
        ScriptedLoadableModuleWidget,
    )
else:
    # slicer-core has the nodes but not the application: the logic works, there is no panel.
    class ScriptedLoadableModule:
        """Stands where the application has its base class."""

    ScriptedLoadableModuleLogic = ScriptedLoadableModuleTest = ScriptedLoadableModuleWidget = ScriptedLoadableModule

    def _(text: str) -> str:
        """The text itself: translations come from the application."""
        return text

    def WithinRange(minimum: float, maximum: float) -> tuple[float, float]:
        """The range itself."""
        return minimum, maximum

    def Choice(choices: list[str]) -> tuple[str, ...]:
        """The choices themselves."""
        return tuple(choices)

    def parameterNodeWrapper(wrapped: type) -> type:
        """The class itself."""
        return wrapped


if TYPE_CHECKING:
    from NMSWSegment.engine.segment import SegmentResult

RESOURCES = Path(__file__).resolve().parent / "Resources"
SAMPLE_PATH = RESOURCES / "SampleData" / "cptac_pda_3mm.nii.gz"
SAMPLE_NAME = "NMSWTorsoCT"
TORCH_REQUIREMENT = ">=2.2"
"""The first torch that reads the TorchScript archives of the bundles."""
MAX_PATCHES = 1000
LIVE_UPDATE_MS = 250
"""How long the slider has to rest before the result follows it."""
IDLE_MS = 10 * 60 * 1000
"""A worker that was not used for so long gives its memory back."""
RATES_KEY = "NMSWSegment/Rates"
BUNDLES_FOLDER_KEY = "NMSWSegment/BundlesFolder"


class NMSWSegment(ScriptedLoadableModule):
    """What the application shows about the module."""

    def __init__(self, parent) -> None:
        super().__init__(parent)
        parent.title = _("NMSW Segment")
        parent.categories = [_("Segmentation")]
        parent.dependencies = []
        parent.contributors = ["NMSWSegment contributors"]
        parent.helpText = _(
            "<p>Segments a CT volume on an ordinary computer: a coarse net looks at the whole volume, chooses the few patches where "
            "looking closer pays most, and a second net segments those at full resolution.</p>"
            "<p>Choose an input volume and the number of patches, then click Segment. The outlines show which patches were run.</p>"
            "<p>Not for clinical use.</p>"
        )
        parent.acknowledgementText = _(
            "The method is described in \"No More Sliding Window: Efficient 3D Medical Image Segmentation with Differentiable Top-k "
            "Patch Sampling\", MICCAI 2025, <a href=\"https://arxiv.org/abs/2501.10814\">arXiv:2501.10814</a>."
        )
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData() -> None:
    """Offer the packaged CT volume in the Sample Data module; it is copied from the extension, not downloaded."""
    import SampleData

    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="NMSWSegment",
        sampleName=SAMPLE_NAME,
        thumbnailFileName=str(RESOURCES / "Icons" / "NMSWSegment.png"),
        uris=SAMPLE_PATH.as_uri(),
        fileNames=SAMPLE_PATH.name,
        nodeNames=SAMPLE_NAME,
        # Sample Data reuses a file of the same name in its cache; the hash replaces one of an older version.
        checksums="SHA256:" + file_sha256(SAMPLE_PATH),
    )


def ensureTorch() -> bool:
    """Whether torch is there; where it is not, offer to install it with the PyTorch extension."""
    if importlib.util.find_spec("torch"):
        return True
    try:
        import PyTorchUtils
    except ModuleNotFoundError:
        slicer.util.errorDisplay(torch_missing_text().format(python=sys.version.split()[0]))
        return False
    torch = PyTorchUtils.PyTorchUtilsLogic().installTorch(askConfirmation=True, torchVersionRequirement=TORCH_REQUIREMENT)
    return torch is not None


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
    policy: Annotated[str, Choice(["greedy", "top_k"])] = "greedy"
    threads: Annotated[int, WithinRange(0, 256)] = 0
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
        self._timers = ()
        self._run = Run()
        self._isFilling = False
        self._manifests = {}
        self._manifest = None
        self._lastReport = None
        self._status = ""
        self._availableBytes = None
        self._observedNodes = ()
        self._areDevicesKnown = False
        self._isCancelledByPerson = False

    # Life of the panel

    def setup(self) -> None:
        """Build the panel when the module is opened for the first time."""
        ScriptedLoadableModuleWidget.setup(self)
        from NMSWSegment.panel.segmenter import Segmenter

        uiWidget = slicer.util.loadUI(self.resourcePath("UI/NMSWSegment.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = NMSWSegmentLogic()
        self.segmenter = Segmenter(on_event=self.onWorkerEvent, on_log=self._log)
        self._rates = Rates.from_json(_setting(RATES_KEY))
        self._liveTimer = _timer(LIVE_UPDATE_MS, self._updateLive)
        self._idleTimer = _timer(IDLE_MS, self._stopIdleWorker)
        self._timers = (self._liveTimer, self._idleTimer)
        if _setting(BUNDLES_FOLDER_KEY):
            os.environ[USER_FOLDER_VARIABLE] = _setting(BUNDLES_FOLDER_KEY)
        self.ui.bundlesFolderLineEdit.filters = ctk.ctkPathLineEdit.Dirs
        self.ui.bundlesFolderLineEdit.currentPath = str(user_bundles_folder())
        self._fillModels()
        self._fillDevices({"cpu": _("CPU")})
        self._connectWidgets()
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self.onSceneEndImport)
        self.initializeParameterNode()

    def cleanup(self) -> None:
        """End the worker and let go of the scene when the application closes or the module is reloaded."""
        for timer in self._timers:
            timer.stop()
        if self.segmenter:
            self.segmenter.close()
        self._setParameterNode(None)
        self.removeObservers()

    def enter(self) -> None:
        """Take up the scene's parameter node each time the module is opened, and warm the worker up."""
        self.initializeParameterNode()
        self._warmUp()

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
        self.segmenter.abandon()
        self._run = Run()
        self._setParameterNode(None)
        self._showRunState("")

    def onSceneEndClose(self, caller=None, event=None) -> None:
        """Start again in the empty scene while the panel is open."""
        if self.parent.isEntered:
            self.initializeParameterNode()

    def onSceneEndImport(self, caller=None, event=None) -> None:
        """Show the settings of a scene that was loaded."""
        if self.parent.isEntered:
            self.initializeParameterNode()

    def initializeParameterNode(self) -> None:
        """Bind the panel to the scene's parameter node; the first volume is the first choice."""
        self._setParameterNode(self.logic.getParameterNode())
        if not self._parameterNode.inputVolume:
            firstVolume = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
            if firstVolume:
                self._parameterNode.inputVolume = firstVolume

    def _setParameterNode(self, parameterNode: NMSWSegmentParameterNode | None) -> None:
        """Bind the panel to a parameter node, or to none."""
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._guiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameterNodeModified)
        self._parameterNode = parameterNode
        self._observeChosenNodes()
        if parameterNode:
            # connectGui() returns no tag in some versions, so that it cannot be undone; this does.
            bound = {widget.property("SlicerParameterName"): widget for widget in vars(self.ui).values() if widget.property("SlicerParameterName")}
            self._guiTag = parameterNode.connectParametersToGui(bound)
            self.addObserver(parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameterNodeModified)
            self.onParameterNodeModified()

    def _observeChosenNodes(self) -> None:
        """Follow the volume and the region of interest while a person moves or changes them."""
        node = self._parameterNode
        chosen = tuple(filter(None, (node.inputVolume, node.regionOfInterest))) if node else ()
        if chosen == self._observedNodes:
            return
        for observed in self._observedNodes:
            for event in (vtk.vtkCommand.ModifiedEvent, slicer.vtkMRMLTransformableNode.TransformModifiedEvent):
                self.removeObserver(observed, event, self.onChosenNodeModified)
        self._observedNodes = chosen
        for observed in chosen:
            for event in (vtk.vtkCommand.ModifiedEvent, slicer.vtkMRMLTransformableNode.TransformModifiedEvent):
                self.addObserver(observed, event, self.onChosenNodeModified)

    def onChosenNodeModified(self, caller=None, event=None) -> None:
        """Show what the change means for the run."""
        self._updatePanel()

    def _connectWidgets(self) -> None:
        """What happens on a click; the widgets with a SlicerParameterName are bound by the parameter node."""
        ui = self.ui
        ui.segmentButton.connect("clicked(bool)", self.onSegmentButton)
        ui.sampleButton.connect("clicked(bool)", self.onSampleButton)
        ui.modelComboBox.connect("currentIndexChanged(int)", self.onModelChosen)
        ui.deviceComboBox.connect("currentIndexChanged(int)", self.onDeviceChosen)
        ui.structuresList.connect("itemChanged(QListWidgetItem*)", self.onStructureChecked)
        ui.structuresSearchBox.connect("textChanged(QString)", self.onStructureSearch)
        ui.allStructuresButton.connect("clicked()", lambda: self._checkStructures(True))
        ui.noStructuresButton.connect("clicked()", lambda: self._checkStructures(False))
        ui.addModelButton.connect("clicked(bool)", self.onAddModelButton)
        ui.removeModelButton.connect("clicked(bool)", self.onRemoveModelButton)
        ui.bundlesFolderLineEdit.connect("currentPathChanged(QString)", self.onBundlesFolderChanged)
        ui.showPatchesCheckBox.connect("clicked(bool)", self._showOverlays)
        ui.showImportanceCheckBox.connect("clicked(bool)", self._showOverlays)
        ui.show3DCheckBox.connect("clicked(bool)", self._showSurfaces)

    # Lists that depend on this computer

    def _fillModels(self) -> None:
        """Fill the list of models; a bundle that cannot be read is named in the log."""
        chosen = self._parameterNode.model if self._parameterNode else SegmentOptions.bundle
        self._isFilling = True
        self._manifests.clear()
        self.ui.modelComboBox.clear()
        for name in list_bundles():
            try:
                manifest = self._manifests[name] = load_bundle(name).manifest
            except UserError as error:
                self._log(str(error))
                continue
            self.ui.modelComboBox.addItem(manifest.title, name)
            self.ui.modelComboBox.setItemData(self.ui.modelComboBox.count - 1, model_tooltip(manifest), qt.Qt.ToolTipRole)
        self._isFilling = False
        places = [self.ui.modelComboBox.findData(name) for name in (chosen, SegmentOptions.bundle)]
        self.ui.modelComboBox.currentIndex = next((place for place in places if place >= 0), 0)
        self.onModelChosen()

    def _fillDevices(self, titles: dict[str, str]) -> None:
        """Fill the list of devices; one that a scene names but this computer lacks becomes Automatic."""
        chosen = self._parameterNode.device if self._parameterNode else SegmentOptions.device
        self._isFilling = True
        self.ui.deviceComboBox.clear()
        self.ui.deviceComboBox.addItem(_("Automatic"), "auto")
        for device, title in titles.items():
            self.ui.deviceComboBox.addItem(title, device)
        self._isFilling = False
        self.ui.deviceComboBox.currentIndex = max(0, self.ui.deviceComboBox.findData(chosen))

    def _fillStructures(self) -> None:
        """Fill the checklist with the structures of the model."""
        omitted = self._parameterNode.omittedStructures if self._parameterNode else []
        self._isFilling = True
        self.ui.structuresList.clear()
        for label in self._manifest.labels if self._manifest else ():
            self.ui.structuresList.addItem(label.title)
            item = self.ui.structuresList.item(self.ui.structuresList.count - 1)
            item.setData(qt.Qt.UserRole, label.name)
            item.setCheckState(qt.Qt.Unchecked if label.name in omitted else qt.Qt.Checked)
        self._isFilling = False

    def onModelChosen(self, index: int = 0) -> None:
        """Show the facts of the model, and take it into the parameter node."""
        if self._isFilling:
            return
        name = self.ui.modelComboBox.currentData
        self._manifest = self._manifests.get(name)
        self.ui.modelSummaryLabel.text = model_summary(self._manifest) if self._manifest else ""
        self.ui.modelComboBox.toolTip = model_tooltip(self._manifest) if self._manifest else ""
        self.ui.removeModelButton.enabled = name in list_bundles(user_bundles_folder())
        if self._parameterNode and name:
            self._parameterNode.model = name
        self._fillStructures()
        self._updatePanel()
        self._measure()

    def onDeviceChosen(self, index: int = 0) -> None:
        """Take the device into the parameter node."""
        if not self._isFilling and self._parameterNode and self.ui.deviceComboBox.currentData:
            self._parameterNode.device = self.ui.deviceComboBox.currentData
            self._measure()

    def onStructureChecked(self, item=None) -> None:
        """Take the checked structures into the parameter node."""
        if not self._isFilling and self._parameterNode:
            self._parameterNode.omittedStructures = [name for name, isChecked in self._structures().items() if not isChecked]

    def onStructureSearch(self, text: str) -> None:
        """Show the structures whose names hold the text."""
        for row in range(self.ui.structuresList.count):
            item = self.ui.structuresList.item(row)
            item.setHidden(text.strip().lower() not in item.text().lower())

    def _structures(self) -> dict[str, bool]:
        """Structure name -> whether it is checked, in the order of the labels."""
        items = [self.ui.structuresList.item(row) for row in range(self.ui.structuresList.count)]
        return {item.data(qt.Qt.UserRole): item.checkState() == qt.Qt.Checked for item in items}

    def _checkStructures(self, isChecked: bool) -> None:
        """Check or uncheck all that the search shows."""
        self._isFilling = True
        for row in range(self.ui.structuresList.count):
            item = self.ui.structuresList.item(row)
            if not item.isHidden():
                item.setCheckState(qt.Qt.Checked if isChecked else qt.Qt.Unchecked)
        self._isFilling = False
        self.onStructureChecked()

    # Running

    def onSampleButton(self, checked: bool = False) -> None:
        """Load the packaged volume, or choose it if it is in the scene already."""
        with slicer.util.tryWithErrorDisplay(_("The sample volume could not be loaded.")):
            sample = slicer.mrmlScene.GetFirstNodeByName(SAMPLE_NAME) or slicer.util.loadVolume(str(SAMPLE_PATH), {"name": SAMPLE_NAME})
            self._parameterNode.inputVolume = sample

    def onSegmentButton(self, checked: bool = False) -> None:
        """Start a run, or ask the one that is going on to stop."""
        if self.segmenter.is_running:
            self._isCancelledByPerson = True
            self._cancel()
            self._showRunState(_("Cancelling..."))
            return
        with slicer.util.tryWithErrorDisplay(_("The segmentation could not be started.")):
            if ensureTorch():
                self._start(segmentation=self._outputToReplace())

    def _outputToReplace(self) -> vtkMRMLSegmentationNode | None:
        """The chosen output; None, for a new one, where a person wants to keep what it holds."""
        segmentation = self._parameterNode.outputSegmentation
        if segmentation is None or self.segmenter.is_untouched(segmentation):
            return segmentation
        question = _(
            "'{name}' holds segments that were edited, or not made by this panel. Replace them?\n\n"
            "Yes replaces them. No keeps them and puts the result into a new segmentation."
        ).format(name=segmentation.GetName())
        return segmentation if slicer.util.confirmYesNoDisplay(question) else None

    def _start(self, *, segmentation: vtkMRMLSegmentationNode | None, isLive: bool = False) -> None:
        """Send a run to the worker; a live one follows a change of k, and starts from the result that is there."""
        options = self._options()
        try:
            runId = self.segmenter.start(
                self._parameterNode.inputVolume,
                segmentation,
                options,
                output_name=_("{volume} segmentation").format(volume=self._parameterNode.inputVolume.GetName()),
                coarse_first=not isLive,
            )
        except UserError as error:
            slicer.util.errorDisplay(str(error))
            return
        self._idleTimer.stop()
        self._isCancelledByPerson = False
        self._run.start(runId, num_patches=options.num_patches, is_live=isLive)
        self._showRunState(_("Starting..."))

    def _updateLive(self) -> None:
        """Let the result follow the slider: run what is new, or stop a live run whose k is no longer wanted."""
        node = self._parameterNode
        if node is None or not node.liveUpdate:
            return
        if self.segmenter.is_running and self._run.is_live and self._run.num_patches != self._numPatches():
            self._cancel()
        elif node.outputSegmentation and self._run.wants_live_update(self._signature(), self._numPatches()):
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

    def _warmUp(self) -> None:
        """Start the worker where torch is there, so that devices, speed and the first run come sooner."""
        if self.segmenter.is_running or self.segmenter.worker.is_alive or importlib.util.find_spec("torch") is None:
            return
        try:
            self.segmenter.worker.start()
        except UserError as error:
            self._log(str(error))
        self._idleTimer.start()

    def onWorkerEvent(self, event: dict) -> None:
        """Show what the worker tells; the nodes are in place already."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_devices(self, event: dict) -> None:
        self._log(_("PyTorch {version} is ready.").format(version=event["torch"]))
        self._areDevicesKnown = True
        self._fillDevices(event["devices"])
        self._measure()

    def _on_rate(self, event: dict) -> None:
        self._rates.expect(event["bundle"], event["device"], Rate(**event["rate"]))
        self._updatePanel()

    def _on_progress(self, event: dict) -> None:
        if self._run.progress(event["id"]):
            self.ui.progressBar.value = round(100 * event["fraction"])
            self.ui.statusLabel.text = progress_text(event)

    def _on_coarse(self, event: dict) -> None:
        self._showOverlays()

    def _on_done(self, event: dict) -> None:
        node = self._parameterNode or self.logic.getParameterNode()
        node.outputSegmentation = event["segmentation"]
        self._lastReport = event["report"]
        rate = Rate.from_report(event["report"])
        if rate is not None:
            self._rates.learn(event["report"]["bundle"]["name"], event["report"]["device"], rate)
            qt.QSettings().setValue(RATES_KEY, self._rates.to_json())
        if node.show3D:
            self._showSurfaces(True)
        self._run.done(event["id"], signature=self._signature())
        deviceRow = self.ui.deviceComboBox.findData(event["report"]["device"])
        device = self.ui.deviceComboBox.itemText(deviceRow) if deviceRow >= 0 else event["report"]["device"]
        self._endRun(done_text(event["report"], device=device, seconds=event["seconds"]))

    def _on_cancelled(self, event: dict) -> None:
        if self._run.cancelled(event["id"], by_person=self._isCancelledByPerson):
            self._endRun(_("Cancelled. The result before it stands."))

    def _on_error(self, event: dict) -> None:
        self._log(event["details"] or event["message"])
        if event["id"] is None or not self._run.failed(event["id"]):
            return
        self._endRun(_("The run failed. The result before it stands."))
        if event["kind"] == "user":
            slicer.util.errorDisplay(event["message"])
        else:
            slicer.util.errorDisplay(_("The segmentation failed. Please report this with the details."), detailedText=event["details"] or event["message"])

    def _on_died(self, event: dict) -> None:
        self._log(_("The worker ended: {reason}").format(reason=event["message"]))
        if self._run.worker_died():
            self._endRun(_("The run stopped. The result before it stands."))
            slicer.util.errorDisplay(died_text(event["message"]), detailedText=event["details"])

    def _endRun(self, status: str) -> None:
        """Show how a run ended, and follow the slider if it moved meanwhile."""
        self._idleTimer.start()
        self._showRunState(status)
        self._showOverlays()
        self._liveTimer.start()

    def _measure(self) -> None:
        """Ask the worker how fast the chosen model is here, unless a run has told."""
        node = self._parameterNode
        if node and self._manifest and self.segmenter.worker.is_alive and not self.segmenter.is_running and self._rate() is None:
            self.segmenter.measure(bundle=node.model, device=node.device, threads=node.threads or None)

    # What the panel says

    def onParameterNodeModified(self, caller=None, event=None) -> None:
        """Show the settings, and let the result follow the slider."""
        node = self._parameterNode
        if node is None or self._isFilling:
            return
        self._observeChosenNodes()
        if self.ui.modelComboBox.currentData != node.model and self.ui.modelComboBox.findData(node.model) >= 0:
            self.ui.modelComboBox.currentIndex = self.ui.modelComboBox.findData(node.model)
        if self.ui.deviceComboBox.findData(node.device) < 0 and not self._areDevicesKnown:
            self.ui.deviceComboBox.addItem(node.device, node.device)
        if self.ui.deviceComboBox.currentData != node.device:
            self.ui.deviceComboBox.currentIndex = max(0, self.ui.deviceComboBox.findData(node.device))
        omitted = {name for name, isChecked in self._structures().items() if not isChecked}
        if omitted != set(node.omittedStructures) & set(self._structures()):
            self._fillStructures()
        self._updatePanel()
        self._liveTimer.start()

    def _updatePanel(self) -> None:
        """Show what the present settings mean, and whether they can be run."""
        node = self._parameterNode
        if node is None:
            return
        inputs = self._inputs()
        findings = checks.problems(inputs)
        blocking = [finding_text(finding) for finding in findings if finding.problem.is_blocking]
        structures = self._structures()
        if structures and not any(structures.values()):
            blocking.append(_("No structure is checked. Check at least one."))
        advice = [finding_text(finding) for finding in findings if not finding.problem.is_blocking]
        lines = [*([] if blocking else [self._workText(inputs)]), *(f'<font color="red">{text}</font>' for text in advice)]
        self.ui.workLabel.text = "<br>".join(lines)
        self.ui.structuresSection.text = structures_title(chosen=sum(structures.values()), total=len(structures))
        self.ui.autoPatchesCheckBox.enabled = self._run.is_num_patches_enabled and node.policy == "greedy"
        self.ui.numPatchesSlider.enabled = self._run.is_num_patches_enabled and self._numPatches() != AUTO
        table = self._volumesTable()
        self.ui.volumesTable.setMRMLTableNode(table)
        self.ui.volumesTable.visible = table is not None
        self.ui.segmentButton.enabled = self._run.is_button_enabled(is_blocked=bool(blocking))
        self.ui.segmentButton.toolTip = blocking[0] if blocking else _("Segment the input volume. What is there stays until the result is complete.")
        if not self.segmenter.is_running:
            self.ui.statusLabel.text = blocking[0] if blocking else self._status

    def _workText(self, inputs: checks.Inputs) -> str:
        """The line under the slider; the slider ends at the number of candidates."""
        work = checks.work(
            inputs.geometry,
            inputs.manifest,
            num_patches=inputs.num_patches,
            roi_to_ras=inputs.roi_to_ras,
            expected_patches=self._patchesOfLastRun(),
            available_bytes=inputs.available_bytes,
        )
        self.ui.numPatchesSlider.maximum = max(1, min(work.candidates, MAX_PATCHES))
        rate = self._rate()
        seconds = None if rate is None else checks.seconds(work, rate)
        self.ui.modelComboBox.toolTip = model_tooltip(self._manifest, seconds=seconds)
        return work_text(work, seconds=seconds)

    def _showRunState(self, status: str) -> None:
        """Turn the button into Cancel and back; the choices rest while a run goes on."""
        self._status = status
        isRunning = self.segmenter.is_running
        self.ui.progressBar.value = 0
        self.ui.progressBar.visible = isRunning
        for widget in (self.ui.volumeSection, self.ui.modelSection, self.ui.deviceComboBox, self.ui.advancedSection):
            widget.enabled = self._run.are_settings_enabled or self._run.is_live
        self.ui.segmentButton.text = _("Cancel") if isRunning else _("Segment")
        self.ui.statusLabel.text = status
        self._updatePanel()

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
        from NMSWSegment.panel.overlays import hide_importance, set_patches_visible, show_importance

        set_patches_visible(slicer.mrmlScene, node.showPatches)
        importance = self.segmenter.importance_of(node.inputVolume)
        if node.showImportance and importance is not None:
            show_importance(importance, parent_node=node.inputVolume)
        else:
            hide_importance(slicer.mrmlScene)

    def _showSurfaces(self, isShown: bool) -> None:
        """Show the result in the 3D views, or take it out."""
        from NMSWSegment.panel.overlays import show_surfaces

        node = self._parameterNode or self.logic.getParameterNode()
        if node.outputSegmentation:
            with slicer.util.WaitCursor():
                show_surfaces(node.outputSegmentation, isShown)

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
        structures = self._structures()
        return SegmentOptions(
            bundle=node.model,
            num_patches=self._numPatches(),
            policy=node.policy,
            device=node.device,
            structures=() if all(structures.values()) else tuple(name for name, isChecked in structures.items() if isChecked),
            roi_to_ras=roi_to_ras(node.regionOfInterest) if node.regionOfInterest else None,
            threads=node.threads or None,
        )

    def _inputs(self) -> checks.Inputs:
        """What panel/checks.py has to know."""
        from NMSWSegment.files.memory import available_memory_bytes
        from NMSWSegment.panel.nodes import roi_to_ras, volume_inputs

        node = self._parameterNode
        if not self.segmenter.worker.is_alive:
            self._availableBytes = available_memory_bytes()  # what a worker holds is part of what it needs
        return dataclasses.replace(
            volume_inputs(node.inputVolume),
            manifest=self._manifest,
            num_patches=self._numPatches(),
            roi_to_ras=roi_to_ras(node.regionOfInterest) if node.regionOfInterest else None,
            available_bytes=self._availableBytes,
        )

    def _signature(self) -> tuple:
        """Everything but k that a result depends on, and the result itself: while it is the same, a live update loses nothing."""
        from NMSWSegment.panel.result import segments_state

        node = self._parameterNode or self.logic.getParameterNode()
        segmentation = node.outputSegmentation
        nodeIds = tuple(item.GetID() if item else None for item in (node.inputVolume, node.regionOfInterest, segmentation))
        choices = (node.model, tuple(node.omittedStructures), node.policy, node.device, node.threads)
        return (*nodeIds, *choices, segments_state(segmentation) if segmentation else ())

    def _rate(self) -> "Rate | None":
        """How fast the chosen model is on the chosen device."""
        device = self._parameterNode.device
        if device == "auto":
            device = next((self.ui.deviceComboBox.itemData(index) for index in range(self.ui.deviceComboBox.count) if self.ui.deviceComboBox.itemData(index) not in ("auto", "cpu")), "cpu")
        return self._rates.get(self._manifest.name, device) if self._manifest else None

    def _patchesOfLastRun(self) -> int | None:
        """How many patches Auto took last."""
        report = self._lastReport
        return len(report["patches"]) if report and report["options"]["num_patches"] == AUTO else None

    # Own models

    def onAddModelButton(self, checked: bool = False) -> None:
        """Copy a bundle into the model folder."""
        folder = qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), _("Choose the folder of a model that you trust: a model is a program"))
        if folder:
            self._changeModels(lambda: install_bundle(folder).manifest.name)

    def onRemoveModelButton(self, checked: bool = False) -> None:
        """Delete the chosen model from the model folder."""
        name = self._parameterNode.model
        if slicer.util.confirmYesNoDisplay(_("Remove the model '{name}' from this computer?").format(name=name)):
            self._changeModels(lambda: remove_bundle(name))

    def onBundlesFolderChanged(self, folder: str) -> None:
        """Look for own models in another folder, also next time and in the worker."""
        qt.QSettings().setValue(BUNDLES_FOLDER_KEY, folder)
        os.environ[USER_FOLDER_VARIABLE] = folder
        self.segmenter.close()
        self._fillModels()

    def _changeModels(self, change) -> None:
        """Add or remove a model, and choose the added one."""
        with slicer.util.tryWithErrorDisplay(_("The models could not be changed.")):
            try:
                name = change()
            except UserError as error:
                slicer.util.errorDisplay(str(error))
                return
            if name:
                self._parameterNode.model = name
            self._fillModels()


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
        report: Report = ignore_progress,
    ) -> "SegmentResult":
        """Segment a volume node.

        Args:
            outputSegmentation: its content is replaced once the result is there; a run that stops leaves it as it was.
            options: None takes the defaults.
            report: called before every stage and after every patch; may raise Cancelled.

        Returns:
            The engine's result: labelmap on the volume's grid, patches best first, JSON-ready report.

        Raises:
            UserError: the volume, the options or the bundle do not fit; the text says what to do.
        """
        from NMSWSegment.engine.segment import segment_volume
        from NMSWSegment.panel.nodes import volume_from_node
        from NMSWSegment.panel.result import apply_result

        started = time.perf_counter()
        options = options or SegmentOptions()
        if outputSegmentation is None:
            raise UserError("There is no output segmentation. Choose or create one.")
        volume = volume_from_node(inputVolume)
        bundle = load_bundle(options.bundle)
        result = segment_volume(volume, bundle, options=options, report=report)
        apply_result(result.labelmap, result.report, labels=bundle.manifest.labels, volume_node=inputVolume, segmentation_node=outputSegmentation, started=started)
        return result


def _setting(key: str) -> str:
    """A text that the application remembers on this computer."""
    return str(qt.QSettings().value(key) or "")


def _timer(milliseconds: int, callback) -> "qt.QTimer":
    """A timer that calls once when it was started and not started again for that long."""
    timer = qt.QTimer()
    timer.setSingleShot(True)
    timer.setInterval(milliseconds)
    timer.connect("timeout()", callback)
    return timer


class NMSWSegmentTest(ScriptedLoadableModuleTest):
    """Self-test inside the application: the packaged model on the packaged sample, through the logic and through the panel."""

    def setUp(self) -> None:
        """Start with an empty scene."""
        if importlib.util.find_spec("torch") is None:
            self.skipTest("PyTorch is not installed; the panel offers to install it at the first click on Segment")
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        """Run all tests, each in an empty scene."""
        for test in (
            self.test_process_sample_givesSegmentsOnItsGrid,
            self.test_process_everyPackagedModel_showsATorso,
            self.test_panel_threeClicks_giveASegmentation,
            self.test_panel_kChange_runsOnlyNewPatches,
            self.test_panel_cancel_keepsTheResultBefore,
            self.test_scene_savedAndLoaded_bringsSettingsBack,
        ):
            self.setUp()
            test()
        self.delayDisplay("All tests passed")

    def test_process_sample_givesSegmentsOnItsGrid(self) -> None:
        """Two patches on the CPU: organs that a torso has, the volume's geometry, two outlines, provenance."""
        self.delayDisplay("Segmenting the sample volume with 2 patches on the CPU")
        volume = slicer.util.loadVolume(str(SAMPLE_PATH))
        segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
        fractions = []

        result = NMSWSegmentLogic().process(
            volume, segmentation, SegmentOptions(num_patches=2, device="cpu"), lambda progress: fractions.append(progress.fraction)
        )

        self.assertSegmentsOfATorso(segmentation)
        lung = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, "lung_left", volume)
        self.assertEqual(lung.shape, slicer.util.arrayFromVolume(volume).shape)
        labels = {label.name: label.value for label in load_bundle("torso-unet").manifest.labels}
        self.assertEqual(int((lung > 0).sum()), int((result.labelmap.array == labels["lung_left"]).sum()))
        self.assertEqual(segmentation.GetNodeReferenceID(segmentation.GetReferenceImageGeometryReferenceRole()), volume.GetID())
        self.assertEqual(self.numberOfOutlines(), 2)
        self.assertEqual(segmentation.GetAttribute("NMSW.NumPatches"), "2")
        self.assertEqual(fractions, sorted(fractions))

    def test_process_everyPackagedModel_showsATorso(self) -> None:
        """One patch of each model that comes with the module, whatever its backbone."""
        volume = slicer.util.loadVolume(str(SAMPLE_PATH))
        for name in list_bundles(BUNDLES_FOLDER):
            self.delayDisplay(f"Segmenting the sample volume with {name}")
            segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
            NMSWSegmentLogic().process(volume, segmentation, SegmentOptions(bundle=name, num_patches=1, device="cpu"))
            self.assertSegmentsOfATorso(segmentation)
            self.assertEqual(segmentation.GetAttribute("NMSW.Bundle"), name)

    def test_panel_threeClicks_giveASegmentation(self) -> None:
        """Open the module, load the sample, click Segment: coarse result first, then segments, outlines and table."""
        self.delayDisplay("Clicking through the panel")
        widget = self.openPanel(numPatches=2)
        widget.ui.sampleButton.click()
        self.assertTrue(widget.ui.segmentButton.enabled)
        addedNames = []

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def onNodeAdded(caller, event, node):
            addedNames.append(node.GetName())

        observation = slicer.mrmlScene.AddObserver(slicer.mrmlScene.NodeAddedEvent, onNodeAdded)
        widget.ui.segmentButton.click()
        self.assertTrue(widget.segmenter.is_running)
        self.waitForRun(widget)
        slicer.mrmlScene.RemoveObserver(observation)
        self.assertIn("NMSW coarse result", addedNames)

        node = widget.logic.getParameterNode()
        self.assertSegmentsOfATorso(node.outputSegmentation)
        self.assertIsNone(slicer.mrmlScene.GetFirstNodeByName("NMSW coarse result"))
        self.assertEqual(self.numberOfOutlines(), 2)
        table = node.outputSegmentation.GetNodeReference("NMSW.Volumes")
        self.assertEqual(table.GetNumberOfRows(), node.outputSegmentation.GetSegmentation().GetNumberOfSegments())
        self.assertEqual(len({self.hierarchyParent(item) for item in (node.inputVolume, node.outputSegmentation, table)}), 1)

    def test_panel_kChange_runsOnlyNewPatches(self) -> None:
        """Moving the slider after a run updates the result; the patches of before are not run again."""
        self.delayDisplay("Moving the slider")
        widget = self.openPanel(numPatches=2)
        widget.ui.sampleButton.click()
        widget.ui.segmentButton.click()
        self.waitForRun(widget)
        segmentation = widget.logic.getParameterNode().outputSegmentation
        for numPatches, fresh in ((4, 2), (2, 0)):
            widget.ui.numPatchesSlider.value = numPatches
            self.waitUntil(lambda: segmentation.GetAttribute("NMSW.NumPatches") == str(numPatches), f"the result follows k = {numPatches}")
            self.assertEqual(segmentation.GetAttribute("NMSW.PatchesReused"), str(numPatches - fresh))
            self.assertEqual(self.numberOfOutlines(), numPatches)
            self.waitForRun(widget)

    def test_panel_cancel_keepsTheResultBefore(self) -> None:
        """A run that is cancelled changes nothing, and answers within a second."""
        self.delayDisplay("Cancelling a run")
        widget = self.openPanel(numPatches=1)
        widget.ui.sampleButton.click()
        widget.ui.segmentButton.click()
        self.waitForRun(widget)
        node = widget.logic.getParameterNode()
        node.liveUpdate = False
        before = slicer.util.arrayFromSegmentBinaryLabelmap(node.outputSegmentation, "liver", node.inputVolume).copy()
        node.numPatches = 36
        widget.ui.segmentButton.click()
        self.assertTrue(widget.segmenter.is_running)
        slicer.app.processEvents()
        started = time.perf_counter()
        widget.ui.segmentButton.click()
        self.waitForRun(widget)

        self.assertLess(time.perf_counter() - started, 2.0)  # a second, and what the test itself takes
        self.assertIsNone(slicer.mrmlScene.GetFirstNodeByName("NMSW coarse result"))
        after = slicer.util.arrayFromSegmentBinaryLabelmap(node.outputSegmentation, "liver", node.inputVolume)
        self.assertTrue((after == before).all())
        self.assertEqual(node.outputSegmentation.GetAttribute("NMSW.NumPatches"), "1")

    def test_scene_savedAndLoaded_bringsSettingsBack(self) -> None:
        """The settings of the panel are part of the scene."""
        self.delayDisplay("Saving and loading the scene")
        widget = self.openPanel(numPatches=7)
        widget.ui.sampleButton.click()
        node = widget.logic.getParameterNode()
        node.omittedStructures = ["ribs"]
        node.policy = "top_k"
        with tempfile.TemporaryDirectory() as folder:
            slicer.util.saveScene(str(Path(folder) / "scene.mrb"))
            slicer.mrmlScene.Clear()
            self.assertEqual(widget.logic.getParameterNode().numPatches, 10)
            slicer.util.loadScene(str(Path(folder) / "scene.mrb"))

        widget.initializeParameterNode()  # which the application does where the module is open
        node = widget.logic.getParameterNode()
        self.assertEqual((node.numPatches, node.omittedStructures, node.policy), (7, ["ribs"], "top_k"))
        self.assertEqual(node.inputVolume.GetName(), SAMPLE_NAME)
        self.assertEqual(widget.ui.numPatchesSlider.value, 7)

    def openPanel(self, *, numPatches: int) -> NMSWSegmentWidget:
        """The panel in this scene, on the CPU."""
        if slicer.util.mainWindow():
            slicer.util.selectModule("NMSWSegment")
        widget = slicer.util.getModuleWidget("NMSWSegment")
        widget.initializeParameterNode()
        node = widget.logic.getParameterNode()
        node.numPatches, node.device = numPatches, "cpu"
        return widget

    def waitUntil(self, condition, what: str, *, seconds: float = 120) -> None:
        """Let the application run until something is so."""
        stop = time.perf_counter() + seconds
        while not condition():
            self.assertLess(time.perf_counter(), stop, f"waited {seconds} s until {what}")
            slicer.app.processEvents()
            time.sleep(0.01)

    def waitForRun(self, widget: NMSWSegmentWidget) -> None:
        """Let the application run until the run is over."""
        self.waitUntil(lambda: not widget.segmenter.is_running, "the run is over")

    def assertSegmentsOfATorso(self, segmentation: vtkMRMLSegmentationNode) -> None:
        """Whether organs that every torso has were found."""
        segmentIds = set(segmentation.GetSegmentation().GetSegmentIDs())
        self.assertTrue({"lung_left", "lung_right", "heart", "aorta", "vertebrae"} <= segmentIds, f"found only {sorted(segmentIds)}")

    def hierarchyParent(self, node) -> int:
        """What a node lies under in the subject hierarchy."""
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
        item = hierarchy.GetItemByDataNode(node)
        return hierarchy.GetItemParent(item) if item else hierarchy.GetSceneItemID()

    def numberOfOutlines(self) -> int:
        """Outlines of patches in the scene."""
        nodes = slicer.util.getNodesByClass("vtkMRMLMarkupsROINode")
        return len([node for node in nodes if node.GetAttribute("NMSW.Patch")])
