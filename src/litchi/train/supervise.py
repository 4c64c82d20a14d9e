"""Ranks are started on this machine, watched, and all started again from the last checkpoint when one is lost.

The ranks know nothing of it: they find what torchrun would have told them, in the same variables. One that dies, fails,
hangs or is far slower than the others is named in one line, and so is where it stood.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from litchi.train.blame import BAD_INPUT, INTERRUPTED, Blame, Standing, blame, forget, read_standings, straggling
from litchi.train.pace import Pace
from litchi.train.watch import FOLDER, SUPERVISED


class Process(Protocol):
    """One rank; `subprocess.Popen` is one. `poll` gives the exit code once it has ended, minus the signal if killed."""

    pid: int

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""A command, its environment, and the file that takes what it says if it is not rank 0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many ranks, and when they are given up."""

    ranks: int
    restarts: int = 3
    """Restarts in a row without a new step between them; steps that are new make it start from 0 again."""
    far_slower: float = 10.0
    """A rank that works this many times as long a step as the others has all restarted, once."""
    poll: float = 0.1
    settle: float = 3.0
    """Seconds that the other ranks have, after the first is lost, to write where they stand."""
    lag: float = 20.0
    """Seconds after its time is up at which a rank that did not end itself is ended."""


@dataclass(frozen=True, slots=True)
class End:
    """How one attempt ended: an exit code, or None to try again; the last step; and what there is to say."""

    code: int | None
    step: int = 0
    line: str = ""
    slow: tuple[int, ...] = ()


def supervise(command: Sequence[str], folder: Path, plan: Plan, start: Start | None = None) -> int:
    """Run `command` as `plan.ranks` ranks of the run in `folder`, again and again until it is done; its exit code.

    0 done, 1 given up, 2 bad input, 130 interrupted. Ctrl-C and SIGTERM go to the ranks, which save and stop.
    """
    for log in (folder / FOLDER).glob("rank_*.log"):
        log.unlink()
    restarts = futile = 0
    furthest, forgiven = -1, set[int]()
    with Orders() as orders:
        while True:
            end = attempt(command, folder, plan, start or spawn, orders, restarts, forgiven)
            if end.code is not None:
                if end.line:
                    say(end.line)
                return end.code
            futile = 0 if end.step > furthest else futile + 1
            furthest = max(furthest, end.step)
            if futile >= plan.restarts:
                say(f"{end.line}; given up after {restarts} restarts, the last {futile} without a new step")
                return 1
            restarts += 1
            forgiven |= set(end.slow)
            say(f"{end.line}; restart {restarts} from the last checkpoint")
            if orders.wait(min(30.0, 2.0**futile - 1)):
                return INTERRUPTED


def attempt(
    command: Sequence[str],
    folder: Path,
    plan: Plan,
    start: Start,
    orders: Orders,
    restarts: int,
    forgiven: set[int],
) -> End:
    """Start all ranks, attend them until they end or one is lost, and leave none."""
    board = folder / FOLDER
    board.mkdir(parents=True, exist_ok=True)
    forget(board)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    crew: dict[int, Process] = {}
    try:
        for rank in range(plan.ranks):
            place = environment(rank, plan.ranks, store.port, restarts)
            crew[rank] = start(command, place, log_path(board, rank))
        return attend(crew, board, plan, orders, forgiven)
    finally:
        dismiss(crew)


def attend(crew: Mapping[int, Process], board: Path, plan: Plan, orders: Orders, forgiven: set[int]) -> End:
    """Wait for the end of all ranks, or for the loss of one."""
    looked, overdue = 0.0, Overdue(plan)
    while True:
        orders.wait(plan.poll)
        overdue.pace.look()
        orders.pass_on(crew)
        ends = {rank: code for rank, process in crew.items() if (code := process.poll()) is not None}
        if len(ends) == len(crew) and not any(ends.values()):
            return End(0)
        if orders.given:
            if len(ends) == len(crew) or len(orders.given) > 2:
                return End(INTERRUPTED)
            continue
        if any(ends.values()):
            return lost(settled(crew, plan), board, plan, crew)
        if time.monotonic() - looked >= 1.0:
            looked = time.monotonic()
            standings = read_standings(board, plan.ranks)
            if any([overdue(s) for s in standings.values()]):
                return lost({}, board, plan, crew)
            found = straggling(standings, plan.far_slower)
            if slow := set(found.slow) - forgiven:
                return End(None, furthest_step(standings), found.line, tuple(slow))


class Overdue:
    """Whether a rank has stood where it stands for longer than its limit and the lag, as far as was seen from here."""

    def __init__(self, plan: Plan) -> None:
        self.pace, self.lag = Pace(10 * plan.poll), plan.lag
        self.stood: dict[int, tuple[float, float]] = {}
        """When each rank said that its step had begun, and what the pace was when that was first read."""

    def __call__(self, s: Standing) -> bool:
        if self.stood.get(s.rank, (None,))[0] != s.since:
            self.stood[s.rank] = s.since, self.pace.seconds
        return s.limit > 0 and self.pace.seconds - self.stood[s.rank][1] > s.limit + self.lag


def dismiss(crew: Mapping[int, Process], patience: float = 60.0) -> None:
    """Leave none; one that the kernel does not let go of, as a broken device may cause, is not waited for."""
    for process in crew.values():
        if process.poll() is None:
            process.kill()
    until = time.monotonic() + patience
    while any(process.poll() is None for process in crew.values()) and time.monotonic() < until:
        time.sleep(0.02)


def settled(crew: Mapping[int, Process], plan: Plan) -> dict[int, int]:
    """The exit codes once all ranks have ended, or have had their time to say how they stand."""
    until = time.monotonic() + plan.settle
    while True:
        ends = {rank: code for rank, process in crew.items() if (code := process.poll()) is not None}
        if len(ends) == len(crew) or time.monotonic() > until:
            return ends
        time.sleep(plan.poll)


def lost(ends: Mapping[int, int], board: Path, plan: Plan, crew: Mapping[int, Process]) -> End:
    """Name the rank at fault. What no restart mends, bad input and an interrupt, ends the run."""
    standings = read_standings(board, plan.ranks)
    limits = [s.limit for s in standings.values() if s.limit]
    found = blame(standings, plan.ranks, ends, silent=min(limits, default=60.0) / 2)
    step = furthest_step(standings)
    codes = {ends.get(rank) for rank in found.ranks} or set(ends.values())
    for final in (BAD_INPUT, INTERRUPTED):
        if final in codes:
            return End(final, step, last_words(board, found, standings))
    return End(None, step, last_words(board, found, standings) + seen_from_outside(found, crew))


def last_words(board: Path, found: Blame, standings: Mapping[int, Standing]) -> str:
    """The blame, and for a rank that ended before it could write, the last line of what it said."""
    unheard = [rank for rank in found.ranks if rank not in standings]
    if not unheard or not (path := log_path(board, unheard[0])).is_file():
        return found.line
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{found.line}: {lines[-1].strip()[:300]} ({path})" if lines else found.line


def seen_from_outside(found: Blame, crew: Mapping[int, Process]) -> str:
    """What the kernel says of a blamed process that still is: stopped (T), or in a wait that nothing ends (D)."""
    words = {"T": "; its process is stopped by a signal", "D": "; its process waits in the kernel for a device"}
    for rank in found.ranks:
        try:
            state = Path(f"/proc/{crew[rank].pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError, KeyError):
            continue
        return words.get(state, "")
    return ""


def furthest_step(standings: Mapping[int, Standing]) -> int:
    return max((s.step for s in standings.values()), default=0)


# ---- starting -----------------------------------------------------------------------------------------------------


def spawn(command: Sequence[str], place: Mapping[str, str], log: Path) -> subprocess.Popen:
    """A rank as a process of a session of its own, so that a Ctrl-C of the terminal reaches it once, through us."""
    if place["RANK"] == "0":
        return subprocess.Popen(command, env={**os.environ, **place}, start_new_session=True, stdin=subprocess.DEVNULL)
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env={**os.environ, **place},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def environment(rank: int, ranks: int, port: int, restarts: int) -> dict[str, str]:
    """What torchrun tells a rank. The store of the supervisor outlives every rank."""
    place: dict[str, object] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": restarts,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or max(1, cores() // ranks),
        SUPERVISED: 1,
    }
    return {key: str(value) for key, value in place.items()}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def log_path(board: Path, rank: int) -> Path:
    return board / f"rank_{rank:05d}.log"


def say(line: str) -> None:
    print(f"litchi: {line}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Orders:
    """Within it Ctrl-C and SIGTERM are noted, to be passed on to the ranks, one signal for one."""

    given: list[int] = field(default_factory=list)
    passed: int = 0
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Orders:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, lambda number, _: self.given.append(number))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> bool:
        """Pass time; whether an order has come that no rank has heard."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(self.given) == self.passed:
            time.sleep(min(0.1, seconds))
        return len(self.given) > self.passed

    def pass_on(self, crew: Mapping[int, Process]) -> None:
        for number in self.given[self.passed :]:
            say(f"{signal.Signals(number).name}: {len(crew)} ranks save and stop; once more stops them at once")
            for process in crew.values():
                if process.poll() is None:
                    process.send_signal(number)
        self.passed = len(self.given)
