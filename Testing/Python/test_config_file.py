"""Options from a file: the names of the flags, flags first, and sentences for what cannot be meant."""

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("monai")

from test_train import tiny_options  # noqa: E402

from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training.options import TrainOptions, add_option_arguments, options_from_arguments  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def options_of(path: Path, text: str, *flags: str) -> TrainOptions:
    """What `nmsw train --config` makes of a file and flags."""
    path.write_text(text)
    parser = argparse.ArgumentParser()
    add_option_arguments(parser)
    return options_from_arguments(parser.parse_args(["--config", str(path), *flags]))


def test_file_has_the_names_of_the_flags_and_flags_override_it(tmp_path):
    text = """
        data: decathlon:a
        hold-out: [one, two]
        spacing: [5, 2, 1]
        learning_rate: 1e-4   # a text for YAML
        iterations: 5e3
        recipe: paper-word
        fold:
    """
    text = "\n".join(line.strip() for line in text.splitlines())
    options = options_of(tmp_path / "run.yaml", text)
    assert (options.data, options.hold_out, options.spacing_mm) == (("decathlon:a",), ("one", "two"), (5.0, 2.0, 1.0))
    assert options.learning_rate == 1e-4 and options.iterations == 5000 and options.preset == "paper" and options.fold is None
    changed = options_of(tmp_path / "run.yaml", text, "--iterations", "7", "--recipe", "compact", "--hold-out", "three", "--data", "decathlon:b")
    assert changed == replace(options_of(tmp_path / "run.yaml", text, "--recipe", "compact"), iterations=7, hold_out=("three",), data=("decathlon:b",))
    assert changed.preset == "compact"


def test_options_of_a_run_are_a_file(tmp_path):
    options = tiny_options(tmp_path, hold_out=("one",), ema=0.5)
    text = json.dumps(asdict(options), indent=2)
    assert options_of(tmp_path / "options.json", text) == options
    assert options_of(tmp_path / "options.json", text, "--seed", "9") == replace(options, seed=9)


def test_window_of_a_flag_wins_over_the_points_and_the_window_of_a_file(tmp_path):
    for line in ("window: [-1, 1]", "intensity_points: [[-5, 0], [0, 0.5], [5, 1]]"):
        text = f"data: [decathlon:a]\n{line}\n"
        assert options_of(tmp_path / "run.yaml", text, "--window", "-250", "500").intensity_points == ((-250.0, 0.0), (500.0, 1.0))
    assert options_of(tmp_path / "run.yaml", text).intensity_points == ((-5.0, 0.0), (0.0, 0.5), (5.0, 1.0))


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("learning_rates: 1", "Unknown option in .*'learning_rates'. Did you mean 'learning_rate'"),
        ("iterations: many", "'iterations' .* is 'many'. Give a whole number"),
        ("iterations: 2.5", "Give a whole number"),
        ("iterations: true", "Give a whole number"),
        ("ema: [1]", "Give a number"),
        ("ema: .inf", "Give a number"),
        ("spacing: [1, 2]", "Give a list of 3, each a number"),
        ("spacing: 3", "Give a list of 3, each a number"),
        ("hold_out: [1]", "Give a list, each a text"),
        ("intensity_points: [1]", "Give a list of pairs of numbers"),
        ("backbone: 3", "Give a text"),
        ("recipe: papr-word", "Did you mean 'paper-word'"),
        ("window: [5, 1]", "Give the lower bound first"),
        ("- iterations", "holds no options. Write one a line"),
        ("a: [", "cannot be read .*Write one option a line"),
        ("", "holds no options"),
    ],
)
def test_file_that_cannot_be_meant_says_what_to_write(tmp_path, text, fix):
    with pytest.raises(UserError, match=fix):
        options_of(tmp_path / "run.yaml", text, "--data", "decathlon:a")


def test_file_without_data_asks_for_it(tmp_path):
    with pytest.raises(UserError, match="Give --data KIND:FOLDER, or write data into the file"):
        options_of(tmp_path / "run.yaml", "seed: 1")


def test_file_that_is_not_there_says_so(tmp_path):
    parser = argparse.ArgumentParser()
    add_option_arguments(parser)
    with pytest.raises(UserError, match="nowhere.yaml' cannot be read"):
        options_from_arguments(parser.parse_args(["--config", str(tmp_path / "nowhere.yaml")]))


def test_file_in_the_document_is_one(tmp_path):
    text = re.search(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL).group(1)
    options = options_of(tmp_path / "run.yaml", text)
    assert options.subset == "organ" and options.hold_out == ("s0010", "s0011") and options.intensity_points == ((-250.0, 0.0), (500.0, 1.0))
