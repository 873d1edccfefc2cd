"""NMSW ("No More Sliding Window") segmentation of CT and MR volumes: `from NMSWSegment import segment`.

The folders name the price of an import: files (numpy, SimpleITK), engine (torch), panel (Slicer), the others (torch, MONAI).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from NMSWSegment.engine.segmentation import Segmentation, segment

__version__ = "0.1.0"
__all__ = ["Segmentation", "__version__", "segment"]


def __getattr__(name: str) -> object:
    """`segment` and `Segmentation` when they are asked for, because they load torch, which takes seconds."""
    if name in ("segment", "Segmentation"):
        from NMSWSegment.engine import segmentation

        return getattr(segmentation, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
