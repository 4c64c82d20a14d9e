"""A receipt holds what one response was made of and digests of what it said, so that it can be made again to the bit.

The newest are kept in memory, and with a path also in a file to which they are appended: what a restart reads back. The
file is put aside when it is full, in place of the one that was put aside before.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from litchi.config import BadInput, parse, plain
from litchi.record import append, drop_torn_line, parse_row
from litchi.schema.digest import digest, with_arrays, without_arrays
from litchi.schema.request import Request

log = logging.getLogger("litchi.serve")

MAX_RECEIPTS, MAX_BYTES = 1024, 64 << 20
"""Receipts kept, and what they hold together as JSON: pictures are the most of it. The files have twice these bytes."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Who answered: bits may only be compared where all of it is the same."""

    weights: str
    """What tells a checkpoint from others."""
    runner: str
    """What tells the arithmetic of the layers."""
    torch: str
    """The version that computes what is before and behind them."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Digests of what may change the weights, by the names that requests say."""

    def of(self, requests: Sequence[Request]) -> Origin:
        """With no adapters but those that some requests name."""
        named = {request.adapter for request in requests}
        return replace(self, adapters={name: at for name, at in self.adapters.items() if name in named})

    def differs(self, other: Origin) -> list[str]:
        """What is not the same, in words; the other may have further adapters."""
        pairs = [("weights", self.weights, other.weights), ("runner", self.runner, other.runner)]
        pairs += [("torch", self.torch, other.torch)]
        pairs += [(f"adapter {n[:40]}", at, other.adapters.get(n, "there")) for n, at in self.adapters.items()]
        return [f"{name} {mine[:40]}, not {theirs[:40]}" for name, mine, theirs in pairs if mine != theirs]


class OtherOrigin(BadInput):
    """A receipt of other weights or of another arithmetic: HTTP 409."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one response was made of."""

    id: str
    """That of the response."""
    created: int
    """Seconds since 1970."""
    model: str
    origin: Origin
    requests: tuple[Request, ...]
    """One for each answer of the response."""
    answers: tuple[dict[str, str], ...]
    """For each, the digest of each field of its completion."""

    def differs(self, answers: tuple[dict[str, str], ...]) -> list[dict[str, Any]]:
        """Which fields of which answers are not the same; nothing if every bit is."""
        found = []
        for index, (mine, other) in enumerate(zip(self.answers, answers, strict=True)):
            names = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
            found += [{"index": index, "fields": names}] if names else []
        return found


def written(receipt: Receipt) -> str:
    """A receipt as one line of JSON in ASCII."""
    pictures: dict[str, str] = {}
    row = without_arrays(plain(receipt, Receipt), pictures)
    row |= {"digests": [digest(request) for request in receipt.requests], "pictures": pictures}
    return json.dumps(row, separators=(",", ":"))


def receipt_of(text: str) -> Receipt:
    """The receipt that `written` wrote. Raises BadInput if it is not what it was."""
    row = json.loads(text)
    name = str(row.get("id"))[:80]
    try:
        digests, pictures = row.pop("digests"), row.pop("pictures")
        receipt = parse(Receipt, with_arrays(row, pictures), "receipt")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise BadInput(f"the receipt {name!r} cannot be read ({error}): delete its line") from None
    whole = len(receipt.answers) == len(receipt.requests)
    if not whole or [digest(request) for request in receipt.requests] != digests:
        raise BadInput(f"the receipt {name!r} has changed since it was written (SHA-256 differs): delete its line")
    return receipt


def shown(text: str) -> dict[str, Any]:
    """A receipt as JSON data without the bytes of its pictures, which it names by their digests."""
    row = json.loads(text)
    row.pop("pictures", None)
    return {"object": "receipt", **row}


class Receipts:
    """The newest receipts. Any thread may call."""

    def __init__(self, path: str = "", most: int = MAX_RECEIPTS, most_bytes: int = MAX_BYTES) -> None:
        """Reads what an earlier server left at `path`. Raises BadInput if nothing can be written there."""
        self.most, self.most_bytes = most, most_bytes
        self.kept: OrderedDict[str, str] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()
        self.path = Path(path) if path else None
        if self.path is not None:
            try:
                self.path.touch(mode=0o600)  # people's questions stand in it
                for row, line in lines(older(self.path), self.path):
                    self.remember(row, line)
            except OSError as error:
                mend = "give a file in a folder that exists"
                raise BadInput(f"serve.receipts={path} cannot be written ({error.strerror}): {mend}") from None

    def keep(self, receipt: Receipt) -> None:
        """Keep a receipt; one that would push out many others is not kept."""
        line = written(receipt)
        if len(line) > self.most_bytes // 4:
            log.warning("the receipt of %s has %d bytes and is not kept", receipt.id, len(line))
            return
        with self.lock:
            self.remember({"id": receipt.id}, line)
            self.write(line)

    def get(self, name: str) -> str | None:
        """A receipt as it was written, None if it is not here or no longer."""
        with self.lock:
            return self.kept.get(name)

    def drop(self, name: str) -> None:
        """Forget a receipt, also after a restart; its bytes leave the file when that is put aside and replaced."""
        with self.lock:
            if name in self.kept:
                row = {"id": name, "dropped": True}
                self.remember(row, "")
                self.write(json.dumps(row))

    def remember(self, row: dict[str, Any], line: str) -> None:
        name = str(row["id"])
        self.bytes -= len(self.kept.pop(name, ""))
        if row.get("dropped"):
            return
        self.kept[name] = line
        self.bytes += len(line)
        while len(self.kept) > self.most or self.bytes > self.most_bytes:
            _, oldest = self.kept.popitem(last=False)
            self.bytes -= len(oldest)

    def write(self, line: str) -> None:
        """Append to the file. A full disk costs the receipt after the next restart, never the answer."""
        if self.path is None:
            return
        try:
            if self.path.exists() and self.path.stat().st_size + len(line) >= self.most_bytes:
                os.replace(self.path, older(self.path))
            self.path.touch(mode=0o600)
            append(self.path, line.encode() + b"\n")
        except OSError:
            log.exception("a receipt could not be written to %s", self.path)


def older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def lines(*paths: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every row of files of receipts, in order, and its text. Raises BadInput for a line that is none."""
    for path in paths:
        if not path.exists():
            continue
        drop_torn_line(path)
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            where = f"{path}:{number}"
            row = parse_row(line, where)
            if not isinstance(row.get("id"), str):
                raise BadInput(f"{where} is no receipt: delete the line")
            yield row, line.decode()
