"""The paper's augmentation of whole volumes at the model spacing, with MONAI's transforms.

Source: paper section 4; no mirroring, because the sides of the body are classes of their own.
"""

import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandGridDistortiond,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
)
from torch import Tensor

SHIFT_VOXELS = 50
ROTATION_RAD = 0.52
SCALE = (0.3, 0.2, 0.2)
"""KJI; the paper's (.2, .2, .3) is H W D."""
GAMMA = (0.7, 1.5)
NOISE_SD = 0.1
"""Of the window; the paper names none, this is MONAI's default."""
_IMAGE, _BOTH, _MODES = "image", ("image", "label"), ("bilinear", "nearest")


class PaperAugmentation:
    """Augments an intensity and its labels; the same state of the generator gives the same result."""

    def __init__(self, *, window: tuple[float, float]) -> None:
        """Args: window: intensities, HU or normalized ones, that the transforms see as 0 and 1; beyond it nothing is left."""
        self._low, self._high = window
        affine = {"keys": _BOTH, "mode": _MODES, "padding_mode": "zeros"}  # zeros: the lower bound, and background
        self._transform = Compose(  # not lazy: MONAI 1.6 then interpolates the labels linearly and invents classes
            [
                RandShiftIntensityd(_IMAGE, offsets=0.1, prob=0.2),
                RandAffined(prob=1.0, translate_range=(SHIFT_VOXELS,) * 3, **affine),
                RandAffined(prob=0.3, rotate_range=(ROTATION_RAD,) * 3, scale_range=SCALE, **affine),
                RandGaussianNoised(_IMAGE, prob=0.1, std=NOISE_SD),
                RandGaussianSmoothd(_IMAGE, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
                RandScaleIntensityd(_IMAGE, factors=0.25, prob=0.15),
                RandSimulateLowResolutiond(_IMAGE, prob=0.25, zoom_range=(0.5, 1.0)),
                RandAdjustContrastd(_IMAGE, prob=0.3, gamma=GAMMA),
                RandAdjustContrastd(_IMAGE, prob=0.1, gamma=GAMMA, invert_image=True),
                RandGridDistortiond(_BOTH, prob=0.3, mode=_MODES, padding_mode="zeros"),
            ]
        )

    def __call__(self, intensity: Tensor, labels: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Intensity ((D, H, W), clipped to the window) and labels (uint8) of the same shape, both changed."""
        self._transform.set_random_state(seed=int(torch.randint(2**31, (), generator=generator)))
        share = ((intensity - self._low) / (self._high - self._low)).clamp(0, 1)
        result = self._transform({"image": share[None], "label": labels[None].float()})
        share, changed = (result[key].as_tensor()[0] for key in _BOTH)
        return share.clamp(0, 1) * (self._high - self._low) + self._low, changed.round().to(torch.uint8)
