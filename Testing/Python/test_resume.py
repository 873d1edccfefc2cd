"""A run that goes on: longer than it was meant to be, with its data in another folder, or not at all because it is finished."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("tensorboard")

from test_train import a_data_folder, tiny_options  # noqa: E402

from NMSWSegment.files.folder_lock import locked_folder  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training import train as train_module  # noqa: E402
from NMSWSegment.training.iteration import new_schedule  # noqa: E402
from NMSWSegment.training.options import OPTIONS_NAME  # noqa: E402
from NMSWSegment.training.run_folder import CHECKPOINT_NAME, load_checkpoint, load_run_options, save_checkpoint  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return a_data_folder(tmp_path_factory.mktemp("data"))


def options_of(data: Path, **changes):
    return tiny_options(data, **({"train": "local", "hold_out": ("two",), "validate_every": 0} | changes))


def rates(monkeypatch) -> list[float]:
    """The learning rate of every step of a run."""
    seen = []
    step = train_module.train_step

    def record(state, *arguments, **facts):
        seen.append(state.optimizer.param_groups[0]["lr"])
        return step(state, *arguments, **facts)

    monkeypatch.setattr(train_module, "train_step", record)
    return seen


def test_schedule_from_an_iteration_on_is_the_rest_of_the_whole_one():
    options = tiny_options(Path("nowhere"), iterations=10)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [weight], "rate": 1.0}], lr=options.learning_rate)
    schedule, whole = new_schedule(optimizer, options), []
    for _ in range(10):
        whole.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for iteration in range(10):
        new_schedule(optimizer, options, iteration=iteration)
        assert optimizer.param_groups[0]["lr"] == whole[iteration]
    assert max(whole) == options.learning_rate


@pytest.mark.parametrize("stop", [2, 4])
def test_longer_run_follows_the_schedule_of_its_new_length_and_says_so(data, tmp_path, monkeypatch, caplog, stop):
    seen = rates(monkeypatch)
    train(options_of(data, iterations=8), output=tmp_path / "long", num_workers=0)
    expected = seen.copy()
    seen.clear()

    def save_and_die(*arguments, **facts):
        save_checkpoint(*arguments, **facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(train_module, "save_checkpoint", save_and_die)
        train(options_of(data, iterations=4), output=tmp_path / "run", num_workers=0, checkpoint_every=stop)
    with caplog.at_level("INFO"):
        train(options_of(data, iterations=8), output=tmp_path / "run", num_workers=0, resume=True)
    assert seen[stop:] == expected[stop:] and len(seen) == 8
    assert f"goes on from iteration {stop} to 8 instead of 4" in caplog.text and f"the learning rate is now {expected[stop]:.3g}" in caplog.text
    assert load_run_options(tmp_path / "run").iterations == 8 and load_checkpoint(tmp_path / "run")["iteration"] == 8
    train(options_of(data, iterations=4), output=tmp_path / "again", num_workers=0)
    if stop == 4:
        train(options_of(data, iterations=8), output=tmp_path / "again", num_workers=0, resume=True)
        found, wanted = (load_checkpoint(tmp_path / name)["net"] for name in ("again", "run"))
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_sparse_run_can_be_made_longer(data, tmp_path):
    options = {"train": "both", "backbone": "e2enet", "sparsity": 0.8, "patch_size": (32, 16, 16), "sparsity_update_every": 1}
    for iterations, resume in ((1, False), (2, True)):
        train(options_of(data, iterations=iterations, **options), output=tmp_path / "run", num_workers=0, resume=resume)
    assert load_checkpoint(tmp_path / "run")["iteration"] == 2


def test_run_can_be_made_shorter_but_not_than_it_is(data, tmp_path, monkeypatch, caplog):
    seen = rates(monkeypatch)
    train(options_of(data, iterations=4), output=tmp_path / "short", num_workers=0)
    expected = seen.copy()
    train(options_of(data, iterations=2), output=tmp_path / "run", num_workers=0)
    options = json.loads((tmp_path / "run" / OPTIONS_NAME).read_text(encoding="utf-8"))
    (tmp_path / "run" / OPTIONS_NAME).write_text(json.dumps(options | {"iterations": 8}))  # as if it had been meant to be longer
    seen.clear()
    with caplog.at_level("INFO"):
        train(options_of(data, iterations=4), output=tmp_path / "run", num_workers=0, resume=True)
    assert seen == expected[2:] and "goes on from iteration 2 to 4 instead of 8" in caplog.text
    with pytest.raises(UserError, match="has 4 iterations already, but --iterations is 3. Give as many or more"):
        train(options_of(data, iterations=3), output=tmp_path / "run", num_workers=0, resume=True)


def test_run_of_a_version_that_knew_less_goes_on(data, tmp_path):
    train(options_of(data, iterations=1), output=tmp_path / "run", num_workers=0)
    values = json.loads((tmp_path / "run" / OPTIONS_NAME).read_text(encoding="utf-8"))
    assert values.pop("validation_patches") == 10
    (tmp_path / "run" / OPTIONS_NAME).write_text(json.dumps(values))
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.pop("earlier_cases") == []
    torch.save(checkpoint, tmp_path / "run" / CHECKPOINT_NAME)
    train(options_of(data, iterations=2), output=tmp_path / "run", num_workers=0, resume=True)
    found = load_checkpoint(tmp_path / "run")
    assert found["iteration"] == 2 and found["earlier_cases"] is None


def test_finished_run_says_so_and_stays_as_it_is(data, tmp_path, caplog):
    train(options_of(data, iterations=1), output=tmp_path / "run", num_workers=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with caplog.at_level("INFO"):
        train(options_of(data, iterations=1), output=tmp_path / "run", num_workers=0, resume=True)
    assert "is finished: it has its 1 iterations. To go on, resume it with more --iterations." in caplog.text
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_run_that_ended_early_goes_on_with_more_patience(data, tmp_path, monkeypatch, caplog):
    from test_validation import scripted

    scripted(monkeypatch, [0.5, 0.4, 0.3, 0.6])
    options = {"iterations": 4, "validate_every": 1}
    train(options_of(data, patience=1, **options), output=tmp_path / "run", num_workers=0)
    with caplog.at_level("INFO"):
        train(options_of(data, patience=1, **options), output=tmp_path / "run", num_workers=0, resume=True)
    assert "stopped at 2 of 4 iterations). To go on, resume it with a larger --patience." in caplog.text
    train(options_of(data, patience=3, **options), output=tmp_path / "run", num_workers=0, resume=True)
    assert load_checkpoint(tmp_path / "run")["validation"] == {"best_score": 0.6, "best_iteration": 4, "validations_since_best": 0}


def test_data_may_have_moved_but_must_hold_the_same_cases(tmp_path):
    data = a_data_folder(tmp_path / "data")
    train(options_of(data, iterations=2), output=tmp_path / "run", num_workers=0)
    straight = options_of(data, iterations=3)
    train(straight, output=tmp_path / "straight", num_workers=0)
    moved = data.rename(tmp_path / "elsewhere")
    longer = options_of(moved, iterations=3)
    train(longer, output=tmp_path / "run", num_workers=0, resume=True)
    assert load_run_options(tmp_path / "run") == longer and load_checkpoint(tmp_path / "run")["iteration"] == 3
    values = json.loads((moved / "dataset.json").read_text(encoding="utf-8"))
    (moved / "one").rename(moved / "three")
    values["training"][0] = {"image": "three/ct.nii.gz", "label": "three/label.nii.gz"}
    (moved / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="training cases are not those that the run.*'one' is missing, 'three' is new.*their folder may be another"):
        train(options_of(moved, iterations=4), output=tmp_path / "run", num_workers=0, resume=True)
    values["labels"]["3"] = "aorta"
    (moved / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="has the classes liver, spleen, vertebrae, the data liver, spleen, aorta"):
        train(options_of(moved, iterations=4), output=tmp_path / "run", num_workers=0, resume=True)


def test_sgd_follows_a_polynomial_from_any_iteration_on(data, tmp_path, monkeypatch):
    options = options_of(data, optimizer="sgd", learning_rate=0.01, iterations=4)
    seen = rates(monkeypatch)
    train(options, output=tmp_path / "run", num_workers=0)
    assert seen == pytest.approx([0.01 * (1 - done / 4) ** 0.9 for done in range(4)])
    later = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "rate": 2.0}], lr=0.01)
    new_schedule(later, options, iteration=3)
    assert later.param_groups[0]["lr"] == pytest.approx(2 * seen[3])
    groups = load_checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert [(group["momentum"], group["nesterov"]) for group in groups] == [(0.99, True)]


def test_second_training_in_a_run_folder_is_refused_while_the_first_goes_on(data, tmp_path):
    train(options_of(data, iterations=1), output=tmp_path / "run", num_workers=0)
    before = (tmp_path / "run" / CHECKPOINT_NAME).read_bytes()
    with locked_folder(tmp_path / "run"), pytest.raises(UserError, match="Another run works in the folder"):
        train(options_of(data, iterations=2), output=tmp_path / "run", num_workers=0, resume=True)
    assert (tmp_path / "run" / CHECKPOINT_NAME).read_bytes() == before and load_run_options(tmp_path / "run").iterations == 1
    train(options_of(data, iterations=2), output=tmp_path / "run", num_workers=0, resume=True)
