"""Prepared cases: masks become one labelmap in the right places, and a cache entry is right, made again, or not there."""

import errno
import os

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from training_folders import a_case, centroid_ras, write_array, write_nnunet, write_totalsegmentator  # noqa: E402

from NMSWSegment.data import case_cache  # noqa: E402
from NMSWSegment.data.case_cache import CaseCache  # noqa: E402
from NMSWSegment.data.layouts import read_cases  # noqa: E402
from NMSWSegment.data.prepared_case import CaseRequest, check_headers, prepare_case  # noqa: E402
from NMSWSegment.files.volume import Volume  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.samples.acquisition import HU_RANGE  # noqa: E402
from NMSWSegment.samples.case_memory import CaseMemory, loaded_case  # noqa: E402
from NMSWSegment.samples.case_source import CaseSource  # noqa: E402
from NMSWSegment.samples.synthesis import SynthesisOptions  # noqa: E402

SUBSET = "liver,spleen,vertebrae_L1,gallbladder"


@pytest.fixture
def requests(tmp_path):
    """An upright case and one whose file stores the left side first."""
    folder = write_totalsegmentator(tmp_path / "ts", splits={"s0001": "train", "s0002": "train"})
    cases = read_cases(f"totalsegmentator:{folder}", subset=SUBSET)
    return [CaseRequest(files=files, label_names=cases.label_names) for files in cases.files]


def same(one, other) -> bool:
    return (
        np.array_equal(one.intensity, other.intensity)
        and np.array_equal(one.labels, other.labels)
        and one.spacing_mm == other.spacing_mm
        and one.direction == other.direction
        and one.extent == other.extent
    )


def test_masks_become_one_labelmap_in_the_right_places(requests):
    volume, labels = a_case()
    for request in requests:  # mirrored in the file or not, the prepared case grows to superior, anterior, right
        case = prepare_case(request)
        np.testing.assert_array_equal(case.labels, labels)
        np.testing.assert_array_equal(case.intensity, volume.array)
        assert case.intensity.dtype == np.int16 and case.spacing_mm == (6.0, 6.0, 6.0)
    assert centroid_ras(labels, 1, volume.ijk_to_ras)[0] > centroid_ras(labels, 2, volume.ijk_to_ras)[0] + 30  # liver right of spleen
    assert {"liver"} == set(case.extent.landmarks_mm)


def test_labels_of_unknown_value_become_255(tmp_path):
    cases = read_cases(f"nnunet:{write_nnunet(tmp_path, names=('a',), ignore=True)}")
    case = prepare_case(CaseRequest(cases.files[0], cases.label_names, unknown_value=cases.unknown_value))
    labels = a_case()[1]
    np.testing.assert_array_equal(case.labels, np.where(labels == 3, 255, labels))


def test_fine_voxels_are_averaged_to_the_model_spacing(requests):
    case = prepare_case(requests[0])
    loaded, raw = loaded_case(case, spacing_mm=(12.0, 6.0, 6.0), bounds=HU_RANGE), a_case()[0].array.astype(np.float64)
    np.testing.assert_allclose(loaded.intensity.numpy(), (raw[::2] + raw[1::2]) / 2, atol=0.01)
    assert loaded.blocks == (2, 1, 1) and loaded.labels.shape == case.labels.shape  # labels keep their own voxels


@pytest.mark.parametrize(
    ("shape", "shift_mm", "scale", "words"),
    [
        ((26, 20, 23), 0.0, 1.0, "26 x 20 x 24 and 26 x 20 x 23 voxels"),
        ((26, 20, 24), 0.0, 1.5, "voxels of 6 x 6 x 6 and 9 x 9 x 9 mm"),
        ((26, 20, 24), 4.0, 1.0, "up to 4.0 mm apart"),
    ],
)
def test_geometry_mismatch_says_the_difference(requests, shape, shift_mm, scale, words):
    volume, _ = a_case()
    matrix = volume.ijk_to_ras @ np.diag([scale, scale, scale, 1.0])
    matrix[1, 3] += shift_mm
    mask = np.zeros(shape, np.uint8)
    mask[3, 4, 5] = 1
    write_array(mask, Volume(mask, matrix), requests[0].label_paths[1])
    for check in (check_headers, prepare_case):
        with pytest.raises(UserError, match=f"'spleen.nii.gz' of case 's0001'.*{words}.*Resample the label to the image"):
            check(requests[0])


def test_label_outside_the_list_and_missing_label_say_what_to_do(tmp_path):
    cases = read_cases(f"nnunet:{write_nnunet(tmp_path, names=('a',))}")
    with pytest.raises(UserError, match=r"case 'a' holds \[3\].*ends at 2.*Add the class there"):
        prepare_case(CaseRequest(cases.files[0], ("liver", "spleen")))
    cases.files[0].label.unlink()
    with pytest.raises(UserError, match="no label file.*leave the case out"):
        prepare_case(CaseRequest(cases.files[0], cases.label_names))
    with pytest.raises(UserError, match="--hold-out"):
        CaseCache(tmp_path / "cache").entry(CaseRequest(cases.files[0], cases.label_names))


def test_cached_case_equals_the_prepared_one_and_is_read_once(requests, tmp_path, monkeypatch):
    cache = CaseCache(tmp_path / "cache")
    entries = [cache.ensure(request) for request in requests]
    expected = [prepare_case(request) for request in requests]
    monkeypatch.setattr(case_cache, "prepare_case", lambda request: pytest.fail("read again"))
    assert entries == [cache.ensure(request) for request in requests] and entries[0] != entries[1]
    assert all(same(cache.load(request, entry), case) for request, entry, case in zip(requests, entries, expected))
    assert not list((tmp_path / "cache").glob(".partial*"))


def test_changed_file_or_option_is_another_entry(requests, tmp_path):
    cache = CaseCache(tmp_path / "cache")
    request = requests[0]
    before = cache.entry(request)
    assert cache.entry(CaseRequest(request.files, request.label_names, unknown_value=9)) != before
    assert cache.entry(CaseRequest(request.files, request.label_names[::-1])) != before
    os.utime(request.label_paths[2], ns=(1, 1))
    assert cache.entry(request) != before


@pytest.mark.parametrize("damage", ["flip", "cut", "facts", "missing"])
def test_damaged_entry_is_made_again_never_used(requests, tmp_path, caplog, damage):
    cache = CaseCache(tmp_path / "cache")
    entry = cache.ensure(requests[0])
    path = entry / ("case.json" if damage == "facts" else "labels.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"flip": content, "cut": content[:-9], "facts": b"{}"}[damage])
    assert same(cache.load(requests[0], entry), prepare_case(requests[0]))
    assert "is damaged" in caplog.text
    caplog.clear()
    assert same(cache.load(requests[0], entry), prepare_case(requests[0])) and not caplog.text


def test_full_disk_says_where_to_make_room_and_leaves_no_entry(requests, tmp_path, monkeypatch):
    def full(path, array):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    cache = CaseCache(tmp_path / "cache")
    with pytest.raises(UserError, match="No space left on device.*another folder with --cache"):
        cache.ensure(requests[0])
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_that_store_the_same_case_agree(requests, tmp_path):
    first, second = CaseCache(tmp_path / "cache"), CaseCache(tmp_path / "cache")
    entry = first.ensure(requests[0])
    second._store(prepare_case(requests[0]), entry)
    assert same(first.load(requests[0], entry), prepare_case(requests[0])) and len(list((tmp_path / "cache").iterdir())) == 1


def test_entry_that_another_process_has_open_stays_whole(requests, tmp_path, monkeypatch):
    cache = CaseCache(tmp_path / "cache")
    entry = cache.ensure(requests[0])
    replace = os.replace

    def refuse_what_is_open(source, target):
        if source == entry:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_what_is_open)
    before = (entry / "case.json").stat().st_ino
    cache._store(prepare_case(requests[0]), entry)
    assert (entry / "case.json").stat().st_ino == before and same(cache.load(requests[0], entry), prepare_case(requests[0]))


def test_source_draws_the_same_from_cache_and_from_memory(requests, tmp_path):
    options = SynthesisOptions(spacing_mm=(6.0, 6.0, 6.0))
    cache = CaseCache(tmp_path / "cache")
    loaders = (lambda: prepare_case(requests[1]), lambda: cache.load(requests[1], cache.ensure(requests[1])))
    sources = [CaseSource("s0002", load, memory=CaseMemory(spacing_mm=options.spacing_mm, bounds=HU_RANGE)) for load in loaders]
    samples = [source.draw(torch.Generator().manual_seed(4), options) for source in sources]
    assert torch.equal(samples[0].intensity, samples[1].intensity) and torch.equal(samples[0].labels, samples[1].labels)
