"""From a finished run to the scene: segmentation, table of statistics, outlines, and how it was made."""

import time
from collections.abc import Sequence

import slicer

from NMSWSegment.files.bundle import Label
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.nodes import LABELMAP_REPRESENTATION, import_labelmap, write_statistics_table
from NMSWSegment.panel.overlays import show_patches
from NMSWSegment.protocol import PatchBox, UserError


def apply_result(
    labelmap: Volume,
    run_info: dict,
    *,
    labels: Sequence[Label],
    statistics: Sequence[dict],
    volume_node: "slicer.vtkMRMLScalarVolumeNode",
    segmentation_node: "slicer.vtkMRMLSegmentationNode",
    started: float,
) -> float:
    """Replace the content of a segmentation node by a result, with everything that belongs to it.

    Args:
        labelmap: labels on the grid of the volume, (K, J, I).
        run_info: of the engine.
        statistics: StructureStatistics.to_dict() of every label.
        started: time.perf_counter() at the click.

    Returns:
        Seconds since then: the whole run, as the user waited for it.

    Raises:
        UserError: a node was removed, or the volume is no longer the one that was segmented.
    """
    # The application goes on during a run, so a user may have closed the scene or moved the volume meanwhile.
    if volume_node.GetScene() is None or segmentation_node.GetScene() is None:
        raise UserError("The input volume or the segmentation was removed during the run. Load the volume and segment it again.")
    try:
        import_labelmap(segmentation_node, labelmap, labels=labels, reference_node=volume_node)
    except ValueError as error:
        raise UserError(f"The volume '{volume_node.GetName()}' was moved or changed during the run ({error}). Segment it again.") from error
    write_statistics_table(segmentation_node, statistics)
    show_patches(volume_node.GetScene(), [PatchBox.from_dict(patch) for patch in run_info["patches"]], parent_node=volume_node)
    seconds = time.perf_counter() - started
    _store_provenance(segmentation_node, run_info, seconds=seconds)
    return seconds


def new_segmentation_node(volume_node: "slicer.vtkMRMLScalarVolumeNode", *, name: str) -> "slicer.vtkMRMLSegmentationNode":
    """An empty segmentation node under a name that no other node has."""
    scene = volume_node.GetScene()
    return scene.AddNewNodeByClass("vtkMRMLSegmentationNode", scene.GenerateUniqueName(name))


def segments_state(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> tuple:
    """Changes when a user edits, renames, recolors, adds or removes a segment; not when surfaces or views change."""
    segmentation = segmentation_node.GetSegmentation()
    segments = [segmentation.GetNthSegment(index) for index in range(segmentation.GetNumberOfSegments())]
    return tuple((segment.GetName(), segment.GetColor(), _modified_time(segment.GetRepresentation(LABELMAP_REPRESENTATION))) for segment in segments)


def _modified_time(labelmap: "slicer.vtkOrientedImageData | None") -> int | None:
    """VTK's counter of the voxels; None without any."""
    scalars = labelmap.GetPointData().GetScalars() if labelmap is not None else None
    return None if scalars is None else scalars.GetMTime()


def _store_provenance(node: "slicer.vtkMRMLSegmentationNode", run_info: dict, *, seconds: float) -> None:
    """Write on the node how it was made; the attributes are saved with the scene."""
    options = run_info["options"]
    attributes = {
        "Version": run_info["versions"]["NMSWSegment"],
        "Bundle": run_info["bundle"]["name"],
        "BundleSHA256": run_info["bundle"]["sha256"],
        "NumPatches": "all" if options["num_patches"] is None else str(options["num_patches"]),
        "PatchesRun": str(len(run_info["patches"])),
        "PatchesReused": str(run_info["patches_reused"]),
        "Policy": options["policy"],
        "Device": run_info["device"],
        "DeviceSteps": "; ".join(run_info["device_steps"]),
        "Structures": ", ".join(options["structures"]) or "all",
        "Seconds": f"{seconds:.2f}",
    }
    for name, value in attributes.items():
        node.SetAttribute(f"NMSW.{name}", value)
