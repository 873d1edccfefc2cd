"""The cases of a cohort: what is found where, and under which name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from NMSWSegment.cohort.cases import case_memory_bytes, find_cases
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.volume import Volume, open_volume, read_volume, write_volume
from NMSWSegment.protocol import UserError


@pytest.fixture
def a_folder(tmp_path):
    """Volumes in several layouts, and files that are no cases."""
    volume = Volume(np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16), np.diag([2.0, 2.0, 3.0, 1.0]))
    for name in (
        "b.nii.gz",
        "a.nrrd",
        "s01/ct.nii.gz",
        "s02/ct.nii.gz",
        "s01/segmentations/liver.nii.gz",
        "labelsTr/b.nii.gz",
        "s02/label.nii.gz",
        ".hidden/c.nii.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_volume(volume, tmp_path / name)
    (tmp_path / "a.seg.nrrd").write_bytes((tmp_path / "a.nrrd").read_bytes())
    (tmp_path / "notes.txt").write_text("not a volume")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cohort.json").write_text(json.dumps({"options": {}, "model_sha256": "", "format": "", "pictures": False}))
    write_volume(volume, tmp_path / "results" / "old.nii.gz")
    return tmp_path


def test_folder_is_searched_for_volumes_but_not_for_labels_and_results(a_folder):
    cases = find_cases(a_folder).cases
    assert [(case.name, case.input.relative_to(a_folder).as_posix()) for case in cases] == [
        ("a", "a.nrrd"), ("b", "b.nii.gz"), ("s01_ct", "s01/ct.nii.gz"), ("s02_ct", "s02/ct.nii.gz")
    ]  # fmt: skip


def test_every_dicom_series_is_a_case(tmp_path):
    pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    from dicom_folders import write_ct_series

    volume = Volume(np.zeros((3, 4, 5), np.int16), np.diag([-2.0, -2.0, 3.0, 1.0]))
    write_ct_series(volume, tmp_path / "p1" / "study" / "one", series_uid="1.2.1")
    write_ct_series(volume, tmp_path / "p2", series_uid="1.2.2", description="Lung 1.0/B70")
    write_ct_series(volume, tmp_path / "p2", series_uid="1.2.3", description="Abdomen")
    assert [(case.name, case.series) for case in find_cases(tmp_path).cases] == [
        ("p1_study_one", None), ("p2_1_Lung_1.0_B70", "1.2.2"), ("p2_2_Abdomen", "1.2.3")
    ]  # fmt: skip


def test_lists_count_from_their_own_folder_and_may_name_the_cases(a_folder):
    (a_folder / "cases.txt").write_text("# two\ns01/ct.nii.gz\n\nmissing.nii.gz\n")
    assert [case.name for case in find_cases(a_folder / "cases.txt").cases] == ["s01_ct", "missing"]
    (a_folder / "cases.csv").write_text("input,name,series\ns01/ct.nii.gz,Müller: 1,\np2,,1.2.3\n", encoding="utf-8")
    cases = find_cases(a_folder / "cases.csv").cases
    assert [(case.name, case.series) for case in cases] == [("M_ller_1", None), ("p2", "1.2.3")]


def test_equal_names_are_told_apart_by_their_path(a_folder):
    (a_folder / "cases.csv").write_text("input,name\na.nrrd,case\nb.nii.gz,Case\n")
    names = [case.name for case in find_cases(a_folder / "cases.csv").cases]
    assert names[0].startswith("case-") and names[1].startswith("Case-") and len({name.lower() for name in names}) == 2


@pytest.mark.parametrize(
    ("name", "text", "fix"),
    [
        ("cases.csv", "path\na.nrrd\n", "Choose from: input, name, series"),
        ("cases.csv", "name\nx\n", "has no column input"),
        ("cases.txt", "a.nrrd\na.nrrd\n", "Name every volume once"),
        ("cases.txt", "# nothing\n", "holds no case"),
        ("cases.doc", "a.nrrd\n", "Give a folder with volumes, or a list"),
        ("cases.txt", "a\0b.nrrd\n", "zero bytes.*Save it as UTF-8"),
        ("cases.csv", "input\na\0b.nrrd\n", "zero bytes.*Save it as UTF-8"),
        ("cases.csv", "input,name\n" + "x" * 200000 + "\n", "field larger than field limit.*Check its commas and quotes"),
    ],
)
def test_unusable_list_is_one_sentence(tmp_path, name, text, fix):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=fix):
        find_cases(tmp_path / name)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no case"):
        find_cases(tmp_path)


def test_memory_is_estimated_from_the_header(a_folder, a_tiny_bundle):
    manifest = load_bundle(str(a_tiny_bundle)).manifest
    small, listed = find_cases(a_folder).cases[0], find_cases(a_folder).cases
    large = Volume(np.zeros((200, 200, 200), np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
    write_volume(large, a_folder / "large.nii.gz")
    found = {case.name: case_memory_bytes(case, manifest, num_patches=10) for case in find_cases(a_folder).cases}
    assert found["a"] == case_memory_bytes(small, manifest, num_patches=10) and len(listed) == 4
    assert found["large"] > found["a"] + 2 * 200**3
    (a_folder / "broken.nii.gz").write_bytes(b"no")
    broken = next(case for case in find_cases(a_folder).cases if case.name == "broken")
    assert case_memory_bytes(broken, manifest, num_patches=None) is None


def test_unmarked_utf16_list_is_one_sentence(tmp_path):
    (tmp_path / "cases.txt").write_bytes("a.nrrd\n".encode("utf-16-le"))
    with pytest.raises(UserError, match="as UTF-16 text has.*Save it as UTF-8"):
        find_cases(tmp_path / "cases.txt")


def test_source_name_of_300_letters_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="File name too long.*Choose another name"):
        find_cases(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("name", "is_case"),
    [("Segovia_Maria", True), ("Maskell", True), ("labelle", True), ("seg", False), ("seg-1", False), ("Segmentation_1", False), ("maskLiver", False), ("LABEL", False), ("labels2", False)],
)  # fmt: skip
def test_patient_whose_name_starts_with_seg_is_no_segmentation(tmp_path, name, is_case):
    for file_name in (f"{name}.nii.gz", "anna.nii.gz"):
        (tmp_path / file_name).write_bytes(b"volume")
    found = find_cases(tmp_path)
    assert sorted(case.name for case in found.cases) == sorted(["anna"] + [name] * is_case)
    assert found.message == ("" if is_case else "Passed over: segmentations by their names (label, mask, seg): 1.")


def test_everything_that_is_passed_over_is_told(a_folder, monkeypatch, can_link):
    scandir = os.scandir

    def locked(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    (a_folder / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", locked)
    (a_folder / "linked").symlink_to(a_folder / "s01")
    (a_folder / "again.nrrd").symlink_to(a_folder / "a.nrrd")
    found = find_cases(a_folder)
    assert [case.name for case in found.cases] == ["a", "b", "s01_ct", "s02_ct"]
    assert {reason.split(" by")[0]: count for reason, count in found.passed_over.items() if count} == {
        "hidden volumes and folders": 1, "folders of segmentations": 2, "segmentations": 2, "files of other kinds": 1, "links to folders": 1,
        "folders that cannot be read": 1, "folders with results of a cohort": 1, "links to a volume that is a case already": 1,
    }  # fmt: skip
    assert "folders that cannot be read: 1" in found.message and "\n" not in found.message


def test_list_line_that_begins_with_a_hash_is_a_case_if_there_is_such_a_file(tmp_path):
    (tmp_path / "#1.nii.gz").write_bytes(b"volume")
    (tmp_path / "list.txt").write_text("# mine\n#1.nii.gz\n#2.nii.gz\n3.nii.gz\n")
    (tmp_path / "list.csv").write_text("# mine\ninput,name\n#1.nii.gz,one\n")
    found = find_cases(tmp_path / "list.txt")
    assert [case.input.name for case in found.cases] == ["#1.nii.gz", "3.nii.gz"] and found.message == "Passed over: lines that begin with #: 2."
    assert [(case.name, case.input.name) for case in find_cases(tmp_path / "list.csv").cases] == [("one", "#1.nii.gz")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_pipe_in_a_folder_is_passed_over_and_not_waited_for(tmp_path):
    (tmp_path / "p1").mkdir()
    for name in ("x.nii.gz", "p1/0", "p1/cohort.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "ct.nii.gz").write_bytes(b"volume")
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["ct"] and found.message == "Passed over: pipes, devices and the like: 3."


def test_link_to_itself_is_a_case_that_says_so(tmp_path, a_tiny_bundle, can_link):
    (tmp_path / "self.nii.gz").symlink_to("self.nii.gz")
    (case,) = find_cases(tmp_path).cases
    assert case.name == "self" and case_memory_bytes(case, load_bundle(str(a_tiny_bundle)).manifest, num_patches=1) is None
    with pytest.raises(UserError, match="symbolic links.*Choose another name"):
        read_volume(case.input)


@pytest.fixture
def slices():
    """Writes a small series."""
    pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    from dicom_folders import write_ct_series

    volume = Volume(np.zeros((3, 4, 5), np.int16), np.diag([-2.0, -2.0, 3.0, 1.0]))
    return lambda folder, **options: write_ct_series(volume, folder, **options)


def test_slices_behind_25_other_files_or_without_preamble_are_found_and_beside_a_volume_told(tmp_path, slices):
    for name in ("behind", "bare", "both"):
        slices(tmp_path / name, series_uid="1.2.1")
    for number in range(25):
        (tmp_path / "behind" / f"{number:04}.json").write_text("{}")
    for path in (tmp_path / "bare").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[content.index(b"\x08\0\x05\0", 132) :])
    (tmp_path / "both" / "scout.nii.gz").write_bytes(b"volume")
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["bare", "behind", "both_scout"]
    assert found.message == "Passed over: folders with DICOM files beside other volumes: 1."
    assert open_volume(tmp_path / "bare").shape == (3, 4, 5)


@pytest.mark.parametrize("uid", ["1.2.1", ""])
def test_two_descriptions_under_one_uid_fail_that_case_alone(tmp_path, slices, uid):
    for description in ("Thorax", "Abdomen"):
        slices(tmp_path / "p1" / description, series_uid="1.2.1", description=description, without=() if uid else ("SeriesInstanceUID",))
        for path in (tmp_path / "p1" / description).iterdir():
            path.rename(tmp_path / "p1" / f"{description}{path.name}")
        (tmp_path / "p1" / description).rmdir()
    (tmp_path / "good.nii.gz").write_bytes(b"volume")
    good, twice = find_cases(tmp_path).cases
    assert (good.name, twice.name, twice.series) == ("good", "p1", None)
    with pytest.raises(UserError, match="has 2 image series.*Put each into a folder of its own"):
        read_volume(twice.input, series_uid=twice.series)


def test_results_in_the_searched_folder_itself_are_no_cases(tmp_path):
    (tmp_path / "cases" / "ct").mkdir(parents=True)
    for name in ("ct.nii.gz", "cases/ct/segmented.nii.gz", "cohort.csv"):
        (tmp_path / name).write_bytes(b"volume")
    assert [case.name for case in find_cases(tmp_path).cases] == ["ct", "cases_ct_segmented"]
    (tmp_path / "cohort.json").write_text(json.dumps({"options": {}, "model_sha256": "", "format": "", "pictures": False}))
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["ct"] and found.message == ""
