"""What is written besides the labelmap and the statistics: the chosen patches, a picture."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from NMSWSegment.files.bundle import Label
from NMSWSegment.files.colors import rank_color
from NMSWSegment.files.display_slice import PLANES, DisplaySlice, display_slices
from NMSWSegment.files.output_file import check_output_path, replaced_file
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import PatchBox, UserError

PATCHES_ENDINGS = (".mrk.json",)
PREVIEW_ENDINGS = (".png",)

_MARKUPS_SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/markups-schema-v1.0.3.json#"

_CT_WINDOW = (-160.0, 240.0)
"""HU; the usual soft-tissue window."""
_OVERLAY_ALPHA = 0.45
_PAGE_COLOR = "#101418"
_TEXT_COLOR = "#e8ecf0"
_LARGEST_PANEL_INCHES = (6.5, 5.0)
"""Width and height that no slice exceeds."""
_LEGEND_HEIGHT_INCHES = 5.0
_LEGEND_ROWS = 22
_NUMBERED_PATCHES = 12
"""Further patches are outlined without their rank, or the numbers would hide the picture."""


def write_patches(patches: Sequence[PatchBox], path: str | Path) -> None:
    """Write the chosen patches as locked boxes that 3D Slicer opens as Markups, best first.

    Raises:
        UserError: the file cannot be written.
    """
    path = check_output_path(path, PATCHES_ENDINGS)
    document = {"@schema": _MARKUPS_SCHEMA, "markups": [_roi_markup(patch, count=len(patches)) for patch in patches]}
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def require_matplotlib(what_needs: str = "A preview needs", *, or_else: str = "") -> None:
    """Raise UserError if pictures cannot be drawn; to be asked before a long run.

    Args:
        what_needs: the beginning of the sentence.
        or_else: another way out, after the sentence.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what_needs} matplotlib, which is not installed. Install it with: pip install matplotlib{or_else}") from error


def write_preview(volume: Volume, labelmap: Volume, *, labels: Sequence[Label], patches: Sequence[PatchBox], path: str | Path) -> None:
    """Draw an axial, a coronal and a sagittal slice with labels, patches and a legend as a PNG picture.

    Args:
        volume: intensities; HU are shown in a soft-tissue window, anything else between its 1st and 99th percentile.
        labelmap: labels on the same grid.
        labels: structures for the legend.
        patches: chosen patches; those that a slice cuts are outlined in the color of their rank.
        path: file that ends in .png.

    Raises:
        UserError: matplotlib is missing or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_output_path(path, PREVIEW_ENDINGS)
    slices = display_slices(volume, labelmap)
    widths, height = _panel_inches(slices)
    present = [label for label in labels if (labelmap.array == label.value).any()]
    legend_width = 2.6 * max(-(-len(present) // _LEGEND_ROWS), 1)
    # A figure of its own, not pyplot: no window, no global state, safe in Slicer.
    figure = Figure(figsize=(sum(widths) + legend_width, height + 0.4), facecolor=_PAGE_COLOR, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4, width_ratios=[*widths, legend_width])
    window = _display_window(volume.array)
    for ax, view in zip(axes, slices):
        _draw_slice(ax, view, labels=present, window=window)
        _draw_patches(ax, view, patches=patches)
    _draw_legend(axes[3], labelmap, labels=present, num_patches=len(patches))
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=130, facecolor=_PAGE_COLOR)


def _roi_markup(patch: PatchBox, *, count: int) -> dict:
    """One box of Slicer's Markups file format, which has no key for the fill: a user turns it off in the Markups module."""
    color = list(rank_color(patch.rank, count=count))
    name = f"Patch {patch.rank}"
    description = f"candidate {patch.candidate}, importance {patch.importance:.4g}"
    center = [float(coordinate) for coordinate in patch.center_ras]
    return {
        "type": "ROI",
        "name": name,
        "coordinateSystem": "RAS",
        "coordinateUnits": "mm",
        "locked": True,
        "labelFormat": "%N",
        "roiType": "Box",
        "center": center,
        "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        "size": [float(length) for length in patch.size_mm],
        "insideOut": False,
        "controlPoints": [{"id": "1", "label": name, "description": description, "position": center, "locked": True, "positionStatus": "defined"}],
        "display": {
            "visibility": True,
            "color": color,
            "selectedColor": color,
            "handlesInteractive": False,
            "pointLabelsVisibility": False,
            "propertiesLabelVisibility": True,
        },
    }


def _panel_inches(slices: Sequence[DisplaySlice]) -> tuple[list[float], float]:
    """Width of each panel and the height of all, with one scale for the three slices."""
    widths_mm = [view.across_mm[0] - view.across_mm[1] for view in slices]
    heights_mm = [view.up_mm[1] - view.up_mm[0] for view in slices]
    inches_per_mm = min(_LARGEST_PANEL_INCHES[0] / max(widths_mm), _LARGEST_PANEL_INCHES[1] / max(heights_mm))
    return [width * inches_per_mm for width in widths_mm], max(max(heights_mm) * inches_per_mm, _LEGEND_HEIGHT_INCHES)


def _display_window(array: np.ndarray) -> tuple[float, float]:
    """Intensities shown as black and white."""
    sample = array.ravel()[:: max(array.size // 200_000, 1)]
    # Only HU reach far below zero and stay within what a CT can hold.
    if sample.min() < -500 and sample.min() >= -5000 and sample.max() <= 40_000:
        return _CT_WINDOW
    low, high = np.percentile(sample, (1, 99))
    return float(low), float(max(high, low + 1e-6))


def _draw_slice(ax, view: DisplaySlice, *, labels: Sequence[Label], window: tuple[float, float]) -> None:
    """Gray values, labels in color with contours, and the letters of the directions."""
    extent = (*view.across_mm, *view.up_mm)
    ax.imshow(view.intensities, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="bilinear")
    overlay = np.zeros((*view.labels.shape, 4), dtype=np.float32)
    for label in labels:
        overlay[view.labels == label.value] = (*(channel / 255 for channel in label.color), _OVERLAY_ALPHA)
    ax.imshow(overlay, extent=extent, interpolation="nearest")
    for label in labels:
        is_label = view.labels == label.value
        # A contour needs at least 2 x 2 pixels.
        if is_label.any() and not is_label.all() and min(is_label.shape) > 1:
            ax.contour(
                is_label.astype(np.float32), levels=[0.5], colors=[[channel / 255 for channel in label.color]], linewidths=0.9, extent=extent, origin="upper"
            )
    ax.set(xlim=view.across_mm, ylim=view.up_mm, xticks=[], yticks=[], aspect="equal", facecolor="black")
    across, up, through = PLANES[view.plane]
    ax.set_title(f"{view.plane}  {'RAS'[through]} {view.position_mm:.0f} mm", color=_TEXT_COLOR, fontsize=9)
    letters = ("RL", "AP", "SI")
    places = [(0.015, 0.5, letters[across][0], "left", "center"), (0.985, 0.5, letters[across][1], "right", "center")]
    places += [(0.5, 0.985, letters[up][0], "center", "top"), (0.5, 0.015, letters[up][1], "center", "bottom")]
    for x, y, letter, horizontal, vertical in places:
        ax.text(x, y, letter, transform=ax.transAxes, color=_TEXT_COLOR, fontsize=10, fontweight="bold", ha=horizontal, va=vertical)


def _draw_patches(ax, view: DisplaySlice, *, patches: Sequence[PatchBox]) -> None:
    """Outlines of the patches that the slice cuts; the best is drawn last, on top."""
    from matplotlib.patches import Rectangle

    across, up, through = PLANES[view.plane]
    for patch in reversed(patches):
        if abs(view.position_mm - patch.center_ras[through]) >= patch.size_mm[through] / 2:
            continue
        color = rank_color(patch.rank, count=len(patches))
        left, bottom = (patch.center_ras[axis] - patch.size_mm[axis] / 2 for axis in (across, up))
        ax.add_patch(Rectangle((left, bottom), patch.size_mm[across], patch.size_mm[up], fill=False, edgecolor=color, linewidth=1.3))
        if patch.rank <= _NUMBERED_PATCHES:
            # The top left corner on the page is the one with the largest coordinates; a patch may reach beyond the volume.
            corner = min(left + patch.size_mm[across], view.across_mm[0]), min(bottom + patch.size_mm[up], view.up_mm[1])
            ax.annotate(str(patch.rank), corner, xytext=(3, -3), textcoords="offset points", color=color, fontsize=8, va="top")


def _draw_legend(ax, labelmap: Volume, *, labels: Sequence[Label], num_patches: int) -> None:
    """Structures with their volumes, largest first."""
    from matplotlib.patches import Patch

    ax.axis("off")
    voxel_ml = float(np.prod(labelmap.spacing_mm)) / 1000
    volumes_ml = {label.value: np.count_nonzero(labelmap.array == label.value) * voxel_ml for label in labels}
    handles = [
        Patch(color=[channel / 255 for channel in label.color], label=f"{label.title}  {_milliliters(volumes_ml[label.value])}")
        for label in sorted(labels, key=lambda label: -volumes_ml[label.value])
    ]
    title = f"{len(labels)} structures, {num_patches} patches"
    legend = ax.legend(
        handles=handles,
        title=title,
        loc="upper left",
        alignment="left",
        borderaxespad=0,
        frameon=False,
        labelcolor=_TEXT_COLOR,
        fontsize=9,
        ncols=max(-(-len(labels) // _LEGEND_ROWS), 1),
    )
    legend.get_title().set_color(_TEXT_COLOR)


def _milliliters(volume_ml: float) -> str:
    """'1532 ml', '4.3 ml'."""
    return f"{volume_ml:.0f} ml" if volume_ml >= 10 else f"{volume_ml:.1f} ml"
