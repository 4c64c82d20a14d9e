"""One thread answers requests in order of arrival; the queue before it is bounded, and a lost client frees its place.

The reference decoder computes on one processor: two requests at once would each take twice as long. A request that
finds the queue full is refused at once with the time after which to try again, which a client can act on; one that
waits a minute cannot.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from math import ceil

from litchi.schema.protocol import Sampler
from litchi.schema.request import Completion, Delta, Request

log = logging.getLogger("litchi.serve")

Piece = Delta | Completion


class Busy(Exception):
    """The queue is full. `retry_after` is in whole seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Load:
    running: int
    waiting: int
    max_waiting: int
    answered: int


class Job:
    """Requests that are answered one after another; iterate for (index of the request, piece of its answer)."""

    def __init__(self, requests: Sequence[Request], stream: bool, worker: Worker):
        self.requests, self.stream, self.cancelled = tuple(requests), stream, threading.Event()
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def cancel(self) -> None:
        """Leave the queue, or stop after the piece being made. Harmless when the job is done."""
        self.cancelled.set()
        self._worker.forget(self)
        self._pieces.put_nowait(None)

    def put(self, piece: tuple[int, Piece] | BaseException | None) -> None:
        """Called in the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: the server is going down and nobody listens
            self.cancelled.set()


class Worker:
    """The thread and its queue: at most one job runs, at most `max_queue` wait."""

    def __init__(self, sampler: Sampler, max_queue: int):
        self.sampler, self._max = sampler, max_queue
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._seconds, self._answered = 1.0, 0
        self._thread = threading.Thread(target=self._work, name="litchi-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Cancel everything and wait for the thread, at most until its sampler makes the next piece."""
        with self._changed:
            self._closing = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancelled.set()
            self._changed.notify_all()
        self._thread.join(timeout=10)

    def submit(self, requests: Sequence[Request], *, stream: bool = False) -> Job:
        """Queue requests as one job, answered in deltas (`stream`) or one completion each. Raises Busy."""
        with self._changed:
            # The running one counts too: a job that the thread has not yet picked up does not fill the queue.
            if len(self._waiting) + (self._running is not None) > self._max:
                raise Busy(max(1, ceil(self._seconds * (len(self._waiting) + 1))))
            job = Job(requests, stream, self)
            self._waiting.append(job)
            self._changed.notify()
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

    def forget(self, job: Job) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def load(self) -> Load:
        with self._changed:
            return Load(int(self._running is not None), len(self._waiting), self._max, self._answered)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            try:
                self._answer(job)
                job.put(None)
            except Exception as error:
                job.put(error)
            finally:
                with self._changed:
                    self._running = None
                    self._answered += 1
                    self._seconds += 0.2 * (time.monotonic() - began - self._seconds)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                for job in self._waiting:
                    job.put(None)
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _answer(self, job: Job) -> None:
        for index, request in enumerate(job.requests):
            if job.cancelled.is_set():
                return
            if not job.stream:
                job.put((index, self.sampler.complete(request)))
                continue
            deltas = iter(self.sampler.stream(request))
            try:
                for delta in deltas:
                    if job.cancelled.is_set():
                        log.info("the client left; request stopped")
                        return
                    job.put((index, delta))
            finally:
                # A generator that is dropped half way must free its caches now, not when it is collected.
                if close := getattr(deltas, "close", None):
                    close()
