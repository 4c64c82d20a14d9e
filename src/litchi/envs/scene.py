"""A scene is the exact state of a room in words: taken from a simulator, drawn as pixels, and read back from pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from jaxtyping import UInt8

from litchi.envs.tiles import (
    AGENT,
    COLOURS,
    DIRECTIONS,
    EMPTY,
    KINDS,
    SIDE,
    THING,
    WALL,
    Board,
    agent_tile,
    draw,
    match,
    thing_of,
    thing_tile,
)

TOLERANCE = 8.0
"""Grey levels by which a tile may differ on average from what it shows; the two closest tiles are 9.75 apart."""

INSIDE = range(1, SIDE - 1)
"""Rows and columns inside the walls, counted from the top left."""

SLOT = (0, 0)
"""The wall tile in which the thing that the agent carries is drawn, so that a frame shows the whole state."""

STEPS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
"""(rows, columns) that one step in a direction moves."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A ball, key or box at a row and column counted from 1; a carried one is at row 0, column 0."""

    kind: str
    colour: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What stands where. Things are kept in reading order; the agent is (row, column, direction)."""

    things: tuple[Thing, ...]
    agent: tuple[int, int, str] | None
    carried: Thing | None = None

    def __post_init__(self) -> None:
        ordered = sorted(self.things, key=lambda thing: (thing.row, thing.column))
        object.__setattr__(self, "things", tuple(ordered))
        if self.carried is not None:
            object.__setattr__(self, "carried", replace(self.carried, row=SLOT[0], column=SLOT[1]))

    @classmethod
    def of(cls, env: Any) -> Scene:
        """The state of a MiniGrid environment of one 8x8 room."""
        env = env.unwrapped
        things = []
        for index, cell in enumerate(env.grid.grid):
            if cell is not None and cell.type in KINDS:
                row, column = divmod(index, env.grid.width)
                things.append(Thing(cell.type, cell.color, row, column))
        column, row = env.agent_pos
        hand = env.carrying
        carried = Thing(hand.type, hand.color, *SLOT) if hand is not None else None
        return cls(tuple(things), (int(row), int(column), DIRECTIONS[env.agent_dir]), carried)

    @property
    def board(self) -> Board:
        board = np.full((SIDE, SIDE), WALL, np.uint8)
        board[1:-1, 1:-1] = EMPTY
        for thing in self.things:
            board[thing.row, thing.column] = thing_tile(thing.kind, thing.colour)
        if self.agent is not None:
            row, column, direction = self.agent
            board[row, column] = agent_tile(direction)
        if self.carried is not None:
            board[SLOT] = thing_tile(self.carried.kind, self.carried.colour)
        return board

    def at(self, row: int, column: int) -> Thing | str:
        """What a cell shows: a thing, "agent", "wall" or "nothing"."""
        if row not in INSIDE or column not in INSIDE:
            return "wall"
        if self.agent is not None and self.agent[:2] == (row, column):
            return "agent"
        return next((t for t in self.things if (t.row, t.column) == (row, column)), "nothing")


# ---- pixels ----


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture of a scene; equals MiniGrid's `grid.render` but for the inventory slot."""
    return draw(scene.board)


def read(pixels: UInt8[np.ndarray, "h w 3"]) -> Scene | None:
    """The scene that a picture shows, or None if any tile resembles nothing or the walls are wrong."""
    if pixels.shape != (64, 64, 3):
        return None
    board, distance = match(pixels)
    return scene_of(board) if float(distance.max()) <= TOLERANCE else None


def scene_of(board: Board) -> Scene | None:
    """The scene of a board; None if the walls are broken or more than one agent is there."""
    slot = int(board[SLOT])
    walls = board == WALL
    walls[SLOT] = slot == WALL or slot >= THING
    edge = np.ones_like(walls)
    edge[1:-1, 1:-1] = False
    if not np.array_equal(walls, edge):
        return None
    things, agents = [], []
    for row in INSIDE:
        for column in INSIDE:
            tile = int(board[row, column])
            if tile >= THING:
                things.append(Thing(*thing_of(tile), row, column))
            elif tile >= AGENT:
                agents.append((row, column, DIRECTIONS[tile - AGENT]))
    if len(agents) > 1:
        return None
    carried = Thing(*thing_of(slot), *SLOT) if slot != WALL else None
    return Scene(tuple(things), agents[0] if agents else None, carried)


# ---- sampling ----


def random_scene(
    rng: np.random.Generator, *, names: Sequence[tuple[str, str]] | None = None, carried: bool = False
) -> Scene:
    """A room with the given (kind, colour) things, or one to six random ones, and the agent, all at random cells."""
    if names is None:
        names = [random_name(rng) for _ in range(int(rng.integers(1, 7)))]
    cells = [(row, column) for row in INSIDE for column in INSIDE]
    chosen = [cells[i] for i in rng.permutation(len(cells))[: len(names) + 1]]
    things = tuple(Thing(*name, *cell) for name, cell in zip(names, chosen, strict=False))
    hand = Thing(*random_name(rng), *SLOT) if carried else None
    return Scene(things, (*chosen[-1], DIRECTIONS[rng.integers(4)]), hand)


def random_name(rng: np.random.Generator) -> tuple[str, str]:
    return KINDS[rng.integers(len(KINDS))], COLOURS[rng.integers(len(COLOURS))]


# ---- checking ----


def satisfies(scene: Scene | None, wanted: Mapping[str, Any]) -> bool:
    """Whether a room holds exactly the wanted things and one agent, and nothing else.

    `wanted` is JSON data: `things` is a list of [colour, kind, row, column] with null for what was left open;
    `relation`, if any, is "left", "right", "above" or "below" and relates the first thing to the second; `agent`, if
    any, is [row, column, direction]. The agent must not carry anything.
    """
    if scene is None or scene.agent is None or scene.carried is not None:
        return False
    if wanted.get("agent") and tuple(wanted["agent"]) != scene.agent:
        return False
    if len(scene.things) != len(wanted["things"]):
        return False
    return any(holds(wanted.get("relation"), order) for order in assignments(scene.things, wanted["things"]))


def assignments(things: tuple[Thing, ...], wanted: Sequence[Sequence]) -> Iterator[tuple[Thing, ...]]:
    """The orders of things in which each fits the wanted one at its place."""
    for order in permutations(things):
        if all(fits(thing, want) for thing, want in zip(order, wanted, strict=True)):
            yield order


def fits(thing: Thing, want: Sequence) -> bool:
    found = (thing.colour, thing.kind, thing.row, thing.column)
    return all(asked is None or asked == given for asked, given in zip(want, found, strict=True))


def holds(relation: str | None, things: Sequence[Thing]) -> bool:
    return relation is None or related(things[0], relation, things[1])


def related(a: Thing, relation: str, b: Thing) -> bool:
    """Whether a is to the left of, right of, above or below b; by columns or rows alone, as people look at a plan."""
    match relation:
        case "left":
            return a.column < b.column
        case "right":
            return a.column > b.column
        case "above":
            return a.row < b.row
        case "below":
            return a.row > b.row
    raise ValueError(f"unknown relation {relation!r}; choose among left, right, above, below")
