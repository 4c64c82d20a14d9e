"""A pipeline changes nothing: loss and every gradient are one process's, whatever the schedule and the documents."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from litchi.config import BadInput
from litchi.model.network import Model, initialise
from litchi.model.objective import Loss, corrupt, loss_of, weights_of
from litchi.model.vision import Tower
from litchi.parallel import shard, tensor
from litchi.parallel.collectives import Counter, all_reduce, tree_all_reduce
from litchi.parallel.crew import Crew
from litchi.parallel.leaf import Leaf
from litchi.parallel.mesh import DATA, Layout, Schedule, join
from litchi.parallel.pipeline import Pair, Pipeline, split
from litchi.parallel.stages import SCHEDULES, Action, order
from litchi.schema.sample import Sample
from litchi.schema.sequence import TokenSequence, pack_rows
from tests.laws.documents import model as small
from tests.laws.documents import part, processor

ROW, SCALE = 48, {"image": 0.5}
KINDS = {
    "text": [["user", "answer"], ["answer"]],
    "image": [["user", "draw"], ["draw", "user", "answer"], ["answer"]],
    "vision": [["see", "answer"], ["user", "answer"], ["answer", "see", "see", "answer"]],
    "deep": [["see", "answer"], ["user", "answer"], ["answer", "see", "see", "answer"]],
    "action": [["frame", "move", "answer"], ["user", "move", "step"], ["step"]],
}
"""Documents of microbatches in turn; not every one has a picture or an action."""
Whole = tuple[dict[str, float], dict[str, Tensor]]
"""Mean losses and gradients of one process."""
DEEP = Tower(48, width=16, num_layers=3, deep=(0, 1))


@cache
def whole(kind: str, tied: bool, layers: int) -> Model:
    """The network of one process, with heads that do not start at zero."""
    like = small(processor(tower=kind in ("vision", "deep")))
    modalities = {**like.config.modalities, **({"vision": DEEP} if kind == "deep" else {})}
    torch.manual_seed(0)
    model = Model(replace(like.config, num_layers=layers, tied=tied, vocab_size=328, modalities=modalities))
    initialise(model, 0)
    for parameter in model.writers.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(1))
    if kind == "deep":
        model.readers["vision"].tower.encoder.requires_grad_(False)
    return model


def document(kind: str, number: int) -> TokenSequence:
    p, rng = processor(tower=kind in ("vision", "deep")), np.random.default_rng(number)
    parts = KINDS[kind][number % len(KINDS[kind])]
    return p.encode(Sample(tuple(part(k, rng) for k in parts), key=str(number), source="law"), rng)


@cache
def microbatches(kind: str, count: int) -> list[Pair]:
    p, model = processor(tower=kind in ("vision", "deep")), whole(kind, True, 1)
    pairs = []
    for m in range(count):
        batch = pack_rows([[document(kind, m)], [document(kind, m + count)]], ROW, p.tokenizer.pad)
        pairs.append((batch, corrupt(model, batch, torch.Generator().manual_seed(m))))
    return pairs


def global_weight(model: Model, pairs: Sequence[Pair]) -> dict[str, float]:
    weight: dict[str, float] = {}
    for pair in pairs:
        for m, w in weights_of(model, *pair).items():
            weight[m] = weight.get(m, 0.0) + w
    return weight


@cache
def alone(kind: str, tied: bool, layers: int, count: int) -> Whole:
    model, pairs = deepcopy(whole(kind, tied, layers)), microbatches(kind, count)
    weight = global_weight(model, pairs)
    losses: list[Loss] = []
    for pair in pairs:
        losses.append(loss_of(model, *pair))
        losses[-1].over(weight, SCALE).backward()
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total.means(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def local(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def worst(pipeline: Pipeline, loss: Loss | None, expected: Whole) -> float:
    """The largest relative difference of a loss or a gradient on this rank; infinite if one is missing or too many."""
    means, grads = expected
    found = {name: p.grad for name, p in pipeline.named_parameters() if p.grad is not None}
    away = [difference(local(grad), grads[name]) for name, grad in found.items()]
    missing = {name for name, _ in pipeline.named_parameters() if name in grads} - set(found)
    if loss is not None:
        away += [abs(value - means[m]) / abs(means[m]) for m, value in loss.means().items()]
    return float("inf") if missing else max(away)


@dataclass
class Told:
    """What a rank has to say of one run: the worst difference, its own parameters, what it did and how ranks waited."""

    worst: float
    names: list[str]
    trace: list[Action]
    waits: list[float]


def certify(schedule: Schedule, ranks: int, cases: Sequence[tuple[str, bool]], alone: Sequence[Whole]) -> list[Told]:
    world = join(Layout(pipeline=ranks, schedule=schedule), torch.device("cpu"))
    rows = []
    for (kind, tied), expected in zip(cases, alone, strict=True):
        pairs = microbatches(kind, 2 * ranks)
        pipeline = split(deepcopy(whole(kind, tied, 2 * ranks)), world)
        loss = pipeline.backward(pairs, global_weight(pipeline.models[0], pairs), SCALE)
        assert (loss is not None) == (pipeline.last in pipeline.stages)
        names = [name for name, _ in pipeline.named_parameters() if name not in pipeline.copies()]
        trace = [moment.action for moment in pipeline.step.trace]
        rows.append(Told(worst(pipeline, loss, expected), names, trace, pipeline.waits()))
    return rows


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_and_gradients_are_one_process_s(crew: Crew, schedule: Schedule, ranks: int):
    odd, kinds = list(SCHEDULES).index(schedule) % 2, ["text", "image", "vision", "action"]
    cases = [
        (kind, (place + odd) % 2 == 0) for place, kind in enumerate(kinds if ranks == 2 else kinds[1 + odd : 2 + odd])
    ]
    expected = [alone(*case, 2 * ranks, 2 * ranks) for case in cases]
    answers = crew.run(certify, schedule, ranks, cases, expected, size=ranks)
    for (kind, tied), told in zip(cases, zip(*answers, strict=True), strict=True):
        assert max(rank.worst for rank in told) <= 1e-5, (kind, tied)
        names = sorted(name for rank in told for name in rank.names)
        assert names == sorted(name for name, _ in whole(kind, tied, 2 * ranks).named_parameters())
        assert [rank.trace for rank in told] == order(schedule, ranks, 2 * ranks)
        assert all(rank.waits == told[0].waits for rank in told)
        assert all(0 < share < 1 for share in told[0].waits)


def certify_deep(schedule: Schedule) -> float:
    """A frozen tower with deep rows, and a loss by chunks of tokens."""
    world = join(Layout(pipeline=2, schedule=schedule), torch.device("cpu"))
    pairs, pipeline = microbatches("deep", 4), split(deepcopy(whole("deep", True, 6)), world)
    loss = pipeline.backward(pairs, global_weight(pipeline.models[0], pairs), SCALE, chunk=4)
    return worst(pipeline, loss, alone("deep", True, 6, 4))


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "zbv"])
def test_deep_rows_of_a_frozen_tower_reach_the_first_layers(crew: Crew, schedule: Schedule):
    assert max(crew.run(certify_deep, schedule, size=2)) <= 1e-5


def untied_by_mistake(schedule: Schedule) -> float:
    world = join(Layout(pipeline=2, schedule=schedule), torch.device("cpu"))
    pairs, pipeline = microbatches("text", 4), split(deepcopy(whole("text", True, 4)), world)
    pipeline.tie = lambda: None
    loss = pipeline.backward(pairs, global_weight(pipeline.models[0], pairs), SCALE)
    return worst(pipeline, loss, alone("text", True, 4, 4))


def test_a_table_whose_gradients_are_not_summed_is_noticed(crew: Crew):
    assert min(crew.run(untied_by_mistake, "1f1b", size=2)) > 1e-2


def tables(schedule: Schedule) -> list[Tensor]:
    """The table of words on a rank that has it, after each of two steps of Adam."""
    world = join(Layout(pipeline=2, schedule=schedule), torch.device("cpu"))
    pipeline = split(deepcopy(whole("image", True, 4)), world)
    optimizer, found = torch.optim.AdamW([p for _, p in pipeline.named_parameters()], lr=1e-2), []
    for count in (2, 4):
        pairs = microbatches("image", count)
        optimizer.zero_grad()
        pipeline.backward(pairs, global_weight(pipeline.models[0], pairs), SCALE)
        optimizer.step()
        found.append(dict(pipeline.named_parameters())["embed_tokens.weight"].detach().clone())
    return found


def test_tied_tables_stay_equal_in_every_bit(crew: Crew):
    first, last = crew.run(tables, "1f1b", size=2)
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert not torch.equal(first[0], first[1])


# ---- with other axes ----------------------------------------------------------------------------------------------


def certify_zero(schedule: Schedule, tied: bool, zero: int) -> float:
    """Two pipelines, whose ranks at the same stage divide their weights by FSDP2."""
    world = join(Layout(pipeline=2, schedule=schedule, zero=zero, exact=False), torch.device("cpu"))
    pairs, pipeline = microbatches("vision", 8), split(deepcopy(whole("vision", tied, 4)), world)
    for model in pipeline.models:
        shard.apply(model, world, pipeline.borrowed(model))
    weight = global_weight(pipeline.models[0], pairs)
    pipeline.backward(pairs[world.index(*DATA) :: 2], weight, SCALE)
    assert all(isinstance(p, DTensor) for _, p in pipeline.named_parameters())
    return worst(pipeline, None, alone("vision", tied, 4, 8))


@pytest.mark.parametrize(
    ("schedule", "tied", "zero"),
    [("gpipe", True, 2), ("1f1b", False, 3), ("zero_bubble", True, 3), ("zbv", True, 3), ("dualpipev", False, 3)],
)
def test_zero_divides_the_weights_of_stages(crew: Crew, schedule: Schedule, tied: bool, zero: int):
    assert max(crew.run(certify_zero, schedule, tied, zero)) <= 1e-5


def certify_tensor(schedule: Schedule, sequence: bool) -> float:
    """A pipeline whose stages are cut over two ranks each."""
    world = join(Layout(pipeline=2, tensor=2, schedule=schedule, sequence=sequence), torch.device("cpu"))
    model, pairs = deepcopy(whole("image", True, 4)), microbatches("image", 4)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tensor.apply(model, world)
    pipeline = split(model, world)
    loss = pipeline.backward(pairs, global_weight(pipeline.models[0], pairs), SCALE)
    means, grads = alone("image", True, 4, 4)
    cut, group = {}, world.group("tensor")
    for name, parameter in pipeline.named_parameters():
        if parameter.grad is None:
            continue
        how = tensor.slice_of(name, len(shapes[name]), shared=tensor.shares_tokens(model.config, world))
        cut[name] = Leaf(name, parameter, parameter, tuple(shapes[name]), how, world).part(grads[name])
        if how.partial:
            all_reduce(parameter.grad, group)
    return worst(pipeline, loss, (means, cut))


@pytest.mark.parametrize(("schedule", "sequence"), [("1f1b", True), ("zbv", False), ("zero_bubble", True)])
def test_matrices_of_stages_are_cut(crew: Crew, schedule: Schedule, sequence: bool):
    assert max(crew.run(certify_tensor, schedule, sequence)) <= 1e-5


def summed_in_order(schedule: Schedule, zero: int, ranks: int) -> dict[str, Tensor]:
    """Gradients of four microbatches, added one by one in the order of microbatches, whoever read them."""
    world = join(Layout(pipeline=2, schedule=schedule, zero=zero), torch.device("cpu"))
    pairs, pipeline = microbatches("image", 8), split(deepcopy(whole("image", True, 4)), world)
    for model in pipeline.models:
        shard.apply(model, world, pipeline.borrowed(model))
    counters = {id(model): Counter() for model in pipeline.models}

    def add(model: Model) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                tree_all_reduce(parameter.grad, world.group(*DATA))
        counters[id(model)].push([p.grad for p in model.parameters()])
        for parameter in model.parameters():
            parameter.grad = None

    pipeline.backward(pairs[world.index(*DATA) :: ranks], global_weight(pipeline.models[0], pairs), SCALE, after=add)
    for model in pipeline.models:
        for parameter, gradient in zip(model.parameters(), counters[id(model)].total(), strict=True):
            parameter.grad = gradient
    pipeline.tie()
    return {name: local(p.grad).clone() for name, p in pipeline.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("schedule", "zero"), [("1f1b", 0), ("1f1b", 2), ("zero_bubble", 2)])
def test_sums_in_one_order_are_the_same_bits_for_one_pipeline_and_two(crew: Crew, schedule: Schedule, zero: int):
    one = crew.run(summed_in_order, schedule, zero, 1, size=2)
    two = crew.run(summed_in_order, schedule, zero, 2)
    for rank, grads in enumerate(two):
        assert grads.keys() == one[rank // 2].keys()
        assert all(torch.equal(grads[name], one[rank // 2][name]) for name in grads)


# ---- without gradients -------------------------------------------------------------------------------------------


def evaluated(schedule: Schedule) -> tuple[dict[str, float], list[Tensor]] | None:
    world = join(Layout(pipeline=2, schedule=schedule), torch.device("cpu"))
    pipeline = split(deepcopy(whole("vision", False, 4)), world)
    longer = pack_rows([[document("vision", 9)]], 2 * ROW + 8, 0)
    pairs = [*microbatches("vision", 2), (longer, longer)]
    loss, read = pipeline.evaluate(pairs), pipeline.read([corrupted for _, corrupted in pairs])
    return None if loss is None or read is None else (loss.means(), read)


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zbv"])
def test_evaluation_reads_microbatches_of_any_length(crew: Crew, schedule: Schedule):
    answers = [answer for answer in crew.run(evaluated, schedule, size=2) if answer is not None]
    assert len(answers) == 1
    longer = pack_rows([[document("vision", 9)]], 2 * ROW + 8, 0)
    model, pairs = whole("vision", False, 4), [*microbatches("vision", 2), (longer, longer)]
    with torch.no_grad():
        losses = [loss_of(model, *pair) for pair in pairs]
        assert all(torch.equal(ours, model(b)) for ours, (_, b) in zip(answers[0][1], pairs, strict=True))
    assert answers[0][0] == pytest.approx((losses[0] + losses[1] + losses[2]).means(), rel=1e-6)


# ---- what is refused ----------------------------------------------------------------------------------------------


def refused(count: int, ragged: bool) -> str:
    world = join(Layout(pipeline=2, schedule="1f1b"), torch.device("cpu"))
    pairs = microbatches("text", count)
    longer = pack_rows([[document("text", 9)]], 2 * ROW + 8, 0)
    try:
        split(deepcopy(whole("text", True, 4)), world).backward([*pairs, *[(longer, longer)] * ragged], {}, {})
    except BadInput as wrong:
        return str(wrong)
    return ""


def test_what_a_schedule_cannot_run_is_refused_by_every_rank(crew: Crew):
    few, ragged = crew.run(refused, 1, False, size=2), crew.run(refused, 3, True, size=2)
    assert few == ["train.num_accumulate=1 is too few for the schedule 1f1b over 2 ranks: set it to 2 or more"] * 2
    assert all("have 96 and 104 tokens" in said for said in ragged)
