"""Clips of eight frames, and what the agent did between them."""

from __future__ import annotations

import numpy as np

from litchi.data.talk import simulator
from litchi.data.ticket import Ticket
from litchi.data.wander import meddle, scatter, uniform
from litchi.data.words import pick
from litchi.envs.scene import Scene, render
from litchi.schema.sample import Role, Sample, Text, Video

FRAMES = 8
REQUESTS = (
    "What does the agent do?",
    "What happens in this clip?",
    "List what the agent does, step by step.",
    "Tell me each thing that the agent does.",
)


def watch(ticket: Ticket) -> Sample:
    """Clip, question, seven phrases separated by commas; the answer is learned."""
    rng, room = ticket.rng, simulator()
    room.reset(ticket.world)
    scatter(room, rng, carrying=0.4)
    scenes, answer = [room.scene], []
    for _ in range(FRAMES - 1):
        room.act(lively(scenes[-1], rng))
        scenes.append(room.scene)
        answer.append(happened(*scenes[-2:]))
    parts = (
        Video(frames=np.stack([render(scene) for scene in scenes]), fps=1.0, role=Role.USER),
        Text(text=pick(rng, REQUESTS), role=Role.USER),
        Text(text=", ".join(answer), role=Role.ASSISTANT, weight=1.0),
    )
    return Sample(parts, ticket.key, ticket.source, {"answer": answer, "world": ticket.world})


def lively(scene: Scene, rng: np.random.Generator) -> int:
    """Mostly meddling, at times anything."""
    return meddle(scene, rng) if rng.random() < 0.85 else uniform(scene, rng)


def happened(before: Scene, after: Scene) -> str:
    """The phrase for a change; "wait" where nothing changed, whatever was tried."""
    if before == after:
        return "wait"
    if before.agent[:2] != after.agent[:2]:
        return "move forward"
    if before.agent != after.agent:
        return "turn left" if turned_left(before.agent[2], after.agent[2]) else "turn right"
    if before.carried != after.carried:
        return "pick up" if after.carried else "drop"
    return "open"


def turned_left(before: str, after: str) -> bool:
    return (before, after) in {("right", "up"), ("up", "left"), ("left", "down"), ("down", "right")}
