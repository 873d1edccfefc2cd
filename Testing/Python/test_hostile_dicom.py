"""DICOM folders as they should not be: the right volume, or one sentence that says what to do."""

import os
import shutil
import struct
import sys

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="pydicom is not installed")

from hostile import SHAPE, a_slice, an_enhanced_object, save, voxels, write_slices  # noqa: E402

from NMSWSegment.files.dicom_file import read_header  # noqa: E402
from NMSWSegment.files.volume import open_volume, read_volume, series_files, series_of_folder  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402

EXPECTED_PLACE = np.array([[-0.7, 0, 0, -10], [0, -0.9, 0, 20], [0, 0, 2.5, 0], [0, 0, 0, 1]])


def set_in(index: int, **values):
    """A change of one slice; None removes the element."""

    def change(found, at):
        if at == index:
            for key, value in values.items():
                if value is None:
                    delattr(found, key)
                else:
                    setattr(found, key, value)

    return change


def set_in_all(**values):
    """A change of all slices."""
    return lambda found, at: set_in(at, **values)(found, at)


def set_position(position_mm):
    """A change of all positions, to LPS position_mm(index)."""
    return lambda found, at: set_in(at, ImagePositionPatient=[float(value) for value in position_mm(at)])(found, at)


def set_num_frames(path, text: bytes):
    """Put any text into the number of frames of a file."""
    data, tag = path.read_bytes(), b"\x28\0\x08\0IS"
    at = data.index(tag, 132) + len(tag)
    text += b" " * (len(text) % 2)
    path.write_bytes(data[:at] + struct.pack("<H", len(text)) + text + data[at + 2 + struct.unpack_from("<H", data, at)[0] :])


def check_right(found, array, *, place=EXPECTED_PLACE):
    """The volume has its voxels and lies where it should."""
    assert not isinstance(found, UserError), found
    np.testing.assert_allclose(found.array, array, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.ijk_to_ras, place, atol=1e-5)


def test_series_is_right(tmp_path, tally):
    array = write_slices(tmp_path / "ct")
    file = open_volume(tmp_path / "ct")
    assert (file.modality, file.shape, file.bytes_per_voxel) == ("CT", SHAPE, 2)
    check_right(tally(file.read), array)


ORIENTATION, POSITION = "ImageOrientationPatient", "ImagePositionPatient"
REFUSED = {
    "last slice without position": (set_in(5, **{POSITION: None}), "1 of 6 slices of series 'Thorax' have no position"),
    "last slice with an empty position": (set_in(5, **{POSITION: ""}), "1 of 6 slices of series 'Thorax' have no position"),
    "no slice with a position": (set_in_all(**{POSITION: None}), "do not say where they lie"),
    "no pixel spacing": (set_in_all(PixelSpacing=None), "6 of 6 slices.*no pixel size"),
    "one slice without pixel spacing": (set_in(2, PixelSpacing=None), "1 of 6 slices.*no pixel size"),
    "pixel spacing 0": (set_in_all(PixelSpacing=[0, 0]), "size 0 x 0 mm"),
    "pixel spacing below 0": (set_in_all(PixelSpacing=[-1, 1]), "size -1 x 1 mm"),
    "pixel spacing different in one slice": (set_in(3, PixelSpacing=[1.8, 1.4]), "several sizes: 0.9 x 0.7 mm and 1.8 x 1.4 mm"),
    "orientation zero": (set_in_all(**{ORIENTATION: [0] * 6}), "not at right angles or not of length 1"),
    "orientation not at right angles": (set_in_all(**{ORIENTATION: [1, 0, 0, 0.5, 0.866, 0]}), "not at right angles"),
    "orientation missing": (set_in_all(**{ORIENTATION: None}), "no direction"),
    "orientation different in one slice": (set_in(3, **{ORIENTATION: [0, 1, 0, 1, 0, 0]}), "differ in size or direction"),
    "more rows than data": (set_in(2, Rows=9), "9 x 8 pixels, which are 144 bytes, and holds 112"),
    "more rows than data in all slices": (set_in_all(Rows=60000), "Export the series again"),
    "no rows": (set_in(2, Rows=0), "0 rows"),
    "a negative": (set_in_all(PhotometricInterpretation="MONOCHROME1"), "MONOCHROME1.*Export it as MONOCHROME2"),
    "color": (set_in_all(PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0, Rows=7, Columns=2, BitsAllocated=8), "in color"),
    "slope 0": (set_in(1, RescaleSlope=0), "multiplied by 0"),
    "one slice smaller": (set_in(2, Rows=5), "differ in size or direction"),
    "two slices at one place": (set_in(2, **{POSITION: [10, -20, 2.5]}), "places where it already has one|misses"),
    "slice missing": (lambda found, at: at != 3, "misses about 1 of its slices"),
    "12 bits below bit 15": (set_in_all(BitsStored=12, HighBit=15), "12 bits, the highest of which is bit 15 instead of bit 11.*Export the series again"),
    "12 bits below bit 15 in one slice": (set_in(4, BitsStored=12, HighBit=15), "004.dcm' have 12 bits"),
    "unknown number of bits below bit 11": (set_in_all(BitsStored=None, HighBit=11), "16 bits, the highest of which is bit 11 instead of bit 15"),
    "one slice of another modality": (set_in(3, Modality="MR"), "several modalities: 5 of CT, 1 of MR.*a folder of its own"),
    "place far away": (set_in_all(**{POSITION: [1e30, 0, 0]}), "places where it already has one|lies at"),
}


@pytest.mark.parametrize("symptom", REFUSED)
def test_series_is_refused_with(tmp_path, tally, capfd, symptom):
    change, sentence = REFUSED[symptom]
    write_slices(tmp_path / "ct", change=change)
    error = tally(lambda: read_volume(tmp_path / "ct"))
    assert isinstance(error, UserError), "it was read"
    with pytest.raises(UserError, match=sentence):
        raise error
    assert capfd.readouterr() == ("", "")


def test_first_slice_does_not_decide_how_the_others_are_rescaled(tmp_path, tally):
    slopes, intercepts = [1, 1, 0.5, 2, 1.25, 1], [0, -1024, -1000.5, 0, -3000, -40000]

    def change(found, at):
        found.RescaleSlope, found.RescaleIntercept = slopes[at], intercepts[at]

    array = write_slices(tmp_path / "ct", change=change)
    expected = np.stack([(piece + 1024.0) * slope + intercept for piece, slope, intercept in zip(array, slopes, intercepts)])
    check_right(tally(lambda: read_volume(tmp_path / "ct")), expected)


@pytest.mark.parametrize("values", [{"HighBit": None}, {"BitsStored": None}, {"BitsStored": 12, "HighBit": 11}, {"BitsStored": 12, "HighBit": None}])
def test_slices_that_say_little_about_their_bits_are_right(tmp_path, tally, values):
    array = write_slices(tmp_path / "ct", change=set_in_all(**values))
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


def test_middle_slices_shifted_sideways_are_refused(tmp_path, tally):
    write_slices(tmp_path / "ct", change=set_position(lambda at: (50 if 2 <= at < 4 else 10, -20, 2.5 * at)))
    assert "up to 40.0 mm off the straight line" in (text := str(tally(lambda: read_volume(tmp_path / "ct")))) and "Export only the slices of one stack" in text


def test_slices_shifted_sideways_by_rounding_are_right(tmp_path, tally):
    array = write_slices(tmp_path / "ct", change=set_position(lambda at: (10 + 0.1 * (at in (2, 3)), -20 + 0.05 * at, 2.5 * at)))
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


def test_spacing_that_changes_by_nine_percent_halfway_is_refused(tmp_path, tally):
    write_slices(tmp_path / "ct", num_slices=41, change=set_position(lambda at: (10, -20, 3 * at if at <= 20 else 60 + 3.28 * (at - 20))))
    # Slice 21 lies at 60.0 mm; 40 gaps of (60 + 65.6) / 40 = 3.14 mm would have it at 62.8 mm.
    text = str(tally(lambda: read_volume(tmp_path / "ct")))
    assert "slice 21 of 41 lies 2.8 mm from its place at an even spacing of 3.14 mm" in text and "Export a series with even spacing" in text


def test_positions_rounded_to_a_tenth_are_right(tmp_path, tally):
    array = write_slices(tmp_path / "ct", num_slices=41, change=set_position(lambda at: (10, -20, round(2.53 * at, 1))))
    place = EXPECTED_PLACE.copy()
    place[2, 2] = 2.53
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array, place=place)


def test_two_phases_half_a_slice_apart_are_refused(tmp_path, tally):
    write_slices(tmp_path / "ct", change=lambda found, at: set_in(at, AcquisitionNumber=at % 2 + 1)(found, at))
    text = str(tally(lambda: read_volume(tmp_path / "ct")))
    assert "alternate between 2 acquisitions (Acquisition Number 1, 2)" in text and text.endswith("Export one acquisition only.")


@pytest.mark.parametrize(
    ("numbers", "modality"),
    [
        ([1, 1, 1, 2, 2, 2], "CT"),
        ([1, 1, 2, 2, 3, 3], "CT"),
        ([6, 5, 4, 3, 2, 1], "CT"),
        ([1, 1, 2, 1, 2, 2], "CT"),
        ([1, "", 1, "", 1, ""], "CT"),
        ([1, 2, 1, 2, 1, 2], "MR"),
    ],
)
def test_acquisitions_of_one_volume_are_right(tmp_path, tally, numbers, modality):
    array = write_slices(tmp_path / "ct", change=lambda found, at: set_in(at, AcquisitionNumber=numbers[at], Modality=modality)(found, at))
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


@pytest.mark.parametrize("values", [{}, {"AcquisitionNumber": 1}])
def test_series_of_two_slices_is_right(tmp_path, tally, values):
    array = write_slices(tmp_path / "ct", num_slices=2, change=set_in_all(**values))
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


@pytest.mark.parametrize("index", [0, 5])
def test_end_slice_with_another_description_is_not_dropped(tmp_path, tally, index):
    write_slices(tmp_path / "ct", change=set_in(index, SeriesDescription="Other"))
    text = str(tally(lambda: read_volume(tmp_path / "ct")))
    assert "'Thorax' (5 slices, UID 1.2.3)" in text and "'Other' (1 slices, UID 1.2.3)" in text and "a folder of its own" in text


@pytest.mark.parametrize(
    "values",
    [
        {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        {"Modality": "SR"},
        {"SeriesDescription": "Coronal", "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]},
        {"SeriesDescription": "Screen", "ImagePositionPatient": None, "ImageOrientationPatient": None},
        {"SeriesDescription": "Other", "SeriesInstanceUID": "1.2.8"},
    ],
)
def test_scouts_and_documents_beside_the_slices_are_passed_over(tmp_path, tally, values):
    array = write_slices(tmp_path / "ct", change=set_in(5, **values))
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array[:5])


def test_slice_that_does_not_say_its_modality_is_right(tmp_path, tally):
    array = write_slices(tmp_path / "ct", change=set_in(3, Modality=""))
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


@pytest.mark.parametrize("text", [b"nan", b"inf", b"-inf", b"1e400", b"1e300", b"1.5", b"-1", b"0"])
def test_number_of_frames_that_is_none_is_refused(tmp_path, tally, text):
    write_slices(tmp_path / "ct", change=set_in_all(NumberOfFrames=1))
    set_num_frames(tmp_path / "ct" / "002.dcm", text)
    assert f"{text.decode()} frames" in (found := str(tally(lambda: read_volume(tmp_path / "ct")))) or f"number of frames is '{text.decode()}'" in found


@pytest.mark.parametrize("text", [b"", b"1", b"1.0", b"+1 "])
def test_number_of_frames_that_means_one_is_right(tmp_path, tally, text):
    array = write_slices(tmp_path / "ct", change=set_in_all(NumberOfFrames=1))
    set_num_frames(tmp_path / "ct" / "002.dcm", text)
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


def test_two_patients_with_empty_uids_are_two_series(tmp_path, tally):
    for name in ("A", "B"):
        values = {"PatientID": "", "PatientName": name, "StudyInstanceUID": "", "SeriesInstanceUID": ""}
        move = {"A": 0, "B": 15}[name]

        def change(found, at, values=values, move=move):
            set_in(at, **values, ImagePositionPatient=[10, -20, 2.5 * at + move])(found, at)

        write_slices(tmp_path / "ct", change=change, prefix=name)
    assert "2 image series" in (text := str(tally(lambda: read_volume(tmp_path / "ct")))) and "folder of its own" in text


def test_series_is_chosen_by_its_uid(tmp_path, tally):
    first, second = (write_slices(tmp_path / "ct", series=uid, prefix=uid, num_slices=count) for uid, count in (("1.2.3", 6), ("1.2.4", 5)))
    assert "Choose one with --series UID" in str(tally(lambda: read_volume(tmp_path / "ct")))
    check_right(tally(lambda: read_volume(tmp_path / "ct", series_uid="1.2.4")), second)
    assert "has no image series with the UID '9'" in str(tally(lambda: read_volume(tmp_path / "ct", series_uid="9")))
    assert [(info.uid, info.num_slices) for info in series_of_folder(tmp_path / "ct")] == [("1.2.3", 6), ("1.2.4", 5)]
    assert [path.name for path in series_files(tmp_path / "ct", series_uid="1.2.3")] == [f"1.2.3{index:03d}.dcm" for index in range(6)]


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_uncompressed_transfer_syntaxes_are_right(tmp_path, tally, syntax):
    from pydicom import dcmwrite

    is_implicit, is_big = syntax.endswith(".1.2"), syntax.endswith("1.2.2")
    array = voxels()
    (tmp_path / "ct").mkdir()
    for index in range(len(array)):
        found = a_slice(index, array=array[index])
        found.file_meta.TransferSyntaxUID = syntax
        if is_big:
            found.PixelData = (array[index] + 1024).astype(">u2").tobytes()
        dcmwrite(tmp_path / "ct" / f"{index}.dcm", found, implicit_vr=is_implicit, little_endian=not is_big)
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


def test_compressed_slices_are_right(tmp_path, tally):
    def change(found, at):
        found.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)  # RLE

    array = write_slices(tmp_path / "ct", change=change, size=(63, 64))  # GDCM cannot read smaller ones
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


def test_bare_data_sets_without_a_preamble_are_right(tmp_path, tally):
    array = write_slices(tmp_path / "ct")
    for path in (tmp_path / "ct").iterdir():
        data = path.read_bytes()
        start = data.index(struct.pack("<HH", 8, 8), 132)
        path.write_bytes(data[start:])
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


# --- enhanced objects ---------------------------------------------------------------------------------------------


STORED = (voxels(seed=4) + 1024).astype(np.uint16)


def test_enhanced_object_has_the_places_of_its_frames(tmp_path, tally):
    save(an_enhanced_object(STORED, positions_mm=np.arange(6) * 2.5), tmp_path / "ct" / "a.dcm")
    check_right(tally(lambda: read_volume(tmp_path / "ct")), STORED.astype(int) - 1024)


def test_enhanced_object_with_shuffled_frames_is_sorted(tmp_path, tally):
    order = [3, 0, 5, 1, 4, 2]
    save(an_enhanced_object(STORED[order], positions_mm=np.array(order) * 2.5), tmp_path / "ct" / "a.dcm")
    check_right(tally(lambda: read_volume(tmp_path / "ct")), STORED.astype(int) - 1024)


@pytest.mark.parametrize(
    ("positions_mm", "sentence"),
    [
        ([0, 2.5, 5, 10, 12.5, 15], "misses about 1"),
        ([0, 2.5, 5, 5, 7.5, 10], "already has one"),
        ([0] * 6, "already has one"),
        ([0, 1, 3, 4, 6, 7], "misses|uneven"),
    ],
)
def test_enhanced_object_with_missing_or_doubled_frames_is_refused(tmp_path, tally, positions_mm, sentence):
    save(an_enhanced_object(STORED, positions_mm=positions_mm), tmp_path / "ct" / "a.dcm")
    with pytest.raises(UserError, match=sentence):
        raise tally(lambda: read_volume(tmp_path / "ct"))


def test_enhanced_object_with_fewer_places_than_frames_is_refused(tmp_path, tally):
    found = an_enhanced_object(STORED, positions_mm=np.arange(6) * 2.5)
    found.PerFrameFunctionalGroupsSequence = found.PerFrameFunctionalGroupsSequence[:4]
    save(found, tmp_path / "ct" / "a.dcm")
    assert "6 frames, and the places of 4" in str(tally(lambda: read_volume(tmp_path / "ct")))


def test_multi_frame_object_without_places_is_refused(tmp_path, tally):
    found = an_enhanced_object(STORED, positions_mm=np.arange(6) * 2.5)
    del found.PerFrameFunctionalGroupsSequence
    del found.SharedFunctionalGroupsSequence
    save(found, tmp_path / "ct" / "a.dcm")
    assert "do not say where they lie" in str(tally(lambda: read_volume(tmp_path / "ct")))


def test_enhanced_object_rescales_every_frame_by_its_own_values(tmp_path, tally):
    slopes, intercepts = [1, 2, 0.5, 1, 1, 3], [-1024, 0, -1000, -500, 7, -2048]
    save(an_enhanced_object(STORED, positions_mm=np.arange(6) * 2.5, slopes=slopes, intercepts=intercepts), tmp_path / "ct" / "a.dcm")
    expected = np.stack([piece * float(slope) + intercept for piece, slope, intercept in zip(STORED, slopes, intercepts)])
    check_right(tally(lambda: read_volume(tmp_path / "ct")), expected)


def test_two_enhanced_files_of_one_series_are_one_volume(tmp_path, tally):
    save(an_enhanced_object(STORED[3:], positions_mm=np.arange(3, 6) * 2.5, number=2), tmp_path / "ct" / "a.dcm")
    save(an_enhanced_object(STORED[:3], positions_mm=np.arange(3) * 2.5, number=1), tmp_path / "ct" / "b.dcm")
    check_right(tally(lambda: read_volume(tmp_path / "ct")), STORED.astype(int) - 1024)


def test_enhanced_object_of_twelve_bits_ignores_what_lies_above_them(tmp_path, tally):
    twelve = STORED & 0x0FFF
    found = an_enhanced_object(twelve | 0xA000, positions_mm=np.arange(6) * 2.5)
    found.BitsStored, found.HighBit = 12, 11
    save(found, tmp_path / "ct" / "a.dcm")
    check_right(tally(lambda: read_volume(tmp_path / "ct")), twelve.astype(int) - 1024)


@pytest.mark.parametrize("intercepts", [[-1024] * 6, [-1024] * 5 + [0]])
def test_compressed_enhanced_object_is_right_or_refused(tmp_path, tally, intercepts):
    found = an_enhanced_object(STORED, positions_mm=np.arange(6) * 2.5, intercepts=intercepts)
    found.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    save(found, tmp_path / "ct" / "a.dcm")
    end = tally(lambda: read_volume(tmp_path / "ct"))
    if len(set(intercepts)) > 1:
        assert "rescaling of its own" in str(end)
    else:
        check_right(end, STORED.astype(int) - 1024)


@pytest.mark.parametrize("without", [("PerFrameFunctionalGroupsSequence",), ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")])
def test_compressed_object_with_a_hundred_million_frames_does_not_hang(tmp_path, tally, without):
    found = an_enhanced_object(STORED, positions_mm=np.arange(6) * 2.5)
    for key in without:
        delattr(found, key)
    found.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    path = save(found, tmp_path / "ct" / "a.dcm")
    set_num_frames(path, b"100000000")
    num_bytes = path.stat().st_size - read_header(path).pixel_offset
    assert f"100000000 frames, and holds {num_bytes} bytes of pixels" in str(tally(lambda: read_volume(tmp_path / "ct")))


# --- what lies in the folder beside the slices --------------------------------------------------------------------


def test_large_file_that_is_no_dicom_is_not_read(tmp_path, tally):
    array = write_slices(tmp_path / "ct")
    with open(tmp_path / "ct" / "backup.tar", "wb") as stream:
        stream.truncate(40 << 30)
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
def test_pipe_in_the_folder_does_not_hang(tmp_path, tally):
    array = write_slices(tmp_path / "ct")
    os.mkfifo(tmp_path / "ct" / "pipe")
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no file names that are not UTF-8")
def test_slice_name_that_is_not_utf8_does_not_abort(tmp_path, tally):
    write_slices(tmp_path / "ct")
    for path in (tmp_path / "ct").iterdir():
        os.rename(path, os.fsencode(tmp_path / "ct") + b"/M\xfcller_" + os.fsencode(path.name))
    text = str(tally(lambda: read_volume(tmp_path / "ct")))
    assert "M\\udcfcller_000.dcm' has characters that are not UTF-8. Rename the file" in text


def test_file_that_may_not_be_read_is_named(tmp_path, tally, monkeypatch):
    write_slices(tmp_path / "ct")
    (tmp_path / "ct" / "notes.txt").write_text("text")

    def refuse(path):
        if path.name == "notes.txt":
            raise PermissionError(13, "Permission denied")
        return read_header(path)

    # Tests may run as root, to whom no file is closed.
    monkeypatch.setattr("NMSWSegment.files.dicom_file.read_header", refuse)
    assert "notes.txt' cannot be read (Permission denied)" in str(tally(lambda: read_volume(tmp_path / "ct")))


def test_folder_that_may_not_be_read_is_named(tmp_path, tally, monkeypatch):
    write_slices(tmp_path / "ct")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    assert "cannot be read (Permission denied)" in str(tally(lambda: read_volume(tmp_path / "ct")))


def test_report_that_somebody_padded_is_passed_over(tmp_path, tally):
    array = write_slices(tmp_path / "ct")
    report = a_slice(0, array=array[0])
    del report.PixelData, report.Rows, report.Columns
    report.Modality, report.SOPClassUID = "SR", "1.2.840.10008.5.1.4.1.1.88.11"
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    path = save(report, tmp_path / "ct" / "report.dcm")
    for padding in (b"\0" * 3, b"\0" * 400):
        path.write_bytes(path.read_bytes() + padding)
        check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


def test_dicomdir_with_icons_is_passed_over(tmp_path, tally):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    array = write_slices(tmp_path / "ct")
    found = a_slice(0, array=array[0])
    icon = Dataset()
    icon.Rows, icon.Columns, icon.BitsAllocated, icon.SamplesPerPixel, icon.PixelData = 4, 4, 8, 1, b"\0" * 16
    record = Dataset()
    record.DirectoryRecordType, record.IconImageSequence = "IMAGE", Sequence([icon])
    directory = type(found)("", {}, file_meta=found.file_meta, preamble=b"\0" * 128)
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.DirectoryRecordSequence = Sequence([record])
    save(directory, tmp_path / "ct" / "DICOMDIR")
    check_right(tally(lambda: read_volume(tmp_path / "ct")), array)


def test_escape_characters_of_a_description_do_not_reach_the_terminal(tmp_path, tally, capsys, a_tiny_bundle):
    from NMSWSegment.__main__ import main

    write_slices(tmp_path / "ct", change=set_in_all(SeriesDescription="\x1b[2J\x1b]0;evil\x07", PixelSpacing=None))
    assert main(["segment", str(tmp_path / "ct"), "-o", str(tmp_path / "l.nii.gz"), "--bundle", str(a_tiny_bundle)]) == 2
    errors = capsys.readouterr().err
    assert "\x1b" not in errors and "\\x1b[2J" in errors


# --- damage -------------------------------------------------------------------------------------------------------


def test_damaged_bytes_of_a_slice_give_the_volume_or_a_sentence(tmp_path, tally, capfd):
    array = write_slices(tmp_path / "whole")
    random = np.random.default_rng(12)
    whole = (tmp_path / "whole" / "002.dcm").read_bytes()
    header_bytes = len(whole) - 112
    shutil.copytree(tmp_path / "whole", tmp_path / "ct")
    for _ in range(150):
        data = bytearray(whole)
        for at in random.integers(0, header_bytes, size=random.integers(1, 4)):
            data[at] = random.integers(256)
        (tmp_path / "ct" / "002.dcm").write_bytes(data)
        found = tally(lambda: read_volume(tmp_path / "ct"))
        if not isinstance(found, UserError):  # a digit of the intercept may have changed, but nothing that concerns the other slices
            assert found.shape == SHAPE and found.spacing_mm == pytest.approx((2.5, 0.9, 0.7))
            np.testing.assert_array_equal(np.delete(found.array, 2, axis=0), np.delete(array, 2, axis=0))
    assert capfd.readouterr() == ("", "")


def test_every_truncation_of_a_slice_is_refused(tmp_path, tally, capfd):
    write_slices(tmp_path / "ct")
    whole = (tmp_path / "ct" / "005.dcm").read_bytes()
    for length in range(140, len(whole), 9):
        (tmp_path / "ct" / "005.dcm").write_bytes(whole[:length])
        assert isinstance(tally(lambda: read_volume(tmp_path / "ct")), UserError), length
    assert capfd.readouterr() == ("", "")


def test_nested_sequences_do_not_exhaust_the_stack(tmp_path, tally):
    write_slices(tmp_path / "ct")
    path = tmp_path / "ct" / "003.dcm"
    data = path.read_bytes()
    at = data.rindex(b"\x28\0\x02\0US")
    opening = b"\x20\0\x11\x91SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
    path.write_bytes(data[:at] + opening * 5000 + data[at:])
    assert "nested too deeply" in str(tally(lambda: read_volume(tmp_path / "ct")))
