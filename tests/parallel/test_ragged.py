"""Ranks whose documents differ in kind finish every step together, as one process does; what is frozen stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise

import pytest
import torch

from litchi.parallel.crew import Crew
from litchi.parallel.mesh import DATA, Layout, World, join
from litchi.parallel.plan import build, fill, first_values
from litchi.schema.sequence import Batch
from litchi.train.certify import KINDS, MODEL, TOLERANCE, ZERO, difference, loud, microbatch
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.run import freeze
from litchi.train.step import find_gradient, step_optimizers

SMALL = replace(MODEL, num_layers=2)
SLOTS = 2
"""Microbatches of a step."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one rank: the gradient of each step as a digest, its norm, and the last gradients and weights, whole."""

    digests: list[str]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor]


def ragged(step: int, slot: int) -> Batch:
    """The first slot is of words alone and now and then teaches nothing; the others bring pictures and actions."""
    kind = KINDS[1 + step % 2]
    batch = microbatch(kind, 2 * (step * SLOTS + slot) + (slot == 0))
    if slot or step % 10 != 3:
        return batch
    return replace(batch, weights=torch.zeros_like(batch.weights))


def learn(layout: Layout, num_steps: int, frozen: tuple[str, ...] = ()) -> Seen:
    torch.set_num_threads(1)
    world = World() if layout == Layout(data=1) else join(layout, torch.device("cpu"))
    placed = build(SMALL, world, freeze=lambda model: freeze(model, frozen))
    values = first_values(placed, seed=0)
    fill(placed, lambda name, shape: loud(name, values(name, shape)))
    first = {name: leaf.whole(leaf.local.detach()).clone() for name, leaf in placed.leaves.items()}
    optimizers = build_optimizers(placed.learned(), OptimizerConfig(lr=1e-3, matrix_lr=0.0, clip=1.0))
    digests, norms, gradients = [], [], {}
    for step in range(num_steps):
        slots = range(world.index(*DATA), SLOTS, world.degree(*DATA))
        batches = [ragged(step, slot) for slot in slots]
        metrics = find_gradient(placed, batches, scale={}, dtype=torch.float32, draw=(0, step))
        gradients = {
            leaf.name: leaf.whole(g).clone() for leaf in placed.learned() if (g := leaf.local.grad) is not None
        }
        digests.append(sha256(b"".join(g.numpy().tobytes() for _, g in sorted(gradients.items()))).hexdigest())
        norms.append(metrics.gradient_norm)
        step_optimizers(placed, optimizers, metrics, 1.0)
    weights = {name: leaf.whole(leaf.local.detach()).clone() for name, leaf in placed.leaves.items()}
    return Seen(digests, norms, gradients, weights, first)


@pytest.fixture(scope="module")
def alone() -> Seen:
    return learn(Layout(data=1), 100)


def test_a_rank_without_pictures_for_a_hundred_steps(crew: Crew, alone: Seen):
    """No rank waits for another, and the gradient of every step is that of one process, bit for bit."""
    for rank in crew.run(learn, Layout(zero=3), 100, size=2):
        assert rank.digests == alone.digests
        assert all(torch.equal(rank.weights[name], value) for name, value in alone.weights.items())
    assert all(a != b for a, b in pairwise(alone.digests))


def test_nor_with_sums_of_the_library(crew: Crew, alone: Seen):
    """Weights part by rounding over the steps, so that norms are compared, and the first step's gradient exactly."""
    ranks = crew.run(learn, Layout(zero=3, exact=False), 20, size=2)
    for rank in ranks:
        assert rank.norms == pytest.approx(alone.norms[:20], rel=1e-3)
    assert ranks[0].norms[0] == pytest.approx(alone.norms[0], rel=TOLERANCE)


@pytest.mark.parametrize("layout", [Layout(zero=3), Layout(zero=3, exact=False), Layout(zero=1)], ids=str)
@pytest.mark.parametrize(
    "frozen",
    [("readers.vision.tower.encoder.",), ("layers.", "embed", "norm")],
    ids=["the tower", "the trunk, while the projector learns"],
)
def test_what_is_frozen_stays_and_the_rest_learns(crew: Crew, layout: Layout, frozen: tuple[str, ...]):
    steps = 4 if layout.exact else 1
    expected = learn(Layout(data=1), steps, frozen)
    held = {name for name in expected.weights if name.startswith(frozen)}
    assert held and held.isdisjoint(expected.gradients)
    least = ZERO * max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for rank in crew.run(learn, layout, steps, frozen, size=2):
        assert rank.gradients.keys() == expected.gradients.keys()
        assert all(torch.equal(rank.weights[name], rank.first[name]) for name in held)
        for name, gradient in expected.gradients.items():
            assert difference(rank.gradients[name].numpy(), gradient.numpy(), least) <= TOLERANCE, name
        assert not layout.exact or rank.digests == expected.digests
    moved = [name for name in expected.gradients if not torch.equal(expected.weights[name], expected.first[name])]
    assert any("vision" in name for name in moved)
