"""Segment all volumes of the scene: one after the other, a bad one stops no other, a cancel keeps what is finished."""

import os
import signal

import numpy as np
import pytest

pytest.importorskip("PySide6.QtWidgets", reason="PySide6 cannot be loaded, so that there is nothing to click", exc_type=ImportError)
from slicer_headless import add_volume, no_vtk_errors, slicer  # noqa: E402
from test_panel_flow import (  # noqa: E402
    TIMEOUT_S,
    add_phantom,
    app,  # noqa: F401
    node_names,
    own_folder,  # noqa: F401
    result_of,
    segment,
    segment_ids,
    slow_down,
    widget,  # noqa: F401
)

from NMSWSegment.files.phantoms import upright_ijk_to_ras  # noqa: E402
from NMSWSegment.panel.volume_batch import BatchVolume, VolumeBatch, volumes_of_scene  # noqa: E402
from NMSWSegment.protocol import SegmentOptions  # noqa: E402

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)


def add_uniform(scene, *, name: str):
    """A volume in which there is nothing to segment."""
    return add_volume(scene, np.zeros((20, 30, 40), np.int16), ijk_to_ras=upright_ijk_to_ras((6.0, 6.0, 6.0), (20, 30, 40)), name=name)


def click_all(app, widget) -> None:  # noqa: F811
    """Click the button and say yes."""
    app.answers.append(True)
    widget.ui.segmentAllButton.click()


def started_batch(app):  # noqa: F811
    """The panel, with three volumes in the scene that are being segmented."""
    for name in ("First", "Second", "Third"):
        add_phantom(app.scene, name=name)
    panel = app.open_panel("NMSWSegment")
    node = panel.logic.getParameterNode()
    node.model, node.device, node.threads, node.numPatches = "tiny", "cpu", 1, 2
    click_all(app, panel)
    return panel


def wait_for_end(app, widget) -> None:  # noqa: F811
    """Let the application run until the last volume had its turn."""
    app.wait_until(lambda: "volumes were segmented" in widget.ui.statusLabel.text, 2 * TIMEOUT_S)
    app.process_events()


def test_batch_gives_each_volume_one_turn_and_none_after_a_cancel():
    batch = VolumeBatch([BatchVolume("1", "A"), BatchVolume("2", "B"), BatchVolume("3", "C"), BatchVolume("4", "D")], SegmentOptions())
    assert batch.next().name == "A"
    assert (batch.number, batch.total, batch.fraction(0.5)) == (1, 4, 0.125)
    batch.done("S1")
    assert batch.next().name == "B"
    batch.failed("empty")
    assert batch.next().name == "C"
    assert (batch.number, batch.fraction(1.0)) == (3, 0.75)
    batch.cancel()
    assert batch.next() is None
    assert (batch.results, batch.failures, batch.is_cancelled) == (["S1"], [("B", "empty")], True)


def test_volumes_of_the_scene_are_those_of_the_list_of_input_volumes(app):  # noqa: F811
    add_phantom(app.scene, name="CT")
    app.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "Labels")
    add_uniform(app.scene, name="NMSW importance").SetAttribute("NMSW.Importance", "1")
    add_uniform(app.scene, name="Hidden").SetHideFromEditors(True)
    assert [volume.name for volume in volumes_of_scene(app.scene)] == ["CT"]


def test_all_volumes_are_segmented_and_a_bad_one_is_told_at_the_end(app, widget):  # noqa: F811
    add_uniform(app.scene, name="Empty")
    add_phantom(app.scene, name="Second", shape=(40, 36, 52))
    bars, lines = [], []
    click_all(app, widget)
    assert app.dialogs[-1].text.startswith("Segment 3 volumes one after the other, with the settings of the panel?\n\nPhantom\nEmpty\nSecond\n\n")
    assert widget.ui.segmentButton.text == "Cancel"
    assert not widget.ui.advancedSection.enabled
    while widget._batch is not None:
        bars.append(widget.ui.progressBar.value)
        lines.append(widget.ui.statusLabel.text)
        app.process_events(0.01)
    app.process_events()

    assert node_names(app.scene, "vtkMRMLSegmentationNode") == ["Phantom segmentation", "Second segmentation"]
    for name in ("Phantom", "Second"):
        node = app.scene.GetFirstNodeByName(f"{name} segmentation")
        assert segment_ids(node) == ["liver", "spleen", "vertebrae"]
        assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()).GetName() == name
        assert node.GetAttribute("NMSW.NumPatches") == "2"
        assert bool(node.GetDisplayVisibility()) == (name == "Second")  # the views show one volume
    assert bars == sorted(bars)
    assert any(line.startswith("1 of 3, Phantom: ") for line in lines)
    assert any(line.startswith("3 of 3, Second: ") for line in lines)
    assert widget.ui.statusLabel.text == "2 of 3 volumes were segmented."
    assert (widget.ui.segmentButton.text, widget.ui.segmentButton.enabled, widget.ui.advancedSection.enabled) == ("Segment", True, True)
    assert app.dialogs[-1].kind == "warning"
    assert app.dialogs[-1].text.startswith("2 of 3 volumes were segmented. Not segmented:\n\nEmpty: All voxels of the input volume have the value 0")
    assert result_of(widget).GetName() == "Second segmentation"
    shown = [arguments["background"].GetName() for function, arguments in app.views if function == "setSliceViewerLayers"]
    assert shown == ["Phantom", "Second"]


def test_cancel_stops_the_rest_and_keeps_what_is_finished(app, own_folder, tmp_path, monkeypatch):  # noqa: F811
    slow_down(monkeypatch, tmp_path, 0.5)
    panel = started_batch(app)
    app.wait_until(lambda: panel.ui.statusLabel.text.startswith("2 of 3, Second: Patch"), TIMEOUT_S)

    panel.ui.segmentButton.click()
    wait_for_end(app, panel)

    assert panel.ui.statusLabel.text == "Cancelled. 1 of 3 volumes were segmented."
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == ["First segmentation"]
    assert app.dialogs[-1].kind == "question"
    assert panel.ui.segmentButton.text == "Segment"


def test_killed_process_and_a_deleted_volume_stop_no_other(app, own_folder, tmp_path, monkeypatch):  # noqa: F811
    slow_down(monkeypatch, tmp_path, 0.3)
    panel = started_batch(app)
    app.wait_until(lambda: panel.ui.statusLabel.text.startswith("1 of 3, First: Patch"), TIMEOUT_S)
    app.scene.RemoveNode(app.scene.GetFirstNodeByName("Second"))
    os.kill(panel.segmenter.worker.pid, signal.SIGKILL)
    wait_for_end(app, panel)

    assert panel.ui.statusLabel.text == "1 of 3 volumes were segmented."
    assert node_names(app.scene, "vtkMRMLSegmentationNode") == ["Third segmentation"]
    (warning,) = [dialog.text for dialog in app.dialogs if dialog.kind != "question"]
    assert "First: The segmentation process ended unexpectedly" in warning
    assert "Second: It was deleted before its turn." in warning


def test_batch_waits_for_the_end_of_a_live_update(app, own_folder, tmp_path, monkeypatch):  # noqa: F811
    slow_down(monkeypatch, tmp_path, 0.5)
    add_phantom(app.scene)
    panel = app.open_panel("NMSWSegment")
    node = panel.logic.getParameterNode()
    node.model, node.device, node.threads, node.numPatches = "tiny", "cpu", 1, 0
    segment(app, panel)
    panel.ui.numPatchesSlider.value = 2
    app.wait_until(lambda: panel.segmenter.is_running, TIMEOUT_S)
    assert panel.ui.advancedSection.enabled and not panel.ui.segmentAllButton.enabled
    with pytest.raises(Exception, match="Cancel it or wait"):
        panel.segmentVolumes(volumes_of_scene(app.scene))
    assert panel._batch is None

    app.wait_until(lambda: not panel.segmenter.is_running, TIMEOUT_S)
    app.process_events()
    assert panel.ui.segmentAllButton.enabled and result_of(panel).GetAttribute("NMSW.NumPatches") == "2"


@pytest.mark.parametrize("answer", [True, False])
def test_live_update_does_not_start_behind_the_question(app, widget, answer):  # noqa: F811
    segment(app, widget)
    seen = []

    def answer_late(question):
        app.process_events(seconds=0.6)  # a dialog has an event loop of its own
        seen.append((widget.segmenter.is_running, result_of(widget).GetAttribute("NMSW.NumPatches")))
        return answer

    app.answers.append(answer_late)
    widget.ui.numPatchesSlider.value = 3
    widget.ui.segmentAllButton.click()

    assert seen == [(False, "2")]
    if answer:
        wait_for_end(app, widget)
        assert widget.ui.statusLabel.text == "1 of 1 volumes were segmented."
    else:
        app.wait_until(lambda: result_of(widget).GetAttribute("NMSW.NumPatches") == "3", TIMEOUT_S)
        app.wait_until(lambda: not widget.segmenter.is_running, TIMEOUT_S)


def test_batch_needs_volumes_structures_and_a_yes(app, widget):  # noqa: F811
    app.answers.append(False)
    widget.ui.segmentAllButton.click()
    assert not widget.segmenter.is_running
    widget.ui.noStructuresButton.click()
    widget.ui.segmentAllButton.click()
    assert app.dialogs[-1].text == "No structure is selected. Select at least one."
    app.scene.RemoveNode(app.scene.GetFirstNodeByName("Phantom"))
    widget.ui.segmentAllButton.click()
    assert app.dialogs[-1].text.startswith("There is no volume in the scene")
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []
