"""What is wrong with the labels of a data set although every file can be read: nothing known, nothing there, a class that nobody has."""

from collections.abc import Collection, Mapping, Sequence

from NMSWSegment.data.training_sample import UNKNOWN_LABEL
from NMSWSegment.protocol import UserError

NAMES_SHOWN = 8


def label_warnings(cases: Sequence[tuple[str, Mapping[int, int]]], *, anatomy_labels: Collection[int], label_names: Sequence[str]) -> list[str]:
    """Sentences about cases without any class, and about classes without any case.

    Args:
        cases: name, and the voxels of every label that the case holds.
        anatomy_labels: labels that the anatomies hold.
        label_names: classes without background, in label order.

    Raises:
        UserError: a case has no known label at all.
    """
    nothing_known = [name for name, voxels in cases if not set(voxels) - {UNKNOWN_LABEL}]
    if nothing_known:
        raise UserError(
            f"The label of {few(nothing_known)} is 255 (unknown) everywhere, so that there is nothing to learn from. "
            f"Correct it, or take the case out of the data set's list."
        )
    only_background = [name for name, voxels in cases if not set(voxels) - {UNKNOWN_LABEL, 0}]
    present = {value for _, voxels in cases for value in voxels} | set(anatomy_labels)
    never = [name for value, name in enumerate(label_names, start=1) if value not in present]
    warnings = []
    if only_background:
        warnings.append(
            f"{len(only_background)} of {len(cases)} cases hold no class, only background: {few(only_background)}. Check that their labels are right."
        )
    if never:
        warnings.append(
            f"{len(never)} of {len(label_names)} classes are in no case, so that the nets cannot learn them: {few(never)}. Check the list of labels."
        )
    return warnings


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f", ... {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
