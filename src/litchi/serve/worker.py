"""What stands between the door and who answers: a bounded number of requests, and pieces of answers for each client.

A request that finds too many before it is refused at once with the time after which to try again, which a client can
act on; one that waits a minute cannot. A lost client frees its place.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

from litchi.schema.protocol import Sampler
from litchi.schema.request import Completion, Delta, Request
from litchi.serve.receipts import Origin
from litchi.serve.solo import Piece, Put


class Busy(Exception):
    """Too many wait. `retry_after` is in whole seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Answerer(Protocol):
    """Who answers: the engine, or `Solo`."""

    @property
    def max_running(self) -> int:
        """Requests that are answered at once."""
        ...

    @property
    def sampler(self) -> Sampler:
        """What answers in the end, with the processor that it has."""
        ...

    @property
    def origin(self) -> Origin | None:
        """What its bits come from; None if they come otherwise at another time."""
        ...

    @property
    def mode(self) -> str:
        """ "exact", or why it is not."""
        ...

    def start(self) -> Any:
        """Harmless where it has been started."""
        ...

    def close(self) -> None: ...

    @property
    def alive(self) -> bool: ...

    def gauges(self) -> dict[str, float]:
        """What `/metrics` tells of it, by name."""
        ...

    def submit(self, request: Request, put: Put, *, stream: bool) -> Any:
        """Take a request in; `put` is told every piece, in any thread, and in the end None or what went wrong."""
        ...

    def cancel(self, ticket: Any) -> None:
        """Answer no further; harmless at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Load:
    running: int
    waiting: int
    max_waiting: int
    answered: int


class Job:
    """Requests of one client; iterate for (index of the request, piece of its answer), in any order of requests."""

    def __init__(self, requests: Sequence[Request], stream: bool, worker: Worker):
        self.requests, self.stream, self.cancelled = tuple(requests), stream, threading.Event()
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self.answerer = worker.answerer
        """Who answers all of it, also when others have taken its place at the door."""
        self._pieces: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()
        self._left, self._began = len(requests), time.monotonic()
        self._lock = threading.Lock()
        self.tickets: list[Any] = []

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def cancel(self) -> None:
        """Leave the queue, or stop after the piece being made. Harmless when the job is done."""
        self.stop()
        self._pieces.put_nowait(None)

    def stop(self) -> None:
        """Ask for no more; called in any thread."""
        self.cancelled.set()
        for ticket in self.tickets:
            self.answerer.cancel(ticket)

    def take(self, index: int, piece: Piece | BaseException | None) -> None:
        """What one request is told, in the thread of who answers."""
        if isinstance(piece, Delta | Completion):
            self.put((index, piece))
            return
        with self._lock:
            self._left -= 1
            last = self._left == 0
        # First, so that a client who is told the end and asks again at once does not find his own place taken.
        self._worker.ended(self if last else None)
        if isinstance(piece, BaseException):
            self.put(piece)
            self.stop()
        if last:
            self.put(None)

    def put(self, piece: tuple[int, Piece] | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: the server is going down and nobody listens
            self.cancelled.set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


class Worker:
    """Lets at most as many requests in as can be answered at once, and `max_queue` more."""

    def __init__(self, answerer: Answerer, max_queue: int):
        self.answerer, self._max = answerer, max_queue
        self._leaving: list[Answerer] = []
        """Who answers only what they have begun."""
        self._open: set[Job] = set()
        self._lock = threading.Lock()
        self._inside = self._answered = 0
        self._seconds = 1.0
        self._closing = False

    @property
    def sampler(self) -> Sampler:
        return self.answerer.sampler

    def start(self) -> None:
        self.answerer.start()

    def swap(self, answerer: Answerer) -> None:
        """Ask `answerer` from now on; who answered before ends what was begun, and is closed."""
        answerer.start()
        with self._lock:
            self._leaving.append(self.answerer)
            self.answerer = answerer
        self.dismiss()

    def dismiss(self) -> None:
        """Close those whom nobody waits for any more, in a thread of their own: it may take seconds."""
        with self._lock:
            busy = {id(job.answerer) for job in self._open}
            idle = [each for each in self._leaving if id(each) not in busy]
            self._leaving = [each for each in self._leaving if id(each) in busy]
        for each in idle:
            threading.Thread(target=each.close, name="litchi-leaving").start()

    def close(self) -> None:
        """Cancel everything, and wait until who answers has stopped."""
        with self._lock:
            self._closing = True
            jobs = list(self._open)
            leaving, self._leaving = self._leaving, []
        for job in jobs:
            job.stop()
        for each in (*leaving, self.answerer):
            each.close()

    def submit(self, requests: Sequence[Request], *, stream: bool = False) -> Job:
        """Queue requests as one job, answered in deltas (`stream`) or one completion each. Raises Busy."""
        with self._lock:
            most = self.answerer.max_running
            if self._inside >= most + self._max or self._closing:
                raise Busy(max(1, ceil(self._seconds * (self._inside - most + 1) / most)))
            self._inside += len(requests)
            job = Job(requests, stream, self)
            self._open.add(job)
        for index, request in enumerate(job.requests):
            try:
                job.tickets.append(
                    job.answerer.submit(request, lambda piece, index=index: job.take(index, piece), stream=stream)
                )
            except BaseException as error:
                for rest in range(index, len(job.requests)):
                    job.take(rest, error if rest == index else None)
                break
        return job

    async def complete(self, request: Request) -> Completion:
        """One whole answer; cancelled with the task that awaits it."""
        job = self.submit([request])
        try:
            async for _, piece in job:
                assert isinstance(piece, Completion)
                return piece
        finally:
            job.cancel()
        raise asyncio.CancelledError("the server is closing")

    def ended(self, job: Job | None) -> None:
        """A request has ended, and with the last of them its job."""
        with self._lock:
            self._inside -= 1
            if job is not None:
                self._open.discard(job)
                self._answered += 1
                self._seconds += 0.2 * (job.seconds - self._seconds)
        if self._leaving:
            self.dismiss()

    def load(self) -> Load:
        with self._lock:
            running = min(self._inside, self.answerer.max_running)
            return Load(running, self._inside - running, self._max, self._answered)

    @property
    def alive(self) -> bool:
        return self.answerer.alive

    @property
    def origin(self) -> Origin | None:
        return self.answerer.origin
