"""README, tutorial and the pages of docs/: every nmsw command can be parsed, every make target and every linked file is there.

docs/training.md is run for real by test_training_docs.py.
"""

import re
import shlex
from pathlib import Path

import pytest

from NMSWSegment.command_line import _parser

ROOT = Path(__file__).resolve().parents[2]
DIAGRAMS = "docs/architecture.md"
"""Its blocks are drawings, not commands."""
PAGES = ("README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")))
NEED_TRAINING_LIBRARIES = ("train", "export", "evaluate", "compare", "prepare")
PLACEHOLDER = re.compile(r"\.\.\.|\[")
"""What marks a line that only shows the form of a command."""


def code_lines(page: str) -> list[str]:
    """The lines of the code blocks without a language, those that a reader types."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for language, block in blocks if not language for line in block.replace("\\\n", " ").splitlines()]


def nmsw_commands() -> list[tuple[str, str]]:
    """Page and command of every line that starts nmsw."""
    found = []
    for page in PAGES:
        for line in code_lines(page) if page != DIAGRAMS else ():
            line = re.sub(r"^\S*[\\/]nmsw ", "nmsw ", line)
            if line.startswith("nmsw ") and not PLACEHOLDER.search(line):
                found.append((page, line))
    return found


@pytest.mark.parametrize(("page", "line"), nmsw_commands(), ids=lambda value: value[:60])
def test_command_of_the_documentation_is_parsed(page, line):
    argv = shlex.split(line.replace("\\", "/"), comments=True)[1:]
    if argv[0] in NEED_TRAINING_LIBRARIES:
        pytest.importorskip("monai")
    assert callable(_parser(argv).parse_args(argv).run)


def test_documentation_holds_commands():
    assert len({page for page, _ in nmsw_commands()}) >= 3 and len(nmsw_commands()) > 20


def test_make_targets_of_the_documentation_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {line.split()[1] for page in PAGES for line in code_lines(page) if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in links if link and not ((ROOT / page).parent / link).exists()]
    assert not missing
