"""When a server starts, it looks whether this machine keeps the promise that an answer depends on nothing beside it.

The same tokens are read whole, and in pieces beside a neighbour; not one bit may differ. It is a look and no proof:
what proves it are the schedules of `bench/fuzz_engine.py` on a machine of the same kind.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from litchi.model import exact
from litchi.schema.processor import Builder, Processor
from litchi.serve.pages import Pages
from litchi.serve.runner import Piece, Runner, TorchRunner

log = logging.getLogger("litchi.start")

MAX_ADAPTERS = 4
"""Adapters that are looked at: many are alike."""
CUTS = (0, 13, 14, 16, 17, 24)
"""Where the second reading is cut: pieces of 13, 1, 2, 1 and 7 tokens."""
MANY = (*CUTS, 40, 41, 169, 298, 299, 320)
"""The same where more tokens take no longer: pieces of a tile, of more and of less than one."""


@torch.no_grad()
def broken(runner: Runner, processor: Processor, vocab_size: int, page: int, adapters: Sequence[str] = ()) -> str:
    """What depends on what stands beside it on this machine, in words; "" if nothing does.

    Takes as long as reading a hundred tokens, with each of the first adapters as well, and on the PyTorch path an
    eighth of a second more.
    """
    on_cpu = isinstance(runner, TorchRunner) and runner.reader is None
    if on_cpu and (what := exact.broken(runner.dtype)):
        return what
    cuts = MANY if isinstance(runner, TorchRunner) and runner.reader is not None else CUTS
    length = min(cuts[-1], runner.model.config.max_length or cuts[-1])
    cuts = (*(cut for cut in cuts if cut < length), length)
    pages = Pages(*runner.room(4 * (1 + length // page) + 1, page), clear=runner.clear)
    rng = random.Random(0)
    log.debug("made room for what is looked at")
    document, neighbour = (drawn(processor, vocab_size, rng, length) for _ in range(2))
    held = [[pages.take() for _ in range(1 + length // page)] for _ in range(3)]
    whole = torch.empty(0)
    for name in (*adapters[:MAX_ADAPTERS], ""):
        read = runner.run([Piece(document, 0, length, held[0], rows=length, adapter=name)], pages)[0]
        assert read is not None
        whole = read
        for start, stop in pairwise(cuts):
            pieces = [
                Piece(neighbour, start, stop, held[1], rows=stop - start),
                Piece(document, start, stop, held[2], rows=stop - start, adapter=name),
            ]
            found = runner.run(pieces, pages)[1]
            log.debug("looked at tokens %d to %d", start, stop)
            if found is None or not same(found, whole[start:stop]):
                return f"a hidden state read as one of {stop - start} beside others{name and f' with {name!r}'}"
    scores = runner.logits(whole)
    if any(not same(runner.logits(whole[at : at + 1]), scores[at : at + 1]) for at in (0, length - 1)):
        return "the scores of one token"
    return ""


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isfinite(a).all()) and torch.equal(a, b)


def drawn(processor: Processor, vocab_size: int, rng: random.Random, length: int = CUTS[-1]) -> Builder:
    """A document of words at random."""
    builder = Builder()
    words = [index for index in range(min(vocab_size, len(processor.tokenizer))) if index not in processor.controls]
    while len(builder.tokens) < length:
        builder.token(rng.choice(words))
    return builder
