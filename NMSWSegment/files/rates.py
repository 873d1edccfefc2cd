"""How fast this computer is, learned from the runs on it, for the estimate before the next one."""

import json
import math
from dataclasses import asdict, astuple, dataclass

from NMSWSegment.protocol import EXACT

NEWEST_RUN = 0.5
"""Share of the newest run in a remembered rate; the rest is what was known before."""
VOXEL_STAGES = ("canonical", "coarse", "select", "upsample")
"""Stages of the engine whose time grows with the volume on the model grid."""


@dataclass(frozen=True)
class Rate:
    """How fast a bundle is on a device of this computer."""

    patch_s: float
    """Seconds of one patch: local net and aggregation."""
    voxel_s: float
    """Seconds of everything else but the restoring, for one voxel of the model grid."""
    source_voxel_s: float = 0.0
    """Seconds to restore the labels of one voxel of the volume, of the coarse result too where it is shown first."""

    @classmethod
    def from_run_info(cls, run_info: dict) -> "Rate | None":
        """The rate of a run, from the run_info of the engine; None where it did not do all of the work, because the worker still had a
        part or a GPU gave up."""
        timings = run_info["timings_s"]
        computed = len(run_info["patches"]) - run_info["patches_reused"]
        if computed < 1 or run_info["device_steps"] or not all(timings.get(stage) for stage in (*VOXEL_STAGES, "patches", "restore")):
            return None
        return cls.of_whole_run(run_info)

    @classmethod
    def of_whole_run(cls, run_info: dict) -> "Rate":
        """The rate of a run that is known to have done all of the work, whatever the device did meanwhile."""
        timings = run_info["timings_s"]
        computed = len(run_info["patches"]) - run_info["patches_reused"]
        return cls(
            patch_s=timings["patches"] / computed + timings["aggregate"] / len(run_info["patches"]),
            voxel_s=sum(timings[stage] for stage in VOXEL_STAGES) / run_info["canonical_voxels"],
            source_voxel_s=(timings["restore"] + timings.get("preview", 0.0)) / math.prod(run_info["volume"]["shape_kji"]),
        )


def rate_device(device: str, *, runtime: str) -> str:
    """What a rate belongs to: a device, and on the CPU the runtime too."""
    return device if runtime == EXACT or device != "cpu" else f"{device} {runtime}"


class Rates:
    """The rates of this computer, by bundle name and device; see rate_device."""

    def __init__(self) -> None:
        self._learned: dict[tuple[str, str], Rate] = {}
        self._expected: dict[tuple[str, str], Rate] = {}

    def expect(self, bundle: str, device: str, rate: Rate) -> None:
        """Take a measurement of the worker, until a run gives a better one."""
        self._expected[bundle, device] = rate

    def learn(self, bundle: str, device: str, rate: Rate) -> None:
        """Take the rate of a run."""
        before = self._learned.get((bundle, device), rate)
        mixed = [NEWEST_RUN * new + (1 - NEWEST_RUN) * old for new, old in zip(astuple(rate), astuple(before))]
        self._learned[bundle, device] = Rate(*mixed)

    def get(self, bundle: str, device: str) -> Rate | None:
        """What is known; None for nothing."""
        return self._learned.get((bundle, device)) or self._expected.get((bundle, device))

    def to_json(self) -> str:
        """What runs have taught, for the application's settings."""
        return json.dumps([{"bundle": bundle, "device": device, **asdict(rate)} for (bundle, device), rate in self._learned.items()])

    @classmethod
    def from_json(cls, text: str) -> "Rates":
        """The inverse of to_json; a text that is anything else gives no rates."""
        rates = cls()
        try:
            for entry in json.loads(text):
                bundle, device, rate = str(entry.pop("bundle")), str(entry.pop("device")), Rate(**entry)
                if all(0 <= seconds < math.inf for seconds in astuple(rate)):
                    rates._learned[bundle, device] = rate
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls()
        return rates
