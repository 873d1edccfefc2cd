"""What is drawn over a volume: outlines of the patches, the importance map, the coarse result while a run goes on.

All of it can be drawn again, so it goes away without asking; the user's own nodes stay.
"""

import logging
from collections.abc import Sequence

import numpy as np
import slicer

from NMSWSegment.files.bundle import Label
from NMSWSegment.files.colors import rank_color
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.nodes import hierarchy_parent, image_data, import_labelmap, node_to_world_matrix, nodes_of_class, place_beside, remove_segments
from NMSWSegment.protocol import PatchBox

PATCH_FOLDER_NAME = "NMSW patches"
PATCH_ATTRIBUTE = "NMSW.Patch"
"""Node attribute of a patch outline, its rank; tells our outlines from the user's own regions of interest."""
MAX_OUTLINES = 60
"""Further patches are not outlined: each outline costs the views time, and that many hide the image."""
IMPORTANCE_NAME = "NMSW importance"
IMPORTANCE_ATTRIBUTE = "NMSW.Importance"
IMPORTANCE_OPACITY = 0.5
IMPORTANCE_COLORS = "vtkMRMLColorTableNodeIron"
LEAST_SHOWN_IMPORTANCE = 0.05
COARSE_RESULT_NAME = "NMSW coarse result"

_logger = logging.getLogger(__name__)


def show_patches(
    scene: "slicer.vtkMRMLScene", patches: Sequence[PatchBox], *, parent_node: "slicer.vtkMRMLScalarVolumeNode"
) -> list["slicer.vtkMRMLMarkupsROINode"]:
    """Outline the patches that went through the local net; the outlines of the previous run go away.

    Args:
        patches: boxes along the world axes, best first; center in RAS and edge lengths in mm.
        parent_node: the volume that they belong to; the outlines follow its parent transform.

    Returns:
        One locked, unfilled region-of-interest node for each of the first 60 patches, in one subject-hierarchy folder.
    """
    remove_patches(scene)
    if not patches:
        return []
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    folder = hierarchy.CreateFolderItem(hierarchy_parent(hierarchy, parent_node), PATCH_FOLDER_NAME)
    hierarchy.SetItemExpanded(folder, False)
    nodes = []
    for patch in patches[:MAX_OUTLINES]:
        node = _add_patch_node(scene, patch, num_patches=len(patches), parent_node=parent_node)
        item = hierarchy.GetItemByDataNode(node) or hierarchy.CreateItem(folder, node)
        hierarchy.SetItemParent(item, folder)
        nodes.append(node)
    return nodes


def set_patches_visible(scene: "slicer.vtkMRMLScene", is_visible: bool) -> None:
    """Show or hide the outlines."""
    for node in _patch_nodes(scene):
        node.SetDisplayVisibility(is_visible)


def remove_patches(scene: "slicer.vtkMRMLScene") -> None:
    """Remove the outlines of the previous run and their folder; the user's own nodes stay."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    folders = set()
    for node in _patch_nodes(scene):
        folders.add(hierarchy_parent(hierarchy, node))
        remove_node(node)
    for folder in folders:
        if hierarchy.GetItemName(folder) == PATCH_FOLDER_NAME and hierarchy.GetNumberOfItemChildren(folder) == 0:
            hierarchy.RemoveItem(folder)


def show_importance(importance: Volume, *, parent_node: "slicer.vtkMRMLScalarVolumeNode") -> "slicer.vtkMRMLScalarVolumeNode":
    """Lay the importance map over the slice views, in place of what is there.

    Args:
        importance: 0 to 1 on coarse voxels, (d, h, w) float32, in the coordinates of the volume node.
        parent_node: the volume that it belongs to; the map follows its parent transform.
    """
    scene = parent_node.GetScene()
    hide_importance(scene)
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", IMPORTANCE_NAME)
    node.SetAttribute(IMPORTANCE_ATTRIBUTE, "1")
    node.SetAndObserveImageData(image_data(importance.array))
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(importance.ijk_to_ras))
    node.SetAndObserveTransformNodeID(parent_node.GetTransformNodeID())
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.SetAndObserveColorNodeID(IMPORTANCE_COLORS)
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(0, 1)
    display.SetThreshold(LEAST_SHOWN_IMPORTANCE, 1)
    display.ApplyThresholdOn()
    place_beside(node, parent_node)
    for composite in nodes_of_class(scene, "vtkMRMLSliceCompositeNode"):
        composite.SetAttribute(f"{IMPORTANCE_ATTRIBUTE}.Before", f"{composite.GetForegroundOpacity()} {composite.GetForegroundVolumeID() or ''}")
        composite.SetForegroundVolumeID(node.GetID())
        composite.SetForegroundOpacity(IMPORTANCE_OPACITY)
    return node


def hide_importance(scene: "slicer.vtkMRMLScene") -> None:
    """Remove the importance map; the slice views show what they showed before it."""
    for composite in nodes_of_class(scene, "vtkMRMLSliceCompositeNode"):
        opacity, _, volume_id = (composite.GetAttribute(f"{IMPORTANCE_ATTRIBUTE}.Before") or "").partition(" ")
        shown = scene.GetNodeByID(composite.GetForegroundVolumeID() or "")
        if opacity and (shown is None or shown.GetAttribute(IMPORTANCE_ATTRIBUTE)):
            composite.SetForegroundVolumeID(volume_id or None)
            composite.SetForegroundOpacity(float(opacity))
        composite.RemoveAttribute(f"{IMPORTANCE_ATTRIBUTE}.Before")
    for node in nodes_of_class(scene, "vtkMRMLScalarVolumeNode"):
        if node.GetAttribute(IMPORTANCE_ATTRIBUTE):
            remove_node(node)


def show_coarse_result(labelmap: Volume, *, labels: Sequence[Label], reference_node: "slicer.vtkMRMLScalarVolumeNode") -> "slicer.vtkMRMLSegmentationNode":
    """A segmentation node for the time of a run; nobody can choose it, and it is not saved with the scene."""
    node = slicer.vtkMRMLSegmentationNode()
    node.SetName(COARSE_RESULT_NAME)
    node.SetHideFromEditors(True)
    node.SetSaveWithScene(False)
    reference_node.GetScene().AddNode(node)
    import_labelmap(node, labelmap, labels=labels, reference_node=reference_node)
    return node


def remove_coarse_result(node: "slicer.vtkMRMLSegmentationNode") -> None:
    """Remove what show_coarse_result made."""
    remove_segments(node.GetSegmentation())
    remove_node(node)


def show_surfaces(segmentation_node: "slicer.vtkMRMLSegmentationNode", is_shown: bool) -> None:
    """Show the segments in the 3D views, or take them out."""
    if is_shown:
        segmentation_node.CreateClosedSurfaceRepresentation()
    else:
        segmentation_node.RemoveClosedSurfaceRepresentation()


def remove_node(node: "slicer.vtkMRMLNode") -> None:
    """Remove a node with its display nodes and its place in the subject hierarchy."""
    scene = node.GetScene()
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    item = hierarchy.GetItemByDataNode(node)
    if item:
        # Only the application drops the item of a removed node by itself.
        hierarchy.RemoveItem(item, False)
    for index in reversed(range(node.GetNumberOfDisplayNodes())):
        scene.RemoveNode(node.GetNthDisplayNode(index))
    scene.RemoveNode(node)


def _patch_nodes(scene: "slicer.vtkMRMLScene") -> list["slicer.vtkMRMLMarkupsROINode"]:
    """Our outlines, not the user's own regions of interest."""
    return [node for node in nodes_of_class(scene, "vtkMRMLMarkupsROINode") if node.GetAttribute(PATCH_ATTRIBUTE)]


def _add_patch_node(
    scene: "slicer.vtkMRMLScene", patch: PatchBox, *, num_patches: int, parent_node: "slicer.vtkMRMLScalarVolumeNode"
) -> "slicer.vtkMRMLMarkupsROINode":
    """One outline under the parent transform of the volume, in the place where the patch was cut."""
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", f"Patch {patch.rank} (importance {patch.importance:.2g})")
    node.SetAttribute(PATCH_ATTRIBUTE, str(patch.rank))
    node.SetAndObserveTransformNodeID(parent_node.GetTransformNodeID())
    # world -> node: the box is along the world axes, the node lives below the transform
    world_to_node = np.linalg.inv(node_to_world_matrix(parent_node))
    object_to_node = np.eye(4)
    object_to_node[:3, :3] = world_to_node[:3, :3] / np.linalg.norm(world_to_node[:3, :3], axis=0)
    object_to_node[:3, 3] = (world_to_node @ [*patch.center_ras, 1])[:3]
    node.SetAndObserveObjectToNodeMatrix(slicer.util.vtkMatrixFromArray(object_to_node))
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
