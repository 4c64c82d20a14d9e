"""How many bytes of tensors a rank has at most in a step, and what they are; nothing is run.

Weights are fp32. What autograd keeps is that of `anatomy`; copies that FSDP2, exact sums and optimizers make are
counted as their code makes them: see `shard`, `collectives`, and Muon.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from litchi.config import from_json, to_json
from litchi.model.families import parameters
from litchi.model.network import ModelConfig
from litchi.parallel.anatomy import Anatomy, Workload, dissect
from litchi.parallel.expert import is_expert
from litchi.parallel.mesh import SHARD, Layout, degrees
from litchi.parallel.stages import Action, deal, order, rank_of, stages_per_rank
from litchi.parallel.tensor import split_dim

BYTES = 4
"""Of a weight, a gradient, a moment, an average."""


@dataclass(frozen=True, slots=True)
class Held:
    """Numbers of values of a unit that FSDP2 gathers at once, on a rank of tensor and expert parallelism."""

    full: int = 0
    """Before ZeRO divides."""
    local: int = 0
    whole: int = 0
    """Of `full`, experts that ZeRO leaves alone."""
    matrices: int = 0
    """Of `local`, what Muon steps where it is used."""
    largest: int = 0
    """Of the largest parameter, after ZeRO."""
    table: int = 0
    """Of the table of words, before ZeRO."""

    def __add__(self, other: Held) -> Held:
        largest, table = max(self.largest, other.largest), max(self.table, other.table)
        full, local, whole = self.full + other.full, self.local + other.local, self.whole + other.whole
        return Held(full, local, whole, self.matrices + other.matrices, largest, table)


@dataclass(frozen=True, slots=True)
class Stage:
    """What one rank of a pipeline holds: a number of layers in each of its stages, and perhaps the ends."""

    layers: tuple[int, ...]
    layer: Held
    start: Held
    end: Held

    @property
    def root(self) -> Held:
        """What is gathered with the network itself."""
        return self.start + self.end

    @property
    def count(self) -> int:
        return sum(self.layers)

    def total(self, name: str) -> int:
        return self.count * getattr(self.layer, name) + getattr(self.root, name)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the rank that has most, at its worst moment."""

    moment: str
    parameters: int
    averages: int
    optimizer: int
    gradients: int
    activations: int
    buffers: int
    """Copies that are gathered, reduced, sent or stepped through."""
    stage: int = 0

    @property
    def peak(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


PARTS = ("parameters", "averages", "optimizer", "gradients", "activations", "buffers")


def forecast(w: Workload, layout: Layout) -> Memory:
    """`layout` is resolved. Raises BadInput if sizes do not divide."""
    anatomy = dissect(w, layout)
    ranks = [at_worst(w, layout, anatomy, rank) for rank in range(layout.pipeline)]
    return max(ranks, key=lambda memory: memory.peak)


def at_worst(w: Workload, layout: Layout, anatomy: Anatomy, rank: int) -> Memory:
    """The worst moment of one rank of a pipeline, or of the only one."""
    stage = stage_of(w, layout, rank)
    moments = [*working(w, layout, anatomy, stage, rank), *reducing(w, layout, stage), *stepping(w, layout, stage)]
    name, gradients, activations, buffers = max(moments, key=lambda m: sum(m[1:]))
    muon = stage.total("matrices") if w.muon else 0
    held = stage.total("local")
    return Memory(
        moment=name,
        parameters=BYTES * held,
        averages=BYTES * held if w.average else 0,
        optimizer=BYTES * (2 * (held - muon) + muon),
        gradients=int(gradients),
        activations=int(activations),
        buffers=int(buffers),
        stage=rank,
    )


Moment = tuple[str, float, float, float]
"""Its name, bytes of gradients, of activations, and of buffers."""


# ---- moments ------------------------------------------------------------------------------------------------------


def working(w: Workload, layout: Layout, a: Anatomy, stage: Stage, rank: int) -> Iterator[Moment]:
    """While microbatches are read and gradients are made."""
    shard = shards(layout)
    divided = layout.zero > 0 and shard > 1
    own, shared = BYTES * (stage.layer.full - stage.layer.whole) * divided, BYTES * stage.root.full * divided
    before = kept_before(w, layout, stage, in_flight(w, layout, rank)) + stale(layout, stage)
    kept = a.layer.saved
    n, flights, wires = stage.count, in_flight(w, layout, rank), wire(w, layout, a, rank)
    first, last = stage.start.full > 0, stage.end.full > 0
    chunks = max(1, len(stage.layers))
    entry = a.start.saved if first else a.hidden
    others = (flights - 1) * ((n * kept + entry + last * a.end.saved) / chunks + a.fixed)
    held = n / chunks * kept + a.fixed + entry + others
    gathered = shared + (0 if layout.zero == 3 else n * own)
    reduced = BYTES * n * stage.layer.local if layout.zero > 1 or (divided and layout.exact) else 0
    casts = w.recompute != "none" and w.dtype != "float32"  # autocast keeps them until the loss is there
    cast = (n * stage.layer.full + stage.root.full) * BYTES // 2 if casts else 0
    if last:
        yield "loss", before, held + cast + max(a.end.forward_peak, a.end.backward_peak), gathered + wires
    made = BYTES * stage.end.full if last else 0
    gathers = 1 if layout.pipeline > 1 else 2
    unit = gathers * own if layout.zero == 3 else n * own
    yield "backward", before + made, held + a.layer.backward_peak - kept + a.hidden, shared + unit + wires
    if divided:
        copies = own * (shares_in_flight(layout) + (1 if layout.zero == 3 else n - 1))
        yield "reduce a layer", before + made, held - kept + a.hidden, shared + copies + wires
    if first:
        yield "first gradient", before + made + reduced, a.start.backward_peak + a.hidden, shared + wires


def reducing(w: Workload, layout: Layout, stage: Stage) -> Iterator[Moment]:
    """When the gradients of the ends, or all that are not divided, are summed."""
    before, shard = kept_before(w, layout, stage, 1) + stale(layout, stage), shards(layout)
    if layout.zero > 0 and shard > 1:
        layers = BYTES * stage.count * stage.layer.local
        table, root = BYTES * stage.root.table, BYTES * stage.root.full
        copies = table + root * shares_in_flight(layout) if layout.exact else root
        yield "reduce the ends", before + layers + (0 if layout.exact else root), 0, copies
        undivided = BYTES * stage.count * stage.layer.whole
    else:
        undivided = BYTES * stage.total("full")
    group = degrees(layout)["replicate"] * shard
    if undivided and group > 1:
        copies = undivided * (3 + tree(group) if layout.exact else 1)
        yield "reduce all", before + BYTES * stage.total("local"), 0, copies


def stepping(w: Workload, layout: Layout, stage: Stage) -> Iterator[Moment]:
    """When all gradients are there: their norm, and the steps of the optimizers."""
    gradients = BYTES * stage.total("local")
    largest = BYTES * max(stage.layer.largest if stage.count else 0, stage.root.largest)
    yield "norm", gradients, 0, 4 * largest
    plain = stage.total("local") - (stage.total("matrices") if w.muon else 0)
    yield "AdamW", gradients, 0, BYTES * plain if layout.exact and w.device == "cpu" else 0
    if w.muon:
        yield "Muon", gradients, 0, max((muon_copies(*shape, stage.count) for shape in matrices(w.model)), default=0)


def kept_before(w: Workload, layout: Layout, stage: Stage, flights: int) -> float:
    """Gradients that earlier microbatches have left when so many are on their way for the last time."""
    rounds = w.microbatches // layout.data
    local, full = BYTES * stage.total("local"), BYTES * stage.total("full")
    if layout.exact:
        return local * max((i.bit_count() for i in range(rounds - flights // len(stage.layers) + 1)), default=0)
    if layout.pipeline > 1:  # torch's stages reduce after the last microbatch
        return full
    return 0 if rounds == 1 else full if layout.zero == 1 else local


def stale(layout: Layout, stage: Stage) -> int:
    """Gradients of the step before, which `gradient.backward` lets go of only when it has new ones, where divided."""
    return BYTES * stage.total("local") if layout.zero > 0 and shards(layout) > 1 else 0


def shares_in_flight(layout: Layout) -> float:
    """Copies of a unit that its reduce-scatter makes, in its size: what is sent, what is received, sums."""
    shard = shards(layout)
    return 2 + tree(shard) + 1 / shard if layout.exact else 1 + 1 / shard


def tree(ranks: int) -> float:
    """Sums of two neighbouring levels of a tree, as a share of what is summed."""
    return 0.5 if ranks == 2 else 0.75 if ranks > 2 else 0.0


def muon_copies(rows: int, columns: int, alike: int, layers: int) -> float:
    """Directions, their stack, and what the iteration makes of it in bfloat16, of all matrices of one shape."""
    whole = BYTES * rows * columns * alike * layers
    gram = min(rows, columns) / max(rows, columns) / 2
    return whole * (2 + max(2 + gram, 1 + 4 * gram))


# ---- pipelines ----------------------------------------------------------------------------------------------------


def in_flight(w: Workload, layout: Layout, rank: int) -> int:
    """Microbatches, counted by stage, whose activations a rank holds at most."""
    if layout.pipeline == 1:
        return 1
    now = most = 0
    count = w.microbatches // layout.data
    for action in order(
        layout.schedule, layout.pipeline, count if layout.schedule == "gpipe" else short(count, layout)
    )[rank]:
        now += change(action)
        most = max(most, now)
    return most


def short(count: int, layout: Layout) -> int:
    """Microbatches after which a schedule only repeats itself: no more of them need be laid out."""
    most = 4 * layout.pipeline
    return count if count <= most else most + count % layout.pipeline


def change(action: Action) -> int:
    return {"forward": 1, "backward": -1, "weight": -1}.get(action.work, 0)


def wire(w: Workload, layout: Layout, a: Anatomy, rank: int) -> float:
    """What a rank of a pipeline keeps to send and receive: one buffer a microbatch and neighbour, each way."""
    if layout.pipeline == 1:
        return 0
    count = w.microbatches // layout.data
    chunks = stages_per_rank(layout.schedule)
    last = layout.pipeline * chunks - 1
    mine = [s for s in range(last + 1) if rank_of(s, layout.schedule, layout.pipeline) == rank]
    received = sum((s > 0) + (s < last) for s in mine)
    return a.hidden * count * (received + (last in mine))


# ---- parameters ---------------------------------------------------------------------------------------------------


def stage_of(w: Workload, layout: Layout, rank: int) -> Stage:
    """What a rank of a pipeline holds."""
    layer, start, end = parts(w, layout)
    chunks = stages_per_rank(layout.schedule) if layout.pipeline > 1 else 1
    dealt = dealt_layers(whole_name(w.model), layout.pipeline * chunks)
    if layout.pipeline == 1:
        return Stage((w.model.num_layers,), layer, start, end)
    mine = [s for s in range(len(dealt)) if rank_of(s, layout.schedule, layout.pipeline) == rank]
    here = tuple(len(dealt[s]) for s in mine)
    first, last = 0 in mine, len(dealt) - 1 in mine
    if last and not first and w.model.tied:
        table = table_of(w, layout)
        end = end + table
    return Stage(here, layer, start if first else Held(), end if last else Held())


def parts(w: Workload, layout: Layout) -> tuple[Held, Held, Held]:
    """A layer, what stands before the layers, and what stands behind them."""
    layer = start = end = Held()
    for name, shape in shapes(name_of(w.model)):
        held = holding(name, shape, layout)
        if name.startswith("layers."):
            layer = layer + held
        elif name.startswith(("embed_", "readers.")):
            start = start + held
        else:
            end = end + held
    return layer, start, end


def table_of(w: Workload, layout: Layout) -> Held:
    return holding("embed_tokens.weight", (w.model.vocab_size, w.model.width), layout)


def holding(name: str, shape: tuple[int, ...], layout: Layout) -> Held:
    dim = None if layout.tensor == 1 else split_dim(name, len(shape)) if not name.startswith("writers.") else None
    cut = [length // layout.tensor if index == dim else length for index, length in enumerate(shape)]
    full, rest = 1, 1
    for length in cut:
        full *= length
    for length in cut[1:]:
        rest *= length
    expert = is_expert(name)
    share = 1 / layout.expert if expert else 1
    whole = expert and layout.expert > 1
    shard = shards(layout)
    local = full if whole or layout.zero == 0 or shard == 1 else -(-cut[0] // shard) * rest
    matrix = local if name.startswith("layers.") and len(shape) == 2 else 0
    table = full if name in ("embed_tokens.weight", "lm_head.weight") else 0
    here, kept, mine = int(full * share), int(local * share), int(matrix * share)
    return Held(here, kept, here if whole else 0, mine, local, table)


NAMES: dict[int, tuple[ModelConfig, str, str]] = {}
"""Networks of one layer and whole ones as JSON, by identity: to write them again for each layout would take longest."""


def name_of(c: ModelConfig) -> str:
    """The network with one layer, as JSON."""
    if id(c) not in NAMES:
        NAMES[id(c)] = c, to_json(replace(c, num_layers=1)), to_json(c)
    return NAMES[id(c)][1]


def whole_name(c: ModelConfig) -> str:
    name_of(c)
    return NAMES[id(c)][2]


@lru_cache(maxsize=256)
def dealt_layers(model: str, stages: int) -> list[range]:
    return deal(from_json(ModelConfig, model), stages)


@lru_cache(maxsize=64)
def shapes(model: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a network that is given as JSON."""
    return [(name, tuple(shape)) for name, shape in parameters(from_json(ModelConfig, model)).items()]


def matrices(c: ModelConfig) -> list[tuple[int, int, int]]:
    """Rows, columns, and how many of a layer are alike, for each shape of matrices that Muon steps."""
    counts: dict[tuple[int, int], int] = {}
    for name, shape in shapes(name_of(c)):
        if name.startswith("layers.") and len(shape) == 2:
            rows, columns = shape
            counts[rows, columns] = counts.get((rows, columns), 0) + 1
    return [(rows, columns, count) for (rows, columns), count in counts.items()]


def shards(layout: Layout) -> int:
    """Ranks over which ZeRO divides."""
    sizes = degrees(layout)
    count = 1
    for axis in SHARD:
        count *= sizes[axis]
    return count
