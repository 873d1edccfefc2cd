"""Signals by their C++ spelling: "clicked(bool)"."""

from collections.abc import Callable
from typing import Any

from PySide6 import QtCore

from standins.api import names_of
from standins.conversion import guarded, unwrap, wrapper_class


class Signal:
    """A signal as an attribute: widget.clicked.connect(slot)."""

    def __init__(self, qt_object: QtCore.QObject, name: str) -> None:
        self._object = qt_object
        self._name = name

    def connect(self, slot: Callable) -> bool:
        """Call the slot each time; the longest spelling of the signal counts."""
        return connect(self._object, spellings(self._object, self._name)[0], slot)

    def disconnect(self, slot: Callable | None = None) -> bool:
        """Stop calling the slot, or all slots."""
        return disconnect(self._object, spellings(self._object, self._name)[0], slot)

    def emit(self, *args: Any) -> None:
        """Call the slots."""
        getattr(self._object, self._name).emit(*map(unwrap, args))

    __call__ = emit


def connect(sender: QtCore.QObject, signal: str, slot: Callable | Any, method: str | None = None) -> bool:
    """Call a function, or a method of another object given by its spelling, at each signal.

    Raises:
        AttributeError: the class has no such signal, or the receiver no such method.
    """
    if method is not None:
        slot = getattr(slot, method.partition("(")[0])
    places = method.count(",") + bool(method.partition("(")[2].strip(") ")) if method else None
    spelled = _spelled(sender, signal)
    function = guarded(slot if places is None else lambda *args: slot(*args[:places]))
    connection = QtCore.QObject.connect(sender, QtCore.SIGNAL(spelled), function)
    _connections(sender).append((spelled, slot, connection))
    return True


def disconnect(sender: QtCore.QObject, signal: str, slot: Callable | None = None, method: str | None = None) -> bool:
    """Undo connect; without a slot for all slots of the signal. False where there was nothing to undo."""
    if method is not None:
        slot = getattr(slot, method.partition("(")[0])
    spelled = _spelled(sender, signal)
    connections = _connections(sender)
    undone = [entry for entry in connections if entry[0] == spelled and (slot is None or entry[1] == slot)]
    for entry in undone:
        QtCore.QObject.disconnect(entry[2])
        connections.remove(entry)
    return bool(undone)


def spellings(qt_object: QtCore.QObject, name: str) -> list[str]:
    """How the application spells a signal, one spelling for each list of arguments; empty for what is no signal."""
    meta_object = qt_object.metaObject()
    methods = [meta_object.method(index) for index in range(meta_object.methodCount())]
    signals = [bytes(method.methodSignature()).decode() for method in methods if method.methodType() == QtCore.QMetaMethod.MethodType.Signal]
    application = getattr(qt_object, "APPLICATION_SPELLING", {})
    hidden = set(application.values())
    return [spelled for spelled in [*application, *signals] if spelled.partition("(")[0] == name and spelled not in hidden]


def _spelled(sender: QtCore.QObject, signal: str) -> str:
    """The spelling that PySide6 knows for a signal of the application."""
    wanted = bytes(QtCore.QMetaObject.normalizedSignature(signal)).decode()
    name = wanted.partition("(")[0]
    class_name = wrapper_class(type(sender)).__name__
    known = spellings(sender, name) if name in names_of(class_name) else []
    if wanted not in known:
        raise AttributeError(f"{class_name} has no signal '{signal}'" + (f", only {known}" if known else ""))
    return getattr(sender, "APPLICATION_SPELLING", {}).get(wanted, wanted)


def _connections(sender: QtCore.QObject) -> list[tuple[str, Any, Any]]:
    """What was connected from Python: (signal, slot, connection)."""
    if not hasattr(sender, "_standin_connections"):
        sender._standin_connections = []
    return sender._standin_connections
