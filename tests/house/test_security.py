"""The page on security counts what the tests try: each attack by its name, and those that work."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.house.sources import ROOT

PAGES = (ROOT / "docs" / "security.md", ROOT / "docs" / "zh" / "security.md")
SCORE = re.compile(r"\*\*\D*(\d+)\D+(\d+)\D*\*\*")


def attacks() -> dict[str, bool]:
    """Every attack that is tried, and whether its test says that it works."""
    found = {}
    for path in (ROOT / "tests" / "serve").glob("test_attacks*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = any("xfail" in ast.unparse(each) for each in node.decorator_list)
    return found


@pytest.mark.parametrize("page", PAGES, ids=("english", "chinese"))
def test_the_page_on_security_names_every_attack_and_counts_those_that_work(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| `(test_\w+)` \|$", text, re.MULTILINE)
    tried = attacks()
    assert len(tried) > 40 and sorted(rows) == sorted(tried), set(rows) ^ set(tried)
    score = SCORE.search(text)
    assert score is not None and tuple(map(int, score.groups())) == (len(tried), sum(tried.values()))
