import json
import logging
import os
import sys

import pytest
import torch

from NMSWSegment.engine import net_runtimes
from NMSWSegment.engine.net_runtimes import RuntimeChoice, Unusable, choose_runtime, possible_runtimes, probe_inputs
from NMSWSegment.engine.runtime import open_nets
from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.protocol import SegmentOptions, UserError

has_openvino = pytest.mark.skipif(not any(name.startswith("openvino") for name in possible_runtimes()), reason="needs the extra openvino")


@pytest.fixture(autouse=True)
def a_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NMSW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def a_bundle_and_net(a_tiny_bundle):
    bundle = load_bundle(a_tiny_bundle)
    return bundle, open_nets(bundle, device="cpu").local_net


def prepared_as(monkeypatch, candidates):
    """Let the computer have these runtimes: name -> net."""
    monkeypatch.setattr(net_runtimes, "possible_runtimes", lambda: list(candidates))
    monkeypatch.setattr(net_runtimes, "_in_bfloat16", lambda net: candidates["torch-bf16"])


def with_seconds(monkeypatch, seconds):
    """Net -> what its measurement gives."""
    monkeypatch.setattr(net_runtimes, "_seconds", lambda net, patch: seconds(net))


def test_exact_is_the_default_and_measures_nothing(a_bundle_and_net, monkeypatch):
    bundle, net = a_bundle_and_net
    monkeypatch.setattr(net_runtimes, "probe_inputs", None)
    assert SegmentOptions().runtime == "exact"
    assert choose_runtime(bundle, net, runtime="exact") == (net, RuntimeChoice("exact"))


def test_auto_takes_the_fastest_and_measures_once(a_bundle_and_net, monkeypatch):
    bundle, net = a_bundle_and_net
    fast = lambda x: net(x)  # noqa: E731
    prepared_as(monkeypatch, {"torch-bf16": fast})
    with_seconds(monkeypatch, lambda found: 1.0 if found is fast else 3.0)
    assert choose_runtime(bundle, net, runtime="auto") == (fast, RuntimeChoice("torch-bf16", speedup=3.0, agreement=1.0))
    monkeypatch.setattr(net_runtimes, "_seconds", None)
    assert choose_runtime(bundle, net, runtime="auto") == (fast, RuntimeChoice("torch-bf16", speedup=3.0, agreement=1.0))


def test_auto_stays_with_torch_where_nothing_is_clearly_faster(a_bundle_and_net, monkeypatch):
    bundle, net = a_bundle_and_net
    prepared_as(monkeypatch, {"torch-bf16": lambda x: net(x)})
    with_seconds(monkeypatch, lambda found: 1.0 if found is net else 0.9)
    assert choose_runtime(bundle, net, runtime="auto") == (net, RuntimeChoice("exact"))
    monkeypatch.setattr(net_runtimes, "probe_inputs", None)  # the second time nothing runs
    assert choose_runtime(bundle, net, runtime="auto") == (net, RuntimeChoice("exact"))


def test_auto_leaves_out_a_runtime_whose_labels_differ(a_bundle_and_net, monkeypatch):
    bundle, net = a_bundle_and_net
    prepared_as(monkeypatch, {"torch-bf16": lambda x: net(x).roll(1, dims=1)})
    with_seconds(monkeypatch, lambda found: 3.0 if found is net else 1.0)
    assert choose_runtime(bundle, net, runtime="auto") == (net, RuntimeChoice("exact"))


def test_a_remembered_runtime_that_stopped_working_falls_back_with_a_log_line(a_bundle_and_net, monkeypatch, caplog):
    bundle, net = a_bundle_and_net
    prepared_as(monkeypatch, {"torch-bf16": lambda x: net(x)})
    with_seconds(monkeypatch, lambda found: 3.0 if found is net else 1.0)
    assert choose_runtime(bundle, net, runtime="auto")[1].name == "torch-bf16"
    prepared_as(monkeypatch, {"torch-bf16": lambda x: net(x) * torch.nan})
    with caplog.at_level(logging.WARNING):
        assert choose_runtime(bundle, net, runtime="auto") == (net, RuntimeChoice("exact"))
    assert "goes on in PyTorch (float32)" in caplog.text


def test_a_damaged_memory_of_the_choice_is_measured_again(a_bundle_and_net, monkeypatch, a_cache):
    bundle, net = a_bundle_and_net
    prepared_as(monkeypatch, {"torch-bf16": lambda x: net(x)})
    with_seconds(monkeypatch, lambda found: 3.0 if found is net else 1.0)
    choose_runtime(bundle, net, runtime="auto")
    [kept] = a_cache.glob("runtime-*/choice.json")
    assert json.loads(kept.read_text(encoding="utf-8")) == {"name": "torch-bf16", "speedup": 3.0}
    for text in ("{", "[]", '{"name": "of tomorrow", "speedup": 1}', "null"):
        kept.write_text(text)
        assert choose_runtime(bundle, net, runtime="auto")[1].name == "torch-bf16"


def test_a_runtime_that_was_asked_for_and_cannot_be_used_names_the_way_out(a_bundle_and_net, monkeypatch):
    bundle, net = a_bundle_and_net
    monkeypatch.setattr(net_runtimes, "possible_runtimes", list)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install .*openvino.* Use the runtime 'exact'"):
        choose_runtime(bundle, net, runtime="openvino")
    with pytest.raises(UserError, match="no bfloat16 instructions. Use the runtime 'exact'"):
        choose_runtime(bundle, net, runtime="torch-bf16")
    with pytest.raises(UserError, match="Did you mean 'openvino'"):
        SegmentOptions(runtime="openvin")


def test_bfloat16_answers_nearly_as_float32(a_bundle_and_net, monkeypatch):
    bundle, net = a_bundle_and_net
    monkeypatch.setattr(net_runtimes, "possible_runtimes", lambda: ["torch-bf16"])
    monkeypatch.setattr(net_runtimes, "BFLOAT16_AGREEMENT", 0.9)  # random weights: many voxels are near a draw
    fast, choice = choose_runtime(bundle, net, runtime="torch-bf16")
    (patch,) = probe_inputs(bundle.manifest)
    with torch.inference_mode():
        found, expected = fast(patch), net(patch)
    assert found.dtype == torch.bfloat16 and 0.9 <= choice.agreement <= 1
    assert (found.float() - expected).abs().max() < 0.05 * (expected.max() - expected.min())


@has_openvino
def test_openvino_gives_the_same_labels_and_converts_once(a_tiny_bundle, a_phantom, monkeypatch, a_cache):
    bundle, (volume, _) = load_bundle(a_tiny_bundle), a_phantom
    expected = segment_volume(volume, bundle, options=SegmentOptions(num_patches=2, threads=1))
    assert expected.run_info["runtime"]["name"] == "exact" and not a_cache.exists()
    first = segment_volume(volume, bundle, options=SegmentOptions(num_patches=2, threads=1, runtime="openvino"))
    assert (first.labelmap.array != expected.labelmap.array).mean() < 1e-4
    assert "OpenVINO (float32)" in first.run_info["runtime_note"]
    assert [sorted(os.listdir(folder)) for folder in a_cache.iterdir()] == [["local.bin", "local.xml"]]
    monkeypatch.setattr(net_runtimes, "_convert", None)
    second = segment_volume(volume, bundle, options=SegmentOptions(num_patches=2, threads=1, runtime="openvino"))
    assert (second.labelmap.array == first.labelmap.array).all()


@has_openvino
def test_openvino_reports_its_use_to_nobody():
    assert "openvino_telemetry" not in sys.modules


def test_what_a_converter_raises_becomes_a_reason(a_bundle_and_net, monkeypatch):
    bundle, net = a_bundle_and_net

    def fail(net):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(net_runtimes, "possible_runtimes", lambda: ["torch-bf16"])
    monkeypatch.setattr(net_runtimes, "_in_bfloat16", fail)
    with pytest.raises(Unusable, match="^RuntimeError: first line$"):
        net_runtimes.prepared_runtime("torch-bf16", bundle, net, inputs=probe_inputs(bundle.manifest), expected=None)
