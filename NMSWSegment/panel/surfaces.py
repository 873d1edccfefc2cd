"""Closed surfaces of segments for the 3D views, one segment a step."""

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from NMSWSegment.panel.nodes import LABELMAP_REPRESENTATION, SURFACE_REPRESENTATION, image_data
from NMSWSegment.panel.stepped_task import Steps


def show_surfaces_steps(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> Steps[bool]:
    """Show the segments in the 3D views; the value says whether they are there.

    The surfaces are made aside, each from the part of the labelmap that its segment takes, so that no step is longer than one
    small conversion. They enter the node together, after the last one.
    """
    segmentation = segmentation_node.GetSegmentation()
    if segmentation.GetNumberOfSegments() == 0:
        return False
    surfaces = []
    for segment in [segmentation.GetNthSegment(index) for index in range(segmentation.GetNumberOfSegments())]:
        if segment.GetRepresentation(SURFACE_REPRESENTATION) is None:
            surfaces.append((segment, surface_of(segment, segmentation)))
            yield
    if segmentation_node.GetScene() is None:
        return False
    with slicer.util.NodeModify(segmentation_node):
        for segment, surface in surfaces:
            if surface is not None:
                segment.AddRepresentation(SURFACE_REPRESENTATION, surface)
    yield
    if segmentation_node.GetScene() is None:
        return False
    is_shown = bool(segmentation_node.CreateClosedSurfaceRepresentation())
    # Nothing was left to convert, so the views are told as a conversion tells them.
    segmentation.InvokeEvent(slicer.vtkSegmentation.ContainedRepresentationNamesModified)
    segmentation_node.CreateDefaultDisplayNodes()
    segmentation_node.GetDisplayNode().Modified()
    return is_shown


def hide_surfaces(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> None:
    """Take the segments out of the 3D views; surfaces that a segmentation consists of stay in it."""
    if segmentation_node.GetSegmentation().GetSourceRepresentationName() != SURFACE_REPRESENTATION:
        segmentation_node.RemoveClosedSurfaceRepresentation()
    elif segmentation_node.GetDisplayNode() is not None:
        segmentation_node.GetDisplayNode().SetVisibility3D(False)


def reveal_surfaces(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> None:
    """Let the 3D views show the surfaces that are there."""
    if segmentation_node.GetDisplayNode() is not None:
        segmentation_node.GetDisplayNode().SetVisibility3D(True)


def has_surfaces(segmentation_node: "slicer.vtkMRMLSegmentationNode") -> bool:
    """Whether the segments can be seen in the 3D views."""
    return segmentation_node.GetSegmentation().ContainsRepresentation(SURFACE_REPRESENTATION)


def surface_of(segment: "slicer.vtkSegment", segmentation: "slicer.vtkSegmentation") -> "vtk.vtkPolyData | None":
    """The closed surface of a segment, as Slicer makes it with the settings of the segmentation; None for a segment without voxels."""
    cropped = _cropped_labelmap(segment)
    if cropped is None:
        return None
    aside, copy = slicer.vtkSegmentation(), slicer.vtkSegment()
    aside.SetSourceRepresentationName(LABELMAP_REPRESENTATION)
    aside.CopyConversionParameters(segmentation)
    copy.AddRepresentation(LABELMAP_REPRESENTATION, cropped)
    aside.AddSegment(copy, "segment")
    aside.CreateRepresentation(SURFACE_REPRESENTATION)
    return aside.GetSegment("segment").GetRepresentation(SURFACE_REPRESENTATION)


def _cropped_labelmap(segment: "slicer.vtkSegment") -> "slicer.vtkOrientedImageData | None":
    """The voxels of a segment and one voxel around them; None where there are none. Converting the whole labelmap once a segment takes many times longer."""
    shared = segment.GetRepresentation(LABELMAP_REPRESENTATION)
    scalars = shared.GetPointData().GetScalars() if shared is not None else None
    if scalars is None:
        return None
    is_segment = vtk_to_numpy(scalars).reshape(tuple(reversed(shared.GetDimensions()))) == segment.GetLabelValue()
    planes = np.flatnonzero(is_segment.any(axis=(1, 2)))
    if len(planes) == 0:
        return None
    shown = is_segment[planes[0] : planes[-1] + 1]
    found = (planes, np.flatnonzero(shown.any(axis=(0, 2))), np.flatnonzero(shown.any(axis=(0, 1))))
    starts = [max(0, indices[0] - 1) for indices in found]
    stops = [min(size, indices[-1] + 2) for size, indices in zip(is_segment.shape, found)]
    cropped = image_data(is_segment[tuple(map(slice, starts, stops))].astype(np.uint8))
    first_ijk = [first + start for first, start in zip(shared.GetExtent()[::2], reversed(starts))]  # KJI -> IJK
    cropped.SetExtent(*(value for first, size in zip(first_ijk, cropped.GetDimensions()) for value in (int(first), int(first) + size - 1)))
    image_to_world = vtk.vtkMatrix4x4()
    shared.GetImageToWorldMatrix(image_to_world)
    cropped.SetImageToWorldMatrix(image_to_world)
    return cropped
