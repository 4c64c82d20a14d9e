"""The tables of docs/families.md: a test that has measured a row writes it there, if LITCHI_WRITE_DOCS asks for it."""

from __future__ import annotations

import os
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


def record(table: str, name: str, *cells: str) -> None:
    """The row `name` of the table whose first heading is `table`, in its place or at the end."""
    if not os.environ.get("LITCHI_WRITE_DOCS"):
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    start = text.index(f"| {table} |")
    stop = text.find("\n\n", start)
    body, rest = (text[start:stop], text[stop:]) if stop >= 0 else (text[start:].rstrip("\n"), "\n")
    lines = body.split("\n")
    at = next((i for i, line in enumerate(lines) if line.startswith(f"| {name} |")), len(lines))
    lines[at : at + 1] = [f"| {' | '.join((name, *cells))} |"]
    DOCUMENT.write_text(text[:start] + "\n".join(lines) + rest, encoding="utf-8")


def digit(gap: float) -> str:
    """A difference with one digit."""
    return f"{gap:.0e}" if gap else "0"
