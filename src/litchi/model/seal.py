"""What a checkpoint says of itself, and whether its files are those that were saved, by the SHA-256 of each.

Nothing here needs torch, so that a check can run while torch is still being imported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from litchi.config import BadInput

log = logging.getLogger("litchi.start")
"""Told, at the level of debugging, how far a load is: who waits for a worker's start listens."""

FORMAT = 1
HASHED = 1 << 26
"""Bytes that are hashed at a time."""


class Check:
    """`check_files` of a folder, in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.unwanted = threading.Event()
        self.thread = threading.Thread(target=self.work, name="litchi-check")
        self.thread.start()

    def result(self) -> None:
        """Waits. Raises BadInput, naming the file, for one that is missing or has changed."""
        self.thread.join()
        if self.error is not None:
            raise self.error

    def leave(self) -> None:
        """Nobody will ask for the result any more."""
        self.unwanted.set()

    def work(self) -> None:
        try:
            check_files(self.folder, read_meta(self.folder), self.unwanted)
        except Exception as error:
            self.error = error


def read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    if not path.is_file():
        raise BadInput(f"{folder} is no checkpoint: it has no meta.json; name a folder that `litchi train` wrote")
    try:
        meta = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not JSON ({error}): copy the checkpoint again") from error
    if not isinstance(meta, dict):
        raise BadInput(f"{path} is no JSON object: copy the checkpoint again")
    if meta.get("format") != FORMAT:
        raise BadInput(f"{path}: format {meta.get('format')!r}, this version reads {FORMAT}: update litchi")
    if meta.pop("sha256", None) not in (None, seal(meta)):  # older checkpoints have no seal
        raise BadInput(f"{path} has changed since it was saved (SHA-256 differs): copy the checkpoint again")
    return meta


def check_files(folder: Path, meta: dict, unwanted: threading.Event | None = None) -> None:
    """Raises BadInput. Ends early, and knows nothing, once it is `unwanted`."""
    for name, expected in meta["files"].items():
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{folder}: {name} is missing: copy the checkpoint again")
        found = digest(path, unwanted)
        if unwanted is not None and unwanted.is_set():
            return
        if found != expected:
            raise BadInput(f"{path} has changed since it was saved (SHA-256 differs): copy the checkpoint again")


def digest(path: Path, unwanted: threading.Event | None = None) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # Mapped and in large pieces: to read smaller ones would ask for the interpreter's lock at each.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else memoryview(b"") as data:
            for at in range(0, size, HASHED):
                if unwanted is not None and unwanted.is_set():
                    break
                with memoryview(data)[at : at + HASHED] as piece:
                    found.update(piece)
                log.debug("checked %s up to byte %d", path.name, min(at + HASHED, size))
    return found.hexdigest()


def seal(meta: Mapping[str, object]) -> str:
    """The SHA-256 of what meta.json says, whatever its spaces: it cannot hold that of its own bytes."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
