"""A rank tells while it trains where it stands, and ends itself when a step does not end.

A thread looks at the main thread a few times a second. What it sees goes into one small file a rank in the folder of
the run, which all ranks share; nothing is sent, so that it works when sending does not.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import nn

from litchi.config import BadInput
from litchi.parallel.mesh import World
from litchi.train.blame import (
    HUNG,
    Standing,
    Straggling,
    blame,
    read_standings,
    standing_path,
    straggling,
    write_standing,
)
from litchi.train.calls import Stack, shown, stack_of, stacks, walk
from litchi.train.pace import Pace

FOLDER = "ranks"
"""Below the folder of a run, where ranks write of themselves."""
SUPERVISED = "LITCHI_SUPERVISED"
"""Set for ranks whose supervisor reads what they write and says it once."""
SETTLED = 3
"""Steps after which the time of a step is known: the first ones compile and allocate."""
STALL = 10
"""Looks that a pause between two of them counts as at most: longer ones are pauses of the whole machine."""
SAMPLES = 20
"""Looks at the main thread that make one measurement of how long it waits for others."""
TORCH = os.path.dirname(torch.__file__) + os.sep
LITCHI = str(Path(__file__).parents[1]) + os.sep
LIBRARIES = tuple({os.path.dirname(os.__file__) + os.sep, str(Path(TORCH).parent) + os.sep})
"""Where Python and its packages are, to which a line is only traced if nothing else is left."""
COLLECTIVES = tuple(
    os.path.join(TORCH, "distributed", *path.split("/"))
    for path in (
        "distributed_c10d.py",
        "_functional_collectives.py",
        "nn/functional.py",
        "fsdp/_fully_shard/_fsdp_collectives.py",
    )
)
"""A main thread whose innermost lines are in one of these waits for other ranks."""
FSDP = COLLECTIVES[-1]
WAITS = {"wrapper", "_maybe_wrap_tensor", "wait_tensor", "trigger_wait", "__torch_dispatch__"}
"""Functions of those files whose names do not say what is waited for."""


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """When a rank counts as hung or slow. Nothing here changes what is learned."""

    hang_after: float = 0.0
    """Seconds without the end of a step after which a rank ends itself; 0 is 20 median steps, and at least 60 s. A
    process that is alone then only says where it stands, unless a number is given here."""
    patience: float = 1800.0
    """The same for the first steps, which compile, and for whatever is no step, such as a save."""
    slow: float = 1.5
    """A rank is named that works this many times as long a step as the others."""
    beat: float = 1.0
    """Seconds between two reports; more where there are more than 64 ranks, for the sake of the file system."""
    sample: float = 0.05
    """Seconds between two looks at the main thread."""
    grace: float = 3.0
    """Seconds that a rank which gives up leaves the others to write where they stand."""


class Watch:
    """Around the loop of training. The loop calls `step` after each step, and `during` around what is no step."""

    def __init__(
        self, world: World, folder: Path, config: WatchConfig | None = None, model: nn.Module | None = None
    ) -> None:
        """`model` lets reports name the part of the network a rank computes."""
        self.config = WatchConfig() if config is None else config
        self.rank, self.size, self.folder = world.rank, world.size, folder / FOLDER
        self.names = {} if model is None else {id(m): name for name, m in model.named_modules()}
        self.host, self.parent = socket.gethostname(), os.getppid()
        self.ended, self.now = 0, "start"
        self.pace = Pace(STALL * self.config.sample)
        self.since, self.mark, self.seen = time.time(), time.monotonic(), 0.0
        self.times: deque[float] = deque(maxlen=50)
        self.shares = Shares()
        self.straggling = Straggling(1.0, 0, (), "")
        self.named: tuple[int, ...] = ()
        self.over = threading.Event()
        self.main = threading.main_thread().ident
        self.thread = threading.Thread(target=self.look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(self.standing())
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over.set()
        self.thread.join()
        failed = error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit))
        if not failed:
            self.now = "done"
            self.write(self.standing())
            return
        line, collective = locate(stack_of(trace))
        said = " ".join(str(error).split())[:300]
        failure = f"{type(error).__name__}: {said}" if said else type(error).__name__
        self.write(self.standing(line=line, collective=collective, failure=failure))

    def step(self, number: int) -> None:
        """Step `number` has ended."""
        before = self.mark
        self.ended = number
        if self.now == "train":
            seconds = time.monotonic() - before
            self.times.append(seconds)
            self.shares.step(seconds)
        self.turn("train")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within it the main thread does something that is no step ("save") and may take long."""
        self.turn(phase)
        yield
        self.turn("train")

    def turn(self, phase: str) -> None:
        self.now, self.since, self.mark, self.seen = phase, time.time(), time.monotonic(), self.pace.seconds

    def row(self) -> dict[str, float]:
        """For the metrics of rank 0: seconds a step of its own work, and the longest of all ranks over their mean."""
        found = self.straggling
        if self.size == 1 or not self.shares.own:
            return {}
        return {"own_seconds": self.shares.own, "straggling": found.ratio, "slowest_rank": found.slowest}

    def limit(self) -> float:
        """Seconds that what the main thread does now may take."""
        if self.now != "train" or len(self.times) < SETTLED:
            return self.config.patience
        return self.config.hang_after or max(60.0, 20 * statistics.median(self.times))

    # ---- the thread ----

    def look(self) -> None:
        """Sample, report, and watch the clock until the loop is over."""
        every = max(self.config.beat, self.size / 64)
        report = compare = 0.0
        while not self.over.wait(self.config.sample):
            line, collective = self.located()
            if self.now == "train":
                self.shares.sample(bool(collective))
            now = time.time()
            if now >= report:
                report = now + every
                self.write(self.standing(line=line, collective=collective))
            if self.rank == 0 and self.size > 1 and now >= compare:
                compare = now + 10 * every
                self.compare()
            if self.pace.look() - self.seen > self.limit():
                self.give_up()
            if SUPERVISED in os.environ and os.getppid() != self.parent:
                os._exit(HUNG)  # nobody is left who would end or restart this rank

    def compare(self) -> None:
        """Name a slow rank, once."""
        self.straggling = straggling(read_standings(self.folder, self.size), self.config.slow)
        if self.straggling.slow != self.named and self.straggling.line:
            print(f"litchi: {self.straggling.line}", file=sys.stderr, flush=True)
        self.named = self.straggling.slow

    def give_up(self) -> None:
        """Write where this rank stands, name whom it waits for, and end the process so that all are started again."""
        line, collective = self.located()
        self.write(self.standing(line=line, collective=collective, module=self.module()))
        with suppress(OSError):  # a full disk must not keep it from ending
            standing_path(self.folder, self.rank).with_suffix(".trace").write_text(shown(stacks()))
        time.sleep(self.config.grace)
        standings = read_standings(self.folder, self.size)
        silent = self.limit() / 2
        newest = max((s.at for s in standings.values()), default=0.0)
        speaker = min((rank for rank, s in standings.items() if newest - s.at <= silent), default=self.rank)
        if speaker == self.rank and SUPERVISED not in os.environ:
            print(f"litchi: {blame(standings, self.size, {}, silent=silent).line}", file=sys.stderr, flush=True)
        if self.size > 1 or SUPERVISED in os.environ or self.config.hang_after:
            os._exit(HUNG)
        # Nobody waits for it and nobody would start it again: perhaps it is in a debugger.
        self.seen = self.pace.seconds

    def standing(self, line: str = "", collective: str = "", module: str = "", failure: str = "") -> Standing:
        return Standing(
            rank=self.rank,
            host=self.host,
            pid=os.getpid(),
            step=self.ended,
            phase=self.now,
            since=self.since,
            at=time.time(),
            limit=self.limit(),
            line=line,
            collective=collective,
            module=module,
            issued=issued(),
            own=self.shares.own,
            failure=failure,
        )

    def write(self, standing: Standing) -> None:
        """A full disk must not end training, so that it is let pass."""
        try:
            write_standing(self.folder, standing)
        except OSError:
            pass

    def located(self) -> tuple[str, str]:
        """The line and the collective of the main thread, or of a thread that runs backward for it."""
        threads = stacks()
        main = threads.get(self.main or 0, ())
        line, collective = locate(main)
        if not collective and any(call.function == "_engine_run_backward" for call in main):
            for ident, stack in threads.items():
                if ident not in (self.main, threading.get_ident()) and (found := locate(stack))[1]:
                    return found
        return line, collective

    def module(self) -> str:
        """The innermost module of the network whose forward the main thread, which hangs, is in."""
        for variables in walk(self.main or 0, attrgetter("f_locals")):
            found = variables.get("self")
            if isinstance(found, nn.Module):
                return self.names.get(id(found)) or type(found).__name__
        return ""


class Shares:
    """How long the main thread works by itself a step: the time of steps, less the share of looks that saw it wait.

    A measurement takes SAMPLES looks and at least one step; `own` is the median of the last ones, at least five, so
    that a hiccup makes no straggler. On a GPU the main thread waits for kernels and not in collectives: there all ranks
    look alike.
    """

    def __init__(self) -> None:
        self.own = 0.0
        self.measured: deque[float] = deque(maxlen=9)
        self.looks = self.waits = self.steps = 0
        self.seconds = 0.0

    def sample(self, waits: bool) -> None:
        self.looks, self.waits = self.looks + 1, self.waits + waits

    def step(self, seconds: float) -> None:
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        if self.looks >= SAMPLES:
            self.measured.append(max(1e-6, self.seconds / self.steps * (1 - self.waits / self.looks)))
            self.own = statistics.median(self.measured) if len(self.measured) >= 5 else 0.0
            self.looks = self.waits = self.steps = 0
            self.seconds = 0.0


# ---- lines --------------------------------------------------------------------------------------------------------


def locate(stack: Stack) -> tuple[str, str]:
    """The innermost line that is nobody's library, and the collective that is waited in ("" if none).

    A line that waits for work that was begun earlier (`work.wait()`) counts as the collective "wait".
    """
    collective = innermost = ""
    for call in stack:
        path, function = call.path, call.function
        if not innermost and path in COLLECTIVES:
            known = collective not in ("", "wait")
            if not known or path != FSDP:  # the outermost is what was called, and FSDP calls the well-known ones
                collective = function if function not in WAITS else collective or "wait"
        elif not path.startswith((TORCH, "<frozen")):
            if not innermost and not collective and ".wait(" in call.source:
                collective = "wait"
            line = f"{shorten(path)}:{call.number} in {function}"
            innermost = innermost or line
            if path.startswith(LITCHI) or not path.startswith(LIBRARIES):
                return line, collective
    return innermost, collective


def shorten(path: str) -> str:
    """As seen from the folder where the command was started."""
    here = os.getcwd() + os.sep
    return path[len(here) :] if path.startswith(here) else path.rpartition("site-packages" + os.sep)[2]


def issued() -> dict[str, int]:
    """Collectives that this rank has entered, by the name of the process group."""
    if not dist.is_initialized():
        return {}
    found: dict[str, int] = {}
    for group, name in list(dist.distributed_c10d._world.pg_names.items()):
        try:
            found[name] = group._get_sequence_number_for_group()
        except RuntimeError:
            continue  # a backend that does not count
    return found


def await_path(path: Path, patience: float = 3600.0) -> None:
    """Wait for a file or folder that rank 0 makes for all. Raises BadInput if it does not come."""
    until = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > until:
            raise BadInput(f"{path} did not appear in {patience:.0f} s: is the folder shared by all machines?")
        time.sleep(0.2)
