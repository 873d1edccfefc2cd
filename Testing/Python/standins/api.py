"""Which names a class has in the application: nothing else may be read, called or set."""

import functools
import json
from pathlib import Path

API_FILE = Path(__file__).with_name("api.json")

PYTHON_SPELLING = {"exec_": "exec", "raise_": "raise", "print_": "print", "name": "objectName"}
"""Names that PythonQt understands beside those that it lists."""

DOCUMENTED = {
    "QAbstractItemModel": ("QObject", "columnCount data dataChanged headerData index match modelReset parent rowCount rowsInserted rowsRemoved setData"),
    "QLayoutItem": (None, "alignment expandingDirections geometry isEmpty layout maximumSize minimumSize setAlignment setGeometry sizeHint spacerItem widget"),
    "QPoint": (None, "isNull manhattanLength setX setY x y"),
    "QRect": (None, "bottom center contains height isEmpty isNull isValid left right setHeight setWidth size top topLeft width x y"),
}
"""Classes that the application has and whose names were not listed: those of the documentation of Qt 5."""


@functools.cache
def names_of(class_name: str) -> frozenset[str]:
    """All names of a class, or of "slicer.util"; empty for a class that is not listed."""
    base, own_names = _listed().get(class_name, (None, ""))
    return frozenset(own_names.split()) | (names_of(base) if base else frozenset())


def class_names() -> list[str]:
    """All classes that are listed."""
    return [name for name in _listed() if "." not in name]


def listed_name(class_name: str, name: str) -> str | None:
    """The name as it is listed for the class, or None where the application does not have it."""
    names = names_of(class_name)
    if name in names:
        return name
    spelled = PYTHON_SPELLING.get(name)
    return spelled if spelled in names else None


@functools.cache
def _listed() -> dict[str, tuple[str | None, str]]:
    """Class -> the class that it is written upon, and its own names."""
    listed = json.loads(API_FILE.read_text(encoding="utf-8"))
    del listed["source"]
    return listed | DOCUMENTED
