"""Every link from one file of the project to another leads somewhere."""

from __future__ import annotations

import re

from tests.house.sources import place, tracked

LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


def test_links_lead_somewhere():
    broken = [
        f"{place(page)} -> {target}"
        for page in tracked()
        if page.suffix == ".md"
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken, f"broken links: {broken}"
