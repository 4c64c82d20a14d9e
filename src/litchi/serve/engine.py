"""The engine: many programs, one network. A step reads for all that wait: prompts by chunks, words, drafts of pictures.

A program says what it must read next, the engine chooses who reads how much, and no answer depends on that choice. When
pages run out, the youngest document gives its own back and is read again later.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model import exact
from litchi.model.generate import whole
from litchi.model.native import unsupported
from litchi.model.network import Model
from litchi.model.packing import BLOCK, Format
from litchi.model.program import Program, Read, Steps
from litchi.schema.processor import Processor
from litchi.schema.request import Completion, Delta, Request
from litchi.serve.pages import OutOfPages, Pages
from litchi.serve.prefix import PageKeys
from litchi.serve.runner import NativeRunner, Piece, Runner, TorchRunner
from litchi.serve.solo import Piece as Told
from litchi.serve.solo import Put

log = logging.getLogger("litchi.serve")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much is read at once, and how much memory that may take."""

    max_running: int = 32
    """Requests that are answered at once; others wait."""
    step_tokens: int = 256
    """Tokens of a step; a span of more is read alone."""
    page: int = 64
    """Tokens of a page; a divisor of 512."""
    cache_tokens: int = 16_384
    """Tokens whose keys and values have a place."""
    remember: bool = True
    """Whether what was read is kept for documents that begin alike."""
    path: Literal["auto", "native", "torch"] = "auto"
    """Who computes: C++ on a CPU, which "auto" takes if it knows the network and there is a compiler, or PyTorch."""
    weights: Format = "bfloat16"
    """What matrices are stored in; int8 and int4 are native only. Keys and values are float32 if they are."""
    exact: bool = True
    """Whether an answer may not depend on what is answered beside it; "native" knows no other way."""


def runner_of(model: Model, c: EngineConfig) -> Runner:
    """Raises BadInput for a path that does not know the network or the weights."""
    dtype = torch.float32 if c.weights == "float32" else torch.bfloat16
    why = unsupported(model.config)
    if c.path == "native" or (c.path == "auto" and not why and c.exact and c.page % BLOCK == 0):
        return NativeRunner(model, dtype, c.weights)
    if c.weights not in ("float32", "bfloat16"):
        raise BadInput(
            f"serve.engine.weights={c.weights} is native only, but {why or 'the path is torch'}: set bfloat16"
        )
    return TorchRunner(model, dtype, steady=c.exact)


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


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine has to do, and what it has done."""

    running: int
    waiting: int
    steps: int
    tokens_read: int
    tokens_cached: int
    preempted: int


class Engine:
    """A `Sampler` for many at once. `start` runs it in a thread of its own; `step` does one step, for tests."""

    def __init__(
        self, model: Model, processor: Processor, config: EngineConfig | None = None, weights: str = ""
    ) -> None:
        """`weights` is what tells these weights from others."""
        self.config = config or EngineConfig()
        self.model, self.processor, self.weights = model, processor, weights
        if exact.KEYS % self.config.page:
            raise BadInput(f"serve.engine.page={self.config.page} must divide {exact.KEYS}: set 64")
        self.runner = runner_of(model, self.config)
        room = self.runner.room(self.config.cache_tokens // self.config.page + 1, self.config.page)
        self.pages = Pages(*room, clear=self.runner.clear)
        self.running: list[Track] = []
        self.waiting: deque[Track] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.num_steps = self.tokens_read = self.tokens_cached = self.preempted = 0
        self.thread = threading.Thread(target=self.work, name="litchi-engine", daemon=True)

    # ---- from any thread ----

    @property
    def sampler(self) -> Engine:
        return self

    @property
    def max_running(self) -> int:
        return self.config.max_running

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def submit(self, request: Request, put: Put, *, stream: bool = True) -> Track:
        """Take a request in; `put` is told each delta, or the whole answer. Raises BadInput if it cannot be read."""
        program = Program(self.model, self.processor, request, self.runner.logits)
        self.check(len(program.builder.tokens))
        keys = PageKeys(self.pages.size, self.weights)
        track = Track(program, program.steps(), put, keys, deltas=None if stream else [])
        with self.changed:
            if self.closing:
                raise BadInput("the engine is closing: ask again later")
            self.waiting.append(track)
            self.changed.notify_all()
        return track

    def check(self, length: int) -> None:
        if length >= self.room:
            raise BadInput(
                f"the prompt has {length} tokens, the cache {self.room}: shorten it or raise serve.engine.cache_tokens"
            )

    @property
    def room(self) -> int:
        """Tokens that one document may have."""
        return (len(self.pages.readers) - 1) * self.pages.size

    def cancel(self, ticket: Track) -> None:
        """Stop answering; the end is still told."""
        with self.changed:
            ticket.cancelled = True
            self.changed.notify_all()

    def stream(self, request: Request) -> Iterator[Delta]:
        """The pieces of one answer, while the engine's thread runs."""
        pieces: queue.SimpleQueue[Told | BaseException | None] = queue.SimpleQueue()
        track = self.submit(request, pieces.put)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                assert isinstance(piece, Delta)
                yield piece
        finally:
            self.cancel(track)

    def complete(self, request: Request) -> Completion:
        return whole(list(self.stream(request)))

    def load(self) -> Load:
        with self.changed:
            return Load(
                len(self.running),
                len(self.waiting),
                self.num_steps,
                self.tokens_read,
                self.tokens_cached,
                self.preempted,
            )

    # ---- the thread ----

    def start(self) -> Engine:
        self.thread.start()
        return self

    def close(self) -> None:
        """Tell everybody that it ends, and wait for the step that runs."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join()
        for track in [*self.running, *self.waiting]:
            self.end(track, None)
        self.running, self.waiting = [], deque()

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.running or self.waiting or self.closing)
                if self.closing:
                    return
            self.step()

    @torch.no_grad()
    def step(self) -> bool:
        """Read once for all that wait to be read for; False if nobody does."""
        self.admit()
        chosen = self.choose()
        if not chosen:
            return False
        try:
            found = self.runner.run([piece for _, piece in chosen], self.pages)
        except Exception as error:  # whoever was read for must hear of it, and the others go on
            log.exception("a step of the engine failed")
            for track, _ in chosen:
                self.leave(track, error)
            return True
        self.num_steps += 1
        for (track, piece), answer in zip(chosen, found, strict=True):
            self.commit(track, piece, answer)
        return True

    def admit(self) -> None:
        """Let those in that wait, and those go who have left."""
        with self.changed:
            left = [track for track in self.waiting if track.cancelled]
            for track in left:
                self.waiting.remove(track)
            fresh: list[Track] = []
            while self.waiting and len(self.running) + len(fresh) < self.config.max_running:
                fresh.append(self.waiting.popleft())
        self.running += fresh
        for track in fresh:
            self.advance(track, None)
        for track in [track for track in self.running if track.cancelled]:
            self.running.remove(track)
            self.end(track, None)
        for track in left:
            self.end(track, None)

    # ---- who reads ----

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
        return Piece(wish.builder, track.count, stop, track.pages, rows, wish.scores and stop == total)

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

    # ---- what was read ----

    def commit(self, track: Track, piece: Piece, answer: Tensor | None) -> None:
        wish = track.wish
        assert wish is not None
        self.tokens_read += piece.stop - piece.start
        before, track.count = track.count, min(piece.stop, track.clean)
        if self.config.remember and track.count // self.pages.size > before // self.pages.size:
            for page, key in zip(track.pages, track.keys.upto(wish.builder, track.count, track.clean), strict=False):
                self.pages.remember(page, key)
        if piece.rows and answer is not None:
            track.rows.append(answer)
        if piece.stop == len(wish.builder.tokens):
            found = torch.cat(track.rows) if track.rows else answer
            track.rows = []
            self.advance(track, found)

    def advance(self, track: Track, answer: Tensor | None) -> None:
        """Let the program go on until it must read again, or has ended."""
        try:
            while True:
                step = track.steps.send(answer)
                answer = None
                if isinstance(step, Delta):
                    if track.deltas is None:
                        track.put(step)
                    else:
                        track.deltas.append(step)
                    continue
                track.wish = step
                if track.count < len(step.builder.tokens):
                    self.fits(track)
                    return
        except StopIteration:
            if track.deltas is not None:
                track.put(whole(track.deltas))
            self.leave(track, None)
        except Exception as error:
            self.leave(track, error)

    def fits(self, track: Track) -> None:
        assert track.wish is not None
        if len(track.wish.builder.tokens) > self.room:
            raise BadInput(
                f"the document has grown to {len(track.wish.builder.tokens)} tokens, the cache has {self.room}: "
                f"ask for less or raise serve.engine.cache_tokens"
            )

    def leave(self, track: Track, error: BaseException | None) -> None:
        self.running.remove(track)
        self.end(track, error)

    def end(self, track: Track, error: BaseException | None) -> None:
        self.give_back(track)
        track.steps.close()
        track.put(error)
