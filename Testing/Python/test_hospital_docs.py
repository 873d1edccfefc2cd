"""docs/hospital.md names columns, options and files that exist."""

import re
from pathlib import Path

import pytest

from NMSWSegment.cohort.quality import norm_sources
from NMSWSegment.command_line import _parser
from NMSWSegment.files.statistics import STATISTICS_COLUMNS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "hospital.md").read_text(encoding="utf-8")


def test_every_column_of_the_statistics_is_explained():
    named = set(re.findall(r"`(\w+|\w+_\*_mm)`", TEXT))
    for column in STATISTICS_COLUMNS[2:]:
        assert column in named or re.sub(r"_[ras]_mm$", "_*_mm", column) in named, column


@pytest.mark.parametrize("line", [line for line in TEXT.splitlines() if line.startswith("nmsw ")])
def test_every_command_of_the_page_is_understood(line):
    words = line.split("#")[0].split()[1:]
    _parser(words).parse_args(words)


def test_every_source_of_the_norms_is_named():
    for source in norm_sources():
        assert source in TEXT or source == "Abdom Radiol 2019" and "Abdominal Radiology 2019" in TEXT
