"""Rules under which what the network makes of a token does not depend on which tokens it is computed beside.

Then training, prefill in any chunks, decoding, denoising and every mix of them give the same bits. On a CPU, PyTorch's
libraries break that in four places, and numbers of rows mend it (measured on AVX512 with torch 2.13; `broken` measures
it here): products of few rows take another way, attention of few queries does, its kernel adds up keys in an order that
depends on their number, and the last values of a SiLU or GELU are rounded otherwise. So a query is shown as many keys
as its own last one asks for, whatever is read beside it. Pictures that a tower reads are read one by one.

T tokens, H query heads, G key-value heads, K head width, n queries, M keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from litchi.model.attention import Attend, dense_mask
from litchi.model.cache import Columns, KVCache
from litchi.model.network import MLP, Features, Model, PlainMLP, Reader, TimeEmbedder
from litchi.model.vision import VisionTower
from litchi.schema.sequence import Batch

ROWS = 4
"""Rows of a product come in multiples of this."""
QUERIES = 4
"""And queries: the kernel takes 32, 64 or 256 at once, and of what is left over one would go another way."""
KEYS = 64
"""And keys: of what a query sees, up to the last; others that it does not see fill it up."""
VALUES = 32
"""Values of an activation come in multiples of this: two registers of AVX512."""
TILE = 128
"""On a GPU a product has just so many rows, since its library chooses a kernel by their number. Up to as many cost no
more than one where weights are read from memory for as long as that."""


def apply(model: Model) -> Model:
    """Put the rules into a network; it is changed. Its weights and names stay as they are."""
    if model.product is product:
        return model
    for module in model.modules():
        match module:
            case VisionTower():
                module.rows = partial(one_by_one, module.rows)
            case MLP() | PlainMLP():
                module.forward = partial(filled, module.forward, module.up_proj.out_features)
            case TimeEmbedder():
                module.forward = partial(filled, module.forward, module.fc1.out_features)
            case Reader(kind=Features()):
                module.project.forward = partial(filled, module.project.forward, model.config.width)
            case nn.Linear():
                module.__class__ = SteadyLinear
    model.attention = attention
    model.product = product
    return model


class SteadyLinear(nn.Linear):
    """oracle: nn.Linear"""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def filled(forward: Callable[[Tensor], Tensor], width: int, x: Tensor) -> Tensor:
    """What is done to each row by itself, with rows of zeros behind them for the sake of an activation so wide."""
    missing = -len(x) % max(ROWS, VALUES // math.gcd(width, VALUES))
    return forward(F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)))[: len(x)] if missing else forward(x)


def one_by_one(rows: Callable[[Tensor, Tensor], Tensor], value_NC: Tensor, place_N3: Tensor) -> Tensor:
    """Each picture as if it were alone, as `VisionTower.rows` gives them."""
    pictures, of_N = place_N3[:, 0].unique(return_inverse=True)
    if len(pictures) < 2:
        return rows(value_NC, place_N3)
    own = [(of_N == picture).nonzero()[:, 0] for picture in range(len(pictures))]
    return torch.cat([rows(value_NC[n], place_N3[n]) for n in own])[torch.cat(own).argsort()]


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` on a number of rows that makes each independent of the others."""
    rows = input.reshape(-1, input.shape[-1])
    if rows.is_cuda:
        return tiled(rows, weight, bias).view(*input.shape[:-1], -1)
    missing = -len(rows) % ROWS
    if missing == 0:
        return F.linear(input, weight, bias)
    whole = F.linear(F.pad(rows, (0, 0, 0, missing)), weight, bias)
    return whole[: len(rows)].view(*input.shape[:-1], -1)


def tiled(rows_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` of `TILE` rows at a time. oracle: F.linear"""
    count = len(rows_NI)
    tiles = F.pad(rows_NI, (0, 0, 0, -count % TILE)).split(TILE)
    found = [F.linear(tile, weight_OI, bias_O) for tile in tiles]
    return (found[0] if len(found) == 1 else torch.cat(found))[:count]


def attention(batch: Batch, cache: KVCache | None) -> Attend:
    """Each document by itself, against its own keys."""
    if cache is not None:
        columns = cache.admit(batch)
        blocks = [blocks_of(dense_mask(Columns.of(batch), columns))]
        return partial(attend_steady, blocks=blocks, queries=[len(batch)], keys=[0])
    bounds = batch.cu_seqlens.tolist()
    blocks, lengths = [], []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        columns = Columns(batch.docs[start:stop], batch.spans[start:stop], batch.readable[start:stop])
        blocks.append(blocks_of(dense_mask(columns, columns)))
        lengths.append(stop - start)
    return partial(attend_steady, blocks=blocks, queries=lengths, keys=lengths)


def attend_steady(
    q_THK: Tensor, k_MGK: Tensor, v_MGK: Tensor, *, blocks: list[list[Block]], queries: list[int], keys: list[int]
) -> Tensor:
    """Documents one after another, each with so many queries and keys; 0 keys are all. oracle: attend_dense"""
    found, q_at, k_at = [], 0, 0
    for own, num_queries, num_keys in zip(blocks, queries, keys, strict=True):
        num_keys = num_keys or len(k_MGK)
        k, v = (x[k_at : k_at + num_keys].transpose(0, 1) for x in (k_MGK, v_MGK))
        found.append(look(q_THK[q_at : q_at + num_queries], fill_up(k), fill_up(v), own))
        q_at, k_at = q_at + num_queries, k_at + num_keys
    return torch.cat(found)


def fill_up(x_GMK: Tensor) -> Tensor:
    """Zeros for the keys that are missing."""
    return F.pad(x_GMK, (0, 0, 0, -x_GMK.shape[1] % KEYS))


@dataclass(frozen=True, slots=True)
class Block:
    """Queries [start, stop) that are shown the same number of keys."""

    start: int
    stop: int
    mask: Bool[Tensor, "queries keys"]
    """Which of them each sees; with a row more for each query that is missing to the multiple."""


def blocks_of(mask_nM: Bool[Tensor, "n M"], queries: int = QUERIES, keys: int = KEYS) -> list[Block]:
    """Neighbouring queries whose last keys lie within the same multiple. Every query sees a key."""
    last = mask_nM.shape[1] - mask_nM.flip(1).byte().argmax(1)
    counts, lengths = torch.unique_consecutive(-(-last // keys), return_counts=True)
    found, start = [], 0
    for count, length in zip((keys * counts).tolist(), lengths.tolist(), strict=True):
        stop, missing = start + length, -length % queries
        mask = mask_nM[start:stop, :count]
        mask = F.pad(mask, (0, count - mask.shape[1], 0, missing))
        mask[length:, 0] = True
        found.append(Block(start, stop, mask))
        start = stop
    return found


def look(q_nHK: Tensor, k_GMK: Tensor, v_GMK: Tensor, blocks: Sequence[Block]) -> Tensor:
    """What queries find among keys, of which there are as many as any block asks for."""
    found = []
    for block in blocks:
        q_THK, length = q_nHK[block.start : block.stop], block.stop - block.start
        rows, count = block.mask.shape
        if rows > length:
            q_THK = F.pad(q_THK, (0, 0, 0, 0, 0, rows - length))
        o = F.scaled_dot_product_attention(
            q_THK.transpose(0, 1)[None],
            k_GMK[None, :, :count],
            v_GMK[None, :, :count],
            attn_mask=block.mask,
            enable_gqa=True,
        )
        found.append(o[0].transpose(0, 1)[:length])
    return torch.cat(found) if len(found) > 1 else found[0]


# ---- whether they are enough --------------------------------------------------------------------------------------


@torch.no_grad()
def broken(dtype: torch.dtype, shapes: tuple[tuple[int, int], ...] = ((576, 1536), (1536, 576), (576, 4096))) -> str:
    """The operation whose rows depend on their number on this machine though the rules are kept; "" if none does."""
    generator = torch.Generator().manual_seed(0)
    for inner, outer in shapes:
        x, weight = torch.randn(300, inner, generator=generator), torch.randn(outer, inner, generator=generator)
        x, weight = x.to(dtype), weight.to(dtype)
        whole = product(x, weight)
        for count in (1, 2, 3, 5, 16, 17, 64, 129):
            if not torch.equal(product(x[40 : 40 + count], weight), whole[40 : 40 + count]):
                return f"a product of {count} rows by {inner}x{outer}"
    q, k, v = (torch.randn(700, heads, 64, generator=generator).to(dtype) for heads in (9, 3, 3))
    mask = torch.ones(700, 700, dtype=torch.bool).tril()
    whole = attend_steady(q, k, v, blocks=[blocks_of(mask)], queries=[700], keys=[700])
    for start, count in ((0, 1), (511, 1), (512, 3), (650, 50), (100, 33), (10, 65), (200, 400), (3, 257)):
        stop = start + count
        blocks = [blocks_of(mask[start:stop, :stop])]
        part = attend_steady(q[start:stop], k[:stop], v[:stop], blocks=blocks, queries=[count], keys=[0])
        if not torch.equal(part, whole[start:stop]):
            return f"attention of {count} queries to {stop} keys"
    return ""
