"""From records to tables: one row a method, with the spread over cases, and what the figures say in plain words."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from NMSWSegment.evaluation.measurement import RUNS, STAGES

REFERENCE_METHOD = "sw_0.50"
NMSW_PREFIXES = ("top_k_", "greedy_")
CLEARLY_LESS = 0.95
"""Share of the time of another run; the same work measured twice differs by a few per cent."""
GOOD_ENOUGH = 0.99
"""Share of the sliding window's Dice at which the plain sentence calls a k enough."""


@dataclass(frozen=True)
class Row:
    """One method; means over the cases, None where a value is not known."""

    name: str
    title: str
    cases: int
    dsc: float | None
    dsc_sd: float | None
    nsd_2mm: float | None
    nsd_2mm_sd: float | None
    nsd_2voxels: float | None
    hd95_mm: float | None
    cold_s: float
    warm_s: float
    stages_s: dict[str, float]
    """Of the warm run."""
    windows: float
    candidates: float
    tmacs: float | None
    paper_tmacs: float | None
    peak_gb: float | None
    """The largest over the cases, 10^9 bytes."""
    gpu_gb: float | None

    @property
    def is_nmsw(self) -> bool:
        """Whether this is NMSW with a number of patches."""
        return self.name.startswith(NMSW_PREFIXES)


def summary_rows(records: Sequence[dict]) -> dict[str, Row]:
    """Rows by method name, in the order of the records."""
    names = list(dict.fromkeys(record["method"] for record in records))
    return {name: _row([record for record in records if record["method"] == name]) for name in names}


def main_table(rows: dict[str, Row], *, reference: Row | None) -> str:
    """Accuracy, time, cost and memory of every method, Markdown; relative to a row of the same run where there is one."""
    header = (
        "method",
        "DSC",
        "NSD 2 mm",
        "NSD 2 voxels",
        "HD95 mm",
        "s cold",
        "s warm",
        "patches",
        "TMACs",
        "TMACs, paper's count",
        "peak GB",
        "GPU GB",
        "DSC of SW 0.5",
        "time of SW 0.5",
    )
    lines = []
    for row in rows.values():
        relative = (_percent(row.dsc, reference.dsc), _percent(row.warm_s, reference.warm_s)) if reference else ("-", "-")
        accuracy = (_spread(row.dsc, row.dsc_sd), _spread(row.nsd_2mm, row.nsd_2mm_sd), _number(row.nsd_2voxels, 3), _number(row.hd95_mm, 1))
        cost = (
            f"{row.cold_s:.1f}",
            f"{row.warm_s:.1f}",
            f"{row.windows:g} of {row.candidates:g}",
            _number(row.tmacs, 4),
            _number(row.paper_tmacs, 4),
            _number(row.peak_gb, 2),
            _number(row.gpu_gb, 2),
        )
        lines.append((row.title, *accuracy, *cost, *relative))
    return markdown(header, lines)


def stage_table(rows: dict[str, Row]) -> str:
    """Seconds of the warm run by stage; opening the nets is the difference to the cold run."""
    stages = [stage for stage in STAGES if stage != "load"]
    return markdown(("method", *stages), [(row.title, *(f"{row.stages_s[stage]:.2f}" for stage in stages)) for row in rows.values()])


def structure_table(records: Sequence[dict], methods: Sequence[str], *, metric: str) -> str:
    """Mean and spread of a metric for every structure and some methods."""
    titles = {record["method"]: record["title"] for record in records}
    shown = [name for name in methods if name in titles]
    lines = []
    for structure in structures_of(records, metric):
        values = [values_of(records, method=name, structure=structure, metric=metric) for name in shown]
        lines.append((structure, str(len(values[0])), *(_spread(*_mean_and_sd(found)) for found in values)))
    return markdown(("structure", "cases", *(titles[name] for name in shown)), lines)


def csv_text(rows: dict[str, Row]) -> str:
    """Every row with all stages, comma-separated; an unknown value is an empty cell."""
    plain = [field for field in Row.__dataclass_fields__ if field != "stages_s"]
    return _csv(
        [*plain, *(f"{stage}_s" for stage in STAGES)],
        [[getattr(row, field) for field in plain] + [row.stages_s[stage] for stage in STAGES] for row in rows.values()],
    )


def structures_csv_text(records: Sequence[dict], metrics: Sequence[str]) -> str:
    """Mean and spread of every metric, structure and method."""
    lines = []
    for method in dict.fromkeys(record["method"] for record in records):
        for structure in structures_of(records, metrics[0]):
            found = [values_of(records, method=method, structure=structure, metric=metric) for metric in metrics]
            lines.append([method, structure, len(found[0]), *(value for values in found for value in _mean_and_sd(values))])
    return _csv(["method", "structure", "cases", *(column for metric in metrics for column in (metric, f"{metric}_sd"))], lines)


def plain_sentence(rows: dict[str, Row]) -> str:
    """Which k to choose, for a clinician.

    The yardstick for time is the sliding window; for accuracy, too, unless it is worse than the coarse net. Then the local net cannot
    stand alone, and the yardstick for accuracy is running every patch.
    """
    window, coarse, every = (rows.get(name) for name in (REFERENCE_METHOD, "coarse", "all"))
    nmsw = [row for row in rows.values() if row.is_nmsw]
    if window is None or not nmsw:
        return "There is no sentence on what k to choose without the sliding window (sw_0.50) and NMSW among the methods."
    if window.dsc is None:
        return "There is no sentence on what k to choose, because the cases show none of the classes."
    is_yardstick = coarse is None or every is None or window.dsc >= coarse.dsc
    goal, goal_name = (window, "a sliding window") if is_yardstick else (every, "running every patch")
    if goal.dsc == 0:
        return f"There is no sentence on what k to choose, because {goal_name} finds none of the structures (DSC 0)."
    enough = [row for row in nmsw if row.dsc >= GOOD_ENOUGH * goal.dsc]
    best = min(enough, key=lambda row: row.warm_s) if enough else max(nmsw, key=lambda row: row.dsc)
    whose = "its time" if is_yardstick else "the time of a sliding window"
    volumes = "one volume" if best.cases == 1 else f"{best.cases} volumes"
    parts = [
        f"k = {best.name.rpartition('_')[2]} gives {best.dsc / goal.dsc:.0%} of the Dice of {goal_name} in {best.warm_s / window.warm_s:.0%} of {whose} on this computer ({best.title.partition(',')[0]}, {volumes})."
    ]
    if not enough:
        parts.append(f"No k reaches {GOOD_ENOUGH:.0%} of it.")
    if not is_yardstick:
        parts.append(
            f"The sliding window is no yardstick for accuracy here: the local net was not trained to work alone, and alone it is worse than the coarse net (DSC {window.dsc:.3f} against {coarse.dsc:.3f})."
        )
    elif best.warm_s >= window.warm_s:
        parts.append("A sliding window is the better choice here.")
    return " ".join(parts)


def losses(rows: dict[str, Row]) -> list[str]:
    """Where another method is at least as accurate in clearly less time, one sentence for each row of NMSW that loses."""
    sentences = []
    others = [row for row in rows.values() if row.name.startswith(("sw_", "zoom_out", "random_", "coarse"))]
    for row in (row for row in rows.values() if row.is_nmsw and row.dsc is not None):
        better = [other for other in others if other.dsc >= row.dsc and other.warm_s <= CLEARLY_LESS * row.warm_s]
        if better:
            names = ", ".join(f"{other.title} ({other.dsc:.3f}, {other.warm_s:.1f} s)" for other in better)
            sentences.append(f"{row.title} ({row.dsc:.3f}, {row.warm_s:.1f} s) loses against {names}.")
    return sentences


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def structures_of(records: Sequence[dict], metric: str) -> list[str]:
    """Structures that any case holds, in label order as far as the cases show it."""
    return list(dict.fromkeys(structure for record in records for structure in record["scores"][metric]))


def values_of(records: Sequence[dict], *, method: str, structure: str, metric: str) -> list[float]:
    """The known values of a structure, one a case; HD95 of a missed structure is not known."""
    found = [record["scores"][metric].get(structure) for record in records if record["method"] == method]
    return [value for value in found if value is not None]


def _row(records: Sequence[dict]) -> Row:
    """The row of one method."""
    first, scores = records[0], [record["scores"] for record in records]
    dsc, dsc_sd = _mean_and_sd(_known(scores, "mean"))
    nsd_2mm, nsd_2mm_sd = _mean_and_sd(_known(scores, "mean_nsd_2mm"))
    cold_s, warm_s = (_mean_and_sd([sum(record[f"seconds_{run}"].values()) for record in records])[0] for run in RUNS)
    return Row(
        name=first["method"],
        title=first["title"],
        cases=len(records),
        dsc=dsc,
        dsc_sd=dsc_sd,
        nsd_2mm=nsd_2mm,
        nsd_2mm_sd=nsd_2mm_sd,
        nsd_2voxels=_mean(scores, "mean_nsd_2voxels"),
        hd95_mm=_mean(scores, "mean_hd95_mm"),
        cold_s=cold_s,
        warm_s=warm_s,
        stages_s={stage: _mean([record["seconds_warm"] for record in records], stage) for stage in STAGES},
        windows=_mean(records, "windows"),
        candidates=_mean(records, "candidates"),
        tmacs=_mean(records, "macs", factor=1e-12),
        paper_tmacs=_mean(records, "paper_macs", factor=1e-12),
        peak_gb=max(_known(records, "peak_memory_bytes", factor=1e-9), default=None),
        gpu_gb=max(_known(records, "gpu_memory_bytes", factor=1e-9), default=None),
    )


def _known(entries: Sequence[dict], key: str, *, factor: float = 1) -> list[float]:
    """The values of a key that are not None."""
    return [entry[key] * factor for entry in entries if entry[key] is not None]


def _mean(entries: Sequence[dict], key: str, *, factor: float = 1) -> float | None:
    """Mean of the known values of a key; None where there is none."""
    return _mean_and_sd(_known(entries, key, factor=factor))[0]


def _mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, which one value does not have."""
    return (statistics.fmean(values) if values else None), (statistics.stdev(values) if len(values) > 1 else None)


def _spread(value: float | None, sd: float | None) -> str:
    """'0.631 ± 0.012'."""
    if value is None:
        return "-"
    return f"{value:.3f}" if sd is None else f"{value:.3f} ± {sd:.3f}"


def _number(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, reference: float | None) -> str:
    """'97 %', or a dash where there is nothing to compare with."""
    return f"{100 * value / reference:.0f} %" if value is not None and reference else "-"


def _csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Comma-separated values; six digits, nothing for None."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in line] for line in lines])
    return stream.getvalue()
