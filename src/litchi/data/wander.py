"""How an agent that learns how a room works spends its time: at random, or by meddling with things."""

from __future__ import annotations

import numpy as np

from litchi.data.words import pick
from litchi.envs.minigrid import ACTIONS, Room
from litchi.envs.scene import INSIDE, STEPS, Scene, Thing

LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE, DONE = range(len(ACTIONS))


def scatter(room: Room, rng: np.random.Generator, *, carrying: float) -> None:
    """Put the agent of a fresh room at a random free cell, with probability `carrying` holding one of its things.

    A level never begins beside a thing, and a short rollout would seldom touch one.
    """
    sim, scene = room.sim, room.scene
    if scene.things and rng.random() < carrying:
        thing = pick(rng, scene.things)
        sim.carrying = sim.grid.get(thing.column, thing.row)
        sim.carrying.cur_pos = np.array([-1, -1])
        sim.grid.set(thing.column, thing.row, None)
    free = [(row, column) for row in INSIDE for column in INSIDE if sim.grid.get(column, row) is None]
    row, column = pick(rng, free)
    sim.agent_pos = (column, row)
    sim.agent_dir = int(rng.integers(4))


def uniform(scene: Scene, rng: np.random.Generator) -> int:
    return int(rng.integers(len(ACTIONS)))


def meddle(scene: Scene, rng: np.random.Generator) -> int:
    """Walk to things and pick up, drop or open them; one action in ten is random."""
    if rng.random() < 0.1:
        return uniform(scene, rng)
    ahead = in_front(scene)
    if isinstance(ahead, Thing):
        return meet(ahead, scene, rng)
    if ahead == "nothing" and scene.carried and rng.random() < 0.35:
        return DROP
    return approach(scene, rng)


def meet(thing: Thing, scene: Scene, rng: np.random.Generator) -> int:
    """What to do with a thing right ahead: mostly pick it up, or open a box."""
    tempting = [PICKUP, TOGGLE, TOGGLE] if thing.kind == "box" else [PICKUP, PICKUP, PICKUP, TOGGLE]
    if scene.carried:
        tempting = [LEFT, RIGHT, LEFT, RIGHT, DROP, PICKUP] + [TOGGLE] * (4 if thing.kind == "box" else 1)
    return pick(rng, tempting)


def approach(scene: Scene, rng: np.random.Generator) -> int:
    """Forward if that leads nearer to the nearest thing (or there is none), otherwise a turn."""
    row, column, direction = scene.agent
    down, right = STEPS[direction]
    if not scene.things:
        return pick(rng, (LEFT, RIGHT, FORWARD))
    nearest = min(scene.things, key=lambda t: abs(t.row - row) + abs(t.column - column))
    rows, columns = nearest.row - row, nearest.column - column
    if rows * down + columns * right > 0:
        return FORWARD
    side = rows * right - columns * down  # positive: the thing is to the agent's right
    return pick(rng, (LEFT, RIGHT)) if side == 0 else (RIGHT if side > 0 else LEFT)


def in_front(scene: Scene) -> Thing | str:
    row, column, direction = scene.agent
    down, right = STEPS[direction]
    return scene.at(row + down, column + right)
