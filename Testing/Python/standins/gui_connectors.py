"""Which widget shows which type, and how: the table of the application, nothing more."""

import enum
import logging
import pathlib
import typing
from collections.abc import Callable
from typing import Any

import slicer

from standins.conversion import WRAPPERS
from standins.parameter_annotations import Choice, Decimals, Maximum, Minimum, SingleStep, WithinRange
from standins.parameter_types import split_annotations


class Connector:
    """A widget that shows a value: read, write, and the signal of a change."""

    def __init__(self, widget: Any, signal: str, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self._widget, self._signal, self.read, self.write = widget, signal, read, write
        self._callback: Callable[[], None] | None = None

    def start(self, callback: Callable[[], None]) -> None:
        """Call back at each change."""
        self._callback = callback
        getattr(self._widget, self._signal).connect(self._changed)

    def stop(self) -> None:
        """Stop that."""
        self._callback = None
        getattr(self._widget, self._signal).disconnect(self._changed)

    def _changed(self) -> None:
        if self._callback:
            self._callback()


def connector_for(widget: Any, datatype: Any) -> Connector:
    """The connector of a widget and a type.

    Raises:
        RuntimeError: the application has none for the two, or needs an annotation.
    """
    kind, annotations = split_annotations(datatype)
    is_class = isinstance(kind, type)
    widget_class = type(widget).__name__ if type(widget) is WRAPPERS.get(type(widget).__name__) else ""
    if kind is bool and widget_class in ("QCheckBox", "QPushButton"):
        return _bool_connector(widget, widget_class)
    if (kind is int and widget_class in ("QSlider", "QSpinBox")) or (kind is float and widget_class in ("QDoubleSpinBox", "ctkSliderWidget")):
        return _number_connector(widget, annotations, is_slider=widget_class in ("QSlider", "ctkSliderWidget"))
    if kind in (int, float, str, bool) and widget_class == "QComboBox":
        return _choice_connector(widget, annotations)
    if is_class and issubclass(kind, enum.Enum) and widget_class == "QComboBox":
        return _combo_connector(widget, [(getattr(kind, "label", lambda value: value.name)(value), value) for value in kind])
    if kind is str and widget_class == "QLineEdit":
        return Connector(widget, "textChanged", lambda: widget.text, lambda value: setattr(widget, "text", value))
    if kind is str and widget_class == "QTextEdit":
        return Connector(widget, "textChanged", widget.toPlainText, widget.setPlainText)
    if is_class and issubclass(kind, pathlib.PurePath) and widget_class == "ctkPathLineEdit":
        return Connector(widget, "currentPathChanged", lambda: kind(widget.currentPath), lambda value: setattr(widget, "currentPath", str(value)))
    node_types = _node_types(kind)
    if node_types and widget_class == "qMRMLNodeComboBox":
        widget.nodeTypes = node_types
        return Connector(widget, "currentNodeChanged", widget.currentNode, widget.setCurrentNode)
    raise RuntimeError(f"Unable to create GUI connector from datatype '{datatype}' to widget type '{type(widget)}'")


def _bool_connector(widget: Any, widget_class: str) -> Connector:
    """A check box, or a button that stays down."""
    if widget_class == "QPushButton" and not widget.checkable:
        logging.warning("Making push button checkable for conversion to bool: button %s", widget)
        widget.checkable = True
    signal = "stateChanged" if widget_class == "QCheckBox" else "toggled"
    return Connector(widget, signal, lambda: widget.checked, lambda value: setattr(widget, "checked", value))


def _number_connector(widget: Any, annotations: list[Any], *, is_slider: bool) -> Connector:
    """A number; the annotations are the widget's range, and a slider needs one."""
    found = {type(annotation): annotation for annotation in annotations}
    within = found.get(WithinRange)
    minimum = within.minimum if within else getattr(found.get(Minimum), "minimum", None)
    maximum = within.maximum if within else getattr(found.get(Maximum), "maximum", None)
    if is_slider and (minimum is None or maximum is None):
        raise RuntimeError("Cannot have a connection to ctkSliderWidget where the float types is unbounded.")
    is_float = hasattr(widget, "decimals")
    if Decimals in found:
        widget.decimals = found[Decimals].value
    if SingleStep in found:
        widget.singleStep = found[SingleStep].value
    widget.minimum = minimum if minimum is not None else float("-inf") if is_float else -(2**31)
    widget.maximum = maximum if maximum is not None else float("inf") if is_float else 2**31 - 1
    return Connector(widget, "valueChanged", lambda: widget.value, lambda value: setattr(widget, "value", value))


def _choice_connector(widget: Any, annotations: list[Any]) -> Connector:
    """A combo box with the fixed choices of the annotation."""
    choices = next((annotation.choices for annotation in annotations if isinstance(annotation, Choice)), None)
    if choices is None:
        raise RuntimeError("ComboBoxToStringableConnector requires the Choice annotation to be used.")
    return _combo_connector(widget, [(str(choice), choice) for choice in choices])


def _combo_connector(widget: Any, entries: list[tuple[str, Any]]) -> Connector:
    """A combo box with one entry for each value."""
    values = [value for _, value in entries]
    widget.clear()
    for label, _ in entries:
        widget.addItem(label)

    def write(value: Any) -> None:
        if value not in values:
            raise ValueError(f"Unable to find value {value} in choices {values}")
        widget.currentIndex = values.index(value)

    return Connector(widget, "currentIndexChanged", lambda: values[widget.currentIndex], write)


def _node_types(kind: Any) -> list[str]:
    """Class names of a node type, or of a union of them; empty for anything else."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) is typing.Union else (kind,)
    kinds = [each for each in kinds if each is not type(None)]
    return [each.__name__ for each in kinds] if all(isinstance(each, type) and issubclass(each, slicer.vtkMRMLNode) for each in kinds) else []
