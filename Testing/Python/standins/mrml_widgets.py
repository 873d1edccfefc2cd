"""The widgets of MRML that a panel uses, as classes of PySide6 with the same properties and signals."""

from typing import Any, ClassVar

import shiboken6
import slicer
import vtk
from PySide6.QtCore import Property, Signal
from PySide6.QtGui import QStandardItemModel
from PySide6.QtWidgets import QTableView, QVBoxLayout, QWidget

from standins.ctk_sections import ctkCollapsibleButton
from standins.ctk_widgets import ctkSliderWidget
from standins.observing import Observing


class SceneHolding:
    """A widget that knows the scene and tells of it."""

    _scene: Any = None

    def mrmlScene(self) -> Any:
        """The scene, or None."""
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        """Take a scene."""
        if scene is not self._scene:
            self._scene = scene
            self.mrmlSceneChanged.emit(scene)


SCENE_SIGNAL = {"mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChanged(PyObject)"}


class qMRMLWidget(QWidget, SceneHolding):
    """A widget with a scene."""

    mrmlSceneChanged = Signal(object)
    APPLICATION_SPELLING = SCENE_SIGNAL


class qSlicerWidget(QWidget, SceneHolding):
    """A widget with a scene."""

    mrmlSceneChanged = Signal(object)
    APPLICATION_SPELLING = SCENE_SIGNAL


class qMRMLCollapsibleButton(ctkCollapsibleButton, SceneHolding):
    """A folding section with a scene."""

    mrmlSceneChanged = Signal(object)
    APPLICATION_SPELLING = SCENE_SIGNAL


class qMRMLSliderWidget(ctkSliderWidget, SceneHolding):
    """A slider with units; the stand-in has none."""

    mrmlSceneChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._quantity = ""

    def setQuantity(self, quantity: str) -> None:
        """What the number measures: length, time..."""
        self._quantity = quantity

    quantity = Property(str, lambda self: self._quantity, setQuantity)


class qMRMLTableView(QTableView):
    """The cells of a table node; without column titles as header the names are the first row, as in the application.

    With a scene it shows what a table view node says, which the stand-in lacks: after each batch of changes, such as a scene that was loaded, it is empty.
    """

    mrmlSceneChanged = Signal(object)
    selectionChangedSignal = Signal()
    APPLICATION_SPELLING: ClassVar = {**SCENE_SIGNAL, "selectionChanged()": "selectionChangedSignal()"}

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._scene = None
        self._node = None
        self._observing, self._observing_scene = Observing(), Observing()
        self.setModel(QStandardItemModel(self))
        self.selectionModel().selectionChanged.connect(lambda *indexes: self.selectionChangedSignal.emit())

    def mrmlScene(self) -> Any:
        """The scene, or None."""
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        """Take a scene."""
        if scene is self._scene:
            return
        self._observing_scene.stop()
        self._scene = scene
        if scene is not None:
            self._observing_scene.start(scene, slicer.vtkMRMLScene.EndBatchProcessEvent, lambda caller, event: self._end_processing())
        self.mrmlSceneChanged.emit(scene)

    def mrmlTableNode(self) -> Any:
        """The node, or None."""
        return self._node

    def setMRMLTableNode(self, node: Any) -> None:
        """Show the cells of a node, and follow them."""
        self._observing.stop()
        self._node = node
        if node is not None:
            self._observing.start(node, vtk.vtkCommand.ModifiedEvent, lambda caller, event: self._update())
        self._update()
        self.resizeColumnsToContents()

    def _end_processing(self) -> None:
        """There is no table view node."""
        if shiboken6.isValid(self):
            self.setMRMLTableNode(None)

    def _update(self) -> None:
        """Fill the model from the node."""
        self.model().clear()
        if self._node is None:
            return
        table = self._node.GetTable()
        columns = range(table.GetNumberOfColumns())
        names = [self._node.GetColumnTitle(table.GetColumnName(column)) or table.GetColumnName(column) for column in columns]
        has_titles = self._node.GetUseColumnTitleAsColumnHeader()
        rows = [[table.GetValue(row, column).ToString() for column in columns] for row in range(table.GetNumberOfRows())]
        rows = rows if has_titles else [names, *rows]
        self.model().setRowCount(len(rows))
        self.model().setColumnCount(len(names))
        self.model().setHorizontalHeaderLabels(names if has_titles else [chr(ord("A") + column) for column in columns])
        for row, cells in enumerate(rows):
            for column, text in enumerate(cells):
                self.model().setData(self.model().index(row, column), text)


class qSlicerScriptedLoadableModuleWidget(qSlicerWidget):
    """The parent of a module's Python widget: a box that knows whether the module is open."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        QVBoxLayout(self)
        self._module = None
        self._widget = None
        self._make_widget = None
        self._is_entered = False

    def hold(self, module: Any, make_widget: Any) -> None:
        """Make the Python widget of a module; not a function of the application."""
        self._module = module
        self._make_widget = make_widget
        self._widget = make_widget()

    def self(self) -> Any:
        """The Python widget."""
        return self._widget

    def module(self) -> Any:
        """The module."""
        return self._module

    def setup(self) -> None:
        """Build the panel; not a function that Python sees."""
        self._widget.setup()

    def enter(self) -> None:
        """A person opens the module."""
        self._is_entered = True
        if hasattr(self._widget, "enter"):
            self._widget.enter()

    def exit(self) -> None:
        """A person leaves the module."""
        self._is_entered = False
        if hasattr(self._widget, "exit"):
            self._widget.exit()

    def reload(self) -> None:
        """Make the Python widget again, of the class that was loaded anew."""
        self._widget = self._make_widget()
        self._widget.setup()

    isEntered = Property(bool, lambda self: self._is_entered)
    moduleName = Property(str, lambda self: self._module.name)
