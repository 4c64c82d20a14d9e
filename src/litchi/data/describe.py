"""Pictures with a full description: the agent first, then every thing in reading order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from litchi.data.talk import REAL, arranged, simulator
from litchi.data.ticket import Ticket
from litchi.data.words import a, pick, place
from litchi.envs.scene import SLOT, Scene, Thing, random_name, render
from litchi.schema.sample import Image, Role, Sample, Text

REQUESTS = (
    "Describe the room.",
    "Describe the picture.",
    "What do you see?",
    "Tell me everything in this room.",
    "List what is in the room.",
    "Please describe what the picture shows.",
)
CARRYING = 0.2
"""The share of arranged rooms whose agent carries something; in a fresh real level it never does."""


def describe(ticket: Ticket) -> Sample:
    """Picture, request, caption; the caption is learned. `meta` holds the facts of the caption."""
    rng = ticket.rng
    scene = ticket.real_scene(simulator(), rng) if rng.random() < REAL else ticket.scene(perhaps_carrying, rng)
    parts = (
        Image(pixels=render(scene), role=Role.USER),
        Text(text=pick(rng, REQUESTS), role=Role.USER),
        Text(text=caption(scene), role=Role.ASSISTANT, weight=1.0),
    )
    assert scene.agent is not None
    facts = [[thing.colour, thing.kind, thing.row, thing.column] for thing in scene.things]
    carried = [scene.carried.colour, scene.carried.kind] if scene.carried else None
    return Sample(parts, ticket.key, ticket.source, {"agent": list(scene.agent), "facts": facts, "carried": carried})


def caption(scene: Scene) -> str:
    row, column, direction = scene.agent
    sentences = [f"The agent is at {place(row, column)}, facing {direction}."]
    if scene.carried:
        sentences.append(f"The agent carries {a(scene.carried.name)}.")
    sentences += [f"There is {a(thing.name)} at {place(thing.row, thing.column)}." for thing in scene.things]
    return " ".join(sentences)


def perhaps_carrying(rng: np.random.Generator) -> Scene:
    scene = arranged(rng)
    return replace(scene, carried=Thing(*random_name(rng), *SLOT)) if rng.random() < CARRYING else scene
