"""What one microbatch asks of a rank, part by part: bytes kept for the backward pass, peaks in between, operations.

Each part of the network runs once, forwards and backwards, on fake tensors and among fake ranks, so that whatever the
network or its hooks become, this follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litchi.config import to_json
from litchi.model.attention import BLOCK, Attend, Piece, attend_documents
from litchi.model.moe import SparseMLP
from litchi.model.network import Model, ModelConfig
from litchi.model.objective import text_loss
from litchi.model.rope import rotations
from litchi.parallel import context, expert, recompute, tensor
from litchi.parallel.collectives import take_rows
from litchi.parallel.expert import travel
from litchi.parallel.fake import FakeMeter, fake_tensors, fake_world
from litchi.parallel.mesh import Layout, World
from litchi.parallel.meter import Op
from litchi.parallel.recompute import Recompute
from litchi.schema.sequence import Batch

Attention = Callable[[Batch, None], Attend]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is trained: one microbatch is `rows` rows of `row` tokens, a step is `microbatches` of them over all ranks.

    Rows are taken to be full of text, and every token to have a label.
    """

    model: ModelConfig
    rows: int
    row: int
    microbatches: int
    dtype: str = "bfloat16"
    """What matrices are multiplied in; weights are fp32."""
    muon: bool = True
    """Whether matrices of the trunk are stepped by Muon; AdamW steps the rest."""
    average: bool = True
    """Whether averaged weights are kept."""
    chunk: int = 0
    """Tokens whose scores of the vocabulary exist at once; 0 is all."""
    recompute: Recompute = "none"
    device: str = "cpu"
    """cpu or cuda: they attend in different ways."""

    @property
    def tokens(self) -> int:
        """Of one microbatch."""
        return self.rows * self.row


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes beyond what is alive before the part runs, and its operations."""

    saved: int
    """Kept from forward to backward, what the next part reads included."""
    forward_peak: int
    backward_peak: int
    """Gradients of the part's parameters included."""
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Parts as one rank of tensor and context parallelism runs them."""

    fixed: int
    """Of a microbatch as long as it is worked on: masks and rotations."""
    start: Part
    layer: Part
    end: Part
    """The last norm, scores, and the loss."""
    hidden: int
    """Bytes of the states that one stage of a pipeline sends to the next."""


KNOWN: dict[str, Anatomy] = {}
"""What has been taken apart already."""


def dissect(w: Workload, layout: Layout) -> Anatomy:
    """`layout` counts by its ranks of tensor, context and expert parallelism. Raises BadInput as `plan.apply` does."""
    alone = replace(layout, data=layout.expert, replicate=1, pipeline=1, schedule="1f1b", zero=0)
    key = to_json(replace(w, microbatches=1)) + to_json(alone)
    if key not in KNOWN:
        KNOWN[key] = take_apart(w, alone, layout.tensor * layout.context * layout.expert)
    return KNOWN[key]


def take_apart(w: Workload, alone: Layout, ranks: int) -> Anatomy:
    with fake_world(alone, ranks) as world:
        with torch.device("meta"):
            model = Model(replace(w.model, num_layers=2, modalities={}))
        tensor.apply(model, world)
        context.apply(model, world)
        expert.apply(model, world)
        recompute.apply(model, w.recompute)
        prepare(model, w, world)
        meter = FakeMeter(listing=True)
        with fake_tensors(), torch.autocast("cpu", torch.bfloat16, enabled=w.dtype == "bfloat16", cache_enabled=False):
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                meter.see(parameter)
            with meter.lasting():
                return run_parts(model, w, world, meter)


def run_parts(model: Model, w: Workload, world: World, meter: FakeMeter) -> Anatomy:
    batch = text_batch(w.rows, w.row, w.tokens // world.degree("context"))
    before = meter.mark()
    rotation = None if w.model.places else rotation_of(model, batch)
    attend = model.attention(batch, None)
    fixed = meter.alive - before
    meter.take()
    shared = tensor.shares_tokens(model.config, world)

    def start() -> Tensor:
        x_TD = model.embed(batch, [])
        return take_rows(x_TD, world.group("tensor")) if shared else x_TD

    def layer(x_TD: Tensor) -> Tensor:
        route = model.route(batch)
        return model.layers[1](x_TD, index=1, rotation=rotation, attend=attend, route=route, cache=None)

    def end(x_TD: Tensor) -> Tensor:
        return text_loss(model, model.finish(x_TD, batch), batch.labels, batch.weights, w.chunk)

    first, x_TD = run_part(meter, model, start)
    middle, x_TD = run_part(meter, model, layer, x_TD)
    hidden = x_TD.numel() * x_TD.element_size()
    last, _ = run_part(meter, model, end, x_TD)
    return Anatomy(fixed, first, middle, last, hidden)


def run_part(meter: FakeMeter, model: Model, part: Callable[..., Tensor], *given: Tensor) -> tuple[Part, Tensor]:
    """The part's account, and what the next part reads."""
    read = [x.detach().requires_grad_() for x in given]
    meter.take()
    before = meter.mark()
    made = part(*read)
    saved, forward_peak, forward = meter.alive - before, meter.peak - before, meter.take()
    gradient = torch.empty_like(made)
    meter.take()
    handed = gradient.untyped_storage().nbytes()
    meter.mark()
    made.backward(gradient)
    backward_peak, backward = meter.peak - before - handed, meter.take()
    out = made.detach().clone()
    model.zero_grad(set_to_none=True)
    return Part(saved, forward_peak, backward_peak, tuple(forward), tuple(backward)), out


# ---- stand-ins ----------------------------------------------------------------------------------------------------


def text_batch(rows: int, row: int, length: int = 0) -> Batch:
    """A batch of text whose rows are one document each, or the first `length` tokens of such a batch."""
    index = torch.arange(length or rows * row)
    return Batch(
        tokens=index,
        labels=index,
        weights=torch.ones(len(index)),
        positions=index[:, None].expand(-1, 3),
        spans=index,
        readable=torch.ones(len(index), dtype=torch.bool),
        vectors={},
        docs=index // row,
        cu_seqlens=torch.arange(0, len(index) + 1, row),
        row=row,
    )


def rotation_of(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    c = model.config
    return rotations(batch.positions, c.head_width, c.theta, c.scaling, c.sections)


def prepare(model: Model, w: Workload, world: World) -> None:
    """Let the network run without values: tokens take even routes, and on a GPU attention has its GPU's form."""
    if w.model.experts > 1:
        model.route = evenly
    else:
        model.route = lambda batch: [batch.tokens, batch.tokens[:0]]
    for module in model.modules():
        if isinstance(module, SparseMLP):
            module.work = partial(read_evenly, group=world.group("expert"))
    if w.device == "cuda":
        model.attention = partial(flash_among, row=w.row, world=world)
    else:
        model.attention = partial(documents_among, w=w, world=world, other=model.attention)


def evenly(batch: Batch) -> list[Tensor]:
    half = len(batch) // 2
    return [batch.tokens[:half], batch.tokens[half:]]


def read_evenly(x_ND: Tensor, counts_E: Tensor, experts: Any, *, group: Any) -> Tensor:
    """As if every expert were chosen as often as the others."""
    if group is None:
        return each_in_turn(x_ND, list(experts))
    even = [len(x_ND) // group.size()] * group.size()
    y_ND = each_in_turn(travel(x_ND[: sum(even)], even, even, group), list(experts))
    return travel(y_ND, even, even, group)


def each_in_turn(x_ND: Tensor, experts: list[Any]) -> Tensor:
    return torch.cat([expert(x) for x, expert in zip(x_ND.tensor_split(len(experts)), experts, strict=True)])


def documents_among(batch: Batch, cache: None, *, w: Workload, world: World, other: Attention) -> Attend:
    """As a CPU attends; which documents there are is known, and not asked of values."""
    group = world.group("context")
    alone = group is None or context.whole_rows(batch, 1 if world.layout.attention == "ulysses" else 2)
    if not alone and world.layout.attention == "gather":
        return other(batch, cache)
    count = len(batch) // w.row if alone else w.rows
    attend = partial(attend_documents, pieces=documents(count, w.row))
    return attend if group is None or alone else partial(context.attend_by_heads, attend=attend, group=group)


def documents(count: int, row: int) -> list[Piece]:
    """What `attention.pieces_of` makes of so many documents of causal text."""
    each = max(1, BLOCK // row)
    lengths = [each * row] * (count // each) + ([count % each * row] if count % each else [])
    return [Piece(length, [torch.zeros(*block) for block in blocks(length)]) for length in lengths]


def blocks(length: int) -> list[tuple[int, int]]:
    """Queries that look together, and the keys that they see."""
    starts = range(0, length, BLOCK)
    return [(min(BLOCK, length - start), min(start + BLOCK, length)) for start in starts]


def flash_among(batch: Batch, cache: None, *, row: int, world: World) -> Attend:
    """Attention whose scores are never whole, as GPUs have it."""
    group = world.group("context")
    if group is None or context.whole_rows(batch, pieces=1):
        return partial(flash, row=row)
    if world.layout.attention == "ulysses":
        return partial(context.attend_by_heads, attend=partial(flash, row=row), group=group)
    return partial(context.attend_to_gathered, attend=partial(flash, row=row), group=group)


def flash(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *, row: int) -> Tensor:
    """Rows of queries over rows of keys."""
    rows = k_TGK.shape[0] // row
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q_THK, k_TGK, v_TGK))
    v = v.to(q.dtype)
    o_RHWK = F.scaled_dot_product_attention(q, k.to(q.dtype), v, enable_gqa=q.shape[1] != k.shape[1])
    return o_RHWK.transpose(1, 2).flatten(0, 1)
