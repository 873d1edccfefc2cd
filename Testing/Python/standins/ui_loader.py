"""Forms of Qt Designer, with the widgets of CTK and MRML as stand-ins; what a real application would not know is refused."""

import functools
import operator
import xml.etree.ElementTree as ElementTree
from typing import Any

from PySide6 import QtCore, QtUiTools, QtWidgets

from standins import signals
from standins.api import listed_name
from standins.conversion import WRAPPERS, wrap


def load_ui(form: str) -> QtWidgets.QWidget:
    """The widget of a form.

    Raises:
        AttributeError: a property or a signal that the application does not have.
        NotImplementedError: a widget class that is not in api.json.
    """
    root = ElementTree.fromstring(form)
    connections = root.find("connections")
    if connections is not None:
        root.remove(connections)
    enum_properties = [entry for widget in root.iter("widget") for entry in _check_properties(widget)]
    loader = QtUiTools.QUiLoader()
    for wrapper in WRAPPERS.values():
        if not wrapper._pyside.__module__.startswith("PySide6") and issubclass(wrapper._pyside, QtWidgets.QWidget):
            loader.registerCustomWidget(wrapper._pyside)
    file = QtCore.QBuffer()
    file.setData(ElementTree.tostring(root))
    loaded = loader.load(file)
    if loaded is None:
        raise RuntimeError(f"The form could not be loaded: {loader.errorString()}")
    for object_name, property_name, text in enum_properties:
        _set_enums(wrap(loaded.findChild(QtWidgets.QWidget, object_name)), property_name, text)
    for connection in connections if connections is not None else []:
        _connect(loaded, {part.tag: part.text for part in connection})
    return loaded


def _check_properties(widget: ElementTree.Element) -> list[tuple[str, str, str]]:
    """Only properties that the class has; those with stdset="0" are new ones of this form.

    Returns:
        Enums of stand-in widgets, which Qt cannot read, taken out of the form: (object name, property, values).
    """
    class_name = widget.get("class")
    if class_name == "Line":  # a QFrame by the name that Designer gives it
        return []
    if class_name not in WRAPPERS:
        raise NotImplementedError(f"The form has a {class_name}, which is not in api.json of the stand-ins")
    for entry in widget.findall("property"):
        if entry.get("stdset") != "0" and listed_name(class_name, entry.get("name")) is None:
            raise AttributeError(f"{class_name} has no property '{entry.get('name')}' in Slicer")
    taken_out = []
    for entry in widget.findall("property"):
        text = entry.findtext("set") or entry.findtext("enum")
        if text and entry.get("name") in vars(WRAPPERS[class_name]._pyside):
            taken_out.append((widget.get("name"), entry.get("name"), text))
            widget.remove(entry)
    return taken_out


def _set_enums(widget: Any, property_name: str, text: str) -> None:
    """Set a property to values such as ctkPathLineEdit::Dirs|ctkPathLineEdit::Drives."""
    values = [getattr(type(widget), part.rpartition("::")[2]) for part in text.split("|")]
    setattr(widget, property_name, functools.reduce(operator.or_, values))


def _connect(form: QtWidgets.QWidget, parts: dict[str, str]) -> None:
    """A connection that the form asks for."""
    widgets = {widget.objectName(): widget for widget in [form, *form.findChildren(QtWidgets.QWidget)]}
    for part in ("sender", "receiver"):
        if parts[part] not in widgets:
            raise AttributeError(f"The form connects '{parts[part]}', which it does not have")
    signals.connect(widgets[parts["sender"]], parts["signal"], wrap(widgets[parts["receiver"]]), parts["slot"])
