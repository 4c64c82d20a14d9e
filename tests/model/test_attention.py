"""Every form of attention is the dense one, forward and backward, whoever reads whom."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litchi.model.attention import Attend, attend_dense, attend_documents, attend_rows, dense_mask, pieces_of, row_masks
from litchi.model.cache import Columns

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
"""fp32 with sums in another order."""


def columns(lengths: list[int], seed: int) -> Columns:
    """Documents of tokens that stand in spans of any size; some are not to be read later."""
    generator = torch.Generator().manual_seed(seed)
    docs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    spans = torch.cat([torch.randint(0, 2, (n,), generator=generator).cumsum(0) for n in lengths])
    return Columns(docs, spans, torch.rand(len(docs), generator=generator) > 0.3)


def read(attend: Attend, length: int) -> list[Tensor]:
    """The answer to random queries with twice as many heads as keys, and its gradients."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(length, heads, 12, generator=generator).requires_grad_() for heads in (4, 2, 2))
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, generator=generator))]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_documents_read_apart_are_documents_under_one_mask(lengths: list[int], seed: int):
    c = columns(lengths, seed)
    apart = read(partial(attend_documents, pieces=pieces_of(c)), len(c.docs))
    for found, wanted in zip(apart, read(partial(attend_dense, mask_TM=dense_mask(c, c)), len(c.docs)), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_rows_read_apart_are_rows_under_one_mask():
    c = columns([20, 12, 32, 1, 31], 0)
    by_row = read(partial(attend_rows, mask_RWW=row_masks(c, 32)), 96)
    for found, wanted in zip(by_row, read(partial(attend_dense, mask_TM=dense_mask(c, c)), 96), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_short_documents_share_a_piece_and_long_ones_are_read_in_blocks():
    """The work: causal text of 300 tokens looks at 128, 256 and 300 keys, not at 300 three times."""
    lengths = [40, 50, 30, 300, 128, 129]
    c = columns(lengths, 0)
    causal = Columns(c.docs, torch.cat([torch.arange(n) for n in lengths]), torch.ones_like(c.readable))
    shapes = [[tuple(mask.shape) for mask in piece.masks] for piece in pieces_of(causal)]
    assert shapes == [[(120, 120)], [(128, 128), (128, 256), (44, 300)], [(128, 128)], [(128, 128), (1, 129)]]
