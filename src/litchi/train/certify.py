"""The certificate of layouts: loss and every gradient of each axis, and of pairs of axes, beside one process.

    litchi certify

Four local ranks read the same four microbatches as one process does, in fp32. A layout passes where no loss and no
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

NUM_MICROBATCHES = 4
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
    return [
        Case("data", Layout(zero=0)),
        Case("ZeRO-1", Layout(zero=1)),
        Case("ZeRO-2", Layout(zero=2)),
        Case("ZeRO-3", Layout(zero=3)),
        Case("ZeRO-1, stock sums", Layout(zero=1, exact=False)),
        Case("ZeRO-3, stock sums", Layout(zero=3, exact=False)),
        Case("HSDP 2x2", Layout(replicate=2)),
        Case("tensor 4", Layout(tensor=4)),
        Case("tensor 4, tokens not shared", Layout(tensor=4, sequence=False)),
        Case("tensor 2 x data 2", Layout(tensor=2, zero=0)),
        Case("tensor 2 x ZeRO-3 2", Layout(tensor=2)),
        Case("tensor 2 x ZeRO-3 2, experts", Layout(tensor=2), MIXTURE),
    ]


def certify(crew: Crew, asked: Sequence[Case], kinds: Sequence[str] = KINDS) -> Iterator[Finding]:
    """One finding for each case and kind of batch."""
    alone: dict[tuple[ModelConfig, str], Probe] = {}
    for case in asked:
        for kind in kinds:
            if (case.model.mixture, kind) not in alone:
                alone[case.model.mixture, kind] = probe(Layout(data=1), case.model, kind)
            found = crew.run(probe_of_rank, case.layout, case.model, kind)[0]
            yield compare(case.name, kind, found, alone[case.model.mixture, kind])


@dataclass(frozen=True, slots=True)
class Probe:
    """What one layout computes: loss sums by modality, whole gradients by name, and their norm."""

    losses: Mapping[str, float]
    gradients: Mapping[str, ndarray]
    norm: float


def compare(case: str, kind: str, found: Probe, alone: Probe) -> Finding:
    loss = max(difference(np.array(found.losses[m]), np.array(alone.losses[m])) for m in alone.losses)
    loss = max(loss, difference(np.array(found.norm), np.array(alone.norm)))
    if found.gradients.keys() != alone.gradients.keys():
        odd = sorted(found.gradients.keys() ^ alone.gradients.keys())
        return Finding(case, kind, loss, float("inf"), odd[0])
    least = ZERO * max(float(np.abs(gradient).max()) for gradient in alone.gradients.values())
    gaps = {name: difference(found.gradients[name], g, least) for name, g in alone.gradients.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    return Finding(case, kind, loss, gaps[worst], worst)


def difference(a: ndarray, b: ndarray, least: float = 1e-12) -> float:
    """The largest difference, relative to the largest value, or to `least` if that is larger."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), least))


# ---- on each rank -------------------------------------------------------------------------------------------------


def probe_of_rank(layout: Layout, config: ModelConfig, kind: str) -> Probe | None:
    """As `probe`, on one of several ranks; all but the first have nothing to tell."""
    found = probe(layout, config, kind)
    return found if torch.distributed.get_rank() == 0 else None


def probe(layout: Layout, config: ModelConfig, kind: str) -> Probe:
    """Loss and gradients of a layout for the microbatches of a kind."""
    world = World() if layout == Layout(data=1) else join(layout, torch.device("cpu"))
    placed = build(config, world)
    values = first_values(placed, seed=0)
    fill(placed, lambda name, shape: loud(name, values(name, shape)))
    placed.model.train()
    first, ranks = world.index(*DATA), world.degree(*DATA)
    pairs = []
    for m in range(first, NUM_MICROBATCHES, ranks):
        pairs.append(whole_pair(placed.model, microbatch(kind, m), microbatch_generator(0, 0, m)))
    weight = global_weights(placed, pairs)
    losses = backward(placed, pairs, weight, {}, torch.float32)
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
