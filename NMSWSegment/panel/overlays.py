"""What is drawn over a volume: outlines of the patches, the importance map, the coarse result while a run goes on.

All of it can be drawn again, so it goes away without asking; the user's own nodes stay. None of it is a segmentation node: when one is removed,
the segment selectors of the slice views turn to another segmentation and switch segments of it off (seen in Slicer 5.13).
"""

import json
from collections.abc import Sequence

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk

from NMSWSegment.files.boxes import box_corners
from NMSWSegment.files.bundle import Label
from NMSWSegment.files.colors import rank_color
from NMSWSegment.files.importance_display import importance_for_display
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.nodes import IMPORTANCE_ATTRIBUTE, ijk_to_node_matrix, image_data, node_to_world_matrix, nodes_of_class, place_beside
from NMSWSegment.protocol import PatchBox

VOLUME_ROLE = "NMSW.Volume"
"""Node reference from the outlines and from the importance map to the volume that they belong to."""
PATCHES_NAME = "NMSW patches"
PATCHES_ATTRIBUTE = "NMSW.Patches"
"""Node attribute of the outlines, the number of patches; tells them from the user's own models."""
OUTLINE_WIDTH = 2
CUBE_FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))
"""Corners of each face, in the order of itertools.product((low, high), repeat=3)."""
IMPORTANCE_NAME = "NMSW importance"
IMPORTANCE_OPACITY = 0.5
IMPORTANCE_COLORS = "vtkMRMLColorTableNodeIron"
LEAST_SHOWN_IMPORTANCE = 0.15
COARSE_RESULT_NAME = "NMSW coarse result"
COARSE_RESULT_ATTRIBUTE = "NMSW.CoarseResult"
COARSE_RESULT_OPACITY = 0.5
HIDDEN_ATTRIBUTE = "NMSW.HiddenDuringRun"
"""Node attribute of a segmentation in whose place the coarse result is shown: ids of the segments that were hidden before, JSON."""


def show_patches(
    scene: "slicer.vtkMRMLScene", patches: Sequence[PatchBox], *, parent_node: "slicer.vtkMRMLScalarVolumeNode"
) -> "slicer.vtkMRMLModelNode | None":
    """Outline the patches that went through the local net; the outlines of the previous run go away.

    A model rather than regions of interest: nothing of it can be dragged, no handles or center glyphs are drawn, and any number of
    patches costs the views one node.

    Args:
        patches: boxes along the world axes, best first; center in RAS and edge lengths in mm.
        parent_node: the volume that they belong to; the outlines follow its parent transform.

    Returns:
        A wireframe in the colors of the ranks, whose points carry the arrays Color, Rank and Importance; None without patches.
    """
    remove_patches(scene)
    if not patches:
        return None
    node = slicer.vtkMRMLModelNode()
    node.SetName(PATCHES_NAME)
    node.SetAttribute(PATCHES_ATTRIBUTE, str(len(patches)))
    node.SetNodeReferenceID(VOLUME_ROLE, parent_node.GetID())
    node.SetSelectable(False)
    node.SetAndObservePolyData(_boxes(patches, world_to_node=np.linalg.inv(node_to_world_matrix(parent_node))))
    scene.AddNode(node)
    node.SetAndObserveTransformNodeID(parent_node.GetTransformNodeID())
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.SetRepresentation(slicer.vtkMRMLDisplayNode.WireframeRepresentation)
    display.SetVisibility2D(True)
    display.SetSelectable(False)
    display.SetLighting(False)
    display.SetBackfaceCulling(False)
    display.SetLineWidth(OUTLINE_WIDTH)
    display.SetSliceIntersectionThickness(OUTLINE_WIDTH)
    display.SetActiveScalar("Color", vtk.vtkAssignAttribute.POINT_DATA)
    display.SetScalarRangeFlag(slicer.vtkMRMLDisplayNode.UseDirectMapping)
    display.SetScalarVisibility(True)
    place_beside(node, parent_node)
    return node


def set_patches_visible(scene: "slicer.vtkMRMLScene", is_visible: bool) -> None:
    """Show or hide the outlines."""
    for node in _own_nodes(scene, "vtkMRMLModelNode", PATCHES_ATTRIBUTE):
        node.SetDisplayVisibility(is_visible)


def remove_patches(scene: "slicer.vtkMRMLScene") -> None:
    """Remove the outlines of the previous run; the user's own nodes stay."""
    for node in _own_nodes(scene, "vtkMRMLModelNode", PATCHES_ATTRIBUTE):
        remove_node(node)


def show_importance(importance: Volume, *, parent_node: "slicer.vtkMRMLScalarVolumeNode", volume: Volume) -> "slicer.vtkMRMLScalarVolumeNode":
    """Lay the importance map over the slice views, in place of what is there; smooth, transparent where it is low, and only over the body.

    Args:
        importance: 0 to 1 on coarse voxels, (d, h, w) float32, in the coordinates of the volume node.
        parent_node: the volume that it belongs to; the map follows its parent transform.
        volume: its voxels, in its own coordinates.
    """
    scene = parent_node.GetScene()
    hide_importance(scene)
    shown = importance_for_display(importance, volume)
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", IMPORTANCE_NAME)
    node.SetAttribute(IMPORTANCE_ATTRIBUTE, "1")
    node.SetNodeReferenceID(VOLUME_ROLE, parent_node.GetID())
    node.SetAndObserveImageData(image_data(shown.array))
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(shown.ijk_to_ras))
    node.SetAndObserveTransformNodeID(parent_node.GetTransformNodeID())
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.SetAndObserveColorNodeID(IMPORTANCE_COLORS)
    display.SetInterpolate(True)
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(0, 1)
    display.SetThreshold(LEAST_SHOWN_IMPORTANCE, 1)
    display.ApplyThresholdOn()
    place_beside(node, parent_node)
    _lay_over(node, layer="Foreground", attribute=IMPORTANCE_ATTRIBUTE, opacity=IMPORTANCE_OPACITY)
    return node


def hide_importance(scene: "slicer.vtkMRMLScene") -> None:
    """Remove the importance map; the slice views show what they showed before it."""
    _take_off(scene, layer="Foreground", attribute=IMPORTANCE_ATTRIBUTE)
    for node in _own_nodes(scene, "vtkMRMLScalarVolumeNode", IMPORTANCE_ATTRIBUTE):
        remove_node(node)


def remove_overlays_of(volume_node: "slicer.vtkMRMLNode") -> None:
    """Remove the outlines and the importance map that belong to a volume."""
    scene = volume_node.GetScene()
    for class_name, attribute, remove in (
        ("vtkMRMLModelNode", PATCHES_ATTRIBUTE, remove_patches),
        ("vtkMRMLScalarVolumeNode", IMPORTANCE_ATTRIBUTE, hide_importance),
    ):
        if any(node.GetNodeReference(VOLUME_ROLE) is volume_node for node in _own_nodes(scene, class_name, attribute)):
            remove(scene)


def show_coarse_result(labelmap: Volume, *, labels: Sequence[Label], reference_node: "slicer.vtkMRMLScalarVolumeNode") -> "slicer.vtkMRMLLabelMapVolumeNode":
    """Lay the coarse result over the slice views for the time of a run; it is not saved with the scene.

    Args:
        labelmap: integers (K, J, I) on the grid of the reference volume, 0 is background.
    """
    scene = reference_node.GetScene()
    hide_coarse_result(scene)
    colors, node = slicer.vtkMRMLColorTableNode(), slicer.vtkMRMLLabelMapVolumeNode()
    colors.SetTypeToUser()
    colors.SetNumberOfColors(max(label.value for label in labels) + 1)
    colors.SetColor(0, "background", 0, 0, 0, 0)
    for label in labels:
        colors.SetColor(label.value, label.title, *(channel / 255 for channel in label.color), 1)
    for new, name in ((colors, f"{COARSE_RESULT_NAME} colors"), (node, COARSE_RESULT_NAME)):
        new.SetName(name)
        new.SetAttribute(COARSE_RESULT_ATTRIBUTE, "1")
        new.SetSaveWithScene(False)
    node.SetAndObserveImageData(image_data(labelmap.array.astype(np.uint8, copy=False)))
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(ijk_to_node_matrix(reference_node)))
    scene.AddNode(colors)
    scene.AddNode(node)
    node.SetAndObserveTransformNodeID(reference_node.GetTransformNodeID())
    node.CreateDefaultDisplayNodes()
    node.GetDisplayNode().SetAndObserveColorNodeID(colors.GetID())
    node.GetDisplayNode().SetSaveWithScene(False)
    place_beside(node, reference_node)
    _lay_over(node, layer="Label", attribute=COARSE_RESULT_ATTRIBUTE, opacity=COARSE_RESULT_OPACITY)
    return node


def hide_coarse_result(scene: "slicer.vtkMRMLScene") -> None:
    """Remove the coarse result; the slice views show what they showed before it."""
    _take_off(scene, layer="Label", attribute=COARSE_RESULT_ATTRIBUTE)
    for node in _own_nodes(scene, "vtkMRMLLabelMapVolumeNode", COARSE_RESULT_ATTRIBUTE):
        remove_node(node)
    for node in _own_nodes(scene, "vtkMRMLColorTableNode", COARSE_RESULT_ATTRIBUTE):
        scene.RemoveNode(node)


def hide_previous_result(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> None:
    """Hide a segmentation while the coarse result is shown in its place; the node remembers which segments were hidden before."""
    if segmentation_node.GetDisplayVisibility():
        segmentation_node.SetAttribute(HIDDEN_ATTRIBUTE, json.dumps(sorted(hidden_segments(segmentation_node))))
        segmentation_node.SetDisplayVisibility(False)


def remove_traces_of_run(scene: "slicer.vtkMRMLScene") -> None:
    """Remove the coarse result and show again what was hidden for it, segment by segment: the segment selectors of the views may have changed some.

    At the end of a run; also in a scene that was saved during one and loaded, which needs nothing but what its nodes say.
    """
    hide_coarse_result(scene)
    for node in _own_nodes(scene, "vtkMRMLSegmentationNode", HIDDEN_ATTRIBUTE):
        node.SetDisplayVisibility(True)
        set_hidden_segments(node, set(json.loads(node.GetAttribute(HIDDEN_ATTRIBUTE))))
        node.RemoveAttribute(HIDDEN_ATTRIBUTE)


def hidden_segments(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> set[str]:
    """Ids of the segments that are not shown."""
    display = segmentation_node.GetDisplayNode()
    if display is None:
        return set()
    return {segment_id for segment_id in segmentation_node.GetSegmentation().GetSegmentIDs() if not display.GetSegmentVisibility(segment_id)}


def set_hidden_segments(segmentation_node: "slicer.vtkMRMLSegmentationNode", hidden: set[str]) -> None:
    """Show all segments but these."""
    display = segmentation_node.GetDisplayNode()
    if display is None:
        return
    for segment_id in segmentation_node.GetSegmentation().GetSegmentIDs():
        display.SetSegmentVisibility(segment_id, segment_id not in hidden)


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


def _own_nodes(scene: "slicer.vtkMRMLScene", class_name: str, attribute: str) -> list["slicer.vtkMRMLNode"]:
    """The nodes of a class that this file made."""
    return [node for node in nodes_of_class(scene, class_name) if node.GetAttribute(attribute)]


def _lay_over(node: "slicer.vtkMRMLVolumeNode", *, layer: str, attribute: str, opacity: float) -> None:
    """Show a volume in a layer (Foreground, Label) of all slice views, which remember what they showed there."""
    for composite in nodes_of_class(node.GetScene(), "vtkMRMLSliceCompositeNode"):
        volume_id = getattr(composite, f"Get{layer}VolumeID")()
        composite.SetAttribute(f"{attribute}.Before", f"{getattr(composite, f'Get{layer}Opacity')()} {volume_id or ''}")
        getattr(composite, f"Set{layer}VolumeID")(node.GetID())
        getattr(composite, f"Set{layer}Opacity")(opacity)


def _take_off(scene: "slicer.vtkMRMLScene", *, layer: str, attribute: str) -> None:
    """The opposite of _lay_over; a layer that a user changed meanwhile stays as it is."""
    for composite in nodes_of_class(scene, "vtkMRMLSliceCompositeNode"):
        opacity, _, volume_id = (composite.GetAttribute(f"{attribute}.Before") or "").partition(" ")
        shown = scene.GetNodeByID(getattr(composite, f"Get{layer}VolumeID")() or "")
        if opacity and (shown is None or shown.GetAttribute(attribute)):
            getattr(composite, f"Set{layer}VolumeID")(volume_id or None)
            getattr(composite, f"Set{layer}Opacity")(float(opacity))
        composite.RemoveAttribute(f"{attribute}.Before")


def _boxes(patches: Sequence[PatchBox], *, world_to_node: np.ndarray) -> "vtk.vtkPolyData":
    """Six faces a patch; the best patch comes last, so that its color wins where edges meet."""
    points, colors, ranks, importances = [], [], [], []
    faces = vtk.vtkCellArray()
    for patch in reversed(patches):
        first = 8 * len(points)
        center, half = np.array(patch.center_ras), np.array(patch.size_mm) / 2
        points.append((box_corners(center - half, center + half) @ world_to_node.T)[:, :3])
        for face in CUBE_FACES:
            faces.InsertNextCell(4, [first + corner for corner in face])
        colors += 8 * [[round(255 * channel) for channel in rank_color(patch.rank, count=len(patches))]]
        ranks += 8 * [patch.rank]
        importances += 8 * [patch.importance]
    boxes, positions = vtk.vtkPolyData(), vtk.vtkPoints()
    positions.SetData(numpy_to_vtk(np.concatenate(points).astype(np.float32), deep=True))
    boxes.SetPoints(positions)
    boxes.SetPolys(faces)
    for name, values in (("Color", np.uint8(colors)), ("Rank", np.int32(ranks)), ("Importance", np.float32(importances))):
        array = numpy_to_vtk(values, deep=True)
        array.SetName(name)
        boxes.GetPointData().AddArray(array)
    return boxes
