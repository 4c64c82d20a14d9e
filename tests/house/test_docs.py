"""What is written holds: links lead somewhere, the tour runs, and the two languages say the same."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from litchi.config import from_json
from litchi.eval.board import COLUMNS, Board, markdown
from tests.house.sources import ROOT, place, tracked

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/)?((?:litchi|make) .*?)(?:  .*)?$", re.MULTILINE)
INLINE = re.compile(r"`((?:litchi|make) [^`]+)`")
BOARD = re.compile(r"<!-- board -->\n(.*?)<!-- /board -->", re.DOTALL)

READMES = (ROOT / "README.md", ROOT / "README.zh.md")
TOUR = sorted((ROOT / "docs" / "tour").glob("*.py"))
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
CHINESE = ROOT / "docs" / "zh"
MAX_LINES = 60


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# ---- links --------------------------------------------------------------------------------------------------------


def test_links_lead_somewhere():
    pages = [page for page in tracked() if page.suffix == ".md"]
    broken = [
        f"{place(page)} -> {link}" for page in pages for link in LINK.findall(text(page)) if not leads(page, link)
    ]
    assert not broken, f"broken links: {broken}"


def leads(page: Path, link: str) -> bool:
    """Whether the file is there, and in a page of ours the heading that is named after #."""
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return target.exists() and (not anchor or target.suffix != ".md" or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them: lower case, words joined by hyphens."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# ---- tour ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", TOUR, ids=lambda path: path.stem)
def test_the_tour_runs(script: Path, capsys):
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_a_stop_of_the_tour_is_short():
    assert TOUR
    long = {place(script): n for script in TOUR if (n := len(text(script).splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


# ---- two languages ------------------------------------------------------------------------------------------------


def test_both_readmes_have_the_same_sections_and_commands():
    english, chinese = map(text, READMES)
    assert len(re.findall(r"^## ", english, re.MULTILINE)) == len(re.findall(r"^## ", chinese, re.MULTILINE))
    assert commands(english) == commands(chinese)


def commands(page: str) -> list[str]:
    """Every command that a page shows, in order: those in blocks, then those in sentences."""
    blocks = "\n".join(FENCE.findall(page))
    return COMMAND.findall(blocks) + INLINE.findall(FENCE.sub("", page))


def test_the_readme_names_every_verb():
    command = [sys.executable, "-m", "litchi.cli", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "200"}).stdout
    verbs = set(re.findall(r"^    (\w+) ", shown, re.MULTILINE))
    named = {line.split()[1] for line in commands(text(READMES[0])) if line.startswith("litchi ")} - {"VERB"}
    assert verbs == named, "the table of verbs in README.md and README.zh.md and `litchi --help` differ"


def test_every_decision_is_in_both_indexes():
    for index in (ROOT / "docs" / "decisions" / "README.md", CHINESE / "decisions.md"):
        linked = {Path(link).name for link in LINK.findall(text(index))}
        missing = {page.name for page in DECISIONS} - linked
        assert not missing, f"{place(index)} lacks {missing}"


def test_the_chinese_life_of_a_token_has_every_step():
    english, chinese = text(ROOT / "docs" / "life_of_a_token.md"), text(CHINESE / "life_of_a_token.md")
    files = [sorted(set(re.findall(r"`(\w+/[\w.]*)`", page))) for page in (english, chinese)]
    assert files[0] == files[1]
    assert [len(re.findall(r"^\d\. ", page, re.MULTILINE)) for page in (english, chinese)] == [9, 9]


# ---- figures ------------------------------------------------------------------------------------------------------


def test_the_readmes_show_the_shipped_board():
    path = ROOT / "checkpoints" / "tiny" / "board.json"
    for readme in READMES:
        (shown,) = BOARD.findall(text(readme))
        assert shown.startswith("| " + " | ".join(COLUMNS) + " |")
        if path.exists():
            expected = markdown(from_json(Board, text(path)))
            assert shown.strip() == expected.strip(), (
                f"put what `litchi board checkpoints/tiny --markdown` prints between the board marks of {readme.name}"
            )
