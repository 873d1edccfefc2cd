"""The patch boxes and the picture: values against hand-computed ones, places in the world."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from NMSWSegment.files.bundle import Code, Label
from NMSWSegment.files.colors import rank_color
from NMSWSegment.files.display_slice import display_slices
from NMSWSegment.files.outputs import require_matplotlib, write_patches, write_preview
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import UserError

ANATOMY, ORGAN = Code("SCT", "123037004", "Anatomical Structure"), Code("SCT", "113343008", "Organ")
LABELS = tuple(
    Label(value, name, color, ANATOMY, ORGAN)
    for value, name, color in ((1, "liver", (221, 130, 101)), (2, "spleen", (157, 108, 162)), (3, "kidney_left", (185, 102, 83)))
)
PATCHES = tuple(
    SimpleNamespace(rank=rank, candidate=7 * rank, importance=0.5 / rank, center_ras=(10.0 * rank, -20.0, 30.5 + rank), size_mm=(144.0, 96.0, 50.0 + rank))
    for rank in (1, 2, 3)
)
# Columns are the steps of i, j, k: i runs to the left, j up, k backwards.
IJK_TO_RAS = np.array([[-2.0, 0, 0, 50.0], [0, 0, -3.0, 40.0], [0, 4.0, 0, -70.0], [0, 0, 0, 1.0]])


def a_case() -> tuple[Volume, Volume]:
    """Three liver voxels of known intensity, one of the kidney, none of the spleen."""
    intensities = np.full((4, 5, 6), -1000, dtype=np.int16)
    labels = np.zeros((4, 5, 6), dtype=np.uint8)
    for index, (kji, intensity) in enumerate((((1, 2, 3), 40), ((1, 2, 4), 60), ((2, 2, 3), 110))):
        intensities[kji], labels[kji] = intensity, 1
    intensities[3, 0, 5], labels[3, 0, 5] = 200, 3
    return Volume(intensities, IJK_TO_RAS), Volume(labels, IJK_TO_RAS)


def test_patches_file_states_its_coordinates(tmp_path):
    write_patches(PATCHES, tmp_path / "p.mrk.json")
    markups = json.loads((tmp_path / "p.mrk.json").read_text(encoding="utf-8"))["markups"]
    assert [markup["name"] for markup in markups] == ["Patch 1", "Patch 2", "Patch 3"]
    assert {markup["coordinateSystem"] for markup in markups} == {"RAS"}
    assert markups[1]["center"] == [20.0, -20.0, 32.5] and markups[1]["size"] == [144.0, 96.0, 52.0]
    assert markups[1]["controlPoints"][0]["description"] == "candidate 14, importance 0.25"


def test_patches_open_in_slicer_at_their_world_place(tmp_path):
    slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")
    pytest.importorskip("vtk.util.numpy_support", reason="slicer-core is not installed")
    from slicer_headless import new_scene

    write_patches(PATCHES, tmp_path / "p.mrk.json")
    scene = new_scene()
    logic = scene.headless_logics[1]["Markups"]
    assert logic.LoadMarkupsFromJson(str(tmp_path / "p.mrk.json"), "", slicer.vtkMRMLMessageCollection())
    assert scene.GetNumberOfNodesByClass("vtkMRMLMarkupsROINode") == 3
    for index, patch in enumerate(PATCHES):
        node = scene.GetNthNodeByClass(index, "vtkMRMLMarkupsROINode")
        bounds = np.zeros(6)
        node.GetRASBounds(bounds)
        center, half = np.array(patch.center_ras), np.array(patch.size_mm) / 2
        np.testing.assert_allclose(node.GetCenterWorld(), center, atol=1e-6)
        np.testing.assert_allclose(node.GetSize(), patch.size_mm, atol=1e-6)
        np.testing.assert_allclose(bounds.reshape(3, 2).T, (center - half, center + half), atol=1e-6)
        assert node.GetName() == f"Patch {patch.rank}" and node.GetLocked()
        np.testing.assert_allclose(node.GetDisplayNode().GetSelectedColor(), rank_color(patch.rank, count=3), atol=1e-6)


def test_no_patches_make_an_empty_markups_file(tmp_path):
    write_patches((), tmp_path / "p.mrk.json")
    assert json.loads((tmp_path / "p.mrk.json").read_text(encoding="utf-8"))["markups"] == []


def test_rank_color_runs_from_yellow_to_violet():
    assert rank_color(1, count=1) == rank_color(1, count=9) == (1.0, 0.902, 0.2353)
    assert rank_color(9, count=9) == (0.5882, 0.3529, 0.902)
    assert len({rank_color(rank, count=9) for rank in range(1, 10)}) == 9


# --- picture ------------------------------------------------------------------------------------------------------


def ramp(ijk_to_ras: np.ndarray, shape) -> Volume:
    """Intensity R + 1000 A + 100000 S in mm: tells every world point apart, and linear interpolation is exact."""
    index_ijk = np.indices(shape)[::-1].reshape(3, -1)
    points = ijk_to_ras[:3, :3] @ index_ijk + ijk_to_ras[:3, 3:]
    return Volume((np.array([1.0, 1000.0, 100000.0]) @ points).reshape(shape), ijk_to_ras)


def oblique(degrees: float) -> np.ndarray:
    """Turned about R and S, mirrored, anisotropic."""
    angle = np.deg2rad(degrees)
    about_s = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    about_r = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    matrix = np.eye(4)
    matrix[:3, :3] = about_s @ about_r @ np.diag([-1.5, 2.0, 3.0])
    matrix[:3, 3] = (12.0, -7.0, 30.0)
    return matrix


@pytest.mark.parametrize("ijk_to_ras", [IJK_TO_RAS, oblique(0), oblique(30)])
def test_every_pixel_of_a_display_slice_shows_its_world_point(ijk_to_ras):
    volume = ramp(ijk_to_ras, (14, 15, 16))
    labels = Volume(np.zeros(volume.shape, np.uint8), ijk_to_ras)
    labels.array[6:9, 5:10, 7:12] = 3
    checked = 0
    for view, (across, up, through) in zip(display_slices(volume, labels), ((0, 1, 2), (0, 2, 1), (1, 2, 0))):
        rows, columns = view.intensities.shape
        assert view.across_mm[0] > view.across_mm[1] and view.up_mm[1] > view.up_mm[0]
        point = np.empty((rows, columns, 3))
        point[..., across] = np.linspace(*view.across_mm, 2 * columns + 1)[1::2][None, :]
        point[..., up] = np.linspace(view.up_mm[1], view.up_mm[0], 2 * rows + 1)[1::2][:, None]
        point[..., through] = view.position_mm
        index_ijk = (point - ijk_to_ras[:3, 3]) @ np.linalg.inv(ijk_to_ras[:3, :3]).T
        # Beyond the outermost voxel centers the value is held, so only points between centers are on the ramp.
        between = ((index_ijk >= 0) & (index_ijk <= (15, 14, 13))).all(axis=-1)
        np.testing.assert_allclose(view.intensities[between], (point @ (1.0, 1000.0, 100000.0))[between], rtol=1e-5, atol=1)
        outside = ((index_ijk < -0.51) | (index_ijk > (15.51, 14.51, 13.51))).any(axis=-1)
        assert np.isnan(view.intensities[outside]).all()
        nearest = np.rint(index_ijk[between]).astype(int)
        np.testing.assert_array_equal(view.labels[between], labels.array[nearest[:, 2], nearest[:, 1], nearest[:, 0]])
        assert (view.labels == 3).any()
        checked += between.sum()
    assert checked > 200


def test_display_slices_cut_most_structures():
    matrix = np.diag([1.0, 1.0, 2.0, 1.0])
    labels = np.zeros((20, 12, 10), dtype=np.uint8)
    labels[2:9, 2:10, 2:8] = 1  # large, alone
    labels[14:16, 1:4, 1:4] = 2
    labels[14:16, 6:9, 6:9] = 3
    axial = display_slices(Volume(labels.astype(np.int16), matrix), Volume(labels, matrix))[0]
    assert 27 <= axial.position_mm <= 31
    assert set(np.unique(axial.labels)) == {0, 2, 3}


def picture(path) -> np.ndarray:
    """Pixels of a PNG, (rows, columns, RGB)."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[..., :3]


@pytest.mark.parametrize("ijk_to_ras", [np.diag([-4.0, 5.0, 6.0, 1.0]), oblique(25)])
def test_preview_shows_the_labels_and_the_patch(tmp_path, ijk_to_ras):
    pytest.importorskip("matplotlib")
    intensities = np.random.default_rng(0).normal(40, 10, (20, 30, 40)).astype(np.int16)
    intensities[:, :4] = -1000
    labels = np.zeros(intensities.shape, np.uint8)
    labels[5:15, 8:20, 4:16] = 1
    labels[5:15, 8:20, 25:30] = 2
    volume, labelmap = Volume(intensities, ijk_to_ras), Volume(labels, ijk_to_ras)
    center = ijk_to_ras[:3, :3] @ (10, 14, 10) + ijk_to_ras[:3, 3]
    patch = SimpleNamespace(rank=1, candidate=3, importance=0.7, center_ras=tuple(center), size_mm=(40.0, 40.0, 40.0))
    labels_in_red_and_blue = (
        Label(1, "liver", (255, 0, 0), ANATOMY, ORGAN),
        Label(2, "spleen", (0, 0, 255), ANATOMY, ORGAN),
        Label(3, "absent", (0, 255, 0), ANATOMY, ORGAN),
    )
    write_preview(volume, labelmap, labels=labels_in_red_and_blue, patches=[patch], path=tmp_path / "p.png")
    red, green, blue = np.moveaxis(picture(tmp_path / "p.png").astype(int), -1, 0)
    assert ((red > green + 80) & (red > blue + 80)).sum() > 500
    assert ((blue > green + 80) & (blue > red + 80)).sum() > 500
    assert ((green > red + 80) & (green > blue + 80)).sum() == 0
    assert ((red > 200) & (green > 180) & (blue < 120)).sum() > 100  # outline of the patch, yellow
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_preview_has_the_patient_right_at_the_left_edge(tmp_path):
    pytest.importorskip("matplotlib")
    matrix = np.diag([4.0, 4.0, 4.0, 1.0])
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[8:12, 8:12, 15:19] = 1  # large R
    write_preview(
        ramp(matrix, labels.shape), Volume(labels, matrix), labels=[Label(1, "liver", (255, 0, 0), ANATOMY, ORGAN)], patches=(), path=tmp_path / "p.png"
    )
    pixels = picture(tmp_path / "p.png").astype(int)
    is_red = (pixels[..., 0] > pixels[..., 1] + 80) & (pixels[..., 0] > pixels[..., 2] + 80)
    axial = is_red[:, : is_red.shape[1] // 4]
    columns = np.flatnonzero(axial.any(axis=0))
    assert columns.mean() < axial.shape[1] / 2


def test_preview_of_an_empty_labelmap_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    volume = ramp(IJK_TO_RAS, (6, 7, 8))
    write_preview(volume, Volume(np.zeros((6, 7, 8), np.uint8), IJK_TO_RAS), labels=LABELS, patches=PATCHES, path=tmp_path / "p.png")
    assert picture(tmp_path / "p.png").shape[2] == 3


@pytest.mark.parametrize("shape", [(2, 2, 3000), (2, 3000, 2), (3000, 2, 2), (2, 2, 2)])
def test_preview_of_a_volume_of_two_by_two_voxels_is_drawn(tmp_path, shape):
    pytest.importorskip("matplotlib")
    labels = np.zeros(shape, np.uint8)
    labels[:, :, : shape[2] // 2] = 1
    matrix = np.diag([-1.0, -1.0, 1.0, 1.0])
    red = Label(1, "liver", (255, 0, 0), ANATOMY, ORGAN)
    write_preview(ramp(matrix, shape), Volume(labels, matrix), labels=[red], patches=(), path=tmp_path / "p.png")
    pixels = picture(tmp_path / "p.png").astype(int)
    assert ((pixels[..., 0] > pixels[..., 1] + 80) & (pixels[..., 0] > pixels[..., 2] + 80)).any()


def test_preview_without_matplotlib_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        require_matplotlib()


@pytest.mark.parametrize(
    ("write", "name", "fix"),
    [
        (lambda path: write_patches(PATCHES, path), "a.json", "Use '.mrk.json'"),
        (lambda path: write_preview(*a_case(), labels=LABELS, patches=(), path=path), "a.jpg", "Use '.png'"),
        (lambda path: write_patches(PATCHES, path), "nowhere/a.mrk.json", "Create it"),
    ],
)
def test_impossible_output_is_refused(tmp_path, write, name, fix):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=fix):
        write(tmp_path / name)
    assert not list(tmp_path.iterdir())
