"""The record of an evaluation: what was asked as items, and a file of rows that survives a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from litchi.config import BadInput
from litchi.eval.item import Item, Json, Row
from litchi.record import append, drop_torn_line
from litchi.schema.digest import digest, picture_text
from litchi.schema.request import Completion, Request
from litchi.schema.sample import Image, Part, Sample, Text


def question(
    sample: Sample,
    request: Request,
    truth: Json,
    read: Callable[[Completion], Json],
    *,
    name: str = "",
    part: str = "",
    kind: str = "",
) -> Item:
    """The item that is one request; `read` takes from the completion what is stored.

    `name` tells the items of a sample apart.
    """
    key = f"{sample.key}/{name}" if name else sample.key
    return Item(key, sample.key, digest(request), truth, lambda sampler: read(sampler.complete(request)), part, kind)


def shown(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Parts as they are read: loss weights are no part of a question."""
    return tuple(replace(part, weight=0.0) for part in parts)


def said(completion: Completion) -> str:
    """The text of an answer; text parts count where a sampler gives nothing else."""
    return completion.text or "".join(part.text for part in completion.parts if isinstance(part, Text))


def drawn(completion: Completion) -> str | None:
    """The first picture of an answer as text, None if it has none."""
    found = next((part for part in completion.parts if isinstance(part, Image)), None)
    return None if found is None else picture_text(found.pixels)


class Rows:
    """The rows of one task in one JSONL file. A row is written whole or, torn by a kill, dropped and asked again."""

    def __init__(self, path: Path) -> None:
        drop_torn_line(path)
        self.path = path
        self.rows = {row.key: row for row in read_rows(path)}

    def find(self, item: Item) -> Row | None:
        """The row of an item that was already answered. Raises BadInput if the same key then asked something else."""
        row = self.rows.get(item.key)
        if row is not None and row.request != item.digest:
            raise BadInput(f"{self.path}: {item.key} was asked otherwise before; evaluate into an empty folder")
        return row

    def add(self, row: Row) -> None:
        append(self.path, (json.dumps(asdict(row), ensure_ascii=False) + "\n").encode())
        self.rows[row.key] = row


def read_rows(path: Path) -> list[Row]:
    """The rows of a file in order; none if it is not there.

    Raises BadInput for a line that is no row, or for a key that stands twice.
    """
    if not path.exists():
        return []
    rows: dict[str, Row] = {}
    for number, line in enumerate(filter(None, path.read_text(encoding="utf-8").split("\n")), 1):
        try:
            row = Row(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise BadInput(f"{path}:{number}: not a row of an evaluation: {error}") from error
        if row.key in rows:
            raise BadInput(f"{path}:{number}: {row.key} stands here twice")
        rows[row.key] = row
    return list(rows.values())


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
