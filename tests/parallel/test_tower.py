"""Pictures that ranks share out: dealt whole and evenly, and the tower learns what one process learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litchi.model.network import Flow, Mask, ModelConfig
from litchi.model.vision import Tower
from litchi.parallel.crew import Crew
from litchi.parallel.gradient import backward, global_weights
from litchi.parallel.mesh import DATA, Layout, World, join
from litchi.parallel.modality import row_width
from litchi.parallel.plan import build, fill
from litchi.parallel.tower import deal
from litchi.schema.sequence import Modality, TokenSequence, Vectors, pack_rows
from litchi.train.step import microbatch_generator, whole_pair
from tests.parallel.test_modality import document

TOWERS = {
    "newline": Tower(12, width=16, num_layers=1, num_heads=2, grid=8, table="cells", newline=True),
    "class token": Tower(12, width=16, num_layers=2, num_heads=2, grid=8, class_token=True, norm_before=True, take=1),
    "sines": Tower(12, width=16, num_layers=1, num_heads=2, grid=8, table="corner", projector="mlp_tanh", sines=8),
    "deep": Tower(
        *(12, 16, 2, 2, 8), table="stretched", turns=True, merge=2, projector="merger", norm_after=False, deep=(0, 1)
    ),
}
LAYOUTS = {
    "tensor": Layout(tensor=4),
    "context": Layout(context=4, attention="gather"),
    "tensor x context": Layout(tensor=2, context=2),
    "tensor x ZeRO-3": Layout(tensor=2),
}
SIDES = ((2, 3), (1, 1), (3, 2), (2, 2), (1, 4))


def config(tower: Tower) -> ModelConfig:
    kinds = {"action": Flow(3), "image": Mask(digits=3, levels=5, width=4), "vision": tower}
    return ModelConfig(40, 16, 2, 4, 4, 8, 24, modalities=kinds)


def shown(kind: Tower, num_pictures: int, seed: int) -> TokenSequence:
    """Words and pictures of several sizes; each second one has a row that stands nowhere, and lines end if they do."""
    generator = torch.Generator().manual_seed(seed)
    index, place = [], []
    for picture in range(num_pictures):
        height, width = SIDES[(picture + seed) % len(SIDES)]
        for row in range(height):
            for column in range(width):
                index.append(-1 if picture % 2 and row == column == 0 else max([1, *index]) + 1)
                place.append((picture, row - height // 2, column - width // 2))
            if kind.newline:
                index.append(max([1, *index]) + 1)
                place.append((-1, 0, 0))
    value = torch.randn(len(index), row_width(kind), generator=generator)
    rows = torch.tensor(index), torch.tensor(place).view(-1, 3), value, torch.ones(len(index)), torch.zeros(len(index))
    return replace(document(seed), vectors={Modality.VISION: Vectors(*rows)} if index else {})


def learn(layout: Layout, kind: Tower) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of four microbatches, of which one has no picture and one has a single one."""
    world = World() if layout == Layout(data=1) else join(layout, torch.device("cpu"))
    placed = build(config(kind), world)
    fill(placed, lambda name, shape: 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(name))))
    pairs = []
    for m in range(world.index(*DATA), 4, world.degree(*DATA)):
        rows = [[shown(kind, (2, 0, 1, 2)[m], m)], [shown(kind, (2, 0, 0, 1)[m], m + 9)]]
        pairs.append(whole_pair(placed.model, pack_rows(rows, 32, pad=0), microbatch_generator(0, 0, m)))
    losses = backward(placed, pairs, global_weights(placed, pairs), {})
    return losses, {leaf.name: leaf.whole(g) for leaf in placed.learned() if (g := leaf.local.grad) is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_tower_learns_what_it_learns_in_one_process(crew: Crew, layout: str):
    for name, kind in TOWERS.items():
        losses, grads = learn(Layout(data=1), kind)
        assert any(grad.any() for key, grad in grads.items() if ".encoder." in key)
        for found, gradients in crew.run(learn, replace(LAYOUTS[layout], tower="shared"), kind):
            assert found == pytest.approx(losses, rel=1e-5)
            assert gradients.keys() == grads.keys()
            most = 1e-3 * max(float(g.abs().max()) for g in grads.values())
            for key, grad in grads.items():
                gap = float((gradients[key] - grad).abs().max()) / max(float(grad.abs().max()), most)
                assert gap <= 1e-5, (name, key, gap)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 40), max_size=12), ranks=st.integers(1, 5), seed=st.integers(0, 9))
def test_pictures_are_dealt_whole_and_evenly(sizes: list[int], ranks: int, seed: int):
    of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    of = of[torch.randperm(len(of), generator=torch.Generator().manual_seed(seed))]
    owner = deal(of, ranks)
    assert all(len(owner[of == picture].unique()) == 1 for picture in range(len(sizes)))
    load = owner.bincount(minlength=ranks)
    assert len(load) == ranks
    assert int(load.max()) <= sum(sizes) / ranks + max(sizes, default=0)
