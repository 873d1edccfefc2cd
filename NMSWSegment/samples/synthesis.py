"""CT volumes synthesized from tissue maps ("anatomies"): warp the map, paint HU, scan it.

One draw is one random patient and one random scan:

    box <- a typical scan range                     source index <- affine and smooth elastic warp
    tissue <- nearest voxel                         HU <- table averaged over four sub-voxel samples (partial volume) + details
    table, arms -> blur -> noise -> field of view

Synthetic volumes are for training only; a score on them says nothing about patients.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.data.body_extent import BodyExtent, measure_body
from NMSWSegment.data.training_sample import UNKNOWN_LABEL, TrainingSample
from NMSWSegment.files.orientation import Triple_mm, read_sar
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.acquisition import AIR_HU, HU_RANGE, add_arms, add_noise, add_table, blur, cut_field_of_view, turn_field_of_view
from NMSWSegment.samples.pathology import add_ascites, add_effusion, change_bone_density
from NMSWSegment.samples.scan_range import random_box
from NMSWSegment.samples.texture import tissue_details
from NMSWSegment.samples.tissues import Tissue, TissueTable, draw_table, kind_lookup, read_tissues, split_shells, tissue_lookup
from NMSWSegment.samples.warp import Warp, WarpLimits, chance, is_outside, nearest_flat_index, random_warp

MAP_NAME = "label_full.nii.gz"
TISSUES_NAME = "tissues.json"
# corners of a tetrahedron around the voxel center: the fewest samples that see a surface from every side
SUBVOXEL_OFFSETS = ((0.25, 0.25, 0.25), (0.25, -0.25, -0.25), (-0.25, 0.25, -0.25), (-0.25, -0.25, 0.25))
ARM_WORDS = ("arms", "humeri", "ulnae", "wrists")
"""Words in the names of tissues of whole arms; a map that only cuts a humerus does not have arms."""
TISSUE_LANDMARKS = {"lung": ("lung",), "liver": ("liver",), "hip": ("hip_", "pelvis,", "pelvis_")}
ARMS_REMOVED_SHARE = 0.65


@dataclass(frozen=True)
class SynthesisOptions:
    """How samples are drawn; shared by synthetic and real sources."""

    spacing_mm: Triple_mm = (3.0, 3.0, 3.0)
    """Model spacing, KJI."""
    max_voxels: int = 160 * 128 * 160
    """Largest sample."""
    min_range_mm: float = 120.0
    """Shortest scan along the body."""
    warp: WarpLimits = field(default_factory=WarpLimits)
    """Random deformation."""
    table_share: float = 0.75
    """Share of synthetic volumes with a table."""
    arms_share: float = 0.3
    """Share of synthetic volumes with painted arms, where the map's own arms are not shown."""
    circular_share: float = 0.2
    """Share of samples with a circular reconstruction field."""
    turned_share: float = 0.3
    """Share of samples with air around a box, mostly an oblique one."""
    abdominal_labels: tuple[int, ...] = ()
    """Classes around which ascites is drawn; empty for none."""
    ascites_share: float = 0.1
    """Share of samples with ascites."""
    lung_labels: tuple[int, ...] = ()
    """Classes in which effusion is drawn; empty for none."""
    effusion_share: float = 0.08
    """Share of samples with effusion."""
    bone_labels: tuple[int, ...] = ()
    """Classes whose mineral varies; empty for none."""
    bone_share: float = 0.5
    """Share of samples whose bones have another density."""

    def __post_init__(self) -> None:
        if min(self.spacing_mm) <= 0 or self.max_voxels < 1 or self.min_range_mm <= 0:
            raise ValueError(f"spacing_mm {self.spacing_mm}, max_voxels {self.max_voxels} and min_range_mm {self.min_range_mm} must be positive")


@dataclass(frozen=True)
class PreparedAnatomy:
    """A tissue map as training reads it: axes turned to S-A-R, walls and cortices split off, its body measured."""

    name: str
    tissue_map: np.ndarray
    """Tissue ids, (D, H, W) uint8."""
    tissues: tuple[Tissue, ...]
    spacing_mm: Triple_mm
    extent: BodyExtent


def prepare_anatomy(folder: str | Path, *, num_labels: int | None = None) -> PreparedAnatomy:
    """Read a folder with label_full.nii.gz and tissues.json.

    Args:
        folder: the anatomy; its name becomes the source's name.
        num_labels: classes with background, to check the tissues' labels; None does not check.

    Raises:
        UserError: a file is missing or malformed, or the map holds an id that tissues.json does not explain.
    """
    folder = Path(folder)
    tissues = read_tissues(folder / TISSUES_NAME, num_labels=num_labels)
    array, spacing_mm, _ = read_sar(folder / MAP_NAME)
    _check_known(array, tissues, name=folder.name)
    array, tissues = split_shells(array.astype(np.uint8), tissues, spacing_mm=spacing_mm)
    tissue_map = torch.from_numpy(array).int()
    trunk = ~(kind_lookup(tissues, ("air",)) | _name_lookup(tissues, ARM_WORDS))[tissue_map]
    landmarks = {name: _name_lookup(tissues, words)[tissue_map].any(dim=2).any(dim=1) for name, words in TISSUE_LANDMARKS.items()}
    extent = measure_body(trunk, landmarks, spacing_mm=spacing_mm)
    return PreparedAnatomy(name=folder.name, tissue_map=array, tissues=tissues, spacing_mm=spacing_mm, extent=extent)


class AnatomySource:
    """One anatomy, loaded once; every draw is another patient and another scan."""

    def __init__(self, anatomy: PreparedAnatomy, *, device: torch.device | str = "cpu") -> None:
        """Args: device: where samples are drawn."""
        self.name = anatomy.name
        self._tissues, self._spacing_mm, self._extent = anatomy.tissues, anatomy.spacing_mm, anatomy.extent
        self._tissue_map = torch.from_numpy(anatomy.tissue_map).to(device)
        self._labels = tissue_lookup(self._tissues).to(device)
        self._is_air = kind_lookup(self._tissues, ("air",))
        self._is_arm = _name_lookup(self._tissues, ARM_WORDS)

    def draw(self, generator: torch.Generator, options: SynthesisOptions) -> TrainingSample:
        """A random patient and scan; the same state of the generator gives the same sample.

        Labels are 255 where the map ends along superior (the intensity then repeats its last slice), 0 beyond its sides.
        """
        box_mm = random_box(self._extent, min_range_mm=options.min_range_mm, generator=generator)
        warp = random_warp(box_mm, limits=options.warp, spacing_mm=options.spacing_mm, max_voxels=options.max_voxels, generator=generator)
        table = draw_table(self._tissues, generator)
        is_air = self._is_air.clone()
        if chance(generator, ARMS_REMOVED_SHARE):
            is_air |= self._is_arm
        table.mean_hu[is_air], table.sd_hu[is_air] = AIR_HU, 0.0
        device = self._tissue_map.device
        is_air_here = is_air.to(device)
        index = warp.source_index(self._spacing_mm, device=device)
        tissue = self._tissue_at(index, warp)
        body = ~is_air_here[tissue.int()] & ~self._is_beside(index)
        labels = self._labels[tissue.int()].masked_fill_(~body, 0)
        labels[is_outside(index, size=self._tissue_map.shape[0], axis=0)] = UNKNOWN_LABEL
        intensity = self._painted(index, tissue, warp, table=table, generator=generator).masked_fill_(~body & self._is_beside(index), AIR_HU)
        add_pathology(intensity, labels, options=options, generator=generator)
        if chance(generator, options.arms_share) and not (self._is_arm & ~is_air).any():
            add_arms(intensity, body, spacing_mm=options.spacing_mm, generator=generator)
        if chance(generator, options.table_share):
            add_table(intensity, body, spacing_mm=options.spacing_mm, generator=generator)
        intensity = scanned(intensity, body, labels, options=options, generator=generator)
        return TrainingSample(name=self.name, intensity=intensity, labels=labels)

    def _tissue_at(self, index: Tensor, warp: Warp) -> Tensor:
        """Tissue id of the nearest voxel, (D, H, W) uint8."""
        flat = nearest_flat_index(index, shape=tuple(self._tissue_map.shape))
        return self._tissue_map.reshape(-1).index_select(0, flat).reshape(warp.shape)

    def _is_beside(self, index: Tensor) -> Tensor:
        """Beyond the map along anterior or right, (D, H, W) bool."""
        return is_outside(index, size=self._tissue_map.shape[1], axis=1) | is_outside(index, size=self._tissue_map.shape[2], axis=2)

    def _painted(self, index: Tensor, tissue: Tensor, warp: Warp, *, table: TissueTable, generator: torch.Generator) -> Tensor:
        """HU of the tissues with partial volume and details, (D, H, W); a voxel gets details as far as it is of one tissue."""
        device = index.device
        intensity, purity = torch.zeros(warp.shape, device=device), torch.zeros(warp.shape, device=device)
        mean_hu = table.mean_hu.to(device)
        for offset in SUBVOXEL_OFFSETS:
            step = warp.source_step(offset, self._spacing_mm)
            part = self._tissue_at(index + step[:, None, None, None].to(device), warp)
            intensity += mean_hu[part.int()]
            purity += part == tissue
        details = tissue_details(tissue, tissues=self._tissues, table=table, spacing_mm=warp.spacing_mm, generator=generator)
        return intensity.addcmul_(details, purity).div_(len(SUBVOXEL_OFFSETS))


def scanned(intensity: Tensor, body: Tensor, labels: Tensor, *, options: SynthesisOptions, generator: torch.Generator) -> Tensor:
    """What the scanner makes of a painted body: blur, noise, field of view (which changes labels in place), HU range."""
    intensity = blur(intensity, spacing_mm=options.spacing_mm, generator=generator)
    add_noise(intensity, body, generator=generator)
    cut(intensity, labels, options=options, generator=generator)
    return intensity.clamp_(*HU_RANGE)


def cut(intensity: Tensor, labels: Tensor, *, options: SynthesisOptions, generator: torch.Generator) -> None:
    """Sometimes air and background outside a circular field or a box, in place."""
    if chance(generator, options.circular_share):
        cut_field_of_view(intensity, labels, generator=generator)
    if chance(generator, options.turned_share):
        turn_field_of_view(intensity, labels, spacing_mm=options.spacing_mm, generator=generator)


def add_pathology(intensity: Tensor, labels: Tensor, *, options: SynthesisOptions, generator: torch.Generator) -> None:
    """Sometimes another density of the bones, ascites, effusion, in place."""
    if chance(generator, options.bone_share) and options.bone_labels:
        change_bone_density(intensity, labels, bones=options.bone_labels, generator=generator)
    if chance(generator, options.ascites_share) and options.abdominal_labels:
        add_ascites(intensity, labels, organs=options.abdominal_labels, spacing_mm=options.spacing_mm, generator=generator)
    if chance(generator, options.effusion_share) and options.lung_labels:
        add_effusion(intensity, labels, lungs=options.lung_labels, spacing_mm=options.spacing_mm, generator=generator)


def _check_known(array: np.ndarray, tissues: tuple[Tissue, ...], *, name: str) -> None:
    """Raise UserError when a map holds an id that no tissue explains."""
    unexpected = sorted(set(np.unique(array).tolist()) - {tissue.index for tissue in tissues})
    if unexpected:
        raise UserError(
            f"The map of anatomy '{name}' holds tissue ids {unexpected}, which its {TISSUES_NAME} does not list. Add them there with name, unified, kind and hu."
        )


def _name_lookup(tissues: tuple[Tissue, ...], words: tuple[str, ...]) -> Tensor:
    """True for the ids whose name holds one of the words, (256,) bool."""
    chosen = torch.zeros(256, dtype=torch.bool)
    chosen[[tissue.index for tissue in tissues if any(word in tissue.name.lower() for word in words)]] = True
    return chosen
