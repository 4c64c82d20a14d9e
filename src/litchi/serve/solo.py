"""Any `Sampler` as one that answers: one thread, one request after another, in order of arrival."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from litchi.schema.protocol import Sampler
from litchi.schema.request import Completion, Delta, Request

log = logging.getLogger("litchi.serve")

Piece = Delta | Completion
Put = Callable[[Piece | BaseException | None], None]
"""Takes each piece of an answer, and in the end None, or the error that ended it."""


@dataclass(eq=False, slots=True)
class Ticket:
    request: Request
    put: Put
    stream: bool
    cancelled: threading.Event = field(default_factory=threading.Event)


class Solo:
    """The reference decoder computes on one processor: two requests at once would each take twice as long."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="litchi-solo", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def max_running(self) -> int:
        return 1

    @property
    def mode(self) -> str:
        return "one at a time"

    @property
    def origin(self) -> None:
        """Nobody knows what a sampler's bits come from."""

    def gauges(self) -> dict[str, float]:
        return {}

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Wait for the thread, at most until its sampler makes the next piece."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=10)

    def submit(self, request: Request, put: Put, *, stream: bool) -> Ticket:
        ticket = Ticket(request, put, stream)
        with self._changed:
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        ticket.cancelled.set()
        with self._changed:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
        ticket.put(None)

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            try:
                self._answer(ticket)
                ticket.put(None)
            except Exception as error:
                ticket.put(error)

    def _next(self) -> Ticket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._closing:
                return self._waiting.popleft()
            left, self._waiting = list(self._waiting), deque()
        for ticket in left:
            ticket.put(None)
        return None

    def _answer(self, ticket: Ticket) -> None:
        if not ticket.stream:
            ticket.put(self.sampler.complete(ticket.request))
            return
        deltas = iter(self.sampler.stream(ticket.request))
        try:
            for delta in deltas:
                if ticket.cancelled.is_set():
                    log.info("the client left; request stopped")
                    return
                ticket.put(delta)
        finally:
            # A generator that is dropped half way must free its caches now, not when it is collected.
            if close := getattr(deltas, "close", None):
                close()
