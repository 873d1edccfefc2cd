"""qMRMLNodeComboBox: the nodes of the scene in a combo box."""

from typing import Any, ClassVar

import shiboken6
import slicer
import vtk
from PySide6.QtCore import Property, Qt, Signal
from PySide6.QtGui import QAction, QStandardItem
from PySide6.QtWidgets import QComboBox, QHBoxLayout, QSizePolicy, QWidget

from standins.observing import Observing
from standins.recorder import RECORDER

NODE_ID = Qt.UserRole + 1
ACTION = Qt.UserRole + 2
"""Data of the entries below the nodes: create, rename, delete."""


def _option(name: str, kind: Any) -> Property:
    """A property that is kept in the options."""
    return Property(kind, lambda self: self._options[name], lambda self, value: self._set_option(name, value))


class qMRMLNodeComboBox(QWidget):
    """Follows the scene; the combo box inside behaves as Qt makes it, the first node in an empty one is chosen by itself."""

    currentNodeChangedSignal = Signal(object)
    hasCurrentNodeChanged = Signal(bool)
    currentNodeIDChanged = Signal(str)
    nodeActivated = Signal(object)
    nodeAdded = Signal(object)
    nodeAddedByUser = Signal(object)
    nodeAboutToBeRemoved = Signal(object)
    currentNodeRenamed = Signal(str)
    APPLICATION_SPELLING: ClassVar = {
        "currentNodeChanged(vtkMRMLNode*)": "currentNodeChangedSignal(PyObject)",
        "currentNodeChanged(bool)": "hasCurrentNodeChanged(bool)",
        "nodeActivated(vtkMRMLNode*)": "nodeActivated(PyObject)",
        "nodeAdded(vtkMRMLNode*)": "nodeAdded(PyObject)",
        "nodeAddedByUser(vtkMRMLNode*)": "nodeAddedByUser(PyObject)",
        "nodeAboutToBeRemoved(vtkMRMLNode*)": "nodeAboutToBeRemoved(PyObject)",
    }

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._scene = None
        self._observing = Observing()
        self._options = {
            "nodeTypes": [],
            "noneEnabled": False,
            "noneDisplay": "None",
            "addEnabled": True,
            "removeEnabled": True,
            "renameEnabled": False,
            "editEnabled": False,
            "showHidden": False,
            "showChildNodeTypes": True,
            "selectNodeUponCreation": True,
        }
        self._base_names: dict[str, str] = {}
        self._type_labels: dict[str, str] = {}
        self._attributes: list[tuple[str, str, str | None]] = []
        self._menu_actions: list[QAction] = []
        self._told_id = ""
        self._combo_box = QComboBox()
        self._combo_box.setSizePolicy(QSizePolicy.Expanding, QSizePolicy.Expanding)
        self._combo_box.setMinimumContentsLength(8)
        self._combo_box.setSizeAdjustPolicy(QComboBox.AdjustToMinimumContentsLengthWithIcon)  # long names are elided
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._combo_box)
        self.setEnabled(False)
        # a pick of "Create new..." is no choice of a node, and the text may change without the node
        self._combo_box.currentTextChanged.connect(lambda text: self._emit_current_node())
        self._combo_box.activated.connect(self._on_activated)
        self.destroyed.connect(self._observing.stop)

    nodeTypes = _option("nodeTypes", "QStringList")
    noneEnabled = _option("noneEnabled", bool)
    noneDisplay = _option("noneDisplay", str)
    addEnabled = _option("addEnabled", bool)
    removeEnabled = _option("removeEnabled", bool)
    renameEnabled = _option("renameEnabled", bool)
    editEnabled = _option("editEnabled", bool)
    showHidden = _option("showHidden", bool)
    showChildNodeTypes = _option("showChildNodeTypes", bool)
    selectNodeUponCreation = _option("selectNodeUponCreation", bool)
    baseName = Property(str, lambda self: next(iter(self._base_names.values()), ""), lambda self, base_name: self._set_base_name(base_name))
    currentNodeID = Property(str, lambda self: self._node_id(), lambda self, node_id: self.setCurrentNodeID(node_id))

    # What Python code calls

    def mrmlScene(self) -> Any:
        """The scene, or None."""
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        """Show the nodes of a scene; no node is chosen by that."""
        if scene is self._scene:
            return
        self._observing.stop()
        self._scene = scene
        if scene is not None:
            self._observing.start(scene, slicer.vtkMRMLScene.NodeAddedEvent, self._on_node_added)
            self._observing.start(scene, slicer.vtkMRMLScene.NodeAboutToBeRemovedEvent, self._on_node_removed)
            self._observing.start(scene, slicer.vtkMRMLScene.EndBatchProcessEvent, lambda caller, event: self._fill(keep=self.currentNode()))
            for node in _nodes(scene):
                self._watch(node)
        self._fill(keep=None)
        self.setEnabled(scene is not None)

    def currentNode(self) -> Any:
        """The chosen node, or None."""
        node_id = self._combo_box.currentData(NODE_ID)
        return self._scene.GetNodeByID(node_id) if self._scene is not None and node_id else None

    def setCurrentNode(self, node: Any) -> None:
        """Choose a node; one that is not listed chooses none."""
        self.setCurrentNodeID(node.GetID() if node is not None else "")

    def setCurrentNodeID(self, node_id: str) -> None:
        """Choose the node of an ID."""
        row = self._row(node_id) if node_id else -1
        self._combo_box.setCurrentIndex(row if row >= 0 else 0 if self._options["noneEnabled"] else -1)

    def setCurrentNodeIndex(self, index: int) -> None:
        """Choose by the order in the list, -1 for none."""
        self._combo_box.setCurrentIndex((index if index < self.nodeCount() else -1) + self._options["noneEnabled"])

    def nodeCount(self) -> int:
        """How many nodes are listed."""
        return sum(bool(self._combo_box.itemData(row, NODE_ID)) for row in range(self._combo_box.count()))

    def nodeFromIndex(self, index: int) -> Any:
        """The node at a place in the list, or None."""
        node_id = self._combo_box.itemData(index + self._options["noneEnabled"], NODE_ID)
        return self._scene.GetNodeByID(node_id) if node_id else None

    def addNode(self, node_type: str = "") -> Any:
        """Create a node as "Create new..." does, choose it, and tell."""
        node_type = node_type or next(iter(self._options["nodeTypes"]), "")
        if node_type not in self._options["nodeTypes"]:
            return None
        base_name = self._base_names.get(node_type) or self._scene.GetTypeDisplayNameByClassName(node_type)
        node = self._scene.AddNewNodeByClass(node_type, self._scene.GenerateUniqueName(base_name))
        for attribute_type, name, value in self._attributes:
            if attribute_type == node_type:
                node.SetAttribute(name, value or "")
        self._fill(keep=self.currentNode())
        if self._options["selectNodeUponCreation"]:
            self.setCurrentNode(node)
        self.nodeAddedByUser.emit(node)
        return node

    def renameCurrentNode(self) -> None:
        """Take the name that the test answers."""
        node = self.currentNode()
        name = RECORDER.ask("QInputDialog", "New name:") if node is not None else ""
        if name:
            node.SetName(name)
            self.currentNodeRenamed.emit(name)

    def removeCurrentNode(self) -> None:
        """Delete the chosen node."""
        self._scene.RemoveNode(self.currentNode())

    def addAttribute(self, node_type: str, name: str, value: Any = None) -> None:
        """List only nodes with an attribute, and with this value if one is given."""
        self._attributes.append((node_type, name, None if value is None else str(value)))
        self._fill(keep=self.currentNode())

    def removeAttribute(self, node_type: str, name: str) -> None:
        """Undo addAttribute."""
        self._attributes = [entry for entry in self._attributes if entry[:2] != (node_type, name)]
        self._fill(keep=self.currentNode())

    def setNodeTypeLabel(self, label: str, node_type: str) -> None:
        """What the entries call the type."""
        self._type_labels[node_type] = label
        self._fill(keep=self.currentNode())

    def nodeTypeLabel(self, node_type: str) -> str:
        """What the entries call the type."""
        display_name = self._scene.GetTypeDisplayNameByClassName(node_type) if self._scene is not None else ""
        return self._type_labels.get(node_type) or display_name or "node"

    def addMenuAction(self, action: QAction) -> None:
        """One more entry below the nodes."""
        self._menu_actions.append(action)
        self._fill(keep=self.currentNode())

    # Inside

    def _set_base_name(self, base_name: str) -> None:
        for node_type in self._options["nodeTypes"]:
            self._base_names[node_type] = base_name

    def _set_option(self, name: str, value: Any) -> None:
        value = [text for text in value if text] if name == "nodeTypes" else value
        if self._options[name] != value:
            current = self.currentNode()
            self._options[name] = value
            self._fill(keep=current)

    def _lists(self, node: Any) -> bool:
        """Whether the node is one of those to show."""
        if node.GetHideFromEditors() and not self._options["showHidden"]:
            return False
        for node_type in self._options["nodeTypes"]:
            if node.GetClassName() == node_type or (self._options["showChildNodeTypes"] and node.IsA(node_type)):
                wanted = [(name, value) for attribute_type, name, value in self._attributes if attribute_type == node_type]
                if all(node.GetAttribute(name) is not None and value in (None, node.GetAttribute(name)) for name, value in wanted):
                    return True
        return False

    def _fill(self, *, keep: Any) -> None:
        """Make all entries anew and choose a node again; tell only when the choice is another one then."""
        if not shiboken6.isValid(self):
            return
        before = keep.GetID() if keep is not None else ""
        blocked = self._combo_box.blockSignals(True)
        self._combo_box.clear()
        if self._scene is not None:
            if self._options["noneEnabled"]:
                self._combo_box.addItem(self._options["noneDisplay"])
            self._add_actions()
            for node in filter(self._lists, _nodes(self._scene)):
                self._insert(node)
        self.setCurrentNodeID(before)
        self._combo_box.blockSignals(blocked)
        if self._node_id() != self._told_id:
            self._emit_current_node()

    def _add_actions(self) -> None:
        """The entries below the nodes."""
        types = self._options["nodeTypes"]
        label = self.nodeTypeLabel(types[0] if len(types) == 1 else "")
        entries = [("rename", f"Rename current {label}")] if self._options["renameEnabled"] else []
        entries += [("edit", f"Edit current {label}")] if self._options["editEnabled"] else []
        entries += [(f"create {node_type}", f"Create new {self.nodeTypeLabel(node_type)}") for node_type in types if self._options["addEnabled"]]
        entries += [("remove", f"Delete current {label}")] if self._options["removeEnabled"] else []
        entries += [(f"menu {index}", action.text()) for index, action in enumerate(self._menu_actions)]
        if entries:
            self._combo_box.insertSeparator(self._combo_box.count())
        for data, text in entries:
            self._combo_box.addItem(text)
            self._combo_box.setItemData(self._combo_box.count() - 1, data, ACTION)

    def _insert(self, node: Any) -> None:
        """A node after the other nodes."""
        item = QStandardItem(node.GetName())
        item.setData(node.GetID(), NODE_ID)
        self._combo_box.model().insertRow(self._options["noneEnabled"] + self.nodeCount(), item)

    def _row(self, node_id: str) -> int:
        """The row of a node, or -1."""
        return self._combo_box.findData(node_id, NODE_ID)

    def _watch(self, node: Any) -> None:
        """Follow the name, the attributes and whether the node is hidden."""
        self._observing.start(node, vtk.vtkCommand.ModifiedEvent, lambda caller, event: self._on_node_modified(node))

    def _on_node_modified(self, node: Any) -> None:
        row = self._row(node.GetID() or "")
        if self._lists(node) != (row >= 0):
            self._fill(keep=self.currentNode())
        elif row >= 0 and self._combo_box.itemText(row) != node.GetName():
            self._combo_box.setItemText(row, node.GetName())

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _on_node_added(self, scene: Any, event: str, node: Any) -> None:
        if not shiboken6.isValid(self):
            return
        self._watch(node)
        if self._lists(node) and self._row(node.GetID()) < 0:
            self._insert(node)
            self.nodeAdded.emit(node)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _on_node_removed(self, scene: Any, event: str, node: Any) -> None:
        if not shiboken6.isValid(self):
            return
        self._observing.stop(node)
        row = self._row(node.GetID())
        if row >= 0:
            self.nodeAboutToBeRemoved.emit(node)
            was_current = row == self._combo_box.currentIndex()
            if was_current:
                self._choose_other_than(row)
            self._combo_box.removeItem(row)

    def _choose_other_than(self, row: int) -> None:
        """The node that the application shows when the chosen one goes: the next, or the last, or none."""
        rows = [other for other in range(self._combo_box.count()) if other != row and self._combo_box.itemData(other, NODE_ID)]
        following = [other for other in rows if other > row]
        fallback = 0 if self._options["noneEnabled"] else -1
        self._combo_box.setCurrentIndex(following[0] if following else rows[-1] if rows else fallback)

    def _emit_current_node(self) -> None:
        """Tell the chosen node."""
        if self._combo_box.currentData(ACTION):
            return
        node = self.currentNode()
        self._told_id = self._node_id()
        self.currentNodeChangedSignal.emit(node)
        self.hasCurrentNodeChanged.emit(node is not None)
        self.currentNodeIDChanged.emit(self._told_id)

    def _node_id(self) -> str:
        """The ID of the chosen node, or nothing."""
        node = self.currentNode()
        return node.GetID() if node is not None else ""

    def _on_activated(self, row: int) -> None:
        """A person picked an entry."""
        action = self._combo_box.itemData(row, ACTION)
        if action is None:
            self.nodeActivated.emit(self.currentNode())
        elif action.startswith("create "):
            self.addNode(action.partition(" ")[2])
        elif action.startswith("menu "):
            self._menu_actions[int(action.partition(" ")[2])].trigger()


def _nodes(scene: Any) -> list[Any]:
    """All nodes of a scene, in their order."""
    return [scene.GetNthNode(index) for index in range(scene.GetNumberOfNodes())]
