"""3D Slicer module: segment a CT volume with a few full-resolution patches ("No More Sliding Window")."""

# This file and the folder NMSWSegment/ share a name, and Slicer executes the file as a plain module. With a search path
# of its own it is also the package, so that "from NMSWSegment.engine import ..." works below and in scripts.
__path__ = [__file__.rpartition("NMSWSegment.py")[0] + "NMSWSegment"]
__version__ = "0.1.0"  # as in NMSWSegment/__init__.py, which Slicer never runs

import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import slicer
import vtk
from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.util import VTKObservationMixin

from NMSWSegment.bundle import file_sha256, list_bundles, load_bundle
from NMSWSegment.protocol import Cancelled, Progress, Report, SegmentOptions, UserError, ignore_progress

try:
    from slicer.i18n import tr as _
    from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper
    from slicer.ScriptedLoadableModule import (
        ScriptedLoadableModule,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
        ScriptedLoadableModuleWidget,
    )
except ImportError:
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

    def parameterNodeWrapper(wrapped: type) -> type:
        """The class itself."""
        return wrapped


if TYPE_CHECKING:
    from NMSWSegment.engine import SegmentResult

RESOURCES = Path(__file__).resolve().parent / "Resources"
SAMPLE_PATH = RESOURCES / "SampleData" / "cptac_pda_3mm.nii.gz"
SAMPLE_NAME = "NMSWTorsoCT"
TORCH_REQUIREMENT = ">=2.2"
"""The first torch that reads the TorchScript archives of the bundles."""


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
        slicer.util.errorDisplay(
            _("PyTorch is not installed. Install the extension 'PyTorch' in the Extensions Manager, restart the application and try again.")
        )
        return False
    torch = PyTorchUtils.PyTorchUtilsLogic().installTorch(askConfirmation=True, torchVersionRequirement=TORCH_REQUIREMENT)
    return torch is not None


@parameterNodeWrapper
class NMSWSegmentParameterNode:
    """What the scene remembers of the panel; the model and the device belong to the computer, not to the scene."""

    inputVolume: vtkMRMLScalarVolumeNode
    outputSegmentation: vtkMRMLSegmentationNode
    numPatches: Annotated[float, WithinRange(0, 50)] = 10


class NMSWSegmentWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: nodes, model, patches, device, one button, progress."""

    def __init__(self, parent=None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._parameterNode = None
        self._guiTag = None
        self._isRunning = False
        self._isCancelRequested = False

    def setup(self) -> None:
        """Build the panel when the module is opened for the first time."""
        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/NMSWSegment.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = NMSWSegmentLogic()
        self.ui.progressBar.visible = False
        self._showDevices({"auto": _("Automatic"), "cpu": _("CPU")})
        self.ui.modelComboBox.addItems(list_bundles())
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.ui.segmentButton.connect("clicked(bool)", self.onSegmentButton)
        self.ui.deviceComboBox.connect("activated(int)", self.onDeviceActivated)
        self.initializeParameterNode()

    def cleanup(self) -> None:
        """Let go of the scene when the application closes."""
        self._setParameterNode(None)
        self.removeObservers()

    def enter(self) -> None:
        """Take up the scene's parameter node each time the module is opened."""
        self.initializeParameterNode()

    def exit(self) -> None:
        """Let go of the parameter node when another module is opened."""
        self._setParameterNode(None)

    def onReload(self) -> None:
        """Drop the library too, so that a reload reads all of its files again."""
        for name in [name for name in sys.modules if name.startswith("NMSWSegment.")]:
            del sys.modules[name]
        super().onReload()

    def onSceneStartClose(self, caller=None, event=None) -> None:
        """Stop a run whose nodes go away, and let go of the parameter node."""
        self._isCancelRequested = True
        self._setParameterNode(None)

    def onSceneEndClose(self, caller=None, event=None) -> None:
        """Start again in the empty scene while the panel is open."""
        if self.parent.isEntered:
            self.initializeParameterNode()

    def initializeParameterNode(self) -> None:
        """Bind the panel to the scene's parameter node; the first volume is the first choice."""
        self._setParameterNode(self.logic.getParameterNode())
        if not self._parameterNode.inputVolume:
            firstVolume = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
            if firstVolume:
                self._parameterNode.inputVolume = firstVolume

    def onParameterNodeModified(self, caller=None, event=None) -> None:
        """Enable the button when there is something to segment."""
        hasInput = bool(self._parameterNode and self._parameterNode.inputVolume)
        hasModel = self.ui.modelComboBox.count > 0
        self.ui.segmentButton.enabled = self._isRunning or (hasInput and hasModel)
        if not hasModel:
            self.ui.statusLabel.text = _("No model is installed. Install the extension again.")
        elif not hasInput:
            self.ui.statusLabel.text = _("Choose an input volume.")
        elif not self._isRunning:
            self.ui.statusLabel.text = _("Ready.")

    def onDeviceActivated(self, index: int) -> None:
        """Ask torch for its devices only when a person wants to see them: importing it takes seconds."""
        if self.ui.deviceComboBox.itemData(index) != "":
            return
        self.ui.deviceComboBox.setCurrentIndex(0)
        with slicer.util.tryWithErrorDisplay(_("The devices could not be listed.")):
            if ensureTorch():
                from NMSWSegment.runtime import available_devices

                self._showDevices({"auto": _("Automatic")} | available_devices())

    def onSegmentButton(self) -> None:
        """Start a run, or ask the one that is going on to stop."""
        if self._isRunning:
            self._isCancelRequested = True
            self.ui.statusLabel.text = _("Cancelling...")
            return
        with slicer.util.tryWithErrorDisplay(_("The segmentation failed. Please report this with the details below.")):
            if ensureTorch():
                self._segment()

    def _segment(self) -> None:
        """Run the logic in this thread and show how it ended."""
        parameterNode = self._parameterNode
        created = None if parameterNode.outputSegmentation else self._addOutputSegmentation()
        self._setRunning(True)
        try:
            result = self.logic.process(parameterNode.inputVolume, parameterNode.outputSegmentation, self._options(), self._showProgress)
        except Cancelled:
            status = _("Cancelled. Nothing was changed.")
        except UserError as error:
            status = _("Nothing was changed.")
            slicer.util.errorDisplay(str(error))
        else:
            created = None
            status = _("Done: {count} patches on {device}.").format(count=len(result.patches), device=result.report["device"])
        finally:
            self._setRunning(False)
            if created is not None and created.GetScene():
                slicer.mrmlScene.RemoveNode(created)
        self.ui.statusLabel.text = status

    def _options(self) -> SegmentOptions:
        """What the panel says."""
        return SegmentOptions(
            bundle=self.ui.modelComboBox.currentText, num_patches=int(self._parameterNode.numPatches), device=self.ui.deviceComboBox.currentData
        )

    def _addOutputSegmentation(self) -> vtkMRMLSegmentationNode:
        """A new segmentation named after the volume, chosen in the panel."""
        name = _("{volume} segmentation").format(volume=self._parameterNode.inputVolume.GetName())
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", slicer.mrmlScene.GenerateUniqueName(name))
        self._parameterNode.outputSegmentation = node
        return node

    def _showProgress(self, progress: Progress) -> None:
        """Draw one step and let the application breathe; the report callback of a run."""
        self.ui.progressBar.value = round(100 * progress.fraction)
        if not self._isCancelRequested:
            self.ui.statusLabel.text = progress.message
        slicer.app.processEvents()
        if self._isCancelRequested:
            raise Cancelled

    def _setRunning(self, isRunning: bool) -> None:
        """Turn the button into Cancel and back; the choices rest while a run goes on."""
        self._isRunning = isRunning
        self._isCancelRequested = False
        self.ui.progressBar.value = 0
        self.ui.progressBar.visible = isRunning
        self.ui.settingsWidget.enabled = not isRunning
        self.ui.segmentButton.text = _("Cancel") if isRunning else _("Segment")
        self.onParameterNodeModified()

    def _showDevices(self, titles: dict[str, str]) -> None:
        """Fill the device list; the last entry looks for more."""
        self.ui.deviceComboBox.clear()
        for device, title in titles.items():
            self.ui.deviceComboBox.addItem(title, device)
        self.ui.deviceComboBox.addItem(_("Look for devices..."), "")

    def _setParameterNode(self, parameterNode: NMSWSegmentParameterNode | None) -> None:
        """Bind the panel to a parameter node, or to none."""
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._guiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameterNodeModified)
        self._parameterNode = parameterNode
        if parameterNode:
            self._guiTag = parameterNode.connectGui(self.ui)
            self.addObserver(parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameterNodeModified)
        self.onParameterNodeModified()


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
        from NMSWSegment.engine import segment_volume
        from NMSWSegment.slicer_bridge import import_labelmap, show_patches, volume_from_node

        started = time.perf_counter()
        options = options or SegmentOptions()
        if outputSegmentation is None:
            raise UserError("There is no output segmentation. Choose or create one.")
        volume = volume_from_node(inputVolume)
        bundle = load_bundle(options.bundle)
        result = segment_volume(volume, bundle, options=options, report=report)
        # The report callback lets the application run, and a person may have closed the scene meanwhile.
        if inputVolume.GetScene() is None or outputSegmentation.GetScene() is None:
            raise UserError("The input volume or the segmentation was removed during the run. Load the volume and segment it again.")
        import_labelmap(outputSegmentation, result.labelmap, labels=bundle.manifest.labels, reference_node=inputVolume)
        show_patches(inputVolume.GetScene(), result.patches, parent_node=inputVolume)
        _storeProvenance(outputSegmentation, result.report, seconds=time.perf_counter() - started)
        return result


def _storeProvenance(node: vtkMRMLSegmentationNode, report: dict, *, seconds: float) -> None:
    """Write on the node how it was made; the attributes are saved with the scene."""
    num_patches = report["options"]["num_patches"]
    facts = {
        "Version": report["versions"]["NMSWSegment"],
        "Bundle": report["bundle"]["name"],
        "BundleSHA256": report["bundle"]["sha256"],
        "NumPatches": "all" if num_patches is None else str(num_patches),
        "Policy": report["options"]["policy"],
        "Device": report["device"],
        "Seconds": f"{seconds:.2f}",
    }
    for name, fact in facts.items():
        node.SetAttribute(f"NMSW.{name}", fact)


class NMSWSegmentTest(ScriptedLoadableModuleTest):
    """Self-test inside the application, on the packaged sample and the default model."""

    def setUp(self) -> None:
        """Start with an empty scene."""
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        """Run all tests."""
        self.setUp()
        self.test_process_sample_givesSegmentsOnItsGrid()

    def test_process_sample_givesSegmentsOnItsGrid(self) -> None:
        """Two patches on the CPU: organs that a torso has, the volume's geometry, two outlines, provenance."""
        self.delayDisplay("Segmenting the sample volume with 2 patches on the CPU")
        volume = slicer.util.loadVolume(str(SAMPLE_PATH))
        segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
        fractions = []

        result = NMSWSegmentLogic().process(
            volume, segmentation, SegmentOptions(num_patches=2, device="cpu"), lambda progress: fractions.append(progress.fraction)
        )

        segmentIds = set(segmentation.GetSegmentation().GetSegmentIDs())
        self.assertTrue({"lung_left", "lung_right", "heart", "aorta", "vertebrae"} <= segmentIds, f"found only {sorted(segmentIds)}")
        lung = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, "lung_left", volume)
        self.assertEqual(lung.shape, slicer.util.arrayFromVolume(volume).shape)
        labels = {label.name: label.value for label in load_bundle("torso-unet").manifest.labels}
        self.assertEqual(int((lung > 0).sum()), int((result.labelmap.array == labels["lung_left"]).sum()))
        self.assertEqual(segmentation.GetNodeReferenceID(segmentation.GetReferenceImageGeometryReferenceRole()), volume.GetID())
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLMarkupsROINode"), 2)
        self.assertEqual(segmentation.GetAttribute("NMSW.NumPatches"), "2")
        self.assertEqual(fractions, sorted(fractions))
        self.delayDisplay("Test passed")
