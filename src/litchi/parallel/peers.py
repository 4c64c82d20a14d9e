"""All ranks tell each other short texts, over connections that training does not use, so that neither delays the other.

It is how many processes do one thing: each does its share, all hear of a fault, and none goes on after one.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from litchi.config import BadInput
from litchi.parallel.mesh import World

MENDS = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space, your quota is used up",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.ENOENT: "name a folder on a disk that all ranks share",
    errno.EACCES: "name a folder that you may write to",
    errno.EROFS: "name a folder that you may write to",
}

MAX_LINE = 600
"""Characters of a message."""


class Failed(Exception):
    """What all ranks did together came to nothing; the message is one line and the same on each that is left."""


class Peers:
    """Every rank makes one at the same time; what it offers is called by all ranks in the same order.

    `seconds` is how long a rank may let the others wait before they give it up. Raises Failed if one ends meanwhile.
    """

    def __init__(self, world: World, seconds: float = 1800.0) -> None:
        self.rank, self.size = world.rank, world.size
        self.group: ProcessGroup | None = None
        if world.size > 1:
            try:
                group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
            except RuntimeError as error:  # a rank that connected and ended before this one was done
                raise silent(error) from error
            assert isinstance(group, ProcessGroup)
            self.group = group

    def together(self, share: Callable[[], Any]) -> list[Any]:
        """Do `share` on every rank; gives what each returned, JSON data, in the order of ranks.

        Raises Failed on every rank if it failed on any, or if a rank does not answer.
        """
        said, fault = None, ""
        try:
            said = share()
        except Exception as error:  # whatever it was, the others wait for an answer
            fault = explain(error)
        answers = [json.loads(text) for text in self.gather(json.dumps([said, fault]))]
        for rank, (_, fault) in enumerate(answers):
            if fault:
                raise Failed(f"rank {rank}: {fault}" if self.size > 1 else fault)
        return [said for said, _ in answers]

    def gather(self, text: str) -> list[str]:
        """The text of every rank. Raises Failed if one does not answer."""
        if self.group is None:
            return [text]
        raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        try:
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(counts, torch.tensor([len(raw)]), self.group)
            padded = torch.zeros(max(int(n) for n in counts), dtype=torch.uint8)
            padded[: len(raw)] = raw
            texts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(texts, padded, self.group)
        except RuntimeError as error:  # what gloo raises for a connection that ended, and for one that is silent
            raise silent(error) from error
        return [bytes(t[: int(n)].numpy()).decode() for t, n in zip(texts, counts, strict=True)]

    def all(self, holds: bool) -> bool:
        """Whether it holds on every rank. Raises Failed if one does not answer."""
        if self.group is None:
            return holds
        vote = torch.tensor([int(holds)])
        try:
            dist.all_reduce(vote, dist.ReduceOp.MIN, self.group)
        except RuntimeError as error:
            raise silent(error) from error
        return bool(vote)


def silent(error: RuntimeError) -> Failed:
    """What gloo raised, without the place in its source before and its advice behind."""
    said = one_line(error).rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or one_line(error)
    return Failed(f"a rank does not answer ({said})")


def explain(error: Exception) -> str:
    """One line that names the fault and, where it is known, the mend."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        mend = MENDS.get(error.errno or 0, "")
        return f"{where}{error.strerror}{f': {mend}' if mend else ''}"
    return one_line(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {one_line(error)}"


def one_line(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "..."
