"""The comparison: costs pinned to the paper, tables by hand, a run that is stopped and goes on, the verb from end to end."""

import argparse
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import windows_pipe

from NMSWSegment.engine import net_runtimes
from NMSWSegment.evaluation import charts, compare, comparison_run, fusion_speed, runtime_speed, speed
from NMSWSegment.evaluation.comparison_page import put_into_page
from NMSWSegment.evaluation.costs import bundle_costs, coarse_shape, run_costs
from NMSWSegment.evaluation.measurement import RUNS, STAGES, in_own_process, peak_memory_bytes
from NMSWSegment.evaluation.speed import before_table, speed_sentence, stage_table, total_seconds
from NMSWSegment.evaluation.speed_measurement import FirstCalls, SpeedOptions, measure_earlier, measure_speed, speed_macs
from NMSWSegment.evaluation.tables import losses, main_table, plain_sentence, structure_table, summary_rows
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.volume import Volume, read_volume, write_volume
from NMSWSegment.nets.nmsw_net import Architecture
from NMSWSegment.protocol import UserError

SHAPE = (30, 24, 34)
PAPER = SpeedOptions(shape=(480, 480, 480), classes=20, preset="paper", backbone="unet", windows=3, device="cpu", threads=1)


@pytest.fixture
def a_folder(tmp_path):
    """Two cases at the tiny bundle's own spacing, in Decathlon layout."""
    ijk_to_ras = phantoms.upright_ijk_to_ras((6.0, 6.0, 6.0), SHAPE)
    volume, labels = phantoms.phantom(SHAPE, ijk_to_ras=ijk_to_ras)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_volume(volume, tmp_path / name / "ct.nii.gz")
        write_volume(Volume(labels, ijk_to_ras), tmp_path / name / "label.nii.gz")
    values = {str(value): name for value, name in enumerate(["background", *phantoms.ORGANS])}
    training = [{"image": f"{name}/ct.nii.gz", "label": f"{name}/label.nii.gz"} for name in ("first", "second")]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": values, "training": training}))
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Methods run without a process of their own, which costs seconds each."""
    monkeypatch.setattr(comparison_run, "in_own_process", lambda function, *arguments, **options: function(*arguments, **options))
    monkeypatch.setattr(fusion_speed, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(runtime_speed, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(speed, "in_own_process", lambda function, *arguments, **options: function(*arguments, **options))


def verb(*words) -> int:
    """Run `nmsw compare` as the command line does."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([*map(str, words), "--threads", "1"]))


def record(method, *, dsc, seconds, windows=5, case="a", title=None, macs=2e12):
    stages = {stage: 0.0 for stage in STAGES} | {"patches": seconds}
    scores = {"mean": dsc, "mean_nsd_2mm": dsc / 2, "mean_nsd_2voxels": dsc, "mean_hd95_mm": None, "dsc": {"liver": dsc}, "nsd_2mm": {"liver": dsc / 2}}
    facts = {"bundle": "b", "case": case, "held_out": True, "method": method, "title": title or method, "macs": macs, "paper_macs": None, "windows": windows}
    return facts | {
        "candidates": 27,
        "seconds_cold": stages,
        "seconds_warm": stages,
        "peak_memory_bytes": 10**9,
        "gpu_memory_bytes": None,
        "scores": scores,
        "patches": [],
    }


# ---- costs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "sliding_window", "k_5", "k_30"),
    # Table 2 of the paper, TMACs at 480^3 with 20 outputs
    [("unet", 343 * 0.1832, 1.27, 5.85), ("swin_unetr", 69.2, 1.36, 6.37), ("mednext", 88.0, 1.64, 8.02)],
)
def test_macs_in_the_papers_way_are_those_of_its_table_2(backbone, sliding_window, k_5, k_30):
    paper = run_costs(Architecture(num_classes=20, backbone=backbone, preset="paper"), coarse_shape=(160, 160, 160), patch_size=(128, 128, 128)).paper
    assert paper.total(343, uses_coarse=False) / 1e12 == pytest.approx(sliding_window, rel=0.01)
    assert paper.total(5, uses_coarse=True) / 1e12 == pytest.approx(k_5, rel=0.01)
    assert paper.total(30, uses_coarse=True) / 1e12 == pytest.approx(k_30, rel=0.01)


def test_speed_table_counts_343_windows_and_both_ways_of_counting():
    assert PAPER.grid.num_candidates == 343
    true, paper = speed_macs("sw_0.50", PAPER, windows=343)
    assert paper / 1e12 == pytest.approx(63, rel=0.01)
    # 73.1 GMACs a window with the classes as output; ours ends in 16 features and a 1 x 1 head (docs/deviations.md, D7)
    assert 0.85 * 343 * 73.1e9 < true < 343 * 73.1e9
    assert speed_macs("nmsw_5", PAPER, windows=5)[1] / 1e12 == pytest.approx(1.27, rel=0.01)
    assert speed_macs("nmsw_30", PAPER, windows=30)[1] / 1e12 == pytest.approx(5.85, rel=0.01)


def test_true_macs_grow_by_one_local_net_a_patch():
    costs = run_costs(Architecture(num_classes=4), coarse_shape=(32, 48, 32), patch_size=(64, 64, 64)).true
    assert costs.total(7, uses_coarse=True) - costs.total(0, uses_coarse=True) == 7 * costs.local
    assert costs.total(0, uses_coarse=False) == 0 < costs.total(0, uses_coarse=True) == costs.coarse


def test_coarse_shape_holds_the_padding_to_whole_multiples():
    manifest = SimpleNamespace(coarse_factor=(2, 3, 4), coarse_multiple=16)
    assert coarse_shape((33, 96, 65), manifest=manifest) == (32, 32, 32)


def test_bundle_that_does_not_say_how_it_was_built_has_no_macs(a_tiny_bundle):
    manifest = load_bundle(a_tiny_bundle).manifest
    assert bundle_costs(manifest, CandidateGrid.covering((20, 20, 20), patch_size=(16, 16, 16), overlap=0.5)) is None


# ---- tables --------------------------------------------------------------------------------------------------------


def test_rows_are_means_with_the_sample_standard_deviation():
    row = summary_rows([record("greedy_5", dsc=0.5, seconds=2.0, case="a"), record("greedy_5", dsc=0.7, seconds=4.0, case="b")])["greedy_5"]
    assert (row.dsc, row.dsc_sd, row.nsd_2mm, row.warm_s, row.cases) == pytest.approx((0.6, 0.02**0.5, 0.3, 3.0, 2))
    assert row.hd95_mm is None and row.paper_tmacs is None and row.tmacs == pytest.approx(2.0) and row.peak_gb == 1.0


def test_sentence_names_the_fastest_k_that_is_good_enough():
    rows = summary_rows(
        [
            record("sw_0.50", dsc=0.80, seconds=10),
            record("greedy_5", dsc=0.70, seconds=2),
            record("greedy_10", dsc=0.796, seconds=4),
            record("greedy_30", dsc=0.81, seconds=11),
        ]
    )
    assert plain_sentence(rows).startswith("k = 10 gives 100% of the Dice of a sliding window in 40% of its time on this computer")
    assert "better choice" not in plain_sentence(rows)


def test_sentence_says_where_no_k_is_enough_and_where_the_sliding_window_wins():
    rows = summary_rows([record("sw_0.50", dsc=0.80, seconds=1.5), record("greedy_5", dsc=0.70, seconds=2)])
    assert "No k reaches 99%" in plain_sentence(rows) and plain_sentence(rows).endswith("A sliding window is the better choice here.")


def test_sentence_takes_no_window_for_a_yardstick_that_is_worse_than_the_coarse_net():
    records = [
        record("coarse", dsc=0.6, seconds=1),
        record("sw_0.50", dsc=0.1, seconds=10),
        record("greedy_5", dsc=0.66, seconds=3),
        record("all", dsc=0.66, seconds=12),
    ]
    sentence = plain_sentence(summary_rows(records))
    assert sentence.startswith("k = 5 gives 100% of the Dice of running every patch in 30% of the time of a sliding window")
    assert "no yardstick for accuracy" in sentence and "0.100 against 0.600" in sentence


def test_sentence_and_tables_where_nothing_is_found_or_no_case_shows_a_class_have_dashes():
    for dsc, words in ((0.0, "a sliding window finds none of the structures"), (None, "the cases show none of the classes")):
        records = [record(method, dsc=dsc or 0.0, seconds=2) for method in ("coarse", "sw_0.50", "greedy_5", "all")]
        for one in records:
            one["scores"] |= {"mean": dsc, "mean_nsd_2mm": dsc, "mean_nsd_2voxels": dsc, "dsc": {} if dsc is None else {"liver": dsc}}
        rows = summary_rows(records)
        assert plain_sentence(rows).startswith("There is no sentence on what k to choose, because ") and words in plain_sentence(rows)
        assert main_table(rows, reference=rows["sw_0.50"]).splitlines()[4].endswith("| - | 100 % |") and losses(rows) == []


def test_losses_name_what_is_better_and_not_slower():
    rows = summary_rows(
        [record("sw_0.25", dsc=0.8, seconds=2, title="window"), record("greedy_5", dsc=0.7, seconds=3), record("greedy_10", dsc=0.9, seconds=3)]
    )
    assert losses(rows) == ["greedy_5 (0.700, 3.0 s) loses against window (0.800, 2.0 s)."]


def test_tables_are_relative_to_the_sliding_window_of_the_same_run():
    records = [record("sw_0.50", dsc=0.8, seconds=10, windows=27), record("greedy_5", dsc=0.6, seconds=2)]
    rows = summary_rows(records)
    line = main_table(rows, reference=rows["sw_0.50"]).splitlines()[3]
    assert line.startswith("| greedy_5 | 0.600 | 0.300 |") and line.endswith("| 5 of 27 | 2.0000 | - | 1.00 | - | 75 % | 20 % |")
    assert structure_table(records, ("greedy_5", "coarse"), metric="dsc").splitlines()[2] == "| liver | 1 | 0.600 |"


def test_docs_page_is_replaced_between_its_marks_only(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- run -->\nold\n<!-- /run -->\nafter\n")
    assert put_into_page(path, "new\n", name="run") == "before\n<!-- run -->\n\nnew\n\n<!-- /run -->\nafter\n"
    with pytest.raises(UserError, match="Write them where the page shall stand"):
        put_into_page(path, "new", name="other")


# ---- processes -----------------------------------------------------------------------------------------------------


def test_process_of_its_own_has_its_own_peak_memory_and_its_death_is_told():
    ballast = np.ones(10**8)  # 0.8 GB that the other process must not be charged with
    with pytest.raises(UserError, match="leave the method out with --methods"):
        in_own_process(os._exit, 9)
    assert in_own_process(peak_memory_bytes) < peak_memory_bytes() - ballast.nbytes / 2


# ---- the verb ------------------------------------------------------------------------------------------------------


def test_verb_compares_all_methods_and_writes_tables_and_pictures(a_tiny_bundle, a_folder, in_this_process, capsys):
    docs = a_folder / "benchmarks.md"
    docs.write_text("# Ours\n<!-- out -->\n<!-- /out -->\n")
    words = (
        "--bundle",
        a_tiny_bundle,
        "--data",
        f"decathlon:{a_folder}",
        "--cases",
        "first",
        "--k",
        "3",
        "--ablate",
        "policy,class_weights,pooling",
        "--output",
        a_folder / "out",
    )
    assert verb(*words, "--docs", docs) == 0
    results = json.loads((a_folder / "out" / "results.json").read_text(encoding="utf-8"))
    by_method = {entry["method"]: entry for entry in results["records"]}
    assert set(by_method) == set(compare.comparison_methods((3,)))
    for name in ("sw_0.50", "sw_0.25", "sw_foreground", "all"):
        assert by_method[name]["scores"]["mean"] == 1.0
    assert by_method["coarse"]["scores"]["mean"] < by_method["greedy_3"]["scores"]["mean"] < 1
    assert by_method["greedy_3"]["windows"] == 3 and by_method["all"]["windows"] == 24 and by_method["sw_0.25"]["windows"] == 18
    assert all(set(entry[f"seconds_{run}"]) == set(STAGES) for entry in results["records"] for run in RUNS)
    assert all(entry["seconds_cold"]["load"] > 0 == entry["seconds_warm"]["load"] for entry in results["records"])
    for name in ("pareto.png", "dsc_by_k.png", "dsc_by_size.png", "errors.png"):
        assert (a_folder / "out" / name).read_bytes().startswith(b"\x89PNG") and (a_folder / "benchmarks" / f"out-{name}").is_file()
    labelmap = read_volume(a_folder / "out" / "labelmaps" / "tiny" / "first" / "sw_0.50.nii.gz")
    np.testing.assert_array_equal(labelmap.array, read_volume(a_folder / "first" / "label.nii.gz").array)
    page = (a_folder / "out" / "table.md").read_text(encoding="utf-8")
    assert "Not held out: first" in page and "Ablation pooling" in page and "](benchmarks/out-pareto.png)" in docs.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip().splitlines()[-1] in page.replace("**", "")
    assert len((a_folder / "out" / "structures.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3 * len(by_method)


def test_verb_on_a_case_that_shows_no_class_writes_its_tables_and_no_charts(a_tiny_bundle, a_folder, in_this_process, capsys, recwarn):
    path = a_folder / "first" / "label.nii.gz"
    label = read_volume(path)
    write_volume(Volume(np.zeros_like(label.array), label.ijk_to_ras), path)
    words = ("--bundle", a_tiny_bundle, "--data", f"decathlon:{a_folder}", "--cases", "first", "--methods", "coarse,greedy_3,sw_0.50", "--k", "3")
    assert verb(*words, "--output", a_folder / "out") == 0
    page = (a_folder / "out" / "table.md").read_text(encoding="utf-8")
    assert "the cases show none of the classes" in page and "](errors.png)" in page and "](pareto.png)" not in page
    assert sorted(path.name for path in (a_folder / "out").glob("*.png")) == ["errors.png"]
    assert not [warning for warning in recwarn if "log-scaled" in str(warning.message)]


def test_accuracy_by_size_shows_every_structure_of_every_case_and_their_means(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(charts, "save", lambda figure, path: figures.append(figure))
    scores = [{"dsc": {"small": 0.2, "large": 0.9, "unknown size": 0.1}, "volumes_ml": {"small": 2.0, "large": 1500.0}}]
    scores += [{"dsc": {"small": 0.4, "large": 0.7}, "volumes_ml": {"small": 4.0, "large": 700.0}}]
    records = [{"method": "greedy_5", "scores": one} for one in scores]
    charts.write_dsc_by_size(records, ("coarse", "greedy_5"), tmp_path / "chart.png")
    (axes,) = figures[0].axes
    assert axes.collections[0].get_offsets().tolist() == [[2.0, 0.2], [1500.0, 0.9], [4.0, 0.4], [700.0, 0.7]]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[3, 0.3], [1000, 0.8]])
    assert axes.lines[0].get_label() == "NMSW greedy 5"


def test_stopped_comparison_goes_on_where_it_was(a_tiny_bundle, a_folder, monkeypatch):
    ran = []

    def run_or_stop(function, method, **options):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((options["image"].parent.name, method.name))
        return function(method, **options)

    monkeypatch.setattr(comparison_run, "in_own_process", run_or_stop)
    words = ("--bundle", a_tiny_bundle, "--data", f"decathlon:{a_folder}", "--methods", "coarse,sw_0.25", "--output", a_folder / "out")
    with pytest.raises(KeyboardInterrupt):
        verb(*words)
    before = json.loads((a_folder / "out" / "results.json").read_text(encoding="utf-8"))["records"]
    monkeypatch.setattr(
        comparison_run,
        "in_own_process",
        lambda function, method, **options: ran.append((options["image"].parent.name, method.name)) or function(method, **options),
    )
    assert verb(*words) == 0
    assert ran == [(case, method) for case in ("first", "second") for method in ("coarse", "sw_0.25")]
    assert json.loads((a_folder / "out" / "results.json").read_text(encoding="utf-8"))["records"][:3] == before
    with pytest.raises(UserError, match="methods.*Use the same methods to go on with it, or another --output"):
        verb(*words[:-3], "coarse", *words[-2:])


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (("--methods", "sw_0.5"), "Did you mean 'sw_0.50'"),
        (("--ablate", "estimator"), "policy, class_weights, pooling"),
        (("--held-out",), "Leave --held-out away"),
        (("--cases", "third"), "There are: first, second"),
    ],
)
def test_verb_mistake_says_what_to_give(a_tiny_bundle, a_folder, words, fix):
    with pytest.raises(UserError, match=fix):
        verb("--bundle", a_tiny_bundle, "--data", f"decathlon:{a_folder}", "--output", a_folder / "out", *words)


def test_verb_prints_any_name_into_a_pipe_of_windows(tmp_path, monkeypatch):
    printed = windows_pipe(monkeypatch)
    monkeypatch.setattr(compare, "_compare", lambda arguments, on_progress: ("| 肝臓 |", [], "肝臓 is faster."))
    assert verb("--output", tmp_path / "out") == 0
    assert rb"\u809d\u81d3 is faster." in printed.getvalue() and (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == "| 肝臓 |"


# ---- speed ---------------------------------------------------------------------------------------------------------


def test_first_calls_compute_and_later_ones_repeat():
    net = FirstCalls(torch.nn.Identity(), limit=2)
    answers = [float(net(torch.full((1, 1, 2, 2, 2), value)).mul_(0.5).max()) for value in (1.0, 2.0, 3.0, 4.0)]  # the caller may change them
    assert answers == [0.5, 1, 1, 1] and len(net.seconds_per_patch) == 2
    assert net(torch.zeros(3, 1, 2, 2, 2)).shape == (3, 1, 2, 2, 2)


def test_speed_stitches_all_windows_and_measures_a_few():
    options = replace(PAPER, shape=(70, 64, 100), classes=3, preset="compact", windows=2)
    window, few = measure_speed("sw_0.50", options), measure_speed("nmsw_5", options)
    assert (window["windows"], few["windows"]) == (2 * 1 * 3, 5)
    assert len(window["seconds_per_patch"]) == len(few["seconds_per_patch"]) == 2
    assert window["seconds"].keys() == {"aggregate"} and {"coarse", "upsample", "select", "aggregate"} == few["seconds"].keys()


def test_speed_seconds_of_unmeasured_windows_are_the_median_of_all_measured_ones():
    records = [
        {"method": "sw_0.50", "windows": 100, "seconds_per_patch": [1.0, 9.0], "seconds": {"aggregate": 10.0}},
        {"method": "nmsw_5", "windows": 5, "seconds_per_patch": [2.0], "seconds": {"coarse": 1.0, "aggregate": 0.5}},
    ]
    assert total_seconds(records) == {"sw_0.50": 210.0, "nmsw_5": 11.5}
    assert speed_sentence(records) == "On this computer k = 5 takes 12 s where a sliding window takes 3.5 min: 5.5 % of its time."


def test_speed_stages_before_and_after_stand_side_by_side():
    after = {
        "method": "nmsw_10",
        "windows": 10,
        "seconds_per_patch": [2.0, 3.0, 4.0],
        "seconds": {"coarse": 5.0, "upsample": 0.5, "select": 0.25, "aggregate": 1.0},
        "peak_memory_bytes": 2e9,
    }
    before = after | {"seconds": {"coarse": 10.0, "upsample": 3.0, "select": 3.0, "aggregate": 9.0}, "peak_memory_bytes": 5e9}
    assert stage_table([after]).splitlines()[-1] == "| NMSW, k = 10 | 5.00 | 0.50 | 0.25 | 30.00 | 1.00 | 5 % |"
    rows = before_table({"before": before, "records": [after]}).splitlines()[2:]
    assert (
        "| upsample | 3.00 s | 0.50 s | 6.0 |" in rows and "| patches | 30.00 s | 30.00 s | 1.0 |" in rows and "| peak memory | 5.0 GB | 2.0 GB | 2.5 |" in rows
    )


EARLIER_VERSION = """
from types import SimpleNamespace
METHODS = {}
SpeedOptions = SimpleNamespace
def measure_speed(method, options):
    print("loading")
    return {"method": method, "k": METHODS[method], "shape": list(options.shape), "classes": options.classes}
"""


def test_speed_of_an_earlier_version_is_measured_in_its_folder(tmp_path):
    evaluation = tmp_path / "NMSWSegment" / "evaluation"
    evaluation.mkdir(parents=True)
    (tmp_path / "NMSWSegment" / "__init__.py").touch()
    (evaluation / "__init__.py").touch()
    (evaluation / "speed_measurement.py").write_text(EARLIER_VERSION)
    assert measure_earlier("nmsw_10", PAPER, folder=tmp_path) == {"method": "nmsw_10", "k": 10, "shape": list(PAPER.shape), "classes": PAPER.classes}
    (evaluation / "speed_measurement.py").write_text("raise ValueError('of another time')")
    with pytest.raises(UserError, match="of another time.*Give another one with --before"):
        measure_earlier("nmsw_10", PAPER, folder=tmp_path)
    with pytest.raises(UserError, match="holds no folder NMSWSegment"):
        verb("--speed", "--before", tmp_path / "nowhere", "--output", tmp_path / "speed")


def test_speed_verb_writes_a_table_and_goes_on(tmp_path, in_this_process, monkeypatch, capsys):
    words = ("--speed", "--shape", 64, 70, 64, "--classes", 3, "--preset", "compact", "--windows", 1, "--output", tmp_path / "speed")
    assert verb(*words) == 0
    page = (tmp_path / "speed" / "table.md").read_text(encoding="utf-8")
    assert "| sliding window, overlap 0.5 | 2 | 1 |" in page and "| NMSW, k = all | 2 | 1 |" in page
    monkeypatch.setattr(speed, "in_own_process", None)  # nothing is left to measure
    assert verb(*words) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("On this computer k = 5 takes")


def test_fusion_sliced_computes_the_same_with_fewer_operations(tmp_path, in_this_process, monkeypatch, capsys):
    words = ("--fusion", "--preset", "compact", "--classes", 3, "--windows", 1, "--threads", 1, "--output", tmp_path / "fusion")
    assert verb(*words) == 0
    records = json.loads((tmp_path / "fusion" / "results.json").read_text(encoding="utf-8"))["records"]
    assert [(record["kind"], record["sparsity"]) for record in records] == [
        ("dense", 0.0),
        *((kind, sparsity) for sparsity in (0.7, 0.8, 0.9) for kind in ("masked", "sliced")),
    ]
    dense, *sparse = records
    for masked, sliced in zip(sparse[::2], sparse[1::2]):
        assert masked["macs"] == dense["macs"] > 2 * sliced["macs"] and sliced["parameters"] <= masked["parameters"] < dense["parameters"]
        assert sliced["difference"] < 1e-4
    monkeypatch.setattr(fusion_speed, "in_own_process", None)  # nothing is left to measure
    assert verb(*words) == 0
    assert "| sliced, S = 0.9 |" in (page := capsys.readouterr().out) and "with the masked channels sliced away it is" in page


def test_runtimes_are_compared_with_the_exact_one_on_the_sample_and_those_that_cannot_be_used_say_why(
    tmp_path, in_this_process, monkeypatch, capsys, a_tiny_bundle
):
    def prepared(name, bundle, net, *, inputs, expected):
        if name == "openvino":
            raise net_runtimes.Unusable("it is not installed")
        return (lambda x: net(x) + 0.0), net_runtimes.RuntimeChoice(name, agreement=1.0)

    monkeypatch.setattr(runtime_speed, "possible_runtimes", lambda: ["torch-bf16", "openvino"])
    monkeypatch.setattr(runtime_speed, "prepared_runtime", prepared)
    words = ("--runtimes", "--bundle", a_tiny_bundle, "--windows", 2, "--output", tmp_path / "runtimes")
    assert verb(*words) == 0
    exact, bfloat16, openvino = json.loads((tmp_path / "runtimes" / "results.json").read_text(encoding="utf-8"))["records"]
    assert exact["runtime"] == "exact" and len(exact["seconds"]) == 2 and exact["mean_dsc"] == bfloat16["mean_dsc"] == bfloat16["least_dsc"] == 1
    assert openvino == {"bundle": str(a_tiny_bundle), "runtime": "openvino", "unusable": "it is not installed"}
    monkeypatch.setattr(runtime_speed, "in_own_process", None)  # nothing is left to measure
    assert verb(*words) == 0
    assert "| PyTorch (bfloat16) |" in (page := capsys.readouterr().out) and "not usable: it is not installed" in page and "Fastest on this computer:" in page


def test_speed_without_memory_for_the_sliding_window_says_so_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "available_memory_bytes", lambda: 10**9)
    with pytest.raises(UserError, match="Use a smaller --shape"):
        verb("--speed", "--output", tmp_path / "speed")
