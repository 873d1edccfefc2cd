"""Codes and colors for label names, so that every segment of a bundle can be exported to DICOM.

The table is Resources/Terminology/anatomy.json. Names are matched without case and without their side, so that
kidney_left, left_kidney and Kidney_L are the same coded structure.
"""

import colorsys
import functools
import json
import re
from collections.abc import Sequence

from NMSWSegment.files.bundle import Code, Label
from NMSWSegment.files.resources import resources_folder
from NMSWSegment.protocol import UserError

ANATOMY_PATH = resources_folder() / "Terminology" / "anatomy.json"
MAX_LABELS = 255
"""A labelmap is uint8."""
CATEGORIES = {
    "anatomical structure": Code("SCT", "123037004", "Anatomical Structure"),
    "tissue": Code("SCT", "85756007", "Tissue"),
}
GENERIC_TYPE = Code("SCT", "113343008", "Organ")
"""Type of a structure that the table does not know; Slicer lists it under the category Tissue."""
SIDES = {"left": Code("SCT", "7771000", "Left"), "right": Code("SCT", "24028007", "Right")}
SIDE_WORDS = {"left": "left", "l": "left", "right": "right", "r": "right"}
LEFT_LIGHTENING = 0.35
"""Share of white in the color of a left structure, so that the two sides can be told apart."""
GOLDEN_RATIO = 0.618034
"""Steps around the hue circle that never meet: neighbors in a list get far-apart colors."""


def coded_labels(names: Sequence[str]) -> tuple[Label, ...]:
    """Labels with values 1.. in the order of the names, coded where the table knows the structure.

    Args:
        names: one name per class, background left out.

    Returns:
        One label per name. A structure that is not in the table gets the generic code 'Organ'; no two labels share a color.

    Raises:
        UserError: a name is empty or repeated, or there are more names than a uint8 labelmap can hold.
    """
    _check_names(names)
    labels: list[Label] = []
    for value, name in enumerate(names, start=1):
        category, type_code, modifier, color = _coded(name)
        color = _unused_color(color, used={label.color for label in labels}, value=value)
        labels.append(Label(value=value, name=name, color=color, category=category, type=type_code, modifier=modifier))
    return tuple(labels)


def codes_of_terminology(entry: str) -> tuple[Code, Code, Code | None]:
    """Category, type and modifier of a terminology entry string of Slicer, the inverse of Label.terminology.

    An entry without a category or a type, as of a segment that a user added, gives tissue and the generic code 'Organ'.
    """
    codes = [Code(*parts) if len(parts) == 3 and all(parts) else None for parts in (text.split("^") for text in entry.split("~")[1:4])]
    category, type_code, modifier = [*codes, None, None, None][:3]
    return category or CATEGORIES["tissue"], type_code or GENERIC_TYPE, modifier


def _check_names(names: Sequence[str]) -> None:
    """Raise UserError on names that cannot be the classes of one bundle."""
    if len(names) > MAX_LABELS:
        raise UserError(f"There are {len(names)} label names, but a labelmap holds {MAX_LABELS}. Split the labels into two bundles.")
    for index, name in enumerate(names):
        if not name.strip():
            raise UserError(f"Label {index + 1} has no name. Give every label a name, such as kidney_left.")
        if name in names[:index]:
            raise UserError(f"The label name '{name}' appears twice. Give every label its own name.")


def _coded(name: str) -> tuple[Code, Code, Code | None, tuple[int, int, int] | None]:
    """Category, type, modifier and color of a name; the color of an unknown structure is None."""
    table = _anatomy()
    words = [word for word in re.split(r"[\s_\-]+", name.strip().lower()) if word]
    sides = [SIDE_WORDS[word] for word in words if word in SIDE_WORDS]
    side = sides[0] if len(sides) == 1 else None
    base = "_".join(word for word in words if word not in SIDE_WORDS)
    # heart_atrium_left is a structure of its own, without a modifier; kidney_left is a kidney with one
    structure = table.get("_".join(words))
    modifier = None
    if structure is None:
        structure = table.get(base)
        modifier = SIDES[side] if side else None
    if structure is None:
        return CATEGORIES["tissue"], GENERIC_TYPE, modifier, None
    color = tuple(structure["color"])
    if modifier == SIDES["left"]:
        color = tuple(round(channel + (255 - channel) * LEFT_LIGHTENING) for channel in color)
    category = CATEGORIES[structure.get("category", "anatomical structure")]
    return category, Code("SCT", structure["value"], structure["meaning"]), modifier, color


def _unused_color(color: tuple[int, int, int] | None, *, used: set[tuple[int, int, int]], value: int) -> tuple[int, int, int]:
    """The color itself, or where it is missing or taken the first free one on the hue circle, starting from the value."""
    step = value
    while color is None or color in used:
        red, green, blue = colorsys.hsv_to_rgb((step * GOLDEN_RATIO) % 1.0, 0.65, 0.9)
        color = (round(red * 255), round(green * 255), round(blue * 255))
        step += 1
    return color


@functools.lru_cache(maxsize=1)
def _anatomy() -> dict[str, dict]:
    """Structures by lower-case name, aliases included."""
    content = json.loads(ANATOMY_PATH.read_text(encoding="utf-8"))
    structures = {name.lower(): structure for name, structure in content["structures"].items()}
    return structures | {alias: structures[name] for alias, name in content["aliases"].items()}
