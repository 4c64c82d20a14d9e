"""Three grey boxes with coloured shapes, towers or loose ones, and how they look: the pictures of NLVR, drawn by us.

A. Suhr et al., A Corpus of Natural Language for Visual Reasoning (ACL 2017). Lengths are pixels, from the left and from
the top of a box; sides, sizes, colours and gaps are those of its pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Picture
from PIL import ImageDraw

from litchi.data.words import pick

SIDE = 100
"""Width and height of a box; the picture is 100 high and 400 wide."""
OFFSETS = (0, 150, 300)
"""Where the boxes begin; between them is `BETWEEN`."""
GROUND, BETWEEN = (211, 211, 211), (128, 128, 128)

COLOURS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
SHAPES = ("square", "circle", "triangle")
SIZES = {"small": 10, "medium": 20, "big": 30}
WALLS = ("left", "right", "top", "bottom")

BLOCK, BLOCK_X, BLOCK_STEP = 20, 40, 21
"""A tower is of squares of one size, in the middle, a pixel apart."""
MAX_BLOCKS = 4
MAX_ITEMS = 7


@dataclass(frozen=True, slots=True)
class Item:
    """A shape; x and y are its left and its upper end."""

    x: int
    y: int
    size: int
    shape: str
    colour: str

    @property
    def walls(self) -> tuple[str, ...]:
        """The walls of its box that it touches."""
        gaps = (self.x, SIDE - self.size - self.x, self.y, SIDE - self.size - self.y)
        return tuple(wall for wall, gap in zip(WALLS, gaps, strict=True) if gap <= 0)


Box = tuple[Item, ...]
"""Towers list their blocks from the bottom."""
Boxes = tuple[Box, ...]


# ---- pictures -----------------------------------------------------------------------------------------------------

FINE = 4
"""Pixels of the canvas for one of the picture: what is round or slanted gets smooth edges."""


def draw_boxes(boxes: Boxes) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, 100 x 400."""
    picture = Picture.new("RGB", (OFFSETS[-1] + SIDE, SIDE), BETWEEN)
    for left, box in zip(OFFSETS, boxes, strict=True):
        picture.paste(draw_box(box), (left, 0))
    return np.array(picture)


def draw_box(box: Box) -> Picture.Image:
    canvas = Picture.new("RGB", (SIDE * FINE, SIDE * FINE), GROUND)
    pen = ImageDraw.Draw(canvas)
    for item in box:
        left, top, right, bottom = (v * FINE for v in (item.x, item.y, item.x + item.size, item.y + item.size))
        fill = COLOURS[item.colour]
        match item.shape:
            case "square":
                pen.rectangle((left, top, right - 1, bottom - 1), fill=fill)
            case "circle":
                pen.ellipse((left, top, right - 1, bottom - 1), fill=fill)
            case _:
                pen.polygon(((left, bottom - 1), (right - 1, bottom - 1), ((left + right) // 2, top)), fill=fill)
    return canvas.resize((SIDE, SIDE), Picture.Resampling.BOX)


# ---- scenes -------------------------------------------------------------------------------------------------------

AT_WALL = 0.4
"""How often a loose item stands at a wall, about as often as in NLVR."""
GAP = 3
"""Pixels to a wall that is not touched: whether it is can be seen."""


def random_towers(rng: np.random.Generator) -> Boxes:
    """A tower of one to four blocks in each box."""
    return tuple(tower([pick(rng, tuple(COLOURS)) for _ in range(rng.integers(1, MAX_BLOCKS + 1))]) for _ in OFFSETS)


def tower(colours: Sequence[str]) -> Box:
    """Blocks of these colours, from the bottom."""
    bottom = SIDE - BLOCK
    return tuple(Item(BLOCK_X, bottom - BLOCK_STEP * i, BLOCK, "square", c) for i, c in enumerate(colours))


def random_loose(rng: np.random.Generator) -> Boxes:
    """One to seven items in each box, none over another."""
    return tuple(loose(int(rng.integers(1, MAX_ITEMS + 1)), rng) for _ in OFFSETS)


def loose(number: int, rng: np.random.Generator) -> Box:
    box: list[Item] = []
    while len(box) < number:
        item = random_item(rng)
        if not any(near(item, other) for other in box):
            box.append(item)
    return tuple(box)


def random_item(rng: np.random.Generator) -> Item:
    size = pick(rng, tuple(SIZES.values()))
    place = [int(rng.integers(GAP, SIDE - size - GAP + 1)) for _ in range(2)]
    if rng.random() < AT_WALL:
        place[rng.integers(2)] = pick(rng, (0, SIDE - size))
    return Item(place[0], place[1], size, pick(rng, SHAPES), pick(rng, tuple(COLOURS)))


def near(a: Item, b: Item) -> bool:
    """Whether fewer than one pixel is between the squares that two items stand in."""
    across = max(a.x, b.x) - min(a.x + a.size, b.x + b.size)
    down = max(a.y, b.y) - min(a.y + a.size, b.y + b.size)
    return max(across, down) < 1


# ---- data ---------------------------------------------------------------------------------------------------------


def read_boxes(data: Sequence[Sequence[Mapping]]) -> Boxes:
    """From the `structured_rep` of NLVR. Towers are put in order from the bottom."""
    names = {"#0099ff": "blue"}
    boxes = [
        [Item(i["x_loc"], i["y_loc"], i["size"], i["type"], names.get(i["color"], i["color"].lower())) for i in box]
        for box in data
    ]
    return tuple(tuple(sorted(box, key=lambda item: -item.y)) if are_towers([box]) else tuple(box) for box in boxes)


def are_towers(boxes: Sequence[Sequence[Item]]) -> bool:
    return all((i.shape, i.size, i.x) == ("square", BLOCK, BLOCK_X) for box in boxes for i in box)


def as_data(boxes: Boxes) -> list[list[list]]:
    """[x, y, size, shape, colour] of each item of each box, for the `meta` of a sample."""
    return [[[i.x, i.y, i.size, i.shape, i.colour] for i in box] for box in boxes]
