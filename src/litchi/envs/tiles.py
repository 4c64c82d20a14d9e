"""The 24 tiles that a room is made of, drawn once by MiniGrid's own renderer and recognised by the nearest one."""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import Float, UInt8
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Key, Wall, WorldObj

KINDS = ("ball", "key", "box")
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
DIRECTIONS = ("right", "down", "left", "up")
"""In MiniGrid's order, so that the index is its `agent_dir`."""

TILE = 8
"""Pixels on a side of a tile."""
SIDE = 8
"""Tiles on a side of a room, walls included."""

EMPTY, WALL, AGENT, THING = 0, 1, 2, 6
"""Tile indices: nothing, wall, the agent in four directions from 2, and 3 kinds x 6 colours from 6."""

CLASSES = {"ball": Ball, "key": Key, "box": Box}

Board = UInt8[np.ndarray, "8 8"]
"""A room as tile indices, row by row."""


def agent_tile(direction: str) -> int:
    return AGENT + DIRECTIONS.index(direction)


def thing_tile(kind: str, colour: str) -> int:
    return THING + KINDS.index(kind) * len(COLOURS) + COLOURS.index(colour)


def thing_of(tile: int) -> tuple[str, str]:
    """(kind, colour) of a tile that shows a thing."""
    kind, colour = divmod(int(tile) - THING, len(COLOURS))
    return KINDS[kind], COLOURS[colour]


@cache
def catalogue() -> UInt8[np.ndarray, "24 8 8 3"]:
    """All tiles in the order of their indices."""
    things: list[WorldObj] = [CLASSES[kind](colour) for kind in KINDS for colour in COLOURS]
    bare = [Grid.render_tile(thing, tile_size=TILE) for thing in (None, Wall())]
    agents = [Grid.render_tile(None, agent_dir=direction, tile_size=TILE) for direction in range(4)]
    tiles = bare + agents + [Grid.render_tile(thing, tile_size=TILE) for thing in things]
    return np.stack(tiles).astype(np.uint8)


def draw(board: Board) -> UInt8[np.ndarray, "64 64 3"]:
    tiles = catalogue()[board]
    return tiles.transpose(0, 2, 1, 3, 4).reshape(SIDE * TILE, SIDE * TILE, 3)


def match(pixels: UInt8[np.ndarray, "64 64 3"]) -> tuple[Board, Float[np.ndarray, "8 8"]]:
    """The nearest tile of each cell, and how far it is: the mean absolute difference in grey levels.

    A cell that equals a tile, as nearly all do, is looked up; only the others are compared with every tile.
    """
    cells = pixels.reshape(SIDE, TILE, SIDE, TILE, 3).transpose(0, 2, 1, 3, 4).reshape(SIDE * SIDE, -1)
    known, board, distance = exact(), np.zeros(SIDE * SIDE, np.uint8), np.zeros(SIDE * SIDE)
    for index, cell in enumerate(cells):
        tile = known.get(cell.tobytes())
        board[index], distance[index] = (tile, 0.0) if tile is not None else nearest(cell)
    return board.reshape(SIDE, SIDE), distance.reshape(SIDE, SIDE)


def nearest(cell: UInt8[np.ndarray, "192"]) -> tuple[int, float]:
    """The tile that a cell differs least from, and by how much."""
    tiles = catalogue().reshape(-1, TILE * TILE * 3)
    distance = np.abs(cell.astype(np.int16) - tiles).mean(axis=1)
    return int(distance.argmin()), float(distance.min())


@cache
def exact() -> dict[bytes, int]:
    """Tiles by their bytes."""
    return {tile.tobytes(): index for index, tile in enumerate(catalogue())}
