"""Whoever answers many at once is a `Sampler` too: one request, its pieces one after another."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

from litchi.model.generate import whole
from litchi.schema.request import Completion, Delta, Request
from litchi.serve.solo import Piece, Put


class Asking:
    """A `Sampler` by `submit` and `cancel` of an `Answerer`, while that runs."""

    def submit(self, request: Request, put: Put, *, stream: bool) -> Any:
        raise NotImplementedError

    def cancel(self, ticket: Any) -> None:
        raise NotImplementedError

    def stream(self, request: Request) -> Iterator[Delta]:
        """The pieces of one answer; raises what ends it early."""
        pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        ticket = self.submit(request, pieces.put, stream=True)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                assert isinstance(piece, Delta)
                yield piece
        finally:
            self.cancel(ticket)

    def complete(self, request: Request) -> Completion:
        return whole(list(self.stream(request)))
