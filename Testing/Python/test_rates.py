"""Rates: what a run teaches, what is kept, and that a broken memory is an empty one."""

import pytest

from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.rates import Rate, Rates
from NMSWSegment.protocol import SegmentOptions


def a_run_info(**changes) -> dict:
    """Four patches, one of them reused, in 2000 voxels of the model grid of a volume of 24000; no preview."""
    timings = {"read": 9.0, "load": 8.0, "canonical": 0.5, "coarse": 1.0, "select": 0.25, "upsample": 0.75, "aggregate": 0.4, "patches": 6.0, "restore": 1.2}
    run_info = {
        "timings_s": timings,
        "patches": [{}] * 4,
        "patches_reused": 1,
        "canonical_voxels": 2000,
        "device_steps": [],
        "volume": {"shape_kji": [20, 30, 40]},
    }
    return run_info | changes


def test_rate_of_a_run_divides_every_stage_by_what_it_grows_with():
    rate = Rate.from_run_info(a_run_info())
    assert rate.patch_s == pytest.approx(6.0 / 3 + 0.4 / 4)
    assert rate.voxel_s == pytest.approx((0.5 + 1.0 + 0.25 + 0.75) / 2000)
    assert rate.source_voxel_s == pytest.approx(1.2 / 24000)


def test_rate_of_a_run_that_showed_the_coarse_result_restores_twice():
    run_info = a_run_info()
    run_info["timings_s"]["preview"] = 1.5
    assert Rate.from_run_info(run_info).source_voxel_s == pytest.approx((1.2 + 1.5) / 24000)


@pytest.mark.parametrize(
    "changes",
    [
        {"patches": []},
        {"patches_reused": 4},
        {"device_steps": ["cuda:0 ran out of memory; the nets went on with the CPU"]},
        {"timings_s": {"select": 0.2, "upsample": 0.7, "aggregate": 0.4, "patches": 6.0, "restore": 1.2}},
        {"timings_s": {"canonical": 0.5, "coarse": 0.0, "select": 0.2, "upsample": 0.7, "aggregate": 0.4, "patches": 6.0, "restore": 1.2}},
    ],
)
def test_rate_of_a_run_that_did_only_a_part_is_none(changes):
    assert Rate.from_run_info(a_run_info(**changes)) is None


def test_rate_comes_from_the_report_of_a_real_run(a_phantom, a_tiny_bundle):
    run_info = segment_volume(a_phantom[0], load_bundle(a_tiny_bundle), options=SegmentOptions(num_patches=3, device="cpu", threads=1)).run_info
    rate = Rate.from_run_info(run_info)
    timings = run_info["timings_s"]
    per_run = 3 * rate.patch_s + run_info["canonical_voxels"] * rate.voxel_s + a_phantom[0].array.size * rate.source_voxel_s
    assert per_run == pytest.approx(sum(timings.values()) - timings["load"], rel=1e-6)


def test_rates_learn_smoothly_and_per_device():
    rates = Rates()
    assert rates.get("torso", "cpu") is None
    rates.learn("torso", "cpu", Rate(2.0, 4e-6, 1e-7))
    assert rates.get("torso", "cpu") == Rate(2.0, 4e-6, 1e-7)
    rates.learn("torso", "cpu", Rate(1.0, 2e-6, 3e-7))
    assert vars(rates.get("torso", "cpu")) == pytest.approx({"patch_s": 1.5, "voxel_s": 3e-6, "source_voxel_s": 2e-7})
    assert rates.get("torso", "cuda:0") is None and rates.get("other", "cpu") is None


def test_rates_measurement_serves_until_a_run_tells_better():
    rates = Rates()
    rates.expect("torso", "cpu", Rate(9.0, 9e-6))
    assert rates.get("torso", "cpu") == Rate(9.0, 9e-6)
    rates.learn("torso", "cpu", Rate(2.0, 4e-6, 1e-7))
    rates.expect("torso", "cpu", Rate(9.0, 9e-6))
    assert rates.get("torso", "cpu") == Rate(2.0, 4e-6, 1e-7)


def test_rates_come_back_from_json_without_measurements():
    rates = Rates()
    rates.learn("torso", "cuda:1", Rate(2.0, 4e-6, 1e-7))
    rates.learn('a "name" ü', "cpu", Rate(0.1, 1e-7, 0.0))
    rates.expect("only measured", "cpu", Rate(1.0, 1.0))
    back = Rates.from_json(rates.to_json())
    assert back.get("torso", "cuda:1") == Rate(2.0, 4e-6, 1e-7) and back.get('a "name" ü', "cpu") == Rate(0.1, 1e-7, 0.0)
    assert back.get("only measured", "cpu") is None
    assert back.to_json() == rates.to_json()


ENTRY = '{"bundle": "torso", "device": "cpu", "patch_s": %s, "voxel_s": 1e-6, "source_voxel_s": 0}'


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", '"text"', "[1]", "[[]]", '{"a": 1}', "[{}]", "[" * 100_000, '[{"bundle": "torso", "device": "cpu", "speed": 3}]', None]
    + [f"[{ENTRY % value}]" for value in ("-1", "NaN", "Infinity", "null", '"fast"', "[]")],
)
def test_rates_of_garbage_are_empty(text):
    rates = Rates.from_json(text)
    assert rates.get("torso", "cpu") is None and rates.to_json() == "[]"
