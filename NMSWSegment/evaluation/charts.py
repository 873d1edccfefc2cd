"""Charts of a comparison: accuracy against cost, accuracy by k, accuracy by the size of a structure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from NMSWSegment.evaluation.plots import save, white_figure
from NMSWSegment.evaluation.tables import Row

# Prefix of the method names -> (name in the legend, color, marker); the first that fits. Colors of Okabe and Ito, told apart by the color-blind.
FAMILIES = {
    "greedy_": ("NMSW greedy", "#0072b2", "o"),
    "top_k_": ("NMSW top-k", "#56b4e9", "s"),
    "auto": ("NMSW, k = auto", "#009e73", "*"),
    "all": ("NMSW, k = all", "#004466", "D"),
    "coarse": ("coarse net only", "#999999", "X"),
    "sw_": ("sliding window", "#d55e00", "^"),
    "zoom_out": ("zoom-out", "#cc79a7", "P"),
    "random_fair": ("random, fair", "#e69f00", "v"),
    "random_published": ("random, as published", "#8a7300", "<"),
}
LINES = ("greedy_", "top_k_", "random_fair_", "random_published_")
SIZES_ML = (3, 10, 30, 100, 300, 1000, 3000)
"""Centers, on a logarithmic scale, of what is averaged together."""
LEVELS = {"coarse": ":", "sw_0.50": "--", "sw_0.25": "-."}


def write_pareto(rows: dict[str, Row], path: str | Path) -> None:
    """Accuracy against seconds and against MACs; a point further left and higher is better.

    Raises:
        UserError: the file cannot be written.
    """
    shown = [row for row in rows.values() if family(row.name)]
    figure = white_figure(11, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    _scatter(axes[0], [(row, row.warm_s) for row in shown], label="seconds, warm")
    _scatter(axes[1], [(row, row.tmacs) for row in shown if row.tmacs], label="TMACs (true)")
    axes[0].set_ylabel("mean DSC")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside right upper")
    save(figure, Path(path))


def write_dsc_by_k(rows: dict[str, Row], path: str | Path) -> None:
    """DSC by the number of patches that were really run, with spread over cases, and the levels of what has no k.

    Raises:
        UserError: the file cannot be written.
    """
    figure = white_figure(8.5, 4.2)
    ax = figure.subplots()
    for prefix in LINES:
        found = sorted((row for row in rows.values() if row.name.startswith(prefix)), key=lambda row: row.windows)
        points = [row for row in (rows.get("coarse"), *found, rows.get("all") if prefix != "random_published_" else None) if row]
        name, color, marker = FAMILIES[prefix.removesuffix("_") if prefix.startswith("random") else prefix]
        if found:
            ax.errorbar(
                [row.windows for row in points],
                [row.dsc for row in points],
                yerr=[row.dsc_sd or 0 for row in points],
                color=color,
                marker=marker,
                capsize=2,
                label=name,
            )
    for name, style in LEVELS.items():
        if name in rows:
            ax.axhline(rows[name].dsc, color="#555555", linestyle=style, linewidth=1, label=rows[name].title)
    ax.set(xlabel="patches through the local net", ylabel="mean DSC")
    figure.legend(fontsize=8, loc="outside right upper")
    save(figure, Path(path))


def write_dsc_by_size(records: Sequence[dict], methods: Sequence[str], path: str | Path) -> None:
    """DSC of structures by their volume in the case: every structure of every case a dot, and the mean of those of about one size.

    Args:
        records: as in results.json.
        methods: those to show, as far as there are any.

    Source: the paper's figure 7.

    Raises:
        UserError: the file cannot be written.
    """
    figure = white_figure(8.5, 4.2)
    ax = figure.subplots()
    for method in methods:
        pairs = [
            (record["scores"]["volumes_ml"][name], dsc)
            for record in records
            if record["method"] == method
            for name, dsc in record["scores"]["dsc"].items()
            if name in record["scores"].get("volumes_ml", {})
        ]
        if not pairs:
            continue
        volumes_ml, dsc = np.array(pairs).T
        name, color, marker = family(method)
        ax.scatter(volumes_ml, dsc, color=color, s=6, alpha=0.35, linewidths=0)
        nearest = np.abs(np.log(volumes_ml)[:, None] - np.log(SIZES_ML)).argmin(axis=1)
        found = [(size, dsc[nearest == number].mean()) for number, size in enumerate(SIZES_ML) if (nearest == number).any()]
        ax.plot(*zip(*found), color=color, marker=marker, label=f"{name} {_short(method)}".strip())
    ax.set(xscale="log", xlabel="volume of the structure, ml", ylabel="DSC")
    ax.grid(alpha=0.3, which="both")
    if ax.lines:
        figure.legend(fontsize=8, loc="outside right upper")
    save(figure, Path(path))


def family(name: str) -> tuple[str, str, str] | None:
    """Legend, color and marker of a method; None for those that only the ablations show."""
    return next((look for prefix, look in FAMILIES.items() if name.startswith(prefix)), None)


def _scatter(ax, points: Sequence[tuple[Row, float]], *, label: str) -> None:
    """One marker a row, named by its number of patches."""
    named = set()
    for row, cost in points:
        name, color, marker = family(row.name)
        ax.scatter(cost, row.dsc, color=color, marker=marker, s=45, zorder=3, label=None if name in named else name)
        ax.annotate(_short(row.name), (cost, row.dsc), xytext=(4, 4), textcoords="offset points", fontsize=7)
        named.add(name)
    ax.set_xscale("log")
    ax.set_xlabel(label)
    ax.grid(alpha=0.3, which="both")


def _short(name: str) -> str:
    """The part of a method's name that the legend does not say: its k or overlap."""
    last = name.rpartition("_")[2]
    return last if last.replace(".", "").isdigit() or last == "foreground" else ""
