"""PySide6 objects that look like PythonQt objects.

One wrapper class for each class of the application, made from api.json: properties are attributes, enum values sit on the
class, and every name that the application does not have is refused, for reading, calling and setting.
"""

import enum
import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import shiboken6
from PySide6 import QtCore

from standins.api import listed_name, names_of
from standins.conversion import IDENTICAL, WRAPPERS, unwrap, wrap
from standins.enums import EnumType
from standins.signals import Signal, spellings

PYTHON_KEYWORDS = {"raise": "raise_", "print": "print_"}
METHODS_IN_QT_5 = {"contentsMargins"}
"""Properties of Qt 6 only: used as attributes they would work here and fail there."""
PROPERTY_TYPES = {
    "bool": (bool, int),
    "int": (int, float),
    "uint": (int, float),
    "double": (int, float),
    "QString": (str,),
    "QStringList": (list, tuple),
}


class QtType(type):
    """A class as PythonQt shows it: enum values and static functions, nothing that the application lacks."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        listed = _require_listed(cls, name)
        if listed in cls._static_functions:
            return cls._static_functions[listed]
        found = getattr(cls._pyside, PYTHON_KEYWORDS.get(listed, listed), None)
        if found is None:
            raise _missing(cls, name)
        if isinstance(found, type) and issubclass(found, enum.Enum):
            return EnumType(found)
        if callable(found) and not isinstance(found, enum.Enum):
            return Method(found, f"{cls.__name__}.{name}")
        return wrap(found)

    def __dir__(cls) -> list[str]:
        return sorted(names_of(cls.__name__))


class Wrapped(metaclass=QtType):
    """An object of PySide6, seen as PythonQt shows it."""

    __slots__ = ("__weakref__", "_qt")
    _static_functions: ClassVar[dict[str, Callable]] = {}

    def __init__(self, *args: Any) -> None:
        self._adopt(type(self)._pyside(*map(unwrap, args)))

    def __init_subclass__(cls) -> None:
        """Virtual functions of Qt do not reach a Python class through a wrapper: refuse to look as if they did."""
        virtual = set(vars(cls)) & names_of(_listed_class(cls).__name__)
        if virtual and "_pyside" not in vars(cls):
            raise NotImplementedError(f"{cls.__name__} overrides {sorted(virtual)}, which these stand-ins would never call")

    @classmethod
    def _of(cls, qt_object: Any) -> "Wrapped":
        """The wrapper of an object that is there already."""
        wrapper = cls.__new__(cls)
        wrapper._adopt(qt_object)
        return wrapper

    def _adopt(self, qt_object: Any) -> None:
        """Stand before an object, for as long as one of the two is in use."""
        object.__setattr__(self, "_qt", qt_object)
        if isinstance(qt_object, IDENTICAL):
            qt_object._standin = weakref.ref(self)

    def className(self) -> str:
        """The name of the class of the application."""
        return _listed_class(type(self)).__name__

    def inherits(self, class_name: str) -> bool:
        """Whether the object is of a class or of one derived from it."""
        return any(base.__name__ == class_name for base in type(self).__mro__)

    def delete(self) -> None:
        """Delete the object of Qt at once."""
        shiboken6.delete(self._qt)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _write(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Wrapped):
            return False
        return self._qt is other._qt or (not isinstance(self._qt, IDENTICAL) and self._qt == other._qt)

    def __hash__(self) -> int:
        return id(self._qt)

    def __bool__(self) -> bool:
        return shiboken6.isValid(self._qt)

    def __dir__(self) -> list[str]:
        return sorted(names_of(_listed_class(type(self)).__name__))

    def __repr__(self) -> str:
        return f"{type(self).__name__} (stand-in at {hex(id(self._qt))})"


class Method:
    """A function of Qt; like those of PythonQt it takes no keyword arguments."""

    def __init__(self, function: Callable, name: str) -> None:
        self._function = function
        self._name = name

    def __call__(self, *args: Any) -> Any:
        return wrap(self._function(*map(unwrap, args)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Method) and self._function == other._function

    def __hash__(self) -> int:
        return hash(self._function)

    def __repr__(self) -> str:
        return f"<stand-in of {self._name}>"


def make_wrappers(pyside_classes: dict[str, type], *, methods: dict[str, Callable], static_functions: dict[str, Callable]) -> None:
    """Fill conversion.WRAPPERS.

    Args:
        pyside_classes: class name -> class of PySide6, or a Python class upon it.
        methods: "Class.name" -> function(wrapper, *args) in place of the method of PySide6, for derived classes too.
        static_functions: "Class.name" -> function(*args), likewise.
    """
    for name, pyside_class in sorted(pyside_classes.items(), key=lambda item: len(item[1].__mro__)):
        bases = [WRAPPERS[base.__name__] for base in pyside_class.__mro__[1:] if base.__name__ in WRAPPERS][:1] or [Wrapped]
        own_static = {key.partition(".")[2]: function for key, function in static_functions.items() if key.startswith(f"{name}.")}
        members = {"__slots__": (), "_pyside": pyside_class, "_static_functions": {**bases[0]._static_functions, **own_static}}
        members |= {key.partition(".")[2]: function for key, function in methods.items() if key.startswith(f"{name}.")}
        WRAPPERS[name] = QtType(name, tuple(bases), members)


def _listed_class(cls: type) -> type:
    """The class of the application that a wrapper class, or a Python class derived from one, is."""
    return next(base for base in cls.__mro__ if "_pyside" in vars(base) or base is Wrapped)


def _require_listed(cls: type, name: str) -> str:
    """The listed name.

    Raises:
        AttributeError: the application does not have it.
    """
    class_name = _listed_class(cls).__name__
    listed = listed_name(class_name, name)
    if listed is None:
        raise AttributeError(f"{class_name} has no '{name}' in Slicer")
    return listed


def _missing(cls: type, name: str) -> Exception:
    """What to raise for a name that the application has and PySide6 or the stand-in lacks."""
    class_name = _listed_class(cls).__name__
    if _listed_class(cls)._pyside.__module__.startswith("PySide6"):
        return AttributeError(f"{class_name} has '{name}' with Qt 5 only")
    return NotImplementedError(f"{class_name} has '{name}' in Slicer, but not in these stand-ins: add it in Testing/Python/standins")


def _read(wrapper: Wrapped, name: str) -> Any:
    """A property's value, a signal, a method or an enum value."""
    qt_object = wrapper._qt
    if not shiboken6.isValid(qt_object):
        raise ValueError(f"'{name}' of a {type(wrapper).__name__} that Qt has deleted")
    if name in _dynamic_names(qt_object):
        return wrap(qt_object.property(name))
    listed = _require_listed(type(wrapper), name)
    if _property_type(qt_object, listed):
        return wrap(_property_value(qt_object, listed))
    if isinstance(qt_object, QtCore.QObject) and spellings(qt_object, listed):
        return Signal(qt_object, listed)
    found = getattr(qt_object, PYTHON_KEYWORDS.get(listed, listed), None)
    if found is None:
        raise _missing(type(wrapper), name)
    if isinstance(found, (enum.Enum, type)):
        return getattr(type(wrapper), listed)
    return Method(found, f"{type(wrapper).__name__}.{name}")


def _write(wrapper: Wrapped, name: str, value: Any) -> None:
    """Set a property; PythonQt makes no new attributes, except on objects of a Python class."""
    qt_object, cls = wrapper._qt, type(wrapper)
    if name in _dynamic_names(qt_object):
        qt_object.setProperty(name, unwrap(value))
        return
    listed = listed_name(_listed_class(cls).__name__, name)
    if listed is None and _listed_class(cls) is not cls:
        object.__setattr__(wrapper, name, value)
        return
    listed = _require_listed(cls, name)
    type_name = _property_type(qt_object, listed)
    if not type_name:
        raise AttributeError(f"'{name}' of {cls.__name__} is no property: it cannot be set")
    if not isinstance(value, PROPERTY_TYPES.get(type_name, object)):
        raise AttributeError(f"Property '{name}' of type '{type_name}' does not accept an object of type {type(value).__name__} ({value!r})")
    if type_name in ("int", "uint"):
        value = int(value)  # PythonQt cuts off the decimals, Qt itself would round
    if isinstance(inspect.getattr_static(type(qt_object), listed, None), QtCore.Property):
        setattr(qt_object, listed, unwrap(value))  # of a stand-in: setProperty converts no enums of Python
    elif not qt_object.setProperty(listed, unwrap(value)):
        raise AttributeError(f"Property '{name}' of {cls.__name__} is read only")


def _property_type(qt_object: Any, name: str) -> str:
    """The C++ type of a property; empty where there is no such property in the application."""
    if not isinstance(qt_object, QtCore.QObject) or name in METHODS_IN_QT_5:
        return ""
    meta_object = qt_object.metaObject()
    index = meta_object.indexOfProperty(name)
    return meta_object.property(index).typeName() if index >= 0 else ""


def _property_value(qt_object: QtCore.QObject, name: str) -> Any:
    """Read a property; PySide6 converts no enums here, so their getter is called."""
    try:
        return qt_object.property(name)
    except RuntimeError:
        return getattr(qt_object, name)()


def _dynamic_names(qt_object: Any) -> list[str]:
    """Names of the properties that were added to this one object."""
    return [bytes(name).decode() for name in qt_object.dynamicPropertyNames()] if isinstance(qt_object, QtCore.QObject) else []
