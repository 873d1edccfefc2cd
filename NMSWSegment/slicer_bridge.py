"""Between MRML nodes and the library: read a volume node, fill a segmentation node, outline the patches that were run.

The only library file that touches slicer or vtk. It works in the application and with slicer-core, where there is no
slicer.app and no slicer.mrmlScene: a scene always comes from a node or an argument.
"""

import logging
from collections.abc import Sequence

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from NMSWSegment.bundle import Label
from NMSWSegment.colors import rank_color
from NMSWSegment.labels import MAX_LABELS
from NMSWSegment.protocol import PatchBox, UserError
from NMSWSegment.volume import Volume

PATCH_FOLDER_NAME = "NMSW patches"
PATCH_ATTRIBUTE = "NMSW.Patch"
"""Node attribute of a patch outline, its rank; tells our outlines from a person's own regions of interest."""
SAME_GRID_ATOL_MM = 1e-3
"""How far a voxel center may be off before two grids are different; a hundredth of the finest CT voxel."""

_logger = logging.getLogger(__name__)


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
    return Volume(array=array, ijk_to_ras=_node_to_world(node) @ _ijk_to_node(node), name=node.GetName() or "")


def import_labelmap(
    segmentation_node: "slicer.vtkMRMLSegmentationNode",
    labelmap: Volume,
    *,
    labels: Sequence[Label],
    reference_node: "slicer.vtkMRMLScalarVolumeNode",
) -> None:
    """Replace the content of a segmentation node by a labelmap.

    The segment ids are the label names. An absent class gives no segment. The node moves under the parent transform of the
    reference volume and beside it in the subject hierarchy, and takes its geometry. All that can fail happens before the
    node is touched, so that an exception leaves it as it was.

    Args:
        labelmap: integers (K, J, I) on the grid of the reference volume, 0 is background.
        labels: what the integers mean.

    Raises:
        ValueError: the labelmap is not on the grid of the reference volume, or holds a value that is no label.
    """
    _check_same_grid(labelmap, reference_node)
    segmentation = _segmentation_from_labelmap(labelmap, labels=labels, ijk_to_node=_ijk_to_node(reference_node))
    segmentation_node.CreateDefaultDisplayNodes()
    segmentation_node.GetSegmentation().DeepCopy(segmentation)
    # The segments are in the coordinates of the volume node, so the same parent transform puts both in the same place,
    # and keeps them there when a person moves it.
    segmentation_node.SetAndObserveTransformNodeID(reference_node.GetTransformNodeID())
    segmentation_node.SetReferenceImageGeometryParameterFromVolumeNode(reference_node)
    _place_beside(segmentation_node, reference_node)


def show_patches(
    scene: "slicer.vtkMRMLScene", patches: Sequence[PatchBox], *, parent_node: "slicer.vtkMRMLScalarVolumeNode"
) -> list["slicer.vtkMRMLMarkupsROINode"]:
    """Outline the patches that went through the local net; the outlines of the previous run go away.

    Args:
        patches: boxes along the world axes, best first; center in RAS and edge lengths in mm.
        parent_node: the volume that they belong to; the outlines follow its parent transform.

    Returns:
        One locked, unfilled region-of-interest node per patch, in one subject-hierarchy folder.
    """
    remove_patches(scene)
    if not patches:
        return []
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    folder = hierarchy.CreateFolderItem(_hierarchy_parent(hierarchy, parent_node), PATCH_FOLDER_NAME)
    hierarchy.SetItemExpanded(folder, False)
    nodes = []
    for patch in patches:
        node = _add_patch_node(scene, patch, num_patches=len(patches), parent_node=parent_node)
        item = hierarchy.GetItemByDataNode(node) or hierarchy.CreateItem(folder, node)
        hierarchy.SetItemParent(item, folder)
        nodes.append(node)
    return nodes


def remove_patches(scene: "slicer.vtkMRMLScene") -> None:
    """Remove the outlines of the previous run and their folder; a person's own nodes stay."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    folders = set()
    for index in reversed(range(scene.GetNumberOfNodesByClass("vtkMRMLMarkupsROINode"))):
        node = scene.GetNthNodeByClass(index, "vtkMRMLMarkupsROINode")
        if node.GetAttribute(PATCH_ATTRIBUTE):
            folders.add(_hierarchy_parent(hierarchy, node))
            item = hierarchy.GetItemByDataNode(node)
            if item:
                # Only the application drops the item of a removed node by itself.
                hierarchy.RemoveItem(item, False)
            scene.RemoveNode(node)
    for folder in folders:
        if hierarchy.GetItemName(folder) == PATCH_FOLDER_NAME and hierarchy.GetNumberOfItemChildren(folder) == 0:
            hierarchy.RemoveItem(folder)


def _check_is_scalar_volume(node: "slicer.vtkMRMLNode | None") -> None:
    """Raise UserError with the way out where a node is not one grayscale volume that can be segmented."""
    if node is None:
        raise UserError("There is no input volume. Choose the CT volume to segment.")
    name = node.GetName()
    if node.IsA("vtkMRMLSequenceNode"):
        raise UserError(f"'{name}' is a sequence, not a volume. Go to one time point in Sequences and choose its volume.")
    if node.IsA("vtkMRMLLabelMapVolumeNode") or node.IsA("vtkMRMLSegmentationNode"):
        raise UserError(f"'{name}' holds labels, not intensities. Choose the CT volume that it was made from.")
    if not node.IsA("vtkMRMLScalarVolumeNode"):
        raise UserError(f"'{name}' is a {node.GetNodeTagName()}, not a scalar volume. Choose a CT volume.")
    voxels = node.GetImageData()
    if voxels is None or voxels.GetPointData().GetScalars() is None or voxels.GetNumberOfPoints() == 0:
        raise UserError(f"The volume '{name}' has no voxels. Load its image file again, or choose another volume.")
    if voxels.GetNumberOfScalarComponents() != 1:
        found = voxels.GetNumberOfScalarComponents()
        raise UserError(f"The volume '{name}' has {found} components, but one is needed. Extract one component with Vector to Scalar Volume.")
    transform = node.GetParentTransformNode()
    if transform is not None and not transform.IsTransformToWorldLinear():
        raise UserError(
            f"The volume '{name}' is under the non-linear transform '{transform.GetName()}'. Harden the transform on the volume in the "
            "Transforms module, or take the volume out of it, and segment again."
        )


def _ijk_to_node(node: "slicer.vtkMRMLVolumeNode") -> np.ndarray:
    """Voxel index (i, j, k) to the node's own coordinates, before its parent transform, 4 x 4 float64."""
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return _array_from_matrix(matrix)


def _node_to_world(node: "slicer.vtkMRMLTransformableNode") -> np.ndarray:
    """The node's own coordinates to world RAS through all its parent transforms, 4 x 4 float64."""
    matrix = vtk.vtkMatrix4x4()
    transform = node.GetParentTransformNode()
    if transform is not None:
        transform.GetMatrixTransformToWorld(matrix)
    return _array_from_matrix(matrix)


def _array_from_matrix(matrix: vtk.vtkMatrix4x4) -> np.ndarray:
    """A VTK matrix as a 4 x 4 float64 array."""
    return np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def _matrix_from_array(array: np.ndarray) -> vtk.vtkMatrix4x4:
    """A 4 x 4 array as a VTK matrix."""
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy([float(element) for element in array.ravel()])
    return matrix


def _check_same_grid(labelmap: Volume, node: "slicer.vtkMRMLScalarVolumeNode") -> None:
    """Raise ValueError unless every voxel of the labelmap lies on the same voxel of the node."""
    shape = tuple(reversed(node.GetImageData().GetDimensions()))
    if labelmap.shape != shape:
        raise ValueError(f"the labelmap has shape {labelmap.shape}, the volume '{node.GetName()}' has {shape}")
    corners_ijk = np.array([[i, j, k, 1] for i in (0, shape[2] - 1) for j in (0, shape[1] - 1) for k in (0, shape[0] - 1)])
    ijk_to_ras = _node_to_world(node) @ _ijk_to_node(node)
    distance_mm = np.abs(corners_ijk @ (labelmap.ijk_to_ras - ijk_to_ras).T).max()
    if distance_mm > SAME_GRID_ATOL_MM:
        raise ValueError(f"the labelmap is up to {distance_mm:.3g} mm off the volume '{node.GetName()}'")


def _segmentation_from_labelmap(labelmap: Volume, *, labels: Sequence[Label], ijk_to_node: np.ndarray) -> "slicer.vtkSegmentation":
    """A segmentation whose segments share one binary labelmap, as Slicer's own reader makes it."""
    # slice by slice: bincount turns its argument into int64, eight times the labelmap
    counts = sum(np.bincount(plane.ravel(), minlength=MAX_LABELS + 1) for plane in labelmap.array)
    present = set(np.flatnonzero(counts).tolist())
    unknown = present - {0} - {label.value for label in labels}
    if unknown:
        raise ValueError(f"the labelmap holds {sorted(unknown)}, which no label names")
    shared = slicer.vtkOrientedImageData()
    shared.SetDimensions(*reversed(labelmap.shape))
    shared.SetImageToWorldMatrix(_matrix_from_array(ijk_to_node))
    shared.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(labelmap.array, dtype=np.uint8).ravel(), deep=True))
    representation = slicer.vtkSegmentationConverter.GetSegmentationBinaryLabelmapRepresentationName()
    segmentation = slicer.vtkSegmentation()
    segmentation.SetSourceRepresentationName(representation)
    for label in labels:
        if label.value in present:
            segment = _segment(label)
            segment.AddRepresentation(representation, shared)
            if not segmentation.AddSegment(segment, label.name):
                raise RuntimeError(f"Slicer refused the segment '{label.name}'")
    return segmentation


def _segment(label: Label) -> "slicer.vtkSegment":
    """An empty segment with the label's name, color and codes."""
    segment = slicer.vtkSegment()
    segment.SetName(label.title)
    segment.SetColor(*(channel / 255 for channel in label.color))
    segment.SetLabelValue(label.value)
    segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), label.terminology)
    return segment


def _hierarchy_parent(hierarchy: "slicer.vtkMRMLSubjectHierarchyNode", node: "slicer.vtkMRMLNode") -> int:
    """Item above a node, the patient's study for a DICOM volume; the scene where the node is in no hierarchy."""
    item = hierarchy.GetItemByDataNode(node)
    return hierarchy.GetItemParent(item) if item else hierarchy.GetSceneItemID()


def _place_beside(node: "slicer.vtkMRMLNode", sibling: "slicer.vtkMRMLNode") -> None:
    """Put a node under the same subject-hierarchy item as its sibling: DICOM export looks for the study there."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(node.GetScene())
    parent = _hierarchy_parent(hierarchy, sibling)
    item = hierarchy.GetItemByDataNode(node) or hierarchy.CreateItem(parent, node)
    hierarchy.SetItemParent(item, parent)


def _add_patch_node(
    scene: "slicer.vtkMRMLScene", patch: PatchBox, *, num_patches: int, parent_node: "slicer.vtkMRMLScalarVolumeNode"
) -> "slicer.vtkMRMLMarkupsROINode":
    """One outline under the parent transform of the volume, in the place where the patch was cut."""
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", f"Patch {patch.rank} (importance {patch.importance:.2g})")
    node.SetAttribute(PATCH_ATTRIBUTE, str(patch.rank))
    node.SetAndObserveTransformNodeID(parent_node.GetTransformNodeID())
    # world -> node: the box is along the world axes, the node lives below the transform
    world_to_node = np.linalg.inv(_node_to_world(parent_node))
    object_to_node = np.eye(4)
    object_to_node[:3, :3] = world_to_node[:3, :3] / np.linalg.norm(world_to_node[:3, :3], axis=0)
    object_to_node[:3, 3] = (world_to_node @ [*patch.center_ras, 1])[:3]
    node.SetAndObserveObjectToNodeMatrix(_matrix_from_array(object_to_node))
    node.SetSizeWorld(*patch.size_mm)
    node.SetLocked(True)
    _show_as_outline(node, color=rank_color(patch.rank, count=num_patches))
    return node


def _show_as_outline(node: "slicer.vtkMRMLMarkupsROINode", *, color: tuple[float, float, float]) -> None:
    """Draw the edges only: a filled box hides the image, handles invite to drag what is a fact."""
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    if display is None:
        _logger.warning("The patch outline '%s' cannot be shown: the scene makes no markups display nodes.", node.GetName())
        return
    display.SetFillVisibility(False)
    display.SetHandlesInteractive(False)
    display.SetPropertiesLabelVisibility(False)
    display.SetPointLabelsVisibility(False)
    display.SetColor(*color)
    display.SetSelectedColor(*color)
