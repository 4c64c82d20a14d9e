"""Documents on one axis come apart as they went in, and what cannot be laid out is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.schema.arrays import IGNORE
from litchi.schema.processor import Builder
from litchi.schema.sequence import (
    COLUMNS,
    Modality,
    TokenSequence,
    Vectors,
    pack,
    pack_rows,
    padding,
    split,
    supervised,
    window,
)

laws = settings(max_examples=30, deadline=None, derandomize=True)
PAD, PATCH = 0, 9


@st.composite
def documents(draw: st.DrawFn) -> TokenSequence:
    """Words, and pictures of one to three rows, some of them noised."""
    builder = Builder()
    for kind in draw(st.lists(st.sampled_from(["word", "seen", "drawn"]), min_size=1, max_size=5)):
        if kind == "word":
            builder.token(draw(st.integers(1, 8)), draw(st.sampled_from([0.0, 1.0, 0.5])))
            continue
        count = draw(st.integers(1, 3))
        weight = 0.0 if kind == "seen" else 1.0
        rows = torch.arange(2.0 * count).view(count, 2) + draw(st.integers(0, 9))
        times = torch.full((count,), 1.0 - weight / 2)
        builder.vectors(Modality.IMAGE, rows, times, weight, [(0, i) for i in range(count)], PATCH)
        builder.time += 1
    return builder.build()


def same(a: TokenSequence, b: TokenSequence) -> bool:
    if a.vectors.keys() != b.vectors.keys():
        return False
    columns = all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)
    names = [f.name for f in fields(Vectors)]
    vectors = all(torch.equal(getattr(v, n), getattr(b.vectors[m], n)) for m, v in a.vectors.items() for n in names)
    return columns and vectors


@laws
@given(st.lists(documents(), min_size=1, max_size=5))
def test_split_undoes_pack(sequences: list[TokenSequence]) -> None:
    batch = pack(sequences)
    assert len(batch) == sum(map(len, sequences))
    assert all(same(a, b) for a, b in zip(sequences, split(batch), strict=True))
    assert batch.docs.tolist() == [i for i, s in enumerate(sequences) for _ in range(len(s))]


@laws
@given(documents(), st.data())
def test_windows_laid_end_to_end_are_the_document(sequence: TokenSequence, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(sequence)))
    pieces = [window(sequence, 0, cut), window(sequence, cut, len(sequence))]
    again = pack([p for p in pieces if len(p)])
    assert all(torch.equal(getattr(again, name), getattr(sequence, name)) for name in COLUMNS)
    for modality, v in sequence.vectors.items():
        assert torch.equal(again.vectors[modality].index, v.index)
        assert torch.equal(again.vectors[modality].value, v.value)


@laws
@given(st.lists(st.lists(documents(), max_size=2), min_size=1, max_size=3))
def test_rows_hold_their_documents_and_padding_that_weighs_nothing(rows: list[list[TokenSequence]]) -> None:
    row = max(sum(map(len, members)) for members in rows) or 1
    batch = pack_rows(rows, row, PAD)
    assert len(batch) == len(rows) * row and batch.row == row
    members = [s for line in rows for s in line]
    found = [s for s in split(batch) if not same(s, padding(len(s), PAD))]
    assert all(same(a, b) for a, b in zip(members, found, strict=True))
    mine = [supervised(s) for s in members]
    for modality, weight in supervised(batch).items():
        assert weight == pytest.approx(sum(each.get(modality, 0.0) for each in mine))


def test_a_window_shows_the_tower_whole_pictures() -> None:
    """A tower reads all patches of a picture together, so those outside the window come along and stand nowhere."""
    builder = Builder()
    for start in (0.0, 10.0):
        rows = start + torch.arange(3.0)[:, None]
        builder.vectors(Modality.VISION, rows, torch.ones(3), 0.0, [(0, i) for i in range(3)], PATCH)
        builder.time += 1
    v = window(builder.build(), 4, 6).vectors[Modality.VISION]
    assert v.index.tolist() == [-1, 0, 1] and v.value[:, 0].tolist() == [10.0, 11.0, 12.0]
    assert v.place[:, 0].tolist() == [0, 0, 0]


def test_a_row_that_is_too_full_is_refused() -> None:
    with pytest.raises(ValueError, match="a row holds 7 tokens, more than 6"):
        pack_rows([[padding(3, PAD)], [padding(3, PAD), padding(4, PAD)]], 6, PAD)


def test_a_document_across_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="a document crosses a multiple of row=4; lay documents out with pack_rows"):
        pack([padding(3, PAD), padding(2, PAD)], row=4)


def test_padding_supervises_nothing_and_is_a_document_of_its_own() -> None:
    filler = padding(3, PAD)
    assert filler.labels.tolist() == [IGNORE] * 3 and not supervised(filler)[Modality.TEXT]
    batch = pack_rows([[padding(2, 5)]], 4, PAD)
    assert batch.docs.tolist() == [0, 0, 1, 1]


def test_moving_a_batch_moves_all_of_it() -> None:
    builder = Builder()
    builder.token(3)
    builder.vectors(Modality.IMAGE, torch.ones(2, 2), torch.ones(2), 0.0, [(0, 0), (0, 1)], PATCH)
    batch = pack([builder.build()]).to("meta")
    assert {getattr(batch, name).device.type for name in (*COLUMNS, "docs", "cu_seqlens")} == {"meta"}
    assert batch.vectors[Modality.IMAGE].value.device.type == "meta"
