"""The truth of a sentence about three boxes, from its words alone: an oracle that shares no code with the generator."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

NUMBERS = {word: i for i, word in enumerate("no one two three four five six seven".split())}
COLOUR = r"yellow|black|blue"
SHAPE = r"item|block|square|circle|triangle"
SIZES = {"small": 10, "medium": 20, "big": 30}
THING = rf"(?:(small|medium|big) )?(?:({COLOUR}) )?({SHAPE})s?"
MANY = r"(?:(exactly|at least|at most|only) )?(one|two|three|four|five|six|seven)"

FRAMES = (
    (r"there is exactly one (?:tower|box) with (.*)", lambda n: n == 1),
    (r"there are exactly two (?:towers|boxes) with (.*)", lambda n: n == 2),
    (r"there are at least two (?:towers|boxes) with (.*)", lambda n: n >= 2),
    (r"there is a (?:tower|box) with (.*)", lambda n: n >= 1),
    (r"at least one (?:tower|box) has (.*)", lambda n: n >= 1),
    (r"each (?:tower|box) has (.*)", lambda n: n == 3),
    (r"no (?:tower|box) has (.*)", lambda n: n == 0),
)


def truth(sentence: str, boxes: Sequence) -> bool | None:
    """None for a sentence whose words are not known."""
    text = sentence.casefold().rstrip(".")
    if found := re.fullmatch(rf"there (?:is|are) {MANY} {THING} in the picture", text):
        things = [item for box in boxes for item in box]
        return compare(found[1], sum(is_a(item, *found.groups()[2:]) for item in things), NUMBERS[found[2]])
    if found := re.fullmatch(r"(at least two|exactly two|all three) towers have the same (.*)", text):
        return same(found[1], found[2], boxes)
    for pattern, enough in FRAMES:
        if found := re.fullmatch(pattern, text):
            holds = trait(found[1])
            return None if holds is None else enough(sum(map(holds, boxes)))
    return None


def compare(how: str | None, found: int, number: int) -> bool:
    match how:
        case "at least":
            return found >= number
        case "at most":
            return found <= number
    return found == number


def is_a(item, size: str | None, colour: str | None, shape: str) -> bool:
    wanted = (SIZES[size] if size else item.size, colour or item.colour)
    return wanted == (item.size, item.colour) and shape in (item.shape, "item", "block")


def same(how: str, what: str, boxes: Sequence) -> bool:
    values = {
        "height": [len(box) for box in boxes],
        "colour at the top": [min(box, key=lambda i: i.y).colour for box in boxes],
        "colour at the base": [max(box, key=lambda i: i.y).colour for box in boxes],
    }[what]
    different = len(set(values))
    return {"at least two": different < 3, "exactly two": different == 2, "all three": different == 1}[how]


def trait(words: str) -> Callable | None:
    """What a box must have, or None."""
    if found := re.fullmatch(rf"{MANY} {THING}", words):
        return lambda box: compare(found[1], sum(is_a(i, *found.groups()[2:]) for i in box), NUMBERS[found[2]])
    if found := re.fullmatch(rf"only ({COLOUR}) (?:items|blocks)", words):
        return lambda box: all(i.colour == found[1] for i in box)
    if found := re.fullmatch(r"(?:items|blocks) of (only one|exactly two|all three) colours?", words):
        number = {"only one": 1, "exactly two": 2, "all three": 3}[found[1]]
        return lambda box: len({i.colour for i in box}) == number
    if found := re.fullmatch(rf"an? ({COLOUR}) block at the (top|base)", words):
        extreme = min if found[2] == "top" else max
        return lambda box: extreme(box, key=lambda i: i.y).colour == found[1]
    if found := re.fullmatch(rf"an? ({COLOUR}) block directly on an? ({COLOUR}) block", words):
        return lambda box: any((a.colour, b.colour, b.y - a.y) == (*found.groups(), 21) for a in box for b in box)
    if found := re.fullmatch(rf"a {THING} (?:(not )?touching (?:any|a) wall|touching the (\w+) wall)", words):
        *thing, far, side = found.groups()
        return lambda box: any(is_a(i, *thing) and at_wall(i, far is not None, side) for i in box)
    if found := re.fullmatch(rf"a {THING} (above|below|to the left of|to the right of) a {THING}", words):
        first, where, second = found.groups()[:3], found[4], found.groups()[4:]
        return lambda box: any(
            beside(a, b, where) for a in box for b in box if a != b and is_a(a, *first) and is_a(b, *second)
        )
    return None


def at_wall(item, far: bool, side: str | None) -> bool:
    walls = {"left": item.x == 0, "top": item.y == 0}
    walls |= {"right": item.x + item.size == 100, "bottom": item.y + item.size == 100}
    return walls[side] if side else any(walls.values()) != far


def beside(a, b, where: str) -> bool:
    """Wholly on that side."""
    match where:
        case "above":
            return a.y + a.size <= b.y
        case "below":
            return b.y + b.size <= a.y
        case "to the left of":
            return a.x + a.size <= b.x
    return b.x + b.size <= a.x
