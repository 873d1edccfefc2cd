"""slicer_bridge: nodes in, nodes out, all places compared in world coordinates."""

import numpy as np
import pytest
from slicer_headless import (
    OBLIQUE_IJK_TO_RAS,
    RIGID,
    add_transform,
    add_volume,
    matrix,
    new_scene,
    no_vtk_errors,
    segment_points_ras,
    slicer,
    sorted_points,
    vtk,
)

from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.statistics import structure_statistics
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.nodes import VOLUMES_ROLE, import_labelmap, roi_to_ras, volume_from_node, write_statistics_table
from NMSWSegment.protocol import UserError

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)

LABELS = coded_labels(["liver", "kidney_left", "kidney_right"])


@pytest.fixture
def scene():
    return new_scene()


@pytest.fixture
def volume_node(scene):
    array = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    return add_volume(scene, array, ijk_to_ras=OBLIQUE_IJK_TO_RAS)


@pytest.fixture
def segmentation_node(scene):
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
    node.GetSegmentation().AddEmptySegment("old", "old segment")
    return node


def a_labelmap(volume_node) -> Volume:
    """Liver in five voxels, right kidney in one, no left kidney."""
    volume = volume_from_node(volume_node)
    array = np.zeros(volume.shape, dtype=np.uint8)
    array[1, 2, 0:5] = 1
    array[3, 0, 5] = 3
    return Volume(array=array, ijk_to_ras=volume.ijk_to_ras)


def segment_ids(segmentation_node) -> list[str]:
    """Ids in the order of the segments."""
    segmentation = segmentation_node.GetSegmentation()
    return [segmentation.GetNthSegmentID(index) for index in range(segmentation.GetNumberOfSegments())]


def test_volume_from_node_oblique_keeps_voxels_and_place(volume_node):
    volume = volume_from_node(volume_node)

    assert volume.name == "CT"
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, np.arange(120).reshape(4, 5, 6))
    np.testing.assert_allclose(volume.ijk_to_ras, OBLIQUE_IJK_TO_RAS, atol=1e-12)
    assert volume.spacing_mm == pytest.approx((3.0, 2.0, 1.5))


def test_volume_from_node_nested_transforms_are_part_of_the_matrix(scene, volume_node):
    outer = add_transform(scene, np.diag([2.0, 1.0, 1.0, 1.0]))
    inner = add_transform(scene, RIGID)
    inner.SetAndObserveTransformNodeID(outer.GetID())
    volume_node.SetAndObserveTransformNodeID(inner.GetID())

    volume = volume_from_node(volume_node)

    np.testing.assert_allclose(volume.ijk_to_ras, np.diag([2.0, 1.0, 1.0, 1.0]) @ RIGID @ OBLIQUE_IJK_TO_RAS, atol=1e-9)


def test_volume_from_node_nonlinear_transform_asks_to_harden(scene, volume_node):
    node = scene.AddNewNodeByClass("vtkMRMLTransformNode", "Warp")
    spline = vtk.vtkThinPlateSplineTransform()
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    for point in ((0, 0, 0), (10, 0, 0), (0, 10, 0), (0, 0, 10), (7, 7, 7)):
        source.InsertNextPoint(point)
        target.InsertNextPoint([coordinate + 0.01 * coordinate**2 for coordinate in point])
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    spline.SetBasisToR()
    node.SetAndObserveTransformToParent(spline)
    volume_node.SetAndObserveTransformNodeID(node.GetID())

    with pytest.raises(UserError, match="Harden the transform"):
        volume_from_node(volume_node)


def test_volume_from_node_none_asks_to_choose():
    with pytest.raises(UserError, match="Choose the CT volume"):
        volume_from_node(None)


def test_volume_from_node_no_voxels_asks_to_load(scene):
    with pytest.raises(UserError, match="Load its image file again"):
        volume_from_node(scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Empty"))


@pytest.mark.parametrize(
    ("node_class", "fix"),
    [
        ("vtkMRMLLabelMapVolumeNode", "Choose the CT volume that it was made from"),
        ("vtkMRMLSegmentationNode", "Choose the CT volume that it was made from"),
        ("vtkMRMLSequenceNode", "Go to one time point"),
        ("vtkMRMLModelNode", "Choose a CT volume"),
    ],
)
def test_volume_from_node_other_node_names_the_fix(scene, node_class, fix):
    with pytest.raises(UserError, match=fix):
        volume_from_node(scene.AddNewNodeByClass(node_class, "Other"))


def test_volume_from_node_rgb_names_vector_to_scalar_volume(scene):
    node = scene.AddNewNodeByClass("vtkMRMLVectorVolumeNode", "Photo")
    voxels = vtk.vtkImageData()
    voxels.SetDimensions(2, 3, 4)
    voxels.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 3)
    node.SetAndObserveImageData(voxels)

    with pytest.raises(UserError, match="Vector to Scalar Volume"):
        volume_from_node(node)


@pytest.mark.parametrize("node_to_world", [None, RIGID, np.diag([1.2, 0.9, 1.0, 1.0])], ids=["free", "rigid", "scaled"])
def test_import_labelmap_segments_lie_on_their_voxels(scene, volume_node, segmentation_node, node_to_world):
    if node_to_world is not None:
        volume_node.SetAndObserveTransformNodeID(add_transform(scene, node_to_world).GetID())
    labelmap = a_labelmap(volume_node)

    import_labelmap(segmentation_node, labelmap, labels=LABELS, reference_node=volume_node)

    for segment_id, value in (("liver", 1), ("kidney_right", 3)):
        expected = sorted_points(np.argwhere(labelmap.array == value)[:, ::-1], ijk_to_ras=labelmap.ijk_to_ras)
        np.testing.assert_allclose(segment_points_ras(segmentation_node, segment_id), expected, atol=2e-3)
    assert segmentation_node.GetParentTransformNode() == volume_node.GetParentTransformNode()


def test_import_labelmap_moving_the_transform_moves_both(scene, volume_node, segmentation_node):
    transform = add_transform(scene, RIGID)
    volume_node.SetAndObserveTransformNodeID(transform.GetID())
    labelmap = a_labelmap(volume_node)
    import_labelmap(segmentation_node, labelmap, labels=LABELS, reference_node=volume_node)

    transform.SetMatrixTransformToParent(matrix(np.diag([1.0, 1.0, -1.0, 1.0])))

    moved = volume_from_node(volume_node).ijk_to_ras
    np.testing.assert_allclose(segment_points_ras(segmentation_node, "kidney_right"), sorted_points(np.array([[5, 0, 3]]), ijk_to_ras=moved), atol=2e-3)


def test_import_labelmap_names_colors_codes_and_absent_class(volume_node, segmentation_node):
    import_labelmap(segmentation_node, a_labelmap(volume_node), labels=LABELS, reference_node=volume_node)

    assert segment_ids(segmentation_node) == ["liver", "kidney_right"]
    kidney = segmentation_node.GetSegmentation().GetSegment("kidney_right")
    assert kidney.GetName() == "right kidney"
    assert kidney.GetLabelValue() == 3
    np.testing.assert_allclose(np.array(kidney.GetColor()) * 255, LABELS[2].color, atol=1e-9)
    tag = vtk.mutable("")
    assert kidney.GetTag("TerminologyEntry", tag)
    assert "~SCT^64033007^Kidney~SCT^24028007^Right~" in str(tag)
    entry = slicer.vtkSlicerTerminologyEntry()
    assert slicer.vtkSlicerTerminologiesModuleLogic.DeserializeTerminologyEntry(str(tag), entry)
    assert (entry.GetTypeObject().GetCodeValue(), entry.GetTypeModifierObject().GetCodeMeaning()) == ("64033007", "Right")


def test_import_labelmap_sets_reference_geometry_and_one_shared_layer(volume_node, segmentation_node):
    import_labelmap(segmentation_node, a_labelmap(volume_node), labels=LABELS, reference_node=volume_node)

    segmentation = segmentation_node.GetSegmentation()
    assert segmentation_node.GetNodeReferenceID(segmentation_node.GetReferenceImageGeometryReferenceRole()) == volume_node.GetID()
    geometry = segmentation.GetConversionParameter(slicer.vtkSegmentationConverter.GetReferenceImageGeometryParameterName())
    np.testing.assert_allclose(np.array(geometry.rstrip(";").split(";")[:16], dtype=float), OBLIQUE_IJK_TO_RAS.ravel(), atol=1e-5)
    assert segmentation.GetNumberOfLayers() == 1


def test_import_labelmap_again_replaces_and_announces_the_segments(volume_node, segmentation_node):
    import_labelmap(segmentation_node, a_labelmap(volume_node), labels=LABELS, reference_node=volume_node)
    added = []
    segmentation_node.AddObserver(slicer.vtkSegmentation.SegmentAdded, lambda caller, event: added.append(event))
    second = a_labelmap(volume_node)
    second.array[...] = 0
    second.array[0, 4, 2] = 2

    import_labelmap(segmentation_node, second, labels=LABELS, reference_node=volume_node)

    assert segment_ids(segmentation_node) == ["kidney_left"]
    assert len(added) == 1
    assert len(segment_points_ras(segmentation_node, "kidney_left")) == 1


def test_import_labelmap_all_background_gives_no_segment(volume_node, segmentation_node):
    volume = volume_from_node(volume_node)
    empty = Volume(array=np.zeros(volume.shape, dtype=np.uint8), ijk_to_ras=volume.ijk_to_ras)

    import_labelmap(segmentation_node, empty, labels=LABELS, reference_node=volume_node)

    assert segment_ids(segmentation_node) == []


def test_import_labelmap_beside_the_volume_in_the_subject_hierarchy(scene, volume_node, segmentation_node):
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "Study")
    hierarchy.CreateItem(study, volume_node)

    import_labelmap(segmentation_node, a_labelmap(volume_node), labels=LABELS, reference_node=volume_node)

    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(segmentation_node)) == study


@pytest.mark.parametrize("fault", ["shape", "place", "value"])
def test_import_labelmap_wrong_labelmap_leaves_the_node_as_it_was(volume_node, segmentation_node, fault):
    good = a_labelmap(volume_node)
    shifted = good.ijk_to_ras.copy()
    shifted[0, 3] += 0.5
    wrong = {
        "shape": Volume(array=good.array[:, :, :-1], ijk_to_ras=good.ijk_to_ras),
        "place": Volume(array=good.array, ijk_to_ras=shifted),
        "value": Volume(array=good.array * 9, ijk_to_ras=good.ijk_to_ras),
    }[fault]

    with pytest.raises(ValueError, match={"shape": "has shape", "place": "mm off", "value": r"\[9, 27\]"}[fault]):
        import_labelmap(segmentation_node, wrong, labels=LABELS, reference_node=volume_node)

    assert segment_ids(segmentation_node) == ["old"]
    assert segmentation_node.GetNodeReferenceID(segmentation_node.GetReferenceImageGeometryReferenceRole()) is None


def test_statistics_table_lists_the_segments_and_is_written_anew(scene, volume_node, segmentation_node):
    labelmap = a_labelmap(volume_node)
    assert import_labelmap(segmentation_node, labelmap, labels=LABELS, reference_node=volume_node) == {"liver": 5, "kidney_right": 1}
    rows = [row.to_dict() for row in structure_statistics(labelmap, volume_from_node(volume_node), labels=LABELS)]

    write_statistics_table(segmentation_node, rows[:1])
    table_node = write_statistics_table(segmentation_node, rows)

    table = table_node.GetTable()
    assert [table.GetColumnName(index) for index in range(8)] == [
        "Structure",
        "Volume (ml)",
        "Voxels",
        "Mean",
        "SD",
        "Surface (cm2)",
        "At border",
        "Refined (%)",
    ]
    found = [[table.GetValue(row, column).ToString() for column in range(table.GetNumberOfColumns())] for row in range(table.GetNumberOfRows())]
    present = [row for row in rows if row["voxels"]]
    assert [row[0] for row in found] == ["liver", "right kidney"] and [row[2] for row in found] == ["5", "1"]
    assert [float(row[1]) for row in found] == [round(row["volume_ml"], 2) for row in present]
    assert [float(row[3]) for row in found] == [round(row["mean"], 1) for row in present]
    assert [row[6] for row in found] == [row["border_faces"] for row in present]
    assert found[1][4] == "nan"  # one voxel has no spread
    assert scene.GetNumberOfNodesByClass("vtkMRMLTableNode") == 1
    assert segmentation_node.GetNodeReference(VOLUMES_ROLE) is table_node


def test_roi_to_ras_sends_the_half_cube_to_the_corners_of_a_turned_box(scene):
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    node.SetSize(20, 30, 40)
    node.SetCenter(5, -7, 11)
    rigid = RIGID.copy()
    node.SetAndObserveTransformNodeID(add_transform(scene, rigid).GetID())

    box_to_ras = np.array(roi_to_ras(node))

    corners = np.array([[r, a, s, 1] for r in (-10, 10) for a in (-15, 15) for s in (-20, 20)]) + [5, -7, 11, 0]
    expected = sorted(map(tuple, np.round(corners @ rigid.T, 6)[:, :3].tolist()))
    cube = np.array([[x, y, z, 1] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    found = sorted(map(tuple, np.round(cube @ box_to_ras.T, 6)[:, :3].tolist()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_roi_to_ras_of_a_box_that_was_never_placed_has_no_size(scene):
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    assert np.linalg.det(np.array(roi_to_ras(node))[:3, :3]) == 0
