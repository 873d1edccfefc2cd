"""standins/: they refuse what the application does not have, and otherwise behave as PythonQt, MRML and Slicer's Python do."""

import enum
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import pytest

try:
    import PySide6.QtUiTools  # noqa: F401
    import slicer
except ImportError as error:
    pytest.skip(f"The stand-ins need PySide6 and slicer-core: {error}", allow_module_level=True)

from slicer_headless import OBLIQUE_IJK_TO_RAS, add_volume, no_vtk_errors
from standins.application import Application

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)

ARRAY = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4) - 7
MODULE = """
import slicer
from slicer.i18n import tr as _
from slicer.ScriptedLoadableModule import ScriptedLoadableModule, ScriptedLoadableModuleLogic, ScriptedLoadableModuleTest, ScriptedLoadableModuleWidget

class Tiny(ScriptedLoadableModule):
    def __init__(self, parent):
        super().__init__(parent)
        parent.title = _("Tiny module")
        parent.categories = ["Segmentation"]
        slicer.app.connect("startupCompleted()", lambda: events.append("startup"))

events = []

class TinyWidget(ScriptedLoadableModuleWidget):
    def setup(self):
        super().setup()
        self.logic = TinyLogic()
        events.append("setup")
    def enter(self): events.append("enter")
    def exit(self): events.append("exit")
    def cleanup(self): events.append("cleanup")

class TinyLogic(ScriptedLoadableModuleLogic):
    pass

class TinyTest(ScriptedLoadableModuleTest):
    def runTest(self):
        self.delayDisplay("tested")
"""
FORM = """<?xml version="1.0" encoding="UTF-8"?>
<ui version="4.0"><class>Form</class><widget class="qMRMLWidget" name="Form"><layout class="QVBoxLayout" name="layout">
<item><widget class="qMRMLNodeComboBox" name="selector">
 <property name="nodeTypes"><stringlist><string>vtkMRMLScalarVolumeNode</string></stringlist></property>
 <property name="noneEnabled"><bool>true</bool></property>
 <property name="SlicerParameterName" stdset="0"><string>volume</string></property></widget></item>
<item><widget class="ctkSliderWidget" name="slider"><property name="SlicerParameterName" stdset="0"><string>amount</string></property></widget></item>
<item><widget class="ctkPathLineEdit" name="path"><property name="filters"><set>ctkPathLineEdit::Dirs|ctkPathLineEdit::Drives</set></property>
</widget></item></layout></widget>
<connections><connection><sender>Form</sender><signal>mrmlSceneChanged(vtkMRMLScene*)</signal>
<receiver>selector</receiver><slot>setMRMLScene(vtkMRMLScene*)</slot></connection></connections></ui>
"""


class Policy(enum.Enum):
    GREEDY = 1
    RANDOM = 2


@pytest.fixture
def app():
    with Application() as application:
        yield application


@pytest.fixture
def qt(app):
    return sys.modules["qt"]


@pytest.fixture
def ctk(app):
    return sys.modules["ctk"]


@pytest.fixture
def wrapper(app):
    """A parameter node wrapper class of most types."""
    from slicer.parameterNodeWrapper import Choice, WithinRange, parameterNodeWrapper

    @parameterNodeWrapper
    class Parameters:
        volume: slicer.vtkMRMLScalarVolumeNode
        amount: Annotated[float, WithinRange(-2, 50)] = 10
        count: int = 3
        isOn: bool = True
        text: str = "a"
        where: Path = Path("x")
        device: Annotated[str, Choice(["cpu", "cuda"])] = "cuda"
        policy: Policy = Policy.RANDOM
        names: list[str]
        pair: tuple[int, float] = (2, 0.5)
        maybe: Optional[int] = None

    return Parameters


def parameter_node(name="Test"):
    """The node that a wrapper is upon."""
    logic = sys.modules["slicer.ScriptedLoadableModule"].ScriptedLoadableModuleLogic()
    logic.moduleName = name
    return logic.getParameterNode()


def write_module(folder: Path) -> Path:
    (folder / "Tiny.py").write_text(MODULE, encoding="utf-8")
    return folder / "Tiny.py"


def world_values(node) -> dict[tuple[float, ...], int]:
    """Voxel value at each world point in mm: readers may turn the axes of a mirrored volume."""
    matrix = slicer.util.vtkMatrixFromArray(np.eye(4))
    node.GetIJKToRASMatrix(matrix)
    array = slicer.util.arrayFromVolume(node)
    points = np.c_[np.argwhere(np.ones(array.shape))[:, ::-1], np.ones(array.size)] @ slicer.util.arrayFromVTKMatrix(matrix).T
    return {tuple(point.round(3).tolist()): value for point, value in zip(points[:, :3] + 0.0, array.ravel().tolist())}


# Refusals


@pytest.mark.parametrize("refused", ["combo.foo", "combo.setObjectNames()", "combo.labelDrawingMode", "qt.QComboBox.foo", "qt.QTreeBogus", "slicer.app.foo"])
def test_unknown_name_read_or_called_is_refused(qt, refused):
    with pytest.raises(AttributeError, match="in Slicer"):
        eval(refused, {"qt": qt, "combo": qt.QComboBox(), "slicer": slicer})


@pytest.mark.parametrize(("name", "value"), [("foo", 1), ("setText", 1), ("text", 5), ("text", None), ("enabled", "yes")])
def test_attribute_set_that_is_no_property_or_of_another_type_is_refused(qt, name, value):
    with pytest.raises(AttributeError):
        setattr(qt.QPushButton("x"), name, value)


def test_read_only_property_set_is_refused(qt):
    with pytest.raises(AttributeError, match="read only"):
        qt.QComboBox().count = 3


def test_property_called_like_a_function_is_a_type_error(qt):
    with pytest.raises(TypeError, match="not callable"):
        qt.QPushButton("x").text()


def test_keyword_arguments_are_refused(qt):
    with pytest.raises(TypeError, match="keyword"):
        qt.QLabel().setText(text="x")


def test_unknown_signal_is_refused_and_names_the_known_ones(qt):
    with pytest.raises(AttributeError, match=r"clicked\(bool\)"):
        qt.QPushButton().connect("clicked(int)", print)
    with pytest.raises(AttributeError, match="no signal"):
        qt.QCheckBox().connect("checkStateChanged(Qt::CheckState)", print)  # Qt 6.7, not in the application


def test_enum_value_by_its_type_is_refused(qt):
    with pytest.raises(AttributeError, match="sits on the class"):
        print(qt.Qt.CheckState.Checked)


def test_overriding_a_virtual_function_of_qt_is_refused(qt):
    with pytest.raises(NotImplementedError, match="closeEvent"):
        type("Mine", (qt.QWidget,), {"closeEvent": lambda self, event: None})


def test_python_class_upon_a_widget_may_have_attributes(qt):
    mine = type("Mine", (qt.QLabel,), {})("x")

    mine.foo = 3

    assert (mine.foo, mine.text) == (3, "x")
    with pytest.raises(AttributeError, match="QLabel has no 'bar'"):
        print(mine.bar)


def test_name_of_the_application_that_the_stand_in_lacks_says_so(app, ctk):
    with pytest.raises(NotImplementedError, match="add it"):
        print(ctk.ctkSliderWidget().popupSlider)
    with pytest.raises(NotImplementedError, match="pythonShell"):
        slicer.util.pythonShell()
    with pytest.raises(AttributeError):
        print(slicer.util.bogus)


# Qt


def test_properties_are_attributes(qt):
    combo, bar, tree, spin = qt.QComboBox(), qt.QProgressBar(), qt.QTreeWidget(), qt.QSpinBox()
    combo.addItem("cpu", "c")
    combo.addItem("gpu", {"index": 2})
    combo.currentIndex = 1
    bar.maximum, bar.value = 7, 3
    tree.columnCount = 4
    spin.setRange(-5, 9)
    spin.value = 20
    slider = qt.QSlider()
    slider.value = 3.9

    assert slider.value == 3
    assert (combo.count, combo.currentText, combo.currentData) == (2, "gpu", {"index": 2})
    assert (bar.value, bar.maximum, tree.columnCount, spin.value) == (3, 7, 4, 9)
    assert (combo.enabled, combo.visible, combo.objectName, combo.name) == (True, False, "", "")
    combo.name = "devices"
    assert combo.objectName == "devices"


def test_enums_are_numbers_and_flags_combine(qt):
    item = qt.QListWidgetItem("liver")
    item.setFlags((item.flags() | qt.Qt.ItemIsUserCheckable) & ~qt.Qt.ItemIsSelectable)
    item.setCheckState(qt.Qt.Checked)
    label = qt.QLabel()
    label.alignment = qt.Qt.AlignRight | qt.Qt.AlignTop

    assert item.checkState() == qt.Qt.Checked == 2
    assert item.flags() & qt.Qt.ItemIsUserCheckable
    assert not item.flags() & qt.Qt.ItemIsSelectable
    assert label.alignment == 2 + 32
    assert qt.Qt.UserRole + 1 == 257


def test_signals_pass_as_many_arguments_as_the_function_takes(qt):
    heard = []
    button = qt.QPushButton("x")
    button.checkable = True
    button.connect("clicked(bool)", lambda: heard.append("none"))
    button.connect("clicked(bool)", heard.append)
    button.toggled.connect(lambda checked: heard.append(("toggled", checked)))
    button.click()

    assert heard == [("toggled", True), "none", True]
    assert button.disconnect("clicked(bool)", heard.append)
    assert not button.disconnect("clicked(bool)", heard.append)
    button.click()
    assert heard[3:] == [("toggled", False), "none"]


def test_exception_in_a_slot_fails_the_test_later(app, qt):
    button = qt.QPushButton("x")
    button.connect("clicked()", lambda: 1 / 0)
    button.click()

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        app.process_events()


def test_exception_in_an_observer_fails_the_test(app):
    slicer.mrmlScene.AddObserver(slicer.mrmlScene.EndCloseEvent, lambda caller, event: {}["gone"])

    with pytest.raises(AssertionError, match="KeyError: 'gone'"):
        app.close_scene()


def test_exception_that_was_shown_is_no_failure(app, qt):
    def slot():
        with slicer.util.tryWithErrorDisplay("It failed."):
            raise RuntimeError("no memory")

    button = qt.QPushButton("x")
    button.connect("clicked()", slot)
    button.click()
    app.process_events()

    assert [(dialog.kind, dialog.text) for dialog in app.dialogs] == [("error", "It failed.\n\nno memory")]
    assert "RuntimeError" in app.dialogs[0].detailedText


def test_objects_are_wrapped_and_the_same_each_time(qt):
    tree, widget = qt.QTreeWidget(), qt.QWidget()
    layout, item = qt.QVBoxLayout(widget), qt.QTreeWidgetItem(tree, ["liver", "3"])
    button = qt.QPushButton("x")
    layout.addWidget(button)

    assert widget.layout() is layout
    assert tree.header() is tree.header()
    assert tree.topLevelItem(0) is item
    assert item.text(1) == "3"
    assert layout.itemAt(0).widget() is button
    assert widget.children() == (layout, button)
    assert widget.findChildren(qt.QAbstractButton) == (button,)
    assert isinstance(button, qt.QWidget)
    assert button.parent() is widget
    assert button.size == widget.layout().itemAt(0).widget().size
    tree.header().setSectionResizeMode(0, qt.QHeaderView.ResizeToContents)
    with pytest.raises(AttributeError, match="QHeaderView has no 'foo'"):
        tree.header().foo = 1


def test_deleted_object_is_a_value_error(qt):
    button = qt.QPushButton("x")
    button.delete()

    assert not button
    with pytest.raises(ValueError, match="deleted"):
        print(button.text)


def test_timer_that_nobody_keeps_stops(app, qt):
    heard = []

    def start_timer(name):
        timer = qt.QTimer()
        timer.interval = 1
        timer.connect("timeout()", lambda: heard.append(name))
        timer.start()
        return timer

    qt.QTimer.singleShot(1, lambda: heard.append("once"))
    kept = start_timer("kept")
    start_timer("dropped")
    app.wait_until(lambda: "once" in heard and "kept" in heard, seconds=5)

    kept.stop()
    assert not kept.active
    assert "dropped" not in heard
    with pytest.raises(AssertionError, match="Ten did not come within"):
        app.wait_until(lambda: len(heard) > 10**6, seconds=0.02, message="Ten")


def test_process_reads_bytes_and_tells_its_end(app, qt):
    process, received, ended = qt.QProcess(), [], []
    process.connect("readyReadStandardOutput()", lambda: received.append(process.readAllStandardOutput().data()))
    process.connect("finished(int,QProcess::ExitStatus)", lambda code, status: ended.append((code, status)))
    process.start(sys.executable, ["-c", "import sys; sys.stdout.write(sys.stdin.readline()); sys.exit(3)"])
    assert process.waitForStarted()
    process.write("h\N{LATIN SMALL LETTER E WITH ACUTE}\n".encode())
    app.wait_until(lambda: ended, seconds=20)

    assert b"".join(received).decode() == "h\N{LATIN SMALL LETTER E WITH ACUTE}\n"
    assert ended == [(3, qt.QProcess.NormalExit)]
    assert process.state() == qt.QProcess.NotRunning


def test_settings_are_in_a_temporary_file(app, qt):
    settings = qt.QSettings()
    settings.setValue("NMSW/Folder", "/models")

    assert qt.QSettings().value("NMSW/Folder") == "/models"
    assert slicer.app.userSettings().value("NMSW/Folder") == "/models"
    assert slicer.util.settingsValue("NMSW/Other", 5) == 5
    assert Path(slicer.app.slicerUserSettingsFilePath).is_relative_to(app.folder)


def test_dialogs_take_the_answers_of_the_test(app, qt):
    app.answers += [True, "/data", qt.QMessageBox.No, "Keep", lambda text: f"renamed after {text}"]
    box, custom = qt.QMessageBox(), qt.QMessageBox()
    box.text = "Replace?"
    box.setStandardButtons(qt.QMessageBox.Yes | qt.QMessageBox.No)
    custom.text = "Which?"
    keep = custom.addButton("Keep", qt.QMessageBox.AcceptRole)
    custom.addButton("Drop", qt.QMessageBox.RejectRole)

    assert slicer.util.confirmYesNoDisplay("Go on?") is True
    assert qt.QFileDialog.getExistingDirectory(None, "Models") == "/data"
    assert box.exec_() == qt.QMessageBox.No
    custom.exec_()
    assert custom.clickedButton() is keep
    assert qt.QInputDialog.getText(None, "Name", "New name:") == "renamed after Name"
    assert [dialog.text for dialog in app.dialogs] == ["Go on?", "Models", "Replace?", "Which?", "Name"]


def test_message_box_of_slicer_util_is_answered_or_recorded(app, qt):
    app.answers.append(qt.QMessageBox.Cancel)
    buttons = qt.QMessageBox.Ok | qt.QMessageBox.Cancel

    assert slicer.util.messageBox("Replace?", icon=qt.QMessageBox.Warning, standardButtons=buttons) == qt.QMessageBox.Cancel
    assert slicer.util.messageBox("Slow.", icon=qt.QMessageBox.Warning, dontShowAgainSettingsKey="NMSW/Slow") == qt.QMessageBox.Ok
    assert [(dialog.kind, dialog.text) for dialog in app.dialogs] == [("question", "Replace?"), ("warning", "Slow.")]


def test_message_with_empty_details_is_refused(app):
    with pytest.raises(AssertionError, match="150 characters wide for nothing"):
        slicer.util.errorDisplay("It failed.", detailedText="")
    app.errors.clear()
    slicer.util.errorDisplay("It failed.")


def test_menu_triggers_the_action_that_the_test_answers(app, qt):
    menu, heard = qt.QMenu(), []
    menu.addAction("Add").connect("triggered()", lambda: heard.append("Add"))
    remove = menu.addAction("Remove")
    remove.connect("triggered()", lambda: heard.append("Remove"))
    app.answers.append("Remove")

    assert menu.exec_(qt.QPoint(0, 0)) is remove
    assert heard == ["Remove"]


def test_checkable_combo_box_tells_what_is_checked(ctk, qt):
    combo, heard = ctk.ctkCheckableComboBox(), []
    combo.addItems(["liver", "spleen"])
    combo.connect("checkedIndexesChanged()", lambda: heard.append(len(combo.checkedIndexes())))
    combo.setCheckState(combo.checkableModel().index(1, 0), qt.Qt.Checked)

    assert heard == [1]
    assert combo.checkedIndexes()[0].row() == 1


def test_question_without_an_answer_fails_the_test_even_if_caught(app):
    with pytest.raises(AssertionError, match="Really?"):
        slicer.util.confirmOkCancelDisplay("Really?")

    with pytest.raises(AssertionError, match="no answer to this question: Really?"):
        app.process_events()


def test_open_url_is_recorded(app, qt):
    qt.QDesktopServices.openUrl(qt.QUrl("https://arxiv.org/abs/2501.10814"))

    assert app.opened_urls == ["https://arxiv.org/abs/2501.10814"]


def test_pip_install_fails_the_test(app):
    with pytest.raises(AssertionError, match="torch"):
        slicer.util.pip_install("torch")
    app.errors.clear()


# CTK and MRML widgets


def test_slider_widget_has_one_value_and_tells_it(ctk):
    slider, heard = ctk.ctkSliderWidget(), []
    slider.connect("valueChanged(double)", heard.append)
    slider.decimals = 0
    slider.minimum, slider.maximum = 2.0, 50.0
    slider.value = 7.4
    slider.value = 7.4
    slider.value = 80

    assert (slider.value, slider.minimum, slider.maximum, slider.decimals) == (50.0, 2.0, 50.0, 0)
    assert heard == [2.0, 7.0, 50.0]


def test_collapsible_button_hides_its_children_but_not_those_hidden_before(qt, ctk):
    section = ctk.ctkCollapsibleButton("Advanced")
    layout = qt.QVBoxLayout(section)
    shown, hidden, late = qt.QLabel("a"), qt.QLabel("b"), qt.QLabel("c")
    for label in (shown, hidden, late):
        layout.addWidget(label)
    section.show()
    hidden.hide()
    late.hide()
    section.collapsed = True
    late.setVisible(True)

    assert (shown.visible, hidden.visible, late.visible, section.checked) == (False, False, False, False)
    section.collapsed = False
    assert (shown.visible, hidden.visible, late.visible, section.checked) == (True, False, True, True)


def test_node_combo_box_follows_the_scene(app):
    selector, heard = slicer.qMRMLNodeComboBox(), []
    selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    selector.showChildNodeTypes = False
    selector.noneEnabled = True
    selector.setMRMLScene(slicer.mrmlScene)
    selector.connect("currentNodeChanged(vtkMRMLNode*)", lambda node: heard.append(node and node.GetName()))
    first = add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS, name="first")
    second = add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS, name="second")
    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "child type")

    assert (selector.nodeCount(), selector.currentNode(), selector.currentNodeID) == (2, None, "")
    selector.setCurrentNode(second)
    assert selector.currentNode() is second
    second.SetHideFromEditors(True)
    assert (selector.nodeCount(), selector.currentNode()) == (1, None)
    selector.setCurrentNodeID(first.GetID())
    slicer.mrmlScene.RemoveNode(first)
    assert (selector.nodeCount(), selector.currentNode()) == (0, None)
    assert heard == ["second", None, "first", None]
    selector.baseName = "CT"
    assert selector.addNode().GetName() == "CT"
    assert selector.currentNode().GetName() == "CT"
    app.close_scene()
    assert (selector.nodeCount(), selector.currentNode(), heard[-1]) == (0, None, None)


def test_node_combo_box_without_extra_entries_chooses_the_first_node(app):
    selector = slicer.qMRMLNodeComboBox()
    selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    selector.addEnabled = selector.removeEnabled = False
    selector.setMRMLScene(slicer.mrmlScene)
    heard = []
    selector.connect("currentNodeChanged(bool)", heard.append)

    node = add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS)

    assert selector.currentNode() is node
    assert heard == [True]


def test_table_view_shows_names_as_header_or_as_first_row(app):
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", "Volumes")
    slicer.util.updateTableFromArray(node, np.array([[1.5, 2.5], [3.5, 4.5]]), ["ml", "HU"])
    view = slicer.qMRMLTableView()
    view.setMRMLTableNode(node)
    from standins.conversion import unwrap

    model = unwrap(view).model()
    assert [model.data(model.index(row, 1)) for row in range(model.rowCount())] == ["HU", "2.5", "4.5"]
    node.SetUseColumnTitleAsColumnHeader(True)
    assert [model.data(model.index(row, 0)) for row in range(model.rowCount())] == ["1.5", "3.5"]
    assert view.mrmlTableNode() is node


def test_table_view_with_a_scene_is_empty_after_a_batch_of_changes(app):
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", "Volumes")
    view, free = slicer.qMRMLTableView(), slicer.qMRMLTableView()
    view.setMRMLScene(slicer.mrmlScene)
    for each in (view, free):
        each.setMRMLTableNode(node)
    slicer.mrmlScene.StartState(slicer.mrmlScene.BatchProcessState)
    slicer.mrmlScene.EndState(slicer.mrmlScene.BatchProcessState)
    assert (view.mrmlTableNode(), free.mrmlTableNode()) == (None, node)


def test_form_is_loaded_with_its_connections_and_checked(app, tmp_path):
    path = tmp_path / "form.ui"
    path.write_text(FORM, encoding="utf-8")
    form = slicer.util.loadUI(str(path))
    ui = slicer.util.childWidgetVariables(form)
    form.setMRMLScene(slicer.mrmlScene)

    assert ui.selector.mrmlScene() is slicer.mrmlScene
    assert ui.selector.noneEnabled
    assert ui.slider.property("SlicerParameterName") == "amount"
    assert ui.path.filters == 1 + 4
    with pytest.raises(AttributeError):
        print(ui.button)
    path.write_text(FORM.replace("noneEnabled", "noneAllowed"), encoding="utf-8")
    with pytest.raises(AttributeError, match="noneAllowed"):
        slicer.util.loadUI(str(path))
    path.write_text(FORM.replace("mrmlSceneChanged(vtkMRMLScene*)", "sceneChanged()"), encoding="utf-8")
    with pytest.raises(AttributeError, match="sceneChanged"):
        slicer.util.loadUI(str(path))


# Parameter node


def test_parameter_node_values_survive_saving_and_loading(app, wrapper, tmp_path):
    parameters = wrapper(parameter_node())
    parameters.volume = add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS, name="oblique")
    parameters.amount, parameters.count, parameters.isOn, parameters.text = -1.25, 7, False, "\N{GREEK SMALL LETTER MU}, b"
    parameters.where, parameters.device, parameters.policy, parameters.maybe = Path("/a/b"), "cpu", Policy.GREEDY, 5
    parameters.names.append("liver")
    parameters.names += ["spleen"]
    parameters.pair = (3, 1.5)
    values = world_values(parameters.volume)
    path = app.save_scene(tmp_path / "scene")
    del parameters
    app.close_scene()
    app.load_scene(path)

    loaded = wrapper(parameter_node())
    assert loaded.volume.GetName() == "oblique"
    assert world_values(loaded.volume) == values
    assert (loaded.amount, loaded.count, loaded.isOn, loaded.text) == (-1.25, 7, False, "\N{GREEK SMALL LETTER MU}, b")
    assert (loaded.where, loaded.device, loaded.policy, loaded.maybe) == (Path("/a/b"), "cpu", Policy.GREEDY, 5)
    assert (loaded.names, loaded.pair) == (["liver", "spleen"], (3, 1.5))


def test_parameter_node_has_defaults_again_after_the_scene_was_closed(app, wrapper):
    parameters = wrapper(parameter_node())
    parameters.volume = add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS)
    parameters.amount = 20
    app.close_scene()

    fresh = wrapper(parameter_node())
    assert (fresh.volume, fresh.amount, fresh.device, fresh.maybe) == (None, 10.0, "cuda", None)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("amount", 50.5, ValueError),
        ("amount", "5", TypeError),
        ("amount", None, ValueError),
        ("device", "mps", ValueError),
        ("count", 1.5, TypeError),
        ("volume", "vtkMRMLScalarVolumeNode1", TypeError),
        ("pair", (1,), ValueError),
        ("where", "x", TypeError),
    ],
)
def test_parameter_node_refuses_values(wrapper, name, value, error):
    parameters = wrapper(parameter_node())

    with pytest.raises(error):
        setattr(parameters, name, value)
    assert parameters.amount == 10


def test_parameter_node_refuses_types_that_the_application_cannot_keep(app):
    from slicer.parameterNodeWrapper import parameterNodeWrapper

    with pytest.raises(TypeError, match="int | None"):
        parameterNodeWrapper(type("Bad", (), {"__annotations__": {"maybe": int | None}}))


def test_connect_gui_binds_both_ways(app, wrapper, tmp_path):
    (tmp_path / "form.ui").write_text(FORM, encoding="utf-8")
    form = slicer.util.loadUI(str(tmp_path / "form.ui"))
    ui = slicer.util.childWidgetVariables(form)
    form.setMRMLScene(slicer.mrmlScene)
    parameters = wrapper(parameter_node())
    node = add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS)
    modified = []
    parameters.AddObserver("ModifiedEvent", lambda caller, event: modified.append(parameters.amount))

    tag = parameters.connectGui(ui)
    ui.slider.value = 33
    ui.selector.setCurrentNode(node)
    assert (parameters.amount, parameters.volume) == (33.0, node)
    parameters.amount = 4
    parameters.volume = None
    assert (ui.slider.value, ui.slider.minimum, ui.slider.maximum) == (4.0, -2.0, 50.0)
    assert ui.selector.currentNode() is None
    assert 33.0 in modified
    # the tag is missing in the application (Slicer issue 7547), so the widgets stay bound
    assert tag is None
    parameters.disconnectGui(tag)
    ui.slider.value = 12
    assert parameters.amount == 12.0


def test_connect_gui_of_a_repaired_application_returns_a_tag(tmp_path):
    (tmp_path / "form.ui").write_text(FORM, encoding="utf-8")
    with Application(connect_gui_returns_tag=True):
        from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper

        annotations = {"amount": Annotated[float, WithinRange(-2, 50)], "volume": slicer.vtkMRMLScalarVolumeNode}
        parameters = parameterNodeWrapper(type("Parameters", (), {"__annotations__": annotations}))(parameter_node())
        ui = slicer.util.childWidgetVariables(slicer.util.loadUI(str(tmp_path / "form.ui")))
        parameters.disconnectGui(parameters.connectGui(ui))
        ui.slider.value = 12

        assert parameters.amount == 0.0


def test_disconnect_gui_with_a_tag_lets_the_widgets_go(wrapper, ctk):
    parameters, slider = wrapper(parameter_node()), ctk.ctkSliderWidget()
    tag = parameters.connectParametersToGui({"amount": slider})
    parameters.disconnectGui(tag)
    slider.value = 12

    assert parameters.amount == 10.0
    parameters.amount = 5
    assert slider.value == 12.0


@pytest.mark.parametrize(
    ("widget", "name"),
    [
        ("qt.QLabel()", "text"),
        ("ctk.ctkCheckBox()", "isOn"),
        ("qt.QSpinBox()", "amount"),
        ("qt.QComboBox()", "text"),
        ("qt.QPlainTextEdit()", "text"),
        ("qt.QSlider()", "count"),
    ],
)
def test_connect_gui_refuses_pairs_that_the_application_cannot_bind(wrapper, qt, ctk, widget, name):
    parameters = wrapper(parameter_node())

    with pytest.raises(RuntimeError, match="Unable to create GUI connector|requires the Choice|unbounded"):
        parameters.connectParametersToGui({name: eval(widget, {"qt": qt, "ctk": ctk})})


# The application


def test_module_is_loaded_opened_reloaded_and_closed(app, tmp_path):
    loaded = app.load_module(write_module(tmp_path))
    assert sys.modules["Tiny"] is loaded
    assert (slicer.modules.tiny.title, slicer.modules.tiny.categories, slicer.modules.tiny.path) == (
        "Tiny module",
        ("Segmentation",),
        str(tmp_path / "Tiny.py"),
    )
    app.startup_completed()
    widget = app.open_panel("Tiny")
    assert loaded.events == ["startup", "setup", "enter"]
    assert widget.parent.isEntered
    assert slicer.util.getModuleWidget("Tiny") is widget is slicer.modules.TinyWidget
    assert slicer.util.getModuleLogic("Tiny") is widget.logic
    widget.onTest()
    assert app.dialogs[-1].text == "tested"

    slicer.util.selectModule("Data")
    assert (loaded.events[-1], widget.parent.isEntered, app.selected_modules) == ("exit", False, ["Data"])
    widget.onReload()
    assert loaded.events[-1] == "cleanup"
    again = slicer.modules.TinyWidget
    assert again is not widget
    assert type(again) is sys.modules["Tiny"].TinyWidget is not loaded.TinyWidget
    assert sys.modules["Tiny"].events == ["setup"]
    app.open_panel("Tiny")
    app.close()
    assert sys.modules["Tiny"].events == ["setup", "enter", "exit", "cleanup"]


def test_everything_is_as_before_after_the_block(tmp_path):
    before = {name: getattr(slicer.util, name) for name in ("errorDisplay", "pip_install")}
    path, modules = os.environ["PATH"], set(sys.modules)
    with Application() as app:
        app.load_module(write_module(tmp_path))
        folder = app.folder

    assert before == {name: getattr(slicer.util, name) for name in before}
    assert os.environ["PATH"] == path
    assert not {"qt", "ctk", "SampleData", "Tiny", "slicer.i18n"} & (set(sys.modules) - modules)
    assert not any(hasattr(slicer, name) for name in ("app", "mrmlScene", "modules", "qMRMLWidget"))
    assert not folder.exists()


def test_volume_and_segmentation_files_are_loaded_and_saved_by_slicer_util(app, tmp_path):
    node = add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS)
    assert slicer.util.saveNode(node, str(tmp_path / "ct.nrrd"))
    loaded = slicer.util.loadVolume(str(tmp_path / "ct.nrrd"), {"name": "again"})
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(loaded)
    segmentation.GetSegmentation().AddEmptySegment("liver", "liver")
    mask = (ARRAY > 3).astype(np.uint8)
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask, segmentation, "liver", loaded)
    assert slicer.util.saveNode(segmentation, str(tmp_path / "organs.seg.nrrd"))
    read = slicer.util.loadSegmentation(str(tmp_path / "organs.seg.nrrd"))

    assert world_values(loaded) == world_values(node)
    assert set(np.unique(mask)) == {0, 1}
    np.testing.assert_array_equal(slicer.util.arrayFromSegmentBinaryLabelmap(read, "liver", loaded), mask)
    assert loaded.GetName() == "again"


def test_scene_bundle_is_written_and_read(app, tmp_path):
    values = world_values(add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS, name="oblique"))
    slicer.util.saveScene(str(tmp_path / "scene.mrb"))
    app.close_scene()
    app.load_scene(tmp_path / "scene.mrb")

    assert world_values(slicer.util.getNode("oblique")) == values


def test_sample_data_is_read_from_the_registered_file(app, tmp_path):
    import SampleData

    node = add_volume(slicer.mrmlScene, ARRAY, ijk_to_ras=OBLIQUE_IJK_TO_RAS)
    slicer.util.saveNode(node, str(tmp_path / "s.nrrd"))
    checksum = slicer.util.computeChecksum("SHA256", str(tmp_path / "s.nrrd"))
    for name, expected in (("Good", checksum), ("Bad", checksum[::-1])):
        SampleData.SampleDataLogic.registerCustomSampleDataSource(
            category="Tests", sampleName=name, uris=(tmp_path / "s.nrrd").as_uri(), fileNames="s.nrrd", nodeNames="Sample", checksums=f"SHA256:{expected}"
        )

    assert world_values(SampleData.downloadSample("Good")) == world_values(node)
    with pytest.raises(ValueError, match="checksum"):
        SampleData.downloadSample("Bad")


@pytest.mark.skipif(os.name == "nt", reason="the launcher is a shell script")
def test_python_slicer_starts_a_child_that_outlives_the_launcher(app, tmp_path):
    code = "import os, sys, time; print(os.getpid(), flush=True); print(sys.stdin.readline().strip(), flush=True); time.sleep(30)"
    launcher = subprocess.Popen(["PythonSlicer", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    child = int(launcher.stdout.readline())
    try:
        launcher.stdin.write("through the launcher\n")
        launcher.stdin.flush()
        assert launcher.stdout.readline() == "through the launcher\n"
        assert child != launcher.pid
        launcher.kill()
        launcher.wait()
        time.sleep(0.1)
        os.kill(child, 0)  # raises where the process is gone
    finally:
        os.kill(child, signal.SIGKILL)
    launcher.stdin.close()
    launcher.stdout.close()
    exit_code = subprocess.run(["PythonSlicer", "-c", "import sys; sys.exit(5)"], check=False).returncode
    assert exit_code == 5


def test_views_are_recorded_and_pictures_are_saved(app, qt, tmp_path):
    slicer.util.setSliceViewerLayers(background="keep-current", fit=True)
    label = qt.QLabel("A panel")
    app.save_picture(label, tmp_path / "panel.png", width=200)

    assert app.views == [("setSliceViewerLayers", {"background": "keep-current", "fit": True})]
    picture = qt.QPixmap(str(tmp_path / "panel.png"))
    assert picture.width() == 200
    assert picture.height() >= 10


def test_the_module_of_this_extension_loads_and_opens(app):
    app.load_module(Path(__file__).resolve().parents[2] / "NMSWSegment.py")
    app.startup_completed()
    widget = app.open_panel("NMSWSegment")

    assert widget.parent.isEntered
    assert widget.ui.inputVolumeSelector.mrmlScene() is slicer.mrmlScene
