"""Where each rank stands, as it writes of itself, and which of them the others wait for or died of.

A rank that is lost shows on the others: they wait in a collective, or fail in one. So whoever is to blame is the rank
that does not stand where the others stand.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from litchi.config import BadInput, from_json, to_json

HUNG = 75
"""Exit code of a rank whose step did not end in time (EX_TEMPFAIL: trying again may help)."""
BAD_INPUT, INTERRUPTED = 2, 130
"""Exit codes of `litchi` that no restart mends."""


PAGE = 4096
"""Bytes that a standing takes, so that its file is written at once and keeps its size."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one rank stands. Times are seconds of Unix time."""

    rank: int
    host: str
    pid: int
    step: int = 0
    """The last step that ended."""
    phase: str = "start"
    since: float = 0.0
    """When that step ended, or this phase began."""
    at: float = 0.0
    """When this was written."""
    limit: float = 0.0
    """Seconds after `since` at which the rank ends itself."""
    line: str = ""
    """The line of code of its main thread, outside torch: "src/litchi/train/step.py:50 in train_step"."""
    collective: str = ""
    """What it waits in, such as "all_reduce"; empty where it does not wait for others."""
    module: str = ""
    """The part of the network that it computes, such as "layers.3.mlp"; empty outside a forward."""
    issued: dict[str, int] = field(default_factory=dict)
    """Collectives that it has entered, by process group."""
    own: float = 0.0
    """Seconds a step that it does not wait for others; 0 is not known yet."""
    failure: str = ""
    """The exception that ended it."""


@dataclass(frozen=True, slots=True)
class Blame:
    """The ranks that are at fault, and one line that says why; no ranks where none differs from the others."""

    ranks: tuple[int, ...]
    line: str


def blame(standings: Mapping[int, Standing], size: int, ends: Mapping[int, int], *, silent: float) -> Blame:
    """Which of `size` ranks is at fault that a run ended or hangs.

    `ends` holds the exit codes (minus the signal, if killed by one) of those whose process has ended. A rank that runs
    and has not been heard of for `silent` seconds is stopped, or stuck in code that holds the interpreter.
    """
    killed = [rank for rank, code in sorted(ends.items()) if code < 0]
    if killed:
        return Blame(tuple(killed), say_killed(killed[0], ends[killed[0]], standings))
    failed = [rank for rank, code in ends.items() if code not in (0, HUNG)] or [
        rank for rank, standing in standings.items() if standing.failure
    ]
    alone = [rank for rank in failed if rank not in standings or not standings[rank].collective]
    if alone:  # who fails inside a collective most often fails because another has
        first = min(alone, key=lambda rank: (standings[rank].at if rank in standings else 0.0, rank))
        return Blame((first,), say_failed(standings.get(first), first, ends.get(first)))
    return blame_hang(standings, size, ends, silent=silent)


def blame_hang(standings: Mapping[int, Standing], size: int, ends: Mapping[int, int], *, silent: float) -> Blame:
    """Whom the others wait for: a rank never heard of, silent, outside their collective, behind, or in another one."""
    missing = tuple(rank for rank in range(size) if rank not in standings)
    if missing:
        names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        return Blame(missing, f"{names} did not begin: no word from {'it' if len(missing) == 1 else 'them'}")
    newest = max(s.at for s in standings.values())
    running = [s for rank, s in standings.items() if rank not in ends and s.phase != "done" and not s.failure]
    quiet = [s for s in running if newest - s.at > silent]
    waiting = [s for s in standings.values() if s.collective and s not in quiet]
    if quiet:
        s, step = min(quiet, key=lambda s: s.at), 1 + max(s.step for s in standings.values())
        why = "stopped, or stuck in code that holds the interpreter"
        said = f"{name(s)} has been silent for {newest - s.at:.0f} s in step {step}: {why}; last seen {place(s)}"
        return Blame((s.rank,), said + said_without(s, waiting))
    outside = [s for s in standings.values() if not s.collective]
    suspects = outside if waiting and outside else list(standings.values())
    behind = set(hindmost(standings)) & {s.rank for s in suspects}
    if behind or (waiting and outside) or size == 1:
        s = min((s for s in suspects if not behind or s.rank in behind), key=lambda s: (s.step, s.since, s.rank))
        verb = "has ended" if s.phase == "done" else "hangs"
        said = f"{name(s)} {verb} {place(s)}, for {newest - s.since:.0f} s"
        return Blame((s.rank,), said + said_without(s, waiting))
    return blame_place(list(standings.values()))


def blame_place(standings: Sequence[Standing]) -> Blame:
    """All wait, or all work: the few that stand elsewhere than the many."""
    stood = Counter((s.collective, s.line) for s in standings).most_common()
    few = [s for s in standings if (s.collective, s.line) != stood[0][0]]
    if few and (len(stood) == 1 or stood[0][1] > stood[1][1]):
        rest = [s for s in standings if s not in few]
        return Blame(tuple(s.rank for s in few), f"{name(few[0])} stands {place(few[0])}; {said_of(rest)}")
    if few:
        both = "; ".join(f"{name(s)} {place(s)}" for s in standings[:4])
        return Blame((), f"ranks stand in different places and none is in the majority: {both}")
    hosts = ", ".join(sorted({s.host for s in standings}))
    return Blame((), f"all ranks stand {place(standings[0])}: look at what connects {hosts}")


def hindmost(standings: Mapping[int, Standing]) -> list[int]:
    """Ranks that others wait for and that wait for none, by how many collectives of a group each has entered."""
    waits: dict[int, set[int]] = {rank: set() for rank in standings}
    for group in {group for s in standings.values() for group in s.issued}:
        members = [s for s in standings.values() if group in s.issued]
        for s in members:
            waits[s.rank] |= {other.rank for other in members if other.issued[group] < s.issued[group]}
    awaited = set().union(*waits.values()) if waits else set()
    return sorted(rank for rank in awaited if not waits[rank])


# ---- slow ranks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Straggling:
    """How unevenly ranks work: their longest own time a step over the mean, and those that are slow."""

    ratio: float
    slowest: int
    slow: tuple[int, ...]
    line: str
    """Names the slowest; empty if none is slow."""


def straggling(standings: Mapping[int, Standing], factor: float) -> Straggling:
    """A rank is slow whose own time is over `factor` times the median of the others'."""
    known = {rank: s.own for rank, s in standings.items() if s.own > 0}
    if len(known) < 2:
        return Straggling(1.0, 0, (), "")
    slowest = max(known, key=lambda rank: (known[rank], -rank))

    def usual(rank: int) -> float:
        return max(1e-3, statistics.median(own for other, own in known.items() if other != rank))

    slow = tuple(rank for rank, own in sorted(known.items()) if own > factor * usual(rank))
    line = ""
    if slow:
        own, theirs = known[slowest], usual(slowest)
        line = f"{name(standings[slowest])} is slow: {own:.3g} s of work a step, {own / theirs:.1f} times the others"
    return Straggling(known[slowest] / statistics.fmean(known.values()), slowest, slow, line)


# ---- files --------------------------------------------------------------------------------------------------------


def standing_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def write_standing(folder: Path, standing: Standing) -> None:
    """In place and in one write: another machine sees a change of a file sooner than another file in its place."""
    data = to_json(standing).encode()
    handle = os.open(standing_path(folder, standing.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, data.ljust(PAGE), 0)
        os.ftruncate(handle, max(len(data), PAGE))
    finally:
        os.close(handle)


def read_standings(folder: Path, size: int) -> dict[int, Standing]:
    """What the ranks wrote last; those that have not written are left out. One that is half written is read again."""
    found = {}
    for rank in range(size):
        for _ in range(3):
            try:
                found[rank] = from_json(Standing, standing_path(folder, rank).read_text(encoding="utf-8"))
                break
            except BadInput:
                time.sleep(0.01)
            except OSError:
                break
    return found


def forget(folder: Path) -> None:
    """Clear away what ranks of an earlier attempt wrote of themselves."""
    for path in folder.glob("rank_*.json"):
        path.unlink(missing_ok=True)


# ---- words --------------------------------------------------------------------------------------------------------


def name(s: Standing) -> str:
    return f"rank {s.rank} ({s.host}, process {s.pid})"


def place(s: Standing) -> str:
    """ "in step 42 in all_reduce at src/litchi/parallel/collectives.py:30 in total (layers.3)"."""
    step = f"in step {s.step + 1}" if s.phase in ("train", "start") else f"after step {s.step} ({s.phase})"
    line = f"{'in ' + s.collective + ' ' if s.collective else ''}{'at ' + s.line if s.line else ''}".strip()
    return " ".join(part for part in (step, line, s.module and f"({s.module})") if part)


def said_without(blamed: Standing, waiting: Sequence[Standing]) -> str:
    others = [s for s in waiting if s is not blamed]
    return f"; {said_of(others)}" if others else ""


def said_of(waiting: Sequence[Standing]) -> str:
    """What most of those that wait wait in."""
    (collective, line), _ = Counter((s.collective, s.line) for s in waiting).most_common(1)[0]
    ranks = [str(s.rank) for s in waiting if (s.collective, s.line) == (collective, line)]
    who = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {who} wait{'s' * (len(ranks) == 1)} in {collective} at {line}"


def say_killed(rank: int, code: int, standings: Mapping[int, Standing]) -> str:
    """It had no time to write, so that the step is that of the others, and its place what was seen last."""
    signal = Signals(-code).name if -code in set(Signals) else f"signal {-code}"
    hint = " (the kernel kills so when memory runs out)" if signal == "SIGKILL" else ""
    if rank not in standings:
        return f"rank {rank} was killed by {signal}{hint} before it began"
    s, step = standings[rank], 1 + max(s.step for s in standings.values())
    return f"{name(s)} was killed by {signal}{hint} in step {step}; last seen {place(s)}, {lasted(s)}"


def say_failed(s: Standing | None, rank: int, code: int | None) -> str:
    if s is None:
        return f"rank {rank} ended with code {code} before it began"
    return f"{name(s)} failed {place(s)}, {lasted(s)}: {s.failure or f'exit code {code}'}"


def lasted(s: Standing) -> str:
    return f"{max(0.0, (s.at or time.time()) - s.since):.0f} s into it"
