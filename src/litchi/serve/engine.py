"""The engine: one network reads for many programs at once, words, chunks of prompts and drafts of pictures in one step.

A program says what it must read next, the scheduler chooses who reads how much, and no answer depends on that choice.
When pages run out, the youngest document gives its own back and is read again later.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.generate import whole
from litchi.model.lowrank import Adapters
from litchi.model.native import unsupported
from litchi.model.network import Model
from litchi.model.packing import BLOCK
from litchi.model.program import Program
from litchi.model.weights import Checkpoint
from litchi.schema.processor import Processor
from litchi.schema.request import Delta, Request
from litchi.serve.asking import Asking
from litchi.serve.device import DeviceReader
from litchi.serve.draft import guesser_of
from litchi.serve.guess import Ahead, Foreseen
from litchi.serve.pages import Pages
from litchi.serve.placing import placed, table_of
from litchi.serve.prefix import PageKeys
from litchi.serve.promise import broken
from litchi.serve.receipts import Origin
from litchi.serve.runner import NativeRunner, Piece, Runner, TorchRunner
from litchi.serve.scheduler import EngineConfig, Scheduler, Track
from litchi.serve.solo import Put

log = logging.getLogger("litchi.serve")


def runner_of(model: Model, c: EngineConfig, adapters: Adapters | None = None, *, take: bool = False) -> Runner:
    """Computes where the network is. Raises BadInput for a path that does not know it or the weights."""
    dtype = torch.float32 if c.weights == "float32" else torch.bfloat16
    if model.embed_tokens.weight.device.type != "cpu":
        adapters = adapters or Adapters(model)
        reader = DeviceReader(model, dtype, adapters, exact=c.exact)
        return TorchRunner(model, dtype, steady=c.exact, adapters=adapters, reader=reader, table=table_of(model, dtype))
    why = unsupported(model.config)
    if c.path == "native" or (c.path == "auto" and not why and c.exact and c.page % BLOCK == 0):
        return NativeRunner(model, torch.int8 if c.kv == "int8" else dtype, c.weights, adapters=adapters, take=take)
    if c.kv == "int8":
        raise BadInput(f"serve.engine.kv=int8 is native only, but {why or 'the path is torch'}: set auto")
    if c.weights not in ("float32", "bfloat16"):
        raise BadInput(
            f"serve.engine.weights={c.weights} is native only, but {why or 'the path is torch'}: set bfloat16"
        )
    table = table_of(placed(model, torch.device("cpu"), dtype), dtype) if take else None
    return TorchRunner(model, dtype, steady=c.exact, adapters=adapters, table=table)


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine has to do, and what it has done."""

    running: int
    waiting: int
    steps: int
    tokens_read: int
    tokens_cached: int
    preempted: int
    guesses: int = 0
    """Tokens that were read on a guess."""
    accepted: int = 0
    """Those of them that the answers went on with."""


class Engine(Asking):
    """A `Sampler` for many at once. `start` runs it in a thread of its own; `step` does one step, for tests."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        config: EngineConfig | None = None,
        weights: str = "",
        runner: Runner | None = None,
        adapters: Adapters | None = None,
        draft: Checkpoint | None = None,
        *,
        take: bool = False,
    ) -> None:
        """`weights` is what tells these weights from others; a `runner` that is there already need not be built.

        `adapters` are what requests may name; a `runner` has the same. `draft` is what `serve.engine.draft` names.
        `take`: nobody else needs the model, so that a path with matrices of its own may empty the model's.
        """
        self.config = config or EngineConfig()
        self.model, self.processor, self.weights = model, processor, weights
        self.adapters = adapters or Adapters(model)
        own_draft = self.config.guess == "draft" and draft is None  # which is packed from the model once more
        self.runner = runner or runner_of(model, self.config, self.adapters, take=take and not own_draft)
        room = self.runner.room(self.config.cache_tokens // self.config.page + 1, self.config.page)
        self.pages = Pages(*room, clear=self.runner.clear)
        self.scheduler = Scheduler(self.config, self.pages)
        other = None if draft is None else (draft.processor, runner_of(draft.model, self.config))
        guesser = guesser_of(self.config, self.runner, self.pages, processor, other, self.adapters)
        self.ahead = Ahead(self.config, self.pages, guesser)
        self.waiting: deque[Track] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.num_steps = self.tokens_read = 0
        self.fault = ""
        """What was found to depend on neighbours though it should not."""
        self.thread = threading.Thread(target=self.work, name="litchi-engine", daemon=True)

    # ---- from any thread ----

    @property
    def running(self) -> list[Track]:
        return self.scheduler.running

    @property
    def tokens_cached(self) -> int:
        """Tokens that were found already read."""
        return self.scheduler.tokens_cached

    @property
    def preempted(self) -> int:
        """How often a document gave its pages back."""
        return self.scheduler.preempted

    @property
    def sampler(self) -> Engine:
        return self

    @property
    def max_running(self) -> int:
        return self.config.max_running

    @property
    def origin(self) -> Origin | None:
        """What the bits of answers come from, if that is known and they depend on nothing else."""
        known = self.runner.exact and self.weights and not self.fault
        return Origin(self.weights, self.runner.name, torch.__version__, self.adapters.digests) if known else None

    @property
    def mode(self) -> str:
        if self.fault:
            return f"not exact on this machine: {self.fault} depends on what stands beside it"
        return "exact" if self.runner.exact else "not exact: serve.engine.exact=false"

    def look(self) -> Engine:
        """See whether this machine keeps the promise; `mode` tells."""
        if self.runner.exact:
            names = tuple(self.adapters.known)
            self.fault = broken(self.runner, self.processor, self.model.config.vocab_size, self.pages.size, names)
        if self.fault:
            log.warning("answers are %s; no receipts are kept", self.mode)
        return self

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def submit(self, request: Request, put: Put, *, stream: bool = True) -> Track:
        """Take a request in; `put` is told each delta, or the whole answer. Raises BadInput if it cannot be read."""
        self.adapters.check(request.adapter)
        program = Program(self.model, self.processor, request, self.runner.logits)
        self.check(len(program.builder.tokens))
        keys = PageKeys(self.pages.size, self.weights + self.adapters.key(request.adapter))
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
        return self.pages.room

    def cancel(self, ticket: Track) -> None:
        """Stop answering; the end is still told."""
        with self.changed:
            ticket.cancelled = True
            self.changed.notify_all()

    def load(self) -> Load:
        with self.changed:
            s, a = self.scheduler, self.ahead
            done = (self.num_steps, self.tokens_read, s.tokens_cached, s.preempted, a.guesses, a.accepted)
            return Load(len(self.running), len(self.waiting), *done)

    def gauges(self) -> dict[str, float]:
        return {f"engine_{name}": value for name, value in asdict(self.load()).items()}

    # ---- the thread ----

    def start(self) -> Engine:
        if self.thread.ident is None:
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
        self.running.clear()
        self.waiting.clear()

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
        chosen = self.ahead.extend(self.scheduler.choose())
        if not chosen:
            return False
        try:
            found = self.runner.run([piece for _, piece in chosen], self.pages)
        except Exception as error:  # whoever was read for must hear of it, and the others go on
            log.exception("a step of the engine failed")
            for track, _ in chosen:
                self.leave(track, error)
            return True
        self.ahead.step.stop()
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
        self.running.extend(fresh)
        for track in fresh:
            self.advance(track, None)
        for track in [track for track in self.running if track.cancelled]:
            self.running.remove(track)
            self.end(track, None)
        for track in left:
            self.end(track, None)

    # ---- what was read ----

    def commit(self, track: Track, piece: Piece, answer: Tensor | None) -> None:
        wish = track.wish
        assert wish is not None
        self.tokens_read += piece.stop - piece.start
        self.scheduler.grow(track, min(piece.stop, track.clean))
        if piece.scores and answer is not None:
            foreseen = Foreseen(wish.builder, piece.builder, answer)
            self.advance(track, answer[0], foreseen)
            self.ahead.learn(track, foreseen)
            return
        if piece.rows and answer is not None:
            track.rows.append(answer)
        if piece.stop == len(wish.builder.tokens):
            found = torch.cat(track.rows) if track.rows else answer
            track.rows = []
            self.advance(track, found)

    def advance(self, track: Track, answer: Tensor | None, foreseen: Foreseen | None = None) -> None:
        """Let the program go on until it must read what has not been foreseen, or has ended."""
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
                if foreseen is not None and (answer := foreseen.next(step)) is not None:
                    self.scheduler.grow(track, track.count + 1)
                    continue
                foreseen = None
                if track.count < len(step.builder.tokens):
                    self.scheduler.fits(track)
                    return
        except StopIteration:
            if track.deltas is not None:
                track.put(whole(track.deltas))
            self.leave(track, None)
        except Exception as error:
            self.leave(track, error)

    def leave(self, track: Track, error: BaseException | None) -> None:
        self.running.remove(track)
        self.end(track, error)

    def end(self, track: Track, error: BaseException | None) -> None:
        self.scheduler.give_back(track)
        self.ahead.forget(track)
        track.steps.close()
        track.put(error)
