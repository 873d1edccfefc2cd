"""What crosses a boundary: options down, progress up, and the two ways to stop.

Every module may import this one; it imports nothing of the project.
"""

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

POLICIES = ("greedy", "top_k", "random")


class UserError(Exception):
    """Something a person can fix; the text is shown as it is."""


class Cancelled(Exception):
    """The caller asked to stop; raised from a report callback, passes through the library untouched."""


@dataclass(frozen=True)
class Progress:
    """One step of a long run."""

    stage: str
    """Machine-readable stage: read, canonical, coarse, patches, restore, write, ..."""
    fraction: float
    """Share of the whole run that is done, in [0, 1]."""
    message: str
    """What is going on, for a person."""


Report = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The report callback of a caller that does not want to hear."""


@dataclass(frozen=True)
class SegmentOptions:
    """What a person chooses for one segmentation; the same in the panel, the command line and the scripts."""

    bundle: str = "torso-unet"
    """Name of an installed bundle, or a bundle folder."""
    num_patches: int | None = 10
    """Number of candidates that go through the local net (k); None runs all of them, 0 only the coarse net."""
    policy: str = "greedy"
    """How candidates are chosen: greedy (coverage), top_k (the paper) or random (a baseline)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    structures: tuple[str, ...] = ()
    """Label names to keep; empty keeps all."""
    threads: int | None = None
    """CPU threads; None leaves one core free for the rest of the computer."""

    def __post_init__(self) -> None:
        if self.num_patches is not None and self.num_patches < 0:
            raise UserError(f"k is {self.num_patches}, but it counts patches. Use 0 for the coarse net alone, a positive number, or 'all'.")
        if self.policy not in POLICIES:
            raise UserError(unknown_name("policy", self.policy, POLICIES))
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads is {self.threads}. Use 1 or more, or leave it out.")

    def to_dict(self) -> dict:
        """A JSON-ready dict; the inverse of from_dict."""
        return asdict(self) | {"structures": list(self.structures)}

    @classmethod
    def from_dict(cls, values: dict) -> "SegmentOptions":
        """Options from a JSON object; an unknown key is an error that names the nearest known one."""
        reject_unknown_keys(cls, values, where="segment options")
        values = dict(values)
        if "structures" in values:
            values["structures"] = tuple(values["structures"])
        return cls(**values)


def unknown_name(kind: str, found: str, known: tuple[str, ...] | list[str]) -> str:
    """The sentence for a name that is not in a list: what was found, the nearest, all that exist."""
    nearest = difflib.get_close_matches(found, known, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    choice = f" Choose from: {', '.join(known)}." if known else f" There is no {kind} to choose from."
    return f"Unknown {kind} '{found}'.{hint}{choice}"


def reject_unknown_keys(dataclass_type: type, values: dict, *, where: str) -> None:
    """Raise UserError on the first key of `values` that is no field of the dataclass."""
    known = [field.name for field in fields(dataclass_type)]
    for key in values:
        if key not in known:
            raise UserError(unknown_name(f"key in {where}", key, known))
