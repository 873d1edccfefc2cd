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

NO_TORCH = "PyTorch is not installed, so there is nothing to test; the panel offers to install it at the first click on Segment."


class NMSWSegmentTest(ScriptedLoadableModuleTest):
    """Self-test inside the application: the packaged model on the packaged sample, through the logic and through the panel."""

    def setUp(self) -> None:
        """Start with an empty scene."""
        if not _has_torch():
            self.skipTest(NO_TORCH)
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        """Run all tests, each in an empty scene."""
        if not _has_torch():  # the buttons Test and Reload would show a SkipTest as a failure
            self.delayDisplay(NO_TORCH)
            return
        for test in (
            self.test_process_sample_givesSegmentsOnItsGrid,
            self.test_process_everyPackagedModel_showsATorso,
            self.test_panel_threeClicks_giveASegmentation,
            self.test_panel_afterAClosedScene_everySegmentIsVisible,
            self.test_panel_kChange_runsOnlyNewPatches,
            self.test_panel_cancel_keepsThePreviousResult,
            self.test_panel_allVolumes_getASegmentationEach,
            self.test_panel_volumeDeletedInARun_stopsAtOnce,
            self.test_panel_3D_fitsTheCameraToTheResult,
            self.test_panel_importanceMap_isClippedToTheBody,
            self.test_scene_savedAndLoaded_bringsSettingsBack,
            self.test_scene_savedAndLoaded_knowsItsOwnResult,
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
        self.assertEverySegmentIsVisible(segmentation)
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
        addedNames, addedSegmentations = [], []

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def onNodeAdded(caller, event, node):
            addedNames.append(node.GetName())
            if node.IsA("vtkMRMLSegmentationNode"):
                addedSegmentations.append(node.GetName())

        observation = slicer.mrmlScene.AddObserver(slicer.mrmlScene.NodeAddedEvent, onNodeAdded)
        widget.ui.segmentButton.click()
        self.assertTrue(widget.segmenter.is_running)
        self.waitForRun(widget)
        slicer.mrmlScene.RemoveObserver(observation)
        self.assertIn("NMSW coarse result", addedNames)
        self.assertEqual(addedSegmentations, [f"{SAMPLE_NAME} segmentation"])

        node = widget.logic.getParameterNode()
        self.assertSegmentsOfATorso(node.outputSegmentation)
        self.assertIsNone(slicer.mrmlScene.GetFirstNodeByName("NMSW coarse result"))
        self.assertEqual(self.shownLabelVolumes(), {None})
        self.assertEverySegmentIsVisible(node.outputSegmentation)
        self.assertEqual(self.numberOfOutlines(), 2)
        self.assertOutlinesCannotBeDragged()
        table = node.outputSegmentation.GetNodeReference("NMSW.Volumes")
        self.assertEqual(table.GetNumberOfRows(), node.outputSegmentation.GetSegmentation().GetNumberOfSegments())
        self.assertFalse(widget.ui.exportDicomButton.enabled)
        self.assertIn("was not loaded from DICOM", widget.ui.exportDicomButton.toolTip)
        self.assertEqual(len({self.hierarchyParent(item) for item in (node.inputVolume, node.outputSegmentation, table)}), 1)

    def test_panel_afterAClosedScene_everySegmentIsVisible(self) -> None:
        """A first run after a scene with another segmentation was closed shows every segment: the slice views' selectors must not hide any."""
        self.delayDisplay("Closing a scene, then segmenting")
        widget = self.openPanel(numPatches=1)
        volume = slicer.util.loadVolume(str(SAMPLE_PATH), {"name": SAMPLE_NAME})
        mine = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Mine")
        _logic().process(volume, mine, SegmentOptions(num_patches=0, device="cpu"))
        slicer.app.processEvents()
        slicer.mrmlScene.Clear()
        slicer.app.processEvents()
        widget = self.openPanel(numPatches=1)
        widget.ui.sampleButton.click()
        other = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Other")
        other.CreateDefaultDisplayNodes()
        other.GetSegmentation().AddEmptySegment("mine", "mine")
        widget.ui.segmentButton.click()
        self.waitForRun(widget)
        slicer.app.processEvents()

        segmentation = widget.logic.getParameterNode().outputSegmentation
        self.assertIsNot(segmentation, other)
        self.assertSegmentsOfATorso(segmentation)
        self.assertEverySegmentIsVisible(segmentation)
        self.assertEverySegmentIsVisible(other)

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

    def test_panel_cancel_keepsThePreviousResult(self) -> None:
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
        self.assertEverySegmentIsVisible(node.outputSegmentation)

    def test_panel_allVolumes_getASegmentationEach(self) -> None:
        """Two volumes one after the other; only the segmentation of the last one, which the views show, is visible."""
        from NMSWSegment.panel.volume_batch import volumes_of_scene

        self.delayDisplay("Segmenting all volumes of the scene")
        names = ("First", "Second")
        for name in names:
            slicer.util.loadVolume(str(SAMPLE_PATH), {"name": name})
        widget = self.openPanel(numPatches=0)
        widget.segmentVolumes(volumes_of_scene(slicer.mrmlScene))
        self.assertIn("1 of 2, First", widget.ui.statusLabel.text)
        self.waitUntil(lambda: widget.ui.statusLabel.text == "2 of 2 volumes were segmented.", "both volumes are segmented")
        results = [slicer.util.getNode(f"{name} segmentation") for name in names]
        for segmentation in results:
            self.assertSegmentsOfATorso(segmentation)
        self.assertEqual([bool(segmentation.GetDisplayVisibility()) for segmentation in results], [False, True])
        self.assertEverySegmentIsVisible(results[1])

    def test_panel_volumeDeletedInARun_stopsAtOnce(self) -> None:
        """A volume that is deleted while its segmentation runs ends the run, and nothing of it stays."""
        self.delayDisplay("Deleting the volume during a run")
        widget = self.openPanel(numPatches=36)
        widget.ui.sampleButton.click()
        volume = widget.logic.getParameterNode().inputVolume
        widget.ui.segmentButton.click()
        self.waitUntil(lambda: slicer.mrmlScene.GetFirstNodeByName("NMSW coarse result") is not None, "the coarse result is shown")
        slicer.mrmlScene.RemoveNode(volume)

        self.assertFalse(widget.segmenter.is_running)
        self.assertIsNone(slicer.mrmlScene.GetFirstNodeByName("NMSW coarse result"))
        self.assertEqual(slicer.util.getNodesByClass("vtkMRMLSegmentationNode"), [])
        slicer.app.processEvents()
        widget.ui.sampleButton.click()
        self.assertTrue(widget.ui.segmentButton.enabled)

    def test_panel_3D_fitsTheCameraToTheResult(self) -> None:
        """The first 3D view of a result shows all of it, and no step of the way holds the application up."""
        self.delayDisplay("Showing the result in 3D")
        widget = self.openPanel(numPatches=1)
        widget.ui.sampleButton.click()
        widget.ui.show3DCheckBox.click()
        widget.ui.segmentButton.click()
        self.waitForRun(widget)
        segmentation = widget.logic.getParameterNode().outputSegmentation
        segments = segmentation.GetSegmentation()
        self.waitUntil(lambda: segments.ContainsRepresentation("Closed surface"), "the surfaces are there")
        slicer.app.processEvents()
        try:
            for index in range(segments.GetNumberOfSegments()):
                self.assertGreater(segments.GetNthSegment(index).GetRepresentation("Closed surface").GetNumberOfPoints(), 0)
            if slicer.app.layoutManager() and slicer.app.layoutManager().threeDViewCount:
                self.assertCameraSeesAll(segmentation)
        finally:
            widget.ui.show3DCheckBox.click()
        self.assertFalse(segments.ContainsRepresentation("Closed surface"))

    def test_panel_importanceMap_isClippedToTheBody(self) -> None:
        """The importance map covers the body alone, and the slice views are as before once it is gone."""
        self.delayDisplay("Showing the importance map")
        widget = self.openPanel(numPatches=1)
        widget.ui.sampleButton.click()
        widget.ui.segmentButton.click()
        self.waitForRun(widget)
        widget.ui.showImportanceCheckBox.click()
        try:
            shown = slicer.mrmlScene.GetFirstNodeByName("NMSW importance")
            array = slicer.util.arrayFromVolume(shown)
            self.assertEqual(array.max(), 1)
            self.assertTrue((array[:, 0] == 0).all() and (array[:, :, 0] == 0).all(), "air at the edges of the volume is marked")
        finally:
            widget.ui.showImportanceCheckBox.click()
        self.assertIsNone(slicer.mrmlScene.GetFirstNodeByName("NMSW importance"))

    def test_scene_savedAndLoaded_knowsItsOwnResult(self) -> None:
        """An untouched result of a loaded scene is replaced without a question; an edited one is not."""
        self.delayDisplay("Saving and loading a result")
        widget = self.openPanel(numPatches=1)
        widget.ui.sampleButton.click()
        widget.ui.segmentButton.click()
        self.waitForRun(widget)
        with tempfile.TemporaryDirectory() as folder:
            slicer.util.saveScene(str(Path(folder) / "scene.mrb"))
            slicer.mrmlScene.Clear()
            slicer.util.loadScene(str(Path(folder) / "scene.mrb"))
        widget.initializeParameterNode()
        segmentation = widget.logic.getParameterNode().outputSegmentation
        self.assertSegmentsOfATorso(segmentation)
        self.assertTrue(widget.segmenter.is_untouched(segmentation))
        segmentation.GetSegmentation().GetSegment("heart").SetColor(1, 0, 1)
        self.assertFalse(widget.segmenter.is_untouched(segmentation))

    def test_scene_savedAndLoaded_bringsSettingsBack(self) -> None:
        """The settings of the panel are part of the scene."""
        self.delayDisplay("Saving and loading the scene")
        widget = self.openPanel(numPatches=7)
        widget.ui.sampleButton.click()
        node = widget.logic.getParameterNode()
        node.omittedStructures = ["ribs"]
        node.policy, node.runtime, node.minIslandMl = "top_k", "auto", 1.5
        with tempfile.TemporaryDirectory() as folder:
            slicer.util.saveScene(str(Path(folder) / "scene.mrb"))
            slicer.mrmlScene.Clear()
            self.assertEqual(widget.logic.getParameterNode().numPatches, 10)
            slicer.util.loadScene(str(Path(folder) / "scene.mrb"))

        widget.initializeParameterNode()  # which the application does where the module is open
        node = widget.logic.getParameterNode()
        self.assertEqual((node.numPatches, node.omittedStructures, node.policy), (7, ["ribs"], "top_k"))
        self.assertEqual((node.runtime, node.minIslandMl, widget.ui.runtimeComboBox.currentData, widget.ui.minIslandSpinBox.value), ("auto", 1.5, "auto", 1.5))
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
        """Outlines of patches in the scene, six faces each."""
        return sum(node.GetPolyData().GetNumberOfCells() // 6 for node in self.outlines())

    def outlines(self) -> list:
        """The model nodes with outlines; one, or none."""
        return [node for node in slicer.util.getNodesByClass("vtkMRMLModelNode") if node.GetAttribute("NMSW.Patches")]

    def assertOutlinesCannotBeDragged(self) -> None:
        """Whether the outlines are lines, in one node without handles."""
        (node,) = self.outlines()
        self.assertEqual(node.GetDisplayNode().GetRepresentation(), slicer.vtkMRMLDisplayNode.WireframeRepresentation)
        self.assertFalse(node.GetDisplayNode().GetSelectable())
        self.assertEqual([roi for roi in slicer.util.getNodesByClass("vtkMRMLMarkupsROINode") if roi.GetAttribute("NMSW.Patch")], [])

    def assertEverySegmentIsVisible(self, segmentation: "slicer.vtkMRMLSegmentationNode") -> None:
        """Whether slices and 3D views show all segments."""
        self.assertTrue(segmentation.GetDisplayVisibility())
        display = segmentation.GetDisplayNode()
        hidden = [segmentId for segmentId in segmentation.GetSegmentation().GetSegmentIDs() if not display.GetSegmentVisibility(segmentId)]
        self.assertEqual(hidden, [])

    def assertCameraSeesAll(self, segmentation: "slicer.vtkMRMLSegmentationNode") -> None:
        """Whether the first 3D view shows the whole bounding box of the segments."""
        view = slicer.app.layoutManager().threeDWidget(0).threeDView()
        renderer = view.renderWindow().GetRenderers().GetFirstRenderer()
        bounds = [0.0] * 6
        segmentation.GetRASBounds(bounds)
        for x in bounds[:2]:
            for y in bounds[2:4]:
                for z in bounds[4:]:
                    renderer.SetWorldPoint(x, y, z, 1)
                    renderer.WorldToView()
                    for value in renderer.GetViewPoint()[:2]:
                        self.assertLess(abs(value), 1.05, f"a corner of the result lies outside the 3D view at {renderer.GetViewPoint()}")

    def shownLabelVolumes(self) -> set:
        """Ids of the volumes in the label layers of the slice views; {None} where there are none."""
        return {composite.GetLabelVolumeID() for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")} or {None}


def _has_torch() -> bool:
    """Whether a run is possible."""
    return importlib.util.find_spec("torch") is not None


def _logic() -> "NMSWSegmentLogic":
    """The logic of the module, which itself imports this file."""
    from NMSWSegment import NMSWSegmentLogic

    return NMSWSegmentLogic()
