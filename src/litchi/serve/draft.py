"""A smaller network that reads ahead, greedily, for whoever runs: the same weights in 4 bits, or another checkpoint.

The same weights in fewer bits read the keys and values of the network that they guess for, and write their own behind
them, where that network overwrites them as it reads what was guessed; so they have nothing to catch up with. Another
network has pages of its own, and reads every document itself before it guesses.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from litchi.config import BadInput
from litchi.model.lowrank import Adapters
from litchi.model.packing import Format
from litchi.schema.processor import Processor
from litchi.serve.guess import OLD, Ask, Clock, Guess, Guesser, NGram
from litchi.serve.pages import OutOfPages, Pages
from litchi.serve.prefix import PageKeys
from litchi.serve.runner import NativeRunner, Piece, Runner, TorchRunner
from litchi.serve.scheduler import EngineConfig, Track

SURE = (0.4, 0.7, 0.9)
"""Bounds of the draft's own probability between kinds of guesses: how often each comes true is learned."""
HOPE = 0.9
"""What is kept of what was hoped for at each further guess."""
SAME = ("int4", "int8")


def guesser_of(
    c: EngineConfig,
    runner: Runner,
    pages: Pages,
    processor: Processor,
    other: tuple[Processor, Runner] | None,
    adapters: Adapters | None = None,
) -> Guesser | None:
    """Who guesses; `other` is a draft with weights of its own. Raises BadInput for one that cannot guess here."""
    if c.guess == "none":
        return None
    if c.guess == "ngram":
        return NGram()
    if other is not None:
        theirs, reader = other
        if theirs.tokenizer.backend.get_vocab() != processor.tokenizer.backend.get_vocab():
            raise BadInput(f"serve.engine.draft={c.draft} has another tokenizer: name a checkpoint with the same")
        return OwnPages(reader, size(reader) / size(runner), c, len(pages.readers))
    if c.draft not in SAME:
        raise BadInput(f"serve.engine.draft={c.draft} is no format: give int4, int8 or the folder of a checkpoint")
    if not isinstance(runner, NativeRunner) or c.weights not in ("float32", "bfloat16"):
        why = "it guesses for weights of 16 or 32 bits that the native path reads"
        raise BadInput(f"serve.engine.draft={c.draft} cannot guess here, {why}: name a checkpoint, or guess=ngram")
    form: Format = "int4" if c.draft == "int4" else "int8"
    reader = NativeRunner(runner.model, runner.trunk.dtype, form, adapters=adapters)
    return SharedPages(reader, size(reader) / size(runner), pages)


def size(runner: Runner) -> int:
    """Bytes of weights that a step reads."""
    if isinstance(runner, NativeRunner):
        return sum(held.nbytes for held in runner.trunk.held)
    assert isinstance(runner, TorchRunner)
    return sum(p.numel() for p in runner.model.parameters()) * runner.dtype.itemsize


class Draft:
    """Reads ahead as long as that is worth what it takes."""

    def __init__(self, runner: Runner, share: float, pages: Pages) -> None:
        """`share` of the bytes that the network has is in its weights, and as much of a step it is thought to take
        until that has been measured."""
        self.runner, self.share, self.pages = runner, share, pages
        self.step = Clock()
        self.hope: dict[Track, float] = {}
        """The chance that the first guess had lately; it rises again while nothing is guessed."""

    def guess(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        found: list[list[Guess]] = [[] for _ in asks]
        for ask in asks:
            self.hope.setdefault(ask.track, 1.0)
        going = self.worth({index: (ask, 1.0) for index, ask in enumerate(asks)})
        if not going:
            self.step.fade()
            self.hope |= {ask.track: 1 - OLD * (1 - self.hope[ask.track]) for ask in asks}
        pieces = self.begin({index: asks[index] for index in going})
        while pieces:
            self.step.start()
            answers = self.runner.run(list(pieces.values()), self.pages)
            chances = {}
            for (index, piece), scores_NV in zip(pieces.items(), answers, strict=True):
                self.has_read(asks[index], piece)
                if scores_NV is not None:  # it has caught up
                    chances[index] = asks[index], self.take(asks[index], found[index], scores_NV[-1])
            if all(piece.stop - piece.start == 1 for piece in pieces.values()):
                self.step.stop()
            going = self.worth({i: pair for i, pair in chances.items() if len(found[i]) < pair[0].most})
            pieces = {index: further(pieces[index], found[index][-1]) for index in going}
        return found

    def take(self, ask: Ask, guesses: list[Guess], scores_V: Tensor) -> float:
        """The chance of all guesses with the likeliest token, which becomes one of them if it is worth its row."""
        sure, token = scores_V.softmax(-1).max(-1)
        guess = Guess(int(token), bisect(SURE, float(sure)))
        chance = ask.worth([*(g.kind for g in guesses), guess.kind])
        if not guesses:
            self.hope[ask.track] = HOPE * self.hope[ask.track] + (1 - HOPE) * chance
        if chance <= ask.price:
            ask.luck.rest(guess.kind)
            return 0.0
        guesses.append(guess)
        return chance

    def worth(self, chances: dict[int, tuple[Ask, float]]) -> list[int]:
        """For whom to read one token further, of documents whose guesses so far have these chances.

        One that comes true saves one of the documents of a step that step; reading takes as long for one as for all.
        """
        gains = {index: chance * self.hope[ask.track] - ask.price for index, (ask, chance) in chances.items()}
        gains = {index: gain for index, gain in gains.items() if gain > 0}
        if not gains:
            return []
        ask, _ = chances[next(iter(gains))]
        share = self.step.seconds / ask.seconds if self.step.seconds and ask.seconds else self.share
        return list(gains) if sum(gains.values()) > share * ask.rows else []

    def begin(self, asks: dict[int, Ask]) -> dict[int, Piece]:
        """What to read first of each document, with forks that may grow."""
        raise NotImplementedError

    def has_read(self, ask: Ask, piece: Piece) -> None:
        """The pages hold a piece now."""

    def forget(self, track: Track) -> None:
        self.hope.pop(track, None)


def further(piece: Piece, guess: Guess) -> Piece:
    """The guess behind a piece, which is a fork."""
    piece.builder.token(guess.token)
    return replace(piece, start=piece.stop, stop=piece.stop + 1)


class SharedPages(Draft):
    """The same weights in fewer bits, in the pages of the network that they guess for."""

    def begin(self, asks: dict[int, Ask]) -> dict[int, Piece]:
        """What is written for the new token and behind it is no longer there when the network itself has read it."""
        pieces = {}
        for index, ask in asks.items():
            stop, adapter = len(ask.builder.tokens), ask.track.program.request.adapter
            pieces[index] = Piece(ask.builder.fork(), stop - 1, stop, ask.track.pages, scores=1, adapter=adapter)
        return pieces


@dataclass(slots=True)
class Lane:
    """What a draft has read of one document."""

    keys: PageKeys
    pages: list[int]
    count: int
    """Tokens of the document."""
    guessed: list[int] = field(default_factory=list)
    """Guesses that it has read behind them."""


class OwnPages(Draft):
    """Another network, which reads each document itself, in as many tokens of a step as the engine has."""

    def __init__(self, runner: Runner, share: float, config: EngineConfig, num_pages: int) -> None:
        super().__init__(runner, share, Pages(*runner.room(num_pages, config.page), clear=runner.clear))
        self.step_tokens = config.step_tokens
        self.lanes: dict[Track, Lane] = {}

    def begin(self, asks: dict[int, Ask]) -> dict[int, Piece]:
        left, pieces = self.step_tokens, {}
        for index, ask in asks.items():
            total, lane = len(ask.builder.tokens), self.lane(ask)
            stop = min(total, lane.count + left)
            if stop > lane.count and self.knows(ask, lane.count, stop) and self.make_room(lane, stop + ask.most, asks):
                scores = int(stop == total)
                pieces[index] = Piece(ask.builder.fork(), lane.count, stop, lane.pages, scores=scores)
                left -= stop - lane.count
        return pieces

    def lane(self, ask: Ask) -> Lane:
        """What of the document has been read, guesses that came true included."""
        tokens = ask.builder.tokens
        if ask.track not in self.lanes:
            keys = PageKeys(self.pages.size, "draft")
            pages = self.pages.find(keys.upto(ask.builder, len(tokens) - 1, len(tokens)))
            self.lanes[ask.track] = Lane(keys, pages, len(pages) * self.pages.size)
        lane = self.lanes[ask.track]
        for guess in lane.guessed:
            if lane.count + 1 >= len(tokens) or tokens[lane.count] != guess:
                break
            lane.count += 1
        lane.guessed = []
        return lane

    def knows(self, ask: Ask, start: int, stop: int) -> bool:
        """Whether the network can read that: words that it has, and not too many; pictures are coded otherwise."""
        c = self.runner.model.config
        fits = not c.max_length or stop + ask.most <= c.max_length
        return fits and not ask.builder.rows and max(ask.builder.tokens[start:stop]) < c.vocab_size

    def make_room(self, lane: Lane, stop: int, asks: dict[int, Ask]) -> bool:
        """Pages up to `stop`; documents that are not guessed for now give way if need be."""
        while len(lane.pages) * self.pages.size < stop:
            try:
                lane.pages.append(self.pages.take())
            except OutOfPages:
                asked = {ask.track for ask in asks.values()}
                other = next((track for track in self.lanes if track not in asked), None)
                if other is None:
                    return False
                self.forget(other)
        return True

    def has_read(self, ask: Ask, piece: Piece) -> None:
        lane, tokens = self.lanes[ask.track], ask.builder.tokens
        if piece.stop > len(tokens):
            lane.guessed.append(piece.builder.tokens[piece.start])
            return
        lane.count = piece.stop
        for page, key in zip(lane.pages, lane.keys.upto(ask.builder, lane.count, len(tokens)), strict=False):
            self.pages.remember(page, key)

    def forget(self, track: Track) -> None:
        super().forget(track)
        if (lane := self.lanes.pop(track, None)) is not None:
            self.pages.drop(lane.pages)
