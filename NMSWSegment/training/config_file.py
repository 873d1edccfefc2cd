"""Options of a run in a YAML file; a run's options.json is one too, because JSON is YAML."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from NMSWSegment.protocol import UserError, unknown_name


def read_config(path: Path, *, types: dict[str, Any], aliases: dict[str, str]) -> dict:
    """The values of a file by option.

    Args:
        types: what each option is: int, float, str, bool, one of them or None, or a tuple of them. A value of null counts as not given.
        aliases: other names of options; dashes and underscores are the same.

    Raises:
        UserError: the file cannot be read, or holds an option that does not exist or a value of another kind.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else re.sub(r"\s+", " ", str(error))
        raise UserError(f"'{path}' cannot be read ({reason}). Write one option a line, as in 'iterations: 5000', or give the options.json of a run.") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' holds no options. Write one a line, as in 'iterations: 5000', or give the options.json of a run.")
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        name = aliases.get(name, name)
        if name not in types:
            raise UserError(unknown_name(f"option in '{path}'", str(key), sorted(types)))
        if value is None:
            continue
        try:
            result[name] = converted(value, types[name])
        except (TypeError, ValueError) as error:
            raise UserError(f"The option '{key}' in '{path}' is {value!r}. Give {_described(types[name])}.") from error
    return result


def converted(value: object, wanted: Any) -> object:
    """A value of YAML as an option has it; '1e-4', which YAML takes for a text, is a number.

    Raises:
        TypeError, ValueError: it is of another kind.
    """
    parts = getattr(wanted, "__args__", ())
    if parts and parts[-1] is type(None):
        return converted(value, parts[0])
    if parts and parts[-1] is Ellipsis:
        items = [value] if isinstance(value, str) else _listed(value)
        return tuple(converted(item, parts[0]) for item in items)
    if parts:
        items = _listed(value)
        if len(items) != len(parts):
            raise ValueError("another number of values")
        return tuple(converted(item, part) for item, part in zip(items, parts))
    return _SIMPLE[wanted](value)


def _listed(value: object) -> Sequence:
    """A list, as it is."""
    if not isinstance(value, (list, tuple)):
        raise TypeError("no list")
    return value


def _number(value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or not math.isfinite(number := float(value)):
        raise TypeError("no number")
    return number


def _whole_number(value: object) -> int:
    """A number without a fraction."""
    if not (number := _number(value)).is_integer():
        raise ValueError("a fraction")
    return int(number)


def _of_kind(kind: type) -> Callable[[object], object]:
    """A value that is of a kind already."""

    def check(value: object) -> object:
        if not isinstance(value, kind):
            raise TypeError(f"no {kind.__name__}")
        return value

    return check


_SIMPLE: dict[type, Callable[[object], object]] = {int: _whole_number, float: _number, str: _of_kind(str), bool: _of_kind(bool)}
_DESCRIBED = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _described(wanted: Any) -> str:
    """What a type is, for a sentence."""
    parts = [part for part in getattr(wanted, "__args__", ()) if part is not type(None)]
    if not parts:
        return _DESCRIBED[wanted]
    if len(parts) == 1:
        return _described(parts[0])
    if parts[-1] is Ellipsis:
        return "a list of pairs of numbers" if parts[0] not in _DESCRIBED else f"a list, each {_described(parts[0])}"
    return f"a list of {len(parts)}, each {_described(parts[0])}"
