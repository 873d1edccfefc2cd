"""The dry run: what it says is what the run would do, and it writes nothing."""

import re
from pathlib import Path

import pytest

pytest.importorskip("monai")

from conftest import windows_pipe  # noqa: E402
from test_train import tiny_options  # noqa: E402
from training_folders import write_totalsegmentator  # noqa: E402

from NMSWSegment.command_line import main  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training.plan import plan_lines  # noqa: E402

FLAGS = "--spacing 6 6 6 --patch-size 16 16 16 --coarse-factor 1 1 1 --top-k-patches 1 --random-patches 1 --device cpu"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_totalsegmentator(tmp_path / "data", splits={"s0001": "train", "s0002": "train", "s0003": "test"})


def test_plan_names_cases_classes_grid_nets_files_and_writes_nothing(folder, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    words = f"train --data totalsegmentator:{folder} --subset liver,spleen --hold-out s0002 --output {tmp_path / 'run'} --iterations 50 --dry-run {FLAGS}"
    assert main(words.split()) == 0
    text = capsys.readouterr().out
    assert "1 labelled CT (s0001), 0 anatomies, 1 held out" in text and "Classes     2: liver, spleen" in text
    assert "Candidates  12 / 12 / 12 a volume" in text  # 26 x 20 x 24 voxels, patch 16, stride 8: 3 x 2 x 2
    nets = NMSWNet(Architecture(num_classes=3))
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (nets.coarse, nets.local)]
    assert f"coarse {counts[0]:.2f} M, local {counts[1]:.2f} M parameters" in text
    assert "Spacing     median 6 x 6 x 6 mm (S x A x R), from 6 x 6 x 6 to 6 x 6 x 6" in text and "Size        median 26 x 20 x 24 voxels" in text
    assert "Classes in 1 of 1 cases" in text and re.search(r"liver   +1 +\d+\.\d  (\d+) / \1 / \1\n", text)
    assert re.search(r"on 1 of 1 held-out cases \(s0002\) every 2000 iterations: \d+\.\d s a case, \d+\.\d % of the time", text)
    assert "50 iterations, batch size 1, processes 1, on cpu" in text and "s an iteration" in text and "workers keep up" in text and "GB at most" in text
    assert str(tmp_path / "run" / "checkpoint.pt") in text and str(tmp_path / "run" / "cache") in text
    assert sorted(tmp_path.rglob("*")) == before


def test_verb_prints_any_name_into_a_pipe_of_windows(folder, tmp_path, monkeypatch):
    printed = windows_pipe(monkeypatch)
    monkeypatch.setattr("NMSWSegment.training.train.plan_lines", lambda *arguments, **options: ["Data        肝臓"])
    assert main(f"train --data totalsegmentator:{folder} --output {tmp_path / 'run'} --dry-run {FLAGS}".split()) == 0
    assert rb"\u809d\u81d3" in printed.getvalue()


def test_plan_warns_of_cases_smaller_than_a_patch(folder, tmp_path):
    options = tiny_options(folder, data=(f"totalsegmentator:{folder}",), subset="liver", patch_size=(32, 16, 16), max_sample_voxels=4000)
    lines = list(plan_lines(options, output=tmp_path / "run", cache=tmp_path / "cache", device="cpu"))
    assert any("2 cases are smaller than a patch along some axis and are padded: s0001, s0002" in line for line in lines)
    assert any("samples hold at most 4000 voxels" in line and "--max-sample-voxels" in line for line in lines)


def test_plan_of_a_single_iteration_can_be_timed_too(folder, tmp_path):
    options = tiny_options(folder, data=(f"totalsegmentator:{folder}",), subset="liver", iterations=1)
    lines = list(plan_lines(options, output=tmp_path / "run", cache=tmp_path / "cache", device="cpu"))
    assert any(line.startswith("Time ") for line in lines) and any("1 iterations, batch size 1" in line for line in lines)


def test_plan_stops_where_the_run_would(folder, tmp_path):
    options = tiny_options(folder, data=(f"totalsegmentator:{folder}",), subset="liver", patch_size=(20, 20, 20))
    with pytest.raises(UserError, match="Use 24 x 24 x 24"):
        list(plan_lines(options, output=tmp_path / "run", cache=tmp_path / "cache", device="cpu"))
    (folder / "s0002" / "segmentations" / "liver.nii.gz").write_bytes(b"no volume")
    with pytest.raises(UserError, match="liver.nii.gz' cannot be read"):
        list(plan_lines(tiny_options(folder, data=options.data, subset="liver"), output=tmp_path / "run", cache=tmp_path / "cache", device="cpu"))


def test_plan_looks_at_the_runs_to_start_from(folder, tmp_path):
    options = tiny_options(folder, data=(f"totalsegmentator:{folder}",), subset="liver", train="patches", coarse_run=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere' has no checkpoint.pt"):
        list(plan_lines(options, output=tmp_path / "run", cache=tmp_path / "cache", device="cpu"))
