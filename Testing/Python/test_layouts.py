"""Layouts of downloaded data: which cases, which classes, and a way out of every folder that does not fit."""

import json

import pytest

pytest.importorskip("monai")

from training_folders import write_nnunet, write_totalsegmentator, write_word  # noqa: E402

from NMSWSegment.data.layouts import WORD_LABEL_NAMES, read_cases  # noqa: E402
from NMSWSegment.data.totalsegmentator import TOTAL, subset_classes  # noqa: E402
from NMSWSegment.files.labels import GENERIC_TYPE, coded_labels  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402

SUBSET = "liver,spleen,vertebrae_L1,gallbladder"


@pytest.fixture
def a_totalsegmentator(tmp_path):
    return write_totalsegmentator(tmp_path / "ts", splits={"s0001": "train", "s0002": "train", "s0003": "test", "s0004": "val"})


def test_totalsegmentator_split_comes_from_meta_csv(a_totalsegmentator):
    cases = read_cases(f"totalsegmentator:{a_totalsegmentator}", subset=SUBSET)
    assert [files.name for files in cases.files] == ["s0001", "s0002"]
    assert cases.label_names == ("liver", "spleen", "vertebrae_L1", "gallbladder")
    assert [files.name for files in read_cases(f"totalsegmentator:{a_totalsegmentator}", subset=SUBSET, split="test").files] == ["s0003"]
    (a_totalsegmentator / "meta.csv").unlink()
    assert len(read_cases(f"totalsegmentator:{a_totalsegmentator}", subset=SUBSET).files) == 4


def test_totalsegmentator_missing_mask_names_case_and_file(a_totalsegmentator):
    with pytest.raises(UserError, match="Case 's0001' needs 's0001/segmentations/kidney_left.nii.gz'.*Put the file back"):
        read_cases(f"totalsegmentator:{a_totalsegmentator}", subset="liver,kidney_left")


def test_totalsegmentator_meta_csv_with_commas_asks_for_the_original(a_totalsegmentator):
    text = (a_totalsegmentator / "meta.csv").read_text(encoding="utf-8")
    (a_totalsegmentator / "meta.csv").write_text(text.replace(";", ","))
    with pytest.raises(UserError, match="Take the dataset's own meta.csv"):
        read_cases(f"totalsegmentator:{a_totalsegmentator}", subset=SUBSET)


def test_subsets_have_the_published_sizes_and_only_cysts_have_no_code():
    assert [len(subset_classes(name)) for name in ("organ", "vertebrae", "total")] == [24, 26, 117]
    assert subset_classes("organ")[0] == "spleen" and subset_classes("vertebrae")[:3] == ("sacrum", "vertebrae_S1", "vertebrae_L5")
    assert TOTAL[50] == "heart" and TOTAL[116] == "costal_cartilages"  # 51 and 117 of the class map
    assert [label.name for label in coded_labels(TOTAL) if label.type == GENERIC_TYPE] == ["kidney_cyst_left", "kidney_cyst_right"]


def test_subset_misspelled_or_missing_says_what_there_is():
    with pytest.raises(UserError, match="Did you mean 'kidney_left'"):
        subset_classes("liver,kidney_lft")
    with pytest.raises(UserError, match="--subset organ, vertebrae, total"):
        subset_classes("")


def test_word_has_its_16_organs_under_our_names(tmp_path):
    folder = write_word(tmp_path, splits={"word_0001": "Tr", "word_0002": "Tr", "word_0003": "Val"})
    cases = read_cases(f"word:{folder}")
    assert [files.name for files in cases.files] == ["word_0001", "word_0002"] and cases.label_names == WORD_LABEL_NAMES
    assert [files.name for files in read_cases(f"word:{folder}", split="val").files] == ["word_0003"]
    assert cases.files[0].label == folder / "labelsTr" / "word_0001.nii.gz"
    coded = coded_labels(WORD_LABEL_NAMES)
    assert len(coded) == 16 and not [label.name for label in coded if label.type == GENERIC_TYPE]
    assert (coded[2].modifier.meaning, coded[14].type.meaning, coded[14].modifier.meaning) == ("Left", "Head of femur", "Left")


@pytest.mark.parametrize("kind", ["word", "nnunet"])
def test_files_that_macos_lays_beside_others_are_no_cases(tmp_path, kind):
    folder = write_word(tmp_path, splits={"a": "Tr"}) if kind == "word" else write_nnunet(tmp_path, names=("a",))
    for path in list(folder.glob("*/*.nii.gz")):
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert [files.name for files in read_cases(f"{kind}:{folder}").files] == ["a"]


def test_word_missing_label_says_what_to_do(tmp_path):
    folder = write_word(tmp_path, splits={"word_0001": "Tr"})
    (folder / "labelsTr" / "word_0001.nii.gz").unlink()
    with pytest.raises(UserError, match="'labelsTr/word_0001.nii.gz', which is not there. Put the file back"):
        read_cases(f"word:{folder}")


def test_nnunet_missing_label_does_not_drop_its_case(tmp_path):
    folder = write_nnunet(tmp_path, names=("a", "b"))
    (folder / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(UserError, match="'labelsTr/b.nii.gz', which is not there. Put the file back"):
        read_cases(f"nnunet:{folder}")


def test_nnunet_ignore_label_is_unknown(tmp_path):
    cases = read_cases(f"nnunet:{write_nnunet(tmp_path / 'Dataset001_X', names=('b', 'a'), ignore=True)}")
    assert [files.name for files in cases.files] == ["a", "b"] and cases.label_names == ("liver", "spleen") and cases.unknown_value == 3
    assert cases.files[0].image.name == "a_0000.nii.gz"


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, "has 2 channels.*Make a dataset of one of them alone"),
        ({"file_ending": None}, "no file_ending.*or use decathlon:"),
        ({"labels": {"background": 0, "both": [1, 2], "spleen": 2}}, "no usable labels"),
    ],
)
def test_nnunet_dataset_that_does_not_fit_says_what_to_do(tmp_path, change, fix):
    folder = write_nnunet(tmp_path, names=("a",))
    values = json.loads((folder / "dataset.json").read_text(encoding="utf-8")) | change
    (folder / "dataset.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(UserError, match=fix):
        read_cases(f"nnunet:{folder}")


@pytest.mark.parametrize("kind", ["word", "totalsegmentator", "nnunet"])
def test_empty_dataset_says_which_kinds_there_are(tmp_path, kind):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}))
    with pytest.raises(UserError, match=f"holds no case of the split 'train' in the layout '{kind}'.*decathlon, nnunet, word, totalsegmentator"):
        read_cases(f"{kind}:{tmp_path}", subset="liver" if kind == "totalsegmentator" else "")


def test_folder_or_kind_that_does_not_exist_says_so(tmp_path):
    with pytest.raises(UserError, match="There is no folder.*Check the path after 'word:'"):
        read_cases(f"word:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="or another kind: decathlon, nnunet, word, totalsegmentator"):
        read_cases("amos:somewhere")
    with pytest.raises(UserError, match="Leave it out"):
        read_cases(f"word:{tmp_path}", subset="organ")
