"""The section "Advanced" of the panel, by clicks: what computes, small islands."""

import importlib.util

import numpy as np
import pytest

pytest.importorskip("PySide6.QtWidgets", reason="PySide6 cannot be loaded, so that there is nothing to click", exc_type=ImportError)
from slicer_headless import no_vtk_errors, slicer  # noqa: E402
from test_panel_flow import TIMEOUT_S, app, own_folder, result_of, segment, widget  # noqa: E402, F401

from NMSWSegment.engine.net_runtimes import possible_runtimes  # noqa: E402

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)


@pytest.fixture(autouse=True)
def a_cache(tmp_path, monkeypatch):
    """A cache of the test's own, in which no choice of a runtime is remembered."""
    monkeypatch.setenv("NMSW_CACHE", str(tmp_path / "cache"))


def entries(combo_box) -> list[str]:
    """The values that can be chosen."""
    return [combo_box.itemData(row) for row in range(combo_box.count)]


def test_runtimes_are_those_of_this_computer_and_the_default_is_exact(app, widget):  # noqa: F811
    assert entries(widget.ui.runtimeComboBox) == ["exact", *possible_runtimes(), "auto"]
    assert (widget.logic.getParameterNode().runtime, widget.ui.runtimeComboBox.currentText) == ("exact", "PyTorch (float32)")
    assert widget.ui.installOpenvinoButton.enabled == ("openvino" not in possible_runtimes())


def test_runtime_that_is_chosen_computes_and_is_told_with_the_result(app, widget):  # noqa: F811
    segment(app, widget)
    assert result_of(widget).GetAttribute("NMSW.Runtime") == "exact"
    assert "The local network ran in" not in widget.ui.logTextEdit.plainText

    widget.ui.runtimeComboBox.currentIndex = widget.ui.runtimeComboBox.findData("auto")
    assert widget.logic.getParameterNode().runtime == "auto"
    result_of(widget).SetAttribute("NMSW.Runtime", "")
    app.process_events(seconds=0.5)
    assert result_of(widget).GetAttribute("NMSW.Runtime") == "", "another runtime is no change of k, which a live update follows"
    segment(app, widget)

    assert result_of(widget).GetAttribute("NMSW.Runtime") in ("exact", *possible_runtimes())
    assert "The local network ran in" in widget.ui.logTextEdit.plainText
    assert app.dialogs == []


def test_runtime_of_a_scene_that_this_computer_lacks_becomes_exact(app, widget):  # noqa: F811
    node = widget.logic.getParameterNode()
    node.runtime = "openvino-bf16"
    widget._on_devices({"devices": {"cpu": "CPU"}, "runtimes": {"exact": "PyTorch (float32)"}, "torch": "2.2"})
    assert widget.logic.getParameterNode().runtime == widget.ui.runtimeComboBox.currentData == "exact"


@pytest.mark.parametrize("answer", [False, True])
def test_openvino_is_installed_only_with_consent_and_a_new_worker_looks_for_it(app, widget, monkeypatch, answer):  # noqa: F811
    find_spec, installed, pid = importlib.util.find_spec, [], widget.segmenter.worker.pid
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (object() if installed else None) if name == "openvino" else find_spec(name))
    monkeypatch.setattr(slicer.util, "pip_install", installed.append)
    app.answers.append(answer)
    widget._on_devices({"devices": {"cpu": "CPU"}, "runtimes": {"exact": "PyTorch (float32)"}, "torch": "2.2"})  # whatever is installed here

    widget.ui.installOpenvinoButton.click()
    app.wait_until(lambda: widget.segmenter.worker.pid is not None, TIMEOUT_S)

    assert installed == (["openvino>=2024.1"] if answer else [])
    assert (widget.segmenter.worker.pid != pid) == answer
    if not answer:
        assert app.dialogs[-1].text.startswith("The Python package openvino was not installed")


def test_islands_below_the_size_are_removed_and_the_size_is_written_on_the_result(app, widget):  # noqa: F811
    node = widget.logic.getParameterNode()
    segment(app, widget)
    assert result_of(widget).GetAttribute("NMSW.MinIslandMl") == "0"
    array = slicer.util.arrayFromVolume(node.inputVolume)
    k, j, i = np.argwhere(voxels(widget, "liver")).mean(axis=0).astype(int)
    array[k - 2 : k + 3, j - 2 : j + 3, i - 2 : i + 3] = np.median(array[voxels(widget, "spleen")])  # 125 voxels of 6 mm: 27 ml of spleen in the liver
    slicer.util.arrayFromVolumeModified(node.inputVolume)

    segment(app, widget)
    assert voxels(widget, "spleen")[k, j, i]
    widget.ui.minIslandSpinBox.value = 90
    assert node.minIslandMl == 90
    segment(app, widget)

    assert not voxels(widget, "spleen")[k, j, i]
    assert voxels(widget, "spleen").sum() > 1000  # the spleen itself
    assert result_of(widget).GetAttribute("NMSW.MinIslandMl") == "90"


def voxels(widget, name: str) -> np.ndarray:  # noqa: F811
    """The voxels of a segment of the result, (K, J, I)."""
    return slicer.util.arrayFromSegmentBinaryLabelmap(result_of(widget), name, widget.logic.getParameterNode().inputVolume) > 0
