"""What crosses a boundary: options down, progress up, and the two ways to stop.

Every module may import this one; it imports nothing of the project.
"""

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

POLICIES = ("greedy", "top_k", "random")
EXACT = "exact"
RUNTIMES = (EXACT, "auto", "openvino", "openvino-bf16", "torch-bf16")
AUTO = "auto"
"""num_patches that stops by itself where the next patch is expected to change little."""
AUTO_GAIN = 0.01
"""Share of the expected error that the next patch must add for k = auto to take it, unless the bundle says otherwise (nmsw export --calibrate). Set on the two held-out volumes of the model card (27
candidates each), with weights of an earlier stage: 7 patches, within 0.003 DSC of all patches, where 0.02 stops 0.011 short on one of
them. With the weights of the model card: 5 patches, within 0.005. The packaged sample volume gets 8 of 36."""

MAX_THREADS = 1024
"""Where the system refuses threads, libgomp ends the process without a word."""


class UserError(Exception):
    """Something a user can fix; the text is shown as it is."""


class Cancelled(Exception):
    """The caller asked to stop; raised from a progress callback, passes through the library untouched."""


@dataclass(frozen=True)
class Progress:
    """One step of a long run."""

    stage: str
    """Machine-readable stage: read, canonical, coarse, patches, restore, write, ..."""
    fraction: float
    """Share of the whole run that is done, in [0, 1]."""
    message: str
    """What is going on, for the user."""
    done: int = 0
    """Patches that are done, in the stage of the patches."""
    total: int = 0
    """Patches of this run, in the stage of the patches."""


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The progress callback of a caller that does not want to hear."""


@dataclass(frozen=True)
class PatchBox:
    """A chosen patch in the world, as far as it lies inside the model grid of the volume; its sides follow the RAS axes."""

    rank: int
    """1 is the most important."""
    candidate: int
    """Index in the candidate grid."""
    importance: float
    """p(z | x_low), in (0, 1)."""
    center_ras: tuple[float, float, float]
    size_mm: tuple[float, float, float]
    """Extent along R, A, S."""

    @classmethod
    def from_dict(cls, values: dict) -> "PatchBox":
        """The inverse of dataclasses.asdict, also after JSON."""
        return cls(**values | {"center_ras": tuple(values["center_ras"]), "size_mm": tuple(values["size_mm"])})


@dataclass(frozen=True)
class SegmentOptions:
    """What a user chooses for one segmentation; the same in the panel, the command line and the scripts."""

    bundle: str = "torso-unet"
    """Name of an installed bundle, or a bundle folder."""
    num_patches: int | str | None = 10
    """Number of candidates that go through the local net (k); None runs all of them, 0 only the coarse net, "auto" as many as pay."""
    policy: str = "greedy"
    """How candidates are chosen: greedy (coverage), top_k (the paper) or random (a baseline)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    structures: tuple[str, ...] = ()
    """Label names to keep; empty keeps all."""
    roi_to_ras: tuple[tuple[float, ...], ...] | None = None
    """4 x 4; sends the cube [-0.5, 0.5]^3 to the region of interest in RAS mm, oblique or not. Patches are spent inside it only,
    and segments end at its faces; None is the whole volume."""
    min_island_ml: float = 0.0
    """Parts of a structure that lie apart from it and are smaller than this become background, except its largest; 0 keeps all of them."""
    threads: int | None = None
    """CPU threads; None takes all physical cores. The worker of the panel runs at low priority, so that the application stays responsive."""
    runtime: str = EXACT
    """What computes the local net on a CPU: exact (PyTorch in float32, the same bits on every run), auto (the fastest on this computer whose answer
    agrees, measured once), or one by name: openvino, openvino-bf16, torch-bf16. A GPU always computes as in exact."""

    def __post_init__(self) -> None:
        is_count = isinstance(self.num_patches, int) and self.num_patches >= 0
        if not (is_count or self.num_patches in (None, AUTO)):
            raise UserError(f"k is {self.num_patches}, but it counts patches. Use 0 for the coarse net alone, a positive number, 'auto' or 'all'.")
        if self.policy not in POLICIES:
            raise UserError(unknown_name("policy", self.policy, POLICIES))
        if self.num_patches == AUTO and self.policy != "greedy":
            raise UserError(
                f"k = auto asks how much the next patch would add, which only the policy greedy knows; the policy is {self.policy}. Use greedy, or a number of patches."
            )
        if self.runtime not in RUNTIMES:
            raise UserError(unknown_name("runtime", self.runtime, RUNTIMES))
        if not 0 <= self.min_island_ml < float("inf"):
            raise UserError(f"The size of islands to remove is {self.min_island_ml} ml. Use 0 or more.")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise UserError(f"threads is {self.threads}. Use 1 or more, at most {MAX_THREADS}, or leave it out.")

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
        if values.get("roi_to_ras") is not None:
            values["roi_to_ras"] = tuple(tuple(float(element) for element in row) for row in values["roi_to_ras"])
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
