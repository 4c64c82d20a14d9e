"""Context parallelism: ranks share out the tokens of a batch, and exchange what attention reads of the others' tokens.

All else in the network works token by token, so that the true gradient is the plain sum over the ranks. There are two
ways. Ulysses (Jacobs et al. 2023) exchanges tokens for heads: each rank attends with some heads over the whole axis,
in whatever form suits the batch. Gathering (as Llama 3 was trained) brings all keys and values to every rank.

T tokens of the whole batch, t those of this rank, n ranks; H query heads, G key-value heads, K head width, h heads that
one rank attends with.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed import ProcessGroup

from litchi.config import BadInput
from litchi.model.attention import Attend, attend_dense, attention_among, attention_for, dense_mask, flex_attend
from litchi.model.cache import Columns, KVCache
from litchi.model.network import Model, ModelConfig, Velocity
from litchi.model.vision import Tower
from litchi.parallel import tower
from litchi.parallel.collectives import all_gather, exchange, reduce_scatter
from litchi.parallel.mesh import World
from litchi.schema.sequence import COLUMNS, Batch, Vectors, seen_from

# ---- tokens -------------------------------------------------------------------------------------------------------


def share(batch: Batch, c: ModelConfig, world: World) -> Batch:
    """This rank's tokens of a batch that all ranks of the axis hold, and the vectors whose rows stand there.

    What reads whole pictures gets them whole: their other rows stand nowhere and weigh nothing. A batch is corrupted
    before it is shared out. Raises BadInput if the tokens cannot be divided.
    """
    if world.degree("context") == 1:
        return batch
    keep = held(len(batch), world).to(batch.tokens.device)
    columns = {name: getattr(batch, name)[keep] for name in (*COLUMNS, "docs")}
    moved = torch.full_like(batch.docs, -1).index_copy(0, keep, torch.arange(len(keep), device=keep.device))
    vectors = {m: standing(v, moved, keeps=keeps(c, m, world)) for m, v in batch.vectors.items()}
    return Batch(**columns, vectors=vectors, cu_seqlens=bounds(columns["docs"]), row=batch.row)


def held(length: int, world: World) -> Int[Tensor, "t"]:
    """Which tokens are this rank's: neighbours for Ulysses, whose ranks all attend over the whole axis. Where each rank
    asks for its own tokens only, an early and a late piece, since in causal text the late ones read more."""
    degree, index = world.degree("context"), world.index("context")
    pieces = [index] if world.layout.attention == "ulysses" else [index, 2 * degree - 1 - index]
    count = degree * len(pieces)
    if length % count:
        raise BadInput(
            f"{length} tokens cannot be shared out in {count} pieces over {degree} ranks of train.layout.context: "
            f"make train.batches.rows x row a multiple of {count}"
        )
    return torch.arange(length).view(count, -1)[pieces].flatten()


def standing(v: Vectors, moved: Int[Tensor, "T"], *, keeps: Literal["rows", "pictures", "all"]) -> Vectors:
    """The rows that stand in a share; `moved` says where each token is in it, -1 for those of others."""
    v = replace(v, index=torch.where(v.index < 0, -1, moved[v.index]))
    inside = v.index >= 0
    if keeps == "rows":
        return v[inside]
    seen = v if keeps == "all" else seen_from(v, inside)
    return replace(seen, weight=seen.weight * (seen.index >= 0))


def keeps(c: ModelConfig, modality: str, world: World) -> Literal["rows", "pictures", "all"]:
    """What a reader must have beside the rows that stand in a share: the others of their pictures for a tower, or for
    places counted from a corner; all pictures where ranks share those out."""
    match c.modalities[modality]:
        case Tower() if tower.shares(world):
            return "all"
        case Tower() | Velocity():
            return "pictures"
        case _:
            return "rows"


def bounds(docs: Int[Tensor, "t"]) -> Int[Tensor, "S+1"]:
    """Where documents, or pieces of them, begin, and the end."""
    _, lengths = docs.unique_consecutive(return_counts=True)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


# ---- attention ----------------------------------------------------------------------------------------------------


def apply(model: Model, world: World) -> None:
    """Let attention reach over the whole axis. The model then reads shares of batches, or whole ones with a cache.

    Raises BadInput if a rank has no whole number of heads to attend with.
    """
    group = world.group("context")
    if group is None:
        return
    heads = model.config.num_heads // world.degree("tensor")
    match world.layout.attention:
        case "gather":
            model.attention = partial(gathering, group=group)
        case _ if heads % group.size():
            raise BadInput(
                f"{heads} heads of a rank cannot be dealt to {group.size()} ranks of train.layout.context: "
                f"lower it, or set train.layout.attention=gather"
            )
        case _:
            model.attention = partial(exchanging, group=group)


def exchanging(batch: Batch, cache: KVCache | None, *, group: ProcessGroup) -> Attend:
    """Ulysses, in the form of attention that suits the whole batch."""
    if cache is not None or whole_rows(batch, pieces=1):
        return attention_for(batch, cache)
    return partial(attend_by_heads, attend=attention_among(whole_columns(batch, group), batch.row), group=group)


def attend_by_heads(q_tHK: Tensor, k_tGK: Tensor, v_tGK: Tensor, *, attend: Attend, group: ProcessGroup) -> Tensor:
    """Some heads of all tokens, for all heads of some tokens, and back. oracle: attend over the whole axis

    Key-value heads that are too few to go round are repeated, no more often than needed.
    """
    size = group.size()
    times = size // math.gcd(size, k_tGK.shape[1])
    k, v = (x if times == 1 else x.repeat_interleave(times, 1) for x in (k_tGK, v_tGK))
    dealt = [x.unflatten(1, (size, -1)) for x in (q_tHK, k, v)]
    sent_nthK = torch.cat(dealt, 2).transpose(0, 1)
    got_ThK = exchange(sent_nthK, swap, swap, group).flatten(0, 1)
    o_ThK = attend(*got_ThK.split([x.shape[2] for x in dealt], 1))
    back_nthK = exchange(o_ThK.unflatten(0, (size, -1)), swap, swap, group)
    return back_nthK.transpose(0, 1).flatten(1, 2)


def swap(x: Tensor, group: ProcessGroup) -> Tensor:
    """Row i goes to rank i, and row j comes from rank j: its own gradient."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


def gathering(batch: Batch, cache: KVCache | None, *, group: ProcessGroup) -> Attend:
    """The queries of this rank's tokens over the keys and values of all. Keys may come in any order."""
    if cache is not None or whole_rows(batch, pieces=2):
        return attention_for(batch, cache)
    q, k = Columns.of(batch), whole_columns(batch, group)
    attend = flex_attend(q, k) if q.docs.is_cuda else partial(attend_dense, mask_TM=dense_mask(q, k))
    return partial(attend_to_gathered, attend=attend, group=group)


def attend_to_gathered(q_tHK: Tensor, k_tGK: Tensor, v_tGK: Tensor, *, attend: Attend, group: ProcessGroup) -> Tensor:
    """Gradients of keys and values are summed where they came from. oracle: attend over the whole axis"""
    k_TGK, v_TGK = exchange(torch.stack([k_tGK, v_tGK], 1), all_gather, summed_in_fp32, group).unbind(1)
    return attend(q_tHK, k_TGK, v_TGK)


def summed_in_fp32(grad: Tensor, group: ProcessGroup) -> Tensor:
    return reduce_scatter(grad.float(), group).to(grad.dtype)


def whole_rows(batch: Batch, pieces: int) -> bool:
    """Whether the pieces of a share are whole rows: no document crosses those, and nothing need be exchanged."""
    return batch.row > 0 and len(batch) % (pieces * batch.row) == 0


def whole_columns(batch: Batch, group: ProcessGroup) -> Columns:
    """Of the tokens of all ranks, in their order."""
    own = torch.stack([batch.docs, batch.spans, batch.readable], 1)
    docs, spans, readable = all_gather(own, group).unbind(1)
    return Columns(docs, spans, readable.bool())
