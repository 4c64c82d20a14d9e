"""One exchange: a body in, its pieces from the worker, and a body or a stream of events out; errors told plainly."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from anyio import to_thread
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from litchi.config import BadInput
from litchi.model.generate import whole
from litchi.schema.digest import told
from litchi.schema.request import Completion, Delta
from litchi.schema.request import Request as Question
from litchi.serve import answers
from litchi.serve.answers import Choice
from litchi.serve.darkroom import Darkroom
from litchi.serve.fetch import Fetcher
from litchi.serve.limits import TooLarge, read_body, read_json
from litchi.serve.metrics import Metrics
from litchi.serve.models import Models
from litchi.serve.receipts import Origin, OtherOrigin, Receipt, Receipts
from litchi.serve.wire import Missing, UnknownModel
from litchi.serve.worker import Busy, Job, Worker

if TYPE_CHECKING:
    from litchi.serve.run import ServeConfig

log = logging.getLogger("litchi.serve")
T = TypeVar("T")
STOPPING = answers.error("the server is stopping; try again", "stopping", "server_error")


class Heard:
    """What each question has been answered so far."""

    def __init__(self, count: int, origin: Origin | None) -> None:
        self.origin = origin
        """What the answers' bits come from."""
        self.choices = [Choice() for _ in range(count)]
        self.pieces: list[list[Delta | Completion]] = [[] for _ in range(count)]

    def add(self, index: int, piece: Delta | Completion) -> None:
        self.pieces[index].append(piece)
        if isinstance(piece, Delta):
            self.choices[index].add(piece)
        else:
            self.choices[index] = Choice.of(piece)

    @property
    def over(self) -> bool:
        return all(choice.over for choice in self.choices)

    @property
    def completions(self) -> list[Completion]:
        """The answers, when all are over; a stream's deltas are the same answer as its completion."""
        found = []
        for pieces in self.pieces:
            deltas = [piece for piece in pieces if isinstance(piece, Delta)]
            found += [whole(deltas)] if deltas else [piece for piece in pieces if isinstance(piece, Completion)]
        return found


class Scribe(Protocol):
    """Writes the events of one answer; each is whole, or empty if there is nothing to tell."""

    receipt: str
    """The name under which what it was made of is kept; empty to keep nothing."""

    def opening(self, index: int) -> str: ...

    def piece(self, index: int, delta: Delta) -> str: ...

    def closing(self, index: int, choice: Choice) -> str: ...

    def ending(self, choices: list[Choice]) -> str: ...


class Desk:
    """Where every endpoint takes a body, has it answered and sends the answer back."""

    def __init__(self, config: ServeConfig, worker: Worker, metrics: Metrics, darkroom: Darkroom | None = None):
        self.config, self.worker, self.metrics = config, worker, metrics
        self.darkroom = darkroom or Darkroom(config.max_pixels)
        self.limits = replace(config.limits, darkroom=self.darkroom)
        self.receipts = Receipts(config.receipts)
        listed = config.fetch_hosts or config.fetch_inner_hosts
        self.fetcher = Fetcher(config.fetch_hosts, config.fetch_inner_hosts) if listed else None
        self.models = Models.of(config.model, config.adapters)

    async def read(self, request: Request, read: Callable[..., T]) -> T:
        body = await read_body(request.stream(), request.headers.get("content-length"), self.limits)
        # Pictures are decoded in another thread, so that a large one does not stop everybody's streams.
        limits = replace(self.limits, visit=self.fetcher.visit()) if self.fetcher else self.limits
        return await to_thread.run_sync(lambda: read(read_json(body), self.models, limits))

    async def collect(
        self, request: Request, questions: tuple[Question, ...], receipt: str = "", *, spelled: bool = False
    ) -> list[Choice] | None:
        """The answers in order, or None if the client left or the server stops.

        What they were made of is kept under the name `receipt`, if that is not empty.
        """
        heard = await self.hear(request, questions, spelled=spelled)
        if heard is None:
            return None
        await self.keep(receipt, questions, heard)
        return heard.choices

    async def hear(self, request: Request, questions: tuple[Question, ...], *, spelled: bool = False) -> Heard | None:
        """Whole answers, or None if the client left or the server stops.

        With `spelled` they are put together from a stream: only that says which text belongs to which token.
        """
        job = self.worker.submit(questions, stream=spelled)
        heard = Heard(len(questions), job.answerer.origin)
        async with cancels_when_gone(request, job):
            async for index, piece in job:
                heard.add(index, piece)
        self.count(heard.choices)
        return heard if heard.over and not job.cancelled.is_set() else None

    async def keep(self, name: str, questions: tuple[Question, ...], heard: Heard) -> None:
        """Keep a receipt under a name; none where nobody knows what answers, or without a name."""
        if not name or (origin := heard.origin) is None:
            return

        def keep() -> None:
            said = tuple(told(each) for each in heard.completions)
            now, model = int(time.time()), self.models.told(questions)
            come = origin.of(questions)
            self.receipts.keep(
                Receipt(id=name, created=now, model=model, origin=come, requests=questions, answers=said)
            )

        await to_thread.run_sync(keep)  # pictures are packed: everybody's streams go on meanwhile

    async def stream(self, request: Request, questions: tuple[Question, ...], writer: Scribe) -> Response:
        began = time.monotonic()
        job = self.worker.submit(questions, stream=True)
        pieces = aiter(job)
        # The first piece is awaited before the status is sent, so that what the model refuses is still a 4xx.
        async with cancels_when_gone(request, job):
            first = await anext(pieces, None)
        if first is None:
            return Stopped()
        self.metrics.first_token.observe(time.monotonic() - began)
        heard = Heard(len(questions), job.answerer.origin)

        async def events_of() -> AsyncIterator[str]:
            try:
                async for event in events(first, pieces, job, heard, writer, self.keep):
                    yield event
            finally:
                job.cancel()
                self.count(heard.choices)

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events_of(), media_type="text/event-stream", headers=headers)

    def count(self, choices: list[Choice]) -> None:
        for choice in choices:
            finish = choice.finish if choice.over else "cancelled"
            self.metrics.answered(choice.prompt_tokens or 0, len(choice.tokens), finish)


class Stopped(JSONResponse):
    """What nobody reads: the client left, or the server stops in the middle of an answer."""

    def __init__(self) -> None:
        super().__init__(STOPPING, 503)


async def events(
    first: tuple[int, Any],
    rest: AsyncIterator[tuple[int, Any]],
    job: Job,
    heard: Heard,
    writer: Scribe,
    keep: Callable[[str, tuple[Question, ...], Heard], Awaitable[None]],
) -> AsyncIterator[str]:
    """The server-sent events of an answer. Closing this iterator, as a lost connection does, cancels the job."""
    opened: set[int] = set()
    try:
        piece: tuple[int, Any] | None = first
        while piece is not None:
            index, delta = piece
            if index not in opened:
                opened.add(index)
                yield writer.opening(index)
            heard.add(index, delta)
            if heard.over:  # before the client is told so: it may ask for the receipt at once
                await keep(writer.receipt, job.requests, heard)
            if said := writer.piece(index, delta):
                yield said
            if delta.finish:
                yield writer.closing(index, heard.choices[index])
            piece = await anext(rest, None)
        if not job.cancelled.is_set():
            yield writer.ending(heard.choices) if heard.over else answers.event(STOPPING)
    except Exception as error:
        # The status is gone already; the error is the last event.
        status, body = described(error)
        yield answers.event(body)
    finally:
        job.cancel()


@asynccontextmanager
async def cancels_when_gone(request: Request, job: Job) -> AsyncIterator[None]:
    """Cancel the job if the client leaves before the body of this block is done."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        job.cancel()
        raise
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an exception. What is nobody's bad input is logged whole and told in one sentence."""
    match error:
        case UnknownModel():
            return 404, answers.error(str(error), "model_not_found")
        case Missing():
            return 404, answers.error(str(error), "not_found")
        case TooLarge():
            return 413, answers.error(str(error), "too_large")
        case OtherOrigin():
            return 409, answers.error(str(error), "other_origin")
        case BadInput():
            return 400, answers.error(str(error), "bad_input")
        case ClientDisconnect():
            return 400, answers.error("the client left before its request was whole", "disconnected")
        case Busy():
            return 429, answers.error(str(error), "queue_full", "rate_limit_error")
        case RequestValidationError():
            faults = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
            return 400, answers.error(faults, "bad_input")
        case HTTPException():
            return error.status_code, answers.error(
                f"{error.detail} (the endpoints are listed in /openapi.json)", "no_endpoint"
            )
        case _:
            log.error("a request failed", exc_info=error)
            return 500, answers.error(
                "the server failed at this request; its log says why", "server_error", "server_error"
            )


async def answer_error(_: Request, error: Exception) -> Response:
    status, body = described(error)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Busy) else {}
    if isinstance(error, HTTPException):
        headers |= error.headers or {}  # a method that is not allowed comes with those that are
    if status == 500:
        headers["Connection"] = "close"  # the server does close it then, and a client must not ask there again
    return JSONResponse(body, status, headers)


HANDLERS: dict[type[Exception], Any] = {
    kind: answer_error for kind in (BadInput, Busy, ClientDisconnect, RequestValidationError, HTTPException, Exception)
}
