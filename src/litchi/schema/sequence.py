"""What the model reads: documents as tokens on one axis, with vectors written over placeholders.

Tokens are sampled one by one; spans are denoised as a whole. Everything that attention, positions, losses and serving
need is a column of the sequence, so that training, prefill, decode and denoising share one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from litchi.schema.arrays import IGNORE


class Modality(StrEnum):
    """`IMAGE` is a picture in a conversation and `VIDEO` a frame of a world or clip, both as codes that can be drawn;
    `VISION` is what a vision tower only understands."""

    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"
    VISION = "vision"
    ACTION = "action"


@dataclass(frozen=True, slots=True)
class Vectors:
    """The span tokens of one modality, each in some state of denoising."""

    index: Int[Tensor, "N"]
    """Where each row sits on the T axis; -1 for one that only completes a picture, where its reader needs it whole."""
    place: Int[Tensor, "N 3"]
    """Which picture a row is of, and its row and column there, counted from the middle; picture -1 ends a line."""
    value: Float[Tensor, "N C"]
    """Codec digits (`MASK` where hidden), latents, pixel patches or action vectors."""
    time: Float[Tensor, "N"]
    """1 is clean (conditioning), 0 is pure noise or fully masked."""
    weight: Float[Tensor, "N"]
    """Loss weight; 0 for conditioning."""

    def __getitem__(self, keep: Tensor) -> Vectors:
        return Vectors(*(getattr(self, f.name)[keep] for f in fields(self)))

    def shifted(self, index: int, picture: int = 0) -> Vectors:
        """The same rows so many tokens and so many pictures later."""
        place = self.place.clone()
        place[:, 0] += picture * (place[:, 0] >= 0)
        return replace(self, index=torch.where(self.index < 0, -1, self.index + index), place=place)

    @property
    def first_picture(self) -> int:
        pictures = self.place[self.place[:, 0] >= 0, 0]
        return int(pictures.min()) if len(pictures) else 0

    @property
    def num_pictures(self) -> int:
        """One more than the largest number of a picture."""
        return int(self.place[:, 0].max()) + 1 if len(self.place) else 0

    @staticmethod
    def join(blocks: Sequence[Vectors]) -> Vectors:
        return Vectors(*(torch.cat([getattr(v, f.name) for v in blocks]) for f in fields(Vectors)))


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One document."""

    tokens: Int[Tensor, "T"]
    """Ids; a placeholder under a vector."""
    labels: Int[Tensor, "T"]
    """The next token, `IGNORE` where there is no next-token target."""
    weights: Float[Tensor, "T"]
    """Loss weights of the labels."""
    positions: Int[Tensor, "T 3"]
    """(t, h, w); equal for text."""
    spans: Int[Tensor, "T"]
    """Never decreases; tokens of one span read each other."""
    readable: Bool[Tensor, "T"]
    """False for a noised training copy, which later spans may not read."""
    vectors: dict[Modality, Vectors]

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True, slots=True)
class Batch(TokenSequence):
    """Documents on one token axis; `split` is the inverse of `pack`."""

    docs: Int[Tensor, "T"]
    """Which document a token belongs to, counted from 0; padding is a document of its own."""
    cu_seqlens: Int[Tensor, "S+1"]
    """Where documents begin, and the end."""
    row: int = 0
    """If not 0, no document crosses a multiple of `row`: attention may work row by row."""

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: getattr(self, name).to(device) for name in (*COLUMNS, "docs", "cu_seqlens")}
        vectors = {m: Vectors(*(getattr(v, f.name).to(device) for f in fields(v))) for m, v in self.vectors.items()}
        return Batch(**moved, vectors=vectors, row=self.row)


COLUMNS = ("tokens", "labels", "weights", "positions", "spans", "readable")


def pack(sequences: Sequence[TokenSequence], *, row: int = 0) -> Batch:
    """Lay documents end to end; only `docs` and vector indices shift.

    Raises ValueError if `row` is given and a document would cross a multiple of it: see `pack_rows`.
    """
    starts = list(accumulate((len(s) for s in sequences), initial=0))
    if row and any(a // row != (b - 1) // row for a, b in zip(starts, starts[1:], strict=False) if b > a):
        raise ValueError(f"a document crosses a multiple of row={row}; lay documents out with pack_rows")
    columns = {name: torch.cat([getattr(s, name) for s in sequences]) for name in COLUMNS}
    lengths = torch.tensor([len(s) for s in sequences])
    vectors = {}
    for modality in sorted({m for s in sequences for m in s.vectors}):
        found = [(s.vectors[modality], at) for s, at in zip(sequences, starts, strict=False) if modality in s.vectors]
        pictures = accumulate((v.num_pictures for v, _ in found), initial=0)
        vectors[modality] = Vectors.join([v.shifted(at, n) for (v, at), n in zip(found, pictures, strict=False)])
    docs = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    return Batch(**columns, vectors=vectors, docs=docs, cu_seqlens=torch.tensor(starts), row=row)


def pack_rows(rows: Sequence[Sequence[TokenSequence]], row: int, pad: int) -> Batch:
    """Pack documents already assigned to rows, filling each row to `row` tokens with `pad` ids that nothing reads."""
    laid: list[TokenSequence] = []
    for members in rows:
        missing = row - sum(len(s) for s in members)
        if missing < 0:
            raise ValueError(f"a row holds {row - missing} tokens, more than {row}")
        laid += [*members, padding(missing, pad)] if missing else members
    return pack(laid, row=row)


def padding(length: int, token: int) -> TokenSequence:
    count = torch.arange(length)
    return TokenSequence(
        tokens=torch.full((length,), token),
        labels=torch.full((length,), IGNORE),
        weights=torch.zeros(length),
        positions=count[:, None].expand(-1, 3).contiguous(),
        spans=count,
        readable=torch.ones(length, dtype=torch.bool),
        vectors={},
    )


def split(batch: Batch) -> list[TokenSequence]:
    """The documents of a batch, padding included."""
    bounds = batch.cu_seqlens.tolist()
    return [window(batch, a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def window(sequence: TokenSequence, start: int, stop: int) -> TokenSequence:
    """The tokens in [start, stop) of one document: what one serving step feeds the model."""
    vectors = {}
    for modality, v in sequence.vectors.items():
        inside = (v.index >= start) & (v.index < stop)
        if bool(inside.any()):
            found = seen_from(v, inside) if modality is Modality.VISION else v[inside]
            vectors[modality] = found.shifted(-start, -found.first_picture)
    columns = {name: getattr(sequence, name)[start:stop] for name in COLUMNS}
    return TokenSequence(**columns, vectors=vectors)


def seen_from(v: Vectors, inside: Bool[Tensor, "N"]) -> Vectors:
    """The rows inside, and all others of their pictures, which stand nowhere: a tower reads pictures whole."""
    pictures = v.place[inside, 0]
    keep = inside | torch.isin(v.place[:, 0], pictures[pictures >= 0])
    return replace(v, index=torch.where(inside, v.index, -1))[keep]


def supervised(batch: TokenSequence) -> dict[Modality, float]:
    """The loss weight that a batch carries, by modality: what label coverage is judged by."""
    text = float(batch.weights[batch.labels != IGNORE].sum())
    return {Modality.TEXT: text} | {m: float(v.weight.sum()) for m, v in batch.vectors.items()}


def with_vectors(batch: Batch, vectors: dict[Modality, Vectors]) -> Batch:
    return replace(batch, vectors=vectors)
