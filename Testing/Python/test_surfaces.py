"""Closed surfaces of segments: smooth at once, and where the segment is."""

import numpy as np
import pytest
from slicer_headless import OBLIQUE_IJK_TO_RAS, add_volume, new_scene, no_vtk_errors, numpy_support

from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.nodes import import_labelmap
from NMSWSegment.panel.stepped_task import run_to_end
from NMSWSegment.panel.surfaces import show_surfaces_steps

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)

RADIUS_MM = 20.0


@pytest.fixture
def a_ball():
    """A segmentation of a ball on an oblique grid, and its center."""
    scene, shape = new_scene(), (30, 40, 50)
    center_ras = (OBLIQUE_IJK_TO_RAS @ (25, 20, 15, 1))[:3]
    k, j, i = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    points = np.stack([i, j, k], axis=-1) @ OBLIQUE_IJK_TO_RAS[:3, :3].T + OBLIQUE_IJK_TO_RAS[:3, 3]
    labels = (np.linalg.norm(points - center_ras, axis=-1) < RADIUS_MM).astype(np.uint8)
    volume = add_volume(scene, labels.astype(np.int16), ijk_to_ras=OBLIQUE_IJK_TO_RAS)
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.CreateDefaultDisplayNodes()
    import_labelmap(node, Volume(labels, OBLIQUE_IJK_TO_RAS), labels=coded_labels(["liver"]), reference_node=volume)
    return node, center_ras


def radii_mm(node, center_ras) -> np.ndarray:
    """How far the points of the surface are from the center."""
    surface = node.GetSegmentation().GetSegment("liver").GetRepresentation("Closed surface")
    return np.linalg.norm(numpy_support.vtk_to_numpy(surface.GetPoints().GetData()) - center_ras, axis=1)


def test_surface_is_smooth_where_the_voxels_are_stairs(a_ball):
    node, center_ras = a_ball
    assert node.GetSegmentation().GetConversionParameter("Smoothing factor") == "0.5"
    assert run_to_end(show_surfaces_steps(node))
    smooth = radii_mm(node, center_ras)
    node.RemoveClosedSurfaceRepresentation()
    node.GetSegmentation().SetConversionParameter("Smoothing factor", "0.0")
    run_to_end(show_surfaces_steps(node))
    stairs = radii_mm(node, center_ras)

    assert abs(smooth.mean() - RADIUS_MM) < 0.1  # found 19.95
    assert smooth.std() < 0.5 * stairs.std()  # found 0.20 and 0.48 mm; voxels of 1.5 x 2 x 3 mm
