"""Validation while a run trains: what it measures is what inference gives, and the best weights are kept, also over a stop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("tensorboard")

from test_train import a_data_folder, tiny_options  # noqa: E402

from NMSWSegment.data.prepared_case import CaseRequest  # noqa: E402
from NMSWSegment.evaluation.cases import find_cases  # noqa: E402
from NMSWSegment.evaluation.evaluate import evaluate  # noqa: E402
from NMSWSegment.files.bundle import load_bundle  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training import train as train_module  # noqa: E402
from NMSWSegment.training.export import export_bundle  # noqa: E402
from NMSWSegment.training.run_folder import BEST_NAME, load_checkpoint, save_checkpoint, trained_weights  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402
from NMSWSegment.training.validation import Validation, ValidationScore  # noqa: E402

NAMES = ("liver", "spleen", "vertebrae")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return a_data_folder(tmp_path_factory.mktemp("data"))


def options_of(data: Path, **changes):
    return tiny_options(data, **({"hold_out": ("two",), "validate_every": 2} | changes))


def scripted(monkeypatch, means: list[float]) -> list[int]:
    """Let the validations of a run give these scores; returns the iterations that were validated."""
    seen = []

    def score(self, state):
        seen.append(state.iteration)
        return ValidationScore(mean=means[len(seen) - 1], by_class=(0.5, math.nan, 0.5), seconds=0.0)

    monkeypatch.setattr(Validation, "score", score)
    return seen


def test_score_is_what_the_exported_model_gets_with_as_many_patches(data, tmp_path):
    train(options_of(data, iterations=4, learning_rate=3e-3, validation_patches=3), output=tmp_path / "run", num_workers=0)
    best = load_checkpoint(tmp_path / "run", BEST_NAME)
    bundle = load_bundle(export_bundle(tmp_path / "run", tmp_path / "bundle"))
    cases: list[CaseRequest] = find_cases((f"decathlon:{data}",), bundle.manifest, wanted="two")
    expected = evaluate(bundle, cases, ks=(3,), threads=1)["cases"]["two"]["3"]
    assert best["validation"]["best_score"] == pytest.approx(expected["mean"], abs=2e-3)  # fp16 weights
    assert bundle.manifest.training["validation_dsc"] == pytest.approx(best["validation"]["best_score"], abs=1e-4)
    rows = [line.split(",") for line in (tmp_path / "run" / "validation.csv").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["iteration", "mean", *NAMES] and [row[0] for row in rows[1:]] == ["2", "4"]
    row = next(row for row in rows if row[0] == str(best["iteration"]))
    for name, value in zip(NAMES, row[2:]):
        assert float(value) == pytest.approx(expected["dsc"][name], abs=2e-3)


@pytest.mark.parametrize("part", ["coarse", "local"])
def test_net_that_trains_alone_is_validated_alone_and_learns_nothing_of_it(data, tmp_path, part):
    for every in (0, 1):
        train(options_of(data, train=part, iterations=2, validate_every=every), output=tmp_path / str(every), num_workers=0)
    with_, without = (load_checkpoint(tmp_path / name)["net"] for name in ("1", "0"))
    assert all(torch.equal(value, with_[key]) for key, value in without.items())
    assert not (tmp_path / "0" / BEST_NAME).exists()
    assert 0 <= load_checkpoint(tmp_path / "1", BEST_NAME)["validation"]["best_score"] <= 1


def test_coarse_net_that_knows_the_answer_scores_1_and_the_average_is_what_is_scored(data, tmp_path, monkeypatch):
    seen = []
    score = Validation.score

    def record(self, state):
        weights = trained_weights({"net": state.net.state_dict(), "average": state.average.state_dict(), "sparsity": None})
        result = score(self, state)
        seen.append(all(torch.equal(value, weights[key]) for key, value in self._net.state_dict().items()))
        truth = self._numbered[0][1].whole().labels.long()
        logits = torch.nn.functional.one_hot(truth, 4).permute(3, 0, 1, 2).float()[None] * 50
        monkeypatch.setattr("NMSWSegment.engine.runtime.Nets.coarse", lambda self, x: (logits[0].log_softmax(0), torch.zeros(truth.shape)))
        seen.append(score(self, state))
        return result

    monkeypatch.setattr(Validation, "score", record)
    train(options_of(data, train="coarse", ema=0.9, iterations=2), output=tmp_path / "run", num_workers=0)
    assert seen[0] and seen[1].mean == 1 and seen[1].by_class == (1, 1, 1)


def test_best_weights_are_kept_and_exported_and_the_card_says_which(data, tmp_path, monkeypatch):
    assert scripted(monkeypatch, [0.25, 0.75, 0.5]) == []
    run = tmp_path / "run"
    train(options_of(data, iterations=3, validate_every=1), output=run, num_workers=0, log_every=10)
    best, last = load_checkpoint(run, BEST_NAME), load_checkpoint(run)
    assert best["iteration"] == 2 and last["iteration"] == 3 and last["validation"] == {"best_score": 0.75, "best_iteration": 2, "validations_since_best": 1}
    for last_one, iteration in ((False, 2), (True, 3)):
        bundle = load_bundle(export_bundle(run, tmp_path / f"bundle{iteration}", last=last_one))
        assert bundle.manifest.training["iterations"] == iteration
        weights = (last if last_one else best)["net"]["local.head.weight"]
        assert torch.equal(torch.jit.load(str(bundle.local_path)).state_dict()["head.weight"].float(), weights.half().float())
    card = (tmp_path / "bundle2" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "The weights are those of iteration 2, the best in the validation: mean DSC 0.750." in card
    assert "best in the validation" not in (tmp_path / "bundle3" / "MODEL_CARD.md").read_text(encoding="utf-8")
    later = tiny_options(data, iterations=1, learning_rate=0.0, weight_decay=0.0, initial_run=str(run))
    train(later, output=tmp_path / "later", num_workers=0)
    assert all(torch.equal(value, best["net"][key]) for key, value in load_checkpoint(tmp_path / "later")["net"].items())


def test_scores_stand_in_the_curve_its_picture_and_tensorboard(data, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scripted(monkeypatch, [0.25, 0.75])
    train(options_of(data, iterations=4), output=tmp_path / "run", num_workers=0, log_every=1)
    rows = [line.split(",") for line in (tmp_path / "run" / "curve.csv").read_text(encoding="utf-8").splitlines()]
    assert rows[0][-1] == "validation_dsc" and [row[-1] for row in rows[1:]] == ["", "0.25000", "", "0.75000"]
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("validation/mean")] == [(2, 0.25), (4, 0.75)]
    assert "validation/liver" in events.Tags()["scalars"] and "validation/spleen" not in events.Tags()["scalars"]  # no case holds it
    assert (tmp_path / "run" / "curve.png").is_file()


def test_run_ends_when_patience_does_and_says_so(data, tmp_path, monkeypatch, caplog):
    seen = scripted(monkeypatch, [0.5, 0.6, 0.6, 0.4, 0.9])
    with caplog.at_level("INFO"):
        train(options_of(data, iterations=20, validate_every=1, patience=2), output=tmp_path / "run", num_workers=0)
    assert seen == [1, 2, 3, 4] and load_checkpoint(tmp_path / "run")["iteration"] == 4
    assert "2 validations in a row were no better than that of iteration 2" in caplog.text


def test_stopped_and_resumed_run_keeps_best_score_and_patience(data, tmp_path, monkeypatch):
    def save_and_die(*arguments, name="checkpoint.pt", **facts):
        save_checkpoint(*arguments, name=name, **facts)
        if name != BEST_NAME:
            raise KeyboardInterrupt

    options = options_of(data, train="local", ema=0.5, iterations=6, validate_every=1, patience=2, learning_rate=3e-3)
    train(options, output=tmp_path / "straight", num_workers=0)
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(train_module, "save_checkpoint", save_and_die)
        train(options, output=tmp_path / "stopped", num_workers=0, checkpoint_every=2)
    train(options, output=tmp_path / "stopped", num_workers=0, resume=True)
    for name in ("checkpoint.pt", BEST_NAME):
        found, expected = (load_checkpoint(tmp_path / run, name) for run in ("stopped", "straight"))
        assert found["validation"] == expected["validation"] and found["iteration"] == expected["iteration"]
        for part in ("net", "average"):
            assert all(torch.equal(found[part][key], value) for key, value in expected[part].items())
    tables = [(tmp_path / name / "validation.csv").read_text(encoding="utf-8") for name in ("stopped", "straight")]
    assert tables[0] == tables[1]


def test_validation_takes_evenly_chosen_cases_and_each_process_its_share(tmp_path):
    from NMSWSegment.data.case_cache import CaseCache
    from NMSWSegment.data.layouts import CaseFiles
    from NMSWSegment.training.datasets import TrainingData, open_validation_cases
    from NMSWSegment.training.distributed import ProcessGroup

    folder = a_data_folder(tmp_path / "data")
    requests = tuple(
        CaseRequest(CaseFiles(f"case{number:02}", folder / "one" / "ct.nii.gz", folder / "one" / "label.nii.gz"), label_names=NAMES) for number in range(9)
    )
    data = TrainingData(requests, (), (), label_names=NAMES, num_held_out=9, validation=requests)
    group = ProcessGroup(device=torch.device("cpu"))
    cases = open_validation_cases(options_of(folder, validation_cases=3), data=data, cache=CaseCache(tmp_path / "cache"), group=group)
    assert [case.name for case in cases] == ["case00", "case04", "case08"]
    sample = cases[0].whole()
    assert sample.intensity.shape == (26, 18, 24) and np.unique(sample.labels).tolist() == [0, 1, 2, 3]
    second = Validation(cases, options=options_of(folder), label_names=NAMES, group=ProcessGroup(device=torch.device("cpu"), rank=1, size=2))
    assert [case.name for _, case in second._numbered] == ["case04"] and second.num_cases == 3


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"validate_every": -1}, "must be 0 or more"),
        ({"patience": 2, "validate_every": 0}, "Give --validate-every too"),
        ({"validation_cases": 0}, "1 or more"),
        ({"validation_patches": 0}, "1 or more"),
    ],
)
def test_impossible_validation_says_what_to_change(changes, fix):
    with pytest.raises(UserError, match=fix):
        options_of(Path("nowhere"), **changes)


def test_export_of_a_run_that_was_not_validated_takes_its_only_weights(data, tmp_path):
    train(tiny_options(data, iterations=1), output=tmp_path / "run", num_workers=0)
    bundle = export_bundle(tmp_path / "run", tmp_path / "bundle")
    assert "validation_dsc" not in json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["training"]
