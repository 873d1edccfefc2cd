"""The module slicer.parameterNodeWrapper: typed attributes upon a parameter node, and widgets bound to them.

Two ways of the application are kept although they surprise (Slicer issue 7547): connectGui returns no tag, so that
disconnectGui cannot undo it, and the parameter node is observed for ever. connectParametersToGui returns a tag.
"""

import typing
import weakref
from typing import Any

import slicer
import vtk

from standins.conversion import WRAPPERS
from standins.gui_connectors import Connector, connector_for
from standins.parameter_annotations import Choice, Decimals, Default, Maximum, Minimum, SingleStep, WithinRange
from standins.parameter_types import parameter_type, split_annotations

__all__ = [
    "Choice",
    "Decimals",
    "Default",
    "Maximum",
    "Minimum",
    "SingleStep",
    "WithinRange",
    "findChildWidgetForParameter",
    "isParameterNodeWrapper",
    "parameterNodeWrapper",
]

PROPERTY_NAME = "SlicerParameterName"


class Parameter:
    """One attribute of one wrapper; the value is kept and follows the node."""

    def __init__(self, name: str, kind: Any, default: Any, node: Any) -> None:
        self.name, self.kind, self.default, self.node = name, kind, default, node
        if not kind.has(node, name):
            kind.write(node, name, default)
        self._value = kind.read(node, name)
        self._is_writing = False
        # the observer must not keep the parameter alive: with it go the observers when a wrapper is dropped
        self_reference = weakref.ref(self)
        self._tag = node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda caller, event: self_reference()._on_modified())

    def __del__(self) -> None:
        self.node.RemoveObserver(self._tag)

    def read(self) -> Any:
        """The value as of the last change of the node."""
        return self._value

    def write(self, value: Any) -> None:
        """Write the node; others hear of it when the value can be read."""
        self._is_writing = True
        try:
            with slicer.util.NodeModify(self.node):
                self.kind.write(self.node, self.name, value)
                self._value = self.kind.read(self.node, self.name)
        finally:
            self._is_writing = False

    def _on_modified(self) -> None:
        """Follow a change that came another way; a parameter that was removed gets its default again."""
        if self._is_writing:
            return
        if not self.kind.has(self.node, self.name):
            self.kind.write(self.node, self.name, self.default)
        self._value = self.kind.read(self.node, self.name)


class ParameterNodeWrapper:
    """What a class gets by the decorator."""

    CONNECT_GUI_RETURNS_TAG = False
    """Set by the test: what a later version of the application may do."""

    def __init__(self, parameterNode: Any, prefix: str | None = None) -> None:
        self.parameterNode = parameterNode
        self._connections: dict[int, dict[str, Connector]] = {}
        self._next_tag = 0
        self._is_updating_gui = False
        self._parameters = {name: Parameter(f"{prefix or ''}{name}", kind, default, parameterNode) for name, (kind, default, _) in self.allParameters.items()}

    def default(self, name: str) -> Default:
        """The default of an attribute."""
        return Default(self._parameter(name).default)

    def isCached(self, name: str) -> bool:
        """Whether reading costs no conversion."""
        return bool(self._parameter(name))

    def dataType(self, name: str) -> Any:
        """The type as it was written."""
        self._parameter(name)
        return self.allParameters[name][2]

    def getValue(self, name: str) -> Any:
        """The attribute of a name."""
        return self._parameter(name).read()

    def setValue(self, name: str, value: Any) -> None:
        """Write the attribute of a name."""
        self._parameter(name).write(value)

    def connectGui(self, gui: Any) -> int | None:
        """Bind the widgets that have the property SlicerParameterName; see the top of this file for what it returns."""
        widgets = gui.findChildren(WRAPPERS["QWidget"]) if hasattr(gui, "isWidgetType") else list(vars(gui).values())
        named = {widget.property(PROPERTY_NAME): widget for widget in widgets if widget.property(PROPERTY_NAME)}
        tag = self.connectParametersToGui(named)
        return tag if self.CONNECT_GUI_RETURNS_TAG else None

    def connectParametersToGui(self, mapping: dict[str, Any]) -> int:
        """Bind widgets, or connectors, to attributes by name; the tag is for disconnectGui."""
        for name in mapping:
            self._parameter(name)
        connectors = {name: widget if isinstance(widget, Connector) else connector_for(widget, self.dataType(name)) for name, widget in mapping.items()}
        tag = self._next_tag
        self._next_tag += 1
        self._connections[tag] = connectors
        for name, connector in connectors.items():
            connector.write(self.getValue(name))
            connector.start(lambda name=name, connector=connector: self._on_widget(name, connector))
        self.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda caller, event: self._update_gui())
        return tag

    def disconnectGui(self, tag: Any) -> None:
        """Let the widgets of a tag go; nothing for an unknown one."""
        for connector in self._connections.pop(tag, {}).values():
            connector.stop()

    def StartModify(self) -> int:
        """Hold events back."""
        return self.parameterNode.StartModify()

    def EndModify(self, was_modifying: int) -> None:
        """Send the events that were held back."""
        self.parameterNode.EndModify(was_modifying)

    def AddObserver(self, event: Any, callback: Any, priority: float = 0.0) -> int:
        """Observe the parameter node."""
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag: int) -> None:
        """Stop observing the parameter node."""
        self.parameterNode.RemoveObserver(tag)

    def Modified(self) -> None:
        """Say that the parameter node changed."""
        self.parameterNode.Modified()

    def _parameter(self, name: str) -> Parameter:
        """An attribute by name.

        Raises:
            ValueError: there is none.
        """
        if name not in self.allParameters:
            raise ValueError(f"Cannot find a param with the given name: {name}, only {list(self.allParameters)}")
        return self._parameters[name]

    def _on_widget(self, name: str, connector: Connector) -> None:
        """A person changed a widget."""
        with slicer.util.NodeModify(self):
            if not self._is_updating_gui:
                self.setValue(name, connector.read())

    def _update_gui(self) -> None:
        """The parameter node changed."""
        if self._is_updating_gui:
            return
        self._is_updating_gui = True
        try:
            with slicer.util.NodeModify(self):
                for connectors in self._connections.values():
                    for name, connector in connectors.items():
                        connector.write(self.getValue(name))
        finally:
            self._is_updating_gui = False


def parameterNodeWrapper(classtype: type | None = None) -> Any:
    """Make a wrapper of a class with typed attributes; used with or without brackets."""
    return _wrapper_of if classtype is None else _wrapper_of(classtype)


def isParameterNodeWrapper(class_or_object: Any) -> bool:
    """Whether it is one."""
    return isinstance(class_or_object, ParameterNodeWrapper) or (isinstance(class_or_object, type) and issubclass(class_or_object, ParameterNodeWrapper))


def findChildWidgetForParameter(widget: Any, parameter: str) -> Any:
    """The child that is named after a parameter, or None."""
    return next((child for child in widget.findChildren(WRAPPERS["QWidget"]) if child.property(PROPERTY_NAME) == parameter), None)


def _wrapper_of(classtype: type) -> type:
    """The class with a property for each of its typed attributes."""
    members = {"allParameters": {}, "__doc__": classtype.__doc__, "__module__": classtype.__module__}
    for name, annotated in typing.get_type_hints(classtype, include_extras=True).items():
        if hasattr(ParameterNodeWrapper, name):
            raise ValueError(f"Cannot use reserved name '{name}' in a parameterNodeWrapper")
        kind = parameter_type(annotated)
        annotations = split_annotations(annotated)[1]
        written = [annotation.value for annotation in annotations if isinstance(annotation, Default)]
        default = getattr(classtype, name) if hasattr(classtype, name) else written[0] if written else kind.default()
        members["allParameters"][name] = (kind, default, annotated)
        members[name] = property(lambda self, name=name: self.getValue(name), lambda self, value, name=name: self.setValue(name, value))
    own = {name: member for name, member in vars(classtype).items() if name not in members and name not in ("__dict__", "__weakref__")}
    return type(classtype.__name__, (ParameterNodeWrapper,), {**own, **members})
