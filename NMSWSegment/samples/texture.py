"""What a tissue looks like inside: grain, vessels, gas and stool in the gut, uneven enhancement.

Every function changes `details`, the HU to add to the tissue means, (D, H, W), where its mask holds.
"""

import torch
from torch import Tensor

from NMSWSegment.files.orientation import Triple_mm
from NMSWSegment.samples.tissues import LUMEN_KINDS, Tissue, TissueTable, kind_lookup
from NMSWSegment.samples.warp import chance, smooth_noise, uniform

LUNG_HU = (-905.0, -680.0)
GAS_HU = -970.0
STOOL_KINDS = ("colon", "feces")


def tissue_details(tissue: Tensor, *, tissues: tuple[Tissue, ...], table: TissueTable, spacing_mm: Triple_mm, generator: torch.Generator) -> Tensor:
    """HU to add to the tissue means of one volume, (D, H, W).

    Args:
        tissue: tissue ids at the voxel centers, (D, H, W) uint8.
        tissues: what the ids are.
        table: HU of this draw.
        spacing_mm: KJI.
    """
    ids = tissue.int()
    details = _grain(ids, table, spacing_mm, generator)
    mean_hu = table.mean_hu.to(ids.device)[ids]
    for label in sorted({entry.label for entry in tissues if entry.kind in LUMEN_KINDS}):
        members = [entry for entry in tissues if entry.kind in LUMEN_KINDS and entry.label == label]
        chosen = torch.zeros(256, dtype=torch.bool)
        chosen[[entry.index for entry in members]] = True
        is_stool = any(entry.kind in STOOL_KINDS for entry in members)
        _fill_lumen(details, chosen.to(ids.device)[ids], mean_hu, is_stool=is_stool, spacing_mm=spacing_mm, generator=generator)
    _fill_lungs(details, kind_lookup(tissues, ("lung",)).to(ids.device)[ids], mean_hu, spacing_mm=spacing_mm, generator=generator)
    _enhance_chambers(
        details, kind_lookup(tissues, ("blood_heart",)).to(ids.device)[ids], enhancement=table.enhancement, spacing_mm=spacing_mm, generator=generator
    )
    _add_tubes(
        details,
        kind_lookup(tissues, ("liver",)).to(ids.device)[ids],
        hu=45 * table.enhancement * uniform(generator, -0.4, 1),
        length_mm=45,
        spacing_mm=spacing_mm,
        generator=generator,
    )
    if chance(generator, 0.6):
        _add_tubes(
            details,
            kind_lookup(tissues, ("fat",)).to(ids.device)[ids],
            hu=uniform(generator, 40, 140),
            length_mm=30,
            spacing_mm=spacing_mm,
            generator=generator,
        )
    return details


def _grain(ids: Tensor, table: TissueTable, spacing_mm: Triple_mm, generator: torch.Generator) -> Tensor:
    """Noise of two lengths, as strong as the tissue's own spread; voxel-fine grain would look like salt and pepper in bone."""
    coarse = smooth_noise(tuple(ids.shape), length_mm=uniform(generator, 12, 30), spacing_mm=spacing_mm, generator=generator, device=ids.device)
    fine = smooth_noise(tuple(ids.shape), length_mm=6.0, spacing_mm=spacing_mm, generator=generator, device=ids.device)
    return fine.mul_(0.5).add_(coarse, alpha=0.7).mul_(table.sd_hu.to(ids.device)[ids])


def _fill_lumen(details: Tensor, mask: Tensor, mean_hu: Tensor, *, is_stool: bool, spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Fluid, stool and contrast medium in patches; gas above a fluid level, anterior because patients lie on their back."""
    where = mask.nonzero()
    if not len(where):
        return
    shape = tuple(mask.shape)
    blobs = smooth_noise(shape, length_mm=uniform(generator, 25, 60), spacing_mm=spacing_mm, generator=generator, device=mask.device)[mask]
    lumps = smooth_noise(shape, length_mm=7.0, spacing_mm=spacing_mm, generator=generator, device=mask.device)[mask]
    fluid_hu, stool_hu = uniform(generator, -10, 45), uniform(generator, -60, 90)
    contrast_hu = uniform(generator, 110, 500) if chance(generator, 0.22) else fluid_hu
    solid = (blobs > uniform(generator, -1.0, 1.5)) if is_stool else (blobs > uniform(generator, 0.5, 3.0))
    hu = torch.where(blobs < uniform(generator, -0.5, 2.0), contrast_hu, fluid_hu)
    hu = torch.where(solid, stool_hu + lumps.mul(uniform(generator, 20, 130)), hu)
    anterior_mm = where[:, 1] * spacing_mm[1]
    level = smooth_noise((shape[0], 1, shape[2]), length_mm=70.0, spacing_mm=spacing_mm, generator=generator, device=mask.device)[where[:, 0], 0, where[:, 2]]
    level_mm = anterior_mm.float().mean() + 25 * (level + uniform(generator, -0.5, 3.0))
    hu = torch.where((anterior_mm > level_mm) & ~solid, GAS_HU, hu)
    details[mask] += hu - mean_hu[mask]


def _fill_lungs(details: Tensor, mask: Tensor, mean_hu: Tensor, *, spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Air content of a breath, denser at the back, with vessels and sometimes consolidation."""
    where = mask.nonzero()
    if not len(where):
        return
    shape = tuple(mask.shape)
    behind = 0.5 - where[:, 1] / shape[1]
    uneven = smooth_noise(shape, length_mm=40.0, spacing_mm=spacing_mm, generator=generator, device=mask.device)[mask]
    hu = uniform(generator, *LUNG_HU) + behind * uniform(generator, 0, 160) + uneven * uniform(generator, 5, 35)
    for length_mm, width in ((34.0, 0.13), (21.0, 0.18), (13.0, 0.2)):
        hu += (
            uniform(generator, 250, 750) * _tubes(shape, length_mm=length_mm, width=width, spacing_mm=spacing_mm, generator=generator, device=mask.device)[mask]
        )
    if chance(generator, 0.15):
        dense = smooth_noise(shape, length_mm=uniform(generator, 30, 70), spacing_mm=spacing_mm, generator=generator, device=mask.device)[mask] + behind
        share = ((dense - uniform(generator, 0.8, 1.8)) * 2).clamp(0, 1)
        hu += share * (uniform(generator, -500, 20) - hu)
    details[mask] += hu - mean_hu[mask]


def _enhance_chambers(details: Tensor, mask: Tensor, *, enhancement: float, spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Right and left chambers take up the medium at different times: a soft step across the heart."""
    where = mask.nonzero()
    if not len(where):
        return
    position_mm = where * torch.tensor(spacing_mm, device=mask.device)
    position_mm = position_mm - position_mm.mean(dim=0)
    direction = torch.tensor([uniform(generator, -0.4, 0.4), uniform(generator, 0.0, 0.8), 1.0], device=mask.device)  # right chambers lie right and anterior
    step = torch.tanh(position_mm @ (direction / direction.norm()) / 8.0)
    details[mask] += step * uniform(generator, -50, 50) * enhancement


def _add_tubes(details: Tensor, mask: Tensor, *, hu: float, length_mm: float, spacing_mm: Triple_mm, generator: torch.Generator) -> None:
    """Vessels through a tissue."""
    if mask.any():
        details[mask] += hu * _tubes(tuple(mask.shape), length_mm=length_mm, width=0.16, spacing_mm=spacing_mm, generator=generator, device=mask.device)[mask]


def _tubes(shape: tuple[int, int, int], *, length_mm: float, width: float, spacing_mm: Triple_mm, generator: torch.Generator, device: torch.device) -> Tensor:
    """1 on curved lines, falling to 0 beside them: two smooth noise fields vanish together on curves, (D, H, W)."""
    first, second = (smooth_noise(shape, length_mm=length_mm, spacing_mm=spacing_mm, generator=generator, device=device) for _ in range(2))
    return torch.exp(first.square_().add_(second.square_()).mul_(-0.5 / width**2))
