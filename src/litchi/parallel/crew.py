"""Processes on this machine as the ranks of a small world: what certifies layouts and tests them.

They are started once and asked many times, because an import of torch takes seconds.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class Crew:
    """Up to `size` ranks, which stay until `dismiss`. A call that fails on one rank ends them all; the next call starts
    others."""

    def __init__(self, size: int, threads: int = 1) -> None:
        self.size, self.threads = size, threads
        self.members: list[tuple[Any, Connection]] = []
        self.store: dist.TCPStore | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()

    def run(self, function: Callable[..., Any], *args: Any, size: int = 0, timeout: float = 300.0) -> list[Any]:
        """What `function(*args)` gives on each of `size` ranks (0 is all), in the order of ranks.

        `function` is importable by name and forms its world by `mesh.join`. Raises RuntimeError with the traceback of
        the first rank that fails, and if nothing comes back within `timeout` seconds.
        """
        self.muster()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        asked = [connection for _, connection in self.members[: size or self.size]]
        for rank, connection in enumerate(asked):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(asked), "MASTER_PORT": self.store.port}
            connection.send((function, args, {key: str(value) for key, value in place.items()}))
        return self.collect(asked, timeout)

    def collect(self, asked: Sequence[Connection], timeout: float) -> list[Any]:
        answers: dict[Connection, Any] = {}
        while len(answers) < len(asked):
            ready = wait([c for c in asked if c not in answers], timeout)
            if not ready:
                self.dismiss()
                missing = [rank for rank, c in enumerate(asked) if c not in answers]
                raise RuntimeError(f"ranks {missing} said nothing for {timeout:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = list(asked).index(connection)
                try:
                    failure, answer = connection.recv()
                except EOFError:
                    failure, answer = "its process ended", None
                if failure:
                    self.dismiss()
                    raise RuntimeError(f"rank {rank} of {len(asked)} failed:\n{failure}")
                answers[connection] = answer
        return [answers[connection] for connection in asked]

    def muster(self) -> None:
        """Start those that are missing; they import torch beside each other."""
        context = multiprocessing.get_context("spawn")
        while len(self.members) < self.size:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, self.threads), daemon=True)
            process.start()
            theirs.close()
            self.members.append((process, ours))

    def dismiss(self) -> None:
        for process, connection in self.members:
            connection.close()
            process.kill()
            process.join()
        self.members = []


def serve(connection: Connection, threads: int) -> None:
    """The life of one rank: run what it is told, answer, and wait for more."""
    warnings.filterwarnings("ignore", message=".*torch.*")
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(threads)
    runs = 0
    while True:
        try:
            function, args, place = connection.recv()
        except EOFError:
            return
        os.environ.update(place)
        try:
            answer, failure = function(*args), ""
        except BaseException:  # whatever it was, whoever asked must hear of it
            answer, failure = None, traceback.format_exc()
        if dist.is_initialized() and not failure:  # others would fail by lost groups, and be heard first
            dist.barrier()
            dist.destroy_process_group()
        connection.send((failure, answer))
        answer, runs = None, runs + 1
        if runs % 8 == 0:
            gc.collect()  # else networks in cycles keep their groups, and their threads, which never sleep for long
