"""Work in processes of their own: the same results as in one, a sentence for every way in which it can end."""

import os
import pickle
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")

from training_folders import write_totalsegmentator  # noqa: E402

from NMSWSegment.command_line import main  # noqa: E402
from NMSWSegment.data.case_cache import CaseCache  # noqa: E402
from NMSWSegment.data.training_sample import TrainingSample  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training import train as train_module  # noqa: E402
from NMSWSegment.training.datasets import find_data, open_training_set  # noqa: E402
from NMSWSegment.training.distributed import ProcessGroup  # noqa: E402
from NMSWSegment.training.options import TrainOptions  # noqa: E402
from NMSWSegment.training.worker_processes import in_workers, lost_workers_explained  # noqa: E402

GROUP = ProcessGroup(device=torch.device("cpu"))


def slow_at_first(number: int) -> int:
    time.sleep(0.2 if number == 0 else 0)
    return number * number


def refuse(number: int) -> int:
    if number == 1:
        raise UserError("Case 'one' cannot be used. Leave it out.")
    return number


def signaled(number: int, *, names: tuple[str, ...]) -> int:
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
    return number


def noted(number: int, *, folder: Path) -> int:
    (folder / str(number)).touch()
    return number


@pytest.fixture
def options(tmp_path) -> TrainOptions:
    folder = write_totalsegmentator(tmp_path / "ts", splits={f"s000{number}": "train" for number in range(1, 5)})
    return TrainOptions(data=(f"totalsegmentator:{folder}",), subset="liver,spleen,vertebrae_L1,gallbladder", spacing_mm=(6.0, 6.0, 6.0))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its place."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_the_order_of_the_items(num_workers):
    assert list(in_workers(slow_at_first, range(6), num_workers=num_workers)) == [0, 1, 4, 9, 16, 25]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sentence_of_a_worker_comes_out_as_it_is(num_workers):
    results = in_workers(refuse, range(3), num_workers=num_workers)
    assert next(results) == 0
    with pytest.raises(UserError, match="^Case 'one' cannot be used. Leave it out.$"):
        next(results)


def test_worker_that_was_killed_is_told_in_a_sentence():
    with pytest.raises(UserError, match="A worker process was lost, .*Use fewer --workers"), lost_workers_explained():
        list(in_workers(partial(signaled, names=("SIGKILL",)), range(3), num_workers=1))
    with pytest.raises(RuntimeError, match="shape mismatch"), lost_workers_explained():
        raise RuntimeError("shape mismatch")


def test_signals_that_reach_all_processes_are_left_to_the_first_one():
    names = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    assert list(in_workers(partial(signaled, names=names), range(3), num_workers=1)) == [0, 1, 2]


def test_worker_is_no_more_than_two_items_ahead(tmp_path):
    results = in_workers(partial(noted, folder=tmp_path), range(20), num_workers=1)
    assert next(results) == 0
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) <= 3


def test_cache_that_workers_fill_is_the_same_byte_for_byte_and_its_progress_is_told(options, tmp_path, caplog):
    caplog.set_level("INFO")
    for num_workers in (0, 2):
        open_training_set(options, cache=CaseCache(tmp_path / str(num_workers)), group=GROUP, num_workers=num_workers)
    expected = contents(tmp_path / "0")
    assert len(expected) == 4 * 3 and contents(tmp_path / "2") == expected
    told = [record.getMessage() for record in caplog.records if "is read" in record.getMessage()]
    assert told == [f"Case s000{number} is read, {number} of 4" for number in (1, 2, 3, 4)] * 2
    caplog.clear()
    training_set = open_training_set(options, cache=CaseCache(tmp_path / "2"), group=GROUP, num_workers=2)
    assert "is read" not in caplog.text
    pickle.dumps([CaseCache(tmp_path).ensure, training_set.__getitem__, *find_data(options).requests])  # for systems where processes start with nothing


def test_prepared_data_is_the_same_byte_for_byte_whatever_the_number_of_workers(options, tmp_path):
    for workers in ("0", "2"):
        words = ["prepare", "--data", options.data[0], "--subset", options.subset, "--workers", workers, "--output", str(tmp_path / workers)]
        assert main(words) == 0
    expected = contents(tmp_path / "0")
    assert len(expected) == 1 + 4 * 3 and contents(tmp_path / "2") == expected


def test_case_that_a_worker_cannot_use_stops_with_its_sentence_and_leaves_nothing_half_done(options, tmp_path, capsys):
    mask = Path(options.data[0].partition(":")[2]) / "s0003" / "segmentations" / "liver.nii.gz"
    mask.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"^'.*liver\.nii\.gz' cannot be read: it is damaged"):
        open_training_set(options, cache=CaseCache(tmp_path / "cache"), group=GROUP, num_workers=2)
    assert not list((tmp_path / "cache").glob(".partial*"))
    words = ["prepare", "--data", options.data[0], "--subset", options.subset, "--workers", "2", "--output", str(tmp_path / "prepared")]
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert "liver.nii.gz' cannot be read" in errors and "Traceback" not in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(("device", "num_workers", "expected"), [("cuda", 2, True), ("cuda", 0, False), ("cpu", 2, False)])
def test_samples_of_workers_wait_where_a_gpu_fetches_them(options, monkeypatch, device, num_workers, expected):
    monkeypatch.setattr(train_module, "in_workers", lambda function, items, *, num_workers, pin_memory: iter([pin_memory]))
    group = ProcessGroup(device=torch.device(device))
    training_set = open_training_set(options)
    ((number, is_fetched),) = train_module._samples(training_set, first=0, options=options, num_workers=num_workers, group=group)
    assert (number, is_fetched) == (0, expected)


def test_sample_pins_both_of_its_arrays(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.dtype) or self)
    sample = TrainingSample(name="a", intensity=torch.zeros(2, 2, 2), labels=torch.zeros(2, 2, 2, dtype=torch.uint8))
    assert sample.pin_memory().name == "a" and pinned == [torch.float32, torch.uint8]
