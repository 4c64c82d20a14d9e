"""Who reads whom: one visibility rule, as a dense mask (the oracle), by rows, by documents, and for FlexAttention.

A token reads its own span, and every earlier readable span of its document. Causal text, bidirectional pictures, noised
training copies and packed documents all follow from that one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from litchi.model.cache import Columns, KVCache
from litchi.schema.sequence import Batch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (T, H, K), k (M, G, K), v (M, G, K) -> (T, H, K)."""


def visible(q_doc, k_doc, q_span, k_span, k_readable):
    """The rule. All arguments broadcast; the answer is True where the query may read the key."""
    return (q_doc == k_doc) & ((k_span == q_span) | ((k_span < q_span) & k_readable))


def attention_for(batch: Batch, cache: KVCache | None) -> Attend:
    """Against a cache dense, otherwise in the form that suits the batch."""
    q = Columns.of(batch)
    if cache is not None:
        return partial(attend_dense, mask_TM=dense_mask(q, cache.admit(batch)))
    return attention_among(q, batch.row)


def attention_among(columns: Columns, row: int) -> Attend:
    """The form for tokens that read each other: of those laid out in rows, by rows (GPU) or by documents (CPU); of
    others flex (GPU) or dense."""
    if columns.docs.is_cuda:
        return partial(attend_rows, mask_RWW=row_masks(columns, row)) if row else flex_attend(columns, columns)
    if row:
        return partial(attend_documents, pieces=pieces_of(columns))
    return partial(attend_dense, mask_TM=dense_mask(columns, columns))


# ---- dense: the oracle --------------------------------------------------------------------------------------------


def dense_mask(q: Columns, k: Columns) -> Bool[Tensor, "T M"]:
    return visible(q.docs[:, None], k.docs[None], q.spans[:, None], k.spans[None], k.readable[None])


def attend_dense(q_THK: Tensor, k_MGK: Tensor, v_MGK: Tensor, *, mask_TM: Bool[Tensor, "T M"]) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, *match_heads(q_THK, k_MGK, v_MGK)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TM)[0].transpose(0, 1)


def match_heads(q_THK: Tensor, k_MGK: Tensor, v_MGK: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat each key-value head for the query heads that share it."""
    times = q_THK.shape[1] // k_MGK.shape[1]
    return (k_MGK, v_MGK) if times == 1 else (k_MGK.repeat_interleave(times, 1), v_MGK.repeat_interleave(times, 1))


# ---- by rows: training on a GPU -----------------------------------------------------------------------------------


def row_masks(columns: Columns, row: int) -> Float[Tensor, "R 1 W W"]:
    """One additive mask a row; no document crosses a row, so that nothing outside it is visible."""
    docs, spans, readable = (x.view(-1, row) for x in (columns.docs, columns.spans, columns.readable))
    seen = visible(docs[:, :, None], docs[:, None], spans[:, :, None], spans[:, None], readable[:, None])
    return additive(seen)[:, None]


def additive(seen: Tensor) -> Tensor:
    """0 where something is visible, and minus infinity elsewhere."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


def attend_rows(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *, mask_RWW: Float[Tensor, "R 1 W W"]) -> Tensor:
    """R times W squared instead of T squared. oracle: attend_dense"""
    row = mask_RWW.shape[-1]
    q, k, v = (x.unflatten(0, (-1, row)).transpose(1, 2) for x in (q_THK, *match_heads(q_THK, k_TGK, v_TGK)))
    o_RHWK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_RWW.to(q.dtype))
    return o_RHWK.transpose(1, 2).flatten(0, 1)


# ---- by documents: training on a CPU ------------------------------------------------------------------------------

BLOCK = 128
"""Queries that look at keys together."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Documents that follow each other, apart from all others: one, or several that fill no block between them."""

    length: int
    masks: list[Float[Tensor, "Q M"]]
    """For each block of queries an additive mask over the keys up to the last that any of them reads."""


def pieces_of(columns: Columns) -> list[Piece]:
    """The pieces of documents each of which lies in one place."""
    changes = (columns.docs.diff().nonzero()[:, 0] + 1).tolist()
    cuts, pieces = [0], []
    for bound, following in pairwise([*changes, len(columns.docs), math.inf]):
        if following - cuts[-1] > BLOCK:
            cuts.append(int(bound))
    for start, stop in pairwise(cuts):
        q = Columns(columns.docs[start:stop], columns.spans[start:stop], columns.readable[start:stop])
        blocks = dense_mask(q, q).split(BLOCK)
        last = [int(seen.any(0).nonzero()[-1]) for seen in blocks]
        masks = [additive(seen[:, : end + 1]) for seen, end in zip(blocks, last, strict=True)]
        pieces.append(Piece(stop - start, masks))
    return pieces


def attend_documents(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *, pieces: list[Piece]) -> Tensor:
    """The squares of documents instead of T squared, of causal ones little more than half. Always in fp32, which is no
    slower than bf16 on a CPU. oracle: attend_dense"""
    lengths, o_QHK = [piece.length for piece in pieces], []
    split = (x.float().split(lengths) for x in (q_THK, *match_heads(q_THK, k_TGK, v_TGK)))
    with torch.autocast(q_THK.device.type, enabled=False):
        for piece, *qkv in zip(pieces, *split, strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in qkv)
            for block, mask in zip(q.split(BLOCK, 2), piece.masks, strict=True):
                end = mask.shape[1]
                read = (k, v) if end == piece.length else (k[:, :, :end], v[:, :, :end])
                o = F.scaled_dot_product_attention(block, *read, attn_mask=mask)
                o_QHK.append(o[0].transpose(0, 1))
    return torch.cat(o_QHK)


# ---- FlexAttention: GPU -------------------------------------------------------------------------------------------


def mask_mod(q: Columns, k: Columns) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule in FlexAttention's form: a predicate over indices."""

    def predicate(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible(q.docs[i], k.docs[j], q.spans[i], k.spans[j], k.readable[j])

    return predicate


def flex_attend(q: Columns, k: Columns) -> Attend:
    """Block-sparse on GPU. FlexAttention has no backward on CPU, where it serves as a check. oracle: attend_dense"""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, M = q.docs.shape[0], k.docs.shape[0]
    block_mask = create_block_mask(mask_mod(q, k), None, None, T, M, device=q.docs.device.type)
    compiled = torch.compile(flex_attention, dynamic=False) if q.docs.is_cuda else flex_attention

    def attend(q_THK: Tensor, k_MGK: Tensor, v_MGK: Tensor) -> Tensor:
        q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q_THK, k_MGK, v_MGK))
        gqa = q_THK.shape[1] != k_MGK.shape[1]
        return compiled(q_, k_, v_, block_mask=block_mask, enable_gqa=gqa)[0].transpose(0, 1)

    return attend
