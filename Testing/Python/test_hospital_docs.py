"""docs/hospital.md explains every column of the statistics and names every source of the norms."""

import re
from pathlib import Path

from NMSWSegment.cohort.quality import norm_sources
from NMSWSegment.files.statistics import STATISTICS_COLUMNS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "hospital.md").read_text(encoding="utf-8")


def test_every_column_of_the_statistics_is_explained():
    named = set(re.findall(r"`(\w+|\w+_\*_mm)`", TEXT))
    for column in STATISTICS_COLUMNS[2:]:
        assert column in named or re.sub(r"_[ras]_mm$", "_*_mm", column) in named, column


def test_every_source_of_the_norms_is_named():
    for source in norm_sources():
        assert source in TEXT or source == "Abdom Radiol 2019" and "Abdominal Radiology 2019" in TEXT
