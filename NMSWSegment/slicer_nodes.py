"""Small facts about MRML nodes that the bridge and the overlays share: matrices, voxels, places in the subject hierarchy."""

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk


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
