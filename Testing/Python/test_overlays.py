"""slicer_overlays: what is drawn over a volume lies where it should and goes away without a trace."""

import numpy as np
import pytest
from slicer_headless import (
    OBLIQUE_IJK_TO_RAS,
    RIGID,
    add_transform,
    add_volume,
    as_array,
    new_scene,
    no_vtk_errors,
    patch,
    segment_points_ras,
    slicer,
    vtk,
)

from NMSWSegment.files.colors import rank_color
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.nodes import volume_from_node
from NMSWSegment.panel.overlays import (
    IMPORTANCE_OPACITY,
    MAX_OUTLINES,
    PATCH_FOLDER_NAME,
    hide_importance,
    remove_coarse_result,
    remove_patches,
    show_coarse_result,
    show_importance,
    show_patches,
)

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)


@pytest.fixture
def scene():
    return new_scene()


@pytest.fixture
def volume_node(scene):
    return add_volume(scene, np.zeros((4, 5, 6), dtype=np.int16), ijk_to_ras=OBLIQUE_IJK_TO_RAS)


@pytest.fixture
def importance():
    """Three coarse voxels along R at 6 mm, upright in the world."""
    ijk_to_ras = np.diag([6.0, 6.0, 6.0, 1.0])
    ijk_to_ras[:3, 3] = (40.0, -30.0, 110.0)
    return Volume(array=np.array([[[0.0, 0.4, 1.0]]], dtype=np.float32), ijk_to_ras=ijk_to_ras)


def roi_nodes(scene) -> list:
    """All region-of-interest nodes."""
    return [scene.GetNthNodeByClass(index, "vtkMRMLMarkupsROINode") for index in range(scene.GetNumberOfNodesByClass("vtkMRMLMarkupsROINode"))]


@pytest.mark.parametrize("node_to_world", [None, RIGID, 1.5 * RIGID], ids=["free", "rigid", "enlarged"])
def test_show_patches_boxes_are_where_the_patches_were_cut(scene, volume_node, node_to_world):
    if node_to_world is not None:
        node_to_world = node_to_world.copy()
        node_to_world[3] = (0, 0, 0, 1)
        volume_node.SetAndObserveTransformNodeID(add_transform(scene, node_to_world).GetID())

    (node,) = show_patches(scene, [patch()], parent_node=volume_node)

    bounds = [0.0] * 6
    node.GetRASBounds(bounds)
    np.testing.assert_allclose(bounds, [-5, 15, -22, 8, -9, 31], atol=1e-6)
    axes = as_array(node.GetObjectToWorldMatrix())[:3, :3]
    np.testing.assert_allclose(axes / np.linalg.norm(axes, axis=0), np.eye(3), atol=1e-9)


def test_show_patches_outlines_are_named_locked_unfilled_and_colored_by_rank(scene, volume_node):
    nodes = show_patches(scene, [patch(rank=1), patch(rank=2, importance=-1.25), patch(rank=3)], parent_node=volume_node)

    assert [node.GetName() for node in nodes] == ["Patch 1 (importance 0.83)", "Patch 2 (importance -1.2)", "Patch 3 (importance 0.83)"]
    for node in nodes:
        assert node.GetLocked()
        display = node.GetDisplayNode()
        assert not display.GetFillVisibility()
        assert not display.GetHandlesInteractive()
        assert display.GetOutlineVisibility()
    for rank, node in enumerate(nodes, start=1):
        np.testing.assert_allclose(node.GetDisplayNode().GetSelectedColor(), rank_color(rank, count=3), atol=1e-6)


def test_show_patches_next_run_replaces_the_folder_and_keeps_own_nodes(scene, volume_node):
    scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "mine")
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    show_patches(scene, [patch(rank=1), patch(rank=2)], parent_node=volume_node)

    nodes = show_patches(scene, [patch(rank=1, importance=2.0)], parent_node=volume_node)

    assert [node.GetName() for node in roi_nodes(scene)] == ["mine", "Patch 1 (importance 2)"]
    folder = hierarchy.GetItemParent(hierarchy.GetItemByDataNode(nodes[0]))
    assert hierarchy.GetItemName(folder) == PATCH_FOLDER_NAME
    items = vtk.vtkIdList()
    hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), items, True)
    names = [hierarchy.GetItemName(items.GetId(index)) for index in range(items.GetNumberOfIds())]
    assert names.count(PATCH_FOLDER_NAME) == 1


def test_show_patches_none_removes_the_previous_ones(scene, volume_node):
    show_patches(scene, [patch()], parent_node=volume_node)

    assert show_patches(scene, [], parent_node=volume_node) == []

    assert roi_nodes(scene) == []
    remove_patches(scene)


def test_show_patches_of_a_whole_sliding_window_outlines_the_first_ones_only(scene, volume_node):
    nodes = show_patches(scene, [patch(rank=rank) for rank in range(1, MAX_OUTLINES + 9)], parent_node=volume_node)
    assert len(nodes) == MAX_OUTLINES


def test_show_importance_follows_the_transform_of_the_volume(scene, volume_node, importance):
    rigid = RIGID.copy()
    rigid[3] = (0, 0, 0, 1)
    transform = add_transform(scene, rigid)
    volume_node.SetAndObserveTransformNodeID(transform.GetID())

    node = show_importance(importance, parent_node=volume_node)

    shown = volume_from_node(node)
    np.testing.assert_allclose(shown.ijk_to_ras, rigid @ importance.ijk_to_ras, atol=1e-9)
    np.testing.assert_array_equal(shown.array, importance.array)
    transform.SetMatrixTransformToParent(vtk.vtkMatrix4x4())
    np.testing.assert_allclose(volume_from_node(node).ijk_to_ras, importance.ijk_to_ras, atol=1e-9)


def test_hide_importance_gives_the_slice_views_back_what_they_showed(scene, volume_node, importance):
    other = add_volume(scene, np.zeros((2, 2, 2), dtype=np.int16), ijk_to_ras=np.eye(4), name="PET")
    composite = scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    composite.SetForegroundVolumeID(other.GetID())
    composite.SetForegroundOpacity(0.3)

    show_importance(importance, parent_node=volume_node)
    node = show_importance(importance, parent_node=volume_node)
    assert composite.GetForegroundVolumeID() == node.GetID()
    assert composite.GetForegroundOpacity() == IMPORTANCE_OPACITY
    hide_importance(scene)

    assert composite.GetForegroundVolumeID() == other.GetID()
    assert composite.GetForegroundOpacity() == pytest.approx(0.3)
    names = [scene.GetNthNodeByClass(index, "vtkMRMLScalarVolumeNode").GetName() for index in range(scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode"))]
    assert names == ["CT", "PET"]


def test_hide_importance_keeps_what_a_person_chose_meanwhile(scene, volume_node, importance):
    other = add_volume(scene, np.zeros((2, 2, 2), dtype=np.int16), ijk_to_ras=np.eye(4), name="PET")
    composite = scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    show_importance(importance, parent_node=volume_node)
    composite.SetForegroundVolumeID(other.GetID())

    hide_importance(scene)

    assert composite.GetForegroundVolumeID() == other.GetID()


def test_show_coarse_result_is_not_saved_and_leaves_no_node_behind(scene, volume_node):
    before = scene.GetNumberOfNodes()
    volume = volume_from_node(volume_node)
    array = np.zeros(volume.shape, dtype=np.uint8)
    array[1, 2, 3] = 1
    labels = coded_labels(["liver"])

    node = show_coarse_result(Volume(array=array, ijk_to_ras=volume.ijk_to_ras), labels=labels, reference_node=volume_node)

    assert not node.GetSaveWithScene()
    np.testing.assert_allclose(segment_points_ras(node, "liver"), [(volume.ijk_to_ras @ [3, 2, 1, 1])[:3]], atol=1e-3)
    remove_coarse_result(node)
    assert scene.GetNumberOfNodes() - before <= 1  # the subject hierarchy itself, made at the first use
    assert scene.GetNumberOfNodesByClass("vtkMRMLSegmentationDisplayNode") == 0
