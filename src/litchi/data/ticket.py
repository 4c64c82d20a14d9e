"""A ticket names one sample before it exists: everything random in the sample follows from it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from litchi.envs.minigrid import HELD_OUT, Room
from litchi.envs.scene import Scene
from litchi.schema.sample import Sample

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

FAMILIES = {"act": 0, "play": 0, "talk": 1, "describe": 2, "draw": 3, "foresee": 4, "watch": 5}
"""Sources of one family live in the same worlds: a played world is the world of the demonstration of that index."""

WORLDS = 100_000_000
"""Worlds of one family in one split."""

HELD_OUT_SCENES = 16
"""One still scene in so many belongs to the test split, by its hash, so that no test picture was ever trained on."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """The sample `index` of a source in a split, under a seed."""

    source: str
    split: Split
    index: int
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.source}-{self.split}-{self.seed}-{self.index:06d}"

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator, the same at every call."""
        source = zlib.crc32(self.source.encode())
        return np.random.default_rng([self.seed, SPLITS.index(self.split), source, self.index])

    @property
    def world(self) -> int:
        """The simulator seed of this sample. The splits and families never share one."""
        return self.first_world + self.index

    @property
    def first_world(self) -> int:
        return SPLITS.index(self.split) * HELD_OUT + FAMILIES[self.source] * WORLDS

    def owns(self, scene: Scene) -> bool:
        """Whether a still scene belongs to this ticket's split."""
        return (zlib.crc32(scene.board.tobytes()) % HELD_OUT_SCENES == 0) == (self.split == "test")

    def scene(self, draw: Callable[[np.random.Generator], Scene], rng: np.random.Generator) -> Scene:
        """Draw scenes until one belongs to this split."""
        while True:
            scene = draw(rng)
            if self.owns(scene):
                return scene

    def real_scene(self, room: Room, rng: np.random.Generator) -> Scene:
        """The first scene of a random world of this family."""

        def draw(rng: np.random.Generator) -> Scene:
            room.reset(self.first_world + int(rng.integers(WORLDS)))
            return room.scene

        return self.scene(draw, rng)


Job = Callable[[Ticket], Sample]
"""A pure function: the same ticket gives the same sample."""
