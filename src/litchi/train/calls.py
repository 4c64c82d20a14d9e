"""What the threads of this process are doing: their calls, seen at one moment."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate, chain, repeat, starmap
from operator import attrgetter, itemgetter
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple


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
    """The calls of each thread by its ident, each as it stood at one moment."""
    found = {}
    for ident in sys._current_frames():
        seen = walk(ident, attrgetter("f_code", "f_lineno"))
        found[ident] = tuple(Call(code.co_filename, number, code.co_name) for code, number in seen)
    return found


def walk(ident: int, read: Callable[[FrameType], Any]) -> list[Any]:
    """What `read`, which must be a function of C, finds in each frame of a thread, the innermost first.

    It is all done within one call of C, so that no thread runs in between. One that ran on would take its frames away,
    and in CPython 3.11 `f_back` then gives whatever lies there. faulthandler notes stacks at one moment too, but walks
    the list of threads without its lock, and dies of a thread of torch's that is being entered there: a null pointer.
    """
    inner = map(itemgetter(ident), starmap(sys._current_frames, [()]))
    outwards: Iterator[Any] = accumulate(chain(inner, repeat("f_back")), getattr)  # frame, frame.f_back, ..., None
    found: list[Any] = []
    collects = gc.isenabled()
    gc.disable()  # a collection may run Python, and another thread with it
    try:
        with suppress(AttributeError, KeyError):  # None has no callers; the thread has ended
            found.extend(map(read, outwards))
    finally:
        if collects:
            gc.enable()
    return found


def shown(threads: Mapping[int, Stack]) -> str:
    """The stacks of threads as Python shows them."""
    lines = []
    for ident, stack in threads.items():
        lines += ["", f"Thread 0x{ident:016x} (most recent call first):"]
        lines += [f'  File "{call.path}", line {call.number} in {call.function}' for call in stack]
    return "\n".join([*lines[1:], ""])


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
