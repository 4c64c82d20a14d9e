"""What happened is written down here: rows in metrics.jsonl, a bar of progress, a table; it never decides anything."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from litchi.config import BadInput

METRICS = "metrics.jsonl"


# ---- rows ---------------------------------------------------------------------------------------------------------


class Recorder:
    """Appends rows to `folder`/metrics.jsonl, one JSON object a line.

    A line counts from its newline on, so that a kill between any two instructions loses at most the row being written.
    With `tensorboard` the numbers also go to `folder`/tensorboard; raises BadInput if it is not installed. A `silent`
    one writes nothing: of many ranks one speaks.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, silent: bool = False) -> None:
        self.folder, self.path, self.silent = folder, folder / METRICS, silent
        folder.mkdir(parents=True, exist_ok=True)
        self._board = need("board", "torch.utils.tensorboard") if tensorboard else None
        self._writer: Any = None
        if not silent:
            drop_torn_line(self.path)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append a row of JSON values; numbers of other libraries become floats."""
        if self.silent:
            return
        line = json.dumps({"step": step, **row}, default=float) + "\n"
        append(self.path, line.encode())
        if self._board is not None:
            self._draw(step, row)

    def rewind(self, step: int) -> None:
        """Drop the rows of `step` and later: a run that goes on from there writes them again."""
        if self.silent:
            return
        kept = [row for row in read(self.path) if row["step"] < step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._writer = self._open_writer(step) if self._board is not None else None

    def _draw(self, step: int, row: Mapping[str, Any]) -> None:
        self._writer = self._writer or self._open_writer(None)
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _open_writer(self, purge_step: int | None) -> Any:
        if self._writer is not None:
            self._writer.close()
        assert self._board is not None
        return self._board.SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file, or of the one in a folder; none if there is no file yet.

    A torn last line is left out. Raises BadInput for any other line that is no JSON object.
    """
    path = path / METRICS if path.is_dir() else path
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    return [parse_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where} is not JSON ({error}): delete the line") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where} is no JSON object: delete the line")
    return row


def append(path: Path, data: bytes) -> None:
    """One write to the end of a file; the kernel keeps it when the process is killed right after."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        while data:
            data = data[os.write(handle, data) :]
    finally:
        os.close(handle)


def drop_torn_line(path: Path) -> None:
    """Cut what stands after the last newline, so that the next row begins a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def replace_text(path: Path, text: str) -> None:
    """Write beside `path` and rename into place: a kill leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}.writing")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


# ---- for the eye --------------------------------------------------------------------------------------------------


class Progress:
    """How far a loop is, how fast it goes and how long it will take, on stderr.

    On a terminal a bar; in a log file one plain line every `every` seconds, and one at the end. `done` is what an
    earlier process did: it counts as done, but not as fast. `total` is None where nobody knows it. A `silent` one says
    nothing.
    """

    def __init__(
        self, total: int | None, title: str, *, done: int = 0, every: float = 15.0, silent: bool = False
    ) -> None:
        self.total, self.title, self.done, self.every = total, title, done, every
        self._first, self._note = done, ""
        self._began = self._said = time.monotonic()
        self._stream: TextIO = sys.stderr
        self._silent = silent
        self._bar = open_bar(total, title, done) if self._stream.isatty() and not silent else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        self.done, self._note = self.done + count, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif (now := time.monotonic()) - self._said >= self.every:
            self._said = now
            self._say()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.done > self._first:
            self._say()

    def _say(self) -> None:
        if self._silent:
            return
        seconds = time.monotonic() - self._began
        print(progress_line(self, self.done - self._first, seconds, self._note), file=self._stream, flush=True)


def progress_line(progress: Progress, count: int, seconds: float, note: str) -> str:
    """ "train 120/400 (30%) 2.5/s, 1m52s left; text 0.123", where `count` was done in `seconds`."""
    done, total, rate = progress.done, progress.total, count / max(seconds, 1e-9)
    share = f"{done}/{total} ({done / max(total, 1):.0%})" if total is not None else str(done)
    left = f", {clock((total - done) / rate)} left" if total is not None and total > done and rate else ""
    return f"{progress.title} {share} {pace(rate)}{left}" + (f"; {note}" if note else "")


def pace(rate: float) -> str:
    return f"{rate:.3g}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.3g}s each"


def clock(seconds: float) -> str:
    """ "45s", "1m52s" or "3h07m"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, part = divmod(minutes, 60)
    return f"{hours}h{part:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def open_bar(total: int | None, title: str, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=title, initial=done, dynamic_ncols=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print an aligned table to stdout; a column of numbers is aligned right. In a file no cell is cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], (int, float)) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        drawn.add_row(*(cell(value) for value in row))
    wide = None if sys.stdout.isatty() else 10_000
    Console(width=wide, markup=False, emoji=False, highlight=False).print(drawn)


def cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- extras -------------------------------------------------------------------------------------------------------


def need(extra: str, module: str) -> ModuleType:
    """Import a module of an optional extra. Raises BadInput with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(extra, module) from error


def require(extra: str, *modules: str) -> None:
    """Raises what `need` raises, but imports nothing."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise missing(extra, module)


def missing(extra: str, module: str) -> BadInput:
    return BadInput(f"{module} needs the extra {extra!r}: pip install 'litchi[{extra}]'")
