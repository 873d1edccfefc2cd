"""Self-test inside the application: the packaged model on the packaged sample, through the logic and through the panel."""

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import slicer
import vtk

from NMSWSegment.files.bundle import BUNDLES_FOLDER, list_bundles, load_bundle
from NMSWSegment.files.resources import SAMPLE_NAME, SAMPLE_PATH
from NMSWSegment.panel.application import ScriptedLoadableModuleTest
from NMSWSegment.protocol import SegmentOptions

if TYPE_CHECKING:
    from NMSWSegment import NMSWSegmentLogic, NMSWSegmentWidget


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

        result = _logic().process(volume, segmentation, SegmentOptions(num_patches=2, device="cpu"), lambda progress: fractions.append(progress.fraction))

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
            _logic().process(volume, segmentation, SegmentOptions(bundle=name, num_patches=1, device="cpu"))
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

    def openPanel(self, *, numPatches: int) -> "NMSWSegmentWidget":
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

    def waitForRun(self, widget: "NMSWSegmentWidget") -> None:
        """Let the application run until the run is over."""
        self.waitUntil(lambda: not widget.segmenter.is_running, "the run is over")

    def assertSegmentsOfATorso(self, segmentation: "slicer.vtkMRMLSegmentationNode") -> None:
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


def _logic() -> "NMSWSegmentLogic":
    """The logic of the module, which itself imports this file."""
    from NMSWSegment import NMSWSegmentLogic

    return NMSWSegmentLogic()
