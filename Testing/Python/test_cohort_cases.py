"""The cases of a cohort: what is found where, and under which name."""

import numpy as np
import pytest

from NMSWSegment.cohort.cases import case_memory_bytes, find_cases
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.volume import Volume, write_volume
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
    (tmp_path / "results" / "cohort.json").write_text("{}")
    write_volume(volume, tmp_path / "results" / "old.nii.gz")
    return tmp_path


def test_folder_is_searched_for_volumes_but_not_for_labels_and_results(a_folder):
    cases = find_cases(a_folder)
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
    assert [(case.name, case.series) for case in find_cases(tmp_path)] == [
        ("p1_study_one", None), ("p2_1_Lung_1.0_B70", "1.2.2"), ("p2_2_Abdomen", "1.2.3")
    ]  # fmt: skip


def test_lists_count_from_their_own_folder_and_may_name_the_cases(a_folder):
    (a_folder / "cases.txt").write_text("# two\ns01/ct.nii.gz\n\nmissing.nii.gz\n")
    assert [case.name for case in find_cases(a_folder / "cases.txt")] == ["s01_ct", "missing"]
    (a_folder / "cases.csv").write_text("input,name,series\ns01/ct.nii.gz,Müller: 1,\np2,,1.2.3\n", encoding="utf-8")
    cases = find_cases(a_folder / "cases.csv")
    assert [(case.name, case.series) for case in cases] == [("M_ller_1", None), ("p2", "1.2.3")]


def test_equal_names_are_told_apart_by_their_path(a_folder):
    (a_folder / "cases.csv").write_text("input,name\na.nrrd,case\nb.nii.gz,Case\n")
    names = [case.name for case in find_cases(a_folder / "cases.csv")]
    assert names[0].startswith("case-") and names[1].startswith("Case-") and len({name.lower() for name in names}) == 2


@pytest.mark.parametrize(
    ("name", "text", "fix"),
    [
        ("cases.csv", "path\na.nrrd\n", "Choose from: input, name, series"),
        ("cases.csv", "name\nx\n", "has no column input"),
        ("cases.txt", "a.nrrd\na.nrrd\n", "Name every volume once"),
        ("cases.txt", "# nothing\n", "holds no case"),
        ("cases.doc", "a.nrrd\n", "Give a folder with volumes, or a list"),
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
    small, listed = find_cases(a_folder)[0], find_cases(a_folder)
    large = Volume(np.zeros((200, 200, 200), np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
    write_volume(large, a_folder / "large.nii.gz")
    found = {case.name: case_memory_bytes(case, manifest, num_patches=10) for case in find_cases(a_folder)}
    assert found["a"] == case_memory_bytes(small, manifest, num_patches=10) and len(listed) == 4
    assert found["large"] > found["a"] + 2 * 200**3
    (a_folder / "broken.nii.gz").write_bytes(b"no")
    broken = next(case for case in find_cases(a_folder) if case.name == "broken")
    assert case_memory_bytes(broken, manifest, num_patches=None) is None
