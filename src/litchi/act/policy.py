"""Agents: a model as a policy, that reads what training read, and the random one, that every policy must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from litchi.config import BadInput
from litchi.schema.protocol import Sampler
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Action, Part, Role, Text


class Policy:
    """A sampler as an agent: instruction, frame, action, frame, action, ..., frame, and then it asks for an action.

    This is the order of parts of `Episode.to_sample`. Of long episodes it shows the last `context_frames` observations
    and the actions between them.
    """

    def __init__(
        self, sampler: Sampler, space: str, context_frames: int = 12, params: SamplingParams | None = None
    ) -> None:
        if context_frames < 1:
            raise BadInput(f"context_frames={context_frames}: a policy must see at least 1 frame")
        self.sampler, self.space, self.context_frames = sampler, space, context_frames
        self.params = params or SamplingParams()
        self.begin("")

    def begin(self, task: str) -> None:
        self.instruction: tuple[Part, ...] = (Text(text=task, role=Role.USER),) if task else ()
        self.turns: list[tuple[Part, ...]] = []
        """Each but the last an observation and the action that followed."""

    def act(self, observation: tuple[Part, ...]) -> Action:
        """The next action. Raises BadInput if the sampler gives none."""
        self.turns = [*self.turns, observation][-self.context_frames :]
        completion = self.sampler.complete(self.request())
        action = next((part for part in completion.parts if isinstance(part, Action)), None)
        if action is None:
            raise BadInput(f'the sampler answered want="action" in space {self.space!r} without an action')
        self.turns[-1] = (*observation, action)
        return action

    def request(self) -> Request:
        """What the policy asks now."""
        history = (part for turn in self.turns for part in turn)
        return Request(parts=(*self.instruction, *history), want="action", space=self.space, params=self.params)


class RandomAgent:
    """Uniform over a discrete space; the same seed, the same actions."""

    def __init__(self, space_size: int, seed: int, space: str = "minigrid") -> None:
        self.space_size, self.space = space_size, space
        self.rng = np.random.default_rng(seed)

    def begin(self, task: str) -> None:
        """It does not read."""

    def act(self, observation: tuple[Part, ...]) -> Action:
        return Action.discrete(int(self.rng.integers(self.space_size)), self.space)


class Replay:
    """An agent that takes recorded actions again: with the same seed it lives the same episode."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self.actions = tuple(actions)

    def begin(self, task: str) -> None:
        self.left = iter(self.actions)

    def act(self, observation: tuple[Part, ...]) -> Action:
        """The next recorded action. Raises BadInput when they are used up."""
        action = next(self.left, None)
        if action is None:
            raise BadInput(f"the recording ends after {len(self.actions)} actions, the episode does not")
        return action
