"""The certificate of layouts: loss and every gradient of each axis, and of pairs of axes, beside one process.

    litchi certify

Four local ranks read the same eight microbatches as one process does, in fp32. A layout passes where no loss and no
gradient differs by more than `TOLERANCE`, relative to the largest value of that gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy import ndarray

from litchi.model.moe import Mixture
from litchi.model.network import Flow, Mask, ModelConfig
from litchi.model.vision import Tower
from litchi.parallel.crew import Crew
from litchi.parallel.gradient import backward, global_weights, norm
from litchi.parallel.mesh import DATA, Layout, World, join
from litchi.parallel.plan import build, fill, first_values
from litchi.schema.arrays import IGNORE
from litchi.schema.sequence import Batch, Modality, TokenSequence, Vectors, pack_rows
from litchi.train.step import microbatch_generator, whole_pair

TOLERANCE = 1e-5
"""Ranks add the same numbers in another order; fp32 has seven digits."""

ZERO = 1e-3
"""A gradient below this share of the largest one is measured against that share: those of key biases are zero but for
rounding, since a softmax does not see them."""

NUM_MICROBATCHES = 8
ROW = 64

MODEL = ModelConfig(
    vocab_size=96,
    width=32,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_width=12,
    mlp_width=48,
    modalities={
        str(Modality.IMAGE): Mask(digits=4, levels=9),
        str(Modality.ACTION): Flow(3),
        str(Modality.VISION): Tower(12, width=16, num_layers=2, grid=8),
    },
)
MIXTURE = replace(MODEL, mixture=Mixture(num_experts=4, num_chosen=2, width=24))

KINDS = ("text", "image", "action")
"""Of batches; in those of images and of actions, every other microbatch has none."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    layout: Layout
    model: ModelConfig = MODEL


@dataclass(frozen=True, slots=True)
class Finding:
    """How far a layout is from one process: relative differences, and the gradient that differs most."""

    case: str
    kind: str
    loss: float
    gradient: float
    worst: str

    @property
    def passes(self) -> bool:
        return max(self.loss, self.gradient) <= TOLERANCE


def cases() -> list[Case]:
    """Every axis and every legal pair, on four ranks."""
    return [*axes(), *pairs()]


def axes() -> Iterator[Case]:
    """Each axis alone, in each of its ways."""
    yield Case("data", Layout(zero=0))
    yield Case("ZeRO-1", Layout(zero=1))
    yield Case("ZeRO-2", Layout(zero=2))
    yield Case("ZeRO-3", Layout(zero=3))
    yield Case("ZeRO-1, sums of the library", Layout(zero=1, exact=False))
    yield Case("ZeRO-3, sums of the library", Layout(zero=3, exact=False))
    yield Case("HSDP 2x2", Layout(replicate=2))
    yield Case("tensor", Layout(tensor=4))
    yield Case("tensor, tokens not shared", Layout(tensor=4, sequence=False))
    for attention in ("ulysses", "gather"):
        yield Case(f"context, {attention}", Layout(context=4, attention=attention))
    yield Case("expert", Layout(expert=4), MIXTURE)
    for schedule in ("gpipe", "1f1b"):
        yield Case(f"pipeline, {schedule}", Layout(pipeline=4, schedule=schedule))
    for schedule in ("interleaved", "loop", "zero_bubble", "zbv", "dualpipev"):
        yield Case(f"pipeline, {schedule}", Layout(pipeline=2, schedule=schedule, zero=0))


def pairs() -> Iterator[Case]:
    """Two axes of two ranks each; data is ZeRO-3 unless named otherwise."""
    two = {"tensor": Layout(tensor=2), "context": Layout(context=2, attention="gather"), "pipeline": Layout(pipeline=2)}
    for name, layout in two.items():
        yield Case(f"{name} x ZeRO-3", layout)
        yield Case(f"{name} x data", replace(layout, zero=0))
        yield Case(f"{name} x replicate", replace(layout, replicate=2))
        yield Case(f"{name} x expert", replace(layout, expert=2), MIXTURE)
        yield Case(f"{name} x ZeRO-3, with experts", layout, MIXTURE)
    for schedule in ("zero_bubble", "zbv", "dualpipev"):
        yield Case(f"pipeline, {schedule} x ZeRO-3", Layout(pipeline=2, schedule=schedule))
        yield Case(f"pipeline, {schedule} x data", Layout(pipeline=2, schedule=schedule, zero=0, exact=False))
    yield Case("tensor x context", Layout(tensor=2, context=2))
    yield Case("tower shared x tensor", Layout(tensor=4, tower="shared"))
    yield Case("tower shared x context", Layout(context=4, tower="shared"))
    yield Case("tower shared x tensor x ZeRO-3", Layout(tensor=2, tower="shared"))
    yield Case("tower shared x tensor x context", Layout(tensor=2, context=2, tower="shared"))
    yield Case("tower shared x tensor x pipeline", Layout(tensor=2, pipeline=2, tower="shared"))
    yield Case("tensor x pipeline", Layout(tensor=2, pipeline=2))
    yield Case("context x pipeline", Layout(context=2, pipeline=2))
    yield Case("replicate x expert", Layout(replicate=2, expert=2), MIXTURE)
    yield Case("ZeRO-3 x expert", Layout(expert=2), MIXTURE)


def certify(crew: Crew, asked: Sequence[Case], kinds: Sequence[str] = KINDS) -> Iterator[Finding]:
    """One finding for each case and kind of batch. This process computes with one thread from now on, as ranks do."""
    torch.set_num_threads(1)
    alone: dict[tuple[Mixture | None, str], Probe] = {}
    for case in asked:
        for kind in kinds:
            if (case.model.mixture, kind) not in alone:
                alone[case.model.mixture, kind] = probe(Layout(data=1), case.model, kind)
            found = crew.run(probe, case.layout, case.model, kind)
            yield compare(case.name, kind, found, alone[case.model.mixture, kind])


@dataclass(frozen=True, slots=True)
class Probe:
    """What one layout computes: loss sums by modality, whole gradients by name, and their norm."""

    losses: Mapping[str, float]
    gradients: Mapping[str, ndarray]
    norm: float


def compare(case: str, kind: str, ranks: Sequence[Probe], alone: Probe) -> Finding:
    """The worst of all ranks; between them they must have every gradient."""
    loss = max(
        difference(np.array(found), np.array(expected))
        for probe in ranks
        for found, expected in ((probe.norm, alone.norm), *((probe.losses[m], alone.losses[m]) for m in alone.losses))
    )
    if missing := sorted(alone.gradients.keys() ^ {name for probe in ranks for name in probe.gradients}):
        return Finding(case, kind, loss, float("inf"), missing[0])
    least = ZERO * max(float(np.abs(gradient).max()) for gradient in alone.gradients.values())
    gaps: dict[str, float] = {}
    for probe in ranks:
        for name, gradient in probe.gradients.items():
            gaps[name] = max(gaps.get(name, 0.0), difference(gradient, alone.gradients[name], least))
    worst = max(gaps, key=lambda name: gaps[name])
    return Finding(case, kind, loss, gaps[worst], worst)


def difference(a: ndarray, b: ndarray, least: float = 1e-12) -> float:
    """The largest difference, relative to the largest value, or to `least` if that is larger."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), least))


# ---- on each rank -------------------------------------------------------------------------------------------------


def probe(layout: Layout, config: ModelConfig, kind: str) -> Probe:
    """Loss and gradients of a layout for the microbatches of a kind."""
    world = World() if layout == Layout(data=1) else join(layout, torch.device("cpu"))
    placed = build(config, world)
    values = first_values(placed, seed=0)
    fill(placed, lambda name, shape: loud(name, values(name, shape)))
    for stage in placed.models:
        stage.train()
    first, ranks = world.index(*DATA), world.degree(*DATA)
    pairs = []
    for m in range(first, NUM_MICROBATCHES, ranks):
        pairs.append(whole_pair(placed.model, microbatch(kind, m), microbatch_generator(0, 0, m)))
    weight = global_weights(placed, pairs)
    losses = backward(placed, pairs, weight, {})
    found = norm(placed)
    whole = {leaf.name: leaf.whole(g).numpy() for leaf in placed.learned() if (g := leaf.local.grad) is not None}
    return Probe(losses, whole, found)


def loud(name: str, value: torch.Tensor) -> torch.Tensor:
    """Heads of vectors start at zero, and would leave most gradients at zero too."""
    if not name.startswith("writers.") or name.endswith("bias"):
        return value
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1


# ---- batches ------------------------------------------------------------------------------------------------------


def microbatch(kind: str, index: int) -> Batch:
    """Two rows of documents of one kind, drawn from the number of the microbatch."""
    rng = np.random.default_rng([KINDS.index(kind), index])
    has = kind if index % 2 == 0 else "text"
    rows = [[document(has, rng), document("text", rng)], [document(has, rng)]]
    return pack_rows(rows, ROW, pad=0)


def document(kind: str, rng: np.random.Generator) -> TokenSequence:
    """Words, then a picture seen and one drawn, or an action; then words."""
    spans = {"text": [], "image": [(Modality.VISION, 4), (Modality.IMAGE, 4)], "action": [(Modality.ACTION, 2)]}[kind]
    before, after = (int(n) for n in rng.integers(4, 9, 2))
    length = before + 2 * sum(n for _, n in spans) + after
    tokens = torch.from_numpy(rng.integers(1, 96, length))
    labels, position = torch.roll(tokens, -1), torch.arange(length)
    span, readable, at = torch.arange(length), torch.ones(length, dtype=torch.bool), before
    vectors: dict[Modality, Vectors] = {}
    for modality, count in spans:
        copies = 1 if modality is Modality.VISION else 2
        index = torch.arange(at, at + copies * count)
        noised = (torch.arange(copies * count) < count) & (modality is not Modality.VISION)
        labels[at - 1 : at + copies * count] = IGNORE
        readable[index] = ~noised
        span[index] = torch.where(torch.arange(copies * count) < count, at, at + count)
        place = torch.tensor([(c, r // 2, r % 2) for c in range(copies) for r in range(count)])
        vectors[modality] = Vectors(
            index, place, values(modality, len(index), rng), torch.where(noised, 0.4, 1.0), noised.float()
        )
        at += copies * count
    labels[-1] = IGNORE
    weights = torch.from_numpy(rng.uniform(0.5, 2.0, length)).float()
    positions = position[:, None].expand(-1, 3).contiguous()
    return TokenSequence(tokens, labels, weights, positions, span, readable, vectors)


def values(modality: Modality, count: int, rng: np.random.Generator) -> torch.Tensor:
    match modality:
        case Modality.IMAGE:
            return torch.from_numpy(rng.integers(0, 9, (count, 4))).float()
        case _:
            return torch.from_numpy(rng.standard_normal((count, 12 if modality is Modality.VISION else 3))).float()
