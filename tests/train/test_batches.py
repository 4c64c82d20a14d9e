"""Batches hold whole documents, each exactly once, and go on where they stood."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.config import BadInput
from litchi.schema.sample import Sample, Text
from litchi.schema.sequence import COLUMNS, Batch, TokenSequence, split
from litchi.train.batches import BatchConfig, Batches, num_patches
from tests.laws.documents import part, processor
from tests.train.runs import CONFIG, PROCESSOR, sample

laws = settings(max_examples=5, deadline=None, derandomize=True)


def batches(config: BatchConfig = CONFIG.batches, seed: int = 3) -> Batches:
    return Batches(sample, PROCESSOR, config, seed)


def documents(batch: Batch) -> list[TokenSequence]:
    """Without padding, which no document begins like: ours have a role, a word or a placeholder first."""
    return [s for s in split(batch) if bool((s.tokens != PROCESSOR.tokenizer.pad).any())]


def same(a: TokenSequence, b: TokenSequence) -> bool:
    columns = all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)
    return columns and all(torch.equal(v.value, b.vectors[m].value) for m, v in a.vectors.items())


def same_batch(a: Batch, b: Batch) -> bool:
    return same(a, b) and torch.equal(a.cu_seqlens, b.cu_seqlens)


@laws
@given(rows=st.integers(1, 4), row=st.integers(64, 200), lookahead=st.integers(1, 20))
def test_every_row_holds_whole_documents_each_position_once(rows: int, row: int, lookahead: int) -> None:
    stream = batches(BatchConfig(rows=rows, row=row, lookahead=lookahead))
    found: list[TokenSequence] = []
    for batch in islice(stream, 4):
        assert len(batch) == rows * row and batch.row == row
        starts = batch.cu_seqlens.tolist()
        assert all(a // row == (b - 1) // row for a, b in zip(starts, starts[1:], strict=False))
        found += documents(batch)
    waiting = [position for position, _ in stream.waiting]
    read = [position for position in range(stream.position) if position not in waiting]
    expected = [stream.encode(position) for position in read]
    assert len(found) == len(expected) == stream.position - len(waiting)
    for document in found:  # each is one of those expected, and takes it away
        index = next(i for i, other in enumerate(expected) if len(other) == len(document) and same(other, document))
        del expected[index]


@laws
@given(lookahead=st.integers(1, 12))
def test_no_document_waits_for_ever(lookahead: int) -> None:
    stream = batches(replace(CONFIG.batches, lookahead=lookahead))
    for _ in range(6):
        oldest = stream.waiting[0][0] if stream.waiting else 0
        next(stream)
        assert oldest not in [position for position, _ in stream.waiting]


@laws
@given(taken=st.integers(0, 4))
def test_a_restored_stream_goes_on_with_equal_batches(taken: int) -> None:
    first = batches()
    for _ in range(taken):
        next(first)
    again = batches()
    again.restore(first.state())
    assert all(same_batch(a, b) for a, b in islice(zip(first, again, strict=False), 3))


SEEN = processor(tower=True)


def test_a_tower_is_shown_evenly_much() -> None:
    """Patches of a batch vary far less than with an eye on lengths alone, and each document is read once."""
    config = BatchConfig(rows=6, row=96, lookahead=100)
    stream, blind = Batches(pictures, SEEN, config, 3), Batches(pictures, SEEN, config, 3)
    taken: list[int] = []
    shown, before = [], []
    for _ in range(30):
        shown.append(num_patches(next(stream)))
        taken += stream.taken
        with mock.patch("litchi.train.batches.ranked", by_length):
            before.append(num_patches(next(blind)))
    assert np.std(shown) / np.mean(shown) < 0.6 * np.std(before) / np.mean(before)
    waiting = [position for position, _ in stream.waiting]
    assert sorted(taken + waiting) == list(range(stream.position))
    again = Batches(pictures, SEEN, config, 3)
    again.restore(stream.state())
    assert same_batch(next(stream), next(again))


def by_length(waiting: list[tuple[int, TokenSequence]], *, shown: bool) -> list[tuple[int, TokenSequence]]:
    return [waiting[0], *sorted(waiting, key=lambda pair: -len(pair[1]))]


def pictures(position: int) -> Sample:
    """Words, and of two samples in five a picture that is seen and asked about."""
    rng = np.random.default_rng(position)
    kinds = ("see", "user", "answer") if rng.random() < 0.4 else ("user", "answer")
    return Sample(tuple(part(kind, rng) for kind in kinds), key=str(position), source="law")


def test_another_seed_draws_other_noise_for_the_same_documents() -> None:
    a, b = (batches(seed=seed) for seed in (0, 1))
    pairs = [(a.encode(i), b.encode(i)) for i in range(20)]
    assert all(torch.equal(x.tokens, y.tokens) for x, y in pairs)
    assert any(not torch.equal(v.time, y.vectors[m].time) for x, y in pairs for m, v in x.vectors.items())


def test_a_sample_longer_than_a_row_is_refused_with_the_mend() -> None:
    def long(position: int) -> Sample:
        return Sample((Text(text="ball " * 50),), key="much-too-long", source="law")

    stream = Batches(long, PROCESSOR, BatchConfig(rows=1, row=16), 0)
    with pytest.raises(BadInput, match="sample 'much-too-long' has .* tokens, a row holds 16: raise train.batches.row"):
        next(stream)
