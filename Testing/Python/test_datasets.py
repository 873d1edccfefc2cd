"""Training data on disk: names, hold-out, geometry and label checks, and a sequence that workers and resumed runs share."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from NMSWSegment.data.layouts import CaseFiles, read_decathlon, read_label_names
from NMSWSegment.data.prepared_case import CaseRequest, prepare_case
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.acquisition import HU_RANGE
from NMSWSegment.samples.case_memory import CaseMemory
from NMSWSegment.samples.case_source import CaseSource
from NMSWSegment.samples.synthesis import AnatomySource, SynthesisOptions, prepare_anatomy
from NMSWSegment.samples.training_set import TrainingSet
from NMSWSegment.training.datasets import open_training_set
from NMSWSegment.training.options import TrainOptions

OPTIONS = SynthesisOptions(spacing_mm=(6.0, 6.0, 6.0))
LABELS = {"0": "background", "1": "liver", "2": "spleen"}


def a_label_map() -> np.ndarray:
    """S-A-R at 6 mm: liver right, spleen left."""
    labels = np.zeros((34, 22, 30), np.uint8)
    labels[6:26, 6:18, 17:26] = 1
    labels[8:20, 8:14, 4:11] = 2
    return labels


def a_ct(labels: np.ndarray) -> np.ndarray:
    ct = np.full(labels.shape, -1000, np.int16)
    ct[:, 2:20, 2:28] = -100
    ct[labels == 1] = 90
    ct[labels == 2] = 130
    return ct


def write(path: Path, array: np.ndarray, spacing=6.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([spacing] * 3)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))


@pytest.fixture
def a_folder(tmp_path) -> Path:
    """Two cases named by their folders, two anatomies beside them."""
    for name in ("one", "two"):
        write(tmp_path / "cases" / name / "ct.nii.gz", a_ct(a_label_map()))
        write(tmp_path / "cases" / name / "label.nii.gz", a_label_map())
    training = [{"image": f"./cases/{name}/ct.nii.gz", "label": f"./cases/{name}/label.nii.gz"} for name in ("one", "two")]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS, "training": training}))
    tissues = {
        str(index): {"name": name, "unified": label, "kind": kind, "hu": {"noncontrast": hu, "arterial": hu, "portal_venous": hu, "sd": 10}}
        for index, name, label, kind, hu in (
            (0, "air", 0, "air", -1000),
            (1, "liver", 1, "liver", 60),
            (2, "spleen", 2, "spleen", 50),
            (3, "fat", 0, "fat", -100),
        )
    }
    body = np.where(a_ct(a_label_map()) == -100, 3, a_label_map()).astype(np.uint8)
    for name in ("three", "four"):
        write(tmp_path / "anatomies" / name / "label_full.nii.gz", body)
        (tmp_path / "anatomies" / name / "tissues.json").write_text(json.dumps({"tissues": tissues}))
    return tmp_path


def run_options(folder: Path, *, hold_out=(), data=None, real_fraction=0.5, seed=5) -> TrainOptions:
    data = data or (f"decathlon:{folder}", f"anatomies:{folder / 'anatomies'}")
    return TrainOptions(data=data, hold_out=hold_out, spacing_mm=(6.0, 6.0, 6.0), real_fraction=real_fraction, seed=seed)


def a_request(folder: Path, *, label_names=("liver", "spleen")) -> CaseRequest:
    return CaseRequest(files=read_decathlon(folder)[0][0], label_names=label_names)


def a_source(request: CaseRequest) -> CaseSource:
    """A case, read and checked now."""
    case = prepare_case(request)
    return CaseSource(request.files.name, lambda: case, memory=CaseMemory(spacing_mm=OPTIONS.spacing_mm, bounds=HU_RANGE))


def test_read_decathlon_names_cases_and_labels(a_folder):
    cases, label_names = read_decathlon(a_folder)
    assert [name for name, _, _ in cases] == ["one", "two"] and label_names == ("liver", "spleen")
    assert cases[1].label == a_folder / "cases" / "two" / "label.nii.gz"


def test_read_decathlon_reads_nnunet_layout(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", a_ct(a_label_map()))
        write(tmp_path / "labelsTr" / f"{name}.nii.gz", a_label_map())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}, "file_ending": ".nii.gz"}))
    cases, label_names = read_decathlon(tmp_path)
    assert [case.name for case in cases] == ["a", "b"] and label_names == ("liver", "spleen")
    assert cases[0].image.name == "a_0000.nii.gz" and cases[0].label.name == "a.nii.gz"


def test_read_decathlon_missing_file_says_what_to_do(a_folder):
    (a_folder / "cases" / "two" / "label.nii.gz").unlink()
    with pytest.raises(UserError, match="Put the file back, or take its case out"):
        read_decathlon(a_folder)


def test_read_decathlon_without_dataset_json_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="Give the folder that holds it"):
        read_decathlon(tmp_path)


def test_label_names_with_a_gap_ask_for_numbers(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "2": "liver"}}))
    with pytest.raises(UserError, match="Number them 0, 1, 2"):
        read_label_names(tmp_path / "dataset.json")


def test_case_source_sample_keeps_sides_and_contrast(a_folder):
    source = a_source(a_request(a_folder, label_names=("liver", "spleen")))
    checked = 0
    for seed in range(8):
        sample = source.draw(torch.Generator().manual_seed(seed), OPTIONS)
        liver, spleen = sample.labels == 1, sample.labels == 2
        assert sample.intensity.dtype == torch.float32 and sample.labels.dtype == torch.uint8
        assert set(sample.labels.unique().tolist()) <= {0, 1, 2, 255}
        if liver.sum() > 40 and spleen.sum() > 40:
            checked += 1
            assert liver.nonzero().float().mean(dim=0)[2] > spleen.nonzero().float().mean(dim=0)[2]
            assert -50 < float(sample.intensity[liver].median()) < 250
    assert checked >= 4


def test_case_source_same_generator_same_sample(a_folder):
    source = a_source(a_request(a_folder, label_names=("liver", "spleen")))
    first, again = (source.draw(torch.Generator().manual_seed(2), OPTIONS) for _ in range(2))
    assert torch.equal(first.intensity, again.intensity) and torch.equal(first.labels, again.labels)


def test_case_source_geometry_mismatch_says_to_resample(a_folder):
    write(a_folder / "cases" / "one" / "label.nii.gz", a_label_map(), spacing=5.0)
    with pytest.raises(UserError, match="Resample the label to the image"):
        a_source(a_request(a_folder, label_names=("liver", "spleen")))


def test_label_file_that_breaks_off_is_refused(a_folder):
    label = a_folder / "cases" / "one" / "label.nii.gz"
    label.write_bytes(label.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"one/label.nii.gz' cannot be read: it is damaged or incomplete"):
        a_source(a_request(a_folder, label_names=("liver", "spleen")))


def test_case_source_label_outside_the_list_says_to_add_the_class(a_folder):
    with pytest.raises(UserError, match=r"holds \[2\].*Add the class there"):
        a_source(a_request(a_folder, label_names=("liver",)))


def test_case_source_unknown_voxels_stay_unknown(tmp_path):
    labels = a_label_map()
    labels[:, :11] = 255
    write(tmp_path / "ct.nii.gz", a_ct(a_label_map()))
    write(tmp_path / "label.nii.gz", labels)
    source = a_source(CaseRequest(CaseFiles("x", tmp_path / "ct.nii.gz", tmp_path / "label.nii.gz"), ("liver", "spleen")))
    sample = source.draw(torch.Generator().manual_seed(0), SynthesisOptions(spacing_mm=(6.0,) * 3, circular_share=0.0, turned_share=0.0))
    assert 0.2 < float((sample.labels == 255).float().mean()) < 0.8


def test_open_training_set_holds_out_cases_and_anatomies(a_folder):
    training_set = open_training_set(run_options(a_folder, hold_out=("one", "four")))
    assert training_set.label_names == ["liver", "spleen"]
    assert {training_set[number].name for number in range(16)} == {"two", "three"}


def test_open_training_set_unknown_hold_out_lists_the_ids(a_folder):
    with pytest.raises(UserError, match="Did you mean 'three'.*four, one, three, two"):
        open_training_set(run_options(a_folder, hold_out=("thre",)))


def test_open_training_set_nothing_left_says_so(a_folder):
    with pytest.raises(UserError, match="hold out less"):
        open_training_set(run_options(a_folder, data=(f"decathlon:{a_folder}",), hold_out=("one", "two")))


def test_open_training_set_bad_kind_shows_the_form(a_folder):
    with pytest.raises(UserError, match="Write decathlon:FOLDER"):
        open_training_set(run_options(a_folder, data=("nifti:x",)))


def test_open_training_set_different_labels_are_refused(a_folder):
    (a_folder / "anatomies" / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "spleen", "2": "liver"}}))
    with pytest.raises(UserError, match="to one list"):
        open_training_set(run_options(a_folder))


@pytest.mark.parametrize(("real_fraction", "names"), [(0.0, {"three", "four"}), (1.0, {"one", "two"})])
def test_training_set_real_fraction_decides_the_kind(a_folder, real_fraction, names):
    training_set = open_training_set(run_options(a_folder, real_fraction=real_fraction))
    assert {training_set[number].name for number in range(12)} == names


def test_training_set_sample_depends_on_seed_and_number_only(a_folder):
    training_set = open_training_set(run_options(a_folder))
    later = training_set[7]
    assert torch.equal(training_set[7].intensity, later.intensity)
    other_seed = open_training_set(run_options(a_folder, seed=6))[7]
    assert other_seed.name != later.name or other_seed.intensity.shape != later.intensity.shape or not torch.equal(other_seed.intensity, later.intensity)


def test_training_set_bad_fraction_says_what_to_use(a_folder):
    source = AnatomySource(prepare_anatomy(a_folder / "anatomies" / "three"))
    with pytest.raises(UserError, match="from 0 to 1"):
        TrainingSet(cases=(), anatomies=(source,), label_names=("liver", "spleen"), options=OPTIONS, real_fraction=35)


def test_training_set_read_by_workers_continues_the_sequence_of_a_resumed_run(a_folder):
    training_set = open_training_set(run_options(a_folder))
    expected = [training_set[number] for number in range(3, 7)]
    found = list(torch.utils.data.DataLoader(training_set, sampler=range(3, 7), batch_size=None, num_workers=2))
    assert [sample.name for sample in found] == [sample.name for sample in expected]
    assert all(torch.equal(sample.intensity, wanted.intensity) and torch.equal(sample.labels, wanted.labels) for sample, wanted in zip(found, expected))
