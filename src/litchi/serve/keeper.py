"""The lives of worker processes: each is started, listened to, killed if it does not get on, and started again.

A start that fails is tried again after a pause that grows; when each worker's starts have failed several times in a
row, none is tried any more. How far a start has got is what the worker says of it, so that a large checkpoint on a slow
disk may take as long as it needs.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litchi.config import BadInput, plain
from litchi.serve.pipe import Pipe
from litchi.serve.receipts import Origin
from litchi.serve.spawn import Early, Spawned, end, spawn, threads_of

if TYPE_CHECKING:
    from litchi.serve.fleet import Ask
    from litchi.serve.run import ServeConfig

log = logging.getLogger("litchi.serve")

STILLBORN = 3
"""Starts in a row of each worker that may fail before none is tried any more."""
PAUSE, MAX_PAUSE = 0.5, 60.0
"""Seconds before a start that follows a failed one; twice as many after each further."""


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
    """When it last had nothing to do, or had done something; while it starts, when it last said what it does."""
    doing: str = ""
    """What it last said that it had done, while it starts."""
    fault: str = ""
    """Why it is about to end."""

    @property
    def since(self) -> str:
        """How far its start has come."""
        return "" if self.ready else f" since it {self.doing}" if self.doing else " since it was started"


class Keeper:
    """Keeps as many workers as the config says. Who inherits says what they are for: `hear`, `orphaned`, `drop`."""

    def __init__(self, folder: Path, config: ServeConfig, early: Early | None = None) -> None:
        """`early` are processes that wait already; they are told what to serve before any other is started."""
        self.folder, self.config, self.early = folder, config, early
        self.members: list[Member] = []
        self.changed = threading.Condition(threading.RLock())
        self.due: dict[int, float] = {}
        """By its place, when a worker is to be started."""
        self.failed = Counter[int]()
        """By place, starts in a row that failed."""
        self.restarts = 0
        self.opened = self.closing = False
        """Whether any worker has ever been ready, and whether none is to be any more."""
        self.fault = ""
        """Why there are no workers any more."""
        self.ended: Callable[[str], None] = lambda fault: None
        """Whoever wants to hear of that, once it runs."""
        self.watcher = threading.Thread(target=self.watch, name="litchi-watch", daemon=True)

    @property
    def alive(self) -> bool:
        return not self.fault and not self.closing

    def hear(self, member: Member, message: dict[str, Any]) -> None:
        """Something that a worker says which is not about its start."""
        raise NotImplementedError

    def orphaned(self, member: Member) -> None:
        """A worker is dead that had been asked something."""
        raise NotImplementedError

    def drop(self, error: BaseException | None) -> None:
        """Tell all that wait for a worker that it is over."""
        raise NotImplementedError

    def begin(self) -> None:
        """Returns when one worker is ready, or has been. Raises BadInput with what it says if it cannot be."""
        with self.changed:
            if self.opened:  # a door that is about to open does not wait for another, and hears by `ended` of no more
                return
            if self.watcher.ident is None and not self.closing:
                self.due = dict.fromkeys(range(self.config.workers), 0.0)
                self.watcher.start()
            self.changed.wait_for(lambda: not self.alive or any(member.ready for member in self.members))
        if self.fault:
            self.close()
            raise BadInput(self.fault)

    def close(self) -> None:
        """Tell everybody that it ends, and the workers by closing their pipes."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
            members = list(self.members)
        self.drop(None)
        for member in members:
            if not member.ready:  # it would load to the end before it looked
                end(member.process)
            member.pipe.shut()
        for member in members:
            try:
                member.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                end(member.process)
                member.process.wait()

    # ---- the life of a worker ----

    def launch(self, place: int) -> None:
        try:
            c, found = self.config, None
            if self.early is not None:
                found = self.early.take(threads_of(c.workers, c.tensor))
            member = launched(place, self.folder, c) if found is None else told(found, place, self.folder, c)
        except OSError as error:  # no memory, no processes left
            self.failed[place] += 1
            self.again(place, f"could not be started ({error})")
            return
        self.members.append(member)
        threading.Thread(target=self.listen, args=(member,), name=f"litchi-worker-{place}", daemon=True).start()

    def listen(self, member: Member) -> None:
        while (message := member.pipe.receive()) is not None:
            try:
                if not member.ready and "doing" in message:
                    member.doing, member.moved = message["doing"], time.monotonic()
                elif not member.ready and "failed" in message:
                    self.fails(member, *message["failed"])
                else:
                    self.hear(member, message)
            except Exception:  # a message that cannot be read is a worker that cannot be trusted
                log.exception("worker %d said what nobody understands", member.place)
                break
        self.lost(member)

    def fails(self, member: Member, kind: str, text: str) -> None:
        member.fault = text if kind == "input" else f"a worker cannot start ({kind}: {text}): see its log"
        if not self.opened:  # it would fail at another try as well
            self.give_up(member.fault)

    def welcome(self, member: Member, origin: Origin | None) -> None:
        """A worker is ready."""
        with self.changed:
            member.origin, member.ready, member.moved, self.opened = origin, True, time.monotonic(), True
            self.failed[member.place] = 0
            self.changed.notify_all()

    def lost(self, member: Member) -> None:
        """A worker's pipe has ended: it is dead or dying. Another takes its place, and others what it had begun."""
        end(member.process)
        code = member.process.wait()
        member.pipe.shut()
        with self.changed:
            self.members.remove(member)
            self.failed[member.place] += not member.ready
            if self.alive:
                self.restarts += 1
                left = f", {len(member.asked)} unanswered" if member.asked else ""
                self.again(member.place, (member.fault or f"ended ({code}){member.since}") + left)
        self.orphaned(member)

    def again(self, place: int, why: str) -> None:
        """A worker is to be started again, after a pause if its start has failed, unless none ever goes well."""
        count = self.failed[place]
        if all(self.failed[each] >= STILLBORN for each in range(self.config.workers)):
            fault = f"no worker starts: each failed {STILLBORN} times in a row or more, the last, worker {place}, {why}"
            self.give_up(f"{fault}: see its log, or give it longer by serve.start_patience")
            return
        pause = min(PAUSE * 2 ** (count - 1), MAX_PAUSE) if count else 0.0
        log.warning("worker %d %s; starting it again%s", place, why, f" in {pause:.1f} s" if pause else "")
        self.due[place] = time.monotonic() + pause
        self.changed.notify_all()

    def give_up(self, fault: str) -> None:
        with self.changed:
            if self.fault:
                return
            self.fault = fault
            self.changed.notify_all()
        self.drop(RuntimeError(fault))
        self.ended(fault)

    def watch(self) -> None:
        """Start those whose time has come, and kill who does not get on with its start or its work."""
        with self.changed:
            while self.alive:
                now = time.monotonic()
                for place in [place for place, at in self.due.items() if at <= now]:
                    del self.due[place]
                    self.launch(place)
                for member in self.members:
                    still = now - member.moved
                    patience = self.config.worker_patience if member.ready else self.config.start_patience
                    if still > patience and not member.fault:
                        member.fault = f"had done nothing for {still:.0f} s{member.since}"
                        end(member.process)
                pause = max(0.0, min([1.0, *(at - now for at in self.due.values())]))
                self.changed.wait(pause)
                held = max(0.0, time.monotonic() - now - pause)
                for member in self.members:  # while this process stood still, it heard nobody
                    member.moved += held


def launched(place: int, folder: Path, config: ServeConfig) -> Member:
    """A process that has been told what to serve. Raises OSError where none can be had."""
    return told(spawn(threads_of(config.workers, config.tensor)), place, folder, config)


def told(spawned: Spawned, place: int, folder: Path, config: ServeConfig) -> Member:
    """A process that waited for it is told what to serve."""
    member = Member(place, spawned.process, Pipe(spawned.end))
    serve = plain(replace(config, api_key=""), type(config))
    member.pipe.send({"folder": str(folder), "serve": serve, "threads": spawned.threads, "place": place})
    return member
