"""A batch without pictures still runs what reads and draws them: it learns the same, and no gradient is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from litchi.model.network import Features, Flow, Kind, Mask, Model, ModelConfig, Velocity, initialise
from litchi.model.objective import objective
from litchi.model.vision import Tower
from litchi.parallel.modality import complete, row_width
from litchi.schema.arrays import IGNORE
from litchi.schema.sequence import Batch, Modality, TokenSequence, Vectors, pack

LENGTH, WIDTH = 24, 16

DRAWN: dict[str, Kind] = {"mask": Mask(digits=3, levels=5, width=4), "flow": Flow(6), "velocity": Velocity(6, grid=8)}
SEEN: dict[str, Kind] = {
    "features": Features(10),
    **{
        f"tower-{table}": Tower(12, width=16, num_layers=2, num_heads=2, grid=8, table=table)
        for table in ("axes", "cells", "corner", "stretched", "resized")
    },
    "tower-llava": Tower(12, width=16, num_layers=2, num_heads=2, grid=8, class_token=True, norm_before=True, take=1),
    "tower-newline": Tower(12, width=16, num_layers=1, num_heads=2, grid=8, table="cells", newline=True),
    "tower-smolvlm": Tower(12, width=16, num_layers=1, num_heads=2, grid=8, merge=2, projector="linear", scales=True),
    "tower-bagel": Tower(
        12, width=16, num_layers=1, num_heads=2, grid=8, table="corner", projector="mlp_tanh", sines=8
    ),
    "tower-qwen": Tower(
        *(12, 16, 2, 2, 8), table="stretched", turns=True, merge=2, projector="merger", norm_after=False, deep=(0, 1)
    ),
}


def document(seed: int, *, weight: float = 1.0) -> TokenSequence:
    """Words; every third is learned."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (LENGTH,), generator=generator)
    count = torch.arange(LENGTH)
    return TokenSequence(
        tokens=tokens,
        labels=torch.where(count % 3 == 0, tokens.roll(-1), IGNORE),
        weights=torch.full((LENGTH,), weight),
        positions=count[:, None].expand(-1, 3).contiguous(),
        spans=count,
        readable=torch.ones(LENGTH, dtype=torch.bool),
        vectors={},
    )


def pictured(kind: Kind, modality: Modality, seed: int, *, time: float = 0.3, weight: float = 1.0) -> TokenSequence:
    """Words, and one picture of two rows and two columns in their midst."""
    generator = torch.Generator().manual_seed(seed)
    shape = 4, row_width(kind)
    value = torch.randint(0, 5, shape, generator=generator).float()
    place = torch.tensor([[0, row, column] for row in (-1, 0) for column in (-1, 0)])
    v = Vectors(torch.arange(8, 12), place, value, torch.full((4,), time), torch.full((4,), weight))
    words = document(seed)
    spans = torch.where((words.spans >= 8) & (words.spans < 12), 8, words.spans)
    return replace(words, spans=spans, vectors={modality: v})


def model_of(modalities: dict[str, Kind], experts: int = 1) -> Model:
    c = ModelConfig(40, WIDTH, 2, 2, 1, 8, 24, modalities=modalities, experts=experts, own_norms=experts > 1)
    model = Model(c)
    initialise(model, 0)
    with torch.no_grad():  # what begins at zero would let gradients through nothing
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def learn(model: Model, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = objective(model, batch, torch.Generator().manual_seed(7))
    weight = {m: 2.0 for m in model.writers} | {"text": 3.0}
    loss.over(weight, {"image": 0.7}).backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {m: float(total.detach()) for m, total in loss.total.items()}, grads


def assert_only_zeros_are_new(model: Model, batch: Batch) -> None:
    totals, grads = learn(model, batch)
    filled, all_grads = learn(model, complete(batch, model.config))
    assert any(grad is None and all_grads[name] is not None for name, grad in grads.items())
    assert {m: filled[m] for m in totals} == totals
    assert all(filled[m] == 0 for m in filled if m not in totals)
    for name, grad in all_grads.items():
        before = grads[name]
        if never_read(model, name):
            assert grad is None
        elif before is None:
            assert grad is not None and not grad.any(), name
        else:
            assert grad is not None and torch.equal(grad, before), name


def never_read(model: Model, name: str) -> bool:
    """Fixed tables, and layers of a tower behind the one whose rows are taken."""
    if not dict(model.named_parameters())[name].requires_grad:
        return True
    kind = model.config.modalities.get("vision")
    last = isinstance(kind, Tower) and kind.take
    return bool(last) and (f"encoder.layers.{last}." in name or "encoder.post_layernorm" in name)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_may_be_absent(name: str, experts: int):
    model = model_of({"image": DRAWN[name], "action": Flow(3)}, experts)
    assert_only_zeros_are_new(model, pack([document(0), document(1)]))
    assert_only_zeros_are_new(model, pack([pictured(Flow(3), Modality.ACTION, 0), document(1)]))
    assert_only_zeros_are_new(model, pack([document(1), pictured(DRAWN[name], Modality.IMAGE, 2)]))


@pytest.mark.parametrize("name", SEEN)
def test_what_is_seen_may_be_absent(name: str):
    model = model_of({"image": DRAWN["mask"], "vision": SEEN[name]})
    assert_only_zeros_are_new(model, pack([document(0), pictured(DRAWN["mask"], Modality.IMAGE, 1)]))
    assert_only_zeros_are_new(model, pack([document(0), pictured(SEEN[name], Modality.VISION, 1, weight=0.0)]))


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_supervised_gives_zeros_and_not_nothing(name: str):
    model = model_of({"image": DRAWN[name], "vision": SEEN["features"]})
    clean = pictured(DRAWN[name], Modality.IMAGE, 0, time=1.0, weight=0.0)
    batch = pack([replace(clean, weights=torch.zeros(LENGTH)), document(0, weight=0.0)])
    totals, grads = learn(model, complete(batch, model.config))
    assert not any(totals.values())
    assert all(grad is not None and not grad.any() for name, grad in grads.items() if not never_read(model, name))


def test_order_of_modalities_is_one_for_all_ranks():
    kinds = {"vision": SEEN["features"], "image": DRAWN["mask"], "action": Flow(3)}
    model = model_of(kinds)
    batches = [pack([document(0)]), pack([pictured(DRAWN["mask"], Modality.IMAGE, 0)])]
    orders = {tuple(complete(batch, model.config).vectors) for batch in batches}
    assert orders == {("action", "image", "vision")}
