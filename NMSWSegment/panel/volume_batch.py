"""The volumes of a scene, one after the other with the same options: what is left to do, and what became of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import slicer

from NMSWSegment.panel.nodes import IMPORTANCE_ATTRIBUTE, nodes_of_class
from NMSWSegment.protocol import SegmentOptions


@dataclass(frozen=True)
class BatchVolume:
    """A volume that waits for its turn; by then it may have been deleted."""

    node_id: str
    name: str


class VolumeBatch:
    """Volumes that are segmented one after the other. One that fails does not stop the rest; a cancel does, and what is finished stays."""

    def __init__(self, volumes: Sequence[BatchVolume], options: SegmentOptions) -> None:
        self.options = options
        """The same for all, whatever is changed in the panel meanwhile."""
        self.total = len(volumes)
        self.volume: BatchVolume | None = None
        """The one whose turn it is."""
        self.results: list[str] = []
        """Node ids of the segmentations, in the order of the volumes."""
        self.failures: list[tuple[str, str]] = []
        """Name of a volume and why it has no result."""
        self.is_cancelled = False
        self._waiting = list(volumes)

    def next(self) -> BatchVolume | None:
        """The next volume; None when all had their turn, or after a cancel."""
        self.volume = self._waiting.pop(0) if self._waiting and not self.is_cancelled else None
        return self.volume

    def done(self, segmentation_id: str) -> None:
        """The volume has its result."""
        self.results.append(segmentation_id)

    def failed(self, reason: str) -> None:
        """The volume will have no result."""
        self.failures.append((self.volume.name, reason))

    def cancel(self) -> None:
        """No other volume gets a turn."""
        self.is_cancelled = True

    @property
    def number(self) -> int:
        """1 for the first volume."""
        return self.total - len(self._waiting)

    def fraction(self, of_volume: float) -> float:
        """Share of the whole that is done, from the share of the volume whose turn it is; both 0 to 1."""
        return (self.number - 1 + of_volume) / self.total


def volumes_of_scene(scene: "slicer.vtkMRMLScene") -> list[BatchVolume]:
    """The volumes that a user sees in the list of input volumes, in the order of the scene: no labelmaps, and nothing that this module shows."""
    return [
        BatchVolume(node.GetID(), node.GetName())
        for node in nodes_of_class(scene, "vtkMRMLScalarVolumeNode")
        if node.GetClassName() == "vtkMRMLScalarVolumeNode" and not node.GetHideFromEditors() and not node.GetAttribute(IMPORTANCE_ATTRIBUTE)
    ]


def hide_results(scene: "slicer.vtkMRMLScene", batch: VolumeBatch) -> None:
    """Hide the segmentations of the volumes before: they do not belong to the next one, which the views show."""
    for segmentation_id in batch.results:
        node = scene.GetNodeByID(segmentation_id)
        if node is not None:
            node.SetDisplayVisibility(False)
