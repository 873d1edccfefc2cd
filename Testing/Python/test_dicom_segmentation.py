"""DICOM SEG: what is written, read back with highdicom, pydicom and dcmqi; left and right; and what is refused."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

pytest.importorskip("highdicom", reason="the extra dicom is not installed")
import highdicom
import pydicom
from conftest import turned
from dicom_folders import FRAME_UID, STUDY_UID, write_ct_series
from hostile import an_enhanced_object, save

from NMSWSegment.__main__ import main
from NMSWSegment.files import dicom_segmentation, phantoms
from NMSWSegment.files.dicom_segmentation import Algorithm, check_dicom_export, export_dicom_seg
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.volume import Volume, read_volume, series_files, series_of_folder
from NMSWSegment.protocol import UserError

LABELS = coded_labels(["vertebrae", "kidney_left", "kidney_right", "spleen", "liver"])
ALGORITHM = Algorithm(name="NMSWSegment torso-unet", version="0.1.0", parameters={"model_sha256": "ab" * 32, "k": "10"})
# A small left kidney, a large right kidney, a liver in front: labels 2, 3, 5 of LABELS; centers and radii, RAS mm.
ORGANS = {2: ((-40.0, -10.0, 5.0), (9.0, 10.0, 14.0)), 3: ((45.0, -12.0, -6.0), (14.0, 12.0, 20.0)), 5: ((20.0, 30.0, 25.0), (30.0, 14.0, 12.0))}
GRIDS = {
    "upright": ((5.0, 2.0, 2.5), (30, 60, 64), {"degrees": (0.0, 0.0, 0.0), "mirror": (-1, -1, 1)}),
    "oblique": ((5.0, 2.0, 2.5), (30, 60, 64), {"degrees": (15.0, -10.0, 8.0), "mirror": (-1, -1, 1)}),
    "feet first, coronal": ((4.0, 3.0, 2.5), (36, 44, 64), {"degrees": (0.0, 0.0, 0.0), "mirror": (-1, 1, -1), "permutation": (0, 2, 1)}),
}


def a_case(name: str) -> tuple[Volume, Volume]:
    """Volume in HU and labelmap of a body with an asymmetric content."""
    spacing_mm, shape, how = GRIDS[name]
    ijk_to_ras = turned(spacing_mm, shape, **how)
    # DICOM planes are right-handed: i x j = k.
    if np.linalg.det(ijk_to_ras[:3, :3]) < 0:
        ijk_to_ras[:3, 2] *= -1
        ijk_to_ras[:3, 3] = -ijk_to_ras[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    k, j, i = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    points = np.stack([i, j, k], axis=-1) @ ijk_to_ras[:3, :3].T + ijk_to_ras[:3, 3]
    labels = np.zeros(shape, np.uint8)
    for value, (center, radii) in ORGANS.items():
        labels[(((points - center) / radii) ** 2).sum(-1) <= 1] = value
    intensities = np.where(labels > 0, 40 + 30 * labels.astype(int), -1000).astype(np.int16)
    return Volume(intensities, ijk_to_ras), Volume(labels, ijk_to_ras)


def center_ras(labelmap: Volume, value: int) -> np.ndarray:
    """Center of mass of a label."""
    ijk = np.array([index.mean() for index in np.nonzero(labelmap.array == value)[::-1]])
    return labelmap.ijk_to_ras[:3, :3] @ ijk + labelmap.ijk_to_ras[:3, 3]


@pytest.fixture(scope="module", params=GRIDS)
def an_export(request, tmp_path_factory):
    """(folder of the source, file, labelmap on the grid that read_volume gives)."""
    folder = tmp_path_factory.mktemp("dicom")
    volume, labelmap = a_case(request.param)
    write_ct_series(volume, folder / "ct")
    found = read_volume(folder / "ct")
    np.testing.assert_array_equal(found.array, volume.array)
    np.testing.assert_allclose(found.ijk_to_ras, volume.ijk_to_ras, atol=1e-4)
    export_dicom_seg(labelmap, folder / "ct", folder / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)
    return folder / "ct", folder / "seg.dcm", labelmap


def test_dicom_seg_names_the_patient_the_study_and_every_slice(an_export):
    source, path, labelmap = an_export
    dataset = pydicom.dcmread(path)
    assert (dataset.Modality, dataset.SegmentationType, dataset.SOPClassUID) == ("SEG", "BINARY", "1.2.840.10008.5.1.4.1.1.66.4")
    assert (str(dataset.PatientName), dataset.PatientID, dataset.PatientSex, dataset.PatientBirthDate) == ("Müller^Anna", "P-17", "F", "19600229")
    assert (dataset.StudyInstanceUID, dataset.FrameOfReferenceUID, dataset.StudyDate) == (STUDY_UID, FRAME_UID, "20240131")
    instances = {pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in source.iterdir()}
    series = dataset.ReferencedSeriesSequence[0]
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == instances
    assert series.SeriesInstanceUID == next(iter(instances)).rpartition(".")[0] and series.SeriesInstanceUID != dataset.SeriesInstanceUID
    used = {frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID for frame in dataset.PerFrameFunctionalGroupsSequence}
    assert used <= instances and len(used) == np.count_nonzero(labelmap.array.any(axis=(1, 2)))


def test_dicom_seg_has_codes_sides_colors_and_the_algorithm(an_export):
    segments = pydicom.dcmread(an_export[1]).SegmentSequence
    assert [segment.SegmentNumber for segment in segments] == [1, 2, 3]
    assert [segment.SegmentLabel for segment in segments] == ["left kidney", "right kidney", "liver"]
    types = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in segments]
    assert [(code.CodingSchemeDesignator, code.CodeValue) for code in types] == [("SCT", "64033007"), ("SCT", "64033007"), ("SCT", "10200004")]
    sides = [code.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning for code in types[:2]]
    assert sides == ["Left", "Right"] and "SegmentedPropertyTypeModifierCodeSequence" not in types[2]
    identification = segments[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (identification.AlgorithmName, identification.AlgorithmVersion) == ("NMSWSegment torso-unet", "0.1.0")
    assert identification.AlgorithmParameters == f"model_sha256={'ab' * 32},k=10"
    assert {segment.SegmentAlgorithmType for segment in segments} == {"AUTOMATIC"}
    for segment, label in zip(segments, (LABELS[1], LABELS[2], LABELS[4])):
        rgb = highdicom.color.CIELabColor(*_lab(segment.RecommendedDisplayCIELabValue)).to_rgb()
        np.testing.assert_allclose(rgb, label.color, atol=3)


def _lab(stored) -> tuple[float, float, float]:
    """L*, a*, b* of the unsigned integers in a file (PS3.3 C.10.7.1.1)."""
    light, a, b = (int(value) / 65535 for value in stored)
    return light * 100, a * 255 - 128, b * 255 - 128


def test_dicom_seg_read_by_highdicom_has_every_voxel(an_export):
    _, path, labelmap = an_export
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True)
    # highdicom has the slice axis first: (k, j, i) -> LPS
    kji_to_ras = np.diag([-1, -1, 1, 1]) @ volume.affine
    number_by_value = {2: 1, 3: 2, 5: 3}
    for value, number in number_by_value.items():
        found = np.stack(np.nonzero(volume.array == number), axis=-1) @ kji_to_ras[:3, :3].T + kji_to_ras[:3, 3]
        expected = np.stack(np.nonzero(labelmap.array == value)[::-1], axis=-1) @ labelmap.ijk_to_ras[:3, :3].T + labelmap.ijk_to_ras[:3, 3]
        assert len(found) == len(expected) > 100
        order = [np.lexsort(np.round(points, 2).T) for points in (found, expected)]
        np.testing.assert_allclose(found[order[0]], expected[order[1]], atol=1e-2)


def test_dicom_seg_read_by_dcmqi_has_left_and_right_in_place(an_export, tmp_path):
    _, path, labelmap = an_export
    found = read_by_dcmqi(path, tmp_path)
    assert [item["SegmentLabel"] for item, _ in found] == ["left kidney", "right kidney", "liver"]
    assert [item.get("SegmentedPropertyTypeModifierCodeSequence", {}).get("CodeMeaning") for item, _ in found] == ["Left", "Right", None]
    for number, (value, (_, found_ras)) in enumerate(zip((2, 3, 5), found), start=1):
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"{number}.nrrd")))
        assert np.count_nonzero(array) == np.count_nonzero(labelmap.array == value)
        np.testing.assert_allclose(found_ras, center_ras(labelmap, value), atol=0.02)
        np.testing.assert_allclose(found_ras, ORGANS[value][0], atol=0.7)


def read_by_dcmqi(path: Path, folder: Path) -> list[tuple[dict, np.ndarray]]:
    """Attributes and center of mass (RAS mm) of every segment, read by a program that shares nothing with highdicom."""
    pytest.importorskip("dcmqi", reason="the test extra dcmqi is not installed")
    command = "import sys, dcmqi; sys.exit(dcmqi._program('segimage2itkimage', sys.argv[1:]))"
    words = ["--inputDICOM", str(path), "--outputDirectory", str(folder), "--outputType", "nrrd"]
    done = subprocess.run([sys.executable, "-c", command, *words], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    segments = []
    for number, item in enumerate(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["segmentAttributes"], start=1):
        image = sitk.ReadImage(str(folder / f"{number}.nrrd"))
        ijk = [float(index.mean()) for index in np.nonzero(sitk.GetArrayFromImage(image))[::-1]]
        segments.append((item[0], np.array(image.TransformContinuousIndexToPhysicalPoint(ijk)) * (-1, -1, 1)))  # LPS -> RAS
    return segments


def test_labelmap_with_other_axes_on_the_same_voxels_gives_the_same_segments(an_export, tmp_path):
    source, path, labelmap = an_export
    i_last = labelmap.shape[2] - 1
    other_to_ijk = np.array([[0, 0, -1.0, i_last], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # (j, k, i reversed)
    other = Volume(np.ascontiguousarray(labelmap.array.transpose(2, 0, 1)[::-1]), labelmap.ijk_to_ras @ other_to_ijk)
    np.testing.assert_allclose(center_ras(other, 3), center_ras(labelmap, 3), atol=1e-9)
    export_dicom_seg(other, sorted(source.iterdir()), tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)  # files in the order of their names
    found, expected = (highdicom.seg.segread(file).get_volume(combine_segments=True) for file in (tmp_path / "seg.dcm", path))
    np.testing.assert_array_equal(found.array, expected.array)
    np.testing.assert_allclose(found.affine, expected.affine)


@pytest.mark.parametrize("fault", ["moved", "cropped", "resampled"])
def test_labelmap_off_the_slices_is_refused(an_export, tmp_path, fault):
    source, _, labelmap = an_export
    array, matrix = labelmap.array, labelmap.ijk_to_ras.copy()
    if fault == "moved":
        matrix[:3, 3] += matrix[:3, 2]
    elif fault == "cropped":
        array = array[1:]
    else:
        matrix[:3, 0] *= 1.02
    with pytest.raises(UserError, match="Segment the series itself"):
        export_dicom_seg(Volume(array, matrix), source, tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)
    assert not list(tmp_path.iterdir())


def test_edited_result_is_semiautomatic(an_export, tmp_path):
    source, _, labelmap = an_export
    export_dicom_seg(labelmap, source, tmp_path / "seg.dcm", labels=LABELS, algorithm=Algorithm(name="x", is_edited=True))
    assert pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"


def test_empty_labelmap_is_refused(an_export, tmp_path):
    source, _, labelmap = an_export
    with pytest.raises(UserError, match="no structure in the result"):
        export_dicom_seg(Volume(labelmap.array * 0, labelmap.ijk_to_ras), source, tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)


def test_anonymized_headers_without_a_patient_still_give_a_segmentation(tmp_path):
    volume, labelmap = a_case("upright")
    without = (
        "PatientName",
        "PatientID",
        "PatientSex",
        "PatientBirthDate",
        "AccessionNumber",
        "StudyID",
        "StudyDate",
        "StudyTime",
        "SeriesNumber",
        "RescaleType",
        "SliceThickness",
    )
    write_ct_series(volume, tmp_path / "ct", without=without)
    export_dicom_seg(labelmap, tmp_path / "ct", tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (dataset.PatientName, dataset.StudyInstanceUID, dataset.SeriesNumber) == ("", STUDY_UID, 1000)


@pytest.mark.parametrize(
    ("without", "instead", "sentence"),
    [
        (("FrameOfReferenceUID",), {}, "30 of 30 files of the DICOM series have no Frame of Reference UID"),
        ((), {"FrameOfReferenceUID": ""}, "30 of 30 files of the DICOM series have no Frame of Reference UID"),
        (("StudyInstanceUID",), {}, "30 of 30 files of the DICOM series have no Study Instance UID"),
        ((), {"StudyInstanceUID": ""}, "30 of 30 files of the DICOM series have no Study Instance UID"),
        (("SOPInstanceUID",), {}, "30 of 30 files of the DICOM series have no SOP Instance UID"),
        (("SOPClassUID",), {}, "30 of 30 files of the DICOM series have no SOP Class UID"),
        ((), {"SOPInstanceUID": "1.2.3.4"}, "30 files of the DICOM series have the same SOP Instance UID '1.2.3.4'"),
    ],
)
def test_headers_that_nothing_can_refer_to_are_refused_before_the_run(tmp_path, without, instead, sentence):
    volume, labelmap = a_case("upright")
    write_ct_series(volume, tmp_path / "ct", without=without, instead=instead)
    check_dicom_export(tmp_path / "ct", with_headers=False)
    for ask in (
        lambda: check_dicom_export(tmp_path / "ct"),
        lambda: check_dicom_export(sorted((tmp_path / "ct").iterdir())),
        lambda: export_dicom_seg(labelmap, tmp_path / "ct", tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM),
    ):
        with pytest.raises(UserError, match=f"{sentence}.*Export the original series again, or write .seg.nrrd"):
            ask()


def test_command_line_refuses_an_empty_study_uid_before_the_run(tmp_path, a_tiny_bundle, monkeypatch, capfd):
    volume, _ = a_case("upright")
    write_ct_series(volume, tmp_path / "ct", instead={"StudyInstanceUID": ""})
    monkeypatch.setattr("NMSWSegment.command_line.export_dicom_seg", None)  # it is asked after the run
    assert main(["segment", str(tmp_path / "ct"), "-o", str(tmp_path / "seg.dcm"), "--bundle", str(a_tiny_bundle)]) == 2
    assert "no Study Instance UID" in capfd.readouterr().err


def test_series_that_is_not_chosen_yet_passes_the_check_before_the_run(tmp_path):
    volume, _ = a_case("upright")
    write_ct_series(volume, tmp_path / "ct", series_uid="1.2.3")
    write_ct_series(Volume(volume.array[:20], volume.ijk_to_ras), tmp_path / "ct", series_uid="1.2.4", instead={"SOPInstanceUID": "1.2.3.4"})
    check_dicom_export(tmp_path / "ct")
    check_dicom_export(tmp_path / "ct", series_uid="1.2.3")
    with pytest.raises(UserError, match="20 files of the DICOM series have the same SOP Instance UID"):
        check_dicom_export(tmp_path / "ct", series_uid="1.2.4")


@pytest.mark.parametrize("thickness", ["", "0"])
def test_empty_slice_thickness_becomes_the_spacing_between_slices(tmp_path, thickness):
    volume, labelmap = a_case("oblique")
    write_ct_series(volume, tmp_path / "ct", instead={"SliceThickness": thickness})
    export_dicom_seg(labelmap, tmp_path / "ct", tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == pytest.approx(5.0, abs=1e-4)
    assert np.count_nonzero(found.get_volume(combine_segments=True).array) == np.count_nonzero(labelmap.array)


def test_files_without_a_preamble_give_a_segmentation(tmp_path):
    volume, labelmap = a_case("upright")
    write_ct_series(volume, tmp_path / "ct")
    for path in (tmp_path / "ct").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[data.index(struct.pack("<HH", 8, 5), 132) :])
    check_dicom_export(tmp_path / "ct")
    export_dicom_seg(labelmap, tmp_path / "ct", tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert (found.StudyInstanceUID, found.PatientName) == (STUDY_UID, "Müller^Anna")
    assert np.count_nonzero(found.get_volume(combine_segments=True).array) == np.count_nonzero(labelmap.array)


@pytest.mark.parametrize(("number", "expected"), [("3", 1003), ("2147482647", 2147483647), ("2147482648", 1000), ("2147483647", 1000), ("-2000", 1000)])
def test_series_number_stays_in_the_range_of_an_integer_string(tmp_path, number, expected):
    volume, labelmap = a_case("upright")
    write_ct_series(volume, tmp_path / "ct", instead={"SeriesNumber": number})
    export_dicom_seg(labelmap, tmp_path / "ct", tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)
    assert pydicom.dcmread(tmp_path / "seg.dcm").SeriesNumber == expected


def write_enhanced(folder: Path, *, parts) -> Volume:
    """A series of 12 slices in multi-frame files of the frames [start, stop); returns a labelmap with a block of liver on it."""
    stored = np.random.default_rng(0).integers(0, 2000, (12, 9, 8)).astype(np.uint16)
    for number, (start, stop) in enumerate(parts, start=1):
        found = an_enhanced_object(stored[start:stop], positions_mm=np.arange(start, stop) * 2.5, number=number)
        found.FrameOfReferenceUID = FRAME_UID
        save(found, folder / f"{number}.dcm")
    volume = read_volume(folder)
    array = np.zeros(volume.shape, np.uint8)
    array[3:9, 2:5, 1:3] = 5
    return Volume(array, volume.ijk_to_ras)


def test_multi_frame_file_gives_a_segmentation(tmp_path):
    labelmap = write_enhanced(tmp_path / "ct", parts=[(0, 12)])
    check_dicom_export(tmp_path / "ct")
    export_dicom_seg(labelmap, tmp_path / "ct", tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert (found.NumberOfFrames, np.count_nonzero(found.pixel_array)) == (6, 36)


def test_series_in_two_multi_frame_files_is_told_to_give_one_of_them(tmp_path):
    labelmap = write_enhanced(tmp_path / "ct", parts=[(0, 6), (6, 12)])
    with pytest.raises(UserError, match="lies in 2 multi-frame files.*Give a folder with one of them"):
        check_dicom_export(tmp_path / "ct")
    with pytest.raises(UserError, match="lies in 2 multi-frame files.*Give a folder with one of them"):
        export_dicom_seg(labelmap, tmp_path / "ct", tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)


def test_series_is_chosen_by_its_uid(tmp_path):
    volume, _ = a_case("upright")
    low = Volume(volume.array[:20], volume.ijk_to_ras)
    uids = write_ct_series(volume, tmp_path / "ct", series_uid="1.2.3"), write_ct_series(low, tmp_path / "ct", series_uid="1.2.4", description="Liver")
    assert [(info.uid, info.description, info.num_slices) for info in series_of_folder(tmp_path / "ct")] == [
        ("1.2.3", "Thorax 2.5", 30),
        ("1.2.4", "Liver", 20),
    ]
    with pytest.raises(UserError, match=r"2 image series: .*'Liver' \(20 slices, UID 1.2.4\).*--series UID"):
        read_volume(tmp_path / "ct")
    assert read_volume(tmp_path / "ct", series_uid=uids[1]).shape == low.shape
    assert len(series_files(tmp_path / "ct", series_uid=uids[0])) == 30
    with pytest.raises(UserError, match=r"no image series with the UID '1.2.5'. It has: .*UID 1.2.3"):
        read_volume(tmp_path / "ct", series_uid="1.2.5")
    with pytest.raises(UserError, match="leave --series out"):
        read_volume(phantoms.__file__, series_uid="1.2.3")


def test_dicom_output_of_a_nifti_file_is_refused_before_the_run(tmp_path, a_tiny_bundle, capfd):
    (tmp_path / "ct.nii.gz").write_bytes(b"")
    assert main(["segment", str(tmp_path / "ct.nii.gz"), "-o", str(tmp_path / "seg.dcm"), "--bundle", str(a_tiny_bundle)]) == 2
    assert "refers to the DICOM images it was made from" in capfd.readouterr().err


def test_missing_highdicom_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_segmentation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Install it with: pip install highdicom"):
        dicom_segmentation.check_dicom_export(tmp_path)


def test_command_line_segments_a_series_into_dicom_seg(tmp_path, a_tiny_bundle, capfd):
    shape = (30, 24, 34)
    ijk_to_ras = np.diag([-10.0, -10.0, 9.0, 1.0])
    ijk_to_ras[:3, 3] = 165, 115, -130
    volume, _ = phantoms.phantom(shape, ijk_to_ras=ijk_to_ras)
    write_ct_series(volume, tmp_path / "ct", series_uid="1.2.3")
    write_ct_series(Volume(volume.array[:9], ijk_to_ras), tmp_path / "ct", series_uid="1.2.4")
    words = ["segment", str(tmp_path / "ct"), "-o", str(tmp_path / "seg.dcm"), "--bundle", str(a_tiny_bundle), "--device", "cpu", "--threads", "1", "--k", "2"]
    assert main(words) == 2
    assert "UID 1.2.3" in capfd.readouterr().err
    assert main([*words, "--series", "1.2.3"]) == 0
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [segment.SegmentLabel for segment in dataset.SegmentSequence] == ["liver", "spleen", "vertebrae"]
    identification = dataset.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert identification.AlgorithmName == "NMSWSegment tiny" and "k=2,policy=greedy,patches=2" in identification.AlgorithmParameters


def test_headers_of_a_real_scanner_are_referred_to(tmp_path):
    """The CT series among pydicom's own test files: headers of a real scanner, pixels cut to 16 x 16."""
    source = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests" / "98892001" / "CT5N"
    if not source.is_dir():
        pytest.skip("this pydicom comes without its test files")
    volume = read_volume(source)
    array = np.zeros(volume.shape, np.uint8)
    array[1:, 3:9, 10:] = 5
    labelmap = Volume(array, volume.ijk_to_ras)
    export_dicom_seg(labelmap, source, tmp_path / "seg.dcm", labels=LABELS, algorithm=ALGORITHM)
    dataset, images = pydicom.dcmread(tmp_path / "seg.dcm"), [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(source.iterdir())]
    assert (dataset.PatientName, dataset.PatientID, dataset.StudyInstanceUID) == (images[0].PatientName, images[0].PatientID, images[0].StudyInstanceUID)
    assert (
        dataset.FrameOfReferenceUID == images[0].FrameOfReferenceUID and len(dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == len(images) == 5
    )
    assert dataset.NumberOfFrames == 4
    found = read_by_dcmqi(tmp_path / "seg.dcm", tmp_path)
    assert [item["SegmentLabel"] for item, _ in found] == ["liver"]
    np.testing.assert_allclose(found[0][1], center_ras(labelmap, 5), atol=0.02)
