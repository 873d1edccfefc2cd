"""Between MRML nodes and the library: read volume and region-of-interest nodes, fill segmentation and table nodes.

It works in the application and with slicer-core, where there is no
slicer.app and no slicer.mrmlScene: a scene always comes from a node or an argument.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from NMSWSegment.files.boxes import voxel_corners
from NMSWSegment.files.bundle import Label
from NMSWSegment.files.label_content import label_content
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.application import _
from NMSWSegment.panel.checks import Geometry, Inputs
from NMSWSegment.panel.stepped_task import Steps, run_to_end
from NMSWSegment.protocol import UserError

VOLUMES_ROLE = "NMSW.Volumes"
"""Node reference from a segmentation to its table of statistics."""
IMPORTANCE_ATTRIBUTE = "NMSW.Importance"
"""Node attribute of the importance map, which is a volume node too; tells it from those that can be segmented."""
LABELMAP_REPRESENTATION = "Binary labelmap"
SURFACE_REPRESENTATION = "Closed surface"
SAME_GRID_ATOL_MM = 1e-3
"""How far a voxel center may be off before two grids are different; a hundredth of the finest CT voxel."""

_TABLE_COLUMNS = {  # title: key of the statistics, decimal places; 0 is a whole number, None a text
    "Structure": ("structure", None),
    "Volume (ml)": ("volume_ml", 2),
    "Voxels": ("voxels", 0),
    "Mean": ("mean", 1),
    "SD": ("sd", 1),
    "Surface (cm2)": ("surface_cm2", 1),
    "At border": ("border_faces", None),
    "Refined (%)": ("refined_percent", 1),
}


def volume_from_node(node: "slicer.vtkMRMLScalarVolumeNode") -> Volume:
    """The voxels of a volume node and their place in the world, its linear parent transform included.

    Args:
        node: a scalar volume node with image data.

    Returns:
        Volume whose array (K, J, I) is a view of the node's voxels, in the node's own dtype: do not write to it.

    Raises:
        UserError: the node is no scalar volume, is empty, has several components, or is under a non-linear transform.
    """
    _check_is_scalar_volume(node)
    voxels = node.GetImageData()
    shape = tuple(reversed(voxels.GetDimensions()))  # VTK counts IJK, arrays are KJI
    array = vtk_to_numpy(voxels.GetPointData().GetScalars()).reshape(shape)
    return Volume(array=array, ijk_to_ras=node_to_world_matrix(node) @ ijk_to_node_matrix(node), name=node.GetName() or "")


def volume_key(node: "slicer.vtkMRMLScalarVolumeNode") -> str:
    """Names these voxels in this place: VTK's modification counter is unique in a session.

    Raises:
        UserError: as volume_from_node.
    """
    place = volume_from_node(node).ijk_to_ras
    image = node.GetImageData()
    stamp = max(image.GetMTime(), image.GetPointData().GetScalars().GetMTime())
    return f"{node.GetID()} {stamp} {place.tobytes().hex()}"


def volume_in_node(node: "slicer.vtkMRMLScalarVolumeNode") -> Volume:
    """The same in the node's own coordinates, without its parent transform."""
    return dataclasses.replace(volume_from_node(node), ijk_to_ras=ijk_to_node_matrix(node))


def volume_inputs(node: "slicer.vtkMRMLScalarVolumeNode | None") -> Inputs:
    """What the panel has to know about a volume node, whatever it is, without copying a voxel; all else of Inputs is left open."""
    if node is None:
        return Inputs(geometry=None, manifest=None)
    voxels = node.GetImageData()
    transform = node.GetParentTransformNode()
    is_linear = transform is None or bool(transform.IsTransformToWorldLinear())
    shape = (0, 0, 0) if voxels is None else tuple(reversed(voxels.GetDimensions()))
    ijk_to_ras = (node_to_world_matrix(node) if is_linear else np.eye(4)) @ ijk_to_node_matrix(node)
    return Inputs(
        geometry=Geometry(shape=shape, ijk_to_ras=ijk_to_ras, bytes_per_voxel=voxels.GetScalarSize() if voxels is not None else 2),
        manifest=None,
        components=voxels.GetNumberOfScalarComponents() if voxels is not None else 1,
        is_labelmap=bool(node.IsA("vtkMRMLLabelMapVolumeNode")),
        is_importance_map=bool(node.GetAttribute(IMPORTANCE_ATTRIBUTE)),
        is_transform_linear=is_linear,
        intensity_range=voxels.GetScalarRange() if voxels is not None and min(shape) > 0 else None,
    )


def import_labelmap(
    segmentation_node: "slicer.vtkMRMLSegmentationNode",
    labelmap: Volume,
    *,
    labels: Sequence[Label],
    reference_node: "slicer.vtkMRMLScalarVolumeNode",
) -> dict[str, int]:
    """Replace the content of a segmentation node by a labelmap, in one go.

    Returns:
        Voxels of every segment by segment id, in label order.

    Raises:
        ValueError: the labelmap is not on the grid of the reference volume, or holds a value that is no label; the node is as it was.
    """
    check_same_grid(labelmap, reference_node)
    content = label_content(labelmap.array, labels=labels)
    run_to_end(
        import_steps(segmentation_node, labelmap, labels=[label for label in labels if label.name in content.voxels_by_name], reference_node=reference_node)
    )
    return content.voxels_by_name


def import_steps(
    segmentation_node: "slicer.vtkMRMLSegmentationNode",
    labelmap: Volume,
    *,
    labels: Sequence[Label],
    reference_node: "slicer.vtkMRMLScalarVolumeNode",
    surface_of: Callable[["slicer.vtkSegment", "slicer.vtkSegmentation"], "vtk.vtkPolyData | None"] | None = None,
) -> Steps[None]:
    """Replace the content of a segmentation node by a labelmap, one segment a step.

    The segment ids are the label names. A segment of before stays until its successor takes its place, so that the views never go
    empty. The node moves under the parent transform of the reference volume and beside it in the subject hierarchy, and takes its geometry.

    Args:
        labelmap: integers (K, J, I) on the grid of the reference volume, 0 is background; see check_same_grid.
        labels: those that are in the labelmap.
        surface_of: makes the closed surface of a new segment, where the node is to have them; else Slicer makes none.
    """
    shared = _shared_labelmap(labelmap, ijk_to_node=ijk_to_node_matrix(reference_node))
    yield
    segmentation_node.CreateDefaultDisplayNodes()
    segmentation = segmentation_node.GetSegmentation()
    if segmentation.GetSourceRepresentationName() != LABELMAP_REPRESENTATION:
        remove_segments(segmentation)
    segmentation.SetSourceRepresentationName(LABELMAP_REPRESENTATION)
    names = [label.name for label in labels]
    for segment_id in segmentation.GetSegmentIDs():
        if segment_id not in names:
            _remove_segment(segmentation, segment_id)
            yield
    # The segments are in the coordinates of the volume node, so the same parent transform puts both in the same place,
    # and keeps them there when a user moves it.
    segmentation_node.SetAndObserveTransformNodeID(reference_node.GetTransformNodeID())
    segmentation_node.SetReferenceImageGeometryParameterFromVolumeNode(reference_node)
    place_beside(segmentation_node, reference_node)
    for label in labels:
        yield
        segment = _segment(label, shared)
        surface = surface_of(segment, segmentation) if surface_of else None
        if surface is not None:
            segment.AddRepresentation(SURFACE_REPRESENTATION, surface)
        _remove_segment(segmentation, label.name)
        segmentation.AddSegment(segment, label.name)
    yield


def remove_segments(segmentation: "slicer.vtkSegmentation") -> None:
    """Remove all segments."""
    for segment_id in segmentation.GetSegmentIDs():
        _remove_segment(segmentation, segment_id)


def _remove_segment(segmentation: "slicer.vtkSegmentation", segment_id: str) -> None:
    """Remove a segment, if it is there, without erasing it from the labelmap that it shares, which takes a while for a large volume."""
    segment = segmentation.GetSegment(segment_id)
    if segment is not None:
        segment.RemoveAllRepresentations()
        segmentation.RemoveSegment(segment_id)


def write_statistics_table(segmentation_node: "slicer.vtkMRMLSegmentationNode", statistics: Sequence[dict]) -> "slicer.vtkMRMLTableNode":
    """One row per segment in a table node beside the segmentation, made at the first run and written anew at the next ones.

    Args:
        statistics: StructureStatistics.to_dict() of every label; those without a voxel have no segment and no row.
    """
    table_node = segmentation_node.GetNodeReference(VOLUMES_ROLE)
    others = (node for node in nodes_of_class(segmentation_node.GetScene(), "vtkMRMLSegmentationNode") if node is not segmentation_node)
    if table_node is None or any(node.GetNodeReference(VOLUMES_ROLE) is table_node for node in others):  # a clone shares the table with its original
        table_node = segmentation_node.GetScene().AddNewNodeByClass("vtkMRMLTableNode", f"{segmentation_node.GetName()} statistics")
        segmentation_node.SetNodeReferenceID(VOLUMES_ROLE, table_node.GetID())
    segmentation = segmentation_node.GetSegmentation()
    table = vtk.vtkTable()
    for title, (key, digits) in _TABLE_COLUMNS.items():
        column = vtk.vtkDoubleArray() if digits else vtk.vtkIntArray() if digits == 0 else vtk.vtkStringArray()
        column.SetName(title)
        for row in statistics:
            if row["voxels"]:
                value = segmentation.GetSegment(row["structure"]).GetName() if key == "structure" else row[key]
                column.InsertNextValue(math.nan if value is None else round(value, digits) if digits else value)
        table.AddColumn(column)
    table_node.SetUseColumnTitleAsColumnHeader(True)
    table_node.SetLocked(True)
    table_node.SetAndObserveTable(table)
    place_beside(table_node, segmentation_node)
    return table_node


def roi_to_ras(node: "slicer.vtkMRMLMarkupsROINode") -> tuple[tuple[float, ...], ...]:
    """The region of interest as SegmentOptions.roi_to_ras, its parent transforms included; 4 x 4, mm."""
    size_mm, center_ras, axis = np.zeros(3), np.zeros(3), np.zeros(3)
    node.GetSizeWorld(size_mm)
    node.GetCenterWorld(center_ras)
    matrix = np.eye(4)
    matrix[:3, 3] = center_ras
    for index, get_axis in enumerate((node.GetXAxisWorld, node.GetYAxisWorld, node.GetZAxisWorld)):
        get_axis(axis)
        matrix[:3, index] = axis / (np.linalg.norm(axis) or 1) * size_mm[index]
    return tuple(tuple(map(float, row)) for row in matrix)


def ijk_to_node_matrix(node: "slicer.vtkMRMLVolumeNode") -> np.ndarray:
    """Voxel index (i, j, k) to the node's own coordinates, before its parent transform, 4 x 4 float64."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def node_to_world_matrix(node: "slicer.vtkMRMLTransformableNode") -> np.ndarray:
    """The node's own coordinates to world RAS through all its parent transforms, 4 x 4 float64."""
    matrix = vtk.vtkMatrix4x4()
    transform = node.GetParentTransformNode()
    if transform is not None:
        transform.GetMatrixTransformToWorld(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def nodes_of_class(scene: "slicer.vtkMRMLScene", class_name: str) -> list["slicer.vtkMRMLNode"]:
    """All nodes of a class; slicer.util.getNodesByClass looks into the application's scene, whichever it is given."""
    return [scene.GetNthNodeByClass(index, class_name) for index in range(scene.GetNumberOfNodesByClass(class_name))]


def image_data(array: np.ndarray) -> "slicer.vtkOrientedImageData":
    """A copy of the voxels (K, J, I), of spacing 1 at the origin."""
    image = slicer.vtkOrientedImageData()
    image.SetDimensions(*reversed(array.shape))  # arrays are KJI, VTK counts IJK
    image.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(array).ravel(), deep=True))
    return image


def hierarchy_parent(hierarchy: "slicer.vtkMRMLSubjectHierarchyNode", node: "slicer.vtkMRMLNode") -> int:
    """Item above a node, the patient's study for a DICOM volume; the scene where the node is in no hierarchy."""
    item = hierarchy.GetItemByDataNode(node)
    return hierarchy.GetItemParent(item) if item else hierarchy.GetSceneItemID()


def place_beside(node: "slicer.vtkMRMLNode", sibling: "slicer.vtkMRMLNode") -> None:
    """Put a node under the same subject-hierarchy item as its sibling: DICOM export looks for the study there."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(node.GetScene())
    parent = hierarchy_parent(hierarchy, sibling)
    item = hierarchy.GetItemByDataNode(node) or hierarchy.CreateItem(parent, node)
    hierarchy.SetItemParent(item, parent)


def _check_is_scalar_volume(node: "slicer.vtkMRMLNode | None") -> None:
    """Raise UserError with the way out where a node is not one grayscale volume that can be segmented."""
    if node is None:
        raise UserError(_("There is no input volume. Choose the CT volume to segment."))
    name = node.GetName()
    if node.IsA("vtkMRMLSequenceNode"):
        raise UserError(_("'{name}' is a sequence, not a volume. Go to one time point in Sequences and choose its volume.").format(name=name))
    if node.IsA("vtkMRMLLabelMapVolumeNode") or node.IsA("vtkMRMLSegmentationNode"):
        raise UserError(_("'{name}' holds labels, not intensities. Choose the CT volume that it was made from.").format(name=name))
    if not node.IsA("vtkMRMLScalarVolumeNode"):
        raise UserError(_("'{name}' is a {kind}, not a scalar volume. Choose a CT volume.").format(name=name, kind=node.GetNodeTagName()))
    voxels = node.GetImageData()
    if voxels is None or voxels.GetPointData().GetScalars() is None or voxels.GetNumberOfPoints() == 0:
        raise UserError(_("The volume '{name}' has no voxels. Load its image file again, or choose another volume.").format(name=name))
    if voxels.GetNumberOfScalarComponents() != 1:
        raise UserError(
            _("The volume '{name}' has {found} components, but one is needed. Extract one component with Vector to Scalar Volume.").format(
                name=name, found=voxels.GetNumberOfScalarComponents()
            )
        )
    transform = node.GetParentTransformNode()
    if transform is not None and not transform.IsTransformToWorldLinear():
        raise UserError(
            _(
                "The volume '{name}' is under the non-linear transform '{transform}'. Harden the transform on the volume in the "
                "Transforms module, or take the volume out of it, and segment again."
            ).format(name=name, transform=transform.GetName())
        )


def check_same_grid(labelmap: Volume, node: "slicer.vtkMRMLScalarVolumeNode") -> None:
    """Raise ValueError unless every voxel of the labelmap lies on the same voxel of the node."""
    shape = tuple(reversed(node.GetImageData().GetDimensions()))
    if labelmap.shape != shape:
        raise ValueError(f"the labelmap has shape {labelmap.shape}, the volume '{node.GetName()}' has {shape}")
    ijk_to_ras = node_to_world_matrix(node) @ ijk_to_node_matrix(node)
    distance_mm = np.abs(voxel_corners(shape) @ (labelmap.ijk_to_ras - ijk_to_ras).T).max()
    if distance_mm > SAME_GRID_ATOL_MM:
        raise ValueError(f"the labelmap is up to {distance_mm:.3g} mm off the volume '{node.GetName()}'")


def _shared_labelmap(labelmap: Volume, *, ijk_to_node: np.ndarray) -> "slicer.vtkOrientedImageData":
    """The labelmap that all segments share, as Slicer's own reader makes it; a copy of the voxels."""
    shared = image_data(labelmap.array.astype(np.uint8, copy=False))
    shared.SetImageToWorldMatrix(slicer.util.vtkMatrixFromArray(ijk_to_node))
    return shared


def _segment(label: Label, shared: "slicer.vtkOrientedImageData") -> "slicer.vtkSegment":
    """The segment of a label in the shared labelmap, with the label's name, color and codes."""
    segment = slicer.vtkSegment()
    segment.SetName(label.title)
    segment.SetColor(*(channel / 255 for channel in label.color))
    segment.SetLabelValue(label.value)
    segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), label.terminology)
    segment.AddRepresentation(LABELMAP_REPRESENTATION, shared)
    return segment
