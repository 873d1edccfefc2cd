"""Data that can be read but not learned from: unknown or empty labels, classes that nobody has, intensities that are no HU."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("tensorboard")

from test_train import a_data_folder, tiny_options, write  # noqa: E402
from training_folders import write_nnunet  # noqa: E402

from NMSWSegment.command_line import main  # noqa: E402
from NMSWSegment.data.case_cache import ENTRY_INFO_NAME, CaseCache, entry_label_voxels  # noqa: E402
from NMSWSegment.data.layouts import read_modality  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training.datasets import find_data  # noqa: E402
from NMSWSegment.training.label_checks import label_warnings  # noqa: E402
from NMSWSegment.training.plan import plan_lines  # noqa: E402
from NMSWSegment.training.run_folder import load_checkpoint  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402

SHAPE = (26, 18, 24)


@pytest.fixture
def data(tmp_path) -> Path:
    return a_data_folder(tmp_path / "data")


def set_values(folder: Path, **values) -> None:
    """Change the folder's dataset.json."""
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))


def test_case_whose_label_is_unknown_everywhere_is_refused_by_name(data, tmp_path):
    write(data / "two" / "label.nii.gz", np.full(SHAPE, 255, np.uint8))
    with pytest.raises(UserError, match=r"The label of two is 255 \(unknown\) everywhere.*take the case out"):
        train(tiny_options(data), output=tmp_path / "run", num_workers=0)
    assert not (tmp_path / "run" / "options.json").exists()


def test_case_without_any_class_and_class_without_any_case_are_told_at_the_start(data, tmp_path, caplog):
    write(data / "two" / "label.nii.gz", np.zeros(SHAPE, np.uint8))
    set_values(data, labels={"0": "background", "1": "liver", "2": "spleen", "3": "vertebrae", "4": "aorta"})
    train(tiny_options(data, iterations=2), output=tmp_path / "run", num_workers=0)
    assert "1 of 2 cases hold no class, only background: two. Check that their labels are right." in caplog.text
    assert "1 of 4 classes are in no case, so that the nets cannot learn them: aorta. Check the list of labels." in caplog.text
    assert load_checkpoint(tmp_path / "run")["iteration"] == 2


def test_class_of_an_anatomy_is_there():
    cases = [("a", {0: 10, 1: 5}), ("b", {0: 10, 255: 3})]
    assert len(label_warnings(cases[:1], anatomy_labels={2}, label_names=("liver", "spleen"))) == 0
    assert label_warnings(cases, anatomy_labels={2}, label_names=("liver", "spleen"))[0].startswith("1 of 2 cases hold no class")


def test_labels_are_counted_once_and_a_damaged_or_older_entry_is_counted_again(data, tmp_path):
    cache = CaseCache(tmp_path / "cache")
    options = tiny_options(data)
    (request, _) = find_data(options).requests
    entry = cache.ensure(request)
    voxels = entry_label_voxels(entry)
    assert voxels == {0: 11232 - 15 * 8 * 7 - 10 * 5 * 6 - 26 * 4 * 4, 1: 840, 2: 300, 3: 416}
    info = json.loads((entry / ENTRY_INFO_NAME).read_text(encoding="utf-8"))
    info.pop("label_voxels")
    (entry / ENTRY_INFO_NAME).write_text(json.dumps(info))
    assert entry_label_voxels(entry) == voxels
    (entry / ENTRY_INFO_NAME).write_text("torn")
    train(tiny_options(data, iterations=1), output=tmp_path / "run", num_workers=0, cache=tmp_path / "cache")
    assert entry_label_voxels(entry) == voxels


@pytest.mark.parametrize(
    ("values", "modality"),
    [
        ({}, ""),
        ({"modality": {"0": "CT"}}, "CT"),
        ({"modality": {"0": "ct portal venous"}}, "CT"),
        ({"channel_names": {"0": "CBCT"}}, "CT"),
        ({"channel_names": {"0": "T2"}, "modality": {"0": "CT"}}, "T2"),
        ({"modality": {"0": "MRI"}}, "MRI"),
        ({"modality": {"0": "CT", "1": "PET"}}, "CT, PET"),
        ({"modality": "MRI"}, "MRI"),
    ],
)
def test_data_set_says_what_its_intensities_are(tmp_path, values, modality):
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    assert read_modality(tmp_path / "dataset.json") == modality


def test_data_of_another_modality_are_refused_in_run_and_dry_run(data, tmp_path):
    set_values(data, modality={"0": "MRI"})
    options = tiny_options(data)
    expected = r"is MRI, but the modality of the run is CT. Give --modality MR, or leave this data out"
    with pytest.raises(UserError, match=expected):
        train(options, output=tmp_path / "run", num_workers=0)
    with pytest.raises(UserError, match=expected):
        list(plan_lines(options, output=tmp_path / "run", cache=tmp_path / "cache", device="cpu"))
    assert not (tmp_path / "run").exists()


def test_prepared_data_remember_their_modality(tmp_path):
    folder = write_nnunet(tmp_path / "data", names=("a",))
    set_values(folder, channel_names={"0": "T1"})
    assert main(["prepare", "--data", f"nnunet:{folder}", "--modality", "MR", "--output", str(tmp_path / "prepared")]) == 0
    with pytest.raises(UserError, match="is MR, but the modality of the run is CT"):
        find_data(tiny_options(tmp_path, data=(f"prepared:{tmp_path / 'prepared'}",)))
