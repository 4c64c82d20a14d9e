"""A stream of samples becomes a stream of batches: each encoded once, laid into rows, and resumable to the sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from litchi.config import BadInput
from litchi.schema.processor import Processor
from litchi.schema.sample import Sample
from litchi.schema.sequence import Batch, Modality, TokenSequence, pack_rows, supervised

Samples = Callable[[int], Sample]
"""The global order of an endless epoch: position -> sample. Pure, so that a position is all there is to resume from."""


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """A batch is `rows` rows of `row` tokens; documents do not cross rows."""

    rows: int = 16
    row: int = 256
    lookahead: int = 64
    """Documents that wait for a row they fit; more fill rows better, and show a vision tower more evenly much."""
    emphasis: dict[str, float] = field(default_factory=dict)
    """Factor of every loss weight of a source, 1 where not named.

    Captions have many easy tokens, actions few hard ones.
    """


class Batches(Iterator[Batch]):
    """Position and the documents that wait are the whole state.

    Of `num_slots` streams that share out the positions this is number `slot`: a step reads one batch of each, whoever
    reads them, so that the order of documents does not depend on the number of ranks.
    """

    def __init__(
        self, samples: Samples, processor: Processor, config: BatchConfig, seed: int, slot: int = 0, num_slots: int = 1
    ) -> None:
        self.samples, self.processor, self.config, self.seed = samples, processor, config, seed
        self.slot, self.num_slots = slot, num_slots
        self.position = slot
        self.waiting: list[tuple[int, TokenSequence]] = []
        self.taken: list[int] = []
        """Positions of the documents of the last batch."""

    def __next__(self) -> Batch:
        """The oldest document that fits, and then the longest, into the fullest row that takes it.

        Rows cost the same whatever stands in them, a vision tower costs what it is shown. So documents with pictures go
        first while the batch has shown less than its share, and last while it has shown more: ranks finish together.
        The oldest of all always goes.
        """
        rows: list[list[TokenSequence]] = [[] for _ in range(self.config.rows)]
        space = [self.config.row] * self.config.rows
        self.look_ahead()
        pace = sum(num_patches(s) for _, s in self.waiting) / sum(len(s) for _, s in self.waiting)
        placed, self.taken, read, seen = True, [], 0, 0
        while placed:
            self.look_ahead()
            placed = False
            for pair in self.waiting[:1] if not read else ranked(self.waiting, shown=seen < pace * read):
                fits = [r for r, left in enumerate(space) if left >= len(pair[1])]
                if fits:
                    best = min(fits, key=lambda r: space[r])
                    rows[best].append(pair[1])
                    self.taken.append(pair[0])
                    space[best] -= len(pair[1])
                    read, seen = read + len(pair[1]), seen + num_patches(pair[1])
                    self.waiting = [w for w in self.waiting if w is not pair]
                    placed = True
                    break
        return pack_rows(rows, self.config.row, self.processor.tokenizer.pad)

    def look_ahead(self) -> None:
        while len(self.waiting) < self.config.lookahead:
            self.waiting.append((self.position, self.encode(self.position)))
            self.position += self.num_slots

    def encode(self, position: int) -> TokenSequence:
        """The document at a position of the stream, its randomness drawn from the position alone."""
        sample = self.samples(position)
        sequence = self.processor.encode(sample, np.random.default_rng([self.seed, position]))
        if len(sequence) > self.config.row:
            raise BadInput(
                f"sample {sample.key!r} has {len(sequence)} tokens, a row holds {self.config.row}: "
                f"raise train.batches.row or shorten the sample"
            )
        return emphasised(sequence, self.config.emphasis.get(sample.source, 1.0))

    def state(self) -> dict[str, object]:
        return {"position": self.position, "waiting": [position for position, _ in self.waiting]}

    def restore(self, state: dict) -> None:
        self.position = state["position"]
        self.waiting = [(position, self.encode(position)) for position in state["waiting"]]


def ranked(waiting: list[tuple[int, TokenSequence]], *, shown: bool) -> Iterator[tuple[int, TokenSequence]]:
    """First those that show a vision tower pictures, or those that do not; of each the oldest, then the longest."""
    for kind in (shown, not shown):
        alike = [pair for pair in waiting if (num_patches(pair[1]) > 0) == kind]
        yield from alike[:1]
        yield from sorted(alike, key=lambda pair: -len(pair[1]))


def num_patches(sequence: TokenSequence) -> int:
    """Rows that a vision tower reads."""
    shown = sequence.vectors.get(Modality.VISION)
    return 0 if shown is None else len(shown.index)


def emphasised(sequence: TokenSequence, factor: float) -> TokenSequence:
    if factor == 1.0:
        return sequence
    vectors = {m: replace(v, weight=v.weight * factor) for m, v in sequence.vectors.items()}
    return replace(sequence, weights=sequence.weights * factor, vectors=vectors)


def coverage(batch: Batch, processor: Processor, limit: int = 200) -> str:
    """What a batch supervises, as text: a run that would learn nothing is seen before it starts."""
    weights = supervised(batch)
    share = {str(m): f"{w:.0f}" for m, w in weights.items()}
    learned = [int(label) for label in batch.labels[batch.labels >= 0][:limit]]
    text = processor.tokenizer.backend.decode(learned, skip_special_tokens=False)
    return f"supervised weight by modality {share} of {len(batch)} tokens; labels begin: {text}"


def check_coverage(batch: Batch) -> None:
    """Raises BadInput if no text label and no vector of a batch carries weight."""
    if not any(supervised(batch).values()):
        raise BadInput("nothing in the first batch is supervised: give the parts to be learned a weight above 0")
