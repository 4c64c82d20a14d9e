"""The door: HTTP endpoints over a `Worker`, and world sessions over a WebSocket, which compute nothing themselves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from litchi.config import BadInput
from litchi.schema.request import Completion, Delta
from litchi.serve import answers, wire
from litchi.serve.fields import Fields
from litchi.serve.guard import SUBPROTOCOL, Guard
from litchi.serve.limits import TooLarge, decode_picture, encode_png, read_body, read_json
from litchi.serve.params import MAX_SEED
from litchi.serve.sessions import ACTIONS, MakeRoom, World, frame_of
from litchi.serve.worker import Busy, Job, Worker

if TYPE_CHECKING:
    from litchi.serve.run import ServeConfig

log = logging.getLogger("litchi.serve")
WEB = Path(__file__).parent / "web"

PAGE_HEADERS = {
    # The page loads nothing from elsewhere and nobody may frame it.
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(config: ServeConfig, worker: Worker, make_room: MakeRoom) -> FastAPI:
    """The application; it starts the worker when it starts and stops it when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await to_thread.run_sync(worker.close)

    # Swagger's page would load scripts from a CDN; the schema itself stays at /openapi.json.
    app = FastAPI(title="Litchi", lifespan=lifespan, docs_url=None, redoc_url=None)
    door = Door(config, worker, make_room)
    app.include_router(door.router())
    app.mount("/web", StaticFiles(directory=WEB), name="web")
    app.add_middleware(Guard, key=config.api_key, hosts=config.hosts)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return app


class Door:
    """The endpoints and what they share."""

    def __init__(self, config: ServeConfig, worker: Worker, make_room: MakeRoom):
        self.config, self.worker, self.make_room = config, worker, make_room
        self.limits = config.limits
        self.worlds = 0

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/", self.page, methods=["GET", "HEAD"], include_in_schema=False)
        router.add_api_route("/favicon.ico", self.icon, methods=["GET"], include_in_schema=False)
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{name}", self.model, methods=["GET"])
        router.add_api_route("/v1/rooms", self.room, methods=["GET"])
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        router.add_api_route("/v1/images/generations", self.draw, methods=["POST"])
        router.add_api_route("/v1/next", self.next, methods=["POST"])
        router.add_api_websocket_route("/v1/worlds", self.world)
        return router

    async def page(self) -> Response:
        return FileResponse(WEB / "index.html", headers=PAGE_HEADERS)

    async def icon(self) -> Response:
        return FileResponse(WEB / "icon.svg", media_type="image/svg+xml")

    async def health(self) -> Response:
        alive = self.worker.alive
        body = {"status": "ok" if alive else "the worker stopped", "model": self.config.model}
        return JSONResponse(body | {"queue": asdict(self.worker.load()), "worlds": self.worlds}, 200 if alive else 503)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(self.config.model)]}

    async def model(self, name: str) -> dict[str, Any]:
        if name != self.config.model:
            raise wire.UnknownModel(f"no model {name[:80]!r} here; this server has {self.config.model!r}")
        abilities = ["talk", *self.config.abilities]
        return {"id": name, "object": "model", "created": 0, "owned_by": "litchi", "abilities": abilities}

    async def room(self, seed: Annotated[int, Query(ge=0, le=MAX_SEED)], env: str = "") -> Response:
        """The first frame of a room as PNG; its task stands percent-encoded in X-Litchi-Task."""
        made = await to_thread.run_sync(self.make_room, self._env(env), seed)
        seen = await to_thread.run_sync(made.reset, seed)
        headers = {"X-Litchi-Task": quote(made.task), "Cache-Control": "no-store"}
        return Response(encode_png(frame_of(seen)), media_type="image/png", headers=headers)

    async def chat(self, request: Request) -> Response:
        ask = await self._ask(request, wire.read_chat)
        writer = answers.Writer(ask, self.config.model)
        if ask.stream:
            return await self._stream(request, ask, writer)
        # Only a stream says which text belongs to which token.
        told = ask.requests[0].params.logprobs
        job = self.worker.submit(ask.requests, stream=told)
        choices = [answers.Choice() for _ in ask.requests]
        async with cancels_when_gone(request, job):
            async for index, piece in job:
                if isinstance(piece, Delta):
                    choices[index].add(piece)
                else:
                    choices[index] = answers.Choice.of(piece)
        return Stopped() if job.cancelled.is_set() else JSONResponse(writer.whole(choices))

    async def draw(self, request: Request) -> Response:
        ask = await self._ask(request, wire.read_drawing)
        made = await self._complete(request, ask)
        return Stopped() if made is None else JSONResponse(answers.drawings(made, ask))

    async def next(self, request: Request) -> Response:
        ask = await self._ask(request, wire.read_next)
        made = await self._complete(request, ask)
        return Stopped() if made is None else JSONResponse(answers.next_part(made[0]))

    async def world(self, socket: WebSocket) -> None:
        """One world session, from its socket's opening to its closing."""
        offered = socket.scope.get("subprotocols", [])
        await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
        if self.worlds >= self.config.max_worlds:
            await socket.send_json({"type": "error", "message": "too many world sessions; try again later"})
            await socket.close(1013)
            return
        self.worlds += 1
        world: World | None = None
        try:
            while True:
                began = time.perf_counter()
                try:
                    world = await self._turn(await _message(socket), world)
                    reply = world.frame(1000 * (time.perf_counter() - began))
                except (BadInput, Busy) as error:
                    reply = {"type": "error", "message": str(error)}
                except (WebSocketDisconnect, asyncio.CancelledError):
                    raise
                except Exception:
                    log.exception("a world session failed at one message")
                    reply = {"type": "error", "message": "the server failed at this message; its log says why"}
                await socket.send_json(reply)
        except WebSocketDisconnect:
            pass
        finally:
            self.worlds -= 1

    async def _turn(self, message: dict[str, Any], world: World | None) -> World:
        """The session after one message."""
        fields = Fields(message)
        kind = fields.choice("type", None, ("start", "action", "policy", "rewind", "reset"))
        if kind == "start":
            return await self._start(fields)
        if world is None:
            raise BadInput('no world yet; send {"type": "start", "seed": 0} first')
        match kind:
            case "action":
                await world.act(ACTIONS.index(fields.choice("action", None, ACTIONS)))
            case "policy":
                await world.act(await world.choose(fields.text("instruction", "")))
            case "rewind":
                await world.rewind(fields.integer("step", None, 0, self.config.max_world_steps))
            case _:
                await world.rewind(0)
        return world

    async def _start(self, fields: Fields) -> World:
        context, steps = self.config.context_frames, self.config.max_world_steps
        if fields.get("image") is not None:
            picture = await to_thread.run_sync(decode_picture, fields.text("image"), self.limits, "image")
            return World.in_picture(self.worker, context, steps, picture.pixels)
        name, seed = self._env(fields.text("env", "")), fields.integer("seed", 0, 0, MAX_SEED)
        return await World.in_room(self.worker, context, steps, self.make_room, name, seed)

    def _env(self, name: str) -> str:
        # Only listed names: a simulator's registry imports modules that a name mentions.
        if name and name not in self.config.envs:
            raise BadInput(f"no room {name[:80]!r} here; choose among {', '.join(self.config.envs)}")
        return name or self.config.envs[0]

    async def _ask(self, request: Request, read: Callable[..., wire.Ask]) -> wire.Ask:
        body = await read_body(request.stream(), request.headers.get("content-length"), self.limits)
        # Pictures are decoded in another thread, so that a large one does not stop everybody's streams.
        return await to_thread.run_sync(lambda: read(read_json(body), self.config.model, self.limits))

    async def _complete(self, request: Request, ask: wire.Ask) -> list[Completion] | None:
        """The answers in order; None if the client left or the server stops."""
        job = self.worker.submit(ask.requests)
        async with cancels_when_gone(request, job):
            made = [piece async for _, piece in job if isinstance(piece, Completion)]
        return made if len(made) == len(ask.requests) else None

    async def _stream(self, request: Request, ask: wire.Ask, writer: answers.Writer) -> Response:
        job = self.worker.submit(ask.requests, stream=True)
        pieces = aiter(job)
        # The first piece is awaited before the status is sent, so that what the model refuses is still a 4xx.
        async with cancels_when_gone(request, job):
            first = await anext(pieces, None)
        if first is None:
            return Stopped()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            events(first, pieces, job, ask, writer), media_type="text/event-stream", headers=headers
        )


class Stopped(JSONResponse):
    """What nobody reads: the client left, or the server stops in the middle of an answer."""

    def __init__(self) -> None:
        super().__init__(answers.error("the server is stopping; try again", "stopping", "server_error"), 503)


async def events(
    first: tuple[int, Any], rest: AsyncIterator[tuple[int, Any]], job: Job, ask: wire.Ask, writer: answers.Writer
) -> AsyncIterator[str]:
    """The server-sent events of a chat answer. Closing this iterator, as a lost connection does, cancels the job."""
    choices = [answers.Choice() for _ in ask.requests]
    opened: set[int] = set()
    try:
        piece: tuple[int, Any] | None = first
        while piece is not None:
            index, delta = piece
            if index not in opened:
                opened.add(index)
                yield writer.opening(index)
            choices[index].add(delta)
            if said := writer.piece(index, delta):
                yield said
            if delta.finish:
                yield writer.closing(index, choices[index])
            piece = await anext(rest, None)
        if ask.usage:
            yield writer.usage(choices)
        yield "data: [DONE]\n\n"
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


async def _message(socket: WebSocket) -> dict[str, Any]:
    received = await socket.receive()
    if received["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(received.get("code", 1000))
    return read_json(received.get("text") or received.get("bytes") or b"")


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an exception. What is nobody's bad input is logged whole and told in one sentence."""
    match error:
        case wire.UnknownModel():
            return 404, answers.error(str(error), "model_not_found")
        case TooLarge():
            return 413, answers.error(str(error), "too_large")
        case BadInput():
            return 400, answers.error(str(error), "bad_input")
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
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Busy) else None
    return JSONResponse(body, status, headers)


HANDLERS: dict[type[Exception], Any] = {
    kind: answer_error for kind in (BadInput, Busy, RequestValidationError, HTTPException, Exception)
}
