"""Where keys and values of all documents lie: pages of one pool, shared between documents that begin alike.

A page belongs to whoever reads it; when nobody does, it stays as a memory of what was read until its place is needed.
Only whole pages are remembered, under a key that says everything their bits depend on, the weights included.

L layers, P pages, G key-value heads, K head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


class OutOfPages(Exception):
    """Every page is being read: somebody has to give way."""


class Pages:
    """The pool. Page 0 is never given away: it holds zeros."""

    def __init__(
        self, keys: Float[Tensor, "L P G size K"], values: Float[Tensor, "L P G size K"], *, clear: bool = True
    ) -> None:
        """`size` tokens lie in a page. With `clear` a page is zeros when it is taken: what another document left there
        must not reach this one, not even through a mask (0 times NaN is NaN)."""
        self.keys, self.values, self.size, self.clear = keys, values, keys.shape[3], clear
        num_pages = keys.shape[1]
        self.free = list(range(num_pages - 1, 0, -1))
        self.readers = [0] * num_pages
        self.page_of: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Remembered pages that nobody reads, the longest unread first."""

    @property
    def num_free(self) -> int:
        """Pages that can be had, remembered ones included."""
        return len(self.free) + len(self.idle)

    @property
    def room(self) -> int:
        """Tokens that one document may have."""
        return (len(self.readers) - 1) * self.size

    def take(self) -> int:
        """An empty page with one reader. Raises OutOfPages."""
        if self.free:
            page = self.free.pop()
        elif self.idle:
            page, _ = self.idle.popitem(last=False)
            self.forget(page)
        else:
            raise OutOfPages
        self.readers[page] = 1
        if self.clear:
            self.keys[:, page].zero_()
            self.values[:, page].zero_()
        return page

    def drop(self, pages: Sequence[int]) -> None:
        """One reader less of each."""
        for page in pages:
            self.readers[page] -= 1
            if self.readers[page]:
                continue
            if page in self.key_of:
                self.idle[page] = None
            else:
                self.free.append(page)

    def remember(self, page: int, key: bytes) -> None:
        """A whole page whose bits `key` stands for; the first one of a key is kept."""
        if key not in self.page_of and page not in self.key_of:
            self.page_of[key], self.key_of[page] = page, key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning, each with one reader more."""
        found = []
        for key in keys:
            page = self.page_of.get(key)
            if page is None:
                break
            self.idle.pop(page, None)
            self.readers[page] += 1
            found.append(page)
        return found

    def forget(self, page: int) -> None:
        del self.page_of[self.key_of.pop(page)]

    def forget_all(self) -> None:
        """What is remembered is no longer true: the weights have changed."""
        for page in list(self.key_of):
            self.forget(page)
        self.free += self.idle
        self.idle.clear()
