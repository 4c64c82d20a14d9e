"""Memory for tensors in large pages, where the system has them: filled in a fourth of the time that small ones take.

The system hands memory out when it is first written, a page at a time: half a gigabyte is 131,072 small pages and 256
large ones. Tensors lie one after another in chunks, each of which goes back when its last tensor does.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

PAGE, CHUNK, LEAST = 1 << 21, 1 << 26, 1 << 16
"""Bytes of a large page, of a chunk, and of the smallest tensor that is put into one: small ones are kept for long."""


class LargePages:
    """Gives memory as `torch.empty` does, which is its oracle but that its memory is zero."""

    def __init__(self) -> None:
        self.left = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
        """A tensor that begins at a cache line."""
        size = math.prod(shape) * dtype.itemsize
        if size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        if len(self.left) < size:
            self.left = chunk(max(size, CHUNK))
        taken, self.left = self.left[:size], self.left[size + -size % 64 :]
        return taken.view(dtype).view(*shape)


def chunk(size: int) -> Tensor:
    """So many bytes and up to a page more, from the beginning of a page on."""
    room = mmap.mmap(-1, size + -size % PAGE + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system that was built without large pages
        room.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(room, dtype=torch.uint8)
    return data[-data.data_ptr() % PAGE :]
