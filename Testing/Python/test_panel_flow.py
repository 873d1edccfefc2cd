"""The whole flow by clicks, outside the application: the real module file, the real worker process, stand-ins for the rest."""

import contextlib
import gc
import os
import signal
import sys
import time
import unittest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

if sys.platform == "win32":
    pytest.skip("the stand-in for Slicer's Python is a shell script", allow_module_level=True)
pytest.importorskip("PySide6.QtWidgets", reason="PySide6 cannot be loaded, so that there is nothing to click", exc_type=ImportError)
from slicer_headless import add_transform, add_volume, no_vtk_errors, segment_points_ras, slicer, vtk  # noqa: E402
from standins.application import Application  # noqa: E402

from NMSWSegment.files.bundle import USER_FOLDER_VARIABLE, install_bundle  # noqa: E402
from NMSWSegment.files.phantoms import ORGANS, phantom, upright_ijk_to_ras  # noqa: E402
from NMSWSegment.panel.nodes import volume_from_node  # noqa: E402

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)

SHAPE = (54, 36, 52)
TILT = np.array([[np.cos(0.15), -np.sin(0.15), 0, 4.0], [np.sin(0.15), np.cos(0.15), 0, -9.0], [0, 0, 1, 2.0], [0, 0, 0, 1]])
TIMEOUT_S = 60
SLOW_NET = "NMSW_TEST_SLOW_PATCH_S"


@pytest.fixture
def own_folder(tmp_path, a_tiny_bundle, monkeypatch):
    """A person's model folder with the tiny bundle in it."""
    monkeypatch.setenv(USER_FOLDER_VARIABLE, str(tmp_path / "models"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    install_bundle(a_tiny_bundle)
    return tmp_path / "models"


@pytest.fixture
def app(own_folder):
    with Application() as application:
        application.load_module(ROOT / "NMSWSegment.py")
        application.startup_completed()
        yield application


@pytest.fixture
def widget(app):
    """The panel, with the tiny model on the CPU and two patches, over a tilted phantom."""
    add_phantom(app.scene)
    widget = app.open_panel("NMSWSegment")
    node = widget.logic.getParameterNode()
    node.model, node.device, node.threads, node.numPatches = "tiny", "cpu", 1, 2
    app.wait_until(lambda: "is ready" in widget.ui.logTextEdit.plainText, TIMEOUT_S)
    assert widget.ui.segmentButton.enabled, widget.ui.statusLabel.text
    return widget


def add_phantom(scene, *, name: str = "Phantom", shape=SHAPE):
    """The phantom under a transform that tilts it, so that a mistake in a frame moves the result."""
    volume, _ = phantom(shape, ijk_to_ras=TILT @ upright_ijk_to_ras((6.0, 6.0, 6.0), shape))
    node = add_volume(scene, volume.array.astype(np.int16), ijk_to_ras=upright_ijk_to_ras((6.0, 6.0, 6.0), shape), name=name)
    node.SetAndObserveTransformNodeID(add_transform(scene, TILT).GetID())
    return node


def slow_down(monkeypatch, tmp_path, seconds: float) -> None:
    """Let every patch of the worker take some time, through a module that its interpreter loads at the start."""
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name != "NMSWSegment.engine.runtime":
            return None
        sys.meta_path.remove(self)
        import importlib.util
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            local = module.Nets.local
            module.Nets.local = lambda *inputs: (time.sleep({seconds}), local(*inputs))[1]
        spec.loader.exec_module = exec_module
        return spec
if "worker" in sys.orig_argv:
    sys.meta_path.insert(0, Slow())
""",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def click_first_run(app):
    """Open the panel over a phantom and click Segment for eight patches; the widget."""
    add_phantom(app.scene)
    widget = app.open_panel("NMSWSegment")
    node = widget.logic.getParameterNode()
    node.model, node.device, node.numPatches = "tiny", "cpu", 8
    app.process_events()
    widget.ui.segmentButton.click()
    return widget


def start_first_run(app):
    """The same, and wait for the first patch."""
    widget = click_first_run(app)
    app.wait_until(lambda: "Patch 1" in widget.ui.statusLabel.text, TIMEOUT_S)
    return widget


def segment(app, widget) -> None:
    """Click Segment and wait for the end."""
    widget.ui.segmentButton.click()
    app.wait_until(lambda: not widget.segmenter.is_running, TIMEOUT_S)
    app.process_events()


def result_of(widget):
    """The chosen output."""
    return widget.logic.getParameterNode().outputSegmentation


def segment_ids(node) -> list[str]:
    return list(node.GetSegmentation().GetSegmentIDs())


def outlines(scene):
    """The model node with the outlines; None without patches."""
    return scene.GetFirstNodeByName("NMSW patches")


def number_of_outlines(scene) -> int:
    return outlines(scene).GetPolyData().GetNumberOfCells() // 6


def visible_segments(node) -> dict[str, bool]:
    """What a user sees of a segmentation."""
    display = node.GetDisplayNode()
    return {name: bool(node.GetDisplayVisibility() and display.GetSegmentVisibility(name)) for name in segment_ids(node)}


def weak(node):
    """A reference that does not keep a node in memory; its Get() is None once the node is gone."""
    reference = vtk.vtkWeakReference()
    reference.Set(node)
    return reference


def is_freed(*references) -> bool:
    gc.collect()
    return all(reference.Get() is None for reference in references)


def hide_torch(monkeypatch) -> None:
    """Let the module find no PyTorch."""
    module = sys.modules["NMSWSegment"]
    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))


def node_names(scene, class_name: str) -> list[str]:
    return [scene.GetNthNodeByClass(index, class_name).GetName() for index in range(scene.GetNumberOfNodesByClass(class_name))]


def is_alive(pid: int) -> bool:
    """Whether a process runs; on Linux, one that ended and was not collected yet does not."""
    try:
        os.kill(pid, 0)
        return sys.platform != "linux" or "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False


def temporary_files() -> list[Path]:
    """What the module has left in the application's temporary folder."""
    return list(Path(slicer.app.temporaryPath).glob("NMSWSegment-*"))


def test_segment_click_shows_the_coarse_result_first_and_then_replaces_it(app, widget):
    seen = []

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def note(caller, event, node):  # looking at the scene now and then misses it where both results arrive at once
        seen.append(node.GetName())

    app.scene.AddObserver(app.scene.NodeAddedEvent, note)
    widget.ui.segmentButton.click()
    assert widget.ui.segmentButton.text == "Cancel"
    assert not widget.ui.volumeSection.enabled
    app.wait_until(lambda: not widget.segmenter.is_running, TIMEOUT_S)

    assert "NMSW coarse result" in seen
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == ["Phantom segmentation"]
    assert "Phantom segmentation" in seen
    assert node_names(app.scene, "vtkMRMLLabelMapVolumeNode") == []
    assert visible_segments(result_of(widget)) == {"liver": True, "spleen": True, "vertebrae": True}
    assert widget.ui.segmentButton.text == "Segment"
    assert widget.ui.volumeSection.enabled
    assert "2 of" in widget.ui.statusLabel.text
    assert app.dialogs == []


def test_result_lies_on_the_phantom_in_the_world_with_everything_that_belongs_to_it(app, widget):
    volume = widget.logic.getParameterNode().inputVolume
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(app.scene)
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "Study")
    hierarchy.CreateItem(study, volume)

    segment(app, widget)

    node = result_of(widget)
    assert segment_ids(node) == ["liver", "spleen", "vertebrae"]
    for name, (center_ras, _, _) in ORGANS.items():
        points = segment_points_ras(node, name)
        assert np.linalg.norm(points - center_ras, axis=1).min() < 6, name  # one voxel
    for name, other in (("liver", "spleen"), ("spleen", "vertebrae"), ("vertebrae", "spleen")):
        assert np.linalg.norm(segment_points_ras(node, name) - ORGANS[other][0], axis=1).min() > 6, (name, other)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) == study
    assert node.GetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole()) == volume.GetID()
    assert node.GetAttribute("NMSW.Bundle") == "tiny"
    assert (node.GetAttribute("NMSW.NumPatches"), node.GetAttribute("NMSW.PatchesRun"), node.GetAttribute("NMSW.Device")) == ("2", "2", "cpu")
    assert number_of_outlines(app.scene) == 2
    table = node.GetNodeReference("NMSW.Volumes")
    voxels = {table.GetCellText(row, 0): int(table.GetCellText(row, 2)) for row in range(table.GetNumberOfRows())}
    assert voxels["spleen"] == len(segment_points_ras(node, "spleen"))
    assert temporary_files() == [widget.segmenter.worker.folder]
    assert list(widget.segmenter.worker.folder.iterdir()) == []


def test_slider_after_a_run_updates_the_result_and_reuses_the_patches(app, widget):
    segment(app, widget)
    node = result_of(widget)
    for num_patches, reused in ((5, "2"), (3, "3"), (5, "5")):
        widget.ui.numPatchesSlider.value = num_patches
        app.wait_until(lambda: node.GetAttribute("NMSW.NumPatches") == str(num_patches), TIMEOUT_S)
        assert node.GetAttribute("NMSW.PatchesReused") == reused
        assert number_of_outlines(app.scene) == num_patches
        app.wait_until(lambda: not widget.segmenter.is_running)
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == ["Phantom segmentation"]


def test_slider_dragged_quickly_ends_at_the_last_value(app, widget):
    segment(app, widget)
    node = result_of(widget)
    for num_patches in (3, 9, 4, 8, 6):
        widget.ui.numPatchesSlider.value = num_patches
        app.process_events(seconds=0.3)
    app.wait_until(lambda: node.GetAttribute("NMSW.NumPatches") == "6" and not widget.segmenter.is_running, TIMEOUT_S)
    assert app.dialogs == []


def test_slider_leaves_edited_segments_alone(app, widget):
    segment(app, widget)
    node = result_of(widget)
    node.GetSegmentation().GetSegment("liver").SetName("my liver")

    widget.ui.numPatchesSlider.value = 4
    app.process_events(seconds=1)

    assert node.GetAttribute("NMSW.NumPatches") == "2"
    assert node.GetSegmentation().GetSegment("liver").GetName() == "my liver"


@pytest.mark.parametrize("replace", [True, False])
def test_segment_click_on_edited_segments_asks_before_it_replaces_them(app, widget, replace):
    segment(app, widget)
    mine = result_of(widget)
    mine.GetSegmentation().GetSegment("liver").SetName("my liver")
    app.answers.append(replace)

    segment(app, widget)

    assert (result_of(widget) is mine) == replace
    assert mine.GetSegmentation().GetSegment("liver").GetName() == ("liver" if replace else "my liver")
    assert len(node_names(app.scene, "vtkMRMLSegmentationNode")) == (1 if replace else 2)


def test_segment_click_again_on_an_unedited_result_replaces_it_without_a_question(app, widget):
    segment(app, widget)
    segment(app, widget)
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == ["Phantom segmentation"]


def test_cancel_answers_within_a_second_and_keeps_the_result_before(app, own_folder, tmp_path, monkeypatch):
    slow_down(monkeypatch, tmp_path, 3.0)  # a patch that takes longer than a person waits
    add_phantom(app.scene)
    widget = app.open_panel("NMSWSegment")
    node = widget.logic.getParameterNode()
    node.model, node.device, node.threads, node.numPatches = "tiny", "cpu", 1, 0
    segment(app, widget)
    before = segment_points_ras(result_of(widget), "liver")
    result_of(widget).GetDisplayNode().SetSegmentVisibility("spleen", False)
    node.liveUpdate = False
    node.numPatches = 4
    widget.ui.segmentButton.click()
    app.wait_until(lambda: app.scene.GetFirstNodeByName("NMSW coarse result"), TIMEOUT_S)
    assert not result_of(widget).GetDisplayVisibility()
    app.wait_until(lambda: "Selecting patches" in widget.ui.statusLabel.text, TIMEOUT_S)  # from here on the worker hears nothing until a patch is done
    pid = widget.segmenter.worker.pid

    started = time.perf_counter()
    widget.ui.segmentButton.click()
    app.wait_until(lambda: not widget.segmenter.is_running, 10)

    assert time.perf_counter() - started < 2  # CANCEL_MS and the work of the test
    assert widget.ui.segmentButton.text == "Segment"
    app.wait_until(lambda: not is_alive(pid), 10)
    assert temporary_files() == []
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == ["Phantom segmentation"]
    assert visible_segments(result_of(widget)) == {"liver": True, "spleen": False, "vertebrae": True}
    np.testing.assert_array_equal(segment_points_ras(result_of(widget), "liver"), before)
    assert result_of(widget).GetAttribute("NMSW.NumPatches") == "0"
    assert app.dialogs == []


def test_cancel_of_a_first_run_leaves_no_node(app, own_folder, tmp_path, monkeypatch):
    slow_down(monkeypatch, tmp_path, 0.2)
    widget = start_first_run(app)
    widget.ui.segmentButton.click()
    app.wait_until(lambda: not widget.segmenter.is_running, 10)

    assert node_names(app.scene, "vtkMRMLSegmentationNode") == []
    assert result_of(widget) is None
    assert "Cancelled" in widget.ui.statusLabel.text
    assert widget.segmenter.worker.is_alive, "between patches the worker hears the cancel and stays warm"


@pytest.mark.parametrize("victim", ["worker", "launcher"])
def test_killed_process_is_told_and_the_next_run_works(app, own_folder, tmp_path, monkeypatch, victim):
    slow_down(monkeypatch, tmp_path, 0.3)
    widget = start_first_run(app)
    pid = widget.segmenter.worker.pid
    os.kill(pid if victim == "worker" else widget.segmenter.worker._process.processId(), signal.SIGKILL)
    app.wait_until(lambda: not widget.segmenter.is_running, 10)

    assert "Click Segment to try again" in app.dialogs[-1].text
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == []
    app.wait_until(lambda: not is_alive(pid), 10)
    assert temporary_files() == []
    widget.logic.getParameterNode().numPatches = 1
    segment(app, widget)
    assert segment_ids(result_of(widget)) == ["liver", "spleen", "vertebrae"]


def test_closing_the_scene_in_a_run_gives_it_up(app, own_folder, tmp_path, monkeypatch):
    slow_down(monkeypatch, tmp_path, 0.3)
    widget = start_first_run(app)

    app.close_scene()
    app.process_events(seconds=1.5)

    assert widget.ui.segmentButton.text == "Segment"
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == []
    assert app.dialogs == []
    add_phantom(app.scene)
    widget.initializeParameterNode()
    widget.logic.getParameterNode().numPatches = 1
    widget.logic.getParameterNode().model = "tiny"
    segment(app, widget)
    assert len(segment_ids(result_of(widget))) == 3


def test_quitting_in_a_run_leaves_no_process_and_no_file(app, own_folder, tmp_path, monkeypatch):
    slow_down(monkeypatch, tmp_path, 5)
    widget = click_first_run(app)
    app.wait_until(lambda: widget.ui.statusLabel.text == "Selecting patches...", TIMEOUT_S)
    pid = widget.segmenter.worker.pid
    assert widget.segmenter.is_running
    assert is_alive(pid)

    app.close()

    app.wait_until(lambda: not is_alive(pid), 10)
    assert temporary_files() == []


@pytest.mark.parametrize("deleted", ["volume", "segmentation"])
def test_node_deleted_in_a_run_stops_it_at_once_with_one_sentence(app, own_folder, tmp_path, monkeypatch, deleted):
    slow_down(monkeypatch, tmp_path, 1)
    add_phantom(app.scene)
    widget = app.open_panel("NMSWSegment")
    node = widget.logic.getParameterNode()
    node.model, node.device, node.threads, node.numPatches = "tiny", "cpu", 1, 8
    node.outputSegmentation = app.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Output")
    widget.ui.segmentButton.click()
    app.wait_until(lambda: app.scene.GetFirstNodeByName("NMSW coarse result"), TIMEOUT_S)

    app.scene.RemoveNode(node.inputVolume if deleted == "volume" else node.outputSegmentation)

    assert not widget.segmenter.is_running
    app.process_events(seconds=1)
    assert app.scene.GetFirstNodeByName("NMSW coarse result") is None
    assert app.dialogs == []
    if deleted == "segmentation":
        assert widget.ui.statusLabel.text == "The output segmentation was deleted, so the run was stopped."
    else:
        assert "Choose an input volume" in widget.ui.statusLabel.text or "deleted" in widget.ui.statusLabel.text
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == (["Output"] if deleted == "volume" else [])


def test_scene_saved_in_a_run_is_in_order_when_it_is_loaded(app, own_folder, tmp_path, monkeypatch):
    slow_down(monkeypatch, tmp_path, 1)
    composite = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    add_phantom(app.scene)
    widget = app.open_panel("NMSWSegment")
    node = widget.logic.getParameterNode()
    node.model, node.device, node.threads, node.numPatches = "tiny", "cpu", 1, 0
    segment(app, widget)
    result_of(widget).GetDisplayNode().SetSegmentVisibility("spleen", False)
    node.liveUpdate, node.numPatches = False, 8
    widget.ui.segmentButton.click()
    app.wait_until(lambda: app.scene.GetFirstNodeByName("NMSW coarse result"), TIMEOUT_S)
    assert app.scene.GetNodeByID(composite.GetLabelVolumeID()).GetName() == "NMSW coarse result"
    assert not result_of(widget).GetDisplayVisibility()

    scene_file = app.save_scene(tmp_path / "saved")
    app.load_scene(scene_file)

    assert "<LabelMapVolume" not in scene_file.read_text(encoding="utf-8")
    composite = app.scene.GetFirstNodeByClass("vtkMRMLSliceCompositeNode")
    assert composite.GetLabelVolumeID() is None
    assert composite.GetLabelOpacity() == 1
    assert app.scene.GetFirstNodeByName("NMSW coarse result") is None
    assert visible_segments(result_of(widget)) == {"liver": True, "spleen": False, "vertebrae": True}
    assert widget.segmenter.is_untouched(result_of(widget))


def test_live_update_keeps_hidden_segments_hidden_and_segment_shows_all(app, widget):
    segment(app, widget)
    node = result_of(widget)
    node.GetDisplayNode().SetSegmentVisibility("liver", False)
    widget.ui.numPatchesSlider.value = 4
    app.wait_until(lambda: node.GetAttribute("NMSW.NumPatches") == "4" and not widget.segmenter.is_running, TIMEOUT_S)
    assert visible_segments(node) == {"liver": False, "spleen": True, "vertebrae": True}

    segment(app, widget)

    assert visible_segments(node) == {"liver": True, "spleen": True, "vertebrae": True}


def test_scene_comes_back_with_the_settings_of_the_panel(app, widget, tmp_path):
    segment(app, widget)
    node = widget.logic.getParameterNode()
    node.numPatches, node.policy, node.omittedStructures, node.threads, node.showPatches = 7, "top_k", ["spleen"], 3, False
    node.runtime, node.minIslandMl = "auto", 1.5
    scene_file = app.save_scene(tmp_path / "saved")
    app.close_scene()
    assert widget.logic.getParameterNode().numPatches == 10

    app.load_scene(scene_file)

    node = widget.logic.getParameterNode()
    assert (node.numPatches, node.policy, node.omittedStructures, node.threads, node.showPatches) == (7, "top_k", ["spleen"], 3, False)
    assert (node.inputVolume.GetName(), node.outputSegmentation.GetName()) == ("Phantom", "Phantom segmentation")
    assert (node.runtime, node.minIslandMl, widget.ui.runtimeComboBox.currentText, widget.ui.minIslandSpinBox.text) == (
        "auto",
        1.5,
        "Fastest of these",
        "1.5 ml",
    )
    assert (widget.ui.numPatchesSlider.value, widget.ui.policyComboBox.currentText, widget.ui.modelComboBox.currentData) == (7, "top_k", "tiny")
    assert widget.ui.structuresSection.text == "Structures: 2 of 3"
    assert node.outputSegmentation.GetAttribute("NMSW.Bundle") == "tiny"
    assert widget.segmenter.is_untouched(node.outputSegmentation), "its own result of another session, untouched"
    node.outputSegmentation.GetSegmentation().GetSegment("liver").SetName("my liver")
    assert not widget.segmenter.is_untouched(node.outputSegmentation)


def test_structures_and_region_of_interest_limit_the_result(app, widget):
    node = widget.logic.getParameterNode()
    widget.ui.noStructuresButton.click()
    assert not widget.ui.segmentButton.enabled
    assert "Select at least one" in widget.ui.statusLabel.text
    widget.ui.structuresSearchBox.text = "SPL"
    widget.ui.allStructuresButton.click()
    assert node.omittedStructures == ["liver", "vertebrae"]
    center_ras, radii_mm, _ = ORGANS["spleen"]
    roi = app.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "My box")
    roi.SetSize(*(4 * radius for radius in radii_mm))
    roi.SetCenter(center_ras[0] + 2 * radii_mm[0], center_ras[1], center_ras[2])  # its left face cuts the spleen in the middle
    node.regionOfInterest = roi

    segment(app, widget)

    assert segment_ids(result_of(widget)) == ["spleen"]
    points = segment_points_ras(result_of(widget), "spleen")
    assert points[:, 0].min() >= center_ras[0] - 1e-3
    assert len(points) > 20


def test_region_of_interest_that_is_empty_or_outside_is_told_before_a_run(app, widget):
    node = widget.logic.getParameterNode()
    node.regionOfInterest = app.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "Box")
    assert "empty" in widget.ui.statusLabel.text
    assert not widget.ui.segmentButton.enabled
    node.regionOfInterest.SetSize(10, 10, 10)
    node.regionOfInterest.SetCenter(5000, 0, 0)
    app.process_events()
    assert "outside the volume" in widget.ui.statusLabel.text
    assert not widget.ui.segmentButton.enabled
    node.regionOfInterest.SetCenter(0, 0, 0)
    app.process_events()
    assert widget.ui.segmentButton.enabled


def test_panel_without_a_volume_offers_the_sample(app):
    widget = app.open_panel("NMSWSegment")
    assert not widget.ui.segmentButton.enabled
    assert "Load sample CT" in widget.ui.statusLabel.text

    widget.ui.sampleButton.click()
    widget.ui.sampleButton.click()

    assert node_names(app.scene, "vtkMRMLScalarVolumeNode") == ["NMSWTorsoCT"]
    assert widget.ui.segmentButton.enabled
    assert "of 36 patches" in widget.ui.workLabel.text


def test_two_volumes_of_the_same_name_give_two_segmentations(app, widget):
    segment(app, widget)
    node = widget.logic.getParameterNode()
    node.inputVolume = add_phantom(app.scene)
    node.outputSegmentation = None
    segment(app, widget)
    names = node_names(app.scene, "vtkMRMLSegmentationNode")
    assert len(names) == len(set(names)) == 2
    assert result_of(widget).GetNodeReference(result_of(widget).GetReferenceImageGeometryReferenceRole()) is node.inputVolume


def test_volume_that_is_no_ct_is_told_in_red(app, widget):
    node = widget.logic.getParameterNode()
    node.inputVolume = add_volume(
        app.scene, np.arange(40 * 30 * 20, dtype=np.int16).reshape(40, 30, 20), ijk_to_ras=upright_ijk_to_ras((6.0, 6.0, 6.0), (40, 30, 20)), name="MR"
    )
    assert '<font color="red">' in widget.ui.workLabel.text
    assert "Hounsfield" in widget.ui.workLabel.text
    assert widget.ui.segmentButton.enabled


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_temporary_folder_that_cannot_be_written_is_told(app, widget):
    widget.segmenter.close()
    folder = Path(slicer.app.temporaryPath)
    folder.chmod(0o500)
    try:
        widget.ui.segmentButton.click()
    finally:
        folder.chmod(0o700)
    assert "Temporary directory" in app.dialogs[-1].text
    assert not widget.segmenter.is_running


def test_temporary_folder_that_cannot_be_made_is_told(app, widget, tmp_path, monkeypatch):
    widget.segmenter.close()
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(sys.modules["NMSWSegment.panel.worker_client"], "_parent_folder", lambda: str(tmp_path / "a file" / "folder"))
    widget.ui.segmentButton.click()
    assert "Temporary directory" in app.dialogs[-1].text
    assert not widget.segmenter.is_running
    assert widget.ui.segmentButton.enabled


def test_missing_torch_is_explained_with_and_without_internet(app, widget, monkeypatch):
    hide_torch(monkeypatch)
    app.install_fake_module("PyTorchUtils", None)

    widget.ui.segmentButton.click()

    assert "Extensions Manager" in app.dialogs[-1].text
    assert "pip_install" in app.dialogs[-1].text
    assert not widget.segmenter.is_running


def test_torch_that_was_not_installed_is_explained_in_a_sentence(app, widget, monkeypatch):
    class Logic:
        def installTorch(self, askConfirmation, torchVersionRequirement):
            raise ModuleNotFoundError("No module named 'torch'")  # what the extension does where the user declines or the download fails

    hide_torch(monkeypatch)
    app.install_fake_module("PyTorchUtils", SimpleNamespace(PyTorchUtilsLogic=Logic))

    widget.ui.segmentButton.click()

    (dialog,) = app.dialogs
    assert dialog.kind == "error"
    assert dialog.text.startswith("PyTorch, which runs the models, was not installed.")
    assert "proxy" in dialog.text
    assert "pip_install" in dialog.text
    assert dialog.detailedText == "ModuleNotFoundError: No module named 'torch'"
    assert not widget.segmenter.is_running


def test_own_model_can_be_added_chosen_and_removed(app, own_folder, a_tiny_bundle, tmp_path):
    from NMSWSegment.files.bundle import list_bundles, remove_bundle

    remove_bundle("tiny")
    widget = app.open_panel("NMSWSegment")
    assert not widget.ui.removeModelButton.enabled
    app.answers.append(str(a_tiny_bundle))
    widget.ui.addModelButton.click()
    assert widget.ui.modelComboBox.currentData == "tiny"
    assert widget.logic.getParameterNode().model == "tiny"
    assert [widget.ui.structuresList.item(row).text() for row in range(widget.ui.structuresList.count)] == ["liver", "spleen", "vertebrae"]

    app.answers.append(True)
    widget.ui.removeModelButton.click()
    assert "tiny" not in list_bundles()
    assert widget.ui.modelComboBox.currentData == "torso-unet"

    app.answers.append(str(tmp_path))
    widget.ui.addModelButton.click()
    assert "is not a bundle" in app.dialogs[-1].text


def test_overlays_follow_their_boxes(app, widget):
    segment(app, widget)
    assert outlines(app.scene).GetDisplayVisibility()
    widget.ui.showPatchesCheckBox.click()
    assert not outlines(app.scene).GetDisplayVisibility()
    widget.ui.showImportanceCheckBox.click()
    shown = volume_from_node(app.scene.GetFirstNodeByName("NMSW importance"))
    axes = shown.ijk_to_ras[:3, :3]
    np.testing.assert_allclose(axes / np.linalg.norm(axes, axis=0), np.eye(3), atol=1e-6)  # the model looks along the world axes
    assert 0 <= shown.array.min() < shown.array.max() == 1
    widget.ui.showImportanceCheckBox.click()
    assert node_names(app.scene, "vtkMRMLScalarVolumeNode") == ["Phantom"]
    surfaces = slicer.vtkSegmentationConverter.GetSegmentationClosedSurfaceRepresentationName()
    widget.ui.show3DCheckBox.click()
    app.wait_until(lambda: result_of(widget).GetSegmentation().ContainsRepresentation(surfaces), TIMEOUT_S)
    segments = result_of(widget).GetSegmentation()
    assert all(segments.GetNthSegment(index).GetRepresentation(surfaces).GetNumberOfPoints() > 0 for index in range(segments.GetNumberOfSegments()))
    widget.ui.show3DCheckBox.click()
    assert not result_of(widget).GetSegmentation().ContainsRepresentation(surfaces)


def test_leaving_the_panel_in_a_run_does_not_stop_it(app, widget):
    widget.ui.segmentButton.click()
    app.select_module("Data")
    app.wait_until(lambda: not widget.segmenter.is_running, TIMEOUT_S)
    assert len(segment_ids(result_of(widget))) == 3
    app.open_panel("NMSWSegment")
    assert widget.ui.volumesTable.visible


def test_reload_reads_the_library_again_and_ends_the_worker(app, widget):
    pid = widget.segmenter.worker.pid
    before = sys.modules["NMSWSegment.protocol"]

    widget.onReload()

    assert sys.modules["NMSWSegment.protocol"] is not before
    assert sys.modules["NMSWSegment"].SegmentOptions is sys.modules["NMSWSegment.protocol"].SegmentOptions
    app.wait_until(lambda: not is_alive(pid), 10)
    app.wait_until(lambda: slicer.modules.NMSWSegmentWidget.segmenter.worker.pid not in (None, pid), TIMEOUT_S, message="a new worker, as the panel is open")


def test_self_tests_without_torch_are_skipped_with_the_reason(app, widget, monkeypatch):
    hide_torch(monkeypatch)
    with contextlib.suppress(unittest.SkipTest):  # which would let pytest skip this test
        widget.onTest()
    assert [(dialog.kind, dialog.text.partition(",")[0]) for dialog in app.dialogs] == [("delay", "PyTorch is not installed")]
    result = unittest.TestResult()
    unittest.TestLoader().loadTestsFromTestCase(sys.modules["NMSWSegment"].NMSWSegmentTest).run(result)  # as CTest runs them
    assert result.wasSuccessful() and len(result.skipped) == result.testsRun > 0


def test_self_tests_of_the_module_pass_outside_the_application_too(app):
    sys.modules["NMSWSegment"].NMSWSegmentTest().runTest()
    assert {dialog.kind for dialog in app.dialogs} == {"delay"}


# What a clinician does between two clicks


def test_volumes_and_results_leave_the_memory_with_the_scene(app, widget):
    node = widget.logic.getParameterNode()
    node.regionOfInterest = app.scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "Box")
    node.regionOfInterest.SetSize(500, 500, 500)
    segment(app, widget)
    segment(app, widget)
    references = [weak(node.inputVolume), weak(node.outputSegmentation), weak(node.regionOfInterest)]
    node.inputVolume = add_phantom(app.scene, name="Other")
    references.append(weak(node.inputVolume))
    assert not is_freed(references[0])

    app.close_scene()

    assert is_freed(*references)


def test_volume_and_result_that_are_deleted_leave_the_memory_at_once(app, widget):
    node = widget.logic.getParameterNode()
    segment(app, widget)
    widget.ui.show3DCheckBox.click()
    app.wait_until(lambda: node.outputSegmentation.GetSegmentation().ContainsRepresentation("Closed surface"), TIMEOUT_S)
    references = [weak(node.inputVolume), weak(node.outputSegmentation)]
    node.inputVolume = add_phantom(app.scene, name="Other")

    for reference in references:
        app.scene.RemoveNode(reference.Get())
    app.process_events(0.1)

    assert is_freed(*references)


def test_table_is_there_after_a_scene_was_loaded_with_the_panel_open(app, widget, tmp_path):
    segment(app, widget)
    scene_file = app.save_scene(tmp_path / "saved")
    app.load_scene(scene_file)
    table = result_of(widget).GetNodeReference("NMSW.Volumes")
    assert widget.ui.volumesTable.mrmlTableNode() is table
    assert widget.ui.volumesTable.model().rowCount() == table.GetNumberOfRows() == 3


def test_table_keeps_its_selection_while_settings_change(app, widget):
    segment(app, widget)
    widget.ui.volumesTable.selectRow(1)
    widget.ui.minIslandSpinBox.value = 3
    assert {index.row() for index in widget.ui.volumesTable.selectionModel().selectedIndexes} == {1}


def test_importance_map_goes_with_its_volume_and_is_no_input(app, widget):
    segment(app, widget)
    widget.ui.showImportanceCheckBox.click()
    node = widget.logic.getParameterNode()
    volume, importance_map = node.inputVolume, app.scene.GetFirstNodeByName("NMSW importance")

    node.inputVolume = importance_map
    assert not widget.ui.segmentButton.enabled
    assert widget.ui.statusLabel.text == "The input is the importance map of an earlier run, not an image. Choose the CT volume that it belongs to."
    node.inputVolume = volume
    assert widget.ui.segmentButton.enabled
    app.scene.RemoveNode(volume)
    app.process_events()

    assert node.inputVolume is None and "Choose an input volume" in widget.ui.statusLabel.text
    assert node_names(app.scene, "vtkMRMLScalarVolumeNode") == [] and outlines(app.scene) is None
    assert not widget.ui.segmentButton.enabled


def test_overlays_of_a_volume_under_a_nonlinear_transform_are_refused_in_a_sentence(app, widget):
    segment(app, widget)
    node = widget.logic.getParameterNode()
    widget.ui.showImportanceCheckBox.click()
    warp = vtk.vtkThinPlateSplineTransform()
    transform = app.scene.AddNewNodeByClass("vtkMRMLTransformNode", "Warp")
    transform.SetAndObserveTransformToParent(warp)
    node.inputVolume.SetAndObserveTransformNodeID(transform.GetID())

    widget.ui.showPatchesCheckBox.click()
    app.process_events()

    assert [dialog.kind for dialog in app.dialogs] == ["error"]
    assert app.dialogs[0].text.startswith("The volume 'Phantom' is under the non-linear transform 'Warp'. Harden the transform")
    assert app.scene.GetFirstNodeByName("NMSW importance") is None
    assert not widget.ui.showImportanceCheckBox.checked


def test_box_3d_with_an_empty_output_waits_for_the_result(app, widget):
    widget.ui.outputSegmentationSelector.addNode()
    widget.ui.show3DCheckBox.click()
    app.process_events(0.1)
    assert "3D" not in widget.ui.logTextEdit.plainText
    assert widget._surfacesTask is None
    segment(app, widget)
    app.wait_until(lambda: result_of(widget).GetSegmentation().ContainsRepresentation("Closed surface"), TIMEOUT_S)


def test_model_that_a_scene_names_runs_only_if_the_list_shows_it(app, widget):
    widget.logic.getParameterNode().model = "/somewhere/else/evil"
    assert widget.ui.modelComboBox.currentData == widget.logic.getParameterNode().model == "torso-unet"
    assert "'/somewhere/else/evil' is not on this computer; 'torso-unet' takes its place." in widget.ui.logTextEdit.plainText
    widget.logic.getParameterNode().model = "tiny"
    assert widget.ui.modelComboBox.currentData == widget.logic.getParameterNode().model == "tiny"


def test_device_that_this_computer_lacks_becomes_automatic_also_in_a_scene_that_comes_later(app, widget):
    widget.logic.getParameterNode().device = "cuda:7"
    assert widget.ui.deviceComboBox.currentData == widget.logic.getParameterNode().device == "auto"


def test_volume_that_changes_in_a_run_gets_no_result(app, widget):
    volume = widget.logic.getParameterNode().inputVolume
    widget.ui.segmentButton.click()
    volume_from_node(volume).array[:] = -1000
    volume.GetImageData().GetPointData().GetScalars().Modified()
    app.wait_until(lambda: not widget.segmenter.is_running, TIMEOUT_S)
    app.process_events()
    assert [dialog.text for dialog in app.dialogs] == ["The volume 'Phantom' was moved or changed during the run. Segment it again."]
    assert result_of(widget) is None and node_names(app.scene, "vtkMRMLSegmentationNode") == []
    app.dialogs.clear()


def test_live_update_stays_with_the_volume_that_was_segmented(app, widget):
    segment(app, widget)
    node = widget.logic.getParameterNode()
    volume, other = node.inputVolume, add_phantom(app.scene, name="Other")
    widget.ui.numPatchesSlider.value = 3
    app.wait_until(lambda: widget.segmenter.is_running, TIMEOUT_S)
    node.inputVolume = other
    app.wait_until(lambda: not widget.segmenter.is_running, TIMEOUT_S)
    widget.ui.numPatchesSlider.value = 4
    app.process_events(seconds=1)
    assert not widget.segmenter.is_running and result_of(widget).GetAttribute("NMSW.NumPatches") == "3"
    assert result_of(widget).GetNodeReference(slicer.vtkMRMLSegmentationNode.GetReferenceImageGeometryReferenceRole()) is volume


def test_table_of_edited_segments_says_so(app, widget):
    segment(app, widget)
    assert not widget.ui.volumesTable.isHidden() and widget.ui.editedLabel.isHidden()
    result_of(widget).GetSegmentation().GetNthSegment(0).SetName("renamed")
    widget.exit()
    widget.enter()
    assert not widget.ui.volumesTable.isHidden() and not widget.ui.editedLabel.isHidden()


def test_new_region_of_interest_is_the_whole_volume(app, widget):
    widget.ui.regionOfInterestSelector.addNode("vtkMRMLMarkupsROINode")
    node, expected, found = widget.logic.getParameterNode(), [0.0] * 6, [0.0] * 6
    node.inputVolume.GetRASBounds(expected)
    node.regionOfInterest.GetRASBounds(found)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert widget.ui.segmentButton.enabled


def test_k_outlasts_a_volume_that_has_fewer_patches(app, widget):
    node = widget.logic.getParameterNode()
    large, node.numPatches = node.inputVolume, 6
    node.inputVolume = add_phantom(app.scene, name="Small", shape=(14, 15, 16))
    assert "4 of 4 patches" in widget.ui.workLabel.text
    node.inputVolume = large
    assert node.numPatches == widget.ui.numPatchesSlider.value == 6


def test_first_volume_that_is_chosen_is_no_labelmap(app):
    app.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "Labels")
    volume = add_phantom(app.scene)
    assert app.open_panel("NMSWSegment").logic.getParameterNode().inputVolume is volume


def test_model_folder_is_taken_once_it_is_a_folder(app, widget, tmp_path):
    widget.ui.bundlesFolderLineEdit.currentPath = str(tmp_path / "not there yet")
    app.process_events(seconds=1)
    assert widget.ui.modelComboBox.findData("tiny") >= 0 and widget.segmenter.worker.is_alive
    (tmp_path / "empty").mkdir()
    widget.ui.bundlesFolderLineEdit.currentPath = str(tmp_path / "empty")
    app.wait_until(lambda: widget.ui.modelComboBox.findData("tiny") < 0, TIMEOUT_S)
    assert widget.logic.getParameterNode().model == "torso-unet"


def test_new_segmentation_that_is_deleted_while_the_result_enters_it_stops_the_run(app, widget, monkeypatch):
    from PySide6.QtCore import QTimer

    from NMSWSegment.panel import result

    def deleting(segmentation_node, *arguments, **options):
        QTimer.singleShot(0, lambda: app.scene.RemoveNode(segmentation_node))
        while segmentation_node.GetScene() is not None:
            yield

    monkeypatch.setattr(result, "import_steps", deleting)
    widget.ui.segmentButton.click()
    app.wait_until(lambda: not widget.segmenter.is_running, TIMEOUT_S)
    app.process_events()
    assert app.dialogs == []
    assert "The output segmentation was deleted, so the run was stopped." in widget.ui.statusLabel.text


def test_clone_keeps_its_own_table(app, widget):
    from NMSWSegment.panel.nodes import VOLUMES_ROLE

    segment(app, widget)
    original = result_of(widget)
    table = original.GetNodeReference(VOLUMES_ROLE)
    clone = app.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Clone")
    clone.SetNodeReferenceID(VOLUMES_ROLE, table.GetID())
    segment(app, widget)
    assert clone.GetNodeReference(VOLUMES_ROLE) is table and original.GetNodeReference(VOLUMES_ROLE) is not table


def test_surfaces_that_a_segmentation_consists_of_outlast_the_box_3d(app, widget):
    from NMSWSegment.panel.surfaces import hide_surfaces, reveal_surfaces

    source = vtk.vtkSphereSource()
    source.Update()
    segmentation_node = app.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "From STL")
    segmentation_node.CreateDefaultDisplayNodes()
    segmentation_node.GetSegmentation().SetSourceRepresentationName("Closed surface")
    segmentation_node.AddSegmentFromClosedSurfaceRepresentation(source.GetOutput(), "ball", [1, 0, 0])
    hide_surfaces(segmentation_node)
    assert segmentation_node.GetSegmentation().ContainsRepresentation("Closed surface") and not segmentation_node.GetDisplayNode().GetVisibility3D()
    reveal_surfaces(segmentation_node)
    assert segmentation_node.GetDisplayNode().GetVisibility3D()


def test_worker_that_cannot_load_torch_says_why_it_ended(app, own_folder, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise OSError('c10.dll cannot be loaded')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    widget = click_first_run(app)
    app.wait_until(lambda: app.dialogs, TIMEOUT_S)
    assert app.dialogs[-1].text == "PyTorch cannot be loaded (c10.dll cannot be loaded). Install it with the extension PyTorch, then restart."
    assert not widget.segmenter.is_running
    app.dialogs.clear()
