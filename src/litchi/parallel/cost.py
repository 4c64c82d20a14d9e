"""How long a step takes, and where the time goes: work, what is exchanged and not hidden, waiting of stages.

Work is that of `anatomy`, operation by operation, at a machine's prices. Operations of a rank run one after another;
what FSDP2 exchanges is hidden behind a layer's work where the machine lets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from litchi.parallel.anatomy import Anatomy, Part, Workload, dissect
from litchi.parallel.hardware import Group, Machine
from litchi.parallel.memory import BYTES, Stage, matrices, shards, short, stage_of, tree
from litchi.parallel.mesh import AXES, SHARD, Axis, Layout, degrees
from litchi.parallel.meter import Op
from litchi.parallel.pipeline import PARTED
from litchi.parallel.stages import Action, Moment, bubble, order, rank_of, stages_per_rank, timeline

NAMES = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
"""What operations of torch's collectives are called here."""


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of a step on the rank that takes longest."""

    compute: float
    """Forward and backward passes."""
    exchange: float
    """What is exchanged and cannot be hidden."""
    waiting: float
    """A pipeline's bubble."""
    optimizer: float
    """Norm, clipping, steps, averages."""
    rows: tuple[tuple[Moment, ...], ...] = field(default=(), repr=False)
    """When each rank of a pipeline works on what."""

    @property
    def step(self) -> float:
        return self.compute + self.exchange + self.waiting + self.optimizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Seconds of a part of the network, one microbatch, one way: its work, and its exchange."""

    work: float = 0.0
    exchange: float = 0.0

    def __add__(self, other: Piece) -> Piece:
        return Piece(self.work + other.work, self.exchange + other.exchange)

    def times(self, count: float) -> Piece:
        return Piece(self.work * count, self.exchange * count)

    @property
    def seconds(self) -> float:
        return self.work + self.exchange


Ways = tuple[Piece, Piece]
"""Forwards and backwards."""


def forecast(w: Workload, layout: Layout, machine: Machine) -> Time:
    """`layout` is resolved. Raises BadInput if sizes do not divide."""
    anatomy = dissect(w, layout)
    busy = workers(w, layout, machine)
    stages = [stage_of(w, layout, rank) for rank in range(layout.pipeline)]
    ways = {name: priced(getattr(anatomy, name), layout, machine, busy) for name in ("start", "layer", "end")}
    if layout.pipeline == 1:
        working, exchange, waiting, rows = alone(w, layout, machine, stages[0], ways, busy)
    else:
        working, exchange, waiting, rows = piped(w, layout, machine, stages, ways, anatomy, busy)
    ends = max(finishing(w, layout, machine, stage, busy) for stage in stages)
    summed = max(reducing(w, layout, machine, stage, busy) for stage in stages)
    return Time(working, exchange + summed, waiting, ends, rows)


def workers(w: Workload, layout: Layout, machine: Machine) -> float:
    """Ranks of a node that are at work at once, on average: those of a pipeline wait for each other."""
    ranks = min(machine.ranks, size_of(layout))
    if layout.pipeline == 1 or machine.device == "cuda":
        return ranks
    return max(1.0, ranks * (1 - bubble(layout.schedule, layout.pipeline, w.microbatches // layout.data)))


# ---- passes -------------------------------------------------------------------------------------------------------


def alone(
    w: Workload, layout: Layout, machine: Machine, stage: Stage, ways: dict[str, Ways], busy: float
) -> tuple[float, float, float, tuple]:
    """Microbatches one after another."""
    rounds = w.microbatches // layout.data
    n = stage.count
    work = exchange = 0.0
    for way in (0, 1):
        whole = ways["start"][way] + ways["layer"][way].times(n) + ways["end"][way]
        work, exchange = work + whole.work, exchange + whole.exchange
    layer = [ways["layer"][way].seconds for way in (0, 1)]
    per_round, once = divided(layout, machine, stage, layer, busy)
    copies = counting(w, layout, machine, stage, busy)
    return rounds * work + copies, rounds * (exchange + per_round) + once, 0.0, ()


def piped(
    w: Workload,
    layout: Layout,
    machine: Machine,
    stages: Sequence[Stage],
    ways: dict[str, Ways],
    anatomy: Anatomy,
    busy: float,
) -> tuple[float, float, float, tuple]:
    """Microbatches through stages, in the order of the schedule."""
    rounds = w.microbatches // layout.data
    chunks = stages_per_rank(layout.schedule)
    last = layout.pipeline * chunks - 1
    hop = machine.collective("send", anatomy.hidden, group_of(layout, machine, "pipeline"), busy)
    taken: dict[tuple[int, int], Piece] = {}
    for rank, stage in enumerate(stages):
        mine = [s for s in range(last + 1) if holder(s, layout) == rank]
        for s, count in zip(mine, stage.layers, strict=True):
            for way in (0, 1):
                piece = ways["layer"][way].times(count)
                piece = piece + ways["start"][way] if s == 0 else piece
                piece = piece + ways["end"][way] if s == last else piece
                anew = regathered(layout, machine, stage, ways["layer"][way].seconds, busy) * count
                taken[s, way] = piece + Piece(0.0, anew + hop)

    def seconds(action: Action) -> float:
        forwards, backwards = taken[action.stage, 0].seconds, taken[action.stage, 1].seconds
        return {"forward": forwards, "backward": backwards}.get(action.work, backwards / 2)

    laid = short(rounds, layout)
    rows = timeline(order(layout.schedule, layout.pipeline, laid), seconds)
    whole = max(row[-1].stop for row in rows)
    if laid < rounds:
        before = timeline(order(layout.schedule, layout.pipeline, laid - layout.pipeline), seconds)
        whole += (rounds - laid) * (whole - max(row[-1].stop for row in before)) / layout.pipeline
    sums = [(sum(taken[s, way].work for s, way in taken if holder(s, layout) == rank)) for rank in range(len(rows))]
    sent = [(sum(taken[s, way].exchange for s, way in taken if holder(s, layout) == rank)) for rank in range(len(rows))]
    longest = max(range(len(rows)), key=lambda rank: sums[rank] + sent[rank])
    work, exchange = rounds * sums[longest], rounds * sent[longest]
    summed = max(reduced(layout, machine, stage, busy) for stage in stages) * (rounds if layout.exact else 1)
    work += max(counting(w, layout, machine, stage, busy) for stage in stages) if layout.exact else 0.0
    return (
        work,
        exchange + summed,
        max(0.0, whole - rounds * (sums[longest] + sent[longest])),
        tuple(tuple(row) for row in rows),
    )


def regathered(layout: Layout, machine: Machine, stage: Stage, layer: float, busy: float) -> float:
    """Of a layer of a pipeline's stage, each time that it is run: its weights are gathered anew with ZeRO-3."""
    if layout.zero < 3 or shards(layout) == 1 or layout.schedule in PARTED:
        return 0.0
    took = gather(layout, machine, stage.layer.full - stage.layer.whole, busy)
    return max(0.0, took - layer) if machine.overlaps else took


def reduced(layout: Layout, machine: Machine, stage: Stage, busy: float) -> float:
    """What FSDP2 exchanges in a pipeline for each microbatch, or once a step if sums need not be exact: gradients, and
    weights that stay together in between."""
    if layout.zero == 0 or shards(layout) == 1:
        return 0.0
    values = stage.total("full") - stage.total("whole")
    kept = layout.zero < 3 or layout.schedule in PARTED
    return scatter(layout, machine, values, busy) + (gather(layout, machine, values, busy) if kept else 0.0)


def holder(stage: int, layout: Layout) -> int:
    return rank_of(stage, layout.schedule, layout.pipeline)


def priced(part: Part, layout: Layout, machine: Machine, busy: float) -> Ways:
    """What a part takes, one way and the other."""
    forwards, backwards = (price(ops, layout, machine, busy) for ops in (part.forward, part.backward))
    return forwards, backwards


def price(ops: Sequence[Op], layout: Layout, machine: Machine, busy: float) -> Piece:
    work = exchange = 0.0
    for op in ops:
        if op.kind == "collective":
            group = group_of(layout, machine, axis_of(op.group, layout))
            exchange += machine.collective(NAMES.get(op.name, "all_reduce"), op.num_bytes, group, busy)
        else:
            work += machine.seconds(op, busy)
    return Piece(work, exchange)


def axis_of(group: tuple[int, ...], layout: Layout) -> Axis:
    """The axis along which ranks of a trace exchange: they lie side by side, or as far apart as inner axes are wide."""
    stride = group[1] - group[0] if len(group) > 1 else 1
    if layout.tensor > 1 and stride == 1:
        return "tensor"
    return "context" if layout.context > 1 and stride == layout.tensor else "expert"


# ---- what ZeRO exchanges ------------------------------------------------------------------------------------------


def divided(layout: Layout, machine: Machine, stage: Stage, layer: Sequence[float], busy: float) -> tuple[float, float]:
    """Seconds that FSDP2 adds and cannot hide: of each microbatch, and once a step."""
    if layout.zero == 0 or shards(layout) == 1:
        return 0.0, 0.0
    forwards, backwards = gathering(layout, machine, stage, layer, busy, stage.count)
    root = gather(layout, machine, stage.root.full, busy) + scatter(layout, machine, stage.root.full, busy)
    unit = machine.rate("unit", busy) * (stage.count + 1)
    return forwards + backwards + root + unit, 0.0


def gathering(
    layout: Layout, machine: Machine, stage: Stage, layer: Sequence[float], busy: float, count: int
) -> tuple[float, float]:
    """Of `count` layers, forwards and backwards: what a layer's own work does not hide."""
    if layout.zero == 0 or shards(layout) == 1:
        return 0.0, 0.0
    values = stage.layer.full - stage.layer.whole
    get, give = gather(layout, machine, values, busy), scatter(layout, machine, values, busy)
    again = get if layout.zero == 3 else 0.0
    if not machine.overlaps:
        return count * get, count * (again + give)
    return get + (count - 1) * max(0.0, get - layer[0]), give + (count - 1) * max(0.0, again + give - layer[1])


def gather(layout: Layout, machine: Machine, values: float, busy: float) -> float:
    """Of a unit's weights: they travel, and are copied in and out."""
    group = group_of(layout, machine, *SHARD)
    copies = passes(machine, BYTES * values, 1.5, busy)
    return machine.collective("all_gather", BYTES * values, group, busy) + copies


def scatter(layout: Layout, machine: Machine, values: float, busy: float) -> float:
    """Of a unit's gradients, over shards and then over replicas."""
    shard = shards(layout)
    name = "all_to_all" if layout.exact else "reduce_scatter"
    copies = passes(machine, BYTES * values, 1 + (1.5 if layout.exact else 0), busy)
    took = machine.collective(name, BYTES * values, group_of(layout, machine, *SHARD), busy) + copies
    return took + summing(layout, machine, BYTES * values / shard, busy, "replicate")


def summing(layout: Layout, machine: Machine, num_bytes: float, busy: float, *axes: Axis) -> float:
    """A sum over ranks, for all of them."""
    group = group_of(layout, machine, *axes)
    if group.ranks == 1:
        return 0.0
    if not layout.exact:
        return machine.collective("all_reduce", num_bytes, group, busy)
    there = machine.collective("all_to_all", num_bytes, group, busy)
    back = machine.collective("all_gather", num_bytes, group, busy)
    return there + back + passes(machine, num_bytes, 2 + tree(group.ranks), busy)


def reducing(w: Workload, layout: Layout, machine: Machine, stage: Stage, busy: float) -> float:
    """What is summed beside FSDP2: all of it where ZeRO divides nothing."""
    if layout.zero > 0 and shards(layout) > 1:
        return 0.0
    rounds = w.microbatches // layout.data if layout.exact else 1
    num_bytes = BYTES * stage.total("full")
    if degrees(layout)["replicate"] * shards(layout) == 1:
        return 0.0
    return rounds * (
        summing(layout, machine, num_bytes, busy, "replicate", *SHARD) + passes(machine, num_bytes, 2, busy)
    )


def counting(w: Workload, layout: Layout, machine: Machine, stage: Stage, busy: float) -> float:
    """Gradients of microbatches are added up, where FSDP2 does not."""
    rounds = w.microbatches // layout.data
    return (rounds - 1) * passes(machine, BYTES * stage.total("local"), 1.5, busy)


# ---- the end of a step --------------------------------------------------------------------------------------------


def finishing(w: Workload, layout: Layout, machine: Machine, stage: Stage, busy: float) -> float:
    """Norm, clipping, optimizers and averages."""
    local = stage.total("local")
    muon = stage.total("matrices") if w.muon else 0
    seconds = local * machine.rate("norm", busy) + passes(machine, BYTES * local, 1, busy)
    seconds += (local - muon) * machine.rate("adamw", busy) + w.average * local * machine.rate("average", busy)
    if size_of(layout) > 1:
        group = Group(size_of(layout), size_of(layout), min(machine.ranks, size_of(layout)))
        seconds += 5 * machine.collective("all_reduce", 8, group, busy)
    return seconds + (orthogonalising(w, layout, machine, stage, busy) if w.muon else 0.0)


def orthogonalising(w: Workload, layout: Layout, machine: Machine, stage: Stage, busy: float) -> float:
    """Muon puts matrices together from all ranks, and each rank steps them all."""
    seconds = 0.0
    for rows, columns, alike in matrices(w.model):
        count = alike * stage.count
        a, b = min(rows, columns), max(rows, columns)
        products = [(a, a, b), (a, a, a), (a, b, a)]
        ops = [Op("bmm", "product", "bfloat16", 2.0 * x * y * z, 0, (x, y, z)) for x, y, z in products]
        seconds += 5 * count * sum(machine.seconds(op, busy) for op in ops)
        seconds += passes(machine, rows * columns * count, 5 * (8 + 8 * a / b) / 2 + 20, busy)
        if layout.zero > 0:
            group = group_of(layout, machine, *SHARD)
            whole = BYTES * rows * columns / layout.tensor
            seconds += count * machine.collective("all_gather", whole, group, busy)
        if layout.tensor > 1:
            group = group_of(layout, machine, "tensor")
            seconds += count * machine.collective("all_gather", BYTES * rows * columns, group, busy)
    return seconds


# ---- places -------------------------------------------------------------------------------------------------------


def passes(machine: Machine, num_bytes: float, times: float, busy: float) -> float:
    """Seconds in which so many bytes are read and written so many times."""
    return machine.seconds(Op("copy_", "plain", "float32", 0.0, int(2 * num_bytes)), busy) * times


def group_of(layout: Layout, machine: Machine, *axes: Axis) -> Group:
    """The ranks along these axes, which lie beside each other."""
    sizes = degrees(layout)
    stride = count = 1
    for axis in reversed(AXES):
        if axis in axes:
            count *= sizes[axis]
        elif count == 1:
            stride *= sizes[axis]
    inside = max(1, min(count, machine.ranks // stride))
    return Group(count, count * stride, inside)


def size_of(layout: Layout) -> int:
    """All ranks."""
    return layout.data * layout.context * layout.tensor * layout.pipeline
