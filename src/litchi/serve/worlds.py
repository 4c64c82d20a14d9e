"""World sessions over a WebSocket: a message in, a frame out, and forks that wait for a socket of their own.

A fork is made on the socket of the session that it leaves, which is told its name. It is taken up once, by a socket
that is opened at /v1/worlds?fork=NAME and begins with the fork's frame. It has a place among `max_worlds` from the
moment that it is made; what nobody took up ends with the session that made it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from fastapi import WebSocket, WebSocketDisconnect

from litchi.config import BadInput
from litchi.serve.answers import fresh
from litchi.serve.fields import Fields
from litchi.serve.guard import SUBPROTOCOL
from litchi.serve.limits import Limits, decode_picture, read_json
from litchi.serve.params import MAX_SEED
from litchi.serve.sessions import ACTIONS, MakeRoom, World
from litchi.serve.worker import Busy, Worker

if TYPE_CHECKING:
    from litchi.serve.run import ServeConfig

log = logging.getLogger("litchi.serve")
KINDS = ("start", "action", "policy", "rewind", "reset", "fork")
FULL = "too many world sessions; try again later"


class Worlds:
    """The sessions that are open, and the forks that nobody has taken up yet."""

    def __init__(self, config: ServeConfig, limits: Limits, worker: Worker, make_room: MakeRoom):
        self.config, self.limits, self.worker, self.make_room = config, limits, worker, make_room
        self.open = 0
        self.forks: dict[str, World] = {}

    @property
    def count(self) -> int:
        """Places that are taken."""
        return self.open + len(self.forks)

    async def session(self, socket: WebSocket) -> None:
        """One world session, from its socket's opening to its closing."""
        offered = socket.scope.get("subprotocols", [])
        await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
        name = socket.query_params.get("fork")
        world = None if name is None else self.forks.pop(name, None)  # whose place this socket takes over
        if name is not None and world is None:
            return await refuse(socket, 1008, f"no fork {name[:80]!r} here: it was taken up, or its session has ended")
        if self.count >= self.config.max_worlds:
            return await refuse(socket, 1013, FULL)
        self.open += 1
        mine: set[str] = set()
        try:
            if world is not None:
                await socket.send_json(world.frame(0.0))
            while True:
                world = await self._answer(socket, world, mine)
        except WebSocketDisconnect:
            pass
        finally:
            self.open -= 1
            for name in mine:
                self.forks.pop(name, None)

    async def _answer(self, socket: WebSocket, world: World | None, mine: set[str]) -> World | None:
        """Take one message and answer it; the session after it."""
        message = await _message(socket)
        began = time.perf_counter()
        try:
            fields = Fields(read_json(message))
            kind = fields.choice("type", None, KINDS)
            if kind == "fork":
                reply = await self._fork(fields, world, mine)
            else:
                world = await self._turn(kind, fields, world)
                reply = world.frame(1000 * (time.perf_counter() - began))
        except (BadInput, Busy) as error:
            reply = {"type": "error", "message": str(error)}
        except (WebSocketDisconnect, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("a world session failed at one message")
            reply = {"type": "error", "message": "the server failed at this message; its log says why"}
        await socket.send_json(reply)
        return world

    async def _turn(self, kind: str, fields: Fields, world: World | None) -> World:
        if kind == "start":
            return await self._start(fields)
        now = begun(world)
        match kind:
            case "action":
                await now.act(ACTIONS.index(fields.choice("action", None, ACTIONS)))
            case "policy":
                await now.act(await now.choose(fields.text("instruction", "")))
            case "rewind":
                await now.rewind(fields.integer("step", None, 0, self.config.max_world_steps))
            case _:
                await now.rewind(0)
        return now

    async def _fork(self, fields: Fields, world: World | None, mine: set[str]) -> dict[str, Any]:
        """Fork a session at one of its steps, by default the present one."""
        now = begun(world)
        step = fields.integer("step", len(now.moments) - 1, 0, self.config.max_world_steps)
        if self.count >= self.config.max_worlds:
            raise BadInput(FULL)
        name = fresh("fork")
        self.forks[name] = now  # its place is taken while its simulator is made
        mine.add(name)
        try:
            self.forks[name] = await now.fork(step)
        except BaseException:
            self.forks.pop(name, None)
            raise
        return {"type": "fork", "fork": name, "step": step}

    async def _start(self, fields: Fields) -> World:
        context, steps = self.config.context_frames, self.config.max_world_steps
        if fields.get("image") is not None:
            picture = await to_thread.run_sync(decode_picture, fields.text("image"), self.limits, "image")
            return World.in_picture(self.worker, context, steps, picture.pixels)
        name, seed = room_of(self.config, fields.text("env", "")), fields.integer("seed", 0, 0, MAX_SEED)
        return await World.in_room(self.worker, context, steps, self.make_room, name, seed)


def begun(world: World | None) -> World:
    if world is None:
        raise BadInput('no world yet; send {"type": "start", "seed": 0} first')
    return world


def room_of(config: ServeConfig, name: str) -> str:
    """A room by its name, the first one for none. Raises BadInput for one that is not listed."""
    # Only listed names: a simulator's registry imports modules that a name mentions.
    if name and name not in config.envs:
        raise BadInput(f"no room {name[:80]!r} here; choose among {', '.join(config.envs)}")
    return name or config.envs[0]


async def refuse(socket: WebSocket, code: int, message: str) -> None:
    await socket.send_json({"type": "error", "message": message})
    await socket.close(code)


async def _message(socket: WebSocket) -> str | bytes:
    received = await socket.receive()
    if received["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(received.get("code", 1000))
    return received.get("text") or received.get("bytes") or b""
