"""A worker's process can be started before it is known what it serves, and imports torch beside the door.

What is foreseen here decides nothing: a process that does not fit what is then asked for is ended, as is one that
nobody takes. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(eq=False, slots=True)
class Spawned:
    """A process that waits to be told what it serves, at the other end of a socket."""

    process: subprocess.Popen
    end: socket.socket
    threads: int


class Early:
    """Processes that were started before anybody asked for them."""

    def __init__(self, count: int, threads: int) -> None:
        self.threads = threads
        self.waiting: list[Spawned] = []
        with suppress(OSError):  # who asks for them then hears why
            for _ in range(count):
                self.waiting.append(spawn(threads))

    def take(self, threads: int) -> Spawned | None:
        """One that has so many threads, if any is left."""
        with suppress(IndexError):
            return self.waiting.pop() if threads == self.threads else None
        return None

    def leave(self) -> None:
        """Nobody will take one any more."""
        while (spawned := self.take(self.threads)) is not None:
            spawned.end.close()
            end(spawned.process)
            spawned.process.wait()


@contextmanager
def early(folder: Path, settings: Sequence[str]) -> Iterator[Early]:
    """As many as a checkpoint and the command line seem to ask for, at most one a core; the rest is started later."""
    workers, tensor = foreseen(folder, settings)
    found = Early(min(workers, os.cpu_count() or 1), threads_of(workers, tensor))
    try:
        yield found
    finally:
        found.leave()


def foreseen(folder: Path, settings: Sequence[str]) -> tuple[int, int]:
    """What `serve.workers` and `serve.tensor` will be, if they are spelled as everybody does; else 0 workers."""
    asked = {"workers": 0, "tensor": 1}
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads((folder / "run.json").read_text(encoding="utf-8"))["serve"]
        asked |= {name: int(told[name]) for name in asked if name in told}
    for setting in settings:
        path, _, text = setting.partition("=")
        name = path.removeprefix("serve.")
        if path == f"serve.{name}" and name in asked:
            asked[name] = int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else 0
    workers, tensor = asked["workers"], asked["tensor"]
    return (max(workers, int(tensor > 1)), tensor) if workers >= 0 and tensor > 0 else (0, 1)


def threads_of(workers: int, tensor: int) -> int:
    """Of each process, so that all of them have the cores between them."""
    return max(1, (os.cpu_count() or 1) // max(1, workers * tensor))


def spawn(threads: int) -> Spawned:
    """Raises OSError where no process can be had."""
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "litchi.serve.member", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # an interrupt at the keyboard is the door's to hear
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return Spawned(process, ours, threads)


def end(process: subprocess.Popen) -> None:
    """At once, with the ranks that it has started: one that hangs does not hear that the others are gone."""
    if process.returncode is None:  # nobody has waited for it, so that its number is still its own
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
