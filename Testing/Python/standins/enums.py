"""Enum values as PythonQt gives them: numbers that sit on the class."""

import enum
from typing import Any


class EnumValue(int):
    """A number that remembers the value of PySide6 behind it, which takes no plain numbers."""

    member: enum.Enum

    def __new__(cls, member: enum.Enum) -> "EnumValue":
        value = super().__new__(cls, member.value)
        value.member = member
        return value

    def __or__(self, other: Any) -> Any:
        return _combine(self, other, lambda left, right: left | right)

    def __and__(self, other: Any) -> Any:
        return _combine(self, other, lambda left, right: left & right)

    def __invert__(self) -> Any:
        return EnumValue(~self.member) if isinstance(self.member, enum.Flag) else ~int(self)

    def __repr__(self) -> str:
        return f"{self.member.name} ({int(self)})"

    __str__ = __repr__


class EnumType:
    """The type of an enum: it makes values of numbers, and has none of its values as attributes."""

    def __init__(self, pyside_enum: type[enum.Enum]) -> None:
        self._pyside_enum = pyside_enum

    def __call__(self, value: int = 0) -> EnumValue:
        return EnumValue(self._pyside_enum(int(value)))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'{name}' is not an attribute of the enum {self._pyside_enum.__name__} in PythonQt: it sits on the class")


def _combine(left: EnumValue, right: Any, operation: Any) -> Any:
    """A flag of two flags; a number where one is no flag."""
    if isinstance(right, EnumValue) and isinstance(left.member, enum.Flag) and type(left.member) is type(right.member):
        return EnumValue(operation(left.member, right.member))
    return operation(int(left), int(right))
