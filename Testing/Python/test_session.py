"""Warm runs equal cold ones bit for bit and run only what is new."""

import shutil

import numpy as np
import pytest
from conftest import turned

from NMSWSegment.engine import session
from NMSWSegment.engine.runtime import Nets, OutOfMemory
from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.engine.session import Session, UnknownVolume
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.protocol import Cancelled, SegmentOptions, UserError

ROI = tuple(map(tuple, [[110.0, 20, 0, 40], [-15, 90, 0, 5], [0, 0, 120, 25], [0, 0, 0, 1]]))
BIG = 1 << 30


def cpu(**values) -> SegmentOptions:
    return SegmentOptions(**({"device": "cpu", "threads": 1, "num_patches": 5} | values))


@pytest.fixture
def bundle(a_tiny_bundle):
    return load_bundle(a_tiny_bundle)


@pytest.fixture(scope="module")
def volume():
    shape = (54, 42, 36)
    return phantoms.phantom(shape, ijk_to_ras=turned((6.0, 7.0, 8.0), shape, degrees=(10, -5, 15)))[0]


@pytest.fixture
def calls(monkeypatch):
    """How many times each net really ran: {"coarse": volumes, "local": patches}."""
    counts = {"coarse": 0, "local": 0}
    for name in counts:

        def counted(nets, x, *more, name=name, original=getattr(Nets, name)):
            counts[name] += len(x)
            return original(nets, x, *more)

        monkeypatch.setattr(Nets, name, counted)
    return counts


def assert_same(warm, cold):
    assert np.array_equal(warm.labelmap.array, cold.labelmap.array)
    assert warm.patches == cold.patches


def test_warm_runs_equal_cold_ones_and_run_only_new_patches(bundle, volume, calls):
    runs = [
        (cpu(), 5, 0),
        (cpu(num_patches=10), 5, 5),
        (cpu(), 0, 5),
        (cpu(structures=("spleen",)), None, None),
        (cpu(policy="top_k", num_patches=8), None, None),
        (cpu(num_patches=None), None, None),
        (cpu(num_patches=None, roi_to_ras=ROI), 0, None),
        (cpu(num_patches="auto"), 0, None),
        (cpu(num_patches=0), 0, 0),
    ]
    warm = Session(max_patch_bytes=BIG)
    for options, expected_new, expected_reused in runs:
        before = dict(calls)
        result = warm.run("a", volume, bundle=bundle, options=options)
        num_new = calls["local"] - before["local"]
        assert expected_new in (None, num_new)
        assert expected_reused in (None, result.run_info["patches_reused"])
        assert result.run_info["patches_reused"] + num_new == len(result.patches)
        assert ("patches" in result.run_info["timings_s"]) == (num_new > 0)
        assert ("coarse" in result.run_info["timings_s"]) == (before["coarse"] == 0)
        after = dict(calls)
        assert_same(result, segment_volume(volume, bundle, options=options))
        calls.update(after)
    assert calls["coarse"] == 1


def test_volume_is_sent_once(bundle, volume):
    warm = Session(max_patch_bytes=BIG)
    first = warm.run("a", volume, bundle=bundle, options=cpu())
    assert_same(warm.run("a", None, bundle=bundle, options=cpu()), first)
    with pytest.raises(UnknownVolume):
        warm.run("b", None, bundle=bundle, options=cpu())
    warm.forget()
    with pytest.raises(UnknownVolume):
        warm.run("a", None, bundle=bundle, options=cpu())


def test_another_volume_starts_afresh(bundle, volume, calls):
    other, _ = phantoms.phantom((30, 33, 36), ijk_to_ras=phantoms.upright_ijk_to_ras((9.0, 8.0, 7.0), (30, 33, 36)))
    warm = Session(max_patch_bytes=BIG)
    for key, each in (("a", volume), ("b", other), ("a", volume)):
        result = warm.run(key, each, bundle=bundle, options=cpu())
        assert result.run_info["patches_reused"] == 0 and "load" not in result.run_info["timings_s"] or key == "a"
        assert_same(result, segment_volume(each, bundle, options=cpu()))
    assert calls["coarse"] == 6


def test_another_bundle_or_thread_count_drops_results(bundle, volume, a_tiny_bundle, tmp_path):
    folder = shutil.copytree(a_tiny_bundle, tmp_path / "tiny")
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text(encoding="utf-8").replace('"Tiny"', '"Other"'))
    warm = Session(max_patch_bytes=BIG)
    warm.run("a", volume, bundle=bundle, options=cpu())
    more_threads = warm.run("a", volume, bundle=bundle, options=cpu(threads=2))
    assert more_threads.run_info["patches_reused"] == 0 and "load" not in more_threads.run_info["timings_s"]
    other = warm.run("a", volume, bundle=load_bundle(folder), options=cpu(threads=2))
    assert other.run_info["patches_reused"] == 0 and {"load", "coarse"} <= set(other.run_info["timings_s"])


def test_patches_that_do_not_fit_are_run_again(bundle, volume, calls, monkeypatch):
    patch_bytes = 4 * 16**3 * 4  # C x P^3 x float32
    monkeypatch.setattr(session, "available_memory_bytes", lambda: 4 * 3 * patch_bytes)  # a quarter is for patches
    warm = Session()
    for expected_reused in (0, 3, 3):
        result = warm.run("a", volume, bundle=bundle, options=cpu())
        assert result.run_info["patches_reused"] == expected_reused
    assert calls["local"] == 5 + 2 + 2
    assert_same(result, segment_volume(volume, bundle, options=cpu()))


def test_cancelled_run_keeps_the_patches_it_has_done(bundle, volume):
    def stop_at_third_patch(progress):
        if progress.done == 3:
            raise Cancelled

    warm = Session(max_patch_bytes=BIG)
    with pytest.raises(Cancelled):
        warm.run("a", volume, bundle=bundle, options=cpu(), on_progress=stop_at_third_patch)
    result = warm.run("a", None, bundle=bundle, options=cpu())
    assert result.run_info["patches_reused"] == 3
    assert_same(result, segment_volume(volume, bundle, options=cpu()))


def test_mistake_in_the_options_leaves_the_session_usable(bundle, volume):
    warm = Session(max_patch_bytes=BIG)
    warm.run("a", volume, bundle=bundle, options=cpu())
    with pytest.raises(UserError, match="Did you mean 'liver'"):
        warm.run("a", None, bundle=bundle, options=cpu(structures=("livr",)))
    assert warm.run("a", None, bundle=bundle, options=cpu()).run_info["patches_reused"] == 5


def test_lack_of_memory_lets_everything_go(bundle, volume, monkeypatch):
    warm = Session(max_patch_bytes=BIG)
    warm.run("a", volume, bundle=bundle, options=cpu())
    with monkeypatch.context() as patched, pytest.raises(OutOfMemory, match="Crop the volume"):
        patched.setattr(Nets, "local", lambda *_: (_ for _ in ()).throw(MemoryError()))
        warm.run("a", None, bundle=bundle, options=cpu(num_patches=9))
    with pytest.raises(UnknownVolume):
        warm.run("a", None, bundle=bundle, options=cpu())


def test_nets_that_left_a_full_gpu_get_another_chance_with_the_next_volume(bundle, volume, monkeypatch):
    opened = []

    def open_nets(bundle, *, device, runtime="exact", original=session.open_nets):
        opened.append(device)
        nets = original(bundle, device=device)
        nets.device_steps.append("cuda:0 ran out of memory; the nets went on with the CPU")
        return nets

    monkeypatch.setattr("NMSWSegment.engine.segment.open_nets", open_nets)
    warm = Session(max_patch_bytes=BIG)
    for key in ("a", "a", "b"):
        warm.run(key, volume, bundle=bundle, options=cpu())
    assert len(opened) == 2


def test_measure_gives_the_rates_and_keeps_the_nets(bundle, volume, calls):
    warm = Session(max_patch_bytes=BIG)
    device, rate = warm.measure(bundle, device="cpu", threads=1)
    assert device == "cpu"
    assert 0 < rate.patch_s < 1 and 0 < rate.voxel_s < 1e-3 and 0 < rate.source_voxel_s < 1e-3
    assert calls == {"coarse": 2, "local": 2}  # once to warm up
    result = warm.run("a", volume, bundle=bundle, options=cpu())
    assert "load" not in result.run_info["timings_s"]
    warm.measure(bundle, device="cpu", threads=1)
    assert warm.run("a", None, bundle=bundle, options=cpu()).run_info["patches_reused"] == 5


def test_missing_device_drops_nothing(bundle, volume):
    warm = Session(max_patch_bytes=BIG)
    warm.run("a", volume, bundle=bundle, options=cpu())
    with pytest.raises(UserError, match="This computer has: cpu"):
        warm.run("a", None, bundle=bundle, options=cpu(device="cuda:99"))
    assert warm.run("a", None, bundle=bundle, options=cpu()).run_info["patches_reused"] == 5
