"""Documents of text for laws that need nothing else: ids at random, all of them supervised."""

from __future__ import annotations

import torch

from litchi.schema.arrays import IGNORE
from litchi.schema.sequence import TokenSequence


def document(length: int, *, seed: int = 0, vocab: int = 64) -> TokenSequence:
    """Every token but the last predicts the next; weights differ, so that a dropped one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (length,), generator=generator)
    return TokenSequence(
        tokens=tokens,
        labels=torch.cat([tokens[1:], torch.tensor([IGNORE])]),
        weights=torch.rand(length, generator=generator) + 0.5,
        positions=torch.arange(length)[:, None].expand(-1, 3).contiguous(),
        spans=torch.arange(length),
        readable=torch.ones(length, dtype=torch.bool),
        vectors={},
    )
