"""docs/training.md: every command runs, on small folders of exactly the layouts that are downloaded, through to a segmentation."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("tensorboard")

from training_folders import read_array, write_nnunet, write_totalsegmentator, write_word  # noqa: E402

from NMSWSegment.command_line import _parser, main  # noqa: E402
from NMSWSegment.data.totalsegmentator import ORGANS  # noqa: E402
from NMSWSegment.files.bundle import load_bundle  # noqa: E402
from NMSWSegment.training.run_folder import load_checkpoint, trained_weights  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--preset compact --augmentation scan --spacing 6 6 6 --patch-size 16 16 16 --coarse-factor 1 1 1 --top-k-patches 1 --random-patches 1 --precision fp32"
SMALL += " --iterations 2 --workers 0 --device cpu --log-every 1 --show-every 2"


def commands(section: str) -> list[str]:
    """The lines of the code blocks under a heading of the document; blocks of another language are no commands."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    part = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL).group(1)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
    return [line for language, block in blocks if not language for line in block.splitlines()]


def run(line: str) -> None:
    """One command of the document in the current folder, with small nets and few iterations."""
    words = shlex.split(line)
    if words[0] == "tensorboard":
        assert list(Path(words[words.index("--logdir") + 1]).glob("events*"))
        return
    assert words[0] == "nmsw", line
    small = {"train": shlex.split(SMALL.replace("--augmentation scan", "") if "MR" in words else SMALL), "segment": ["--force-modality"]}.get(
        words[1], []
    )  # the small volumes show no air
    assert main([*words[1:], *small]) == 0, line


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, and an empty place for installed models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NMSW_BUNDLES", str(tmp_path / "installed"))
    return tmp_path


def test_totalsegmentator_commands_end_in_a_segmentation(here, capsys):
    write_totalsegmentator(here / "Totalsegmentator_dataset_v201", splits={"s0001": "train", "s0002": "train", "s0003": "test"}, classes=tuple(ORGANS))
    lines = commands("TotalSegmentator")
    assert [line.split()[1] for line in lines] == ["train", "train", "--logdir", "train", "export", "evaluate", "export", "segment"]
    run(lines[0])
    assert "2 labelled CT (s0001, s0002)" in capsys.readouterr().out and not (here / "runs").exists()
    for line in lines[1:]:
        run(line)
    assert load_checkpoint(here / "runs" / "organ")["label_names"] == ORGANS
    assert len(list((here / "cache").iterdir())) == 2 and not (here / "runs" / "organ" / "cache").exists()
    assert (here / "organs.seg.nrrd").is_file()
    assert "Case `s0003`, DSC" in (here / "organ-unet" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert {path.name for path in (here / "pictures").iterdir()} == {f"s0003-k{k}.png" for k in ("0", "5", "10", "all")}


def test_commands_of_fine_tuning_end_in_the_panels_list_with_a_new_class_between_known_ones(here, capsys):
    write_nnunet(here / "Dataset501_Lesion", names=("case_001", "case_002", "case_003"), labels=("liver", "spleen", "lesion"))
    for line in commands("From a packaged model to your own structures"):
        run(line)
    bundle = load_bundle("liver-lesion")
    assert bundle.folder == here / "installed" / "liver-lesion" and bundle.manifest.label_names == ["liver", "spleen", "lesion"]
    assert bundle.manifest.training["options"]["initial_bundle"] == "torso-unet"
    assert bundle.manifest.attributions == load_bundle("torso-unet").manifest.attributions
    assert (here / "lesion.seg.nrrd").is_file()


def test_commands_of_a_fold_end_in_a_bundle_that_knows_its_held_out_cases(here):
    write_totalsegmentator(here / "Totalsegmentator_dataset_v201", splits={f"s000{number}": "train" for number in range(1, 6)}, classes=tuple(ORGANS))
    for line in commands("Folds"):
        run(line)
    assert load_bundle(here / "organ-fold0").manifest.training["held_out"] == ["s0001"]


def test_commands_of_the_stages_end_in_a_bundle_of_all_three(here):
    write_totalsegmentator(here / "Totalsegmentator_dataset_v201", splits={"s0001": "train", "s0003": "test"}, classes=tuple(ORGANS))
    for line in commands("In stages"):
        run(line)
    coarse, local, last = (load_checkpoint(here / "runs" / name) for name in ("coarse", "local", "importance"))
    for part, stage in (("coarse.backbone.", coarse), ("coarse.head.", coarse), ("local.", local)):
        for key, value in trained_weights(stage).items():
            if key.startswith(part):
                assert torch.equal(last["net"][key], value), key
    assert load_bundle(here / "organ-staged").manifest.importance_has_entropy


def test_word_commands_end_in_a_segmentation_that_can_be_installed(here, capsys):
    write_word(here / "WORD-V0.1.0", splits={"word_0001": "Tr", "word_0002": "Tr", "word_0003": "Val"})
    for line in commands("WORD"):
        run(line)
    labels = read_array(here / "word.nii.gz")
    assert labels.shape == (26, 20, 24) and labels.dtype == np.uint8 and labels.max() <= 16
    for line in commands("Into the panel"):
        run(line.replace("organ-unet", "word-unet"))
    assert "word-unet" in capsys.readouterr().out


def test_mr_commands_end_in_a_segmentation(here, monkeypatch):
    monkeypatch.setattr("NMSWSegment.samples.augment.SHIFT_VOXELS", 2)  # the volumes have 26 voxels
    folder = write_nnunet(here / "Dataset001_MR", names=("a", "b"))
    values = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps(values | {"channel_names": {"0": "T1"}}))
    for line in commands("MR"):
        run(line)
    manifest = load_bundle(here / "mr-unet").manifest
    assert (manifest.modality, manifest.normalization) == ("MR", "zscore") and read_array(here / "mr.nii.gz").shape == (26, 20, 24)


def test_launchers_start_commands_that_exist():
    lines = commands("Several GPUs and computers")
    assert [line.split()[0] for line in lines] == ["torchrun", "torchrun"]
    for line in lines:
        words = shlex.split(line)
        arguments = words[words.index("train") :]
        assert _parser(arguments).parse_args(arguments).batch_size in (4, 8)
        assert "-m NMSWSegment train" in line


def test_every_command_of_the_document_is_in_a_section_that_is_run():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert {section for section in sections if commands(section)} == {
        "Install",
        "TotalSegmentator",
        "WORD",
        "From a packaged model to your own structures",
        "Folds",
        "MR",
        "In stages",
        "Into the panel",
        "Several GPUs and computers",
    }
    assert commands("Install") == ['pip install ".[train]"']
