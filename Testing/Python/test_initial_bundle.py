"""Fine-tuning: a run that starts from a bundle keeps what it knows of classes of the same name."""

import json
import shutil

import pytest
import torch

pytest.importorskip("monai")

from NMSWSegment.engine.net_runtimes import probe_inputs  # noqa: E402
from NMSWSegment.files.bundle import MANIFEST_NAME, load_bundle  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training.initial_weights import load_initial_weights  # noqa: E402
from NMSWSegment.training.options import TrainOptions  # noqa: E402
from NMSWSegment.training.run_folder import TrainingState  # noqa: E402
from NMSWSegment.training.sparse import FusionSparsity, SparsityOptions  # noqa: E402

BUNDLES = ["torso-unet", "torso-mednext", "torso-swinunetr", "torso-e2enet"]


def started(bundle: str, label_names: list[str], **changes) -> NMSWNet:
    """A net that starts from a bundle."""
    manifest = load_bundle(bundle).manifest
    options = TrainOptions(data=("decathlon:data",), initial_bundle=bundle, **{"backbone": manifest.backbone, "cascade": manifest.is_cascade} | changes)
    torch.manual_seed(0)
    architecture = Architecture(num_classes=len(label_names) + 1, backbone=options.backbone, preset=options.preset, cascade=options.cascade)
    net = NMSWNet(architecture).eval()
    load_initial_weights(TrainingState(net=net, optimizer=None, schedule=None), options, label_names=label_names)
    return net


@pytest.mark.parametrize("bundle", BUNDLES)
def test_with_the_same_classes_the_net_answers_as_the_bundle(bundle):
    found = load_bundle(bundle)
    net = started(bundle, found.manifest.label_names)
    inputs = probe_inputs(found.manifest)
    with torch.inference_mode():
        for part, path, given in ((net.local, found.local_path, inputs), (net.coarse, found.coarse_path, inputs[:1])):
            ours, theirs = part(*given), torch.jit.load(path).float().eval()(*given)
            ours, theirs = (value[0] if isinstance(value, tuple) else value for value in (ours, theirs))
            torch.testing.assert_close(torch.softmax(ours, 1), torch.softmax(theirs, 1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net.class_weights, torch.tensor(found.manifest.class_weights))


def test_bundle_is_read_where_torchscript_cannot_open_the_path(monkeypatch):
    monkeypatch.delattr(torch._C, "import_ir_module")
    assert started("torso-unet", load_bundle("torso-unet").manifest.label_names)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_classes_of_the_same_name_keep_their_logits_and_new_ones_their_start(bundle):
    found = load_bundle(bundle)
    whole = started(bundle, found.manifest.label_names)
    net = started(bundle, ["spleen", "tumor", "liver"])
    rows = [0, *(1 + found.manifest.label_names.index(name) for name in ("spleen", "liver"))]
    patch, *coarse = probe_inputs(found.manifest)
    fewer = [logits[:, [0, 1, 2, 3]].index_copy(1, torch.tensor([0, 1, 3]), logits[:, rows]).index_fill(1, torch.tensor([2]), -60.0) for logits in coarse]
    coarse = [logits.index_fill(1, torch.tensor([c for c in range(logits.shape[1]) if c not in rows]), -60.0) for logits in coarse]
    with torch.inference_mode():
        ours, theirs = net.local.deep_logits(patch, *fewer)[0], whole.local.deep_logits(patch, *coarse)[0]
        torch.testing.assert_close(ours[:, [0, 1, 3]], theirs[:, rows], rtol=1e-4, atol=1e-4)
        ours, theirs = net.coarse.without_importance(patch)[0], whole.coarse.without_importance(patch)[0]
        torch.testing.assert_close(ours[:, [0, 1, 3]], theirs[:, rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.class_weights[[0, 1, 3]], whole.class_weights[rows])
    assert float(net.class_weights[2].detach()) == (3 if found.manifest.is_cascade else 0)


def test_bundle_of_another_backbone_or_size_is_refused():
    with pytest.raises(
        UserError, match="^The bundle 'torso-unet' has a unet of size compact, this run a unet of size paper. Leave --backbone and --preset out"
    ):
        started("torso-unet", ["liver"], preset="paper")
    with pytest.raises(UserError, match="^The bundle 'torso-unet' has a unet of size compact, this run a mednext of size compact. Leave --backbone"):
        started("torso-unet", ["liver"], backbone="mednext", train="weights")


def test_bundle_of_another_backbone_gives_its_coarse_net_alone():
    names = load_bundle("torso-unet").manifest.label_names
    net = started("torso-unet", names, backbone="mednext", train="patches")
    for key, value in torch.jit.load(load_bundle("torso-unet").coarse_path).state_dict().items():
        torch.testing.assert_close(net.coarse.state_dict()[key], value.float(), rtol=0, atol=0)
    torch.manual_seed(0)
    fresh = NMSWNet(net.architecture)
    for key, value in fresh.local.state_dict().items():
        assert torch.equal(value, net.local.state_dict()[key]), key


def test_thinned_out_e2enet_keeps_its_channels_in_a_sparse_run_and_may_use_all_in_another():
    names = load_bundle("torso-e2enet").manifest.label_names
    kept = Architecture(**load_bundle("torso-e2enet").manifest.architecture).fusion_channels
    options = TrainOptions(data=("decathlon:data",), initial_bundle="torso-e2enet", backbone="e2enet", cascade=True, sparsity=0.8)
    net = NMSWNet(Architecture(num_classes=len(names) + 1, backbone="e2enet", cascade=True))
    optimizer = torch.optim.AdamW(net.parameters())
    sparsity = FusionSparsity(net.local.backbone, optimizer, options=SparsityOptions(iterations=10))
    load_initial_weights(TrainingState(net=net, optimizer=optimizer, schedule=None, sparsity=sparsity), options, label_names=names)
    assert ["".join("1" if active else "0" for active in mask.tolist()) for mask in sparsity.masks.values()] == list(kept)
    net.slice_fusion()
    assert net.architecture.fusion_channels == kept


def test_cascade_cannot_start_a_net_that_reads_the_image_alone(tmp_path):
    found = load_bundle("torso-unet")
    shutil.copytree(found.folder, tmp_path / "bundle")
    values = json.loads((tmp_path / "bundle" / MANIFEST_NAME).read_text(encoding="utf-8"))
    values["architecture"]["cascade"] = True
    (tmp_path / "bundle" / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(UserError, match="is a cascade, whose local net needs the coarse answer. Leave --no-cascade out"):
        started(str(tmp_path / "bundle"), ["liver"], cascade=False)


def test_both_a_run_and_a_bundle_to_start_from_are_refused():
    with pytest.raises(UserError, match="^Both initial_bundle 'torso-unet' and initial_run 'run' are given"):
        TrainOptions(data=("decathlon:data",), initial_bundle="torso-unet", initial_run="run")
