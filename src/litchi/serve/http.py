"""The door: HTTP endpoints over a `Worker`, which compute nothing themselves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from litchi.serve import answers, wire
from litchi.serve.darkroom import Darkroom
from litchi.serve.exchange import HANDLERS, Desk, Stopped
from litchi.serve.guard import Guard
from litchi.serve.limits import encode_png
from litchi.serve.metrics import Meter, Metrics
from litchi.serve.openapi import openapi
from litchi.serve.params import MAX_SEED
from litchi.serve.replays import Replays
from litchi.serve.replies import Replies
from litchi.serve.sessions import MakeRoom, frame_of
from litchi.serve.swaps import Swaps
from litchi.serve.texts import Texts
from litchi.serve.tokens import Tokens, Words
from litchi.serve.worker import Worker
from litchi.serve.worlds import Worlds, room_of

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


def create_app(config: ServeConfig, worker: Worker, make_room: MakeRoom, darkroom: Darkroom | None = None) -> FastAPI:
    """The application; it starts the worker when it starts, and stops it and the `darkroom` when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        door.desk.darkroom.close()
        await to_thread.run_sync(worker.close)

    # Swagger's page would load scripts from a CDN; the schema itself stays at /openapi.json.
    app = FastAPI(title="Litchi", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.openapi = partial(openapi, config)
    door = Door(config, worker, make_room, darkroom)
    app.include_router(door.router())
    app.include_router(Texts(door.desk).router())
    app.include_router(Tokens(door.desk).router())
    app.include_router(Replies(door.desk, door.words).router())
    app.include_router(Replays(door.desk).router())
    app.include_router(Swaps(door.desk).router())
    app.mount("/web", StaticFiles(directory=WEB), name="web")
    app.add_middleware(Guard, key=config.api_key, hosts=config.hosts)
    app.add_middleware(Meter, metrics=door.metrics)  # outermost: what the guard refuses is counted too
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return app


class Door:
    """The endpoints and what they share."""

    def __init__(self, config: ServeConfig, worker: Worker, make_room: MakeRoom, darkroom: Darkroom | None = None):
        self.config, self.worker, self.make_room = config, worker, make_room
        self.metrics = Metrics()
        self.desk = Desk(config, worker, self.metrics, darkroom)
        self.limits = self.desk.limits
        self.words = Words.of(worker.sampler)
        self.worlds = Worlds(config, self.limits, worker, make_room)

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/", self.page, methods=["GET", "HEAD"], include_in_schema=False)
        router.add_api_route("/favicon.ico", self.icon, methods=["GET"], include_in_schema=False)
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/metrics", self.measure, methods=["GET"])
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{name}", self.model, methods=["GET"])
        router.add_api_route("/v1/rooms", self.room, methods=["GET"])
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        router.add_api_route("/v1/images/generations", self.draw, methods=["POST"])
        router.add_api_route("/v1/next", self.next, methods=["POST"])
        router.add_api_websocket_route("/v1/worlds", self.worlds.session)
        return router

    async def page(self) -> Response:
        return FileResponse(WEB / "index.html", headers=PAGE_HEADERS)

    async def icon(self) -> Response:
        return FileResponse(WEB / "icon.svg", media_type="image/svg+xml")

    async def health(self) -> Response:
        alive = self.worker.alive
        body = {"status": "ok" if alive else "the worker stopped", "model": self.config.model}
        body["mode"] = self.worker.answerer.mode
        return JSONResponse(
            body | {"queue": asdict(self.worker.load()), "worlds": self.worlds.count}, 200 if alive else 503
        )

    async def measure(self) -> Response:
        load = self.worker.load()
        gauges = {"queue_running": load.running, "queue_waiting": load.waiting, "queue_max_waiting": load.max_waiting}
        gauges |= {"worlds": self.worlds.count, "worker_alive": int(self.worker.alive)}
        text = self.metrics.text(gauges | self.worker.answerer.gauges())
        return Response(text, media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(name) for name in self.desk.models.names]}

    async def model(self, name: str) -> dict[str, Any]:
        models = self.desk.models
        if name not in models.names:
            raise wire.UnknownModel(f"no model {name[:80]!r} here; this server has {models}")
        abilities = ["talk", *self.config.abilities]
        told = {"id": name, "object": "model", "created": 0, "owned_by": "litchi", "abilities": abilities}
        return told | ({"parent": models.base} if models.adapter(name) else {})

    async def room(self, seed: Annotated[int, Query(ge=0, le=MAX_SEED)], env: str = "") -> Response:
        """The first frame of a room as PNG; its task stands percent-encoded in X-Litchi-Task."""
        made = await to_thread.run_sync(self.make_room, room_of(self.config, env), seed)
        seen = await to_thread.run_sync(made.reset, seed)
        headers = {"X-Litchi-Task": quote(made.task), "Cache-Control": "no-store"}
        return Response(encode_png(frame_of(seen)), media_type="image/png", headers=headers)

    async def chat(self, request: Request) -> Response:
        ask = await self.desk.read(request, partial(wire.read_chat, style=self.words.style))
        writer = answers.Writer(ask, self.desk.models.told(ask.requests))
        if ask.stream:
            return await self.desk.stream(request, ask.requests, writer)
        choices = await self.desk.collect(
            request, ask.requests, writer.receipt, spelled=ask.requests[0].params.logprobs
        )
        return Stopped() if choices is None else JSONResponse(writer.whole(choices))

    async def draw(self, request: Request) -> Response:
        ask = await self.desk.read(request, wire.read_drawing)
        name = answers.fresh("img")
        made = await self.desk.collect(request, ask.requests, name if ask.store else "")
        return Stopped() if made is None else JSONResponse({"id": name} | answers.drawings(made, ask))

    async def next(self, request: Request) -> Response:
        ask = await self.desk.read(request, wire.read_next)
        name = answers.fresh("next")
        made = await self.desk.collect(request, ask.requests, name if ask.store else "")
        return Stopped() if made is None else JSONResponse({"id": name} | answers.next_part(made[0]))
