"""Every legal layout of a cluster, what each would need and take, the best of them, and why it is that one.

Nothing is run but a trace of each part of the network on fake ranks. On published figures of a machine the plan is a
simulation and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from litchi.config import BadInput
from litchi.model.layout import check
from litchi.parallel import cost, memory
from litchi.parallel.anatomy import Workload
from litchi.parallel.cost import Time
from litchi.parallel.hardware import Machine
from litchi.parallel.memory import Memory
from litchi.parallel.mesh import Layout, resolve
from litchi.parallel.stages import check_microbatches, stages_per_rank

ROOM = 0.92
"""Of a GPU's memory, what tensors may fill: the rest is the driver's, the libraries', and holes."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout, what it needs and what it takes."""

    layout: Layout
    memory: Memory
    time: Time
    fits: bool

    @property
    def name(self) -> str:
        return say(self.layout)


@dataclass(frozen=True, slots=True)
class Plan:
    """Choices from best to worst: those that fit come first, by the time of a step."""

    workload: Workload
    machine: Machine
    ranks: int
    choices: tuple[Choice, ...]
    refused: dict[str, int]
    """Why layouts are not legal, and how many."""

    @property
    def best(self) -> Choice:
        """Raises BadInput, naming what comes nearest, if nothing fits."""
        if not self.choices or not self.choices[0].fits:
            said = "no layout is legal" if not self.choices else self.nearest()
            raise BadInput(f"{said}: give more ranks, fewer rows, or --recompute full")
        return self.choices[0]

    def nearest(self) -> str:
        least = min(self.choices, key=lambda c: c.memory.peak)
        need, have = least.memory.peak / 1e9, self.room / 1e9
        return f"no layout fits: {least.name} needs {need:.0f} GB of {have:.0f}"

    @property
    def room(self) -> float:
        return room(self.machine)

    def tokens_per_second(self, choice: Choice) -> float:
        w = self.workload
        return w.tokens * w.microbatches / choice.time.step

    def dollars(self, choice: Choice, tokens: float = 1e9) -> float:
        """Of so many tokens."""
        return self.ranks * self.machine.price / 3600 * tokens / self.tokens_per_second(choice)

    def utilisation(self, choice: Choice) -> float:
        """Floating-point operations of the model alone, as a share of the peak of its largest products."""
        peak = max(p.rate for r in self.machine.rates for p in r.products if p.dtype == kind_of(self.workload))
        published = self.machine.shares.get("products", 1.0)
        return flops(self.workload) / choice.time.step / self.ranks / (peak / published)


def legal(w: Workload, layout: Layout, ranks: int) -> str | None:
    """Why these ranks cannot be laid out so for this work, naming the size that does not divide; None if they can."""
    try:
        refuse(w, resolve(layout, ranks))
    except BadInput as error:
        return str(error)
    return None


def refuse(w: Workload, layout: Layout) -> None:
    """Raises BadInput as the network's own placement would, before anything is built."""
    c = w.model
    check(c, layout.tensor, 1)
    if c.mixture is not None and c.mixture.width % layout.tensor:
        raise BadInput(f"experts of width {c.mixture.width} cannot be divided over {layout.tensor} ranks")
    if layout.expert > 1 and (c.mixture is None or c.mixture.num_experts % layout.expert):
        count = 0 if c.mixture is None else c.mixture.num_experts
        raise BadInput(f"{count} experts cannot be shared out over {layout.expert} ranks")
    heads = c.num_heads // layout.tensor
    if layout.attention == "ulysses" and heads % layout.context:
        raise BadInput(f"{heads} heads of a rank cannot be dealt to {layout.context} ranks of context")
    pieces = layout.context * (1 if layout.attention == "ulysses" or layout.context == 1 else 2)
    shared = layout.tensor if layout.sequence else 1
    if w.tokens % pieces or w.tokens // layout.context % shared:
        raise BadInput(f"{w.tokens} tokens cannot be shared out over {layout.context} x {shared} ranks")
    if w.microbatches % layout.data:
        raise BadInput(f"{w.microbatches} microbatches cannot be shared out over {layout.data} ranks that read")
    if layout.pipeline > 1:
        rounds = w.microbatches // layout.data
        check_microbatches(layout.schedule, layout.pipeline, rounds, layout.data)
        memory.dealt_layers(memory.whole_name(c), layout.pipeline * stages_per_rank(layout.schedule))


def candidates(w: Workload, machine: Machine, ranks: int, like: Layout) -> Iterator[Layout]:
    """Layouts worth a thought; what `like` says of exactness, and of how ranks share tokens, is kept."""
    inside = min(machine.ranks, ranks)
    for tensor in powers(inside):
        for context in powers(min(16, ranks // tensor)):
            if context > 1 and w.row < 4096 and machine.device == "cuda":
                continue
            for pipeline in powers(min(w.model.num_layers, ranks // tensor // context, 32)):
                if ranks % (tensor * context * pipeline):
                    continue
                data = ranks // tensor // context // pipeline
                for expert in powers(min(data, w.model.mixture.num_experts)) if w.model.mixture else (1,):
                    plain = replace(
                        like, data=data, replicate=1, tensor=tensor, context=context, pipeline=pipeline, expert=expert
                    )
                    yield from ways(plain, machine)


def ways(layout: Layout, machine: Machine) -> Iterator[Layout]:
    """How data parallelism divides, and in what order stages work."""
    shard = layout.data * layout.context // layout.replicate
    zeros = (0,) if shard == 1 else (0, 1, 3)
    schedules = ("1f1b",) if layout.pipeline == 1 else ("1f1b", "interleaved", "zero_bubble")
    for zero in zeros:
        for schedule in schedules:
            yield replace(layout, zero=zero, schedule=schedule)
            nodes = layout.data * layout.context * layout.tensor // machine.ranks
            if zero == 3 and nodes > 1 and layout.data % nodes == 0 and layout.data > nodes:
                yield replace(layout, zero=zero, schedule=schedule, replicate=nodes)


def powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def plan(w: Workload, machine: Machine, ranks: int, like: Layout | None = None) -> Plan:
    """All legal layouts of so many ranks, best first."""
    found, refused = [], {}
    for layout in candidates(w, machine, ranks, like or Layout()):
        reason = legal(w, layout, ranks)
        if reason is not None:
            refused[reason] = refused.get(reason, 0) + 1
            continue
        found.append(foretell(w, machine, resolve(layout, ranks)))
    found.sort(key=lambda c: (not c.fits, c.time.step if c.fits else c.memory.peak))
    return Plan(w, machine, ranks, tuple(found), refused)


def foretell(w: Workload, machine: Machine, layout: Layout) -> Choice:
    """One layout, resolved and legal."""
    held, took = memory.forecast(w, layout), cost.forecast(w, layout, machine)
    beside = min(machine.ranks, cost.size_of(layout)) if machine.device == "cpu" else 1
    return Choice(layout, held, took, held.peak * beside <= room(machine))


def room(machine: Machine) -> float:
    return ROOM * machine.memory


def kind_of(w: Workload) -> str:
    return "float32" if w.dtype == "float32" else "bfloat16"


def flops(w: Workload) -> float:
    """Of a step: six a weight and token, and attention's; nothing that is computed again (PaLM, appendix B)."""
    c = w.model
    found = memory.shapes(memory.name_of(c))
    values = sum(prod(shape) for _, shape in found)
    layer = sum(prod(shape) for name, shape in found if name.startswith("layers."))
    if c.mixture is not None:
        layer = layer * c.mixture.num_chosen / c.mixture.num_experts
    table = 0 if c.tied else c.vocab_size * c.width
    weights = values - (layer if c.mixture is None else 0) + (c.num_layers - (c.mixture is not None)) * layer - table
    attention = 12 * c.num_layers * c.num_heads * c.head_width * w.row / 2
    return w.tokens * w.microbatches * (6 * weights + attention)


def prod(shape: Sequence[int]) -> int:
    result = 1
    for length in shape:
        result *= length
    return result


# ---- why ----------------------------------------------------------------------------------------------------------


def say(layout: Layout) -> str:
    """A layout in few words."""
    words = []
    if layout.data > 1:
        shared = "data" if layout.zero == 0 else f"ZeRO-{layout.zero}"
        words.append(f"{shared} {layout.data}" + (f" ({layout.replicate} replicas)" if layout.replicate > 1 else ""))
    elif layout.context > 1 and layout.zero:
        words.append(f"ZeRO-{layout.zero}")
    for name in ("tensor", "context", "expert"):
        if (degree := getattr(layout, name)) > 1:
            words.append(f"{name} {degree}")
    if layout.pipeline > 1:
        words.append(f"pipeline {layout.pipeline} {layout.schedule}")
    return " x ".join(words) or "one rank"


def explain(p: Plan) -> list[str]:
    """Sentences that say why the best is the best: what its neighbours along each axis would change."""
    best = p.best
    lines = [
        f"{best.name}: {best.memory.peak / 1e9:.2f} GB at most ({best.memory.moment}), {best.time.step:.4g} s a step, "
        f"of which {share(best.time.compute, best)} work, {share(best.time.exchange, best)} exchange, "
        f"{share(best.time.waiting, best)} waiting for stages, {share(best.time.optimizer, best)} optimizer."
    ]
    for axis in ("tensor", "context", "pipeline", "zero", "replicate"):
        for other in neighbours(p, axis):
            lines.append(compare(best, other, p))
    return lines


def share(part: float, choice: Choice) -> str:
    return f"{100 * part / choice.time.step:.0f} %"


def neighbours(p: Plan, axis: str) -> list[Choice]:
    """The best layouts that differ from the best along this axis, one a side."""
    best, here = p.best, getattr(p.best.layout, axis)
    others = [c for c in p.choices if getattr(c.layout, axis) != here and alike(c.layout, best.layout, axis)]
    lower = [c for c in others if getattr(c.layout, axis) < here]
    higher = [c for c in others if getattr(c.layout, axis) > here]
    sides = [max(lower, key=lambda c: getattr(c.layout, axis), default=None)]
    sides.append(min(higher, key=lambda c: getattr(c.layout, axis), default=None))
    return [c for c in sides if c is not None]


def alike(a: Layout, b: Layout, axis: str) -> bool:
    """Whether two layouts differ along this axis only, data parallelism taking the rest."""
    loose = {axis, "data", "replicate", "schedule"} | ({"zero"} if 1 in (a.data, b.data) else set())
    return all(getattr(a, field.name) == getattr(b, field.name) for field in fields(a) if field.name not in loose)


def compare(best: Choice, other: Choice, p: Plan) -> str:
    if not other.fits:
        largest = max(memory.PARTS, key=lambda part: getattr(other.memory, part) - getattr(best.memory, part))
        return f"{other.name} does not fit: {other.memory.peak / 1e9:.1f} GB, mostly more {largest}."
    gain = other.time.step / best.time.step - 1
    parts = ("compute", "exchange", "waiting", "optimizer")
    most = max(parts, key=lambda part: getattr(other.time, part) - getattr(best.time, part))
    more = getattr(other.time, most) - getattr(best.time, most)
    return f"{other.name} takes {100 * gain:+.1f} %: {most} {more:+.3g} s, {other.memory.peak / 1e9:.2f} GB."


# ---- more ranks than there are ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rung:
    """A size of cluster, its best layout, and how it compares with the smallest cluster."""

    ranks: int
    choice: Choice
    tokens_per_second: float
    efficiency: float


def climb(w: Workload, machine: Machine, sizes: Sequence[int], each: int) -> list[Rung]:
    """The best layout of each size; every rank brings `each` microbatches, so that steps grow with clusters.

    A simulation: links between nodes are taken to be alike, and no rank is slow. Sizes where nothing fits are left out.
    """
    rungs: list[Rung] = []
    for ranks in sizes:
        found = plan(replace(w, microbatches=each * ranks), machine, ranks)
        if not found.choices or not found.choices[0].fits:
            continue
        rate = found.tokens_per_second(found.best)
        base = rungs[0].tokens_per_second / rungs[0].ranks if rungs else rate / ranks
        rungs.append(Rung(ranks, found.best, rate, rate / ranks / base))
    return rungs
