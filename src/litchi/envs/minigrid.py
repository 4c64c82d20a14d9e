"""A real simulator behind our two verbs: one room of BabyAI, seen whole from above or as the agent sees it."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from jaxtyping import UInt8
from minigrid.envs.babyai.core import roomgrid_level
from minigrid.utils.baby_ai_bot import BabyAIBot

from litchi.config import BadInput
from litchi.envs.scene import Scene, render
from litchi.envs.tiles import SIDE, TILE
from litchi.schema.episode import Episode, Step
from litchi.schema.sample import Action, Image, Part

SPACE = "minigrid"
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
"""The names of the discrete space, in MiniGrid's order."""

HELD_OUT = 1_000_000_000
"""Worlds with seeds from here on are for tests; training uses only smaller seeds."""

View = Literal["full", "agent"]

roomgrid_level.print = lambda *words: None  # MiniGrid prints every rejected layout


class Room:
    """An `Env`: observations are one 64x64 picture. `full` shows everything; `agent` is MiniGrid's partial view."""

    def __init__(self, env_id: str = "BabyAI-GoToLocal-v0", view: View = "full") -> None:
        try:
            self.sim: Any = gymnasium.make(env_id, disable_env_checker=True).unwrapped
        except (gymnasium.error.Error, ImportError) as error:
            raise BadInput(f"no room {env_id!r}: {error}; choose a single-room BabyAI level") from error
        width, height = getattr(self.sim, "width", 0), getattr(self.sim, "height", 0)
        if (width, height) != (SIDE, SIDE):
            raise BadInput(f"{env_id} is {width}x{height} tiles, not {SIDE}x{SIDE}: choose another level")
        if view not in ("full", "agent"):
            raise BadInput(f"no view {view!r}; choose full or agent")
        self.env_id, self.view = env_id, view
        self.sim.gen_obs = dict  # MiniGrid's symbolic observation is never read and is most of the cost of a step
        self.task = ""

    def reset(self, seed: int) -> tuple[Part, ...]:
        self.sim.reset(seed=seed)
        self.task = self.sim.mission
        return self.observe()

    def step(self, action: Action) -> tuple[tuple[Part, ...], float, bool, bool]:
        reward, terminated, truncated = self.act(action_index(action))
        return self.observe(), reward, terminated, truncated

    def act(self, index: int) -> tuple[float, bool, bool]:
        """A step without drawing what is seen: reward, terminated, truncated."""
        _, reward, terminated, truncated, _ = self.sim.step(index)
        return float(reward), bool(terminated), bool(truncated)

    def observe(self) -> tuple[Part, ...]:
        return (Image(pixels=self.pixels()),)

    def pixels(self) -> UInt8[np.ndarray, "64 64 3"]:
        return render(self.scene) if self.view == "full" else agent_view(self.sim)

    @property
    def scene(self) -> Scene:
        """The exact state, whatever the view."""
        return Scene.of(self.sim)


def agent_view(sim: Any) -> UInt8[np.ndarray, "64 64 3"]:
    """What the agent sees (7x7 tiles, as MiniGrid's RGBImgPartialObsWrapper draws it), padded with black."""
    seen = sim.get_pov_render(TILE)
    edge = SIDE * TILE - seen.shape[0]
    return np.pad(seen, ((0, edge), (0, edge), (0, 0)))


def action_index(action: Action) -> int:
    index = int(action.values[0, 0])
    if action.space != SPACE or not 0 <= index < len(ACTIONS):
        raise BadInput(f"action {index} of space {action.space!r} means nothing here: give 0 to 6 of {SPACE!r}")
    return index


def expert(room: Room) -> BabyAIBot:
    """BabyAI's planner for the current episode of a room; its `replan()` gives the next action index."""
    return BabyAIBot(room.sim)


def demonstrate(env_id: str, seed: int, view: View = "full") -> Episode:
    """What the planner does in a world; the same actions in both views. Look at `success` before learning from it."""
    room = Room(env_id, view)
    seen = room.reset(seed)
    planner = expert(room)
    steps: list[Step] = []
    ended = False
    while not ended:
        choice = planner.replan()
        assert choice is not None  # it has a plan until the episode ends
        action = Action.discrete(int(choice), SPACE)
        after, reward, terminated, truncated = room.step(action)
        steps.append(Step(seen, action, reward, terminated, truncated))
        seen, ended = after, terminated or truncated
    return Episode(tuple(steps), task=room.task, key=f"{env_id}-{seed}", last=seen)
