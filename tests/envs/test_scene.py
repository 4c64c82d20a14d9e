"""A scene survives being drawn and read, and a picture that shows no room is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.envs.scene import INSIDE, Scene, Thing, random_scene, read, render, satisfies
from litchi.envs.tiles import COLOURS, DIRECTIONS, KINDS, catalogue

CELLS = [(row, column) for row in INSIDE for column in INSIDE]


@st.composite
def scenes(draw) -> Scene:
    cells = draw(st.lists(st.sampled_from(CELLS), min_size=1, max_size=12, unique=True))
    name = st.tuples(st.sampled_from(KINDS), st.sampled_from(COLOURS))
    things = tuple(Thing(*draw(name), *cell) for cell in cells[1:])
    agent = (*cells[0], draw(st.sampled_from(DIRECTIONS))) if draw(st.booleans()) else None
    carried = Thing(*draw(name), 0, 0) if draw(st.booleans()) else None
    return Scene(things, agent, carried)


@settings(deadline=None, max_examples=50)
@given(scenes())
def test_reading_undoes_rendering(scene: Scene):
    assert read(render(scene)) == scene


@settings(deadline=None, max_examples=30)
@given(scenes(), st.integers(0, 2**32 - 1))
def test_a_slightly_lossy_picture_is_still_read(scene: Scene, seed: int):
    noise = np.random.default_rng(seed).normal(0, 5, (64, 64, 3))
    lossy = np.clip(render(scene) + noise, 0, 255).astype(np.uint8)
    assert read(lossy) == scene


def test_no_two_tiles_look_alike():
    tiles = catalogue().reshape(24, -1).astype(int)
    apart = np.abs(tiles[:, None] - tiles[None]).mean(axis=2) + 1000 * np.eye(24)
    assert apart.min() == 9.75


def test_a_picture_of_no_room_is_refused():
    rng = np.random.default_rng(0)
    good = render(random_scene(rng))
    broken_wall, blurred, two_agents = good.copy(), good.copy(), good.copy()
    broken_wall[-8:, 8:16] = catalogue()[0]
    blurred[8:16, 8:16] = 128
    two_agents[8:16, 8:16] = two_agents[16:24, 16:24] = catalogue()[2]
    for picture in (broken_wall, blurred, two_agents, rng.integers(0, 256, (64, 64, 3), np.uint8), good[:56, :56]):
        assert read(picture) is None


def wanted(*things, relation=None, agent=None) -> dict:
    return {"things": [list(thing) for thing in things], "relation": relation, "agent": agent}


ROOM = Scene((Thing("ball", "red", 2, 3), Thing("key", "blue", 4, 5)), (1, 1, "up"))
RED_BALL, BLUE_KEY = ("red", "ball", None, None), ("blue", "key", None, None)


def test_the_checker_accepts_what_was_asked_for():
    assert satisfies(ROOM, wanted(RED_BALL, BLUE_KEY))
    assert satisfies(ROOM, wanted((None, "key", None, None), (None, "ball", None, None)))
    assert satisfies(ROOM, wanted(BLUE_KEY, RED_BALL, relation="below"))
    assert satisfies(ROOM, wanted(RED_BALL, BLUE_KEY, relation="left"))
    assert satisfies(ROOM, wanted(("red", "ball", 2, 3), ("blue", "key", 4, 5), agent=[1, 1, "up"]))


@pytest.mark.parametrize(
    ("scene", "wish"),
    [
        (None, wanted(RED_BALL, BLUE_KEY)),
        (Scene(ROOM.things, None), wanted(RED_BALL, BLUE_KEY)),
        (Scene(ROOM.things, ROOM.agent, Thing("box", "red", 0, 0)), wanted(RED_BALL, BLUE_KEY)),
        (Scene((*ROOM.things, Thing("box", "grey", 6, 6)), ROOM.agent), wanted(RED_BALL, BLUE_KEY)),
        (ROOM, wanted(RED_BALL)),
        (ROOM, wanted(RED_BALL, RED_BALL)),
        (ROOM, wanted(("blue", "ball", None, None), ("red", "key", None, None))),
        (ROOM, wanted(RED_BALL, BLUE_KEY, relation="right")),
        (ROOM, wanted(RED_BALL, BLUE_KEY, relation="below")),
        (ROOM, wanted(("red", "ball", 3, 2), ("blue", "key", 4, 5))),
        (ROOM, wanted(RED_BALL, BLUE_KEY, agent=[1, 1, "down"])),
    ],
)
def test_the_checker_rejects_wrong_pictures(scene, wish):
    assert not satisfies(scene, wish)
