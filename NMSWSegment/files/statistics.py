"""Statistics of the structures in a labelmap: size, place, intensity, what the edge of the volume cuts, what the patches refined.

One function fills the csv and JSON files, the table of the panel and the quality sheet.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from NMSWSegment.files.boxes import label_boxes
from NMSWSegment.files.bundle import Label
from NMSWSegment.files.output_file import check_output_path, file_ending, replaced_file
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import PatchBox

STATISTICS_ENDINGS = (".csv", ".json")
_FACES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
"""Names of the low and the high end of each RAS axis."""


@dataclass(frozen=True)
class StructureStatistics:
    """One structure of one volume. Without a voxel the counts and the volume are 0 and all other numbers are nan."""

    structure: str
    """Name of the label."""
    label: int
    """Its value in the labelmap."""
    voxels: int
    volume_ml: float
    mean: float
    """Of the intensity; HU for CT."""
    sd: float
    """Sample standard deviation (n - 1) of the intensity; nan for a single voxel."""
    min: float
    max: float
    surface_cm2: float
    """Area of the surface by the Crofton formula in 13 directions, as in ITK."""
    center_r_mm: float
    """Center of mass, RAS."""
    center_a_mm: float
    center_s_mm: float
    min_r_mm: float
    """Bounding box of the voxels, their own extent included, along the RAS axes."""
    max_r_mm: float
    min_a_mm: float
    max_a_mm: float
    min_s_mm: float
    max_s_mm: float
    at_border: bool
    """Whether it reaches the edge of the volume, so that a part of it may lie outside of the field of view."""
    border_faces: str
    """Faces of the volume that it reaches, named by the nearest direction of the patient: 'inferior superior'."""
    patches: int
    """Refined patches that hold a part of it."""
    patches_percent: float
    """Share of the refined patches that hold a part of it; nan where no patch was refined."""
    refined_percent: float
    """Share of its voxels that lie in a refined patch."""

    def to_dict(self) -> dict:
        """JSON-ready; None for nan."""
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(self).items()}


STATISTICS_COLUMNS = tuple(field.name for field in fields(StructureStatistics))


def structure_statistics(labelmap: Volume, volume: Volume, *, labels: Sequence[Label], patches: Sequence[PatchBox] = ()) -> tuple[StructureStatistics, ...]:
    """Statistics of every structure, in the order of the labels.

    Args:
        labelmap: labels, (K, J, I) uint8.
        volume: intensities on the same grid.
        labels: structures; values of the labelmap that are not listed are left out.
        patches: those that went through the local network.

    Raises:
        ValueError: the two volumes differ in shape.
    """
    if labelmap.shape != volume.shape:
        raise ValueError(f"the labelmap has shape {labelmap.shape}, the volume {volume.shape}")
    boxes, surfaces_mm2 = _shapes(labelmap)
    in_patch, refined = _voxels_in_patches(labelmap, patches=patches)
    rows = []
    for label in labels:
        if label.value not in boxes:
            rows.append(_empty_row(label, num_patches=len(patches)))
            continue
        box = boxes[label.value]
        is_inside = labelmap.array[box] == label.value
        voxels = int(np.count_nonzero(is_inside))
        values = volume.array[box][is_inside]
        center_ras, low_ras, high_ras = _place(is_inside, box=box, ijk_to_ras=labelmap.ijk_to_ras)
        faces = _border_faces(box, shape=labelmap.shape, ijk_to_ras=labelmap.ijk_to_ras)
        num_patches = int(np.count_nonzero(in_patch[:, label.value]))
        rows.append(
            StructureStatistics(
                structure=label.name,
                label=label.value,
                voxels=voxels,
                volume_ml=voxels * float(np.prod(labelmap.spacing_mm)) / 1000,
                mean=float(values.mean(dtype=np.float64)),
                sd=float(values.std(dtype=np.float64, ddof=1)) if voxels > 1 else math.nan,
                min=float(values.min()),
                max=float(values.max()),
                surface_cm2=surfaces_mm2[label.value] / 100,
                **dict(zip(("center_r_mm", "center_a_mm", "center_s_mm"), center_ras.tolist())),
                **dict(zip(("min_r_mm", "min_a_mm", "min_s_mm"), low_ras.tolist())),
                **dict(zip(("max_r_mm", "max_a_mm", "max_s_mm"), high_ras.tolist())),
                at_border=bool(faces),
                border_faces=" ".join(faces),
                patches=num_patches,
                patches_percent=100 * num_patches / len(patches) if patches else math.nan,
                refined_percent=100 * int(refined[label.value]) / voxels,
            )
        )
    return tuple(rows)


def write_statistics(rows: Sequence[StructureStatistics], path: str | Path) -> None:
    """Write one row per structure as comma-separated values, or one object per structure as JSON; nan is an empty cell or null.

    Raises:
        UserError: the file cannot be written.
    """
    path = check_output_path(path, STATISTICS_ENDINGS)
    with replaced_file(path) as temporary:
        if file_ending(path, STATISTICS_ENDINGS) == ".json":
            temporary.write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n", encoding="utf-8")
            return
        with open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, STATISTICS_COLUMNS)
            writer.writeheader()
            writer.writerows(csv_cells(row) for row in rows)


def csv_cells(row: StructureStatistics) -> dict[str, str]:
    """A row as text: numbers with up to six digits, nan empty, a truth value as 0 or 1."""
    return {name: _cell(value) for name, value in asdict(row).items()}


def _cell(value: float | int | str | bool) -> str:
    """Text of one value."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(int(value)) if isinstance(value, bool) else str(value)


def _empty_row(label: Label, *, num_patches: int) -> StructureStatistics:
    """The row of a structure without a voxel."""
    numbers = {field.name: math.nan for field in fields(StructureStatistics) if field.type is float}
    numbers |= {"volume_ml": 0.0, "patches_percent": 0.0 if num_patches else math.nan}
    return StructureStatistics(structure=label.name, label=label.value, voxels=0, at_border=False, border_faces="", patches=0, **numbers)


def _shapes(labelmap: Volume) -> tuple[dict[int, tuple[slice, slice, slice]], dict[int, float]]:
    """Bounding box (slices KJI) and area of the surface in mm2 by label value, for the values that are there."""
    boxes = label_boxes(labelmap.array)
    if not boxes:
        return {}, {}
    # The area does not depend on what lies around, and most of a volume is background.
    inside = tuple(slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes.values()))
    image = sitk.GetImageFromArray(labelmap.array[inside])
    image.SetSpacing(labelmap.spacing_mm[::-1])
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.SetComputePerimeter(True)
    shapes.Execute(image)
    return boxes, {value: shapes.GetPerimeter(value) for value in boxes}


def _place(is_inside: np.ndarray, *, box: tuple[slice, slice, slice], ijk_to_ras: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Center of mass, and lowest and highest point of the voxels, RAS mm; `is_inside` is the part of the labelmap in the box."""
    axes = ijk_to_ras[:3, :3]
    first_ijk = np.array([side.start for side in box[::-1]])
    counts = [is_inside.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in (2, 1, 0)]
    center_ijk = np.array([np.arange(len(count)) @ count / count.sum() for count in counts]) + first_ijk
    # A coordinate is linear along a row of voxels, so that only the ends of the rows can be extreme.
    k, j = np.nonzero(is_inside.any(axis=2))
    rows = is_inside[k, j]
    ends_i = rows.argmax(axis=1), rows.shape[1] - 1 - rows[:, ::-1].argmax(axis=1)
    ends_ijk = np.concatenate([np.stack([i, j, k], axis=-1) for i in ends_i]) + first_ijk
    ends_ras = ends_ijk @ axes.T + ijk_to_ras[:3, 3]
    half_voxel_mm = np.abs(axes).sum(axis=1) / 2
    return axes @ center_ijk + ijk_to_ras[:3, 3], ends_ras.min(axis=0) - half_voxel_mm, ends_ras.max(axis=0) + half_voxel_mm


def _border_faces(box: tuple[slice, slice, slice], *, shape: Sequence[int], ijk_to_ras: np.ndarray) -> list[str]:
    """Faces of the volume that a box reaches, by the nearest direction of the patient, sorted."""
    faces = set()
    for axis, (side, length) in enumerate(zip(box, shape)):
        direction_ras = ijk_to_ras[:3, 2 - axis]
        ras_axis = int(np.abs(direction_ras).argmax())
        low_to_high = _FACES[ras_axis][:: 1 if direction_ras[ras_axis] > 0 else -1]
        faces |= {name for name, is_reached in zip(low_to_high, (side.start == 0, side.stop == length)) if is_reached}
    return sorted(faces)


def _voxels_in_patches(labelmap: Volume, *, patches: Sequence[PatchBox]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of every label value up to the largest in every patch, (patches, values), and in at least one patch, (values,).

    The faces of all patches divide the world into blocks, most of them shared by several patches; every voxel is counted once,
    in its block, and a patch is a sum of blocks.
    """
    num_values = int(labelmap.array.max()) + 1
    if not patches or num_values == 1:
        return np.zeros((len(patches), num_values), dtype=np.int64), np.zeros(num_values, dtype=np.int64)
    low = np.array([patch.center_ras for patch in patches]) - np.array([patch.size_mm for patch in patches]) / 2
    high = np.array([patch.center_ras for patch in patches]) + np.array([patch.size_mm for patch in patches]) / 2
    # Rounded, so that faces which are the same but for the last digit make no block of their own.
    faces = [np.unique(np.round(np.concatenate([low[:, axis], high[:, axis]]), 6)) for axis in range(3)]
    counts = np.zeros((*(len(positions) + 1 for positions in faces), num_values), dtype=np.int64)
    for k in np.flatnonzero(labelmap.array.any(axis=(1, 2))).tolist():
        j, i = np.nonzero(labelmap.array[k])
        points_ras = np.stack([i, j, np.full_like(i, k)], axis=-1) @ labelmap.ijk_to_ras[:3, :3].T + labelmap.ijk_to_ras[:3, 3]
        blocks = [np.searchsorted(positions, points_ras[:, axis], side="right") for axis, positions in enumerate(faces)]
        cells = np.ravel_multi_index((*blocks, labelmap.array[k, j, i]), counts.shape)
        counts += np.bincount(cells, minlength=counts.size).reshape(counts.shape)
    in_patch = np.zeros((len(patches), num_values), dtype=np.int64)
    is_refined = np.zeros(counts.shape[:3], dtype=bool)
    for index in range(len(patches)):
        first, last = (
            [int(np.searchsorted(positions, np.round(corner[index, axis], 6), side="right")) for axis, positions in enumerate(faces)] for corner in (low, high)
        )
        blocks = tuple(slice(start, stop) for start, stop in zip(first, last))
        in_patch[index] = counts[blocks].sum(axis=(0, 1, 2))
        is_refined[blocks] = True
    return in_patch, counts[is_refined].sum(axis=0)
