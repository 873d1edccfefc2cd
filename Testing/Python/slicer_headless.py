"""slicer-core without the application: a scene with the logics that our nodes need, and VTK errors that fail a test."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")
vtk = pytest.importorskip("vtk", reason="slicer-core is not installed")
numpy_support = pytest.importorskip("vtk.util.numpy_support", reason="slicer-core is not installed")

# Oblique, mirrored and anisotropic: columns are the steps of i, j and k in mm, rotated 30 degrees, i toward the left.
OBLIQUE_IJK_TO_RAS = np.array(
    [
        [-1.5 * np.cos(np.pi / 6), -2.0 * np.sin(np.pi / 6), 0.0, 40.0],
        [-1.5 * np.sin(np.pi / 6), 2.0 * np.cos(np.pi / 6), 0.0, -30.0],
        [0.0, 0.0, 3.0, 110.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)

# 40 degrees around z and a shift; no symmetry that would hide a swapped axis
RIGID = np.array([[np.cos(0.7), -np.sin(0.7), 0, 12.0], [np.sin(0.7), np.cos(0.7), 0, -5.0], [0, 0, 1, 33.0], [0, 0, 0, 1]])


def new_scene() -> "slicer.vtkMRMLScene":
    """An empty scene in which volume, segmentation, markups and transform nodes work.

    The logics live as long as the scene, so they hang on the object that is returned.
    """
    scene = slicer.vtkMRMLScene()
    application_logic = slicer.vtkSlicerApplicationLogic()
    application_logic.SetMRMLScene(scene)
    logics = {
        "Colors": slicer.vtkMRMLColorLogic(),
        "Volumes": slicer.vtkSlicerVolumesLogic(),
        "Segmentations": slicer.vtkSlicerSegmentationsModuleLogic(),
        "Markups": slicer.vtkSlicerMarkupsLogic(),
    }
    for name, logic in logics.items():
        logic.SetMRMLApplicationLogic(application_logic)
        logic.SetMRMLScene(scene)
        application_logic.SetModuleLogic(name, logic)
    logics["Colors"].AddDefaultColorNodes()
    scene.headless_logics = (application_logic, logics)
    return scene


def add_volume(scene: "slicer.vtkMRMLScene", array: np.ndarray, *, ijk_to_ras: np.ndarray, name: str = "CT") -> "slicer.vtkMRMLScalarVolumeNode":
    """A scalar volume node with the voxels of a (K, J, I) array."""
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    voxels = vtk.vtkImageData()
    voxels.SetDimensions(*reversed(array.shape))
    voxels.GetPointData().SetScalars(numpy_support.numpy_to_vtk(array.ravel(), deep=True))
    node.SetAndObserveImageData(voxels)
    node.SetIJKToRASMatrix(matrix(ijk_to_ras))
    return node


def add_transform(scene: "slicer.vtkMRMLScene", node_to_parent: np.ndarray, *, name: str = "Move") -> "slicer.vtkMRMLLinearTransformNode":
    """A linear transform node."""
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
    node.SetMatrixTransformToParent(matrix(node_to_parent))
    return node


def matrix(array: np.ndarray) -> "vtk.vtkMatrix4x4":
    """A 4 x 4 array as a VTK matrix."""
    result = vtk.vtkMatrix4x4()
    result.DeepCopy(np.asarray(array, dtype=float).ravel().tolist())
    return result


def segment_points_ras(segmentation_node: "slicer.vtkMRMLSegmentationNode", segment_id: str) -> np.ndarray:
    """World RAS of every voxel center of a segment, (N, 3), sorted."""
    labelmap = slicer.vtkOrientedImageData()
    assert segmentation_node.GetBinaryLabelmapRepresentation(segment_id, labelmap)
    image_to_node, node_to_world = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
    labelmap.GetImageToWorldMatrix(image_to_node)
    if segmentation_node.GetParentTransformNode():
        segmentation_node.GetParentTransformNode().GetMatrixTransformToWorld(node_to_world)
    array = numpy_support.vtk_to_numpy(labelmap.GetPointData().GetScalars()).reshape(tuple(reversed(labelmap.GetDimensions())))
    first_ijk = np.array(labelmap.GetExtent()[::2])
    ijk = np.argwhere(array > 0)[:, ::-1] + first_ijk
    return sorted_points(ijk, ijk_to_ras=as_array(node_to_world) @ as_array(image_to_node))


def sorted_points(ijk: np.ndarray, *, ijk_to_ras: np.ndarray) -> np.ndarray:
    """World RAS of voxel indices (N, 3), rows in lexicographic order of their value rounded to a micrometer."""
    points = np.round((np.c_[ijk, np.ones(len(ijk))] @ ijk_to_ras.T)[:, :3], 3)
    return points[np.lexsort(points.T[::-1])]


def as_array(vtk_matrix: "vtk.vtkMatrix4x4") -> np.ndarray:
    """A VTK matrix as a 4 x 4 array."""
    return np.array([[vtk_matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def patch(*, rank: int = 1, importance: float = 0.83, center_ras=(5.0, -7.0, 11.0), size_mm=(20.0, 30.0, 40.0)) -> SimpleNamespace:
    """A box with the fields of protocol.PatchBox."""
    return SimpleNamespace(rank=rank, candidate=rank + 3, importance=importance, center_ras=center_ras, size_mm=size_mm)


@pytest.fixture
def no_vtk_errors() -> Iterator[None]:
    """Fail the test on any VTK error or warning: VTK prints them and goes on."""
    previous = vtk.vtkOutputWindow.GetInstance()
    window = vtk.vtkStringOutputWindow()
    vtk.vtkOutputWindow.SetInstance(window)
    yield
    vtk.vtkOutputWindow.SetInstance(previous)
    assert window.GetOutput() == "", window.GetOutput()
