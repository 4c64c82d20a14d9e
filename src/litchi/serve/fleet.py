"""Workers under one supervisor: each a process with an engine; one that dies or hangs is replaced, and nobody notices.

What it had begun is asked again elsewhere. Because an answer's bits depend on nothing but its request, what a client
has heard already is the beginning of what is said again: it is skipped, and the stream goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litchi.config import BadInput
from litchi.model.weights import load_config, load_processor, read_meta
from litchi.schema.request import Completion, Delta, Request
from litchi.schema.sample import Text
from litchi.serve.asking import Asking
from litchi.serve.keeper import Keeper, Member
from litchi.serve.pipe import read, written
from litchi.serve.receipts import Origin
from litchi.serve.solo import Put
from litchi.serve.spawn import Early

if TYPE_CHECKING:
    from litchi.serve.run import ServeConfig

TRIES = 3
"""Workers that may die of one request before it is refused: it may be what kills them."""
SLACK = 4
"""Requests more than the idlest that a worker may have and still be preferred for what it has read before."""
BEGINNINGS = 4096
"""Beginnings of documents whose reader is remembered."""


@dataclass(eq=False, slots=True)
class Ask:
    """One request, until its end is told."""

    number: int
    request: Request
    put: Put
    stream: bool
    member: Member | None = None
    heard: int = 0
    """Pieces that the client has been told."""
    skip: int = 0
    """How many of them are yet to come again."""
    deaths: int = 0
    """Workers that died while they answered it."""
    cancelled: bool = False
    over: bool = False

    @property
    def last(self) -> bool:
        """Whether the next death is its last: it then shares its worker with no other of this kind."""
        return self.deaths == TRIES - 1


class Shape:
    """As much of a network as the door asks for: how it is made."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput if there is no checkpoint."""
        read_meta(folder)
        self.config = load_config(folder)


class Fleet(Keeper, Asking):
    """An `Answerer` whose engines are processes."""

    def __init__(self, folder: Path, config: ServeConfig, early: Early | None = None) -> None:
        super().__init__(folder, config, early)
        self.model = Shape(folder)
        self.homeless: OrderedDict[int, Ask] = OrderedDict()
        """Who waits for a worker."""
        self.homes: OrderedDict[bytes, int] = OrderedDict()
        """By the beginning of a document, the place of the worker that read it last."""
        self.numbers = itertools.count()
        self.known: Origin | None = None
        self.mode = "starting"

    # ---- what the door asks ----

    @property
    def sampler(self) -> Any:
        return self

    @cached_property
    def processor(self) -> Any:
        return load_processor(self.folder / "processor")

    @property
    def max_running(self) -> int:
        return self.config.workers * self.config.engine.max_running

    @property
    def origin(self) -> Origin | None:
        return self.known

    def gauges(self) -> dict[str, float]:
        """Of workers and, added up, of their engines."""
        with self.changed:
            loads = Counter[str]()
            for member in self.members:
                loads.update(member.load)
            ready = sum(member.ready for member in self.members)
            own: dict[str, float] = {
                "workers_ready": ready,
                "workers_restarted": self.restarts,
                "requests_homeless": len(self.homeless),
            }
        return own | {f"engine_{name}": value for name, value in loads.items()}

    def start(self) -> Fleet:
        """Returns when one worker is ready. Raises BadInput with what it says if it cannot be."""
        self.begin()
        return self

    def submit(self, request: Request, put: Put, *, stream: bool) -> Ask:
        ask = Ask(next(self.numbers), request, put, stream)
        with self.changed:
            if not self.alive:
                raise BadInput(self.fault or "the workers are closing: ask again later")
            self.place(ask)
        return ask

    def cancel(self, ticket: Ask) -> None:
        with self.changed:
            ticket.cancelled = True
            if ticket.member is not None:
                ticket.member.pipe.send({"of": ticket.number})
                return
            waited = self.homeless.pop(ticket.number, None)
        if waited is not None:
            self.end(ticket, None)

    # ---- who answers ----

    def place(self, ask: Ask) -> None:
        """Give a request to a worker, or let it wait for one."""
        with self.changed:
            ready = [member for member in self.members if member.ready]
            if ask.last:  # who dies now is to blame alone
                ready = [member for member in ready if not any(other.last for other in member.asked.values())]
            ask.member = self.choose(ask, ready) if ready else None
            if ask.member is None:
                self.homeless[ask.number] = ask
                return
            ask.member.asked[ask.number] = ask
            ask.member.pipe.send({"of": ask.number, "ask": written(ask.request), "stream": ask.stream})

    def choose(self, ask: Ask, ready: Sequence[Member]) -> Member:
        """The idlest, or who has read what begins alike if it has little more to do."""
        chosen, key = min(ready, key=lambda member: len(member.asked)), beginning(ask.request)
        home, most = self.homes.pop(key, None), len(chosen.asked) + SLACK
        for member in ready:
            if member.place == home and len(member.asked) <= most and not ask.deaths:
                chosen = member
        self.homes[key] = chosen.place
        if len(self.homes) > BEGINNINGS:
            self.homes.popitem(last=False)
        return chosen

    def settle(self) -> None:
        """Give those to workers that wait for one."""
        with self.changed:
            waited, self.homeless = list(self.homeless.values()), OrderedDict()
            for ask in waited:
                self.place(ask)

    def end(self, ask: Ask, error: BaseException | None) -> None:
        with self.changed:
            if ask.over:
                return
            ask.over = True
        ask.put(error)

    # ---- what becomes of workers ----

    def hear(self, member: Member, message: dict[str, Any]) -> None:
        match message:
            case {"of": number, "piece": piece}:
                ask = member.asked.get(number)
                if ask is None:
                    return
                if ask.skip:
                    ask.skip -= 1
                    return
                ask.heard += 1
                ask.put(read(piece, Delta, Completion))
            case {"of": number, "end": told}:
                with self.changed:
                    ask = member.asked.pop(number, None)
                if ask is not None:
                    self.end(ask, None if told is None else error_of(told))
                if self.homeless:
                    self.settle()
            case {"beat": load}:
                if load["steps"] != member.load.get("steps") or not load["running"]:
                    member.moved = time.monotonic()
                member.load = load
            case {"ready": origin, "mode": mode}:
                self.mode, self.known = mode, None if origin is None else Origin(**origin)
                self.welcome(member, self.known)
                self.settle()

    def orphaned(self, member: Member) -> None:
        for ask in list(member.asked.values()):
            self.save(ask, member)

    def drop(self, error: BaseException | None) -> None:
        with self.changed:
            waited, self.homeless = list(self.homeless.values()), OrderedDict()
        for ask in waited:
            self.end(ask, error)

    def save(self, ask: Ask, member: Member) -> None:
        """Have a request answered that died with its worker."""
        ask.deaths += 1
        exact = member.origin is not None
        if ask.cancelled or not self.alive:
            self.end(ask, None)
        elif ask.deaths >= TRIES:
            self.end(ask, RuntimeError(f"{TRIES} workers died while they answered one request"))
        elif ask.heard and not exact:
            self.end(ask, RuntimeError("a worker died in the middle of an answer that cannot be made again alike"))
        else:
            ask.skip = ask.heard
            with self.changed:
                self.place(ask)
                if not self.alive:  # it ended in the meantime
                    self.drop(None)


def beginning(request: Request) -> bytes:
    """What documents that begin alike share: the first two parts, or the first ids."""
    digest = hashlib.blake2b(f"{request.want} {request.adapter}".encode(), digest_size=16)
    for part in request.parts[:2]:
        digest.update(part.text[:512].encode() if isinstance(part, Text) else repr(part)[:512].encode())
    digest.update(repr(request.tokens[:128]).encode())
    return digest.digest()


def error_of(told: list[str]) -> Exception:
    kind, text = told
    return BadInput(text) if kind == "input" else RuntimeError(f"a worker failed: {kind}: {text}")
