"""Sentences about three boxes that are true or false as often, each with a picture that makes them so.

They are of NLVR's kinds, in plainer words: how many, of what size, colour and shape, at which wall, above or beside
what, how high a tower is and what is its top. The sentence is drawn first, then a scene in which it holds and one in
which it does not, then a coin says which is shown: the sentence alone says nothing about the answer. Scenes of our
test are never trained on; one of NLVR's test can be (109 of the first 4,000 are), under a sentence of ours.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from litchi.data.boxes import (
    COLOURS,
    MAX_BLOCKS,
    SHAPES,
    SIZES,
    WALLS,
    Box,
    Boxes,
    Item,
    as_data,
    draw_boxes,
    random_loose,
    random_towers,
)
from litchi.data.nlvr import judged
from litchi.data.ticket import HELD_OUT_SCENES, Ticket
from litchi.data.words import NUMBERS, pick
from litchi.schema.sample import Sample

TRIES = 60
"""Scenes drawn for a sentence before it is given up, whether it was true or false of all of them."""

Holds = Callable[[Box], bool | None]
"""Whether something holds of a box; None where it can be read both ways."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence and its truth. A scene of which it can be read both ways (None) is never shown with it."""

    kind: str
    text: str
    holds: Callable[[Boxes], bool | None]


@dataclass(frozen=True, slots=True)
class Trait:
    """What a box may have: in words that follow "with" or "has", and whether it has it."""

    kind: str
    words: str
    holds: Holds


def claims(ticket: Ticket) -> Sample:
    """Picture, sentence, "true" or "false". `meta` holds the boxes, in the form of `boxes.as_data`."""
    rng = ticket.rng
    random_scene, draw_claim = pick(rng, ((random_towers, tower_claim), (random_loose, loose_claim)))
    while True:
        claim = draw_claim(rng)
        scenes = both(claim, ticket, random_scene, rng)
        if len(scenes) == 2:
            break
    truth = bool(rng.integers(2))
    boxes = scenes[truth]
    about = Sample((), ticket.key, ticket.source, {"boxes": as_data(boxes)})
    return judged(draw_boxes(boxes), claim.text, truth, about, claim.kind)


def both(
    claim: Claim, ticket: Ticket, random_scene: Callable[[np.random.Generator], Boxes], rng: np.random.Generator
) -> dict[bool, Boxes]:
    """A scene of which the claim is true and one of which it is false; fewer where all tries came out alike."""
    found: dict[bool, Boxes] = {}
    for _ in range(TRIES):
        boxes = random_scene(rng)
        truth = claim.holds(boxes)
        if truth is not None and truth not in found and owns(ticket, boxes):
            found[truth] = boxes
        if len(found) == 2:
            break
    return found


def owns(ticket: Ticket, boxes: Boxes) -> bool:
    """Whether a scene belongs to the split of a ticket: by its hash, whatever the order of boxes."""
    boxes_text = repr(sorted(as_data(boxes))).encode()
    return (zlib.crc32(boxes_text) % HELD_OUT_SCENES == 0) == (ticket.split == "test")


# ---- what is said of how many boxes -------------------------------------------------------------------------------


def quantified(trait: Trait, box: str, plural: str, rng: np.random.Generator) -> Claim:
    """A trait of some, one, two, all or none of the boxes."""
    text, enough = pick(
        rng,
        (
            (f"There is a {box} with {trait.words}.", lambda n: n >= 1),
            (f"At least one {box} has {trait.words}.", lambda n: n >= 1),
            (f"There is exactly one {box} with {trait.words}.", lambda n: n == 1),
            (f"There are exactly two {plural} with {trait.words}.", lambda n: n == 2),
            (f"There are at least two {plural} with {trait.words}.", lambda n: n >= 2),
            (f"Each {box} has {trait.words}.", lambda n: n == 3),
            (f"No {box} has {trait.words}.", lambda n: n == 0),
        ),
    )

    def holds(boxes: Boxes) -> bool | None:
        found = [trait.holds(box) for box in boxes]
        return None if None in found else enough(found.count(True))

    return Claim(trait.kind, text, holds)


def amount(least: int, most: int, rng: np.random.Generator) -> tuple[str, int, Callable[[int], bool]]:
    """How many, in words, the number itself, and the test of a count."""
    number = int(rng.integers(least, most + 1))
    words, enough = pick(
        rng,
        (
            ("exactly", lambda n: n == number),
            ("at least", lambda n: n >= number),
            ("at most", lambda n: n <= number),
        ),
    )
    return f"{words} {NUMBERS[number]}", number, enough


def counted(number: int, noun: str) -> str:
    """ "block" or "blocks"."""
    return noun if number == 1 else f"{noun}s"


# ---- towers -------------------------------------------------------------------------------------------------------


def tower_claim(rng: np.random.Generator) -> Claim:
    if rng.random() < 0.15:
        return total(Description(colour=pick(rng, tuple(COLOURS)), noun="block"), 4, rng)
    if rng.random() < 0.15:
        return alike(rng)
    return quantified(pick(rng, (height, end, blocks, palette, stacked))(rng), "tower", "towers", rng)


def height(rng: np.random.Generator) -> Trait:
    words, number, enough = amount(1, MAX_BLOCKS, rng)
    return Trait("height", f"{words} {counted(number, 'block')}", lambda box: enough(len(box)))


def end(rng: np.random.Generator) -> Trait:
    colour = pick(rng, tuple(COLOURS))
    place, index = pick(rng, (("at the top", -1), ("at the base", 0)))
    return Trait("end", f"a {colour} block {place}", lambda box: box[index].colour == colour)


def blocks(rng: np.random.Generator) -> Trait:
    colour = pick(rng, tuple(COLOURS))
    words, number, enough = amount(1, 3, rng)
    noun = counted(number, "block")
    return Trait("blocks", f"{words} {colour} {noun}", lambda box: enough(sum(i.colour == colour for i in box)))


def palette(rng: np.random.Generator, noun: str = "blocks") -> Trait:
    """Which colours are in a box, whatever their number."""
    colour = pick(rng, tuple(COLOURS))
    options: tuple[tuple[str, Callable[[set[str]], bool]], ...] = (
        (f"only {colour} {noun}", lambda found: found == {colour}),
        (f"{noun} of only one colour", lambda found: len(found) == 1),
        (f"{noun} of exactly two colours", lambda found: len(found) == 2),
        (f"{noun} of all three colours", lambda found: len(found) == 3),
    )
    words, fits = pick(rng, options)
    return Trait("palette", words, lambda box: fits({item.colour for item in box}))


def stacked(rng: np.random.Generator) -> Trait:
    upper, lower = (pick(rng, tuple(COLOURS)) for _ in range(2))

    def holds(box: Box) -> bool:
        return any((a.colour, b.colour) == (lower, upper) for a, b in zip(box, box[1:], strict=False))

    return Trait("stacked", f"a {upper} block directly on a {lower} block", holds)


def alike(rng: np.random.Generator) -> Claim:
    """Two or three towers that share something; with three towers, three that share it are at least two as well."""
    words, feature = pick(
        rng,
        (
            ("the same height", len),
            ("the same colour at the top", lambda box: box[-1].colour),
            ("the same colour at the base", lambda box: box[0].colour),
        ),
    )
    text, enough = pick(
        rng,
        (
            (f"At least two towers have {words}.", lambda most: most >= 2),
            (f"Exactly two towers have {words}.", lambda most: most == 2),
            (f"All three towers have {words}.", lambda most: most == 3),
        ),
    )

    def holds(boxes: Boxes) -> bool:
        found = [feature(box) for box in boxes]
        return enough(max(found.count(f) for f in found))

    return Claim("alike", text, holds)


# ---- loose items --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Description:
    """Which items are meant; what is None is left open."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    noun: str = "item"

    def fits(self, item: Item) -> bool:
        size = self.size is None or SIZES[self.size] == item.size
        return size and self.colour in (None, item.colour) and self.shape in (None, item.shape)

    def words(self, number: int) -> str:
        return " ".join(w for w in (self.size, self.colour, counted(number, self.shape or self.noun)) if w)


def describe(rng: np.random.Generator) -> Description:
    """Colour or shape or both, seldom a size."""
    colour, shape = pick(rng, ((True, True), (True, False), (False, True)))
    return Description(
        size=pick(rng, tuple(SIZES)) if rng.random() < 0.2 else None,
        colour=pick(rng, tuple(COLOURS)) if colour else None,
        shape=pick(rng, SHAPES) if shape else None,
    )


def loose_claim(rng: np.random.Generator) -> Claim:
    if rng.random() < 0.2:
        return total(describe(rng), 4, rng)
    return quantified(pick(rng, (size, content, items_palette, wall, relation))(rng), "box", "boxes", rng)


def total(which: Description, most: int, rng: np.random.Generator) -> Claim:
    """How many there are in the whole picture."""
    words, number, enough = amount(1, most, rng)
    verb = "is" if number == 1 else "are"
    text = f"There {verb} {words} {which.words(number)} in the picture."
    return Claim("total", text, lambda boxes: enough(sum(which.fits(item) for box in boxes for item in box)))


def size(rng: np.random.Generator) -> Trait:
    words, number, enough = amount(1, 4, rng)
    return Trait("size", f"{words} {counted(number, 'item')}", lambda box: enough(len(box)))


def content(rng: np.random.Generator) -> Trait:
    which = describe(rng)
    words, number, enough = amount(1, 3, rng)
    return Trait("content", f"{words} {which.words(number)}", lambda box: enough(sum(map(which.fits, box))))


def items_palette(rng: np.random.Generator) -> Trait:
    return palette(rng, "items")


def wall(rng: np.random.Generator) -> Trait:
    """An item at a wall, at one of them, or at none."""
    which = describe(rng)
    side = pick(rng, WALLS)
    words, fits = pick(
        rng,
        (
            ("touching a wall", lambda item: bool(item.walls)),
            (f"touching the {side} wall", lambda item: side in item.walls),
            ("not touching any wall", lambda item: not item.walls),
        ),
    )

    def holds(box: Box) -> bool:
        return any(which.fits(item) and fits(item) for item in box)

    return Trait("wall", f"a {which.words(1)} {words}", holds)


RELATIONS: dict[str, Callable[[Item, Item], bool | None]] = {
    "above": lambda a, b: beyond(b.y, a.y, b.size, a.size),
    "below": lambda a, b: beyond(a.y, b.y, a.size, b.size),
    "to the left of": lambda a, b: beyond(b.x, a.x, b.size, a.size),
    "to the right of": lambda a, b: beyond(a.x, b.x, a.size, b.size),
}


def beyond(a: int, b: int, a_size: int, b_size: int) -> bool | None:
    """Whether a span that begins at a lies after one that begins at b: wholly, not even in the middle, or between."""
    if a >= b + b_size:
        return True
    return False if 2 * a + a_size <= 2 * b + b_size else None


def relation(rng: np.random.Generator) -> Trait:
    """One item above, below or beside another; a pair of which that can be doubted leaves the box open."""
    first, second = describe(rng), describe(rng)
    words = pick(rng, tuple(RELATIONS))

    def holds(box: Box) -> bool | None:
        pairs = [(a, b) for a in box for b in box if a is not b and first.fits(a) and second.fits(b)]
        return any_of([RELATIONS[words](a, b) for a, b in pairs])

    return Trait("relation", f"a {first.words(1)} {words} a {second.words(1)}", holds)


def any_of(found: Sequence[bool | None]) -> bool | None:
    """True if one is; None if none is, but one may be."""
    if True in found:
        return True
    return None if None in found else False
