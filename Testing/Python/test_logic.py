"""NMSWSegment.py: loads like Slicer loads it, and the logic segments a node with slicer-core."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from slicer_headless import add_transform, add_volume, new_scene, no_vtk_errors, segment_points_ras, sorted_points

from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.phantoms import ORGANS, phantom, upright_ijk_to_ras
from NMSWSegment.protocol import Cancelled, SegmentOptions, UserError

pytestmark = pytest.mark.usefixtures(no_vtk_errors.__name__)

MODULE_FILE = Path(__file__).resolve().parents[2] / "NMSWSegment.py"
SHAPE = (38, 30, 44)
# A mirrored grid of 7 x 8 x 6 mm (KJI) around the phantom, and a transform that tilts it.
IJK_TO_NODE = np.diag([-1.0, 1.0, 1.0, 1.0]) @ upright_ijk_to_ras((7.0, 8.0, 6.0), SHAPE)
TILT = np.array([[np.cos(0.15), -np.sin(0.15), 0, 4.0], [np.sin(0.15), np.cos(0.15), 0, -9.0], [0, 0, 1, 2.0], [0, 0, 0, 1]])
IJK_TO_RAS = TILT @ IJK_TO_NODE


@pytest.fixture(scope="module")
def module():
    """The module file under another name, so that NMSWSegment stays the package."""
    spec = importlib.util.spec_from_file_location("NMSWSegmentModuleFile", MODULE_FILE)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def volume_node():
    """The phantom on a mirrored grid under a transform that tilts it."""
    volume, _ = phantom(SHAPE, ijk_to_ras=IJK_TO_RAS)
    scene = new_scene()
    node = add_volume(scene, volume.array.astype(np.int16), ijk_to_ras=IJK_TO_NODE)
    node.SetAndObserveTransformNodeID(add_transform(scene, TILT).GetID())
    node.test_scene = scene  # a node does not keep its scene alive
    return node


@pytest.fixture
def segmentation_node(volume_node):
    node = volume_node.GetScene().AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
    node.GetSegmentation().AddEmptySegment("old", "old segment")
    return node


def options_for(bundle_folder, *, num_patches: int = 2) -> SegmentOptions:
    """One CPU thread, so that the test is the same everywhere."""
    return SegmentOptions(bundle=str(bundle_folder), num_patches=num_patches, device="cpu", threads=1)


def run_like_slicer(code: str, *, folder: Path) -> None:
    """Run code in a new interpreter where the module file is loaded as Slicer loads it and the library is found by it alone."""
    load = f"""
import importlib.util, sys
sys.path.append({str(Path(__file__).parent)!r})
spec = importlib.util.spec_from_file_location("NMSWSegment", {str(MODULE_FILE)!r})
sys.modules["NMSWSegment"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
    done = subprocess.run(
        [sys.executable, "-c", load + code], cwd=folder, capture_output=True, encoding="utf-8", check=False, env={"PATH": "", "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr


def test_module_file_loaded_like_slicer_does_is_also_the_package(tmp_path):
    code = """
from NMSWSegment.protocol import SegmentOptions
assert sys.modules["NMSWSegment"] is module
assert module.SegmentOptions is SegmentOptions
assert module.NMSWSegmentWidget and module.NMSWSegmentLogic and module.NMSWSegmentTest
assert not {"torch", "monai", "SimpleITK"} & set(sys.modules), "imported at file scope"
assert not hasattr(module, "NMSWSegmentFileReader")
from NMSWSegment import segment
assert segment.__module__ == "NMSWSegment.engine.segmentation"
"""
    run_like_slicer(code, folder=tmp_path)


def test_process_loaded_like_slicer_does_segments(tmp_path, a_tiny_bundle):
    code = f"""
import numpy as np
from slicer_headless import add_volume, new_scene
from NMSWSegment.files.phantoms import phantom, upright_ijk_to_ras
from NMSWSegment.protocol import SegmentOptions
shape = {SHAPE}
ijk_to_ras = upright_ijk_to_ras((7.0, 8.0, 6.0), shape)
volume, _ = phantom(shape, ijk_to_ras=ijk_to_ras)
scene = new_scene()
node = add_volume(scene, volume.array, ijk_to_ras=ijk_to_ras)
segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
options = SegmentOptions(bundle={str(a_tiny_bundle)!r}, num_patches=1, device="cpu", threads=1)
module.NMSWSegmentLogic().process(node, segmentation, options)
assert list(segmentation.GetSegmentation().GetSegmentIDs()) == ["liver", "spleen", "vertebrae"]
assert segmentation.GetAttribute("NMSW.Version") == module.__version__
assert "monai" not in sys.modules
"""
    run_like_slicer(code, folder=tmp_path)


def voxels(points_ras: np.ndarray) -> set[tuple[int, int, int]]:
    """The voxels (i, j, k) of the volume that hold the points."""
    indices_ijk = (points_ras - IJK_TO_RAS[:3, 3]) @ np.linalg.inv(IJK_TO_RAS[:3, :3]).T
    np.testing.assert_allclose(indices_ijk, indices_ijk.round(), atol=0.01)
    return set(map(tuple, indices_ijk.round().astype(int).tolist()))


def test_process_segments_the_phantom_where_it_is_in_the_world(module, volume_node, segmentation_node, a_tiny_bundle):
    fractions = []

    result = module.NMSWSegmentLogic().process(volume_node, segmentation_node, options_for(a_tiny_bundle), lambda progress: fractions.append(progress.fraction))

    assert list(segmentation_node.GetSegmentation().GetSegmentIDs()) == ["liver", "spleen", "vertebrae"]
    for value, (name, (center_ras, radii_mm, _)) in enumerate(ORGANS.items(), start=1):
        points_ras = segment_points_ras(segmentation_node, name)
        expected = sorted_points(np.argwhere(result.labelmap.array == value)[:, ::-1], ijk_to_ras=IJK_TO_RAS)
        np.testing.assert_allclose(points_ras.mean(0), expected.mean(0), atol=1e-3)
        assert len(points_ras) == len(expected)
        # the inner half of the organ only: the tiny bundle goes by intensity and calls the blurred border of a bone liver
        indices_ijk = np.argwhere(np.ones(SHAPE, dtype=bool))[:, ::-1]
        everywhere = sorted_points(indices_ijk, ijk_to_ras=IJK_TO_RAS)
        core = everywhere[(((everywhere - center_ras) / radii_mm) ** 2).sum(1) < 0.25]
        assert voxels(core) <= voxels(points_ras)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_process_outlines_the_patches_and_keeps_the_provenance(module, volume_node, segmentation_node, a_tiny_bundle):
    result = module.NMSWSegmentLogic().process(volume_node, segmentation_node, options_for(a_tiny_bundle))

    assert len(result.patches) == 2
    scene = volume_node.GetScene()
    from vtk.util.numpy_support import vtk_to_numpy

    from NMSWSegment.panel.nodes import node_to_world_matrix  # needs slicer-core
    from NMSWSegment.panel.overlays import PATCHES_ATTRIBUTE

    (node,) = [
        node
        for node in (scene.GetNthNodeByClass(index, "vtkMRMLModelNode") for index in range(scene.GetNumberOfNodesByClass("vtkMRMLModelNode")))
        if node.GetAttribute(PATCHES_ATTRIBUTE)
    ]
    assert node.GetAttribute(PATCHES_ATTRIBUTE) == "2"
    centers, halves = (np.array([getattr(patch, name) for patch in result.patches]) for name in ("center_ras", "size_mm"))
    expected = [edge for axis in range(3) for edge in ((centers - halves / 2)[:, axis].min(), (centers + halves / 2)[:, axis].max())]
    points = np.c_[vtk_to_numpy(node.GetPolyData().GetPoints().GetData()), np.ones(8 * len(result.patches))] @ node_to_world_matrix(node).T
    np.testing.assert_allclose([edge for axis in range(3) for edge in (points[:, axis].min(), points[:, axis].max())], expected, atol=1e-3)
    bundle = load_bundle(a_tiny_bundle)
    assert segmentation_node.GetAttribute("NMSW.Bundle") == bundle.manifest.name
    assert segmentation_node.GetAttribute("NMSW.BundleSHA256") == bundle.sha256
    assert segmentation_node.GetAttribute("NMSW.NumPatches") == "2"
    assert segmentation_node.GetAttribute("NMSW.Policy") == "greedy"
    assert segmentation_node.GetAttribute("NMSW.Device") == "cpu"
    assert float(segmentation_node.GetAttribute("NMSW.Seconds")) > 0


def test_process_cancelled_leaves_the_nodes_as_they_were(module, volume_node, segmentation_node, a_tiny_bundle):
    def cancel_after_half(progress):
        if progress.fraction > 0.5:
            raise Cancelled

    with pytest.raises(Cancelled):
        module.NMSWSegmentLogic().process(volume_node, segmentation_node, options_for(a_tiny_bundle), cancel_after_half)

    assert list(segmentation_node.GetSegmentation().GetSegmentIDs()) == ["old"]
    assert segmentation_node.GetAttribute("NMSW.Bundle") is None
    assert volume_node.GetScene().GetNumberOfNodesByClass("vtkMRMLMarkupsROINode") == 0


def test_process_scene_closed_during_the_run_asks_to_load_again(module, volume_node, segmentation_node, a_tiny_bundle):
    scene = volume_node.GetScene()

    with pytest.raises(UserError, match="Load the volume and segment it again"):
        module.NMSWSegmentLogic().process(volume_node, segmentation_node, options_for(a_tiny_bundle), lambda progress: scene.RemoveNode(volume_node))


def test_process_without_output_asks_for_one(module, volume_node):
    with pytest.raises(UserError, match="Choose or create one"):
        module.NMSWSegmentLogic().process(volume_node, None)


def test_process_unknown_bundle_names_the_way_out(module, volume_node, segmentation_node):
    with pytest.raises(UserError, match="A folder that 'nmsw export' wrote works too"):
        module.NMSWSegmentLogic().process(volume_node, segmentation_node, SegmentOptions(bundle="torso-unnet"))


def test_sample_volume_is_there_and_has_its_attribution(module):
    assert module.SAMPLE_PATH.is_file()
    attribution = module.SAMPLE_PATH.with_name("cptac_pda_3mm.ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert "Creative Commons Attribution 3.0" in attribution
    assert module.SAMPLE_PATH.as_uri().startswith("file:///")


def test_register_sample_data_gives_a_local_file_and_its_hash(module, monkeypatch):
    registered = {}

    class SampleDataLogic:
        @staticmethod
        def registerCustomSampleDataSource(category, sampleName, uris, fileNames, nodeNames, thumbnailFileName, checksums):
            registered.update(category=category, uris=uris, checksums=checksums, fileNames=fileNames)

    sample_data = type(sys)("SampleData")
    sample_data.SampleDataLogic = SampleDataLogic
    monkeypatch.setitem(sys.modules, "SampleData", sample_data)

    module.registerSampleData()

    assert registered["category"] == "NMSWSegment"
    assert registered["fileNames"] == "cptac_pda_3mm.nii.gz"
    assert registered["checksums"].startswith("SHA256:")
    assert len(registered["checksums"]) == len("SHA256:") + 64
