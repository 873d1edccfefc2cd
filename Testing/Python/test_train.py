"""Training: what a step computes is what inference computes, and a run can be stopped, resumed and built upon."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

pytest.importorskip("monai")

from NMSWSegment.data.training_sample import TrainingSample  # noqa: E402
from NMSWSegment.engine import aggregation  # noqa: E402
from NMSWSegment.engine.resampling import to_model_grid  # noqa: E402
from NMSWSegment.engine.runtime import Nets  # noqa: E402
from NMSWSegment.engine.segment import coarse_pass, refine  # noqa: E402
from NMSWSegment.engine.selection import Selection  # noqa: E402
from NMSWSegment.files import phantoms  # noqa: E402
from NMSWSegment.files.bundle import BundleManifest, load_bundle  # noqa: E402
from NMSWSegment.files.folder_lock import LOCK_NAME  # noqa: E402
from NMSWSegment.files.labels import coded_labels  # noqa: E402
from NMSWSegment.files.volume import Volume, read_volume  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training import iteration as iteration_module  # noqa: E402
from NMSWSegment.training import run_folder  # noqa: E402
from NMSWSegment.training import step as step_module  # noqa: E402
from NMSWSegment.training import train as train_module  # noqa: E402
from NMSWSegment.training.export import export_bundle  # noqa: E402
from NMSWSegment.training.iteration import moving_average, train_step  # noqa: E402
from NMSWSegment.training.losses import class_shares, segmentation_loss, soft_segmentation_loss  # noqa: E402
from NMSWSegment.training.options import TrainOptions  # noqa: E402
from NMSWSegment.training.run_folder import TrainingState, load_checkpoint, load_run_options, save_checkpoint  # noqa: E402
from NMSWSegment.training.step import TrainingVolume, local_losses, prepare, trained_parameters, training_losses, volume_losses  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402

LABELS = {"0": "background", "1": "liver", "2": "spleen", "3": "vertebrae"}


def write(path: Path, array: np.ndarray) -> None:
    """An upright file at 6 mm, array in S-A-R."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([6.0] * 3)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))


def a_data_folder(folder: Path) -> Path:
    """Two tiny labelled CT in Decathlon layout: liver right, spleen left, spine behind."""
    shape = (26, 18, 24)
    labels = np.zeros(shape, np.uint8)
    labels[5:20, 6:14, 14:21] = 1
    labels[8:18, 7:12, 3:9] = 2
    labels[:, 2:6, 10:14] = 3
    intensity = np.full(shape, -1000, np.int16)
    intensity[:, 1:17, 2:22] = -80
    for label, hu in ((1, 110), (2, 160), (3, 500)):
        intensity[labels == label] = hu
    for name in ("one", "two"):
        write(folder / name / "ct.nii.gz", intensity)
        write(folder / name / "label.nii.gz", labels)
    training = [{"image": f"{name}/ct.nii.gz", "label": f"{name}/label.nii.gz"} for name in ("one", "two")]
    (folder / "dataset.json").write_text(json.dumps({"labels": LABELS, "training": training}))
    return folder


def tiny_options(folder: Path, **changes) -> TrainOptions:
    """The compact nets at 6 mm on patches of 16, the coarse net at the same resolution: two voxels must be left at its bottom."""
    sizes = {"spacing_mm": (6.0, 6.0, 6.0), "patch_size": (16, 16, 16), "coarse_factor": (1, 1, 1)}
    values = sizes | {"data": (f"decathlon:{folder}",), "iterations": 4, "top_k_patches": 1, "random_patches": 1, "seed": 3}
    return TrainOptions(**(values | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return a_data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def a_run(data, tmp_path_factory) -> Path:
    """Four iterations without interruption."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    train(tiny_options(data), output=output, num_workers=0, checkpoint_every=2)
    return output


# One step against inference and against the formulas: overlapping patches, longer along one axis.


def step_options(**changes) -> TrainOptions:
    values = {
        "data": ("decathlon:nowhere",),
        "spacing_mm": (6.0, 6.0, 6.0),
        "patch_size": (16, 16, 32),
        "coarse_factor": (1, 1, 2),
        "top_k_patches": 2,
        "random_patches": 1,
        "entropy_weight": 0.0,
        "estimator": "gate",
    }
    return TrainOptions(**(values | changes))


def a_sample() -> TrainingSample:
    """A phantom whose size is no multiple of anything."""
    shape = (21, 17, 45)
    volume, labels = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))
    return TrainingSample(name="phantom", intensity=torch.from_numpy(volume.array), labels=torch.from_numpy(labels))


def a_volume(options: TrainOptions, *, seed: int = 5) -> TrainingVolume:
    """The phantom as a step takes it."""
    return TrainingVolume(*prepare(a_sample(), options), torch.Generator().manual_seed(seed))


def a_net() -> NMSWNet:
    """New weights, but class weights that differ and coarse answers that do not drown the local ones."""
    torch.manual_seed(0)
    net = NMSWNet(Architecture(num_classes=4))
    net.class_weights.data = torch.tensor([0.5, -0.7, 2.0, 12.0])
    return net


def manifest_of(options: TrainOptions, net: NMSWNet) -> BundleManifest:
    return BundleManifest(
        name="eager",
        title="",
        description="",
        backbone="unet",
        modality="CT",
        spacing_mm=options.spacing_mm,
        intensity_points=options.intensity_points,
        patch_size=options.patch_size,
        overlap=options.overlap,
        coarse_factor=options.coarse_factor,
        coarse_multiple=net.architecture.coarse_multiple,
        labels=coded_labels(list(LABELS.values())[1:]),
        class_weights=tuple(net.class_weights.tolist()),
        sha256={},
        architecture={},
    )


@pytest.fixture
def spied_step(monkeypatch):
    """Run one step; returns the losses and what its aggregation was given and gave."""

    def run(net: NMSWNet, options: TrainOptions) -> tuple[step_module.Losses, dict]:
        seen = {}
        aggregate_on_patches = step_module._high_on_patches

        def spy(coarse_logits, patch_logits, *, gates, **facts):
            high, is_first = aggregate_on_patches(coarse_logits, patch_logits, gates=gates, **facts)
            high.retain_grad()
            seen.update(facts, coarse_logits=coarse_logits, patch_logits=patch_logits, gates=gates, high=high, is_first=is_first)
            return high, is_first

        monkeypatch.setattr(step_module, "_high_on_patches", spy)
        x, labels, grid = prepare(a_sample(), options)
        losses = training_losses(net, x, labels, grid=grid, options=options, tau=1.0, generator=torch.Generator().manual_seed(5))
        return losses, seen

    return run


def test_prepare_gives_what_inference_gives():
    options, sample = step_options(), a_sample()
    x, labels, grid = prepare(sample, options)
    ijk_to_ras = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), tuple(sample.intensity.shape))
    expected, _, expected_grid = to_model_grid(Volume(sample.intensity.numpy(), ijk_to_ras), manifest_of(options, a_net()))
    assert torch.equal(x, expected) and grid == expected_grid
    assert x.shape == (1, 1, 24, 24, 48) and labels.shape == (24, 24, 48)
    assert torch.equal(labels[:21, :17, :45], sample.labels)
    assert (labels[21:] == 255).all() and (labels[:, 17:] == 255).all() and (labels[:, :, 45:] == 255).all()


def test_sample_is_prepared_on_the_device_that_trains(monkeypatch):
    devices = []
    monkeypatch.setattr(iteration_module, "prepare", lambda sample, options: devices.append(sample.intensity.device) or prepare(sample, options))
    volume = iteration_module._on_device(0, a_sample(), options=step_options(), device=torch.device("meta"))
    assert devices == [volume.x.device] == [volume.labels.device] == [torch.device("meta")]


def test_training_answer_equals_inference_answer_on_the_same_patches(spied_step):
    options, net = step_options(), a_net()
    _, seen = spied_step(net, options)
    nets = Nets(manifest=manifest_of(options, net), coarse_net=net.coarse, local_net=net.local, device=torch.device("cpu"))
    sample = a_sample()
    coarse = coarse_pass(Volume(sample.intensity.numpy(), phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), tuple(sample.intensity.shape))), nets)
    assert torch.equal(coarse.coarse_logits, seen["coarse_logits"])
    labels = refine(coarse, Selection(indices=tuple(seen["indices"]), importance=(0.0,) * 2), nets)
    only_coarse = aggregation.CoarseUpsampler(coarse.coarse_logits, grid=coarse.grid).labels()
    num_clear = num_changed = 0
    for index, high in zip(seen["indices"], seen["high"].detach()):
        best = high.topk(2, dim=0).values
        is_clear = best[0] - best[1] > 1e-4  # training runs the patches as one batch and sums them in the order of drawing
        box = coarse.grid.slices(index)
        assert torch.equal(labels[box][is_clear].long(), high.argmax(0)[is_clear])
        num_clear += int(is_clear.sum())
        num_changed += int((labels[box] != only_coarse[box]).sum())
    assert num_clear > 0.99 * 2 * 16 * 16 * 32 and num_changed > 1000


def test_every_voxel_of_the_patches_counts_once(spied_step):
    losses, seen = spied_step(a_net(), step_options())
    losses.high.backward()
    trained = seen["high"].grad.abs().sum(1) > 0
    assert torch.equal(trained & ~seen["is_first"], torch.zeros_like(trained)) and not seen["is_first"].all()
    times = torch.zeros(seen["grid"].padded_shape)
    for index, is_first in zip(seen["indices"], seen["is_first"]):
        times[seen["grid"].slices(index)] += is_first
    covered = torch.zeros(seen["grid"].padded_shape)
    for index in seen["indices"]:
        covered[seen["grid"].slices(index)] = 1
    assert torch.equal(times, covered)
    assert len(set(seen["indices"])) == 2  # the random patch is trained for itself


def test_total_is_the_sum_of_eq_7(spied_step):
    for estimator in ("gate", "gain"):
        losses, _ = spied_step(a_net(), step_options(entropy_weight=0.25, estimator=estimator))
        expected = losses.coarse + losses.high + losses.patch - 0.25 * losses.entropy + losses.ranking
        torch.testing.assert_close(losses.total, expected)
        assert float(losses.entropy.detach()) > 0


def test_gate_gradient_reaches_the_importance_head_as_the_formula_says(spied_step):
    net = a_net()
    losses, seen = spied_step(net, step_options(estimator="gate"))
    weight = net.coarse.importance_head.perceptron[-1].weight
    losses.total.backward(retain_graph=True)
    found = weight.grad.clone()
    grid, window, a = (
        seen["grid"],
        aggregation.patch_window(seen["grid"].patch_size),
        aggregation.mixing_weights(net.class_weights.detach())[:, None, None, None],
    )
    pull, weight_sum = torch.zeros(4, *grid.padded_shape), torch.zeros(grid.padded_shape)
    for index, gradient in zip(seen["indices"], seen["high"].grad):
        pull[(slice(None), *grid.slices(index))] += gradient
        weight_sum[grid.slices(index)] += window
    upsampled = aggregation.CoarseUpsampler(seen["coarse_logits"], grid=grid).region([slice(0, n) for n in grid.padded_shape])
    benefits = []
    for index, logits in zip(seen["indices"], seen["patch_logits"].detach()):
        box = grid.slices(index)
        benefits.append((pull[(slice(None), *box)] * a * window / weight_sum[box] * (logits - upsampled[(slice(None), *box)])).sum())
    (expected,) = torch.autograd.grad((seen["gates"] * torch.stack(benefits)).sum(), weight)
    assert float(found.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))  # sums of 25,000 float32 terms


def importance_gradient(net: NMSWNet, losses) -> float:
    (gradient,) = torch.autograd.grad(losses.total, net.coarse.importance_head.perceptron[-1].weight, allow_unused=True)
    return 0.0 if gradient is None else float(gradient.abs().max())


def test_scale_gradient_reaches_the_importance_head_only_through_the_patch(spied_step):
    net = a_net()
    losses, seen = spied_step(net, step_options(estimator="scale"))
    assert seen["gates"] is None and importance_gradient(net, losses) > 0
    detached = a_net()
    detached.local.backbone.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
    losses, _ = spied_step(detached, step_options(estimator="scale"))
    assert importance_gradient(detached, losses) == 0
    losses, _ = spied_step(detached, step_options(estimator="gate"))
    assert importance_gradient(detached, losses) > 0


def test_scale_darkens_the_drawn_patches_and_not_the_random_one():
    crops = {}
    for estimator in ("gate", "scale"):
        net, options = a_net(), step_options(estimator=estimator)
        net.local.backbone.register_forward_pre_hook(lambda module, inputs, key=estimator: crops.update({key: inputs[0].detach()}))
        x, labels, grid = prepare(a_sample(), options)
        training_losses(net, x, labels, grid=grid, options=options, tau=1.0, generator=torch.Generator().manual_seed(5))
    shares = [float(dark.sum() / plain.sum()) for dark, plain in zip(crops["scale"], crops["gate"])]
    assert all(0 < share < 1 for share in shares[:2]) and shares[2] == 1
    torch.testing.assert_close(crops["scale"][0], crops["gate"][0] * shares[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["gain", "gate", "scale"])
def test_coarse_answer_is_not_trained_by_the_loss_on_y_high(spied_step, estimator):
    net = a_net()
    losses, seen = spied_step(net, step_options(estimator=estimator))
    assert not seen["coarse_logits"].requires_grad
    head = net.coarse.head.weight
    others = losses.high + losses.patch + losses.ranking + losses.entropy
    (from_others,) = torch.autograd.grad(others, head, retain_graph=True, allow_unused=True)
    (from_coarse,) = torch.autograd.grad(losses.coarse, head)
    assert from_others is None and float(from_coarse.abs().max()) > 0


def test_loss_on_one_sample_falls():
    net, options = a_net(), step_options(patch_size=(16, 16, 16), coarse_factor=(2, 2, 2), overlap=0.0, top_k_patches=1)
    x, labels, grid = prepare(a_sample(), options)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    totals = []
    for _ in range(30):
        losses = training_losses(net, x, labels, grid=grid, options=options, tau=1.0, generator=generator)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(float(losses.total.detach()))
    assert np.mean(totals[-5:]) < 0.8 * np.mean(totals[:3])


# Runs.


def test_train_writes_options_checkpoint_and_tensorboard(a_run, data):
    assert load_run_options(a_run) == tiny_options(data)
    checkpoint = load_checkpoint(a_run)
    assert checkpoint["iteration"] == 4 and checkpoint["label_names"] == ["liver", "spleen", "vertebrae"]
    assert checkpoint["architecture"] == Architecture(num_classes=4).to_dict()
    net = NMSWNet(Architecture(**checkpoint["architecture"]))
    net.load_state_dict(checkpoint["net"])
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())
    assert sorted(path.name.split(".")[0] for path in a_run.iterdir() if path.name != LOCK_NAME) == ["cache", "checkpoint", "curve", "events", "options"]


def test_stopped_and_resumed_run_equals_one_that_was_not_stopped(a_run, data, tmp_path, monkeypatch):
    def save_and_die(*arguments, **facts):
        save_checkpoint(*arguments, **facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(train_module, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_options(data), output=tmp_path / "run", num_workers=0, checkpoint_every=2)
    assert load_checkpoint(tmp_path / "run")["iteration"] == 2
    train(tiny_options(data), output=tmp_path / "run", num_workers=1, checkpoint_every=100, resume=True)
    found, expected = load_checkpoint(tmp_path / "run"), load_checkpoint(a_run)
    assert found["iteration"] == 4
    assert [key for key, value in expected["net"].items() if not torch.equal(found["net"][key], value)] == []
    groups = [checkpoint["optimizer"]["param_groups"][0] for checkpoint in (found, expected)]
    assert groups[0]["lr"] == groups[1]["lr"]


def test_run_killed_before_its_first_checkpoint_starts_over_on_resume(a_run, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "options.json").write_bytes((a_run / "options.json").read_bytes())
    train(tiny_options(data), output=tmp_path / "run", num_workers=0, resume=True)
    found, expected = load_checkpoint(tmp_path / "run")["net"], load_checkpoint(a_run)["net"]
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_run_killed_before_its_first_checkpoint_starts_from_its_initial_run_on_resume(a_run, data, tmp_path):
    options = tiny_options(data, initial_run=str(a_run), iterations=1, learning_rate=0.0, weight_decay=0.0)
    run_folder.write_run_options(tmp_path / "run", options)
    train(options, output=tmp_path / "run", num_workers=0, resume=True)
    found, expected = load_checkpoint(tmp_path / "run")["net"], load_checkpoint(a_run)["net"]
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_kill_while_saving_leaves_the_old_checkpoint(a_run, tmp_path, monkeypatch):
    def torn(values, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "checkpoint.pt").write_bytes((a_run / "checkpoint.pt").read_bytes())
    monkeypatch.setattr(torch, "save", torn)
    net = NMSWNet(Architecture(num_classes=4))
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, TrainingState(net, optimizer, schedule, iteration=9), label_names=[])
    assert load_checkpoint(tmp_path)["iteration"] == 4


def test_resume_with_a_changed_option_names_it_and_leaves_the_run(a_run, data):
    before = (a_run / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match=r"seed was 3, is 4\. Resume with the old ones"):
        train(replace(tiny_options(data), seed=4), output=a_run, num_workers=0, resume=True)
    assert (a_run / "checkpoint.pt").read_bytes() == before


def test_existing_run_is_not_overwritten(a_run, data):
    with pytest.raises(UserError, match="already holds a run. Add --resume"):
        train(tiny_options(data), output=a_run, num_workers=0)


def test_resume_of_nothing_says_which_folder_to_give(data, tmp_path):
    with pytest.raises(UserError, match="Give the folder that 'nmsw train --output' wrote"):
        train(tiny_options(data), output=tmp_path, num_workers=0, resume=True)


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"data": ("decathlon:nowhere",)}, "Check the path after 'decathlon:'"),
        ({"backbone": "unett"}, "Did you mean 'unet'"),
        ({"initial_run": "nowhere"}, "'nowhere' has no checkpoint.pt"),
    ],
)
def test_start_that_failed_leaves_no_run_that_blocks_the_next_start(data, tmp_path, change, fix):
    with pytest.raises(UserError, match=fix):
        train(replace(tiny_options(data), **change), output=tmp_path / "run", num_workers=0)
    assert not (tmp_path / "run").exists()


def test_held_out_case_takes_no_part(data, tmp_path, monkeypatch):
    names = []

    def record(sample, options):
        names.append(sample.name)
        return prepare(sample, options)

    monkeypatch.setattr(iteration_module, "prepare", record)
    train(tiny_options(data, hold_out=("one",), iterations=3), output=tmp_path / "run", num_workers=0)
    assert names == ["two"] * 3


def test_initial_run_gives_the_first_weights(a_run, data, tmp_path, monkeypatch):
    seen = []

    def stop_at_first(net, *_, **__):
        seen.append({key: value.clone() for key, value in net.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(iteration_module, "volume_losses", stop_at_first)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_options(data, initial_run=str(a_run)), output=tmp_path / "run", num_workers=0)
    expected = load_checkpoint(a_run)["net"]
    assert all(torch.equal(seen[0][key], value) for key, value in expected.items())


def test_initial_run_of_other_classes_says_what_must_agree(a_run, data, tmp_path):
    other = a_data_folder(tmp_path / "data")
    values = json.loads((other / "dataset.json").read_text(encoding="utf-8"))
    values["labels"]["4"] = "aorta"
    (other / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="initial_run.*same classes and preset, and the same backbone"):
        train(tiny_options(other, initial_run=str(a_run)), output=tmp_path / "run", num_workers=0)


@pytest.mark.parametrize("iterations", [1, 5])
def test_run_as_short_as_its_warm_up_does_not_divide_by_zero(data, tmp_path, monkeypatch, iterations):
    def no_step(state, samples, **facts):
        state.iteration += 1
        state.schedule.step()
        return torch.zeros(6)

    monkeypatch.setattr(train_module, "train_step", no_step)
    train(tiny_options(data, iterations=iterations, warmup=0.2), output=tmp_path / "run", num_workers=0)


def test_damaged_checkpoint_says_so(tmp_path):
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read.*Start the run again"):
            load_checkpoint(tmp_path)


# Moving average of the weights, precision.


def test_average_of_the_weights_is_what_a_run_ends_with_and_what_is_exported(data, tmp_path, monkeypatch):
    seen = []

    def record(output, state, **facts):
        seen.append({key: value.clone() for key, value in state.net.state_dict().items()})
        save_checkpoint(output, state, **facts)

    monkeypatch.setattr(train_module, "save_checkpoint", record)
    train(tiny_options(data, train="local", ema=0.75, iterations=2), output=tmp_path / "run", num_workers=0, checkpoint_every=1)
    found = run_folder.trained_weights(load_checkpoint(tmp_path / "run"))
    decay = 2 / 11  # of the second step; 0.75 would be that of a long run
    for key, value in found.items():  # the first step starts the average
        torch.testing.assert_close(value, decay * seen[0][key] + (1 - decay) * seen[1][key], rtol=1e-5, atol=1e-7)
    assert not torch.equal(found["local.head.weight"], seen[1]["local.head.weight"])
    bundle = export_bundle(tmp_path / "run", tmp_path / "bundle")
    exported = torch.jit.load(str(bundle / "local.pt")).state_dict()
    torch.testing.assert_close(exported["head.weight"].float(), found["local.head.weight"], rtol=1e-3, atol=1e-4)  # fp16
    later = tiny_options(data, train="local", ema=0.5, iterations=1, learning_rate=0.0, weight_decay=0.0, initial_run=str(tmp_path / "run"))
    train(later, output=tmp_path / "later", num_workers=0)
    assert all(torch.equal(value, found[key]) for key, value in load_checkpoint(tmp_path / "later")["net"].items())


def test_average_of_a_short_run_is_one_of_its_last_steps_and_of_a_long_one_what_the_decay_says():
    for steps, decay, window in ((40, 0.999, 0.15), (4000, 0.99, 200 / 4000)):
        average, weight = [torch.zeros(1), torch.tensor(0)], [torch.zeros(1), torch.tensor(0)]
        for step in range(1, steps + 1):
            weight = [torch.tensor([float(step)]), torch.tensor(step)]
            moving_average(decay)(average, weight, torch.tensor(step))
        assert steps * (1 - window) < float(average[0]) < steps and int(average[1]) == steps


def test_stopped_and_resumed_run_has_the_same_average(data, tmp_path, monkeypatch):
    options = tiny_options(data, train="local", ema=0.9, iterations=3)
    train(options, output=tmp_path / "straight", num_workers=0)

    def save_and_die(*arguments, **facts):
        save_checkpoint(*arguments, **facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(train_module, "save_checkpoint", save_and_die)
        train(options, output=tmp_path / "stopped", num_workers=0, checkpoint_every=2)
    train(options, output=tmp_path / "stopped", num_workers=0, resume=True)
    found, expected = load_checkpoint(tmp_path / "stopped"), load_checkpoint(tmp_path / "straight")
    for part in ("net", "average"):
        assert all(torch.equal(found[part][key], value) for key, value in expected[part].items())
    rows = [(tmp_path / name / "curve.csv").read_text(encoding="utf-8").splitlines() for name in ("stopped", "straight")]
    assert len(rows[0]) == len(set(rows[0])) >= 1


def test_average_of_a_sparse_net_is_as_sparse_as_the_net():
    net = {"local.backbone.nodes.a.weight": torch.tensor([0.0, 2.0]), "local.head.weight": torch.tensor([0.0, 2.0])}
    average = {"n_averaged": torch.tensor(3)} | {f"module.{key}": torch.ones(2) for key in net}
    found = run_folder.trained_weights({"net": net, "average": average, "sparsity": {"masks": {}}})
    assert found["local.backbone.nodes.a.weight"].tolist() == [0, 1] and found["local.head.weight"].tolist() == [1, 1]


def test_weights_of_an_earlier_version_are_refused_with_one_sentence(a_run, data, tmp_path):
    checkpoint = load_checkpoint(a_run)
    for part in ("weight", "bias"):  # the importance head was one convolution
        checkpoint["net"][f"coarse.importance_head.{part}"] = checkpoint["net"].pop(f"coarse.importance_head.perceptron.0.{part}")
    (tmp_path / "old").mkdir()
    torch.save(checkpoint, tmp_path / "old" / "checkpoint.pt")
    (tmp_path / "old" / "options.json").write_bytes((a_run / "options.json").read_bytes())
    expected = "^The weights of the run '.*old' are not those of this version's nets .*Train it again, or use the version that made it.$"
    starts = [
        lambda: train(tiny_options(data), output=tmp_path / "old", num_workers=0, resume=True),
        lambda: train(tiny_options(data, initial_run=str(tmp_path / "old")), output=tmp_path / "run", num_workers=0),
        lambda: train(tiny_options(data, train="patches", coarse_run=str(tmp_path / "old")), output=tmp_path / "run", num_workers=0),
        lambda: export_bundle(tmp_path / "old", tmp_path / "bundle"),
    ]
    for start in starts:
        with pytest.raises(UserError, match=expected):
            start()


def test_class_weights_learn_at_a_rate_of_their_own_and_do_not_decay(data):
    group = iteration_module.ProcessGroup(torch.device("cpu"))
    state = iteration_module.new_state(tiny_options(data, iterations=10, learning_rate=1e-3), num_classes=4, group=group)
    only = iteration_module.new_state(tiny_options(data, iterations=10, train="weights", initial_run="run"), num_classes=4, group=group)
    nets, class_weights = state.optimizer.param_groups
    assert class_weights["params"] == [state.net.class_weights] and class_weights["weight_decay"] == 0 < nets["weight_decay"]
    assert class_weights["max_lr"] == pytest.approx(30 * nets["max_lr"]) and nets["max_lr"] == 1e-3
    assert [group["params"] for group in only.optimizer.param_groups] == [[only.net.class_weights]]
    sgd = iteration_module.new_state(tiny_options(data, iterations=10, optimizer="sgd"), num_classes=4, group=group)
    assert [group["lr"] for group in sgd.optimizer.param_groups] == [3e-4] * 2  # a step of SGD is as large as its gradient


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_class_weight_at_its_bound_comes_back_when_its_gradient_turns(data, optimizer):
    options = tiny_options(data, iterations=100, optimizer=optimizer, learning_rate=0.05, warmup=0.0, train="weights", initial_run="run")
    group = iteration_module.ProcessGroup(torch.device("cpu"))
    state, direction, seen = iteration_module.new_state(options, num_classes=4, group=group), 1.0, []

    def pulled(net, volume, **_):
        total = direction * aggregation.mixing_weights(net.class_weights).sum()
        return step_module.Losses(*[torch.zeros(())] * 5, total=total)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(iteration_module, "volume_losses", pulled)
        for iteration in range(80):
            direction = 1.0 if iteration < 20 else -1.0
            train_step(state, iter([(iteration, a_sample())]), options=options, tau=1.0, group=group)
            seen.append(float(state.net.class_weights.detach().min()))
    assert min(seen) == -1.0 and seen[-1] > -0.5


def test_bf16_on_a_cpu_that_emulates_it_is_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(iteration_module, "has_amx", lambda: False)
    with pytest.raises(UserError, match="^precision is bf16 on a CPU without AMX.*Use --precision fp32, or a GPU with --device cuda.$"):
        train(tiny_options(data, precision="bf16"), output=tmp_path / "run", num_workers=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not iteration_module.has_amx(), reason="this processor has no AMX, so bf16 is refused")
def test_bf16_on_a_processor_with_amx_gives_the_same_weights_twice(data, tmp_path):
    for name in ("one", "other"):
        train(tiny_options(data, precision="bf16", iterations=3), output=tmp_path / name, num_workers=0)
    one, other = (load_checkpoint(tmp_path / name)["net"] for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_importance_trains_upon_finished_nets_which_stay_as_they_are(a_run, data, tmp_path):
    with pytest.raises(UserError, match="without initial_run. Give --initial-run RUN"):
        tiny_options(data, train="importance")
    train(tiny_options(data, train="importance", initial_run=str(a_run), iterations=2), output=tmp_path / "run", num_workers=0)
    before, after = load_checkpoint(a_run)["net"], load_checkpoint(tmp_path / "run")["net"]
    moved = {".".join(key.split(".")[:2]) for key, value in before.items() if not torch.equal(value, after[key])}
    assert "coarse.importance_head" in moved and moved <= {"coarse.importance_head", "class_weights"}


# Baselines, batches, and what goes wrong.


@pytest.mark.parametrize(("part", "moves"), [("coarse", {"coarse.backbone", "coarse.head"}), ("local", {"local.backbone", "local.head"})])
def test_net_that_trains_alone_leaves_the_rest_as_it_was(data, tmp_path, part, moves):
    train(tiny_options(data, train=part, iterations=2), output=tmp_path / "run", num_workers=0)
    torch.manual_seed(3)
    before, after = NMSWNet(Architecture(num_classes=4)).state_dict(), load_checkpoint(tmp_path / "run")["net"]
    moved = {".".join(key.split(".")[:2]) for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == moves


def test_patches_train_upon_the_coarse_net_of_another_run_which_stays_as_it_is(a_run, data, tmp_path):
    options = tiny_options(data, train="patches", coarse_run=str(a_run), backbone="e2enet", patch_size=(32, 16, 16), iterations=2)
    train(options, output=tmp_path / "run", num_workers=0)
    torch.manual_seed(3)
    new = NMSWNet(Architecture(num_classes=4, backbone="e2enet")).state_dict()
    coarse, after = load_checkpoint(a_run)["net"], load_checkpoint(tmp_path / "run")["net"]
    for key, value in after.items():
        if key.startswith("coarse."):
            assert torch.equal(value, coarse[key]), key
    moved = {key.split(".")[0] for key, value in new.items() if not key.startswith("coarse.") and not torch.equal(value, after[key])}
    assert moved == {"local", "class_weights"}


def test_losses_upon_a_frozen_coarse_net_have_the_same_gradient_for_all_else():
    gradients = []
    for options in (step_options(), step_options(train="patches", coarse_run="some")):
        net = a_net()
        trained_parameters(net, options)
        volume_losses(net, a_volume(options, seed=1), options=options, tau=1.0).total.backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    both, patches = gradients
    assert {name for name, gradient in patches.items() if gradient is not None} == {name for name in both if not name.startswith("coarse.")}
    assert all(torch.equal(gradient, both[name]) for name, gradient in patches.items() if gradient is not None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "patches"}, "^train is 'patches', which needs a finished coarse net. Give --coarse-run RUN"),
        ({"coarse_run": "some"}, "^coarse_run is 'some', but train is 'both', which does not use one"),
        ({"train": "local", "coarse_run": "some"}, "^coarse_run is 'some', but train is 'local', which does not use one"),
    ],
)
def test_frozen_coarse_net_and_its_run_are_given_together(changes, message):
    with pytest.raises(UserError, match=message):
        step_options(**changes)


def test_coarse_run_of_another_preset_says_what_must_agree(a_run, data, tmp_path):
    options = tiny_options(data, train="patches", coarse_run=str(a_run), preset="paper", patch_size=(64, 32, 32))
    with pytest.raises(UserError, match="coarse_run.*It needs the same classes and preset.$"):
        train(options, output=tmp_path / "run", num_workers=0)
    assert not (tmp_path / "run").exists()


def test_local_net_alone_sees_foreground_two_times_of_three(monkeypatch):
    options, net = step_options(train="local", patch_size=(16, 16, 16), coarse_factor=(1, 1, 1), top_k_patches=1, random_patches=0), a_net()
    x, labels, grid = prepare(a_sample(), options)
    middles = []

    def record(net, crops, parts, options):
        middles.append(float(crops[0, 0, 8, 8, 8]))
        return (torch.zeros(1, 4, 16, 16, 16, requires_grad=True),)

    monkeypatch.setattr(step_module, "_run_local", record)
    x = torch.nn.functional.pad((labels > 0).logical_and(labels < 255).float(), [8] * 6)[None, None]  # 1 on the foreground
    labels = torch.nn.functional.pad(labels, [8] * 6, value=255)
    for seed in range(120):
        local_losses(net, TrainingVolume(x, labels, grid, torch.Generator().manual_seed(seed)), options=options)
    assert 0.55 < np.mean(middles) < 0.78
    assert trained_parameters(net, options) == list(net.local.parameters())


def test_losses_of_one_net_alone_are_its_terms_of_eq_7(spied_step):
    net = a_net()
    both, _ = spied_step(net, step_options())
    options = step_options(train="coarse")
    alone = volume_losses(net, a_volume(options), options=options, tau=1.0)
    torch.testing.assert_close(alone.total, both.coarse)
    assert float(alone.patch) == float(alone.high) == 0


def test_deep_supervision_is_the_weighted_mean_of_its_resolutions():
    labels = a_sample().labels[None, :16, :16, :32]
    deep = tuple(torch.randn(1, 4, *(side // 2**depth for side in (16, 16, 32)), generator=torch.Generator().manual_seed(depth)) for depth in range(3))
    losses = [segmentation_loss(deep[0], labels)]
    losses += [
        soft_segmentation_loss(
            logits,
            class_shares(labels, factor=[fine // coarse for fine, coarse in zip(labels.shape[1:], logits.shape[2:])], shape=logits.shape[2:], num_classes=4),
        )
        for logits in deep[1:]
    ]
    torch.testing.assert_close(step_module._patch_loss(deep, labels), (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75)


def test_sparse_e2enet_trains_resumes_and_stays_sparse(data, tmp_path, monkeypatch):
    options = tiny_options(data, backbone="e2enet", sparsity=0.8, patch_size=(32, 16, 16), iterations=3)
    train(options, output=tmp_path / "straight", num_workers=0)

    def save_and_die(*arguments, **facts):
        save_checkpoint(*arguments, **facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(train_module, "save_checkpoint", save_and_die)
        train(options, output=tmp_path / "stopped", num_workers=0, checkpoint_every=2)
    train(options, output=tmp_path / "stopped", num_workers=0, resume=True)
    found, expected = load_checkpoint(tmp_path / "stopped"), load_checkpoint(tmp_path / "straight")
    assert all(torch.equal(found["net"][key], value) for key, value in expected["net"].items())
    masks = expected["sparsity"]["masks"]
    assert 0.15 < sum(float(mask.float().mean()) for mask in masks.values()) / len(masks) < 0.25
    assert all(torch.equal(found["sparsity"]["masks"][name], mask) for name, mask in masks.items())


def test_run_that_starts_from_a_sparse_one_keeps_its_masks(data, tmp_path):
    options = tiny_options(data, backbone="e2enet", sparsity=0.8, patch_size=(32, 16, 16), iterations=1)
    train(options, output=tmp_path / "first", num_workers=0)
    train(replace(options, seed=4, initial_run=str(tmp_path / "first")), output=tmp_path / "second", num_workers=0)
    first, second = (load_checkpoint(tmp_path / name)["sparsity"]["masks"] for name in ("first", "second"))
    assert all(torch.equal(second[name], mask) for name, mask in first.items())
    with pytest.raises(UserError, match="has sparsity 0.8, this run 0.5. Give the same --sparsity"):
        train(replace(options, sparsity=0.5, initial_run=str(tmp_path / "first")), output=tmp_path / "third", num_workers=0)


def test_thinned_out_e2enet_goes_on_narrow_without_masks_of_its_own(data, tmp_path):
    options = tiny_options(data, backbone="e2enet", sparsity=0.8, patch_size=(32, 16, 16), iterations=1)
    train(options, output=tmp_path / "sparse", num_workers=0)
    bundle = export_bundle(tmp_path / "sparse", tmp_path / "thin")
    kept = load_bundle(bundle).manifest.architecture["fusion_channels"]
    narrow = replace(options, sparsity=0.0, initial_bundle=str(bundle), train="local")
    train(narrow, output=tmp_path / "narrow", num_workers=0)
    train(replace(narrow, iterations=2), output=tmp_path / "narrow", num_workers=0, resume=True)
    before, after = torch.jit.load(str(bundle / "local.pt")).state_dict(), load_checkpoint(tmp_path / "narrow")
    assert list(after["architecture"]["fusion_channels"]) == list(kept)
    moved = {key: float((after["net"][f"local.{key}"] - value.float()).abs().max()) for key, value in before.items() if key.endswith("weight")}
    assert 0 < max(moved.values()) < 0.05  # two steps from the bundle's weights
    train(replace(narrow, initial_bundle="", initial_run=str(tmp_path / "narrow")), output=tmp_path / "again", num_workers=0)
    assert load_bundle(export_bundle(tmp_path / "again", tmp_path / "exported")).manifest.architecture["fusion_channels"] == kept
    with pytest.raises(UserError, match="thinned out for good, which cannot get masks again. Leave --sparsity out"):
        train(replace(options, initial_run=str(tmp_path / "narrow")), output=tmp_path / "masked", num_workers=0)


def test_masks_move_as_often_as_the_options_say(data, tmp_path):
    options = tiny_options(data, backbone="e2enet", sparsity=0.5, patch_size=(32, 16, 16), iterations=2)
    masks = []
    for every in (1, 2):
        train(replace(options, sparsity_update_every=every), output=tmp_path / str(every), num_workers=0)
        masks.append(load_checkpoint(tmp_path / str(every))["sparsity"]["masks"])
    assert any(not torch.equal(masks[0][name], mask) for name, mask in masks[1].items())


def test_gradient_of_a_batch_is_the_mean_over_its_volumes(data, tmp_path, monkeypatch):
    seen = []

    def record(state, samples, *, options, **facts):
        monkeypatch.setattr(state.optimizer, "step", lambda: None)  # the same weights for all volumes
        state.optimizer.zero_grad()
        values = step(state, samples, options=options, **facts)
        seen.append(torch.cat([parameter.grad.flatten() for parameter in state.net.parameters()]))
        return values

    step = iteration_module.train_step
    monkeypatch.setattr(train_module, "train_step", record)
    constant = {"tau_start": 1.0, "tau_end": 1.0, "gradient_clip": 1e9}
    train(tiny_options(data, iterations=2, **constant), output=tmp_path / "single", num_workers=0)
    train(tiny_options(data, iterations=1, batch_size=2, **constant), output=tmp_path / "pair", num_workers=0)
    torch.testing.assert_close(seen[2], (seen[0] + seen[1]) / 2, rtol=1e-3, atol=1e-6 * float(seen[2].abs().max()) + 1e-7)


def test_step_that_is_not_finite_is_left_out_and_the_run_goes_on(data, tmp_path, monkeypatch, caplog):
    calls, weights = [], []

    def sometimes_nan(net, *arguments, **facts):
        calls.append(1)
        weights.append(net.local.head.weight.detach().clone())
        losses = volume_losses(net, *arguments, **facts)
        return replace(losses, total=losses.total * float("nan")) if len(calls) == 2 else losses

    monkeypatch.setattr(iteration_module, "volume_losses", sometimes_nan)
    train(tiny_options(data, iterations=3), output=tmp_path / "run", num_workers=0)
    assert "not finite; this step is left out" in caplog.text
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert all(torch.isfinite(value).all() for value in load_checkpoint(tmp_path / "run")["net"].values())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")])
def test_full_disk_keeps_the_old_checkpoint_and_says_how_to_go_on(a_run, tmp_path, monkeypatch, error):
    def full(values, path):
        Path(path).write_bytes(b"half")
        raise error

    (tmp_path / "checkpoint.pt").write_bytes((a_run / "checkpoint.pt").read_bytes())
    monkeypatch.setattr(torch, "save", full)
    net = NMSWNet(Architecture(num_classes=4))
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(UserError, match="Make room on the disk, then go on with --resume; the last checkpoint is still there"):
        save_checkpoint(tmp_path, TrainingState(net, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)), label_names=[])
    assert load_checkpoint(tmp_path)["iteration"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_full_disk_at_the_first_checkpoint_names_none_that_is_not_there(data, tmp_path, monkeypatch):
    def full(values, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"No space left on device\). Make room on the disk, then start again with --resume\.$"):
            train(tiny_options(data, iterations=1), output=tmp_path / "run", num_workers=0)
    train(tiny_options(data, iterations=1), output=tmp_path / "run", num_workers=0, resume=True)
    assert load_checkpoint(tmp_path / "run")["iteration"] == 1


def test_options_that_cannot_be_replaced_leave_the_old_ones(data, tmp_path, monkeypatch):
    run_folder.write_run_options(tmp_path, tiny_options(data))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("NMSWSegment.files.output_file.os.replace", full)
    with pytest.raises(UserError, match="cannot be written.*Make room on the disk, then start again with --resume"):
        run_folder.write_run_options(tmp_path, tiny_options(data, iterations=9))
    assert load_run_options(tmp_path) == tiny_options(data) and [path.name for path in tmp_path.iterdir()] == ["options.json"]


def test_run_folder_that_cannot_be_made_says_so(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written.*Make room"):
        run_folder.write_run_options(tmp_path / "file" / "run", tiny_options(data))


def test_patch_size_that_the_backbone_cannot_take_says_which_it_can(data, tmp_path):
    with pytest.raises(UserError, match="20 x 16 x 36 voxels do not suit.*multiple of 8.*Use 24 x 16 x 40"):
        train(tiny_options(data, patch_size=(20, 16, 36)), output=tmp_path / "run", num_workers=0)
    assert not (tmp_path / "run").exists()


def test_sample_of_one_patch_is_no_problem_for_the_coarse_net():
    options, net = step_options(patch_size=(16, 16, 16), coarse_factor=(2, 2, 2)), a_net()
    sample = replace(a_sample(), intensity=a_sample().intensity[:12, :12, :12], labels=a_sample().labels[:12, :12, :12])
    x, labels, grid = prepare(sample, options)
    losses = training_losses(net, x, labels, grid=grid, options=options, tau=1.0, generator=torch.Generator().manual_seed(0))
    assert grid.num_candidates == 1 and torch.isfinite(losses.total)


# Options.


def test_options_come_back_from_json_unchanged(data):
    options = tiny_options(data, hold_out=("one",), intensity_points=((-1.0, 0.0), (2.0, 0.5), (3.0, 1.0)))
    assert TrainOptions.from_dict(json.loads(json.dumps(vars(options)))) == options


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"estimator": "gates"}, "Choose from: gain, gate, scale"),
        ({"preset": "compct"}, "Did you mean 'compact'"),
        ({"precision": "fp16"}, "Choose from: fp32, bf16"),
        ({"iterations": 0}, "must be at least 1"),
        ({"top_k_patches": 0, "random_patches": 0}, "must be at least 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"augmentation": "none"}, "Choose from: scan, paper"),
        ({"train": "locl"}, "Did you mean 'local'"),
        ({"sparsity": 0.8}, "only e2enet can be sparse"),
        ({"overlap": 0.45}, "Use overlap 0.5 with an even patch_size"),
        ({"spacing_mm": (0.0, 1.0, 1.0)}, "must be positive"),
    ],
)
def test_impossible_option_says_what_to_change(change, fix):
    with pytest.raises(UserError, match=fix):
        tiny_options(Path("nowhere"), **change)


def test_options_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'learning_rate'"):
        TrainOptions.from_dict({"data": [], "learning_rates": 1})


def test_flags_have_the_defaults_of_the_options(monkeypatch, tmp_path):
    parser = argparse.ArgumentParser()
    train_module.add_arguments(parser)
    called = {}
    monkeypatch.setattr(train_module, "train", lambda options, **facts: called.update(options=options, **facts))
    words = ["--data", "decathlon:a", "--data", "anatomies:b", "--output", str(tmp_path), "--device", "cpu"]
    assert train_module.run(parser.parse_args(words)) == 0
    assert called["options"] == TrainOptions(data=("decathlon:a", "anatomies:b")) and not called["resume"]
    more = ["--hold-out", "one,two", "--spacing", "5", "2", "1", "--iterations", "7", "--learning-rate", "0.01", "--resume", "--workers", "3"]
    assert train_module.run(parser.parse_args(words + more)) == 0
    assert called["options"] == TrainOptions(
        data=("decathlon:a", "anatomies:b"), hold_out=("one", "two"), spacing_mm=(5.0, 2.0, 1.0), iterations=7, learning_rate=0.01
    )
    assert called["resume"] and called["num_workers"] == 3


def test_recipe_sets_options_that_flags_override(monkeypatch, tmp_path):
    parser = argparse.ArgumentParser()
    train_module.add_arguments(parser)
    called = {}
    monkeypatch.setattr(train_module, "train", lambda options, **facts: called.update(options=options))
    words = ["--data", "word:a", "--output", str(tmp_path), "--device", "cpu", "--recipe", "paper-word"]
    train_module.run(parser.parse_args(words))
    paper = called["options"]
    assert (paper.preset, paper.spacing_mm, paper.patch_size, paper.coarse_factor, paper.augmentation) == (
        "paper",
        (3.0, 1.0, 1.0),
        (128, 128, 128),
        (3, 3, 3),
        "paper",
    )
    assert paper.intensity_points == ((-250.0, 0.0), (500.0, 1.0))
    train_module.run(parser.parse_args([*words, "--patch-size", "96", "96", "64", "--window", "-250", "1100"]))
    assert called["options"] == replace(paper, patch_size=(96, 96, 64), intensity_points=((-250.0, 0.0), (1100.0, 1.0)))
    with pytest.raises(UserError, match="Did you mean 'paper-word'"):
        train_module.run(parser.parse_args([*words[:-1], "paper-wrd"]))
    with pytest.raises(UserError, match="lower bound first"):
        train_module.run(parser.parse_args([*words, "--window", "500", "-250"]))


def test_sample_on_disk_reads_like_training_data(data):
    # The files of the fixture are S-A-R; a mistake here would make the other tests agree on the wrong side.
    volume = read_volume(data / "one" / "label.nii.gz")
    right_mm = (volume.ijk_to_ras @ np.array([*np.argwhere(volume.array == 1).mean(0)[::-1], 1]))[0]
    left_mm = (volume.ijk_to_ras @ np.array([*np.argwhere(volume.array == 2).mean(0)[::-1], 1]))[0]
    assert right_mm > left_mm + 50
