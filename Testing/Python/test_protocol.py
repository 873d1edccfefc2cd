"""Options and messages that cross a process boundary."""

import json

import pytest

from NMSWSegment.protocol import Progress, SegmentOptions, UserError, ignore_progress, unknown_name


@pytest.mark.parametrize(
    "options",
    [
        SegmentOptions(),
        SegmentOptions(bundle="b", num_patches=None, policy="top_k", device="cuda:1", structures=("spleen", "liver"), threads=3),
        SegmentOptions(num_patches=0, policy="random"),
    ],
)
def test_options_come_back_from_json_unchanged(options):
    assert SegmentOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_options_from_an_empty_object_are_the_defaults():
    assert SegmentOptions.from_dict({}) == SegmentOptions()


def test_options_do_not_change_the_dict_they_come_from():
    values = {"structures": ["liver"]}
    SegmentOptions.from_dict(values)
    assert values == {"structures": ["liver"]}


def test_options_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="Unknown key in segment options 'num_patchs'. Did you mean 'num_patches'"):
        SegmentOptions.from_dict({"num_patchs": 3})


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        ({"num_patches": -1}, "Use 0 for the coarse net alone"),
        ({"threads": 0}, "Use 1 or more"),
        ({"policy": "gredy"}, "Did you mean 'greedy'"),
    ],
)
def test_options_impossible_value_says_what_to_use(values, fix):
    with pytest.raises(UserError, match=fix):
        SegmentOptions.from_dict(values)


def test_unknown_name_far_from_all_still_lists_them():
    assert unknown_name("structure", "xyz", ["liver", "spleen"]) == "Unknown structure 'xyz'. Choose from: liver, spleen."


def test_unknown_name_without_any_choice_says_so():
    assert unknown_name("bundle", "x", []) == "Unknown bundle 'x'. There is no bundle to choose from."


def test_ignore_progress_takes_a_progress():
    assert ignore_progress(Progress("read", 0.0, "Reading")) is None
