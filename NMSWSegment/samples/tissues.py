"""Tissues of an anatomy: what its map means, and random HU for them (contrast phase, enhancement, jitter).

An anatomy is a folder with label_full.nii.gz (one tissue id per voxel) and tissues.json (what each id is).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from NMSWSegment.data.training_sample import UNKNOWN_LABEL
from NMSWSegment.files.orientation import Triple_mm
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.warp import chance, uniform

PHASES = ("noncontrast", "arterial", "portal_venous")
LUMEN_KINDS = ("stomach", "gut", "colon", "contents", "feces")

# outer layer of a class that a map paints as one tissue: kind -> (kind of the layer, its depth in mm, kind of the rest)
SHELLS = {
    "stomach": ("gutwall", 3.0, "stomach"),
    "gut": ("gutwall", 1.6, "gut"),
    "colon": ("gutwall", 1.6, "colon"),
    "heart": ("myocardium", 5.0, "blood_heart"),
    "kidney": ("kidney_cortex", 6.0, "kidney_medulla"),
}

# typical HU of the kinds that SHELLS adds: noncontrast, arterial, portal venous, sd; the values that the maps with separate walls use
SHELL_HU = {
    "gutwall": (42, 85, 95, 12),
    "myocardium": (45, 95, 115, 12),
    "blood_heart": (42, 240, 150, 15),
    "kidney_cortex": (34, 185, 185, 15),
    "kidney_medulla": (30, 85, 170, 15),
}

# standard deviation of a kind's mean HU between people and scanners; judgment, wider where scans differ more
MEAN_JITTER = {
    "liver": 13, "spleen": 13, "kidney": 20, "kidney_cortex": 25, "kidney_medulla": 25, "pancreas": 14, "artery": 40, "vein": 28,
    "vessel": 35, "heart": 30, "blood_heart": 35, "myocardium": 18, "fat": 9, "muscle": 9, "muscle_auto": 10, "soft": 12,
    "cortical": 200, "bone": 70, "spongiosa": 70, "marrow": 35, "calc": 150, "enh": 40, "lung": 0, "lungvessel": 60, "air": 0,
    "gas": 40, "cartilage": 30, "disc": 20, "airwaywall": 60, "trachea": 50, "bladder": 6, "gallbladder": 9, "skin": 20, "thyroid": 30,
}  # fmt: skip
DEFAULT_JITTER = 12
VASCULAR_KINDS = ("artery", "vein", "vessel", "heart", "blood_heart", "enh")


@dataclass(frozen=True)
class Tissue:
    """One id of a tissue map."""

    index: int
    name: str
    label: int
    """Class in the unified list, 0 background, 255 unknown."""
    kind: str
    """Group of tissues that look alike; organs of a pair share it."""
    phase_hu: tuple[float, float, float]
    """Typical mean HU, in the order of PHASES."""
    sd_hu: float
    """Texture within the tissue."""
    measured_hu: float | None = None
    """Mean in the CT that the map comes from."""


@dataclass(frozen=True)
class TissueTable:
    """Random HU of one draw, looked up by tissue id."""

    mean_hu: Tensor
    """(256,)."""
    sd_hu: Tensor
    """(256,)."""
    enhancement: float
    """0 without contrast medium, about 1 with."""


def read_tissues(path: Path, *, num_labels: int | None = None) -> tuple[Tissue, ...]:
    """The tissues of a tissues.json.

    Args:
        path: the file.
        num_labels: classes with background, to check that every label is one of them; None does not check.

    Raises:
        UserError: the file is missing or malformed, or a label is outside the list.
    """
    if not path.is_file():
        raise UserError(f"The anatomy '{path.parent.name}' has no tissues.json. Put it beside label_full.nii.gz, or leave the folder out.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["tissues"]
        tissues = tuple(_tissue_from_dict(int(index), entry) for index, entry in values.items())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is malformed ({error!r}). Each tissue needs name, unified, kind and hu with {', '.join(PHASES)} and sd.") from error
    for tissue in tissues:
        if num_labels is not None and tissue.label >= num_labels and tissue.label != UNKNOWN_LABEL:
            raise UserError(
                f"Tissue '{tissue.name}' in '{path}' has label {tissue.label}, but the labels end at {num_labels - 1}. Use one of them, or 255 for unknown."
            )
    return tissues


def split_shells(tissue_map: np.ndarray, tissues: tuple[Tissue, ...], *, spacing_mm: Triple_mm) -> tuple[np.ndarray, tuple[Tissue, ...]]:
    """Give gut its wall, the heart its muscle and the kidney its cortex where a map paints the organ as one tissue.

    Args:
        tissue_map: tissue ids, (K, J, I) uint8; unchanged.
        tissues: what the ids are.
        spacing_mm: voxel size, KJI.

    Returns:
        The new map and all tissues; labels stay as they were. A kind is left whole when no id is free.
    """
    tissue_map, tissues = tissue_map.copy(), list(tissues)
    labels = tissue_lookup(tissues).numpy()[tissue_map]
    free = iter(sorted(set(range(1, 256)) - {tissue.index for tissue in tissues}))
    for position, tissue in enumerate(list(tissues)):
        if tissue.kind not in SHELLS or not (tissue_map == tissue.index).any():
            continue
        shell_kind, depth_mm, core_kind = SHELLS[tissue.kind]
        index = next(free, None)
        if index is None:
            break
        whole = tissue_map == tissue.index
        tissue_map[whole & (_depth_mm(labels == tissue.label, spacing_mm) < depth_mm)] = index
        tissues.append(_shell_tissue(tissue, index=index, kind=shell_kind))
        if core_kind != tissue.kind:
            tissues[position] = _shell_tissue(tissue, index=tissue.index, kind=core_kind)
    return tissue_map, tuple(tissues)


def draw_table(tissues: tuple[Tissue, ...], generator: torch.Generator) -> TissueTable:
    """Random HU for every tissue: a mix of contrast phases, jitter shared by a kind, smaller jitter per tissue."""
    mix, enhancement = _random_phase(generator)
    use_measured = chance(generator, 0.25)
    fatty = uniform(generator, 15, 60) if chance(generator, 0.15) else 0.0
    bladder_contrast = uniform(generator, 60, 600) if chance(generator, 0.12) else 0.0
    # drawn for all kinds in a fixed order, so that a draw does not depend on which kinds an anatomy has
    jitter = {kind: float(torch.randn((), generator=generator)) * size for kind, size in MEAN_JITTER.items()}
    mean, sd = torch.full((256,), -1000.0), torch.zeros(256)
    for tissue in tissues:
        plain = tissue.phase_hu[0]
        hu = plain + enhancement * (sum(share * value for share, value in zip(mix, tissue.phase_hu)) - plain)
        if use_measured and tissue.measured_hu is not None and tissue.kind not in LUMEN_KINDS:
            hu = tissue.measured_hu
        own = float(torch.randn((), generator=generator))
        strength = max(enhancement, 0.2) if tissue.kind in VASCULAR_KINDS else 1.0  # blood without contrast hardly varies
        kind_jitter = jitter.get(tissue.kind, own * DEFAULT_JITTER) * strength
        hu += kind_jitter + own * 0.3 * MEAN_JITTER.get(tissue.kind, DEFAULT_JITTER) * strength
        hu -= fatty if tissue.kind == "liver" else 0.0
        hu += bladder_contrast if tissue.kind == "bladder" else 0.0
        mean[tissue.index] = max(hu, -1000.0)
        sd[tissue.index] = tissue.sd_hu * uniform(generator, 0.4, 1.2)
    return TissueTable(mean_hu=mean, sd_hu=sd, enhancement=enhancement)


def tissue_lookup(tissues: tuple[Tissue, ...] | list[Tissue]) -> Tensor:
    """Label by tissue id, (256,) uint8; ids that are not listed give 255 (unknown)."""
    labels = torch.full((256,), UNKNOWN_LABEL, dtype=torch.uint8)
    for tissue in tissues:
        labels[tissue.index] = tissue.label
    return labels


def kind_lookup(tissues: tuple[Tissue, ...], kinds: tuple[str, ...]) -> Tensor:
    """True for the ids of the given kinds, (256,) bool."""
    chosen = torch.zeros(256, dtype=torch.bool)
    chosen[[tissue.index for tissue in tissues if tissue.kind in kinds]] = True
    return chosen


def _random_phase(generator: torch.Generator) -> tuple[tuple[float, ...], float]:
    """Shares of PHASES, and how strongly the medium enhances."""
    pure = uniform(generator, 0, 1)
    if pure < 0.25:
        return (1.0, 0.0, 0.0), uniform(generator, 0.0, 0.15)
    strength = uniform(generator, 0.6, 1.4)
    if pure < 0.4:
        return (0.0, 1.0, 0.0), strength
    if pure < 0.7:
        return (0.0, 0.0, 1.0), strength
    shares = -torch.rand(3, generator=generator).clamp(min=1e-6).log()  # exponential numbers: uniform on the simplex
    return tuple((shares / shares.sum()).tolist()), strength


def _tissue_from_dict(index: int, values: dict) -> Tissue:
    """A Tissue from its JSON object."""
    hu = values["hu"]
    measured = values.get("hu_measured")
    return Tissue(
        index=index, name=values["name"], label=int(values["unified"]), kind=values["kind"],
        phase_hu=tuple(float(hu[phase]) for phase in PHASES), sd_hu=float(hu["sd"]), measured_hu=float(measured["mean"]) if measured else None,
    )  # fmt: skip


def _shell_tissue(whole: Tissue, *, index: int, kind: str) -> Tissue:
    """A part of a tissue, with the typical HU of its own kind."""
    *phase_hu, sd_hu = SHELL_HU[kind]
    return Tissue(index=index, name=f"{whole.name} ({kind})", label=whole.label, kind=kind, phase_hu=tuple(phase_hu), sd_hu=sd_hu)


def _depth_mm(inside: np.ndarray, spacing_mm: Triple_mm) -> np.ndarray:
    """Distance of every voxel center inside to the surface, mm; 0 outside."""
    depth = np.zeros(inside.shape, np.float32)
    found = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(max(0, line[0] - 1), line[-1] + 2) for line in found)
    crop = sitk.GetImageFromArray(inside[box].astype(np.uint8))
    crop.SetSpacing(spacing_mm[::-1])
    distance = sitk.SignedMaurerDistanceMap(crop, insideIsPositive=True, squaredDistance=False, useImageSpacing=True)
    # the filter measures from the centers of the outermost voxels, half a voxel under the surface
    depth[box] = np.where(inside[box], sitk.GetArrayFromImage(distance) + min(spacing_mm) / 2, 0)
    return depth
