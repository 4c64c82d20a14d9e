"""Workers under one supervisor: each a process with an engine; one that dies or hangs is replaced, and nobody notices.

What it had begun is asked again elsewhere. Because an answer's bits depend on nothing but its request, what a client
has heard already is the beginning of what is said again: it is skipped, and the stream goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litchi.config import BadInput, plain
from litchi.model.weights import load_config, load_processor, read_meta
from litchi.schema.request import Completion, Delta, Request
from litchi.schema.sample import Text
from litchi.serve.asking import Asking
from litchi.serve.pipe import Pipe, read, written
from litchi.serve.receipts import Origin
from litchi.serve.solo import Put

if TYPE_CHECKING:
    from litchi.serve.run import ServeConfig

log = logging.getLogger("litchi.serve")

TRIES = 3
"""Workers that may die of one request before it is refused: it may be what kills them."""
STILLBORN = 3
"""Workers in a row that may die before they are ready."""
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


@dataclass(eq=False, slots=True)
class Member:
    """One worker, from its start to its death."""

    place: int
    process: subprocess.Popen
    pipe: Pipe
    asked: dict[int, Ask] = field(default_factory=dict)
    ready: bool = False
    origin: Origin | None = None
    load: dict[str, int] = field(default_factory=dict)
    """What its engine has to do and has done, as it last said."""
    moved: float = field(default_factory=time.monotonic)
    """When it last had nothing to do, or had done something."""


class Shape:
    """As much of a network as the door asks for: how it is made."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput if there is no checkpoint."""
        read_meta(folder)
        self.config = load_config(folder)


class Fleet(Asking):
    """An `Answerer` whose engines are processes."""

    def __init__(self, folder: Path, config: ServeConfig) -> None:
        self.folder, self.config, self.model = folder, config, Shape(folder)
        self.members: list[Member] = []
        self.homeless: OrderedDict[int, Ask] = OrderedDict()
        """Who waits for a worker."""
        self.homes: OrderedDict[bytes, int] = OrderedDict()
        """By the beginning of a document, the place of the worker that read it last."""
        self.numbers = itertools.count()
        self.changed = threading.Condition(threading.RLock())
        self.closing = False
        self.fault = ""
        """Why there are no workers any more."""
        self.known: Origin | None = None
        self.mode = "starting"
        self.stillborn = self.restarts = 0
        self.watcher = threading.Thread(target=self.watch, name="litchi-watch", daemon=True)

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

    @property
    def alive(self) -> bool:
        return not self.fault and not self.closing

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
        with self.changed:
            if not self.members and not self.closing:
                for place in range(self.config.workers):
                    self.launch(place)
                self.watcher.start()
            self.changed.wait_for(lambda: self.fault or any(member.ready for member in self.members))
        if self.fault:
            self.close()
            raise BadInput(self.fault)
        return self

    def close(self) -> None:
        """Tell everybody that it ends, and the workers by closing their pipes."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
            members, asks = list(self.members), list(self.homeless.values())
            self.homeless.clear()
        for ask in asks:
            self.end(ask, None)
        for member in members:
            member.pipe.shut()
        for member in members:
            try:
                member.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()

    def submit(self, request: Request, put: Put, *, stream: bool) -> Ask:
        ask = Ask(next(self.numbers), request, put, stream)
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

    # ---- the life of a worker ----

    def launch(self, place: int) -> None:
        member = launched(place, self.folder, self.config)
        self.members.append(member)
        threading.Thread(target=self.listen, args=(member,), name=f"litchi-worker-{place}", daemon=True).start()

    def listen(self, member: Member) -> None:
        while (message := member.pipe.receive()) is not None:
            try:
                self.hear(member, message)
            except Exception:  # a message that cannot be read is a worker that cannot be trusted
                log.exception("worker %d said what nobody understands", member.place)
                break
        self.lost(member)

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
            case {"of": number, "end": end}:
                with self.changed:
                    ask = member.asked.pop(number, None)
                if ask is not None:
                    self.end(ask, None if end is None else error_of(end))
                if self.homeless:
                    self.settle()
            case {"beat": load}:
                if load["steps"] != member.load.get("steps") or not load["running"]:
                    member.moved = time.monotonic()
                member.load = load
            case {"ready": origin, "mode": mode}:
                self.mode = mode
                self.welcome(member, None if origin is None else Origin(**origin))
            case {"failed": [kind, text]}:
                self.give_up(text if kind == "input" else f"a worker cannot start ({kind}: {text}): see its log")

    def welcome(self, member: Member, origin: Origin | None) -> None:
        with self.changed:
            member.origin, member.ready, member.moved, self.stillborn = origin, True, time.monotonic(), 0
            self.known = origin
            self.changed.notify_all()
        self.settle()

    def lost(self, member: Member) -> None:
        """A worker's pipe has ended: it is dead or dying. Another takes its place, and others what it had begun."""
        member.process.kill()
        code = member.process.wait()
        member.pipe.shut()
        with self.changed:
            if member.ready and not self.closing:
                log.warning("worker %d ended (%s), %d unanswered; restarting it", member.place, code, len(member.asked))
            self.members.remove(member)
            orphans = list(member.asked.values())
            self.stillborn += not member.ready
            if self.stillborn >= STILLBORN:
                self.give_up(f"{STILLBORN} workers in a row ended ({code}) before they were ready: see their log")
            if self.alive:
                self.restarts += 1
                self.launch(member.place)
        for ask in orphans:
            self.save(ask, member)

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
            self.place(ask)

    def give_up(self, fault: str) -> None:
        with self.changed:
            self.fault = self.fault or fault
            waited, self.homeless = list(self.homeless.values()), OrderedDict()
            self.changed.notify_all()
        for ask in waited:
            self.end(ask, RuntimeError(fault))

    def watch(self) -> None:
        """Kill who has work and does not get on with it."""
        while True:
            with self.changed:
                if self.changed.wait_for(lambda: self.closing, timeout=1.0):
                    return
                members = [member for member in self.members if member.ready]
            for member in members:
                still = time.monotonic() - member.moved
                if still > self.config.worker_patience:
                    log.error("worker %d has done nothing for %.0f s: killed", member.place, still)
                    member.process.kill()


def launched(place: int, folder: Path, config: ServeConfig) -> Member:
    """A process that has been told what to serve."""
    ours, theirs = socket.socketpair()
    threads = max(1, (os.cpu_count() or 1) // (config.workers * config.tensor))
    process = subprocess.Popen(
        [sys.executable, "-m", "litchi.serve.member", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        start_new_session=True,  # an interrupt at the keyboard is the door's to hear
    )
    theirs.close()
    member = Member(place, process, Pipe(ours))
    told = plain(replace(config, api_key=""), type(config))
    member.pipe.send({"folder": str(folder), "serve": told, "threads": threads, "place": place})
    return member


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
