"""A world session: one room lived twice under the same actions, in the simulator and in the model's dream.

The dream never sees the simulator again after its first frame, so that what differs is the model's own doing. The
simulator has no undo: a rewind starts it again from its seed and repeats the actions that are kept, and a fork does so
with a simulator of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from anyio import to_thread
from jaxtyping import UInt8

from litchi.config import BadInput
from litchi.schema.protocol import Env
from litchi.schema.request import Completion, Request
from litchi.schema.sample import Action, Image, Part, Role, Text
from litchi.serve.limits import data_url
from litchi.serve.worker import Worker

ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
SPACE = "minigrid"
TILE = 8
TOLERANCE = 24
"""A tile is right if no channel of any pixel is off by more: a codec's rounding passes, another object does not."""

MakeRoom = Callable[[str, int], Env]
Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True, slots=True)
class Moment:
    """A step of both rooms. `real` is None in a session that began from a picture."""

    dream: Pixels
    real: Pixels | None
    action: int | None = None
    """The action that led here; None at the start."""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False


@dataclass
class World:
    """The moments of one session. All verbs raise BadInput for what cannot be done and leave the session as it was."""

    worker: Worker
    context_frames: int
    max_steps: int
    env: Env | None = None
    remake: Callable[[], Env] | None = None
    """Another simulator of the same room, for a fork."""
    seed: int = 0
    task: str = ""
    moments: list[Moment] = field(default_factory=list)

    @classmethod
    async def in_room(cls, worker: Worker, context: int, steps: int, make: MakeRoom, name: str, seed: int) -> World:
        remake = partial(make, name, seed)
        env = await to_thread.run_sync(remake)
        first = frame_of(await to_thread.run_sync(env.reset, seed))
        return cls(worker, context, steps, env, remake, seed, env.task, [Moment(first, first)])

    @classmethod
    def in_picture(cls, worker: Worker, context: int, steps: int, pixels: Pixels) -> World:
        return cls(worker, context, steps, moments=[Moment(pixels, None)])

    async def act(self, index: int) -> None:
        """Step both rooms."""
        if len(self.moments) > self.max_steps:
            raise BadInput(f"a session has at most {self.max_steps} steps; rewind or start again")
        action = Action.discrete(index, SPACE)
        height, width, _ = self.moments[-1].dream.shape
        request = Request(parts=(*self._history(), action), want="frame", space=SPACE, height=height, width=width)
        # The dream first: if the queue is full or the model fails, neither room has moved.
        dream = frame_of((await self.worker.complete(request)).parts)
        self.moments.append(await self._real(action, dream))

    async def choose(self, instruction: str) -> int:
        """The action that the model takes for `instruction`, or for the task of the room, seeing only its dream."""
        task = instruction or self.task
        if not task:
            raise BadInput("this world has no task; say what to do in 'instruction'")
        parts = (Text(text=task, role=Role.USER), *self._history())
        answer = await self.worker.complete(Request(parts=parts, want="action", space=SPACE))
        return action_of(answer)

    async def rewind(self, step: int) -> None:
        """Back to the moment `step`; later ones are forgotten."""
        kept = self._until(step)
        if self.env is not None:
            await to_thread.run_sync(replay, self.env, self.seed, kept)
        del self.moments[step + 1 :]

    async def fork(self, step: int) -> World:
        """A session of its own, whose past is this one's up to the moment `step`; neither knows of the other."""
        kept, env = self._until(step), None
        if self.remake is not None:
            env = await to_thread.run_sync(self.remake)
            await to_thread.run_sync(replay, env, self.seed, kept)
        return replace(self, env=env, moments=self.moments[: step + 1])

    def frame(self, ms: float) -> dict[str, Any]:
        """The message that shows the present moment. `ms` is the time it took to make."""
        now, before = self.moments[-1], self.moments[max(0, len(self.moments) - 2)]
        wrong = [] if now.real is None else tiles_that_differ(now.dream, now.real)
        return {
            "type": "frame",
            "step": len(self.moments) - 1,
            "action": None if now.action is None else ACTIONS[now.action],
            "dream": data_url(now.dream),
            "real": None if now.real is None else data_url(now.real),
            "same": now.real is not None and not wrong,
            "wrong_tiles": wrong,
            "changed_tiles": tiles_that_differ(now.dream, before.dream),
            "diverged_at": self._diverged_at(),
            "reward": now.reward,
            "terminated": now.terminated,
            "truncated": now.truncated,
            "task": self.task,
            "ms": round(ms, 1),
        }

    def _until(self, step: int) -> list[Action]:
        """The actions that led to a moment. Raises BadInput for one that has not been."""
        if not 0 <= step < len(self.moments):
            raise BadInput(f"step must be from 0 to {len(self.moments) - 1}, got {step}")
        return [Action.discrete(m.action, SPACE) for m in self.moments[1 : step + 1] if m.action is not None]

    def _history(self) -> tuple[Part, ...]:
        """The last dreamed frames with the actions between them, beginning and ending with a frame."""
        recent = self.moments[-self.context_frames :]
        parts: list[Part] = [Image(pixels=recent[0].dream)]
        for moment in recent[1:]:
            assert moment.action is not None
            parts += [Action.discrete(moment.action, SPACE), Image(pixels=moment.dream)]
        return tuple(parts)

    async def _real(self, action: Action, dream: Pixels) -> Moment:
        index = int(action.values[0, 0])
        if self.env is None:
            return Moment(dream, None, index)
        seen, reward, terminated, truncated = await to_thread.run_sync(self.env.step, action)
        return Moment(dream, frame_of(seen), index, reward, terminated, truncated)

    def _diverged_at(self) -> int | None:
        for step, moment in enumerate(self.moments):
            if moment.real is not None and tiles_that_differ(moment.dream, moment.real):
                return step
        return None


def replay(env: Env, seed: int, actions: list[Action]) -> None:
    env.reset(seed)
    for action in actions:
        env.step(action)


def frame_of(parts: tuple[Part, ...]) -> Pixels:
    """The picture in an observation or an answer. Raises ValueError if there is none."""
    for part in parts:
        if isinstance(part, Image):
            return part.pixels
    raise ValueError("no frame among the parts of an observation or answer")


def action_of(answer: Completion) -> int:
    """The index of a discrete action, as the model chose it."""
    for part in answer.parts:
        if isinstance(part, Action):
            return min(max(int(part.values[0, 0]), 0), len(ACTIONS) - 1)
    raise ValueError("no action among the parts of an answer")


def tiles_that_differ(a: Pixels, b: Pixels) -> list[list[int]]:
    """[row, column] of every tile where two pictures of one size differ by more than `TOLERANCE`."""
    if a.shape != b.shape:
        raise ValueError(f"frames differ in size: {a.shape} and {b.shape}")
    off = np.abs(a.astype(np.int16) - b).max(axis=2)
    rows, columns = off.shape[0] // TILE, off.shape[1] // TILE
    tiles = off[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE).max(axis=(1, 3))
    return [[int(r), int(c)] for r, c in np.argwhere(tiles > TOLERANCE)]
