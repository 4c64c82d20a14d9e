"""Which layers each stage of a pipeline holds, in what order its ranks work, and how long they wait; all before a run.

A stage is a row of layers. Stages follow each other from rank to rank, in a loop, or down and up again (V).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal

from torch import nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from litchi.config import BadInput
from litchi.model.network import ModelConfig
from litchi.model.vision import Tower
from litchi.parallel.mesh import Schedule

SCHEDULES: dict[Schedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "loop": ScheduleLoopedBFS,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}

Work = Literal["forward", "backward", "input", "weight"]
"""`backward` is both of `input` (the gradient that goes to the stage before) and `weight`."""


@dataclass(frozen=True, slots=True)
class Action:
    """One stage works on one microbatch."""

    work: Work
    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Moment:
    """An action and when it took place, in seconds."""

    action: Action
    begin: float
    stop: float


# ---- who holds what -----------------------------------------------------------------------------------------------


def stages_per_rank(schedule: Schedule) -> int:
    """What a schedule needs, or, where it takes any number above 1, the least."""
    return 1 if schedule in ("gpipe", "1f1b") else 2


def rank_of(stage: int, schedule: Schedule, ranks: int) -> int:
    """Where a stage lies: ranks are dealt stages in turn; in a V the second half goes back."""
    lap, place = divmod(stage, ranks)
    return ranks - 1 - place if schedule in ("zbv", "dualpipev") and lap % 2 else place


def check_microbatches(schedule: Schedule, ranks: int, microbatches: int, readers: int) -> None:
    """Raises BadInput if a schedule cannot run so many microbatches; each of `readers` ranks reads that many."""
    least = {"1f1b": ranks, "dualpipev": 2 * ranks}.get(schedule, 1)
    rounds = max(1, microbatches // ranks)
    fits = microbatches - microbatches % rounds
    name, now = f"the schedule {schedule} over {ranks} ranks", f"train.num_accumulate={microbatches * readers}"
    if microbatches < least:
        raise BadInput(f"{now} is too few for {name}: set it to {least * readers} or more")
    if schedule in ("interleaved", "zero_bubble") and fits != microbatches:
        up = -(-microbatches // ranks) * ranks
        raise BadInput(f"{now} is not a whole number of rounds of {name}: set it to {up * readers}")


def deal(c: ModelConfig, num_stages: int, *, sight: float = 0.5) -> list[range]:
    """The layers of each stage, so that the dearest stage costs as little as can be.

    The first stage also reads (a vision tower may fill it, so that it holds no layer), the last one has the heads.
    `sight` is the share of tokens that a tower makes. Raises BadInput if layers do not suffice, or if those that read
    deep rows of a tower (DeepStack) would not all lie in the first stage.
    """
    before, layer, after = costs(c, sight)
    deep = max((len(kind.deep) for kind in c.modalities.values() if isinstance(kind, Tower)), default=0)
    floor = [max(deep, 0 if before > layer else 1)] + [1] * (num_stages - 1)
    if num_stages > 1 and after > layer:
        floor[-1] = 0
    if sum(floor) > c.num_layers:
        said = f"the first {deep} layers read deep rows of a tower and must stay together; " if deep > 1 else ""
        raise BadInput(
            f"{said}{c.num_layers} layers cannot be dealt to {num_stages} stages: lower train.layout.pipeline"
        )
    extra = [before, *[0.0] * (num_stages - 2), after] if num_stages > 1 else [before + after]
    bounds = cut(c.num_layers, floor, lambda stage, count: extra[stage] + layer * count)
    return [range(a, b) for a, b in zip([0, *bounds], bounds, strict=False)]


def cut(length: int, floor: Sequence[int], cost: Callable[[int, int], float]) -> list[int]:
    """Where rows of at least `floor` things end, so that the largest cost, and then the sum of squares, is least.

    Early rows are the shorter ones, since first stages keep most microbatches.
    """
    best: list[dict[int, tuple[float, float, tuple[int, ...]]]] = [{0: (0.0, 0.0, ())}]
    for stage, least in enumerate(floor):
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (most, squares, ends) in best[-1].items():
            for end in range(start + least, length + 1):
                here = cost(stage, end - start)
                candidate = (max(most, here), squares + here * here, (*ends, end))
                if end not in found or candidate < found[end]:
                    found[end] = candidate
        best.append(found)
    return list(best[-1][length][2])


def costs(c: ModelConfig, sight: float) -> tuple[float, float, float]:
    """Multiplications a token of the forward pass: before the trunk, in one layer, after the trunk.

    Attention between tokens is left out: it is alike in all layers. Of a head of words every token is counted.
    """
    attention = c.width * c.head_width * (2 * c.num_heads + 2 * c.num_kv_heads)
    matrices = 3 if c.activation == "silu" else 2
    wide = c.mlp_width if c.mixture is None else c.mixture.num_chosen * c.mixture.width
    before = 0.0
    for kind in c.modalities.values():
        if isinstance(kind, Tower):
            patch = kind.num_layers * (4 * kind.width**2 + 2 * kind.width * (kind.mlp_width or 4 * kind.width))
            before += sight * kind.merge**2 * (patch + kind.channels * kind.width)
    return before, float(attention + matrices * c.width * wide), float(c.vocab_size * c.width)


# ---- in what order ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def order(schedule: Schedule, ranks: int, microbatches: int, chunks: int = 0) -> list[list[Action]]:
    """What each rank does, one after the other; nothing is run. `chunks` are stages of a rank, 0 for `stages_per_rank`.

    Read from torch's schedules, but for 1F1B, of which torch 2.13 runs another order than it tells.
    """
    if schedule == "1f1b":
        return [alternating(rank, ranks, microbatches) for rank in range(ranks)]
    chunks = chunks or stages_per_rank(schedule)
    stage = SimpleNamespace(num_stages=ranks * chunks, group_size=ranks, group_rank=0, submod=nn.Identity())
    planned = SCHEDULES[schedule](stage if schedule == "gpipe" else [stage] * chunks, microbatches).pipeline_order
    return [[action for step in planned[rank] for action in parts(step)] for rank in range(ranks)]


def alternating(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """As many forwards as there are stages from here to the last; then backward and forward in turn."""
    ahead = min(microbatches, ranks - rank)
    row = [Action("forward", rank, m) for m in range(ahead)]
    for m in range(microbatches):
        row.append(Action("backward", rank, m))
        row += [Action("forward", rank, m + ahead)] if m + ahead < microbatches else []
    return row


def parts(step: Any) -> list[Action]:
    """Ours of one of torch's actions: those of a pair that may overlap run one after the other."""
    if step is None:
        return []
    if step.sub_actions is not None:
        return [action for sub in step.sub_actions for action in parts(sub)]
    kinds: dict[str, Work] = {"F": "forward", "B": "backward", "I": "input", "W": "weight"}
    work = kinds.get(step.computation_type.value)
    return [] if work is None else [Action(work, step.stage_index, step.microbatch_index)]


def timeline(planned: Sequence[Sequence[Action]], seconds: Callable[[Action], float]) -> list[list[Moment]]:
    """When each rank does what, if sending takes no time: an action waits for its rank and for the stages beside it."""
    last = max(action.stage for row in planned for action in row)
    done: dict[tuple[str, int, int], float] = {}
    rows: list[list[Moment]] = [[] for _ in planned]
    while any(len(row) < len(todo) for row, todo in zip(rows, planned, strict=True)):
        before = len(done)
        for row, todo in zip(rows, planned, strict=True):
            while len(row) < len(todo):
                action = todo[len(row)]
                waits = needs(action, last)
                if any(need not in done for need in waits):
                    break
                begin = max([row[-1].stop if row else 0.0, *(done[need] for need in waits)])
                stop = begin + seconds(action)
                row.append(Moment(action, begin, stop))
                done[settled(action)] = stop
        if len(done) == before:
            raise ValueError("this order of actions never ends: a rank waits for what comes after it")
    return rows


def settled(action: Action) -> tuple[str, int, int]:
    """What others wait for: a gradient that goes back is there after `backward` as after `input`."""
    work = "input" if action.work == "backward" else action.work
    return work, action.stage, action.microbatch


def needs(action: Action, last: int) -> list[tuple[str, int, int]]:
    stage, m = action.stage, action.microbatch
    match action.work:
        case "forward":
            return [("forward", stage - 1, m)] if stage else []
        case "weight":
            return [("input", stage, m)]
        case _:
            return [("forward", stage, m), *([("input", stage + 1, m)] if stage < last else [])]


# ---- how long they wait -------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def bubble(schedule: Schedule, ranks: int, microbatches: int) -> float:
    """The share of time that ranks wait, on average, if stages are alike and `forward`, `input` and `weight` take as
    long as each other; (ranks - 1) / (microbatches + ranks - 1) for GPipe (arXiv:1811.06965).

    Below two microbatches a rank the others have no such form, and are laid out in time.
    """
    if schedule in ("gpipe", "1f1b") or microbatches >= 2 * ranks:
        work = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "loop": 2}.get(schedule, 6)
        return (ranks - 1) / (work * microbatches + ranks - 1)
    rows = timeline(order(schedule, ranks, microbatches), lambda action: 2.0 if action.work == "backward" else 1.0)
    return sum(idle(row, 0.0, max(r[-1].stop for r in rows)) for row in rows) / ranks


def idle(row: Sequence[Moment], begin: float, stop: float) -> float:
    """The share of a span of time in which none of these took place."""
    return 1 - sum(moment.stop - moment.begin for moment in row) / (stop - begin)
