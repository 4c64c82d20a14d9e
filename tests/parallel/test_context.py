"""Tokens shared out over ranks: each modality has the loss and gradients of one process, whichever way ranks attend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from litchi.config import BadInput
from litchi.model.network import Model
from litchi.model.objective import corrupt, loss_of, weights_of
from litchi.parallel import context
from litchi.parallel.context import share
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import Axis, Layout, World, join
from litchi.schema.sample import Sample
from litchi.schema.sequence import Batch, Modality, TokenSequence, pack, pack_rows, padding
from tests.laws.documents import model, part, processor
from tests.parallel.test_modality import DRAWN, SEEN, document, model_of, pictured

TOLERANCE = 1e-5
"""Relative to the largest value of a gradient: the same sums in another order, in fp32."""

LEAD = 7
Way = Literal["ulysses", "gather"]
WAYS: tuple[Way, ...] = ("ulysses", "gather")


@dataclass(frozen=True)
class Case:
    """A network and what it reads; some documents are longer than a rank's share."""

    model: Model
    batch: Batch


def parts_case(
    kinds: Sequence[str],
    *,
    row: int,
    num_rows: int = 3,
    flow: bool = False,
    tower: bool = False,
    experts: int = 1,
) -> Case:
    p = processor(flow=flow, tower=tower)
    rng = np.random.default_rng(5)
    samples = [Sample(tuple(part(kind, rng) for kind in kinds), key=str(i), source="law") for i in range(3)]
    documents = [p.encode(s, np.random.default_rng([7, i])) for i, s in enumerate(samples)]
    return Case(model(p, flow=flow, experts=experts), laid(documents, row, p.tokenizer.pad, num_rows))


def made_case(kind: str, modality: Modality) -> Case:
    """Pictures for which places are counted from a corner, or whose rows go to several layers."""
    of = {**DRAWN, **SEEN}[kind]
    weight = 1.0 if kind in DRAWN else 0.0
    documents = [document(0), *(pictured(of, modality, i, weight=weight) for i in range(5))]
    # one head of keys and values, so that ranks repeat it
    built = model_of({str(modality): of})
    return Case(built, laid(documents, 0, 0))


def laid(documents: Sequence[TokenSequence], row: int, pad: int, num_rows: int = 3) -> Batch:
    if row:
        return pack_rows([[d] for d in documents] + [[]] * (num_rows - len(documents)), row, pad)
    before = padding(LEAD, pad)  # so that ranks' shares end within pictures
    return pack([before, *documents, padding(-(LEAD + sum(map(len, documents))) % 8 or 8, pad)])


CASES = {
    "text": partial(parts_case, ("user", "answer", "answer"), row=0),
    "text in rows": partial(parts_case, ("user", "answer", "answer"), row=24),
    "text in rows that stay whole": partial(parts_case, ("user", "answer", "answer"), row=24, num_rows=8),
    "image, mask": partial(parts_case, ("user", "draw", "see", "answer", "frame"), row=0),
    "image, mask, in rows": partial(parts_case, ("user", "draw", "see", "answer", "frame"), row=80),
    "image, flow": partial(parts_case, ("user", "draw", "see", "answer", "frame"), row=0, flow=True),
    "tower": partial(parts_case, ("see", "answer", "user", "see", "answer"), row=0, tower=True),
    "action": partial(parts_case, ("frame", "move", "frame", "step", "move"), row=0),
    "two experts": partial(parts_case, ("user", "draw", "answer", "move"), row=0, experts=2),
}
TWO_HEADS = {
    "image, velocity": partial(made_case, "velocity", Modality.IMAGE),
    "deep tower": partial(made_case, "tower-qwen", Modality.VISION),
}
"""Networks with too few heads for Ulysses on four ranks."""


# ---- loss and gradients -------------------------------------------------------------------------------------------


def gaps(layout: Layout, names: Sequence[str]) -> dict[str, tuple[float, float, str]] | None:
    """How far loss and gradients of each case are from one process, and which gradient is farthest."""
    world = join(layout, torch.device("cpu"))
    found = {}
    for name in names:
        make = {**CASES, **TWO_HEADS}[name]
        totals, grads = learn(make(), world)
        for tensor in [*totals.values(), *grads.values()]:
            dist.all_reduce(tensor)
        if world.rank == 0:
            found[name] = compared((totals, grads), learn(make(), World()))
    return found if world.rank == 0 else None


Learned = tuple[dict[str, Tensor], dict[str, Tensor]]


def learn(case: Case, world: World) -> Learned:
    corrupted = corrupt(case.model, case.batch, torch.Generator().manual_seed(3))
    weight = weights_of(case.model, case.batch, corrupted)
    context.apply(case.model, world)
    own, read = (share(b, case.model.config, world) for b in (case.batch, corrupted))
    loss = loss_of(case.model, own, read)
    loss.over(weight, {}).backward()
    zero = torch.zeros(())
    grads = {n: zero.expand_as(p).clone() if p.grad is None else p.grad for n, p in case.model.named_parameters()}
    return {m: total.detach() for m, total in loss.total.items()}, grads


def compared(found: Learned, alone: Learned) -> tuple[float, float, str]:
    losses, grads = (
        {name: gap(a[name], b[name], size(b, name)) for name in b} for a, b in zip(found, alone, strict=True)
    )
    worst = max(grads, key=lambda name: grads[name])
    return max(losses.values()), grads[worst], worst


def gap(a: Tensor, b: Tensor, largest: Tensor) -> float:
    return float((a - b).abs().max() / largest.clamp_min(1e-12))


def size(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The largest value; of a bias of keys, which softmax cancels, that of their weight: its own is only rounding."""
    return tensors[name.replace("k_proj.bias", "k_proj.weight")].abs().max()


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_shared_tokens_learn_as_one_process_does(crew: Crew, way: Way, degree: int):
    names = [*CASES, *(TWO_HEADS if degree == 2 or way == "gather" else ())]
    found = crew.run(gaps, Layout(context=degree, attention=way), names, size=degree)[0]
    assert set(found) == set(names)
    for name, (loss, gradient, worst) in found.items():
        assert max(loss, gradient) <= TOLERANCE, (name, loss, gradient, worst)


# ---- shares -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seat(World):
    """A place on the axis of context, without the other ranks."""

    seat: int = 0

    def index(self, *axes: Axis) -> int:
        return self.seat


def shares(batch: Batch, case: Case, way: Way, degree: int) -> list[Batch]:
    layout = Layout(data=1, context=degree, attention=way)
    return [share(batch, case.model.config, Seat(layout, seat=seat)) for seat in range(degree)]


@pytest.mark.parametrize("way", WAYS)
def test_every_token_and_row_stands_in_one_share(way: Way):
    case = CASES["tower"]()
    numbered = replace(case.batch, tokens=torch.arange(len(case.batch)))
    parts = shares(numbered, case, way, 4)
    assert sorted(torch.cat([s.tokens for s in parts]).tolist()) == numbered.tokens.tolist()
    for modality, v in numbered.vectors.items():
        stands = [s.vectors[modality].index >= 0 for s in parts]
        where = [s.tokens[s.vectors[modality].index[i]] for s, i in zip(parts, stands, strict=True)]
        assert sorted(torch.cat(where).tolist()) == sorted(v.index.tolist())
        assert sum(float(s.vectors[modality].weight.sum()) for s in parts) == float(v.weight.sum())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["tower", "image, velocity"])
def test_what_reads_whole_pictures_gets_them_whole(way: Way, name: str):
    case = (CASES | TWO_HEADS)[name]()
    modality = Modality.VISION if name == "tower" else Modality.IMAGE
    v = case.batch.vectors[modality]
    num_cut = 0
    for part_of in shares(case.batch, case, way, 4):
        own = part_of.vectors[modality]
        num_cut += int((own.index < 0).sum())
        for picture in own.place[:, 0].unique():
            assert (own.place[:, 0] == picture).sum() == (v.place[:, 0] == picture).sum()
    assert num_cut  # or the test shows nothing


def test_gathering_gives_each_rank_early_and_late_tokens():
    case = CASES["text"]()
    numbered = replace(case.batch, tokens=torch.arange(len(case.batch)))
    means = {float(s.tokens.float().mean()) for s in shares(numbered, case, "gather", 4)}
    assert means == {(len(case.batch) - 1) / 2}


def test_what_cannot_be_shared_out_is_refused():
    batch = pack([document(0), document(1), padding(2, 0)])
    case = Case(model_of({}), batch)
    with pytest.raises(BadInput, match="a multiple of 8"):
        shares(batch, case, "gather", 4)
    with pytest.raises(BadInput, match="a multiple of 4"):
        shares(batch, case, "ulysses", 4)


def too_few_heads(layout: Layout) -> str:
    world = join(layout, torch.device("cpu"))
    try:
        context.apply(model_of({}), world)
    except BadInput as error:
        return str(error)
    return ""


def test_too_few_heads_for_ulysses_are_refused(crew: Crew):
    said = crew.run(too_few_heads, Layout(context=4))
    assert all("attention=gather" in line for line in said)
    assert not any(crew.run(too_few_heads, Layout(context=4, attention="gather")))
