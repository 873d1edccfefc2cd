"""slicer_overlays: what is drawn over a volume lies where it should and goes away without a trace."""

import numpy as np
import pytest
from slicer_headless import (
    OBLIQUE_IJK_TO_RAS,
    RIGID,
    add_transform,
    add_volume,
    new_scene,
    no_vtk_errors,
    patch,
    slicer,
    vtk,
)
from vtk.util.numpy_support import vtk_to_numpy

from NMSWSegment.files.colors import rank_color
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.nodes import nodes_of_class, volume_from_node, volume_in_node
from NMSWSegment.panel.overlays import (
    IMPORTANCE_OPACITY,
    PATCHES_ATTRIBUTE,
    PATCHES_NAME,
    hide_coarse_result,
    hide_importance,
    remove_overlays_of,
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


def model_nodes(scene) -> list:
    """All models."""
    return nodes_of_class(scene, "vtkMRMLModelNode")


@pytest.mark.parametrize("node_to_world", [None, RIGID, 1.5 * RIGID], ids=["free", "rigid", "enlarged"])
def test_show_patches_boxes_are_where_the_patches_were_cut(scene, volume_node, node_to_world):
    if node_to_world is not None:
        node_to_world = node_to_world.copy()
        node_to_world[3] = (0, 0, 0, 1)
        volume_node.SetAndObserveTransformNodeID(add_transform(scene, node_to_world).GetID())

    node = show_patches(scene, [patch()], parent_node=volume_node)

    points = vtk_to_numpy(node.GetPolyData().GetPoints().GetData())
    to_world = np.eye(4) if node_to_world is None else node_to_world
    world = points @ to_world[:3, :3].T + to_world[:3, 3]
    np.testing.assert_allclose(sorted(map(tuple, world.round(3))), [(x, y, z) for x in (-5, 15) for y in (-22, 8) for z in (-9, 31)], atol=1e-3)
    for index in range(node.GetPolyData().GetNumberOfCells()):  # faces are flat and have right angles
        corners = vtk_to_numpy(node.GetPolyData().GetCell(index).GetPoints().GetData())
        edges = np.roll(corners, -1, axis=0) - corners
        np.testing.assert_allclose((edges * np.roll(edges, -1, axis=0)).sum(1), 0, atol=1e-2)


def test_show_patches_outlines_are_one_wireframe_colored_by_rank_that_nobody_can_drag(scene, volume_node):
    node = show_patches(scene, [patch(rank=1), patch(rank=2, importance=-1.25), patch(rank=3)], parent_node=volume_node)

    display = node.GetDisplayNode()
    assert display.GetRepresentation() == slicer.vtkMRMLDisplayNode.WireframeRepresentation
    assert display.GetVisibility2D()
    assert not display.GetSelectable()
    assert not node.GetHideFromEditors()
    assert roi_count(scene) == 0
    arrays = {name: vtk_to_numpy(node.GetPolyData().GetPointData().GetArray(name)) for name in ("Rank", "Importance", "Color")}
    assert {(int(rank), round(float(value), 2)) for rank, value in zip(arrays["Rank"], arrays["Importance"])} == {(1, 0.83), (2, -1.25), (3, 0.83)}
    for rank in (1, 2, 3):
        np.testing.assert_allclose(arrays["Color"][arrays["Rank"] == rank] / 255, [rank_color(rank, count=3)] * 8, atol=0.5 / 255 + 1e-6)
    shown = display.GetOutputMesh()
    assert shown.GetPointData().GetScalars().GetName() == "Color"


def roi_count(scene) -> int:
    return scene.GetNumberOfNodesByClass("vtkMRMLMarkupsROINode")


def test_show_patches_next_run_replaces_them_and_keeps_own_nodes(scene, volume_node):
    scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "mine")
    scene.AddNewNodeByClass("vtkMRMLModelNode", "my model")
    show_patches(scene, [patch(rank=1), patch(rank=2)], parent_node=volume_node)

    show_patches(scene, [patch(rank=1, importance=2.0)], parent_node=volume_node)

    assert [node.GetName() for node in model_nodes(scene)] == ["my model", PATCHES_NAME]
    assert [node.GetAttribute(PATCHES_ATTRIBUTE) for node in model_nodes(scene)] == [None, "1"]
    assert roi_count(scene) == 1
    assert scene.GetNumberOfNodesByClass("vtkMRMLModelDisplayNode") == 1


def test_show_patches_none_removes_the_previous_ones(scene, volume_node):
    show_patches(scene, [patch()], parent_node=volume_node)

    assert show_patches(scene, [], parent_node=volume_node) is None

    assert model_nodes(scene) == []
    remove_patches(scene)


def test_show_importance_follows_the_transform_of_the_volume(scene, volume_node, importance):
    rigid = RIGID.copy()
    rigid[3] = (0, 0, 0, 1)
    transform = add_transform(scene, rigid)
    volume_node.SetAndObserveTransformNodeID(transform.GetID())

    node = show_importance(importance, parent_node=volume_node, volume=volume_in_node(volume_node))

    shown = volume_from_node(node)
    np.testing.assert_allclose(shown.ijk_to_ras, rigid @ importance.ijk_to_ras, atol=1e-9)
    assert shown.array.shape == importance.array.shape
    transform.SetMatrixTransformToParent(vtk.vtkMatrix4x4())
    np.testing.assert_allclose(volume_from_node(node).ijk_to_ras, importance.ijk_to_ras, atol=1e-9)


def test_hide_importance_gives_the_slice_views_back_what_they_showed(scene, volume_node, importance):
    other = add_volume(scene, np.zeros((2, 2, 2), dtype=np.int16), ijk_to_ras=np.eye(4), name="PET")
    composite = scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    composite.SetForegroundVolumeID(other.GetID())
    composite.SetForegroundOpacity(0.3)

    show_importance(importance, parent_node=volume_node, volume=volume_in_node(volume_node))
    node = show_importance(importance, parent_node=volume_node, volume=volume_in_node(volume_node))
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
    show_importance(importance, parent_node=volume_node, volume=volume_in_node(volume_node))
    composite.SetForegroundVolumeID(other.GetID())

    hide_importance(scene)

    assert composite.GetForegroundVolumeID() == other.GetID()


def test_remove_overlays_of_a_volume_leaves_those_of_another(scene, volume_node, importance):
    other = add_volume(scene, np.zeros((2, 2, 2), dtype=np.int16), ijk_to_ras=np.eye(4), name="PET")
    show_patches(scene, [patch()], parent_node=other)
    show_importance(importance, parent_node=volume_node, volume=volume_in_node(volume_node))

    remove_overlays_of(volume_node)
    assert len(model_nodes(scene)) == 1
    assert [node.GetName() for node in nodes_of_class(scene, "vtkMRMLScalarVolumeNode")] == ["CT", "PET"]

    remove_overlays_of(other)
    assert model_nodes(scene) == []


def test_show_coarse_result_is_a_labelmap_over_the_slices_and_leaves_no_node_behind(scene, volume_node):
    composite = scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    other = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "mine")
    composite.SetLabelVolumeID(other.GetID())
    composite.SetLabelOpacity(0.8)
    names = node_names(scene)
    volume = volume_from_node(volume_node)
    array = np.zeros(volume.shape, dtype=np.uint8)
    array[1, 2, 3] = 1
    labels = coded_labels(["liver"])

    node = show_coarse_result(Volume(array=array, ijk_to_ras=volume.ijk_to_ras), labels=labels, reference_node=volume_node)

    assert not node.GetSaveWithScene()
    assert not node.GetHideFromEditors()
    assert scene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode") == 0
    np.testing.assert_array_equal(vtk_to_numpy(node.GetImageData().GetPointData().GetScalars()).reshape(volume.shape), array)
    assert composite.GetLabelVolumeID() == node.GetID()
    color = [0.0] * 4
    node.GetDisplayNode().GetColorNode().GetColor(1, color)
    np.testing.assert_allclose(color, [*(channel / 255 for channel in labels[0].color), 1])

    hide_coarse_result(scene)

    assert composite.GetLabelVolumeID() == other.GetID()
    assert composite.GetLabelOpacity() == pytest.approx(0.8)
    assert set(node_names(scene)) - set(names) <= {"SubjectHierarchy"}  # made at the first use


def node_names(scene) -> list[str]:
    return [scene.GetNthNode(index).GetName() for index in range(scene.GetNumberOfNodes())]
