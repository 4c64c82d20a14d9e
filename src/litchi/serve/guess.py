"""Guessing ahead: words that may come are read together with the new one, and if they come they have been read.

A program asks for one token at a time, and knows nothing of this. Reading five tokens takes a CPU little longer than
reading one, since the weights come from memory once; so the engine reads what it guesses as well, and when the program
has said just that, it answers from what was read. At the first other word the rest is forgotten. Every row has the bits
that it would have alone, so that no guess, right or wrong, changes a bit of any answer (Leviathan et al. 2023 accept by
a draw, which keeps the distribution only; here the program itself draws from the scores that it would have seen).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor

from litchi.model.packing import Format
from litchi.model.program import Read
from litchi.schema.processor import Builder
from litchi.serve.lanes import SMALL
from litchi.serve.pages import Pages
from litchi.serve.runner import Piece
from litchi.serve.scheduler import EngineConfig, Track

log = logging.getLogger("litchi.serve")

NEW, OLD = 0.95, 0.98
"""What is left of what was known at each further guess, and at each that was not worth trying."""


PAYS: dict[Format, int] = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 6, "w8a8": 8, "w4a8": 6}
"""For `guess_rows`: the smaller weights are, the less of a step is reading them (bench/guess.py, one thread)."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A word that may come, and its kind: those of one kind come true equally often."""

    token: int
    kind: int


@dataclass(slots=True)
class Luck:
    """How often guesses of each kind have come true lately, in one document, or with no `base` in all of them.

    What is known fades, so that a kind which was given up is tried again now and then.
    """

    base: Luck | None = None
    tried: dict[int, float] = field(default_factory=dict)
    right: dict[int, float] = field(default_factory=dict)

    def chance(self, kind: int) -> float:
        before = self.base.chance(kind) if self.base is not None else 0.5
        return (self.right.get(kind, 0.0) + 2 * before) / (self.tried.get(kind, 0.0) + 2)

    def learn(self, kind: int, *, right: bool) -> None:
        self.fade(kind, NEW)
        self.tried[kind] = self.tried.get(kind, 0.0) + 1
        self.right[kind] = self.right.get(kind, 0.0) + right
        if self.base is not None:
            self.base.learn(kind, right=right)

    def fade(self, kind: int, share: float = OLD) -> None:
        self.tried[kind] = self.tried.get(kind, 0.0) * share
        self.right[kind] = self.right.get(kind, 0.0) * share

    def rest(self, kind: int) -> None:
        """A guess of this kind was not worth trying."""
        self.fade(kind)
        if self.base is not None:
            self.base.fade(kind)


@dataclass(slots=True)
class Clock:
    """What something takes; what it costs decides how much is guessed, and no more than that.

    It falls at once and rises slowly, since a busy machine only ever takes longer; the first time, which is cold, does
    not count.
    """

    RISE: ClassVar[float] = 1.05
    FADE: ClassVar[float] = 0.998

    seconds: float = 0.0
    began: float | None = None
    share: float = 1.0
    cold: bool = True

    def start(self, share: float = 1.0) -> None:
        """Only a share of the time counts."""
        self.began, self.share = time.perf_counter(), share

    def stop(self) -> None:
        """Harmless if it was not started."""
        if self.began is not None:
            taken, self.began = self.share * (time.perf_counter() - self.began), None
            if not self.cold:
                self.seconds = min(taken, self.seconds * self.RISE or taken)
            self.cold = False

    def fade(self) -> None:
        """It was thought too dear to be tried: what is believed of it fades, or it would never be measured again."""
        self.seconds *= self.FADE


@dataclass(frozen=True, slots=True)
class Ask:
    """A document that waits for its last token to be read, with room in its pages for `most` more."""

    track: Track
    most: int
    luck: Luck
    price: float
    """The chance below which a guess is not worth its row."""
    rows: int
    """Tokens of the step without guesses."""
    seconds: float
    """What such a step takes lately; 0 before the first."""

    @property
    def builder(self) -> Builder:
        assert self.track.wish is not None
        return self.track.wish.builder

    def worth(self, kinds: Sequence[int]) -> float:
        """The chance that guesses of these kinds, one after another, all come true."""
        chance = 1.0
        for kind in kinds:
            chance *= self.luck.chance(kind)
        return chance


class Guesser(Protocol):
    """Whoever guesses. No bit of an answer depends on what it says."""

    def guess(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        """For each document up to `most` words that may follow, in order; none where nothing is worth its price."""
        ...

    def forget(self, track: Track) -> None:
        """A document has ended. Harmless if it was never asked for."""
        ...


@dataclass(slots=True)
class Foreseen:
    """The scores (N, V) after the end of a document and after each of N - 1 guesses, which `builder` has as well."""

    document: Builder
    builder: Builder
    scores_NV: Float[Tensor, "N V"]
    right: int = 0
    """Guesses that have come true."""
    wrong: bool = False

    @property
    def count(self) -> int:
        return len(self.scores_NV) - 1

    def next(self, wish: Read) -> Tensor | None:
        """The scores (V,) that are wished for, if the document has grown by the token that was guessed next."""
        if self.wrong or self.right == self.count:
            return None
        own, at = wish.builder, len(self.builder.tokens) - self.count + self.right
        same = own is self.document and wish.scores and not wish.draft and len(own.tokens) == at + 1
        if not same or any(mine[at] != theirs[at] for mine, theirs in columns(own, self.builder)):
            self.wrong = True
            return None
        self.right += 1
        return self.scores_NV[self.right]


def columns(a: Builder, b: Builder) -> Sequence[tuple[Sequence, Sequence]]:
    """All that a token without rows is read by."""
    return (a.tokens, b.tokens), (a.positions, b.positions), (a.spans, b.spans)


class Ahead:
    """Adds guesses to the pieces of a step, as long as a row costs less than it may save, and learns from the outcome.

    Reading the weights takes as long as reading `most_rows` tokens or somewhat less; a guess that comes true saves one
    document of B a step. So a guess is worth its row if its chance is above B / `most_rows`: few are made where many
    documents run, and none of what keeps being wrong.
    """

    def __init__(self, config: EngineConfig, pages: Pages, guesser: Guesser | None) -> None:
        self.config, self.pages, self.guesser = config, pages, guesser
        on_cpu = pages.keys.device.type == "cpu"
        self.most_rows = config.guess_rows or (PAYS[config.weights] if on_cpu else SMALL)
        self.all = Luck()
        self.luck: dict[Track, Luck] = {}
        self.kinds: dict[Track, list[int]] = {}
        self.guesses = self.accepted = 0
        self.step = Clock()
        """Of the network, which the engine stops: only words are guessed, in steps of few tokens."""

    def extend(self, chosen: list[tuple[Track, Piece]]) -> list[tuple[Track, Piece]]:
        """The pieces of a step, some of them longer by what is guessed."""
        self.step.began = None
        rows = sum(piece.stop - piece.start for _, piece in chosen)
        if self.guesser is None or rows >= self.most_rows:
            return chosen
        asks = [ask for track, piece in chosen if (ask := self.ask(track, piece, rows)) is not None]
        try:
            found = [self.sensible(ask, guesses) for ask, guesses in zip(asks, self.guesser.guess(asks), strict=True)]
        except Exception:  # answers do not need guesses
            log.exception("guessing failed; the engine goes on without")
            self.guesser = None
            return chosen
        taken = {ask.track: guesses for ask, guesses in self.allot(asks, found, rows) if guesses}
        self.kinds |= {track: [guess.kind for guess in guesses] for track, guesses in taken.items()}
        alone = self.most_rows + rows
        self.step.start(alone / (alone + sum(map(len, taken.values()))))
        return [(t, longer(piece, taken[t]) if t in taken else piece) for t, piece in chosen]

    def ask(self, track: Track, piece: Piece, rows: int) -> Ask | None:
        """Whether and how far to guess: for words, within the network, the answer, and the pages that are free."""
        if not piece.scores or piece.stop - piece.start != 1:
            return None
        program, room = track.program, self.pages.room
        readable = min(room, program.model.config.max_length or room)
        left = program.params.max_tokens - (piece.stop - program.prompt_tokens) - 1
        most = min(self.config.guess_tokens, left, readable - piece.stop)
        while len(track.pages) * self.pages.size < piece.stop + most and self.pages.num_free:
            track.pages.append(self.pages.take())
        most = min(most, len(track.pages) * self.pages.size - piece.stop)
        luck = self.luck.setdefault(track, Luck(self.all))
        return Ask(track, most, luck, rows / self.most_rows, rows, self.step.seconds) if most > 0 else None

    def sensible(self, ask: Ask, guesses: list[Guess]) -> list[Guess]:
        """Up to what a program would not say, or would stop at."""
        program = ask.track.program
        for index, guess in enumerate(guesses[: ask.most]):
            if program.processor.is_control(guess.token) or not 0 <= guess.token < program.model.config.vocab_size:
                return guesses[:index]
        return guesses[: ask.most]

    def allot(self, asks: list[Ask], found: list[list[Guess]], rows: int) -> list[tuple[Ask, list[Guess]]]:
        """The likeliest guesses first, while each is worth a row more."""
        likely = []
        for index, (ask, guesses) in enumerate(zip(asks, found, strict=True)):
            kinds = [guess.kind for guess in guesses]
            likely += [(ask.worth(kinds[: depth + 1]), index) for depth in range(len(kinds))]
        taken = [0] * len(asks)
        for chance, index in sorted(likely, key=lambda pair: -pair[0]):
            if chance * self.most_rows <= rows:
                break
            taken[index], rows = taken[index] + 1, rows + 1
        return [(ask, guesses[:n]) for ask, guesses, n in zip(asks, found, taken, strict=True)]

    def learn(self, track: Track, foreseen: Foreseen) -> None:
        """What has come of the guesses of a step; the rest of an answer that has ended is neither right nor wrong."""
        self.guesses, self.accepted = self.guesses + foreseen.count, self.accepted + foreseen.right
        if foreseen.count and (luck := self.luck.get(track)) is not None:
            for index, kind in enumerate(self.kinds[track][: foreseen.right + foreseen.wrong]):
                luck.learn(kind, right=index < foreseen.right)

    def forget(self, track: Track) -> None:
        self.luck.pop(track, None)
        self.kinds.pop(track, None)
        if self.guesser is not None:
            self.guesser.forget(track)


def longer(piece: Piece, guesses: Sequence[Guess]) -> Piece:
    """The same piece and what is guessed behind it; the document itself stays as it is."""
    builder = piece.builder.fork()
    for guess in guesses:
        builder.token(guess.token)
    return replace(piece, builder=builder, stop=piece.stop + len(guesses), scores=1 + len(guesses))


# ---- from the document itself -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Index:
    """Where in a document each few tokens stood last, and what came then."""

    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    count: int = 0
    """Tokens that are in it."""

    def read(self, tokens: Sequence[int]) -> None:
        for at in range(self.count, len(tokens)):
            for size in NGram.SIZES:
                if at >= size:
                    self.places[tuple(tokens[at - size : at])] = at
        self.count = len(tokens)


class NGram:
    """What followed when the last words stood in this document before (prompt lookup, Saxena 2023)."""

    SIZES = (3, 2)
    SURE = 8
    """Of longer matches none is better than others."""

    def __init__(self) -> None:
        self.known: dict[Track, Index] = {}

    def guess(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        return [self.look(ask) for ask in asks]

    def look(self, ask: Ask) -> list[Guess]:
        """The kind of a guess is how many tokens before it are the same."""
        tokens = ask.builder.tokens
        index = self.known.setdefault(ask.track, Index())
        index.read(tokens)
        at = next((index.places[key] for n in self.SIZES if (key := tuple(tokens[-n:])) in index.places), None)
        if at is None:
            return []
        same = 0
        while same < min(self.SURE, at) and tokens[at - 1 - same] == tokens[-1 - same]:
            same += 1
        found: list[Guess] = []
        chance = 1.0
        for step in range(ask.most):
            kind = min(same + step, self.SURE)
            chance *= ask.luck.chance(kind)
            if chance <= ask.price:
                ask.luck.rest(kind)
                break
            # What is guessed may go on into itself: a text of one word again and again.
            token = tokens[at + step] if at + step < len(tokens) else found[at + step - len(tokens)].token
            found.append(Guess(token, kind))
        return found

    def forget(self, track: Track) -> None:
        self.known.pop(track, None)
