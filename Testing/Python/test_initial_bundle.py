"""Fine-tuning: a run that starts from a bundle keeps what it knows of classes of the same name."""

import pytest
import torch

pytest.importorskip("monai")

from NMSWSegment.files.bundle import load_bundle  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training.initial_weights import load_initial_weights  # noqa: E402
from NMSWSegment.training.options import TrainOptions  # noqa: E402
from NMSWSegment.training.run_folder import TrainingState  # noqa: E402

BUNDLES = ["torso-unet", "torso-mednext", "torso-swinunetr"]


def started(bundle: str, label_names: list[str], **changes) -> NMSWNet:
    """A net that starts from a bundle."""
    options = TrainOptions(data=("decathlon:data",), initial_bundle=bundle, backbone=load_bundle(bundle).manifest.backbone, **changes)
    torch.manual_seed(0)
    net = NMSWNet(Architecture(num_classes=len(label_names) + 1, backbone=options.backbone, preset=options.preset)).eval()
    load_initial_weights(TrainingState(net=net, optimizer=None, schedule=None), options, label_names=label_names)
    return net


@pytest.mark.parametrize("bundle", BUNDLES)
def test_with_the_same_classes_the_net_answers_as_the_bundle(bundle):
    found = load_bundle(bundle)
    net = started(bundle, found.manifest.label_names)
    patch = torch.rand(1, 1, *found.manifest.patch_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for part, path in ((net.local, found.local_path), (net.coarse, found.coarse_path)):
            ours, theirs = part(patch), torch.jit.load(path).float().eval()(patch)
            ours, theirs = (value[0] if isinstance(value, tuple) else value for value in (ours, theirs))
            torch.testing.assert_close(torch.softmax(ours, 1), torch.softmax(theirs, 1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net.class_weights, torch.tensor(found.manifest.class_weights))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_classes_of_the_same_name_keep_their_logits_and_new_ones_their_start(bundle):
    found = load_bundle(bundle)
    whole = started(bundle, found.manifest.label_names)
    net = started(bundle, ["spleen", "tumor", "liver"])
    rows = [0, *(1 + found.manifest.label_names.index(name) for name in ("spleen", "liver"))]
    patch = torch.rand(1, 1, *found.manifest.patch_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = net.local.deep_logits(patch)[0], whole.local.deep_logits(patch)[0]
        torch.testing.assert_close(ours[:, [0, 1, 3]], theirs[:, rows], rtol=1e-4, atol=1e-4)
        ours, theirs = net.coarse.without_importance(patch)[0], whole.coarse.without_importance(patch)[0]
        torch.testing.assert_close(ours[:, [0, 1, 3]], theirs[:, rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.class_weights[[0, 1, 3]], whole.class_weights[rows])
    assert float(net.class_weights[2].detach()) == 0


def test_bundle_of_another_backbone_or_size_is_refused():
    with pytest.raises(
        UserError, match="^The bundle 'torso-unet' has a unet of size compact, this run a unet of size paper. Leave --backbone and --preset out"
    ):
        started("torso-unet", ["liver"], preset="paper")
    with pytest.raises(UserError, match="^The bundle 'torso-e2enet' is a thinned out e2enet.*--initial-run"):
        started("torso-e2enet", ["liver"])


def test_both_a_run_and_a_bundle_to_start_from_are_refused():
    with pytest.raises(UserError, match="^Both initial_bundle 'torso-unet' and initial_run 'run' are given"):
        TrainOptions(data=("decathlon:data",), initial_bundle="torso-unet", initial_run="run")
