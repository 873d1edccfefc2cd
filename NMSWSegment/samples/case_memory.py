"""Cases ready to be drawn from, kept in memory as long as there is room: at the model spacing's intensity, on the device that draws."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from NMSWSegment.data.body_extent import BodyExtent
from NMSWSegment.data.prepared_case import PreparedCase
from NMSWSegment.engine.resampling import block_averaged
from NMSWSegment.files.normalization import FIXED, intensity_scale
from NMSWSegment.files.orientation import Triple_mm
from NMSWSegment.files.padding import find_padding
from NMSWSegment.files.volume import Volume

CPU_BYTES = 2 << 30
GPU_SHARE = 0.3
"""Of the GPU's free memory."""


@dataclass(frozen=True)
class LoadedCase:
    """A prepared case as tensors; its own intensity is not kept, only what is drawn from."""

    intensity: Tensor
    """Normalized, bounded and averaged over `blocks`, as inference does before it interpolates, (d, h, w) float32; HU where the normalization is fixed."""
    labels: Tensor
    """(D, H, W) uint8, on the case's own grid."""
    spacing_mm: Triple_mm
    """Of the case's own grid, KJI."""
    direction: tuple[tuple[float, float, float], ...]
    """As of PreparedCase."""
    extent: BodyExtent
    blocks: tuple[int, int, int]
    """Voxels of the case per intensity voxel, KJI."""
    outside: float
    """Intensity beside the case, the lower bound."""

    @property
    def num_bytes(self) -> int:
        """What it takes on its device."""
        return 4 * self.intensity.numel() + self.labels.numel()


class CaseMemory:
    """The cases used last, up to a number of bytes."""

    def __init__(
        self,
        *,
        spacing_mm: Triple_mm,
        bounds: tuple[float, float],
        normalization: str = FIXED,
        device: torch.device | str = "cpu",
        max_bytes: int | None = None,
    ) -> None:
        """Args: spacing_mm, bounds, normalization: as of loaded_case; max_bytes: None takes CPU_BYTES, or GPU_SHARE of what a GPU has free."""
        self.spacing_mm, self.bounds, self.normalization, self.device = spacing_mm, bounds, normalization, torch.device(device)
        if max_bytes is None:
            max_bytes = int(GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]) if self.device.type == "cuda" else CPU_BYTES
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, LoadedCase] = OrderedDict()

    def get(self, key: Hashable, load: Callable[[], PreparedCase]) -> LoadedCase:
        """The case of a key, loaded if it is not there; names are no keys, because two data sets may use the same."""
        if key not in self._kept:
            self._kept[key] = loaded_case(load(), spacing_mm=self.spacing_mm, bounds=self.bounds, normalization=self.normalization, device=self.device)
        self._kept.move_to_end(key)
        result = self._kept[key]
        while sum(case.num_bytes for case in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)
        return result


def loaded_case(
    case: PreparedCase, *, spacing_mm: Triple_mm, bounds: tuple[float, float], normalization: str = FIXED, device: torch.device | str = "cpu"
) -> LoadedCase:
    """A prepared case for a model spacing, normalized, bounded and averaged by the functions that inference uses.

    Args:
        spacing_mm: of the model.
        bounds: first and last of the model's intensity_points.
        normalization: of the model.
    """
    scale = intensity_scale(case.intensity, normalization)
    padding = find_padding(case.intensity, normalization=normalization, darkest=bounds[0])
    volume = Volume(array=case.intensity, ijk_to_ras=case.ijk_to_ras)
    intensity, _ = block_averaged(volume, spacing_mm=spacing_mm, bounds=bounds, scale=scale, padding=padding)
    blocks = tuple(-(-full // averaged) for full, averaged in zip(case.intensity.shape, intensity.shape))
    return LoadedCase(
        intensity=intensity.to(device),
        labels=torch.from_numpy(case.labels).to(device),
        spacing_mm=case.spacing_mm,
        direction=case.direction,
        extent=case.extent,
        blocks=blocks,
        outside=bounds[0],
    )
