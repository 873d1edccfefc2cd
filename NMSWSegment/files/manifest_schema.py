"""What a bundle's manifest may say: type and range of every value, checked in one place before anything believes it.

A person may have written the manifest by hand, and a bundle may come from anywhere.
"""

import math
import re
from collections.abc import Callable, Sequence

from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.normalization import NORMALIZATIONS
from NMSWSegment.protocol import UserError

MAX_OVERLAP = 0.9
"""More would run every voxel through the local net a thousand times."""
MAX_LABELS = 255
"""A labelmap is uint8."""
_MAX_PATCH_VOXELS = 1 << 27
_MAX_TEXT = 100_000

Check = Callable[[object, str], None]


def check_manifest(values: dict) -> None:
    """Raise UserError at the first value of a manifest that is missing, of the wrong type or out of range.

    Args:
        values: the JSON object; unknown keys are the caller's business.
    """
    for key, check in _REQUIRED.items():
        if key not in values:
            raise UserError(f"The bundle manifest lacks '{key}'. Export the bundle again.")
        check(values[key], key)
    for key, check in _OPTIONAL.items():
        if key in values:
            check(values[key], key)
    _check_together(values)


def _wrong(key: str, found: object, expected: str) -> UserError:
    """The sentence for a value that cannot be used."""
    shown = repr(found)
    return UserError(f"'{key}' of the bundle manifest is {shown if len(shown) <= 60 else shown[:57] + '...'}, but must be {expected}. Export the bundle again.")


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number; true and false are none, although Python counts with them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _boolean(value: object, key: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")


def _number(low: float, high: float) -> Check:
    """A finite number in [low, high]."""

    def check(value: object, key: str) -> None:
        if not (_is_number(value) and low <= value <= high):
            raise _wrong(key, value, f"a number from {low:g} to {high:g}")

    return check


def _integer(low: int, high: int) -> Check:
    """A whole number in [low, high]."""

    def check(value: object, key: str) -> None:
        if not (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
            raise _wrong(key, value, f"a whole number from {low} to {high}")

    return check


def _text(*, may_be_empty: bool = True) -> Check:
    """A text."""

    def check(value: object, key: str) -> None:
        if not (isinstance(value, str) and len(value) <= _MAX_TEXT and (may_be_empty or value.strip())):
            raise _wrong(key, value, "a text" if may_be_empty else "a text that is not empty")

    return check


def _list(item: Check, *, low: int, high: int) -> Check:
    """A list of `low` to `high` items."""

    def check(value: object, key: str) -> None:
        if not (isinstance(value, (list, tuple)) and low <= len(value) <= high):
            raise _wrong(key, value, f"a list of {low} values" if low == high else f"a list of {low} to {high} values")
        for index, element in enumerate(value):
            item(element, f"{key}[{index}]")

    return check


def _object(value: object, key: str) -> None:
    """A JSON object with anything in it."""
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object")


def _fields(required: dict[str, Check], optional: dict[str, Check]) -> Check:
    """A JSON object with known keys."""

    def check(value: object, key: str) -> None:
        _object(value, key)
        for name, field_check in required.items():
            if name not in value:
                raise UserError(f"'{key}' of the bundle manifest lacks '{name}'. Export the bundle again.")
            field_check(value[name], f"{key}.{name}")
        for name, field_check in optional.items():
            if name in value:
                field_check(value[name], f"{key}.{name}")

    return check


def _or_none(check_value: Check) -> Check:
    """A value or null."""
    return lambda value, key: None if value is None else check_value(value, key)


def _mapping(item: Check) -> Check:
    """A JSON object with any keys and one kind of values."""

    def check(value: object, key: str) -> None:
        _object(value, key)
        for name, element in value.items():
            item(element, f"{key}.{name}")

    return check


def _hash(value: object, key: str) -> None:
    """A SHA-256, hexadecimal."""
    if not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)):
        raise _wrong(key, value, "64 digits and letters a to f")


def _one_of(known: Sequence[str]) -> Check:
    """One of some words."""

    def check(value: object, key: str) -> None:
        if value not in known:
            raise _wrong(key, value, f"one of {', '.join(known)}")

    return check


def _any_number(value: object, key: str) -> None:
    """A number, NaN included."""
    if not _is_number(value):
        raise _wrong(key, value, "a number")


def _intensity_points(value: object, key: str) -> None:
    """Intensities that rise, each with a value in [0, 1]."""
    _list(_list(_number(-1e6, 1e6), low=2, high=2), low=2, high=64)(value, key)
    if any(first[0] >= second[0] for first, second in zip(value[:-1], value[1:])):
        raise _wrong(key, value, "pairs whose first numbers, the intensities, rise")
    if not all(0 <= point[1] <= 1 for point in value):
        raise _wrong(key, value, "pairs whose second numbers lie from 0 to 1")


def _check_together(values: dict) -> None:
    """Raise UserError where values do not go together."""
    labels: Sequence[dict] = values["labels"]
    names = [label["name"] for label in labels]
    for index, label in enumerate(labels):
        # the classes of the nets are counted, so that a label's value is its place in the list
        if label["value"] != index + 1:
            raise _wrong(f"labels[{index}].value", label["value"], f"{index + 1}, its place in the list")
        if label["name"] in names[:index]:
            raise _wrong(f"labels[{index}].name", label["name"], "another name than those before")
    if len(values["class_weights"]) != len(labels) + 1:
        raise UserError(f"The bundle manifest has {len(values['class_weights'])} class weights for {len(labels) + 1} classes. Export the bundle again.")
    size, overlap = values["patch_size"], values["overlap"]
    if math.prod(size) > _MAX_PATCH_VOXELS:
        raise _wrong("patch_size", size, f"at most {_MAX_PATCH_VOXELS} voxels in all")
    factors = values["coarse_factor"]
    try:
        grid = CandidateGrid.covering(size, patch_size=size, overlap=overlap, coarse_factor=factors)
    except ValueError:
        raise _wrong("overlap", overlap, f"such that patches of {list(size)} voxels move by a whole part of a patch, such as 0.5") from None
    if values["architecture"].get("cascade") and not grid.has_whole_coarse_voxels:
        raise _wrong("coarse_factor", factors, f"such that a cascade's patches of {list(size)} voxels begin and end with whole coarse voxels")


_CODE = _fields({key: _text(may_be_empty=False) for key in ("scheme", "value", "meaning")}, {})
_LABEL = _fields(
    {
        "value": _integer(1, MAX_LABELS),
        "name": _text(may_be_empty=False),
        "color": _list(_integer(0, 255), low=3, high=3),
        "category": _CODE,
        "type": _CODE,
    },
    {"modifier": _or_none(_CODE)},
)
_REQUIRED: dict[str, Check] = {
    "name": _text(may_be_empty=False),
    "title": _text(),
    "description": _text(),
    "backbone": _text(),
    "modality": _text(may_be_empty=False),
    "spacing_mm": _list(_number(0.01, 100), low=3, high=3),
    "intensity_points": _intensity_points,
    "patch_size": _list(_integer(1, 4096), low=3, high=3),
    "overlap": _number(0, MAX_OVERLAP),
    "coarse_factor": _list(_integer(1, 64), low=3, high=3),
    "coarse_multiple": _integer(1, 1024),
    "labels": _list(_LABEL, low=1, high=MAX_LABELS),
    "class_weights": _list(_number(-1e6, 1e6), low=1, high=MAX_LABELS + 1),
    "sha256": _mapping(_hash),
    "architecture": _fields({}, {"preset": _text(), "cascade": _boolean}),
}
_OPTIONAL: dict[str, Check] = {
    "importance_has_entropy": _boolean,
    "normalization": _one_of(NORMALIZATIONS),
    "num_runs": _integer(1, 100),
    "auto_gain": _number(0, 1),
    "min_island_share": _number(0, 1),
    "training": _object,
    "scores": _mapping(_mapping(_fields({"mean": _any_number}, {}))),
    "license": _text(),
    "attributions": _list(_text(), low=0, high=1000),
}
