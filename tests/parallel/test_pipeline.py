"""A pipeline changes nothing: loss and every gradient are one process's, whatever the schedule and the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from litchi.config import BadInput
from litchi.model.network import Model, initialise
from litchi.model.objective import Loss, corrupt, loss_of, weights_of
from litchi.parallel.collectives import all_gather
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import DATA, Layout, Schedule, World, join
from litchi.parallel.pipeline import Pair, Pipeline, split
from litchi.parallel.stages import SCHEDULES
from litchi.schema.sample import Sample
from litchi.schema.sequence import pack_rows
from tests.laws.documents import model as small
from tests.laws.documents import part, processor

ROW, LAYERS = 64, 8
KINDS = {
    "text": [["user", "answer"], ["answer"]],
    "image": [["user", "draw"], ["draw", "user", "answer"], ["answer"]],
    "vision": [["see", "answer"], ["user", "answer"], ["answer", "see", "see", "answer"]],
    "action": [["frame", "move", "answer"], ["user", "move", "step"], ["step"]],
}
"""Documents of microbatches in turn; not every one has a picture or an action."""


@cache
def whole(kind: str, tied: bool, layers: int = LAYERS) -> Model:
    like = small(processor(tower=kind == "vision"))
    torch.manual_seed(0)
    model = Model(replace(like.config, num_layers=layers, tied=tied))
    initialise(model, 0)
    for parameter in model.writers.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


@cache
def microbatches(kind: str, count: int) -> list[Pair]:
    p, model = processor(tower=kind == "vision"), whole(kind, True)
    pairs = []
    for m in range(count):
        rng = np.random.default_rng(m)
        parts = KINDS[kind][m % len(KINDS[kind])]
        rows = [[p.encode(Sample(tuple(part(k, rng) for k in parts), key=str(m), source="law"), rng)] for _ in range(2)]
        batch = pack_rows(rows, ROW, p.tokenizer.pad)
        pairs.append((batch, corrupt(model, batch, torch.Generator().manual_seed(m))))
    return pairs


def global_weight(model: Model, pairs: Sequence[Pair]) -> dict[str, float]:
    weight: dict[str, float] = {}
    for pair in pairs:
        for m, w in weights_of(model, *pair).items():
            weight[m] = weight.get(m, 0.0) + w
    return weight


@cache
def alone(kind: str, tied: bool, count: int, layers: int = LAYERS) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The loss and gradients of one process."""
    model, pairs = copy_of(whole(kind, tied, layers)), microbatches(kind, count)
    weight = global_weight(model, pairs)
    losses: list[Loss] = []
    for pair in pairs:
        losses.append(loss_of(model, *pair))
        losses[-1].over(weight, {"image": 0.5}).backward()
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total.means(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def copy_of(model: Model) -> Model:
    made = Model(model.config)
    made.load_state_dict(model.state_dict())
    return made


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def worst(pipeline: Pipeline, loss: Loss | None, expected: tuple[dict[str, float], dict[str, Tensor]]) -> float:
    """The largest relative difference of a loss or a gradient on this rank; infinite if one is missing or too many."""
    means, grads = expected
    found = {name: p.grad for name, p in pipeline.named_parameters() if p.grad is not None}
    away = [difference(grad, grads[name]) for name, grad in found.items()]
    missing = {name for name, _ in pipeline.named_parameters() if name in grads} - set(found)
    if loss is not None:
        away += [abs(value - means[m]) / abs(means[m]) for m, value in loss.means().items()]
    return float("inf") if missing else max(away)


def certify(schedule: Schedule, ranks: int, cases: Sequence[tuple[str, bool]]) -> list[tuple[float, set[str]]]:
    world = join(Layout(pipeline=ranks, schedule=schedule), torch.device("cpu"))
    rows = []
    for kind, tied in cases:
        pairs = microbatches(kind, 8)
        pipeline = split(copy_of(whole(kind, tied)), world)
        weight = global_weight(pipeline.models[0], pairs)
        loss = pipeline.backward(pairs, weight, {"image": 0.5})
        assert (loss is not None) == (pipeline.last in pipeline.stages)
        names = {name for name, _ in pipeline.named_parameters()} - pipeline.copies()
        rows.append((worst(pipeline, loss, alone(kind, tied, 8)), names))
    return rows


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_and_gradients_are_one_process_s(crew: Crew, schedule: Schedule, ranks: int):
    cases = (
        [(kind, tied) for kind in KINDS for tied in (False, True)]
        if ranks == 2
        else [("image", True), ("vision", False)]
    )
    answers = crew.run(certify, schedule, ranks, cases, size=ranks)
    for place, (kind, tied) in enumerate(cases):
        assert max(answer[place][0] for answer in answers) <= 1e-5, (kind, tied)
        names = [name for answer in answers for name in answer[place][1]]
        assert sorted(names) == sorted(name for name, _ in whole(kind, tied).named_parameters())
