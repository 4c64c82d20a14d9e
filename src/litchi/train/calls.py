"""What the threads of this process are doing: their calls, seen at one moment."""

from __future__ import annotations

import faulthandler
import re
import tempfile
import traceback
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
CALL = re.compile(r'  File "(.*)", line (\d+) in (.*)')


class Call(NamedTuple):
    """Where a function stands."""

    path: str
    number: int
    """Of the line."""
    function: str

    @property
    def source(self) -> str:
        lines = lines_of(self.path)
        return lines[self.number - 1] if 0 < self.number <= len(lines) else ""


Stack = tuple[Call, ...]
"""From the innermost call outwards."""


def stacks() -> dict[int, Stack]:
    """The calls of each thread by its ident.

    faulthandler notes them all while nothing runs. To walk from frame to frame would not do: a thread that runs on
    takes its frames away, and in CPython 3.11 `f_back` then gives whatever lies there.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        said = file.read().decode(errors="replace")
    found: dict[int, Stack] = {}
    ident = 0
    for line in said.splitlines():
        if thread := THREAD.match(line):
            ident = int(thread[1], 16)
            found[ident] = ()
        elif found and (call := CALL.match(line)):
            found[ident] += (Call(call[1], int(call[2]), call[3]),)
    return found


def stack_of(trace: TracebackType | None) -> Stack:
    """The calls that led to an error."""
    calls = [Call(f.f_code.co_filename, number, f.f_code.co_name) for f, number in traceback.walk_tb(trace)]
    return tuple(reversed(calls))


@lru_cache(maxsize=256)
def lines_of(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
