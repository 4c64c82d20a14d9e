"""Who reads how much in a step: within a budget of tokens and the pages that there are, the oldest requests first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from litchi.config import BadInput
from litchi.model.packing import Format
from litchi.model.program import Program, Read, Steps
from litchi.schema.request import Delta
from litchi.serve.pages import OutOfPages, Pages
from litchi.serve.prefix import PageKeys
from litchi.serve.runner import Piece
from litchi.serve.solo import Put


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much is read at once, and how much memory that may take."""

    max_running: int = 32
    """Requests that are answered at once; others wait."""
    step_tokens: int = 256
    """Tokens of a step; a span of more is read alone."""
    page: int = 64
    """Tokens of a page; in C++ a multiple of 32."""
    cache_tokens: int = 16_384
    """Tokens whose keys and values have a place."""
    remember: bool = True
    """Whether what was read is kept for documents that begin alike."""
    path: Literal["auto", "native", "torch"] = "auto"
    """Who computes: C++ on a CPU, which "auto" takes if it knows the network and there is a compiler, or PyTorch."""
    weights: Format = "bfloat16"
    """What matrices are stored in; int8 and int4 are native only, and w8a8 and w4a8, by which layers read 8 bits."""
    kv: Literal["auto", "int8"] = "auto"
    """What keys and values are stored in: "auto" is float32 if `weights` are, else bfloat16; int8 is native only."""
    guess: Literal["none", "ngram", "draft"] = "ngram"
    """Who guesses words ahead, which are read with what is new: nobody, the document itself, or a smaller network."""
    draft: str = "int4"
    """That network: "int4" or "int8" are these weights in so many bits, else a checkpoint with the same tokenizer."""
    guess_tokens: int = 8
    """The most words that are guessed ahead of a document."""
    guess_rows: int = 0
    """Tokens that take as long to read as the weights; steps of as many hold no guesses. 0: as many as weights have
    bits, but for int4's 6; on a GPU 64, which is what a graph takes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it is computed: "auto" is a GPU if there is one and nothing is asked that only C++ on a CPU has."""
    exact: bool = True
    """Whether an answer may not depend on what is answered beside it; "native" knows no other way."""


@dataclass(slots=True, eq=False)
class Track:
    """One request on its way."""

    program: Program
    steps: Steps
    put: Put
    keys: PageKeys
    wish: Read | None = None
    pages: list[int] = field(default_factory=list)
    count: int = 0
    """Tokens of the document that lie in pages and stay."""
    deltas: list[Delta] | None = None
    """What was said, where the whole answer is wanted at once."""
    rows: list[Tensor] = field(default_factory=list)
    """Hidden states that were wanted and have been found, where it takes several pieces."""
    cancelled: bool = False
    cached: int = 0
    """Tokens that were found already read, at the beginning."""

    @property
    def clean(self) -> int:
        """Tokens of what is to be read that stay."""
        assert self.wish is not None
        return len(self.wish.builder.tokens) - (self.wish.rows if self.wish.draft else 0)


class Scheduler:
    """Chooses for those that run. No answer depends on what it chooses."""

    def __init__(self, config: EngineConfig, pages: Pages) -> None:
        self.config, self.pages = config, pages
        self.running: list[Track] = []
        """The oldest first."""
        self.tokens_cached = self.preempted = 0

    def choose(self) -> list[tuple[Track, Piece]]:
        """Pieces of this step, the oldest requests first: those that read little before those that read much."""
        budget = self.config.step_tokens
        chosen: list[tuple[Track, Piece]] = []
        for track in sorted(self.running, key=lambda t: self.left(t) > 1):
            if track not in self.running:
                continue  # it gave way
            if budget <= 0:
                break
            if not track.pages:
                self.recall(track)
            piece = self.piece(track, budget, busy={id(t) for t, _ in chosen}, alone=not chosen)
            if piece is not None:
                chosen.append((track, piece))
                budget -= piece.stop - piece.start
        return chosen

    def grow(self, track: Track, count: int) -> None:
        """So many tokens of a document have been read and stay; whole pages are remembered."""
        assert track.wish is not None
        before, track.count = track.count, count
        if self.config.remember and count // self.pages.size > before // self.pages.size:
            for page, key in zip(track.pages, track.keys.upto(track.wish.builder, count, track.clean), strict=False):
                self.pages.remember(page, key)

    def fits(self, track: Track) -> None:
        """Raises BadInput for a document that has outgrown all pages."""
        length = track.count + self.left(track)
        if length > self.pages.room:
            raise BadInput(
                f"the document has grown to {length} tokens, the cache has {self.pages.room}: "
                f"ask for less or raise serve.engine.cache_tokens"
            )

    def left(self, track: Track) -> int:
        assert track.wish is not None
        return len(track.wish.builder.tokens) - track.count

    def recall(self, track: Track) -> None:
        """Begin with what another document has read already, but for what is wanted of this one."""
        if not self.config.remember:
            return
        assert track.wish is not None
        length = min(track.clean, len(track.wish.builder.tokens) - max(track.wish.rows, 1))
        track.pages = self.pages.find(track.keys.upto(track.wish.builder, length, track.clean))
        track.count = track.cached = len(track.pages) * self.pages.size
        self.tokens_cached += track.count

    def piece(self, track: Track, budget: int, busy: set[int], *, alone: bool) -> Piece | None:
        """What to read of a document; None if there is no room in this step."""
        wish = track.wish
        assert wish is not None
        total = len(wish.builder.tokens)
        if track.count < track.clean:
            stop = self.cut(wish, track.count, track.clean, budget, alone=alone)
            draft = wish.draft and stop == track.clean and total - track.count <= budget
            stop = total if draft else stop
        else:
            stop = total
            if stop - track.count > budget and not alone:
                return None
        if stop <= track.count or not self.make_room(track, stop, busy):
            return None
        rows = min(stop - track.count, max(stop - (total - wish.rows), 0))
        scores, adapter = int(wish.scores and stop == total), track.program.request.adapter
        return Piece(wish.builder, track.count, stop, track.pages, rows, scores, adapter)

    def cut(self, wish: Read, start: int, clean: int, budget: int, *, alone: bool) -> int:
        """Where to stop: within the budget, at the end of a span."""
        stop, spans = min(clean, start + budget), wish.builder.spans
        while start < stop < clean and spans[stop] == spans[stop - 1]:
            stop -= 1
        if stop > start or not alone:
            return stop
        stop = start + 1
        while stop < clean and spans[stop] == spans[stop - 1]:
            stop += 1
        return stop

    def make_room(self, track: Track, stop: int, busy: set[int]) -> bool:
        """Pages up to `stop`; younger documents that are not part of this step give way if need be."""
        while len(track.pages) * self.pages.size < stop:
            try:
                track.pages.append(self.pages.take())
            except OutOfPages:
                younger = [t for t in self.running[self.running.index(track) + 1 :] if t.pages and id(t) not in busy]
                if not younger:
                    if self.alone(track, busy):
                        raise
                    self.give_back(track)
                    return False
                self.give_back(younger[-1])
                self.preempted += 1
        return True

    def alone(self, track: Track, busy: set[int]) -> bool:
        return not busy and not any(t.pages for t in self.running if t is not track)

    def give_back(self, track: Track) -> None:
        self.pages.drop(track.pages)
        track.pages, track.count, track.rows = [], 0, []
