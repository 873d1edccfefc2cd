"""How values of Python stand in a parameter node, and what is checked before they are written.

The strings and node references are those of the application, so that a scene can go from one to the other.
"""

import enum
import pathlib
import typing
from collections.abc import MutableSequence
from typing import Any

import slicer

from standins.parameter_annotations import VALIDATORS


class Text:
    """A value that is one string in the parameter node."""

    def __init__(self, kind: type, accepted: Any, *, to_text: Any = str, from_text: Any = None, default: Any = None) -> None:
        self.accepted = accepted
        self.to_text = to_text
        self.from_text = from_text or kind
        self.default_value = kind() if default is None else default

    def default(self) -> Any:
        return self.default_value

    def validate(self, value: Any) -> None:
        if value is None:
            raise ValueError("Value must not be None")
        if not isinstance(value, self.accepted):
            raise TypeError(f"Value must be of type '{self.accepted}', is type '{type(value)}' value '{value}'")

    def has(self, node: Any, name: str) -> bool:
        return node.HasParameter(name)

    def write(self, node: Any, name: str, value: Any) -> None:
        node.SetParameter(name, self.to_text(value))

    def read(self, node: Any, name: str) -> Any:
        return self.from_text(node.GetParameter(name))

    def remove(self, node: Any, name: str) -> None:
        node.UnsetParameter(name)


class Node:
    """A node, or None: a node reference beside an empty parameter that says that there is a value."""

    def __init__(self, kind: type) -> None:
        self.accepted = kind

    def default(self) -> None:
        return None

    def validate(self, value: Any) -> None:
        if value is not None and not isinstance(value, self.accepted):
            raise TypeError(f"Value must be of type '{self.accepted}', is type '{type(value)}' value '{value}'")

    def has(self, node: Any, name: str) -> bool:
        return node.HasParameter(name)

    def write(self, node: Any, name: str, value: Any) -> None:
        node.SetParameter(name, "")
        node.SetNodeReferenceID(name, value.GetID() if value is not None else None)

    def read(self, node: Any, name: str) -> Any:
        return node.GetNodeReference(name)

    def remove(self, node: Any, name: str) -> None:
        node.UnsetParameter(name)
        node.RemoveNodeReferenceIDs(name)


class Optional:
    """A value or None, as typing.Optional says it."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def default(self) -> None:
        return None

    def validate(self, value: Any) -> None:
        if value is not None:
            self.kind.validate(value)

    def has(self, node: Any, name: str) -> bool:
        return self.kind.has(node, f"{name}_0") or node.HasParameter(f"{name}_1")

    def write(self, node: Any, name: str, value: Any) -> None:
        with slicer.util.NodeModify(node):
            self.remove(node, name)
            if value is None:
                node.SetParameter(f"{name}_1", "True")
            else:
                self.kind.write(node, f"{name}_0", value)

    def read(self, node: Any, name: str) -> Any:
        return None if node.HasParameter(f"{name}_1") else self.kind.read(node, f"{name}_0")

    def remove(self, node: Any, name: str) -> None:
        self.kind.remove(node, f"{name}_0")
        node.UnsetParameter(f"{name}_1")


class Sequence:
    """A list (name_len and one entry each) or a tuple (one entry each) of values."""

    def __init__(self, kinds: list[Any], *, is_list: bool) -> None:
        self.kinds = kinds
        self.is_list = is_list

    def default(self) -> Any:
        return [] if self.is_list else tuple(kind.default() for kind in self.kinds)

    def validate(self, value: Any) -> None:
        """Entries are checked when they are written."""

    def has(self, node: Any, name: str) -> bool:
        return node.HasParameter(f"{name}_len") if self.is_list else self.kinds[0].has(node, f"{name}_0")

    def write(self, node: Any, name: str, value: Any) -> None:
        value = tuple(value)
        if not self.is_list and len(value) != len(self.kinds):
            raise ValueError("Unexpected number of tuple values")
        for index, entry in enumerate(value):
            self._kind(index).validate(entry)
        with slicer.util.NodeModify(node):
            if self.has(node, name):
                self.remove(node, name)
            for index, entry in enumerate(value):
                self._kind(index).write(node, f"{name}_{index}", entry)
            if self.is_list:
                node.SetParameter(f"{name}_len", str(len(value)))

    def read(self, node: Any, name: str) -> Any:
        entries = [self._kind(index).read(node, f"{name}_{index}") for index in range(self._count(node, name))]
        return ObservedList(entries, lambda changed: self.write(node, name, changed)) if self.is_list else tuple(entries)

    def remove(self, node: Any, name: str) -> None:
        for index in range(self._count(node, name)):
            self._kind(index).remove(node, f"{name}_{index}")
        node.UnsetParameter(f"{name}_len")

    def _kind(self, index: int) -> Any:
        return self.kinds[0 if self.is_list else index]

    def _count(self, node: Any, name: str) -> int:
        return int(node.GetParameter(f"{name}_len")) if self.is_list else len(self.kinds)


class ObservedList(MutableSequence):
    """A list of a parameter node: changing it writes the node."""

    def __init__(self, entries: list[Any], write: Any) -> None:
        self._entries = entries
        self._write = write

    def __getitem__(self, index: Any) -> Any:
        return self._entries[index]

    def __setitem__(self, index: Any, entry: Any) -> None:
        self._entries[index] = entry
        self._write(self._entries)

    def __delitem__(self, index: Any) -> None:
        del self._entries[index]
        self._write(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return self._entries == (other._entries if isinstance(other, ObservedList) else other)

    def __add__(self, other: Any) -> Any:
        raise NotImplementedError("Adding an ObservedList is not supported. However, += is supported.")

    def __repr__(self) -> str:
        return f"ObservedList({self._entries})"

    def insert(self, index: int, entry: Any) -> None:
        """Put an entry before another one."""
        self._entries.insert(index, entry)
        self._write(self._entries)


def parameter_type(kind: Any) -> Any:
    """How a type is kept.

    Raises:
        TypeError: the application cannot keep it; "X | None" is one of those, typing.Optional[X] is not.
    """
    kind, annotations = split_annotations(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float):
        found = Text(kind, (int, float) if kind is float else int, default=0)
    elif kind is str:
        found = Text(str, str)
    elif kind is bool:
        found = Text(bool, bool, from_text=lambda text: text == "True")
    elif isinstance(kind, type) and issubclass(kind, pathlib.PurePath):
        found = Text(kind, kind)
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        found = Text(str, kind, to_text=lambda value: value.name, from_text=lambda text: kind[text], default=next(iter(kind)))
    elif isinstance(kind, type) and issubclass(kind, slicer.vtkMRMLNode):
        found = Node(kind)
    elif origin in (list, tuple) and arguments:
        found = Sequence([parameter_type(argument) for argument in arguments], is_list=origin is list)
    elif origin is typing.Union and len(arguments) == 2 and arguments[1] is type(None):
        found = Optional(parameter_type(arguments[0]))
    else:
        raise TypeError(f"Unable to create serializer for type: {kind}")
    return Validated(found, [annotation for annotation in annotations if isinstance(annotation, VALIDATORS)])


class Validated:
    """A kind of value with the checks that the annotations ask for."""

    def __init__(self, kind: Any, validators: list[Any]) -> None:
        self.kind = kind
        self.validators = validators
        self.default, self.has, self.read, self.remove = kind.default, kind.has, kind.read, kind.remove

    def validate(self, value: Any) -> None:
        self.kind.validate(value)
        for validator in self.validators:
            validator.validate(value)

    def write(self, node: Any, name: str, value: Any) -> None:
        self.validate(value)
        self.kind.write(node, name, value)


def split_annotations(kind: Any) -> tuple[Any, list[Any]]:
    """The type itself and its annotations."""
    if typing.get_origin(kind) is typing.Annotated:
        return typing.get_args(kind)[0], list(typing.get_args(kind)[1:])
    return kind, []
