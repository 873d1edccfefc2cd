"""From a run to a bundle: what is stored, what is refused, and that the bundle segments like the trained nets."""

import argparse
import json
import shutil
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("einops")  # MONAI's Swin-UNETR needs it

from conftest import ROOT, windows_pipe  # noqa: E402
from test_train import a_data_folder, tiny_options  # noqa: E402

from NMSWSegment.command_line import main  # noqa: E402
from NMSWSegment.engine.runtime import Nets, open_nets  # noqa: E402
from NMSWSegment.engine.segment import RunCache, choose, coarse_pass, refine, segment_volume  # noqa: E402
from NMSWSegment.evaluation.costs import bundle_costs  # noqa: E402
from NMSWSegment.files import phantoms  # noqa: E402
from NMSWSegment.files.bundle import load_bundle  # noqa: E402
from NMSWSegment.files.grid import CandidateGrid  # noqa: E402
from NMSWSegment.files.volume import read_volume, write_volume  # noqa: E402
from NMSWSegment.nets.backbones import BACKBONES  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, LocalNet, NMSWNet  # noqa: E402
from NMSWSegment.protocol import SegmentOptions, UserError  # noqa: E402
from NMSWSegment.samples.case_source import CaseSource  # noqa: E402
from NMSWSegment.training import export as export_module  # noqa: E402
from NMSWSegment.training.calibration import THRESHOLDS, TOLERANCE  # noqa: E402
from NMSWSegment.training.export import check_parity, export_bundle, write_bundle  # noqa: E402
from NMSWSegment.training.initial_weights import case_digest  # noqa: E402
from NMSWSegment.training.options import OPTIONS_NAME  # noqa: E402
from NMSWSegment.training.run_folder import BEST_NAME, CHECKPOINT_NAME, load_checkpoint, load_run_options  # noqa: E402
from NMSWSegment.training.sparse import FusionSparsity, SparsityOptions  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402

OPTIONS = SegmentOptions(num_patches=3, device="cpu", threads=1)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    data = a_data_folder(tmp_path_factory.mktemp("data"))
    train(tiny_options(data, hold_out=("two",), iterations=2), output=output, num_workers=0)
    return output


@pytest.fixture(scope="module")
def a_bundle(a_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    scores = folder / "scores.json"
    scores.write_text(json.dumps({"cases": {"two": {"all": {"mean": 0.5, "seconds": 1.0, "candidates": 8, "dsc": {"liver": 0.5}}}}}))
    notes = folder / "notes.json"
    notes.write_text(json.dumps({"trained_on": "One tiny case.", "attributions": ["Nobody, public domain"]}))
    return export_bundle(a_run, folder / "tiny-net", title="Tiny net", description="For tests.", scores=(scores,), data_notes=(notes,))


def a_run_of(backbone: str, folder: Path) -> Path:
    """A run folder with random weights; those of an e2enet are masked by channel, as after sparse training."""
    torch.manual_seed(7)
    net = NMSWNet(Architecture(num_classes=4, backbone=backbone))
    torch.nn.init.normal_(net.class_weights)
    if backbone == "e2enet":
        FusionSparsity(net.local.backbone, torch.optim.AdamW(net.parameters()), options=SparsityOptions(iterations=10))
    options = tiny_options(folder, backbone=backbone, patch_size=(32, 64, 32), coarse_factor=(2, 2, 2))
    folder.mkdir(parents=True)
    (folder / OPTIONS_NAME).write_text(json.dumps(asdict(options)))
    torch.save(
        {"net": net.state_dict(), "architecture": net.architecture.to_dict(), "label_names": ["liver", "spleen", "vertebrae"], "iteration": 1},
        folder / CHECKPOINT_NAME,
    )
    return folder


@pytest.fixture(scope="module", params=BACKBONES)
def a_bundle_of_each(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return export_bundle(a_run_of(request.param, folder / "run"), folder / "bundle")


@pytest.fixture
def a_volume():
    shape = (30, 21, 41)
    return phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))[0]


def test_attributions_of_a_bundle_stay_with_the_runs_that_build_upon_one_that_started_from_it(tmp_path, caplog):
    first = a_run_of("unet", tmp_path / "first")
    for name, change in (
        ("first", {"initial_bundle": "torso-unet"}),
        ("second", {"initial_run": str(first)}),
        ("lost", {"initial_run": str(tmp_path / "gone")}),
    ):
        folder = first if name == "first" else a_run_of("unet", tmp_path / name)
        values = json.loads((folder / OPTIONS_NAME).read_text(encoding="utf-8"))
        (folder / OPTIONS_NAME).write_text(json.dumps(values | change))
    second, lost = (load_bundle(export_bundle(tmp_path / name, tmp_path / f"{name}-bundle")).manifest for name in ("second", "lost"))
    assert second.attributions == tuple(dict.fromkeys(load_bundle("torso-unet").manifest.attributions))
    assert lost.attributions == () and "are not known any more" in caplog.text


def test_auto_is_calibrated_on_what_the_run_held_out(a_run, tmp_path, monkeypatch):
    bundle = load_bundle(export_bundle(a_run, tmp_path / "bundle", calibrates=True))
    points = bundle.manifest.training["auto"]
    assert [point["auto_gain"] for point in points] == [None, *THRESHOLDS[::-1], None]
    assert points[0]["patches"] == points[0]["predicted"] == 0 and points[-1]["patches"] == points[-1]["candidates"] > 1
    for earlier, later in zip(points, points[1:]):
        assert earlier["patches"] <= later["patches"] and earlier["predicted"] <= later["predicted"] <= 1.0
    found = next(point for point in points if point["auto_gain"] == bundle.manifest.auto_gain)
    assert found["dsc"] >= points[-1]["dsc"] - TOLERANCE or bundle.manifest.auto_gain == min(THRESHOLDS)
    card = (bundle.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"The next patch must cover {100 * bundle.manifest.auto_gain:g} % of the expected error" in card and "| all patches |" in card
    volume = read_volume(Path(load_run_options(a_run).data[0].partition(":")[2]) / "two" / "ct.nii.gz")
    auto = segment_volume(volume, bundle, options=SegmentOptions(num_patches="auto", device="cpu", threads=1))
    assert len(auto.patches) == found["patches"]


def test_auto_cannot_be_calibrated_without_held_out_cases(tmp_path):
    data = a_data_folder(tmp_path / "data")
    train(tiny_options(data, iterations=1), output=tmp_path / "run", num_workers=0)
    with pytest.raises(UserError, match=r"but there are none. Leave --calibrate out, or train every run and every stage.*\(--hold-out\)"):
        export_bundle(tmp_path / "run", tmp_path / "bundle", calibrates=True)
    assert not (tmp_path / "bundle").exists()


def with_case_names(run: Path, folder: Path, *, options: dict = {}, **roles: list[str]) -> Path:
    """A copy of a run that says of itself that it had other cases."""
    shutil.copytree(run, folder)
    checkpoint = load_checkpoint(run)
    torch.save(checkpoint | {"case_names": checkpoint["case_names"] | roles}, folder / CHECKPOINT_NAME)
    torch.save(checkpoint | {"case_names": checkpoint["case_names"] | roles}, folder / BEST_NAME)
    values = json.loads((run / OPTIONS_NAME).read_text(encoding="utf-8"))
    (folder / OPTIONS_NAME).write_text(json.dumps(values | options))
    return folder


def calibrated_on(monkeypatch) -> list[str]:
    """The cases that a calibration measures."""
    seen = []
    whole = CaseSource.whole

    def record(source):
        seen.append(source.name)
        return whole(source)

    monkeypatch.setattr(CaseSource, "whole", record)
    return seen


def test_ensemble_is_calibrated_on_cases_that_all_its_runs_held_out(a_run, tmp_path, monkeypatch):
    seen = calibrated_on(monkeypatch)
    same = with_case_names(a_run, tmp_path / "same")
    other = with_case_names(a_run, tmp_path / "other", training=["two"], validation=["one"], options={"hold_out": ["one"]})
    with pytest.raises(UserError, match="neither the runs of the model nor what they started from were trained on, but there are none"):
        export_bundle([a_run, other], tmp_path / "bundle", calibrates=True)
    assert seen == []
    fold = with_case_names(a_run, tmp_path / "fold", training=["one"], validation=[], options={"fold": 0, "folds": 2})  # left out of every fold
    for number, runs in enumerate(([a_run, same], [fold])):
        assert load_bundle(export_bundle(runs, tmp_path / str(number), calibrates=True)).manifest.training["held_out"] == ["two"]
    assert seen == ["two", "two"]


def test_calibration_leaves_out_cases_without_structures_and_refuses_when_none_is_left(tmp_path):
    data = a_data_folder(tmp_path / "data")
    label = read_volume(data / "two" / "label.nii.gz")
    for name in ("three", "four"):
        shutil.copytree(data / "two", data / name)
        write_volume(replace(label, array=np.zeros_like(label.array)), data / name / "label.nii.gz")
    values = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    values["training"] += [{"image": f"{name}/ct.nii.gz", "label": f"{name}/label.nii.gz"} for name in ("three", "four")]
    (data / "dataset.json").write_text(json.dumps(values))
    points = []
    for number, held_out in enumerate((("two",), ("two", "three"), ("three", "four"))):
        run = tmp_path / f"run{number}"
        train(tiny_options(data, hold_out=held_out, iterations=1, validate_every=0), output=run, num_workers=0)
        if "two" in held_out:
            points.append(load_bundle(export_bundle(run, tmp_path / f"bundle{number}", calibrates=True)).manifest.training["auto"])
        else:
            with pytest.raises(UserError, match="none of 2 does. Leave --calibrate out, or correct the labels"):
                export_bundle(run, tmp_path / "bundle", calibrates=True)
    assert all(np.isfinite(point["dsc"]) for point in points[1]) and [len(one) for one in points] == [len(THRESHOLDS) + 2] * 2


def test_calibration_runs_on_the_device_that_is_asked_for_and_the_export_on_the_cpu(a_run, tmp_path, monkeypatch):
    used = []
    calibrate = export_module.calibrate

    def record(nets, cases):
        used.append(nets.device)
        assert nets.on_cpu()[0] is not nets.coarse_net
        return calibrate(nets, cases)

    monkeypatch.setattr(export_module, "calibrate", record)
    parser = argparse.ArgumentParser()
    export_module.add_arguments(parser)
    assert export_module.run(parser.parse_args([str(a_run), "-o", str(tmp_path / "bundle"), "--calibrate", "--device", "cpu"])) == 0
    assert used == [torch.device("cpu")]
    with pytest.raises(UserError, match="Device 'cuda:77' is not there"):
        export_bundle(a_run, tmp_path / "other", calibrates=True, device="cuda:77")


@pytest.fixture(scope="module")
def coarse_on_all(tmp_path_factory) -> Path:
    """A coarse net that has learned from both cases."""
    folder = tmp_path_factory.mktemp("stages")
    train(tiny_options(a_data_folder(folder / "data"), train="coarse", iterations=1), output=folder / "coarse", num_workers=0)
    return folder / "coarse"


@pytest.mark.parametrize("earlier", ["coarse_run", "initial_run", "initial_bundle"])
def test_case_that_an_earlier_stage_was_trained_on_is_not_held_out(coarse_on_all, tmp_path, earlier, caplog):
    start = str(export_bundle(coarse_on_all, tmp_path / "start") if earlier == "initial_bundle" else coarse_on_all)
    train_too = {"coarse_run": {"train": "patches"}}.get(earlier, {})
    data = (coarse_on_all.parent / "data",)
    runs = []
    for name, options in (("second", {earlier: start} | train_too), ("third", {"initial_run": str(tmp_path / "second")})):
        caplog.clear()
        with caplog.at_level("INFO"):
            train(tiny_options(*data, iterations=1, fold=0, folds=2, **options), output=tmp_path / name, num_workers=0)
        assert "was trained on 1 of its held-out cases (one): their scores are too good, and the bundle will not call them held out." in caplog.text
        runs.append(tmp_path / name)
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"cases": {"one": {"5": {"candidates": 8, "mean": 0.9, "dsc": {"liver": 0.9}}}}}))
    for run in runs:
        manifest = load_bundle(export_bundle(run, tmp_path / f"{run.name}-bundle")).manifest
        assert manifest.training["held_out"] == [] and manifest.training["case_digests"] == sorted(map(case_digest, ("one", "two")))
        with pytest.raises(UserError, match="trained on: one. Held-out scores need others"):
            export_bundle(run, tmp_path / "bundle", scores=(scores,))
        with pytest.raises(UserError, match="nor what they started from were trained on, but there are none"):
            export_bundle(run, tmp_path / "bundle", calibrates=True)


def test_runs_of_a_version_that_did_not_write_down_earlier_cases_are_asked_along_their_chain(coarse_on_all, tmp_path, caplog):
    options = tiny_options(coarse_on_all.parent / "data", iterations=1, fold=0, folds=2)
    train(replace(options, initial_run=str(coarse_on_all)), output=tmp_path / "run", num_workers=0)
    for name in (CHECKPOINT_NAME, BEST_NAME):
        checkpoint = load_checkpoint(tmp_path / "run", name)
        assert checkpoint.pop("earlier_cases") == sorted(map(case_digest, ("one", "two")))
        torch.save(checkpoint, tmp_path / "run" / name)
    assert load_bundle(export_bundle(tmp_path / "run", tmp_path / "bundle")).manifest.training["held_out"] == []
    values = json.loads((tmp_path / "run" / OPTIONS_NAME).read_text(encoding="utf-8"))
    (tmp_path / "run" / OPTIONS_NAME).write_text(json.dumps(values | {"initial_run": str(tmp_path / "gone")}))
    assert load_bundle(export_bundle(tmp_path / "run", tmp_path / "lost")).manifest.training["held_out"] == ["one"]
    assert "was trained on is not known any more" in caplog.text


@pytest.mark.parametrize("cascade", [False, True])
def test_ensemble_answers_with_the_mean_probabilities_of_its_runs(cascade, tmp_path, a_volume):
    runs, nets = [], []
    for seed, held_out in enumerate((("a", "b"), ("b", "c"))):
        torch.manual_seed(seed)
        net = NMSWNet(Architecture(num_classes=4, cascade=cascade))
        torch.nn.init.normal_(net.class_weights)
        options = tiny_options(tmp_path, patch_size=(32, 32, 32), coarse_factor=(2, 2, 2), cascade=cascade, hold_out=held_out, seed=seed)
        runs.append(tmp_path / f"run{seed}")
        runs[-1].mkdir()
        (runs[-1] / OPTIONS_NAME).write_text(json.dumps(asdict(options)))
        content = {"net": net.state_dict(), "architecture": net.architecture.to_dict(), "label_names": ["liver", "spleen", "vertebrae"], "iteration": 1}
        torch.save(content, runs[-1] / CHECKPOINT_NAME)
        net.load_state_dict({key: value.half().float() for key, value in net.state_dict().items()})
        nets.append(net.eval())
    bundle = load_bundle(export_bundle(runs, tmp_path / "both"))
    assert bundle.manifest.num_runs == 2 and bundle.manifest.training["held_out"] == ["b"]
    np.testing.assert_allclose(bundle.manifest.class_weights, torch.stack([net.class_weights.detach() for net in nets]).mean(0), atol=1e-6)
    archived = open_nets(bundle, device="cpu")
    x = torch.rand(1, 1, 32, 48, 32)
    with torch.inference_mode():
        logits, importance = archived.coarse_net(x)
        ours = [net.coarse(x) for net in nets]
        torch.testing.assert_close(logits.exp(), sum(one.exp() for one, _ in ours) / 2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(importance.exp(), sum(one.exp() for _, one in ours) / 2, rtol=1e-4, atol=1e-5)
        inputs = (torch.rand(1, 1, 32, 32, 32), *([logits[..., :16, :16, :16].contiguous()] if cascade else []))
        torch.testing.assert_close(archived.local_net(*inputs).exp(), sum(net.local(*inputs).exp() for net in nets) / 2, rtol=1e-4, atol=1e-5)
    one = load_bundle(export_bundle(runs[0], tmp_path / "one"))
    grid = CandidateGrid.covering(a_volume.shape, patch_size=(32, 32, 32), overlap=0.5, coarse_factor=(2, 2, 2))
    both_macs, one_macs = (bundle_costs(found.manifest, grid).true for found in (bundle, one))
    assert (both_macs.coarse, both_macs.local) == (2 * one_macs.coarse, 2 * one_macs.local)
    assert segment_volume(a_volume, bundle, options=OPTIONS).labelmap.array.any()


def test_runs_that_do_not_go_together_are_no_ensemble(tmp_path):
    first, other = a_run_of("unet", tmp_path / "first"), a_run_of("mednext", tmp_path / "other")
    with pytest.raises(UserError, match="differ in backbone, so that they cannot be one ensemble. Export them one by one"):
        export_bundle([first, other], tmp_path / "bundle")
    checkpoint = torch.load(first / CHECKPOINT_NAME)
    shutil.copytree(first, tmp_path / "renamed")
    torch.save(checkpoint | {"label_names": ["spleen", "liver", "vertebrae"]}, tmp_path / "renamed" / CHECKPOINT_NAME)
    with pytest.raises(UserError, match="have other classes, or another order of them"):
        export_bundle([first, tmp_path / "renamed"], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


class Branching(torch.nn.Module):
    """A net whose path depends on the data, which tracing cannot follow: bright inputs are doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Conv3d(1, 2, kernel_size=1)
        self.head.weight.data.fill_(1.0)
        self.head.bias.data.zero_()

    def forward(self, x):
        return 2 * self.head(x) if float(x.mean()) > 0.5 else self.head(x)


def test_bundle_holds_archives_manifest_card_and_metadata_only(a_bundle):
    files = sorted(path.relative_to(a_bundle).as_posix() for path in a_bundle.rglob("*") if path.is_file())
    assert files == ["MODEL_CARD.md", "coarse.pt", "configs/inference.json", "configs/metadata.json", "local.pt", "manifest.json"]
    assert sorted(load_bundle(a_bundle).manifest.sha256) == ["coarse.pt", "local.pt"]


def test_manifest_says_what_the_run_was(a_bundle, a_run):
    manifest = load_bundle(a_bundle).manifest
    checkpoint = load_checkpoint(a_run)
    assert manifest.name == "tiny-net" and manifest.title == "Tiny net" and manifest.label_names == ["liver", "spleen", "vertebrae"]
    assert (manifest.spacing_mm, manifest.patch_size, manifest.overlap, manifest.coarse_factor) == ((6.0, 6.0, 6.0), (16, 16, 16), 0.5, (1, 1, 1))
    assert manifest.coarse_multiple == Architecture(**checkpoint["architecture"]).coarse_multiple
    np.testing.assert_allclose(manifest.class_weights, checkpoint["net"]["class_weights"], atol=1e-3)  # rounded to fp16
    assert manifest.training["iterations"] == 2 and manifest.training["trained_on"] == "One tiny case."
    assert manifest.scores["two"]["all"]["mean"] == 0.5 and manifest.attributions == ("Nobody, public domain",)
    card = (a_bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| **mean** | **0.500** |" in card and "- Nobody, public domain" in card


def test_manifest_and_card_tell_nothing_about_the_computer(a_bundle, a_run):
    options = load_bundle(a_bundle).manifest.training["options"]
    assert options["data"] == ["decathlon"] and options["hold_out"] == ["two"]
    folders = {str(a_run.parent), str(a_bundle.parent), str(Path.home()), str(Path(__file__).parent)}
    for name in ("manifest.json", "MODEL_CARD.md"):
        assert not [folder for folder in folders if folder in (a_bundle / name).read_text(encoding="utf-8")]
    for name in ("coarse.pt", "local.pt"):
        assert not [folder for folder in folders if folder.encode() in (a_bundle / name).read_bytes()]


def test_monai_runs_the_bundle(a_bundle, a_phantom, tmp_path):
    import monai.bundle

    write_volume(a_phantom[0], tmp_path / "ct.nii.gz")
    files = {"config_file": str(a_bundle / "configs" / "inference.json"), "meta_file": str(a_bundle / "configs" / "metadata.json")}
    places = {"bundle_root": str(a_bundle), "input": str(tmp_path / "ct.nii.gz"), "output": str(tmp_path / "labels.nii.gz")}
    monai.bundle.run(**files, **places, k=1, device="cpu")
    expected = segment_volume(read_volume(tmp_path / "ct.nii.gz"), load_bundle(a_bundle), options=SegmentOptions(num_patches=1, device="cpu"))
    np.testing.assert_array_equal(read_volume(tmp_path / "labels.nii.gz").array, expected.labelmap.array)


def test_monai_reads_the_metadata(a_bundle):
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_meta(a_bundle / "configs" / "metadata.json")
    metadata = parser["_meta_"]
    mandatory = "version monai_version pytorch_version numpy_version required_packages_version task description authors copyright network_data_format".split()
    assert not [key for key in mandatory if key not in metadata]
    image, pred = metadata["network_data_format"]["inputs"]["image"], metadata["network_data_format"]["outputs"]["pred"]
    assert (image["num_channels"], image["spatial_shape"], image["value_range"], image["is_patch_data"]) == (1, [16, 16, 16], [0, 1], True)
    assert pred["channel_def"] == {"0": "background", "1": "liver", "2": "spleen", "3": "vertebrae"} and pred["num_channels"] == 4
    net = torch.jit.load(str(a_bundle / "local.pt")).float()
    assert net(torch.rand(1, 1, 16, 16, 16)).shape == (1, pred["num_channels"], *pred["spatial_shape"])


def test_initial_run_is_named_without_its_folder(a_run):
    options = tiny_options(a_run, initial_run=str(a_run))
    assert export_module._public_options(options)["initial_run"] == "run"


def test_weights_are_those_of_the_run_rounded_to_half_precision(a_bundle, a_run):
    stored = load_checkpoint(a_run)["net"]
    for name in ("coarse", "local"):
        found = torch.jit.load(str(a_bundle / f"{name}.pt")).state_dict()
        assert {value.dtype for value in found.values()} == {torch.float16}
        assert sorted(f"{name}.{key}" for key in found) == sorted(key for key in stored if key.startswith(name))
        assert all(torch.equal(value, stored[f"{name}.{key}"].half()) for key, value in found.items())


def test_bundle_segments_like_the_trained_nets(a_bundle, a_run, a_volume):
    bundle = load_bundle(a_bundle)
    checkpoint = load_checkpoint(a_run)
    net = NMSWNet(Architecture(**checkpoint["architecture"])).eval()
    net.load_state_dict({key: value.half().float() for key, value in checkpoint["net"].items()})
    eager = Nets(manifest=bundle.manifest, coarse_net=net.coarse, local_net=net.local, device=torch.device("cpu"))
    answers = []
    for nets in (eager, open_nets(bundle, device="cpu")):
        coarse = coarse_pass(a_volume, nets)
        answers.append((coarse.coarse_logits, refine(coarse, choose(coarse, options=OPTIONS), nets)))
    torch.testing.assert_close(answers[0][0], answers[1][0], rtol=1e-4, atol=1e-4)  # the interpreter may fuse operators
    assert float((answers[0][1] != answers[1][1]).float().mean()) < 1e-3


def test_engine_runs_the_bundle_on_the_volumes_own_grid(a_bundle, a_volume):
    result = segment_volume(a_volume, load_bundle(a_bundle), options=OPTIONS)
    assert result.labelmap.array.shape == a_volume.shape and result.labelmap.array.max() <= 3
    assert len(result.patches) == 3 and result.run_info["bundle"]["name"] == "tiny-net"


# Every backbone as local net, with random weights
def trained_nets(run: Path) -> NMSWNet:
    """The nets of a run as they were trained, in the precision that is stored."""
    checkpoint = load_checkpoint(run)
    net = NMSWNet(Architecture(**checkpoint["architecture"])).eval()
    net.load_state_dict({key: value.half().float() for key, value in checkpoint["net"].items()})
    return net


def test_every_backbone_segments_like_its_eager_net(a_bundle_of_each):
    shape = (47, 40, 41)  # more than one patch along each axis, at the volume's own spacing
    volume = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((5.0, 7.0, 6.0), shape))[0]
    bundle, net = load_bundle(a_bundle_of_each), trained_nets(a_bundle_of_each.parent / "run")
    eager = Nets(manifest=bundle.manifest, coarse_net=net.coarse, local_net=net.local, device=torch.device("cpu"))
    expected, found = (segment_volume(volume, bundle, options=OPTIONS, run_cache=warm) for warm in (RunCache(nets=eager), None))
    assert found.labelmap.array.shape == shape and len(found.patches) == 3
    assert found.patches == expected.patches and len(np.unique(found.labelmap.array)) > 1
    assert (found.labelmap.array != expected.labelmap.array).mean() < 2e-3  # where two classes are as good as equal


def test_every_archive_takes_another_number_of_patches_than_it_was_made_with(a_bundle_of_each):
    net = trained_nets(a_bundle_of_each.parent / "run").local
    archived = torch.jit.load(str(a_bundle_of_each / "local.pt")).float()
    x = torch.rand(3, 1, 32, 64, 32, generator=torch.Generator().manual_seed(8))  # 1 and 2 are part of every export
    with torch.no_grad():
        torch.testing.assert_close(archived(x), net(x), rtol=1e-4, atol=1e-4)  # the interpreter may fuse; sliced nets sum in another order


def test_manifest_of_every_backbone_builds_its_net_again(a_bundle_of_each):
    manifest = load_bundle(a_bundle_of_each).manifest
    net = LocalNet(Architecture(**manifest.architecture)).eval()
    archived = torch.jit.load(str(a_bundle_of_each / "local.pt")).float()
    net.load_state_dict(archived.state_dict())
    x = torch.rand(1, 1, 32, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), archived(x), rtol=1e-5, atol=1e-5)
    assert bool(manifest.architecture["fusion_channels"]) == (manifest.backbone == "e2enet")


def test_archives_name_no_folder_of_the_computer(a_bundle):
    for name in ("coarse.pt", "local.pt"):
        with zipfile.ZipFile(a_bundle / name) as archive:
            assert not any(folder in archive.read(record) for record in archive.namelist() for folder in (b"site-packages", str(ROOT).encode()))


def test_several_data_notes_stand_one_after_the_other(a_run, tmp_path):
    for name, words in (("data", "Two scans."), ("run", "For a day.")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"trained_on": words, "attributions": [name]}))
    card = (export_bundle(a_run, tmp_path / "bundle", data_notes=(tmp_path / "data.json", tmp_path / "run.json")) / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Two scans.\n\nFor a day.\n" in card and "- data\n- run\n" in card


def test_existing_output_is_refused_and_kept(a_bundle, a_run):
    before = (a_bundle / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="already exists. Remove it or give another folder"):
        export_bundle(a_run, a_bundle)
    assert (a_bundle / "manifest.json").read_bytes() == before


def test_run_without_checkpoint_says_what_to_give(a_run, tmp_path):
    (tmp_path / "options.json").write_bytes((a_run / "options.json").read_bytes())
    with pytest.raises(UserError, match="Give the folder that 'nmsw train --output' wrote"):
        export_bundle(tmp_path, tmp_path / "bundle")


def test_net_that_tracing_changes_is_refused_and_leaves_nothing(tmp_path):
    dark, bright = torch.zeros(1, 1, 4, 5, 6), torch.ones(1, 1, 4, 5, 6)
    with pytest.raises(UserError, match=r"local\.pt disagrees.*differ by 1.*Nothing was written"):
        write_bundle(
            torch.nn.Conv3d(1, 2, 1).half().float(),
            Branching(),
            output=tmp_path / "bundle",
            examples={"coarse": [(dark,)], "local": [(dark,), (bright,)]},
            manifest={},
        )
    assert list(tmp_path.iterdir()) == []


def test_archive_of_other_weights_is_refused(tmp_path):
    x = torch.ones(1, 1, 4, 5, 6)
    net = Branching().eval()
    other = torch.nn.Conv3d(1, 2, kernel_size=1)
    other.weight.data.fill_(1.0 + 4 * export_module.PARITY_TOLERANCE)
    other.bias.data.zero_()
    torch.jit.trace(other, x).save(str(tmp_path / "local.pt"))
    with pytest.raises(UserError, match="disagrees with the trained net on an input of shape"):
        check_parity(net, tmp_path / "local.pt", [(0.2 * x + 0.2,)])
    with pytest.raises(UserError, match="differ by inf"):
        check_parity(torch.nn.Conv3d(1, 3, kernel_size=1), tmp_path / "local.pt", [(x,)])


def test_not_a_number_counts_as_disagreement(tmp_path):
    x = torch.ones(1, 1, 4, 5, 6)
    net = torch.nn.Conv3d(1, 2, kernel_size=1)
    net.weight.data.fill_(float("nan"))
    torch.jit.trace(net, x, check_trace=False).save(str(tmp_path / "local.pt"))
    with pytest.raises(UserError, match="disagrees"):
        check_parity(net, tmp_path / "local.pt", [(x,)])


def test_nets_are_written_where_torchscript_cannot_open_the_path(a_run, tmp_path, monkeypatch):
    monkeypatch.delattr(torch._C, "import_ir_module")
    monkeypatch.delattr(torch.jit.RecursiveScriptModule, "save")
    assert (export_bundle(a_run, tmp_path / "größe") / "local.pt").is_file()


def test_export_that_failed_leaves_nothing(a_run, tmp_path, monkeypatch):
    def fail(manifest, has_picture):
        raise UserError("The disk is full. Make room.")

    monkeypatch.setattr(export_module, "model_card", fail)
    with pytest.raises(UserError, match="Make room"):
        export_bundle(a_run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_no_scores_say_which_file_to_give(a_run, tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UserError, match=r"scores\.json.*Give a file that 'nmsw evaluate --output' wrote"):
        export_bundle(a_run, tmp_path / "bundle", scores=(tmp_path / "scores.json",))
    assert not (tmp_path / "bundle").exists()


def test_missing_data_notes_say_what_to_write(a_run, tmp_path):
    with pytest.raises(UserError, match=r"notes\.json.*Write a JSON object"):
        export_bundle(a_run, tmp_path / "bundle", data_notes=(tmp_path / "notes.json",))


def test_verb_exports_and_tells_the_size(a_run, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    export_module.add_arguments(parser)
    assert export_module.run(parser.parse_args([str(a_run), "-o", str(tmp_path / "by-verb"), "--title", "By verb"])) == 0
    assert load_bundle(tmp_path / "by-verb").manifest.title == "By verb"
    assert "MB); exported and trained nets agree." in capsys.readouterr().out


def test_verb_prints_any_name_into_a_pipe_of_windows(a_run, tmp_path, monkeypatch):
    printed = windows_pipe(monkeypatch)
    assert main(["export", str(a_run), "-o", str(tmp_path / "肝臓" / "bundle")]) == 0
    assert rb"\u809d\u81d3" in printed.getvalue()


def test_scores_of_cases_that_were_trained_on_are_not_held_out(a_run, tmp_path):
    trained_on = load_checkpoint(a_run)["case_names"]["training"][0]
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"cases": {trained_on: {"5": {"candidates": 8, "mean": 0.9, "dsc": {"liver": 0.9}}}}}))
    with pytest.raises(UserError, match=f"trained on: {trained_on}.*--cases or --split"):
        export_bundle(a_run, tmp_path / "bundle", scores=(scores,))
    assert not (tmp_path / "bundle").exists()


def test_license_is_what_the_exporter_says(a_run, tmp_path):
    assert load_bundle(export_bundle(a_run, tmp_path / "silent")).manifest.license == "not stated"
    assert load_bundle(export_bundle(a_run, tmp_path / "said", license="CC-BY-4.0")).manifest.license == "CC-BY-4.0"
    assert "License of the weights: CC-BY-4.0" in (tmp_path / "said" / "MODEL_CARD.md").read_text(encoding="utf-8")
