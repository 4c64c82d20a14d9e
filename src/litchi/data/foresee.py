"""What a room does: rollouts to foresee, and demonstrations to foresee and to imitate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from litchi.data.talk import simulator
from litchi.data.ticket import Ticket
from litchi.data.wander import meddle, scatter, uniform
from litchi.envs.minigrid import SPACE, Room, demonstrate
from litchi.schema.episode import Episode, Step
from litchi.schema.sample import Action, Sample

LENGTH = 5
"""Transitions of a rollout to learn from."""
TEST_LENGTH = 20
"""Transitions of a test rollout: from an untouched level, uniformly random actions."""
PLAYED = 6
"""Steps of a demonstration that are foreseen as well as imitated: two copies of each frame fill a row."""
REMEMBERED = 12
"""Steps of a demonstration that a policy sees at once."""
CARRYING = 0.35
"""The share of rollouts to learn from that begin with a thing in hand."""


def foresee(ticket: Ticket) -> Sample:
    """Frame, action, frame, action, ..., frame; every frame but the first is learned."""
    rng, room = ticket.rng, simulator()
    room.reset(ticket.world)
    policy, length = uniform, TEST_LENGTH
    if ticket.split == "train":
        scatter(room, rng, carrying=CARRYING)
        policy, length = (uniform if rng.random() < 0.5 else meddle), LENGTH
    return sample_of(rollout(room, policy, length, rng), ticket, learn_actions=False, learn_frames=True)


def play(ticket: Ticket) -> Sample:
    """Instruction, frame, action, ..., frame; actions and frames are learned."""
    episode = shown(ticket)
    sample = sample_of(window(episode, PLAYED, ticket.rng), ticket, learn_actions=True, learn_frames=True)
    return replace(sample, meta={**sample.meta, "success": episode.success})


def act(ticket: Ticket) -> Sample:
    """Instruction, view, action, view, action; the actions are learned from what the agent itself sees."""
    episode = demonstrate("BabyAI-GoToRedBall-v0", ticket.world, "agent")
    seen = replace(window(episode, REMEMBERED, ticket.rng), last=())
    sample = sample_of(seen, ticket, learn_actions=True, learn_frames=False)
    return replace(sample, meta={**sample.meta, "success": episode.success})


def window(episode: Episode, length: int, rng: np.random.Generator) -> Episode:
    """At most `length` steps of an episode, from a random one on; short episodes stay whole."""
    first = int(rng.integers(max(0, len(episode.steps) - length) + 1))
    chosen = episode.steps[first : first + length]
    after = episode.steps[first + length].observation if first + length < len(episode.steps) else episode.last
    return replace(episode, steps=chosen, last=after)


def shown(ticket: Ticket) -> Episode:
    """A demonstration seen from above; the levels take turns, the worlds are those of `act`."""
    level = ("BabyAI-GoToRedBall-v0", "BabyAI-GoToLocal-v0")[ticket.index % 2]
    return demonstrate(level, ticket.world, "full")


def rollout(room: Room, policy, length: int, rng: np.random.Generator) -> Episode:
    """Steps from where the room is. It goes on after success: the question is how the room works, not the task."""
    steps = []
    for _ in range(length):
        seen = room.observe()
        action = Action.discrete(policy(room.scene, rng), SPACE)
        _, reward, terminated, truncated = room.step(action)
        steps.append(Step(seen, action, reward, terminated, truncated))
    return Episode(tuple(steps), task="", key="", last=room.observe())


def sample_of(episode: Episode, ticket: Ticket, *, learn_actions: bool, learn_frames: bool) -> Sample:
    sample = episode.to_sample(learn_actions=learn_actions, learn_frames=learn_frames)
    return replace(sample, key=ticket.key, source=ticket.source, meta={"world": ticket.world})
