"""Values on their way between Python code and PySide6."""

import enum
import functools
import inspect
from collections.abc import Callable
from typing import Any

from PySide6 import QtCore, QtWidgets

from standins.enums import EnumValue
from standins.recorder import RECORDER

IDENTICAL = (QtCore.QObject, QtWidgets.QTreeWidgetItem, QtWidgets.QListWidgetItem, QtWidgets.QTableWidgetItem, QtWidgets.QLayoutItem)
"""Objects that are the same, not just equal, each time that Qt hands them out."""

WRAPPERS: dict[str, type] = {}
"""Class name -> wrapper class, filled by wrapping.py."""


def wrap(value: Any) -> Any:
    """A value of PySide6 as PythonQt gives it; lists are tuples, VTK objects and plain values stay as they are."""
    module = type(value).__module__
    if isinstance(value, enum.Enum) and module.startswith(("PySide6", "standins")):
        return EnumValue(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(wrap, value))
    if isinstance(value, dict):
        return {key: wrap(item) for key, item in value.items()}
    if isinstance(value, IDENTICAL):
        known = getattr(value, "_standin", None)
        return (known and known()) or _new_wrapper(value)
    return _new_wrapper(value) if module.startswith("PySide6") else value


def unwrap(value: Any) -> Any:
    """A value of Python code as PySide6 takes it; a function is guarded."""
    if isinstance(value, EnumValue):
        return value.member
    if isinstance(value, type):
        return getattr(value, "_pyside", value)
    if hasattr(type(value), "_pyside"):
        return value._qt
    if isinstance(value, (list, tuple)):
        return [unwrap(item) for item in value]
    if callable(value) and not hasattr(value, "GetClassName"):
        return guarded(value)
    return value


def guarded(function: Callable) -> Callable:
    """A slot: it gets the arguments that the function has places for, and its exception is recorded, not raised into Qt."""
    places = _places(function)

    @functools.wraps(function, assigned=())
    def slot(*args: Any) -> None:
        try:
            function(*map(wrap, args[:places]))
        except Exception as error:
            RECORDER.slot_failed(error)

    return slot


def wrapper_class(pyside_class: type) -> type:
    """The wrapper class of the nearest class that is listed.

    Raises:
        NotImplementedError: no class of it is listed.
    """
    for candidate in pyside_class.__mro__:
        if candidate.__name__ in WRAPPERS:
            return WRAPPERS[candidate.__name__]
    raise NotImplementedError(f"{pyside_class.__name__} is not in api.json; add the class where the application has it")


def _new_wrapper(value: Any) -> Any:
    """A wrapper around an object of PySide6 that has none."""
    return wrapper_class(type(value))._of(value)


def _places(function: Callable) -> int | None:
    """How many arguments to pass, None for all: PythonQt leaves out those that a Python function has no place for."""
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        return None
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return sum(parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) for parameter in parameters)
