"""A local net that reads the coarse answer beside the image: what it starts from, what it is given, and that a bundle of it segments like its nets."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("einops")  # MONAI's Swin-UNETR needs it

from test_train import a_data_folder, tiny_options  # noqa: E402

from NMSWSegment.engine.aggregation import CoarseUpsampler, aggregate, patch_upsamplers  # noqa: E402
from NMSWSegment.engine.net_runtimes import possible_runtimes, prepared_runtime, probe_inputs  # noqa: E402
from NMSWSegment.engine.runtime import open_nets  # noqa: E402
from NMSWSegment.engine.segment import RunCache, choose, coarse_pass, refine, segment_volume  # noqa: E402
from NMSWSegment.engine.session import Session  # noqa: E402
from NMSWSegment.evaluation.baselines import as_segment, sliding_window, sliding_window_on_foreground, zoom_out  # noqa: E402
from NMSWSegment.evaluation.costs import bundle_costs  # noqa: E402
from NMSWSegment.files import phantoms  # noqa: E402
from NMSWSegment.files.bundle import load_bundle  # noqa: E402
from NMSWSegment.files.grid import CandidateGrid  # noqa: E402
from NMSWSegment.nets.backbones import BACKBONES  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, LocalNet, NMSWNet  # noqa: E402
from NMSWSegment.protocol import SegmentOptions, UserError  # noqa: E402
from NMSWSegment.training import cascade  # noqa: E402
from NMSWSegment.training.cascade import disturbed, parts_of_boxes  # noqa: E402
from NMSWSegment.training.export import export_bundle  # noqa: E402
from NMSWSegment.training.initial_weights import load_initial_weights  # noqa: E402
from NMSWSegment.training.monai_metadata import METADATA_PATH  # noqa: E402
from NMSWSegment.training.options import OPTIONS_NAME, TrainOptions  # noqa: E402
from NMSWSegment.training.run_folder import CHECKPOINT_NAME, TrainingState, load_checkpoint  # noqa: E402
from NMSWSegment.training.step import random_boxes  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402

SIZES = {"patch_size": (32, 32, 32), "coarse_factor": (2, 2, 2), "cascade": True}
OPTIONS = SegmentOptions(num_patches=3, device="cpu", threads=1)


NAMES = ["liver", "spleen", "vertebrae"]


def exported(folder, **changes):
    """A bundle of a net with random weights."""
    torch.manual_seed(5)
    options = tiny_options(folder, **SIZES | changes)
    net = NMSWNet(Architecture(num_classes=1 + len(NAMES), backbone=options.backbone, cascade=options.cascade))
    (folder / "run").mkdir()
    (folder / "run" / OPTIONS_NAME).write_text(json.dumps(asdict(options)))
    torch.save({"net": net.state_dict(), "architecture": net.architecture.to_dict(), "label_names": NAMES, "iteration": 1}, folder / "run" / CHECKPOINT_NAME)
    return load_bundle(export_bundle(folder / "run", folder / "bundle"))


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory):
    """A local net that departs from the coarse answer."""
    return exported(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def a_volume():
    shape = (36, 30, 50)  # the coarse volume ends before the padded one on every axis
    return phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), shape))[0]


def some_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.log_softmax(4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_corrects_the_coarse_answer_and_is_it_where_it_adds_nothing(name):
    torch.manual_seed(0)
    net, coarse_logits = LocalNet(Architecture(num_classes=3, backbone=name, cascade=True)).eval(), some_logits(2, 3, 16, 16, 32).clamp(min=-9)
    x = torch.rand(2, 1, 32, 32, 64)
    upsampled = torch.nn.functional.interpolate(coarse_logits, scale_factor=2, mode="trilinear")
    with torch.inference_mode():
        answer = net(x, coarse_logits)
        assert answer.shape == upsampled.shape and float((answer - torch.log_softmax(upsampled, 1)).abs().max()) > 0.01
        assert not torch.equal(answer, net(1 - x, coarse_logits))
        for part in (net.head, *([net.backbone.heads[0]] if name == "e2enet" else [])):
            torch.nn.init.zeros_(part.weight) if hasattr(part, "weight") else None
            torch.nn.init.zeros_(part.bias) if getattr(part, "bias", None) is not None else None
        if name in ("unet", "e2enet"):  # whose last layer is ours to silence
            torch.testing.assert_close(net(x, coarse_logits), torch.log_softmax(upsampled, 1), rtol=1e-5, atol=1e-5)
        assert all(deep.shape[:2] == (2, 3) for deep in net.deep_logits(x, coarse_logits))


def test_part_of_a_box_is_what_lies_there_and_goes_on_at_the_edge():
    grid = CandidateGrid.covering((50, 41, 71), patch_size=(32, 32, 32), overlap=0.5, coarse_factor=(2, 2, 2))
    coarse_logits = some_logits(4, *grid.coarse_shape)
    padded = coarse_logits
    for axis, length in enumerate(grid.padded_shape, start=1):
        last = padded.narrow(axis, padded.shape[axis] - 1, 1)
        padded = torch.cat([padded, *[last] * (length // 2 - padded.shape[axis])], dim=axis)
    some, whole = list(range(0, grid.num_candidates, 5)), CoarseUpsampler(coarse_logits, grid=grid)
    parts = patch_upsamplers(coarse_logits, indices=some[:2], grid=grid)
    assert all(upsampler.coarse_logits.shape != coarse_logits.shape for upsampler in parts.values())  # each holds its own part
    for index in some:
        box = grid.slices(index)
        expected = padded[(slice(None), *(slice(side.start // 2, side.stop // 2) for side in box))]
        assert torch.equal(whole.part(box), expected)
        if index in parts:
            assert torch.equal(parts[index].part(box), expected)


def test_bundle_segments_as_the_eager_nets_and_the_reference_of_eq_6(a_bundle, a_volume):
    nets = open_nets(a_bundle, device="cpu")
    with torch.inference_mode():
        coarse = coarse_pass(a_volume, nets)
        selection = choose(coarse, options=OPTIONS)
        order = sorted(selection.indices)
        upsampler = CoarseUpsampler(coarse.coarse_logits, grid=coarse.grid)
        boxes = [coarse.grid.slices(index) for index in order]
        logits = [nets.local_net(coarse.x[(..., *box)], upsampler.part(box)[None])[0] for box in boxes]
        expected, _ = aggregate(coarse.coarse_logits, logits, indices=order, grid=coarse.grid, class_weights=torch.tensor(a_bundle.manifest.class_weights))
        assert torch.equal(refine(coarse, selection, nets), expected.max(0).indices.to(torch.uint8))
    assert not torch.equal(refine(coarse, selection, nets), coarse.coarse_labels)  # the patches matter


def test_metadata_name_both_inputs(a_bundle):
    inputs = json.loads((a_bundle.folder / METADATA_PATH).read_text(encoding="utf-8"))["network_data_format"]["inputs"]
    assert inputs["image"]["spatial_shape"] == [32, 32, 32] and inputs["image"]["num_channels"] == 1
    assert inputs["coarse_logits"]["spatial_shape"] == [16, 16, 16] and inputs["coarse_logits"]["num_channels"] == 4


def test_answer_is_the_same_with_and_without_what_is_kept(a_bundle, a_volume):
    once = segment_volume(a_volume, a_bundle, options=OPTIONS).labelmap.array
    kept = segment_volume(a_volume, a_bundle, options=OPTIONS, run_cache=RunCache()).labelmap.array
    session = Session()
    for num_patches in (1, 5):
        session.run("a", a_volume, bundle=a_bundle, options=replace(OPTIONS, num_patches=num_patches))
    warm = session.run("a", None, bundle=a_bundle, options=OPTIONS)
    assert np.array_equal(once, kept) and np.array_equal(once, warm.labelmap.array)
    assert warm.run_info["patches_reused"] == 3


def test_every_runtime_takes_both_inputs(a_bundle):
    net, inputs = open_nets(a_bundle, device="cpu").local_net, probe_inputs(a_bundle.manifest)
    assert [tuple(one.shape) for one in inputs] == [(1, 1, 32, 32, 32), (1, 4, 16, 16, 16)]
    torch.testing.assert_close(inputs[1].exp().sum(1), torch.ones(1, 16, 16, 16))
    with torch.inference_mode():
        expected = net(*inputs)
    for name in possible_runtimes():
        prepared, choice = prepared_runtime(name, a_bundle, net, inputs=inputs, expected=expected)
        assert choice.agreement > 0.98, name


@pytest.mark.parametrize("method", [lambda volume, run: sliding_window(volume, run, overlap=0.5), sliding_window_on_foreground, zoom_out])
def test_baselines_give_the_local_net_the_coarse_answer(method, a_bundle, a_volume):
    result = as_segment(a_volume, a_bundle, method=method, options=OPTIONS)
    assert result.labelmap.array.shape == a_volume.array.shape and result.run_info["windows"] > 0


def test_sliding_window_of_a_cascade_is_nmsw_with_all_patches_that_replace_the_coarse_answer(a_bundle, a_volume):
    sliding = as_segment(a_volume, a_bundle, method=lambda volume, run: sliding_window(volume, run, overlap=0.5), options=OPTIONS)
    alone = replace(a_bundle, manifest=replace(a_bundle.manifest, class_weights=(10.0,) * 4))
    everywhere = segment_volume(a_volume, alone, options=replace(OPTIONS, num_patches=None))
    assert (sliding.labelmap.array == everywhere.labelmap.array).mean() > 0.999


def test_costs_count_what_is_read_too(a_bundle):
    grid = CandidateGrid.covering((50, 41, 71), patch_size=(32, 32, 32), overlap=0.5, coarse_factor=(2, 2, 2))
    plain = replace(a_bundle.manifest, architecture=a_bundle.manifest.architecture | {"cascade": False})
    assert bundle_costs(a_bundle.manifest, grid).true.local > bundle_costs(plain, grid).true.local


def test_disturbed_answers_are_probabilities_that_differ_smoothly():
    blob = torch.full((4, 20, 20, 20), -8.0)
    blob[0], blob[2, 5:15, 5:15, 5:15], blob[0, 5:15, 5:15, 5:15] = 0.0, 0.0, -8.0
    coarse_logits = torch.log_softmax(blob, 0)
    agreement = []
    for seed in range(30):
        found = disturbed(coarse_logits, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found.exp().sum(0), torch.ones(20, 20, 20))
        agreement.append(float((found.argmax(0) == coarse_logits.argmax(0)).float().mean()))
        assert torch.equal(found, disturbed(coarse_logits, generator=torch.Generator().manual_seed(seed)))
    assert max(agreement) == 1.0 and 0.85 < np.median(agreement) < 1 and min(agreement) > 0.5


def test_disturbance_is_interpolated_where_the_answer_lies(monkeypatch):
    devices = []

    def smooth_noise(shape, *, generator, device, **lengths):
        devices.append(device)
        return torch.randn(shape, generator=generator).to(device)

    monkeypatch.setattr(cascade, "smooth_noise", smooth_noise)
    monkeypatch.setattr(cascade, "chance", lambda generator, probability: False)
    assert disturbed(some_logits(4, 8, 9, 10).to("meta"), generator=torch.Generator().manual_seed(0)).device.type == "meta"
    assert devices == [torch.device("meta")] * (3 + 4)


def test_boxes_of_training_begin_with_whole_coarse_voxels():
    labels = torch.zeros(36, 40, 44, dtype=torch.uint8)
    labels[3:9, 11:14, 33:44] = 1
    grid = CandidateGrid.covering((36, 40, 44), patch_size=(16, 16, 16), overlap=0.5, coarse_factor=(4, 2, 1))
    for seed in range(20):
        boxes = random_boxes(labels, count=3, patch_size=(16, 16, 16), multiple=(4, 2, 1), generator=torch.Generator().manual_seed(seed))
        assert all(side.start % step == 0 and side.stop - side.start == 16 for box in boxes for side, step in zip(box, (4, 2, 1)))
    assert parts_of_boxes(some_logits(3, *grid.coarse_shape), boxes, grid=grid).shape == (3, 3, 4, 8, 16)


def test_local_net_trains_upon_a_coarse_net_that_stays_as_it_is(tmp_path):
    data = a_data_folder(tmp_path / "data")
    train(tiny_options(data, **SIZES | {"cascade": False}, spacing_mm=(3.0, 3.0, 3.0), train="coarse", iterations=1), output=tmp_path / "coarse", num_workers=0)
    options = tiny_options(
        data, **SIZES, spacing_mm=(3.0, 3.0, 3.0), train="local", coarse_run=str(tmp_path / "coarse"), iterations=2, hold_out=("two",), validate_every=2
    )
    train(options, output=tmp_path / "run", num_workers=0)
    before, after = load_checkpoint(tmp_path / "coarse")["net"], load_checkpoint(tmp_path / "run")["net"]
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key.startswith("coarse."))
    assert after["local.prior.trust"].std() > 0
    train(replace(options, train="both", coarse_run="", initial_run=str(tmp_path / "run"), iterations=1), output=tmp_path / "both", num_workers=0)
    manifest = load_bundle(export_bundle(tmp_path / "both", tmp_path / "bundle")).manifest
    assert manifest.is_cascade and manifest.architecture["cascade"] is True


@pytest.mark.parametrize("backbone", BACKBONES)
def test_net_of_a_bundle_becomes_a_cascade_that_adds_to_the_coarse_answer(tmp_path, backbone):
    found = exported(tmp_path, backbone=backbone, cascade=False, patch_size=(64, 64, 64))
    options = TrainOptions(data=("decathlon:data",), initial_bundle=str(found.folder), backbone=backbone, cascade=True)
    torch.manual_seed(0)
    net = NMSWNet(Architecture(num_classes=1 + len(NAMES), backbone=backbone, cascade=True)).eval()
    plain = NMSWNet(Architecture(num_classes=1 + len(NAMES), backbone=backbone)).eval()
    load_initial_weights(TrainingState(net=net, optimizer=None, schedule=None), options, label_names=NAMES)
    load_initial_weights(TrainingState(net=plain, optimizer=None, schedule=None), replace(options, cascade=False), label_names=NAMES)
    x, coarse_logits = torch.rand(1, 1, 64, 64, 64), some_logits(1, 1 + len(NAMES), 32, 32, 32).clamp(min=-9)
    upsampled = torch.nn.functional.interpolate(coarse_logits, scale_factor=2, mode="trilinear")
    with torch.inference_mode():
        expected = torch.log_softmax(plain.local.deep_logits(x)[0] + upsampled, 1)
        torch.testing.assert_close(net.local(x, coarse_logits), expected, rtol=1e-4, atol=1e-4)
    assert net.class_weights.detach().unique().tolist() == [3.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "local"}, "^The local net of a cascade reads what the coarse net found. Give --coarse-run RUN"),
        ({"patch_size": (32, 32, 30), "coarse_factor": (2, 2, 4)}, "^The patches of a cascade must begin and end with whole coarse voxels, but patch_size is"),
        ({"train": "local", "cascade": False, "coarse_run": "run"}, "^coarse_run is 'run', but train is 'local'"),
    ],
)
def test_options_that_make_no_cascade_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TrainOptions(data=("decathlon:data",), **{"cascade": True} | changes)
