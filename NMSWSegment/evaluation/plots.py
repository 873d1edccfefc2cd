"""Pictures: reference and result side by side, where methods err, accuracy against cost."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from NMSWSegment.data.training_sample import UNKNOWN_LABEL
from NMSWSegment.files.bundle import Label
from NMSWSegment.files.colors import rank_color
from NMSWSegment.files.display_slice import PLANES, DisplaySlice, display_slices
from NMSWSegment.files.output_file import check_output_path, replaced_file
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import PatchBox

PAGE_COLOR, TEXT_COLOR = "#101418", "#e8ecf0"
DOTS_PER_INCH = 110
ERRORS_DOTS_PER_INCH = 75  # many slices; the picture goes into a page
CT_WINDOW = (-160.0, 240.0)
OVERLAY_ALPHA = 0.5
MISSED, WRONG = (0.95, 0.25, 0.2, 0.85), (1.0, 0.8, 0.1, 0.85)
"""Red: structure that the result does not have. Yellow: a structure where there is none, or another one."""


def write_side_by_side(volume: Volume, reference: Volume, labelmap: Volume, *, labels: Sequence[Label], title: str, path: str | Path) -> None:
    """Three slices, reference above and result below, as a PNG picture.

    Raises:
        UserError: the file cannot be written.
    """
    path = check_output_path(path, (".png",))
    views = paired_slices(volume, reference, [labelmap])
    figure, axes = _slice_page(views, rows=2)
    for column, (view, (found,)) in enumerate(views):
        for row, (name, shown) in enumerate((("reference", view.labels), ("result", found))):
            _draw_intensities(axes[row][column], view, title=f"{name}, {view.plane}")
            _draw_overlay(axes[row][column], view, _colored(shown, labels))
    figure.suptitle(title, color=TEXT_COLOR, fontsize=11)
    save(figure, path)


def write_errors(volume: Volume, reference: Volume, results: Sequence[tuple[str, Volume, Sequence[PatchBox]]], *, title: str, path: str | Path) -> None:
    """One row of slices a result: its patches as outlines, missed structures red, wrong ones yellow.

    Args:
        results: (name, labelmap, patches).

    Raises:
        UserError: the file cannot be written.
    """
    path = check_output_path(path, (".png",))
    views = paired_slices(volume, reference, [labelmap for _, labelmap, _ in results])
    figure, axes = _slice_page(views, rows=len(results))
    for row, (name, _, patches) in enumerate(results):
        for column, (view, found) in enumerate(views):
            _draw_intensities(axes[row][column], view, title=f"{name}, {view.plane}")
            _draw_overlay(axes[row][column], view, error_colors(found[row], view.labels))
            _draw_outlines(axes[row][column], view, patches)
    figure.suptitle(f"{title}: missed red, wrong yellow, chosen patches outlined", color=TEXT_COLOR, fontsize=11)
    save(figure, path, dots_per_inch=ERRORS_DOTS_PER_INCH)


def paired_slices(volume: Volume, reference: Volume, labelmaps: Sequence[Volume]) -> list[tuple[DisplaySlice, list[np.ndarray]]]:
    """Slices through the reference's structures, and the labels of each labelmap in the same slices.

    All volumes lie on one grid. Unknown voxels are 255.
    """
    known = np.where(reference.array == UNKNOWN_LABEL, 0, reference.array)  # the unknown shall not choose the slices
    views = display_slices(volume, Volume(array=known, ijk_to_ras=reference.ijk_to_ras))
    paired = []
    for view in views:
        at_voxel = _nearest_voxels(view, volume)
        pick = [np.where(at_voxel >= 0, labels.array.ravel()[np.maximum(at_voxel, 0)], 0) for labels in (reference, *labelmaps)]
        paired.append((replace(view, labels=pick[0]), pick[1:]))
    return paired


def white_figure(width: float, height: float):
    """A figure for charts, in inches."""
    return _figure(width, height, facecolor="white")


def save(figure, path: Path, *, dots_per_inch: int = DOTS_PER_INCH) -> None:
    """Write a figure as a PNG file, all of it or nothing.

    Raises:
        UserError: the file cannot be written.
    """
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=dots_per_inch, facecolor=figure.get_facecolor())


def error_colors(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(rows, columns, 4) float32, transparent where both agree or the reference is unknown."""
    differs = (found != reference) & (reference != UNKNOWN_LABEL)
    colors = np.zeros((*found.shape, 4), dtype=np.float32)
    colors[differs & (found == 0)] = MISSED
    colors[differs & (found != 0)] = WRONG
    return colors


def _nearest_voxels(view: DisplaySlice, volume: Volume) -> np.ndarray:
    """Flat index of the voxel under every pixel of a slice, -1 outside."""
    across, up, through = PLANES[view.plane]
    rows, columns = view.labels.shape
    points_ras = np.empty((rows, columns, 3))
    points_ras[..., across] = (view.across_mm[0] + (np.arange(columns) + 0.5) / columns * (view.across_mm[1] - view.across_mm[0]))[None, :]
    points_ras[..., up] = (view.up_mm[1] + (np.arange(rows) + 0.5) / rows * (view.up_mm[0] - view.up_mm[1]))[:, None]
    points_ras[..., through] = view.position_mm
    ras_to_ijk = np.linalg.inv(volume.ijk_to_ras)
    index_kji = np.rint((points_ras @ ras_to_ijk[:3, :3].T + ras_to_ijk[:3, 3])[..., ::-1]).astype(np.int64)
    is_inside = ((index_kji >= 0) & (index_kji < np.array(volume.shape))).all(axis=-1)
    flat = np.ravel_multi_index(np.moveaxis(np.clip(index_kji, 0, np.array(volume.shape) - 1), -1, 0), volume.shape)
    return np.where(is_inside, flat, -1)


def _slice_page(views: Sequence[tuple[DisplaySlice, list[np.ndarray]]], *, rows: int):
    """A figure with one column a slice, in one scale."""
    widths = [view.across_mm[0] - view.across_mm[1] for view, _ in views]
    height = max(view.up_mm[1] - view.up_mm[0] for view, _ in views)
    inches_per_mm = min(9.0 / sum(widths), 3.2 / height)
    figure = _figure(sum(widths) * inches_per_mm, rows * (height * inches_per_mm + 0.25) + 0.4, facecolor=PAGE_COLOR)
    return figure, figure.subplots(rows, len(views), width_ratios=widths, squeeze=False)


def _draw_intensities(ax, view: DisplaySlice, *, title: str) -> None:
    """Gray values in the soft-tissue window, or between percentiles where that shows nothing."""
    low, high = CT_WINDOW if np.nanmin(view.intensities) < -500 else np.nanpercentile(view.intensities, (1, 99))
    ax.imshow(view.intensities, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), extent=(*view.across_mm, *view.up_mm))
    ax.set(xlim=view.across_mm, ylim=view.up_mm, xticks=[], yticks=[], aspect="equal", facecolor="black")
    ax.set_title(title, color=TEXT_COLOR, fontsize=8)


def _draw_overlay(ax, view: DisplaySlice, colors: np.ndarray) -> None:
    """RGBA over the gray values."""
    ax.imshow(colors, extent=(*view.across_mm, *view.up_mm), interpolation="nearest")


def _draw_outlines(ax, view: DisplaySlice, patches: Sequence[PatchBox]) -> None:
    """Patches that the slice cuts, in the color of their rank."""
    from matplotlib.patches import Rectangle

    across, up, through = PLANES[view.plane]
    for patch in reversed(patches):
        if abs(view.position_mm - patch.center_ras[through]) < patch.size_mm[through] / 2:
            corner = tuple(patch.center_ras[axis] - patch.size_mm[axis] / 2 for axis in (across, up))
            ax.add_patch(Rectangle(corner, patch.size_mm[across], patch.size_mm[up], fill=False, edgecolor=rank_color(patch.rank, count=len(patches))))


def _colored(shown: np.ndarray, labels: Sequence[Label]) -> np.ndarray:
    """Labels in their colors, (rows, columns, 4) float32; unknown voxels gray."""
    colors = np.zeros((*shown.shape, 4), dtype=np.float32)
    for label in labels:
        colors[shown == label.value] = (*(channel / 255 for channel in label.color), OVERLAY_ALPHA)
    colors[shown == UNKNOWN_LABEL] = (0.5, 0.5, 0.5, OVERLAY_ALPHA)
    return colors


def _figure(width: float, height: float, *, facecolor: str):
    """A figure of its own, not pyplot: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=facecolor, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
