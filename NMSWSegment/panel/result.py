"""From a finished run to the scene: segmentation, table of statistics, outlines, how it was made, and whether it still is what was made."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence

import slicer
from vtk.util.numpy_support import vtk_to_numpy

from NMSWSegment.files.bundle import Label
from NMSWSegment.files.label_content import LabelContent, voxels_fingerprint
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.application import _
from NMSWSegment.panel.nodes import LABELMAP_REPRESENTATION, check_same_grid, import_steps, volume_key, write_statistics_table
from NMSWSegment.panel.overlays import hidden_segments, set_hidden_segments, show_patches
from NMSWSegment.panel.stepped_task import Steps
from NMSWSegment.panel.surfaces import has_surfaces, surface_of
from NMSWSegment.protocol import PatchBox, UserError

FINGERPRINT_ATTRIBUTE = "NMSW.Fingerprint"


def result_steps(
    labelmap: Volume,
    run_info: dict,
    content: LabelContent,
    *,
    labels: Sequence[Label],
    statistics: Sequence[dict],
    volume_node: "slicer.vtkMRMLScalarVolumeNode",
    key: str | None = None,
    segmentation_node: "slicer.vtkMRMLSegmentationNode | None",
    output_name: str = "",
    started: float,
    keep_visibility: bool = False,
    on_new_node: Callable[["slicer.vtkMRMLSegmentationNode"], None] = lambda node: None,
) -> Steps[tuple["slicer.vtkMRMLSegmentationNode", float]]:
    """Replace the content of a segmentation node by a result, with everything that belongs to it, in steps of some milliseconds.

    The value is the node and the seconds since the click: the whole run, as the user waited for it.

    Args:
        labelmap: labels on the grid of the volume, (K, J, I).
        run_info: of the engine.
        content: of the labelmap.
        labels: of the model.
        statistics: StructureStatistics.to_dict() of every label.
        key: volume_key of what was segmented; None where nothing can have changed meanwhile.
        segmentation_node: None makes a new one, of the name output_name.
        started: time.perf_counter() at the click.
        keep_visibility: segments that were hidden stay hidden; else the whole segmentation is shown.
        on_new_node: takes the new node as soon as it is in the scene.

    Raises:
        UserError: a node was removed, or the volume is no longer the one that was segmented; raised by the first step, which changes nothing.
    """
    # The application goes on during a run, so a user may have closed the scene, moved the volume, filtered it or gone to another time point meanwhile.
    if volume_node.GetScene() is None or (segmentation_node is not None and segmentation_node.GetScene() is None):
        raise UserError(_("The input volume or the output segmentation was deleted during the run. Load the volume and segment it again."))
    if key is not None and key != volume_key(volume_node):
        raise _changed_error(volume_node)
    try:
        check_same_grid(labelmap, volume_node)
    except ValueError as error:
        raise _changed_error(volume_node, f" ({error})") from error
    yield
    if segmentation_node is None:
        segmentation_node = new_segmentation_node(volume_node, name=output_name)
        on_new_node(segmentation_node)
        yield
    hidden = hidden_segments(segmentation_node) if keep_visibility else set()
    yield from import_steps(
        segmentation_node, labelmap, labels=[label for label in labels if label.name in content.voxels_by_name], reference_node=volume_node,
        surface_of=surface_of if has_surfaces(segmentation_node) else None,
    )  # fmt: skip
    write_statistics_table(segmentation_node, statistics)
    yield
    show_patches(volume_node.GetScene(), [PatchBox.from_dict(patch) for patch in run_info["patches"]], parent_node=volume_node)
    yield
    segmentation_node.SetAttribute(FINGERPRINT_ATTRIBUTE, _fingerprint(segmentation_node, voxels=content.fingerprint))
    # Last of all: while nodes come and go, the segment selectors of the slice views switch segments off.
    set_hidden_segments(segmentation_node, hidden)
    if not keep_visibility:
        segmentation_node.SetDisplayVisibility(True)
    seconds = time.perf_counter() - started
    _store_provenance(segmentation_node, run_info, seconds=seconds)
    return segmentation_node, seconds


def _changed_error(volume_node: "slicer.vtkMRMLScalarVolumeNode", how: str = "") -> UserError:
    """The sentence for a volume that is no longer the one that was segmented."""
    return UserError(_("The volume '{name}' was moved or changed during the run{how}. Segment it again.").format(name=volume_node.GetName(), how=how))


def new_segmentation_node(volume_node: "slicer.vtkMRMLScalarVolumeNode", *, name: str) -> "slicer.vtkMRMLSegmentationNode":
    """An empty segmentation node under a name that no other node has."""
    scene = volume_node.GetScene()
    return scene.AddNewNodeByClass("vtkMRMLSegmentationNode", scene.GenerateUniqueName(name))


def is_as_made(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> bool:
    """Whether a segmentation is exactly as a run left it, maybe in another session: its voxels, segments, names and colors.

    It reads all voxels, half a second for a large volume.
    """
    made = segmentation_node.GetAttribute(FINGERPRINT_ATTRIBUTE)
    segmentation = segmentation_node.GetSegmentation()
    if not made or segmentation.GetNumberOfLayers() != 1:  # segments that overlap are not ours
        return False
    scalars = segmentation.GetLayerDataObject(0, LABELMAP_REPRESENTATION).GetPointData().GetScalars()
    if scalars is None:
        return False
    labelmap = segmentation.GetLayerDataObject(0, LABELMAP_REPRESENTATION)
    array = vtk_to_numpy(scalars).reshape(tuple(reversed(labelmap.GetDimensions())))
    values = [segmentation.GetNthSegment(index).GetLabelValue() for index in range(segmentation.GetNumberOfSegments())]
    return made == _fingerprint(segmentation_node, voxels=voxels_fingerprint(array, values=values))


def _fingerprint(segmentation_node: "slicer.vtkMRMLSegmentationNode", *, voxels: str) -> str:
    """Hash of the segments and of their voxels; colors as bytes, because a file rounds them."""
    segmentation = segmentation_node.GetSegmentation()
    segments = []
    for segment_id in segmentation.GetSegmentIDs():
        segment = segmentation.GetSegment(segment_id)
        segments.append([segment_id, segment.GetName(), [round(255 * channel) for channel in segment.GetColor()]])
    return hashlib.blake2b(json.dumps([segments, voxels]).encode("utf-8"), digest_size=16).hexdigest()


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
        "Runtime": run_info["runtime"]["name"],
        "MinIslandMl": f"{options['min_island_ml']:g}",
        "DeviceSteps": "; ".join(run_info["device_steps"]),
        "Structures": ", ".join(options["structures"]) or "all",
        "Seconds": f"{seconds:.2f}",
    }
    for name, value in attributes.items():
        node.SetAttribute(f"NMSW.{name}", value)
