"""The only interfaces: a codec, a sampler, an environment, an agent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from litchi.schema.request import Completion, Delta, Request
from litchi.schema.sample import Action, Part


class Codec(Protocol):
    """Pictures to vector tokens and back. A token covers `patch` x `patch` pixels."""

    patch: int

    def encode(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Tensor:
        """Rows (N, C) in reading order, N = (h / patch) * (w / patch). Raises BadInput for a size it cannot divide."""
        ...

    def decode(self, rows: Tensor, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """The picture of `height` x `width` pixels that rows (N, C) stand for."""
        ...


class Sampler(Protocol):
    """Anything that answers requests: the reference decoder, an engine, or a server at the other end of HTTP."""

    def stream(self, request: Request) -> Iterator[Delta]: ...

    def complete(self, request: Request) -> Completion: ...


class Env(Protocol):
    """Gymnasium's two verbs on our nouns; a simulator and a world model are both one."""

    task: str
    """The instruction of the current episode, in words."""

    def reset(self, seed: int) -> tuple[Part, ...]:
        """Start an episode and return the first observation."""
        ...

    def step(self, action: Action) -> tuple[tuple[Part, ...], float, bool, bool]:
        """Take an action: the next observation, the reward, terminated, truncated."""
        ...


class Agent(Protocol):
    """Something that acts. It is told when an episode begins and may remember within one."""

    def begin(self, task: str) -> None: ...

    def act(self, observation: tuple[Part, ...]) -> Action: ...
