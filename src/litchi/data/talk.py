"""Dialogues of five to seven questions about one picture."""

from __future__ import annotations

from functools import cache

import numpy as np

from litchi.data.questions import FOLLOW_UPS, THINKS, Question, book, choose, choose_follow_up, phrase, reply
from litchi.data.ticket import Ticket
from litchi.data.words import pick
from litchi.envs.minigrid import Room
from litchi.envs.scene import INSIDE, STEPS, Scene, Thing, random_scene, render
from litchi.envs.tiles import COLOURS, DIRECTIONS, KINDS
from litchi.schema.sample import Image, Part, Role, Sample, Text

MOST_THOUGHTS = 2
"""Replies that think aloud in a dialogue of the training split: they are long, and a dialogue must fit into a row."""

REAL = 1 / 3
"""The share of pictures that are untouched resets of a real level; the others are arranged to give rare answers."""


@cache
def simulator() -> Room:
    return Room("BabyAI-GoToLocal-v0")


def talk(ticket: Ticket) -> Sample:
    """Picture, question, reply, question, reply, ...; the replies are learned. `meta` holds what they must come to."""
    rng = ticket.rng
    real = rng.random() < REAL
    scene = ticket.real_scene(simulator(), rng) if real else ticket.scene(arranged, rng)
    parts: list[Part] = [Image(pixels=render(scene), role=Role.USER)]
    turns = []
    for question, words, kind in fitting(ticket, scene, rng):
        parts.append(Text(text=words, role=Role.USER))
        parts.append(Text(text=reply(question, scene), role=Role.ASSISTANT, weight=1.0))
        turns.append({"kind": kind, "question": words, "answer": question.answer})
    return Sample(tuple(parts), ticket.key, ticket.source, {"turns": turns, "real": real})


def fitting(ticket: Ticket, scene: Scene, rng: np.random.Generator) -> list[tuple[Question, str, str]]:
    """A dialogue, for training one that thinks aloud no more often than a row of tokens can hold."""
    while True:
        turns = dialogue(scene, rng)
        thoughts = sum(question.kind in THINKS for question, _, _ in turns)
        if ticket.split == "test" or thoughts <= MOST_THOUGHTS:
            return turns


def dialogue(scene: Scene, rng: np.random.Generator) -> list[tuple[Question, str, str]]:
    """(question, words, kind) of each turn; a turn that leans on the one before is of kind "follow-up"."""
    asked: list[Question] = []
    pages = book(scene)
    turns = []
    for _ in range(int(rng.integers(5, 8))):
        leaning = choose_follow_up(pages, rng, asked) if asked and rng.random() < FOLLOW_UPS else None
        if leaning:
            question, words = leaning
        else:
            question = choose(pages, rng, asked)
            words = phrase(question, rng)
        asked.append(question)
        turns.append((question, words, "follow-up" if leaning else question.kind))
    return turns


def arranged(rng: np.random.Generator) -> Scene:
    """A random room with an even number of each kind, often with neighbours and the agent facing something."""
    counts = counts_by_kind(rng)
    names = [(kind, pick(rng, COLOURS)) for kind, number in zip(KINDS, counts, strict=True) for _ in range(number)]
    scene = random_scene(rng, names=names)
    if rng.random() < 0.5:
        scene = with_neighbours(scene, rng)
    draw = rng.random()
    return facing_thing(scene, rng) if draw < 0.5 else facing_wall(scene, rng) if draw < 0.7 else scene


def with_neighbours(scene: Scene, rng: np.random.Generator) -> Scene:
    """One thing moved beside another, if there is room."""
    things = list(scene.things)
    first, second = (int(i) for i in rng.permutation(len(things))[:2]) if len(things) > 1 else (0, 0)
    cell = free_beside(scene, things[first], pick(rng, DIRECTIONS))
    if first != second and cell:
        things[second] = Thing(things[second].kind, things[second].colour, *cell)
    return Scene(tuple(things), scene.agent)


def facing_thing(scene: Scene, rng: np.random.Generator) -> Scene:
    """The agent moved beside a thing, looking at it, if there is room."""
    side = pick(rng, DIRECTIONS)
    cell = free_beside(scene, pick(rng, scene.things), side)
    back = DIRECTIONS[(DIRECTIONS.index(side) + 2) % 4]
    return Scene(scene.things, (*cell, back)) if cell else scene


def facing_wall(scene: Scene, rng: np.random.Generator) -> Scene:
    """The agent moved to the wall, looking at it, if there is room."""
    along, direction = pick(rng, INSIDE), pick(rng, DIRECTIONS)
    edge = {"right": (along, INSIDE[-1]), "down": (INSIDE[-1], along), "left": (along, 1), "up": (1, along)}
    row, column = edge[direction]
    return Scene(scene.things, (row, column, direction)) if scene.at(row, column) == "nothing" else scene


def counts_by_kind(rng: np.random.Generator) -> list[int]:
    """Balls, keys, boxes: each zero to four, one to seven in all."""
    while True:
        counts = [int(n) for n in rng.integers(0, 5, size=3)]
        if 1 <= sum(counts) <= 7:
            return counts


def free_beside(scene: Scene, thing: Thing, side: str) -> tuple[int, int] | None:
    down, right = STEPS[side]
    cell = (thing.row + down, thing.column + right)
    return cell if cell[0] in INSIDE and cell[1] in INSIDE and scene.at(*cell) == "nothing" else None
