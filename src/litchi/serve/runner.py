"""One forward of the network for pieces of many documents at once, over pages.

T tokens of all pieces, G key-value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litchi.model import exact
from litchi.model.attention import Attend
from litchi.model.lowrank import Adapters
from litchi.model.native import Trunk
from litchi.model.native_adapters import PackedAdapters
from litchi.model.network import Model
from litchi.model.packing import Format
from litchi.model.rope import rotations
from litchi.schema.arrays import IGNORE
from litchi.schema.processor import Builder
from litchi.schema.sequence import Batch, Vectors
from litchi.serve.device import DeviceReader
from litchi.serve.lanes import Laid, Slots
from litchi.serve.pages import Pages


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens [start, stop) of a document, which lies in `pages`; what is wanted is that of a `Read`."""

    builder: Builder
    start: int
    stop: int
    pages: Sequence[int]
    rows: int = 0
    scores: int = 0
    """Of how many last tokens the scores are wanted: 1, and more where tokens are guessed."""
    adapter: str = ""

    @property
    def ends(self) -> list[int]:
        """For each token the end of its span, or `stop` if that comes first: it reads all keys up to there."""
        return span_stops(self.builder.spans, self.start, self.stop)


class Runner(Protocol):
    """Whoever computes a step."""

    exact: bool
    """Whether what is made of a token does not depend on its neighbours."""
    clear: bool
    """Whether it reads keys that it has not written, and only masks them."""
    model: Model

    @property
    def name(self) -> str:
        """What tells its arithmetic from others': bits may only be compared under one name."""
        ...

    def room(self, num_pages: int, size: int) -> tuple[Tensor, Tensor]:
        """Memory for keys and values, (L, num_pages, G, size, K) each."""
        ...

    def run(self, pieces: Sequence[Piece], pages: Pages) -> list[Tensor | None]:
        """What each piece wants: hidden states (rows, D), scores (scores, V), or nothing."""
        ...

    def logits(self, x_ND: Tensor) -> Tensor:
        """Scores (N, V) of the tokens that follow hidden states."""
        ...


class TorchRunner:
    """The network by PyTorch, under the rules that make it exact or without them."""

    clear = True

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        *,
        steady: bool = True,
        adapters: Adapters | None = None,
        reader: DeviceReader | None = None,
        table: Tensor | None = None,
    ) -> None:
        """`dtype` is what matrices are multiplied in; `reader` computes where the network is not on a CPU.

        `table` (V, D) is what scores are made with where the table of words would do, in `dtype`.
        """
        self.model, self.dtype, self.exact = model.eval(), dtype, steady
        self.adapters, self.reader, self.table = adapters or Adapters(model), reader, table
        if steady:
            exact.apply(model)
        model.attention = attention
        self.device, self.kv_heads = model.embed_tokens.weight.device, model.config.num_kv_heads
        self.told = f"torch {torch.__version__} {str(dtype).removeprefix('torch.')}"

    @property
    def name(self) -> str:
        return self.told if self.reader is None else f"{self.told} {self.reader.name}"

    def room(self, num_pages: int, size: int) -> tuple[Tensor, Tensor]:
        c = self.model.config
        shape = (c.num_layers, num_pages, self.kv_heads, size, c.head_width)
        if self.reader is not None:
            return self.reader.room(shape)
        return torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)

    def length(self, count: int) -> int:
        """Tokens of a step of so many, padding included."""
        if self.reader is not None:
            return self.reader.length(count)
        return count + -count % exact.ROWS if self.exact else count

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece], pages: Pages) -> list[Tensor | None]:
        batch = together(pieces, self.length)
        texts = [(piece.adapter, piece.stop - piece.start) for piece in pieces]
        with self.adapters.reading(texts):
            x_TD = self.read(batch, pieces, pages)
        ends = batch.cu_seqlens.tolist()[1:]
        scores = scored(pieces, ends, lambda last: self.logits(x_TD[last]))
        found: list[Tensor | None] = []
        for end, piece, own in zip(ends, pieces, scores, strict=False):
            found.append(own if piece.scores else x_TD[end - piece.rows : end].cpu() if piece.rows else None)
        return found

    def read(self, batch: Batch, pieces: Sequence[Laid], pages: Pages) -> Tensor:
        """Hidden states (T, D), where the network is."""
        if self.reader is not None:
            return self.reader(batch, pieces, pages)
        with torch.autocast(pages.keys.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.model(batch, View(pages, pieces, steady=self.exact))

    @torch.no_grad()
    def logits(self, x_ND: Tensor) -> Tensor:
        return self.weigh(x_ND.to(self.device)).cpu()

    def weigh(self, x_ND: Tensor) -> Tensor:
        """Scores where the network is."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            known = self.model.logits(x_ND) if self.table is None else self.model.product(x_ND, self.table)
            return known.float()


class NativeRunner:
    """The layers in C++ (`model/native.py`), exact by the way it adds; what is before and behind them in PyTorch."""

    exact = True
    clear = False

    def __init__(
        self, model: Model, dtype: torch.dtype, weights: Format, *, adapters: Adapters | None = None, take: bool = False
    ) -> None:
        """`dtype` is that of keys and values; `take` is `Trunk`'s. Raises BadInput for a network it does not know."""
        self.trunk = Trunk(model, dtype, weights, take=take)
        self.packed = PackedAdapters(adapters.known if adapters else {}, model.config, weights, self.trunk.arena)
        self.model = exact.apply(model.eval())
        self.scored = torch.empty(0, model.config.vocab_size)
        self.name = f"{Path(self.trunk.lib._name).stem} {weights}{' kv int8' if dtype == torch.int8 else ''}"

    def room(self, num_pages: int, size: int) -> tuple[Tensor, Tensor]:
        return self.trunk.pages(num_pages, size)

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece], pages: Pages) -> list[Tensor | None]:
        c, batch = self.model.config, together(pieces)
        x_TD = self.model.embed(batch, self.model.see(batch)).float()
        rotation = rotations(batch.positions, c.head_width, c.theta, c.scaling, c.sections)
        slots: list[int] = []
        ends: list[int] = []
        for piece in pieces:
            slots += range(piece.start, piece.stop)
            ends += piece.ends
        most = max(len(piece.pages) for piece in pieces)
        tables = torch.tensor([[*piece.pages, *[0] * (most - len(piece.pages))] for piece in pieces], dtype=torch.int32)
        self.trunk.adapters = self.packed.of([piece.adapter for piece in pieces])
        hidden_TD = self.trunk.run(
            x_TD.contiguous(),
            rotation,
            pages.keys,
            pages.values,
            batch.docs.int(),
            torch.tensor(slots, dtype=torch.int32),
            torch.tensor(ends, dtype=torch.int32),
            tables,
        )
        stops = batch.cu_seqlens.tolist()[1:]
        scores = scored(pieces, stops, lambda last: self.scores(hidden_TD[last]))
        found: list[Tensor | None] = []
        for stop, piece, own in zip(stops, pieces, scores, strict=True):
            rows = self.model.norm(hidden_TD[stop - piece.rows : stop]) if piece.rows else None
            found.append(own if piece.scores else rows)
        return found

    @torch.no_grad()
    def logits(self, x_ND: Tensor) -> Tensor:
        return self.trunk.logits(x_ND if x_ND.dim() == 2 else x_ND[None], normed=True).view(*x_ND.shape[:-1], -1)

    def scores(self, hidden_ND: Tensor) -> Tensor:
        """Scores of a step, in memory of their own: programs have chosen from them before the next step."""
        if len(hidden_ND) > len(self.scored):
            self.scored = torch.empty(len(hidden_ND) + 8, self.model.config.vocab_size)
        return self.trunk.logits(self.model.norm(hidden_ND), self.scored[: len(hidden_ND)], normed=True)


class View:
    """What the layers take for a cache: keys go to the pages of their documents, and queries find them there."""

    def __init__(self, pages: Pages, pieces: Sequence[Laid], *, steady: bool) -> None:
        self.pages, self.pieces = pages, pieces
        self.keys = exact.KEYS if steady else pages.size
        size, places = pages.size, []
        for piece in pieces:
            places += [(piece.pages[at // size], at % size) for at in range(piece.start, piece.stop)]
        self.count = len(places)
        self.page, self.offset = torch.tensor(places).unbind(1)
        self.tables = [self.table(piece) for piece in pieces]
        self.blocks = [exact.blocks_of(mask_of(piece)) if steady else self.whole(piece) for piece in pieces]

    def whole(self, piece: Laid) -> list[exact.Block]:
        """All queries at once, as the kernel likes them best."""
        mask = mask_of(piece)
        return [exact.Block(0, len(mask), F.pad(mask, (0, -mask.shape[1] % self.keys)))]

    def table(self, piece: Laid) -> Tensor:
        """Pages of all keys, and the page of zeros until there are as many as the rule wants."""
        size = self.pages.size
        count = -(-(-(-piece.stop // self.keys) * self.keys) // size)
        used = -(-piece.stop // size)
        return torch.tensor([*piece.pages[:used], *[0] * (count - used)])

    def extend(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.pages.keys[layer], self.pages.values[layer]
        keys[self.page, :, self.offset] = k_TGK[: self.count].to(keys.dtype)
        values[self.page, :, self.offset] = v_TGK[: self.count].to(values.dtype)
        return keys, values

    def attend(self, q_THK: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """oracle: attend_dense"""
        out, at = torch.zeros_like(q_THK), 0
        for piece, table, blocks in zip(self.pieces, self.tables, self.blocks, strict=True):
            k_GMK, v_GMK = (x[table].transpose(0, 1).flatten(1, 2) for x in (keys, values))
            stop = at + piece.stop - piece.start
            out[at:stop] = exact.look(q_THK[at:stop].to(keys.dtype), k_GMK, v_GMK, blocks)
            at = stop
        return out


def attention(batch: Batch, cache: Any) -> Attend:
    """Over pages, or as the rules have it."""
    return cache.attend if isinstance(cache, View | Slots) else exact.attention(batch, cache)


def mask_of(piece: Laid) -> Tensor:
    """A query reads all keys up to the end of its own span: what is kept is clean."""
    return torch.arange(piece.stop) < torch.tensor(piece.ends)[:, None]


def span_stops(spans: list[int], start: int, stop: int) -> list[int]:
    """For each token in [start, stop) the end of its span, or `stop` if that comes first."""
    found, end = [0] * (stop - start), stop
    for at in range(stop - 1, start - 1, -1):
        if at + 1 < stop and spans[at] != spans[at + 1]:
            end = at + 1
        found[at - start] = end
    return found


def scored(
    pieces: Sequence[Piece], stops: Sequence[int], logits: Callable[[list[int]], Tensor]
) -> Sequence[Tensor | None]:
    """For each piece, which ends at `stops`, the scores (scores, V) that it wants; all are made together."""
    last = [at for stop, piece in zip(stops, pieces, strict=False) for at in range(stop - piece.scores, stop)]
    return logits(last).split([piece.scores for piece in pieces]) if last else [None] * len(pieces)


def together(pieces: Sequence[Piece], length_of: Callable[[int], int] = int) -> Batch:
    """The pieces end to end, each a document, and padding up to the length that is wanted of so many tokens."""
    tokens: list[int] = []
    positions: list[tuple[int, int, int]] = []
    spans: list[int] = []
    docs: list[int] = []
    starts = [0]
    vectors: dict[Any, list[Vectors]] = {}
    for number, piece in enumerate(pieces):
        b, at = piece.builder, len(tokens)
        for modality, v in b.vectors_in(piece.start, piece.stop).items():
            blocks = vectors.setdefault(modality, [])
            blocks.append(v.shifted(at - piece.start, sum(block.num_pictures for block in blocks)))
        tokens += b.tokens[piece.start : piece.stop]
        positions += b.positions[piece.start : piece.stop]
        spans += b.spans[piece.start : piece.stop]
        docs += [number] * (piece.stop - piece.start)
        starts.append(len(tokens))
    missing = length_of(len(tokens)) - len(tokens)
    if missing:
        tokens += [0] * missing
        positions += [(0, 0, 0)] * missing
        spans += range(missing)
        docs += [len(pieces)] * missing
        starts.append(len(tokens))
    length = len(tokens)
    return Batch(
        tokens=torch.tensor(tokens),
        labels=torch.full((length,), IGNORE),
        weights=torch.zeros(length),
        positions=torch.tensor(positions),
        spans=torch.tensor(spans),
        readable=torch.ones(length, dtype=torch.bool),
        vectors={m: Vectors.join(blocks) for m, blocks in sorted(vectors.items())},
        docs=torch.tensor(docs),
        cu_seqlens=torch.tensor(starts),
    )
