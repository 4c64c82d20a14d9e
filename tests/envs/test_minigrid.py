"""A room shows exactly what MiniGrid shows, and the planner's demonstrations succeed."""

import numpy as np
import pytest

from litchi.config import BadInput
from litchi.envs.minigrid import ACTIONS, HELD_OUT, SPACE, Room, demonstrate
from litchi.envs.scene import Scene, Thing, read, render
from litchi.schema.sample import Action, Image

LEVELS = ("BabyAI-GoToLocal-v0", "BabyAI-GoToObj-v0", "BabyAI-GoToRedBall-v0", "BabyAI-PickupLoc-v0")


def pixels(parts) -> np.ndarray:
    (part,) = parts
    assert isinstance(part, Image)
    return part.pixels


@pytest.mark.parametrize("level", LEVELS)
def test_the_full_view_is_minigrids_picture(level: str, capsys):
    room = Room(level)
    for seed in range(20):
        seen = pixels(room.reset(seed))
        assert np.array_equal(seen, room.sim.grid.render(8, room.sim.agent_pos, room.sim.agent_dir))
        assert read(seen) == room.scene
        assert room.task
    assert capsys.readouterr().out == ""


def test_a_picture_shows_the_whole_state_at_every_step():
    room, rng = Room(), np.random.default_rng(0)
    carried = 0
    for seed in range(10):
        room.reset(seed)
        for _ in range(30):
            seen = pixels(room.step(Action.discrete(int(rng.integers(7)), SPACE))[0])
            assert read(seen) == room.scene == Scene.of(room.sim)
            carried += room.scene.carried is not None
    assert carried > 10


def test_a_carried_thing_is_drawn_in_the_corner():
    scene = Scene((), (3, 3, "up"), Thing("key", "green", 5, 5))
    bare = Scene((), (3, 3, "up"))
    different = (render(scene) != render(bare)).any(axis=2)
    assert different[:8, :8].any() and not different[8:].any() and not different[:, 8:].any()


def test_the_agents_view_is_minigrids_wrapper_padded():
    from minigrid.wrappers import RGBImgPartialObsWrapper

    room = Room(view="agent")
    for seed in range(10):
        seen = pixels(room.reset(seed))
        assert np.array_equal(seen[:56, :56], RGBImgPartialObsWrapper(room.sim, tile_size=8).observation({})["image"])
        assert seen.shape == (64, 64, 3) and not seen[56:].any() and not seen[:, 56:].any()


def test_equal_seeds_give_equal_worlds():
    first, second = Room(), Room()
    first.reset(9)
    for seed in (3, HELD_OUT + 3):
        assert np.array_equal(pixels(first.reset(seed)), pixels(second.reset(seed)))
        assert first.task == second.task


@pytest.mark.parametrize("level", LEVELS[:3])
def test_demonstrations_succeed_and_are_the_same_in_both_views(level: str):
    for seed in range(5):
        full, agent = demonstrate(level, seed, "full"), demonstrate(level, seed, "agent")
        assert full.success and full.task == agent.task
        assert [int(s.action.values[0, 0]) for s in full.steps] == [int(s.action.values[0, 0]) for s in agent.steps]
        assert full.last and not any(step.terminated for step in full.steps[:-1])


def test_bad_input_names_the_mend():
    with pytest.raises(BadInput, match="single-room"):
        Room("BabyAI-NoSuchLevel-v0")
    with pytest.raises(BadInput, match="choose another level"):
        Room("BabyAI-GoTo-v0")
    with pytest.raises(BadInput, match="full or agent"):
        Room(view="above")
    room = Room()
    room.reset(0)
    with pytest.raises(BadInput, match="give 0 to 6"):
        room.step(Action.discrete(len(ACTIONS), SPACE))
