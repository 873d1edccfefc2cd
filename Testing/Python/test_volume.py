"""Volumes from and to disk: values, world coordinates, and every input that cannot be segmented."""

import gzip
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from NMSWSegment.files.bundle import Code, Label
from NMSWSegment.files.output_file import check_output_path, replaced_together
from NMSWSegment.files.volume import Volume, read_volume, write_labelmap, write_volume
from NMSWSegment.protocol import UserError

ORGAN, RIGHT = Code("SCT", "64033007", "Kidney"), Code("SCT", "24028007", "Right")
ANATOMY = Code("SCT", "123037004", "Anatomical Structure")
LABELS = (
    Label(1, "kidney_right", (185, 102, 83), ANATOMY, ORGAN, RIGHT),
    Label(2, "spleen", (157, 108, 162), ANATOMY, Code("SCT", "78961009", "Spleen")),
    Label(5, "liver", (221, 130, 101), ANATOMY, Code("SCT", "10200004", "Liver")),
)


def affine(*, degrees: float, spacing_ijk=(0.7, 0.9, 2.5), mirrored: bool = False, origin_ras=(-31.0, 17.5, 240.25)) -> np.ndarray:
    """ijk_to_ras of a grid turned about S, then about R; mirrored ones are left-handed."""
    angle = np.deg2rad(degrees)
    about_s = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    about_r = np.array([[1, 0, 0], [0, np.cos(angle / 2), -np.sin(angle / 2)], [0, np.sin(angle / 2), np.cos(angle / 2)]])
    matrix = np.eye(4)
    matrix[:3, :3] = about_s @ about_r @ np.diag(spacing_ijk) @ np.diag([-1.0 if mirrored else 1.0, 1.0, 1.0])
    matrix[:3, 3] = origin_ras
    return matrix


GEOMETRIES = {
    "upright": affine(degrees=0),
    "oblique": affine(degrees=25),
    "mirrored": affine(degrees=0, mirrored=True),
    "oblique mirrored": affine(degrees=-40, mirrored=True),
}


def a_volume(geometry: str = "oblique", *, dtype=np.int16) -> Volume:
    """Asymmetric intensities on a grid with three different lengths."""
    array = np.random.default_rng(3).integers(-900, 900, (5, 6, 7)).astype(dtype)
    return Volume(array=array, ijk_to_ras=GEOMETRIES[geometry], name="case")


def a_labelmap(geometry: str = "oblique") -> Volume:
    """Labels 1 and 5 of LABELS in an asymmetric arrangement; 2 has no voxel."""
    array = np.zeros((6, 7, 8), dtype=np.uint8)
    array[1:3, 2:6, 1:3] = 1
    array[3:6, 0:2, 4:7] = 5
    return Volume(array=array, ijk_to_ras=GEOMETRIES[geometry])


def write_dicom(
    folder: Path,
    *,
    positions_mm,
    series: str = "1.2.3",
    description: str = "Thorax 2.5",
    names=None,
    tilt_mm: float = 0.0,
    image_type: str = "ORIGINAL\\PRIMARY\\AXIAL",
) -> np.ndarray:
    """Axial int16 slices at LPS (10, -20, position); returns the array (K, J, I)."""
    folder.mkdir(exist_ok=True)
    array = np.random.default_rng(len(positions_mm)).integers(-1000, 1000, (len(positions_mm), 6, 7)).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index, position in enumerate(positions_mm):
        image = sitk.GetImageFromArray(array[index])
        image.SetSpacing((0.7, 0.9))
        tags = {
            "0008|0008": image_type, "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"{series}.{index + 1}", "0008|0060": "CT",
            "0008|103e": description, "0020|000d": "1.2", "0020|000e": series, "0020|0013": str(index + 1),
            "0020|0032": f"10\\{-20 + tilt_mm * index:g}\\{position:g}", "0020|0037": "1\\0\\0\\0\\1\\0", "0018|0050": "2.5",
        }  # fmt: skip
        for key, text in tags.items():
            image.SetMetaData(key, text)
        writer.SetFileName(str(folder / (f"{series}-{index:03d}.dcm" if names is None else names[index])))
        writer.Execute(image)
    return array


# --- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_volume_written_and_read_keeps_values_and_world(tmp_path, geometry, ending):
    volume = a_volume(geometry)
    write_volume(volume, tmp_path / f"case{ending}")
    found = read_volume(tmp_path / f"case{ending}")
    assert found.array.dtype == np.int16
    np.testing.assert_array_equal(found.array, volume.array)
    # NIfTI keeps its geometry in float32.
    np.testing.assert_allclose(found.ijk_to_ras, volume.ijk_to_ras, atol=2e-5)
    assert found.name == "case"
    np.testing.assert_allclose(found.spacing_mm, (2.5, 0.9, 0.7), atol=1e-6)


@pytest.mark.parametrize("ending", [".nhdr", ".mhd"])
def test_detached_header_is_read_with_its_data(tmp_path, ending):
    image = sitk.GetImageFromArray(a_volume().array)
    image.SetOrigin((10.0, -20.0, 30.0))
    sitk.WriteImage(image, str(tmp_path / f"case{ending}"))
    found = read_volume(tmp_path / f"case{ending}")
    np.testing.assert_array_equal(found.array, a_volume().array)
    np.testing.assert_array_equal(found.ijk_to_ras[:3, 3], (-10.0, 20.0, 30.0))


def test_first_voxel_of_a_hand_written_nrrd_is_at_the_flipped_lps_point(tmp_path):
    header = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 2 2\nspace directions: (2,0,0) (0,3,0) (0,0,4)\n"
    header += "kinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: (1,2,3)\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + np.arange(8, dtype="<i2").tobytes())
    found = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(found.ijk_to_ras @ (1, 0, 1, 1), (-3, -2, 7, 1))
    assert found.array[1, 0, 1] == 5


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_dtype_is_kept(tmp_path, dtype):
    write_volume(a_volume(dtype=dtype), tmp_path / "case.nrrd")
    assert read_volume(tmp_path / "case.nrrd").array.dtype == dtype


def test_fourth_axis_of_one_voxel_is_dropped(tmp_path):
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(a_volume().array)]), str(tmp_path / "case.mha"))
    np.testing.assert_array_equal(read_volume(tmp_path / "case.mha").array, a_volume().array)


# --- files that cannot be segmented -------------------------------------------------------------------------------


def bad_file(folder: Path, kind: str) -> Path:
    """One input that a person has to replace."""
    image = sitk.GetImageFromArray(a_volume().array)
    path = folder / ("case.nrrd" if kind in ("nan in NRRD", "shear", "flat axes") else "case.nii.gz")
    array = a_volume().array.astype(np.float32)
    if kind == "missing":
        return folder / "nothing.nii.gz"
    if kind == "ending":
        path = folder / "case.docx"
        path.write_text("text")
    elif kind == "garbage":
        path.write_bytes(b"no volume at all" * 100)
    elif kind == "empty":
        path.touch()
    elif kind == "4-D":
        sitk.WriteImage(sitk.JoinSeries([image, image]), str(path))
    elif kind == "color":
        sitk.WriteImage(sitk.Compose([image] * 3), str(path))
    elif kind.startswith("nan"):
        array[2, 3, 4] = np.nan
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    elif kind == "inf":
        array[2, 3, 4] = np.inf
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    elif kind == "constant":
        sitk.WriteImage(image * 0 - 1024, str(path))
    elif kind == "2-D":
        sitk.WriteImage(image[:, :, 0], str(path))
    elif kind.startswith("one slice"):
        cut = {"k": image[:, :, :1], "j": image[:, :1, :], "i": image[:1, :, :]}[kind[-1]]
        sitk.WriteImage(cut, str(path))
    else:
        third = "(0.6,0,2.5)" if kind == "shear" else "(1,0,0)"
        header = "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 7 6 5\n"
        header += f"space directions: (1,0,0) (0,1,0) {third}\nkinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: (1,2,3)\n\n"
        path.write_bytes(header.encode() + a_volume().array.tobytes())
    return path


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ("missing", "Check the spelling"),
        ("ending", "Give one of .nii.gz, .nii, .nrrd"),
        ("garbage", "Copy or export it again"),
        ("empty", "Copy or export it again"),
        ("4-D", "size 7 x 6 x 5 x 2.*Save one 3-D volume"),
        ("color", "3 values per voxel.*Vector to Scalar Volume"),
        ("nan in NRRD", "1 voxels that are no number.*Replace them"),
        ("nan", "1 voxels that are no number.*Replace them"),
        ("inf", "1 voxels that are no number.*Replace them"),
        ("constant", "-1024.*Check that the right file"),
        ("2-D", "Give the whole volume"),
        ("one slice k", "7 x 6 x 1.*Give the whole volume"),
        ("one slice j", "7 x 1 x 5.*Give the whole volume"),
        ("one slice i", "1 x 6 x 5.*Give the whole volume"),
        ("shear", "Resample it to a regular grid"),
        ("flat axes", "Resample it to a regular grid"),
    ],
)
def test_bad_file_is_refused_with_the_fix_and_without_foreign_messages(tmp_path, capfd, kind, fix):
    path = bad_file(tmp_path, kind)
    capfd.readouterr()
    with pytest.raises(UserError, match=fix):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_truncated_file_is_refused(tmp_path, capfd, ending, share):
    whole = tmp_path / f"whole{ending}"
    array = np.random.default_rng(0).integers(-1000, 1000, (20, 21, 22)).astype(np.int16)
    write_volume(Volume(array, GEOMETRIES["oblique"]), whole)
    path = tmp_path / f"case{ending}"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    with pytest.raises(UserError, match="Copy or export it again"):
        read_volume(path)
    assert capfd.readouterr() == ("", "")


def test_nifti_with_a_broken_checksum_is_refused(tmp_path):
    path = tmp_path / "case.nii.gz"
    write_volume(a_volume(), path)
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # a byte of the CRC32 at the end of a gzip stream
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="Copy or export it again"):
        read_volume(path)


def test_big_endian_nifti_is_read(tmp_path):
    header = bytearray(352)
    values = {0: (">i4", [348]), 40: (">i2", [3, 7, 6, 5, 1, 1, 1, 1]), 70: (">i2", [4, 16]), 76: (">f4", [1, 0.7, 0.9, 2.5, 1, 1, 1, 1]), 108: (">f4", [352])}
    for offset, (dtype, numbers) in values.items():
        data = np.array(numbers, dtype=dtype).tobytes()
        header[offset : offset + len(data)] = data
    header[344:348] = b"n+1\0"
    (tmp_path / "case.nii.gz").write_bytes(gzip.compress(bytes(header) + a_volume().array.astype(">i2").tobytes()))
    np.testing.assert_array_equal(read_volume(tmp_path / "case.nii.gz").array, a_volume().array)


# --- DICOM --------------------------------------------------------------------------------------------------------


def test_dicom_series_has_its_values_and_world_points(tmp_path):
    array = write_dicom(tmp_path / "ct", positions_mm=np.arange(8) * 2.5 - 40)
    found = read_volume(tmp_path / "ct")
    assert found.array.dtype == np.int16
    np.testing.assert_array_equal(found.array, array)
    expected = np.array([[-0.7, 0, 0, -10], [0, -0.9, 0, 20], [0, 0, 2.5, -40], [0, 0, 0, 1]])
    np.testing.assert_allclose(found.ijk_to_ras, expected, atol=1e-6)


def test_dicom_files_in_any_order_are_sorted_by_position(tmp_path):
    names = [f"{number:02d}.dcm" for number in range(8)]
    random.Random(5).shuffle(names)
    array = write_dicom(tmp_path / "ct", positions_mm=100 - np.arange(8) * 2.5, names=names)
    (tmp_path / "ct" / "readme.txt").write_text("not DICOM")
    found = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(found.array, array[::-1])
    np.testing.assert_allclose(found.ijk_to_ras[:3, 3], (-10, 20, 82.5), atol=1e-6)


def test_dicom_localizers_and_other_objects_are_passed_over(tmp_path):
    array = write_dicom(tmp_path / "ct", positions_mm=np.arange(8) * 2.5)
    write_dicom(tmp_path / "ct", positions_mm=[3.0], series="1.2.4", description="Scout")
    write_dicom(tmp_path / "ct", positions_mm=[0.0, 50.0], series="1.2.5", image_type="ORIGINAL\\PRIMARY\\LOCALIZER")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct").array, array)


def test_dicom_spacing_rounded_by_the_scanner_is_accepted(tmp_path):
    array = write_dicom(tmp_path / "ct", positions_mm=[0.0, 2.5, 5.01, 7.5, 9.99, 12.5])
    found = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(found.array, array)
    assert found.spacing_mm[0] == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ({"positions_mm": [0, 2.5, 5, 10, 12.5, 15]}, "misses about 1 of its slices: after slice 3 of 6.*5.00 mm instead of 2.50 mm. Export the series again"),
        ({"positions_mm": [0, 2.5, 5, 5, 7.5]}, "1 slices at places where it already has one.*Export one phase"),
        ({"positions_mm": [0, 2.5, 5.5, 8, 11, 13.5]}, "unevenly spaced: 2.50 to 3.00 mm.*even spacing"),
        ({"positions_mm": np.arange(6) * 2.5, "tilt_mm": 0.4}, "sideways by 2.0 mm.*gantry tilt.*3D Slicer"),
    ],
)
def test_irregular_dicom_series_is_refused(tmp_path, capfd, arguments, fix):
    write_dicom(tmp_path / "ct", **arguments)
    capfd.readouterr()
    with pytest.raises(UserError, match=fix):
        read_volume(tmp_path / "ct")
    assert capfd.readouterr() == ("", "")


def test_two_dicom_series_are_listed_with_their_slices(tmp_path):
    write_dicom(tmp_path / "ct", positions_mm=np.arange(8) * 2.5)
    write_dicom(tmp_path / "ct", positions_mm=np.arange(5) * 5.0, series="1.2.4", description="Liver 5.0")
    with pytest.raises(UserError, match=r"'Thorax 2.5' \(8 slices, UID 1.2.3\), 'Liver 5.0' \(5 slices, UID 1.2.4\).*--series UID"):
        read_volume(tmp_path / "ct")


def test_folder_without_dicom_names_its_sub_folders(tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "series_a").mkdir()
    with pytest.raises(UserError, match="no DICOM images.*series_a.*Give the folder"):
        read_volume(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_folder_with_a_localizer_only_is_refused(tmp_path):
    write_dicom(tmp_path / "ct", positions_mm=[3.0], description="Scout")
    with pytest.raises(UserError, match=r"'Scout' \(1 slices\).*folder of a whole series"):
        read_volume(tmp_path / "ct")


def test_damaged_dicom_slice_is_not_silently_left_out(tmp_path, capfd):
    write_dicom(tmp_path / "ct", positions_mm=np.arange(6) * 2.5)
    last = sorted((tmp_path / "ct").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-40])
    with pytest.raises(UserError, match="[Ee]xport the series again"):
        read_volume(tmp_path / "ct")
    assert capfd.readouterr() == ("", "")


# --- labelmaps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".seg.nrrd"])
def test_labelmap_round_trip_is_exact(tmp_path, geometry, ending):
    labelmap = a_labelmap(geometry)
    write_labelmap(labelmap, tmp_path / f"labels{ending}", labels=LABELS)
    found = read_volume(tmp_path / f"labels{ending}")
    assert found.array.dtype == np.uint8
    np.testing.assert_array_equal(found.array, labelmap.array)
    np.testing.assert_allclose(found.ijk_to_ras, labelmap.ijk_to_ras, atol=2e-5)
    assert [path.name for path in tmp_path.iterdir()] == [f"labels{ending}"]


def test_nifti_labelmap_has_equal_sform_and_qform(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    write_labelmap(a_labelmap("oblique mirrored"), tmp_path / "labels.nii.gz", labels=LABELS)
    image = nibabel.load(tmp_path / "labels.nii.gz")
    assert image.header["sform_code"] > 0 and image.header["qform_code"] > 0
    np.testing.assert_allclose(image.get_sform(), GEOMETRIES["oblique mirrored"], atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), GEOMETRIES["oblique mirrored"], atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_segmentation_opens_in_slicer_with_names_colors_terminology_and_place(tmp_path, geometry):
    pytest.importorskip("slicer", reason="slicer-core is not installed")
    pytest.importorskip("vtk.util.numpy_support", reason="slicer-core is not installed")
    from slicer_headless import new_scene, segment_points_ras, sorted_points

    labelmap = a_labelmap(geometry)
    write_labelmap(labelmap, tmp_path / "labels.seg.nrrd", labels=LABELS)
    scene = new_scene()
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    storage = scene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
    storage.SetFileName(str(tmp_path / "labels.seg.nrrd"))
    assert storage.ReadData(node)
    segmentation = node.GetSegmentation()
    assert [segmentation.GetNthSegmentID(index) for index in range(segmentation.GetNumberOfSegments())] == ["kidney_right", "liver"]
    assert segmentation.GetNumberOfLayers() == 1
    for label in (LABELS[0], LABELS[2]):
        segment = segmentation.GetSegment(label.name)
        assert segment.GetName() == label.title
        assert segment.GetLabelValue() == label.value
        np.testing.assert_allclose(segment.GetColor(), np.array(label.color) / 255, atol=1e-5)
        assert segment.GetTerminology() == label.terminology
        expected = sorted_points(np.argwhere(labelmap.array == label.value)[:, ::-1], ijk_to_ras=labelmap.ijk_to_ras)
        np.testing.assert_allclose(segment_points_ras(node, label.name), expected, atol=2e-3)


def test_segmentation_says_only_what_is_present(tmp_path):
    write_labelmap(a_labelmap(), tmp_path / "labels.seg.nrrd", labels=LABELS)
    text = (tmp_path / "labels.seg.nrrd").read_bytes().split(b"\n\n")[0].decode()
    assert "encoding: gzip" in text
    assert "Segment0_Extent:=1 2 2 5 1 2" in text
    assert "Segment1_Extent:=4 6 0 1 3 5" in text
    assert "Segment1_LabelValue:=5" in text
    assert "Segmentation_MasterRepresentation:=Binary labelmap" in text
    assert "spleen" not in text


def test_empty_segmentation_can_be_written(tmp_path):
    empty = Volume(np.zeros((3, 4, 5), np.uint8), GEOMETRIES["oblique"])
    write_labelmap(empty, tmp_path / "labels.seg.nrrd", labels=LABELS)
    assert b"Segment0_ID" not in (tmp_path / "labels.seg.nrrd").read_bytes()


def test_labelmap_with_an_unknown_integer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown \[5\]"):
        write_labelmap(a_labelmap(), tmp_path / "labels.nii.gz", labels=LABELS[:2])
    assert not list(tmp_path.iterdir())


# --- output files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("labels.png", "Use '.nii.gz', '.nii' or '.seg.nrrd'"),
        (".nii.gz", "Use '.nii.gz'"),
        ("labels.nrrd", "Use '.nii.gz'"),
        ("nowhere/labels.nii.gz", "Create it, or choose another folder"),
        ("folder.nii.gz", "Give a file name"),
    ],
)
def test_impossible_output_is_refused_before_anything_is_written(tmp_path, name, fix):
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises(UserError, match=fix):
        write_labelmap(a_labelmap(), tmp_path / name, labels=LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.nii.gz"]


def test_output_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, to whom no folder is closed.
    monkeypatch.setattr("NMSWSegment.files.output_file.os.open", refuse)
    with pytest.raises(UserError, match="Permission denied.*Choose a folder that you may write to"):
        check_output_path(tmp_path / "labels.nii.gz", (".nii.gz",))


def test_checked_output_leaves_nothing_and_keeps_what_is_there(tmp_path):
    (tmp_path / "labels.nii.gz").write_text("old")
    assert check_output_path(tmp_path / "labels.nii.gz", (".nii.gz",)) == tmp_path / "labels.nii.gz"
    assert (tmp_path / "labels.nii.gz").read_text(encoding="utf-8") == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "labels.nii.gz").write_text("old")

    def fail(_, name, **__):
        Path(name).write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr("NMSWSegment.files.volume.sitk.WriteImage", fail)
    with pytest.raises(UserError, match="disk is not full"):
        write_labelmap(a_labelmap(), tmp_path / "labels.nii.gz", labels=LABELS)
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("labels.nii.gz", "old")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_files_replaced_together_are_all_there_or_none(tmp_path, error):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    with pytest.raises(UserError if error is OSError else error), replaced_together(paths) as temporaries:
        temporaries[0].write_text("a")
        raise error
    assert not list(tmp_path.iterdir())
    with replaced_together(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text(temporary.suffix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_file_that_cannot_take_its_place_takes_the_others_away_again(tmp_path, monkeypatch):
    replace = os.replace

    def fail_on_b(source, target):
        if target.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr("NMSWSegment.files.output_file.os.replace", fail_on_b)
    with pytest.raises(UserError, match="Check that the disk"), replaced_together([tmp_path / "a.txt", tmp_path / "b.txt"]) as temporaries:
        for temporary in temporaries:
            temporary.write_text("x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["read", "read voxels", "write"])
def test_letters_that_itk_may_not_open_on_windows_are_named(tmp_path, monkeypatch, kind):
    path = tmp_path / "größe.nrrd"
    write_volume(a_volume(), path)
    if kind == "write":
        monkeypatch.setattr("NMSWSegment.files.volume._check_written", lambda *_: (_ for _ in ()).throw(RuntimeError("not there")))
    else:
        path.write_bytes(path.read_bytes()[: -20 if kind == "read voxels" else 9])
    for platform in ("win32", "linux"):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(UserError, match="damaged|disk is not full") as error:
            write_volume(a_volume(), path) if kind == "write" else read_volume(path)
        assert ("try a folder with plain letters" in str(error.value)) == (platform == "win32")


def test_dicom_folder_is_read_without_its_hidden_files(tmp_path):
    array = write_dicom(tmp_path, positions_mm=[0, 2.5, 5])
    for path in list(tmp_path.iterdir()):
        (tmp_path / f"._{path.name}").write_bytes(path.read_bytes())
    assert np.array_equal(read_volume(tmp_path).array, array)
