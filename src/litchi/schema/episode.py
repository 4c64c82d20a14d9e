"""An episode is what an agent lived through: observations, the actions it took, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from litchi.schema.sample import Action, Part, Role, Sample, Text


@dataclass(frozen=True, slots=True)
class Step:
    """One turn: what was seen, what was done then, and what the environment answered.

    `observation` is what stood before the agent when it chose `action`; `reward`, `terminated` and `truncated` are the
    environment's answer to that action, as in Gymnasium.
    """

    observation: tuple[Part, ...]
    action: Action
    reward: float
    terminated: bool
    truncated: bool


@dataclass(frozen=True, slots=True)
class Episode:
    """Steps in order under one `task` in words; `last` is the observation after the final action (may be empty)."""

    steps: tuple[Step, ...]
    task: str
    key: str
    source: str = "episode"
    last: tuple[Part, ...] = ()

    def to_sample(self, *, learn_actions: bool, learn_frames: bool) -> Sample:
        """Instruction, frame, action, frame, action, ..., frame.

        The first frame is given. With `learn_frames` every later one is drawn (world model); with `learn_actions` every
        action is supervised (policy). An action stands between the frame it was chosen from and the frame it led to.
        """
        parts: list[Part] = [Text(text=self.task, role=Role.USER)] if self.task else []
        for index, step in enumerate(self.steps):
            draw = 1.0 if learn_frames and index > 0 else 0.0
            parts += [replace(part, weight=draw) for part in step.observation]
            parts.append(replace(step.action, weight=1.0 if learn_actions else 0.0))
        parts += [replace(part, weight=1.0 if learn_frames else 0.0) for part in self.last]
        return Sample(tuple(parts), key=self.key, source=self.source)

    @property
    def success(self) -> bool:
        return bool(self.steps) and self.steps[-1].terminated and self.steps[-1].reward > 0
