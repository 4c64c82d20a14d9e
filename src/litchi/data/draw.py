"""Requests to draw a room, a plan and a picture that grants them: GenEval's six categories, and exact layouts.

The plan says in the words of a caption where everything will stand. A picture is drawn digit by digit, in any order;
what must fit together (how many, which side, whose colour) is settled before in words, one after another.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from litchi.data.describe import caption
from litchi.data.ticket import Ticket
from litchi.data.words import NUMBERS, PLURALS, a, listing, pick, place
from litchi.envs.scene import Scene, Thing, random_scene, render, satisfies
from litchi.envs.tiles import COLOURS, KINDS
from litchi.schema.sample import Image, Role, Sample, Text

FORMS = (
    "Draw a room with {}.",
    "Please draw a room with {}.",
    "Draw {} in a room.",
    "Show me a room that has {}.",
    "Make a picture of a room with {}.",
    "I would like to see a room with {}.",
)
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
LAYOUTS = 0.4
"""The share of exact layouts: each teaches where every tile goes, where the other prompts leave most of it open."""

Wish = tuple[str, dict]
"""The words for what the room holds, and the same as JSON for `envs.scene.satisfies`."""

Name = tuple[str | None, str]
"""(colour or None, kind)."""


def draw(ticket: Ticket) -> Sample:
    """Request, plan, picture; plan and picture are learned. `meta` holds the category and what `satisfies` checks."""
    rng = ticket.rng
    category = "layout" if rng.random() < LAYOUTS else pick(rng, tuple(CATEGORIES))
    words, wanted, scene = draw_pair(ticket, layout if category == "layout" else CATEGORIES[category], rng)
    parts = (
        Text(text=pick(rng, FORMS).format(words), role=Role.USER),
        Text(text=caption(scene), role=Role.ASSISTANT, weight=1.0),
        Image(pixels=render(scene), role=Role.ASSISTANT, weight=1.0),
    )
    return Sample(parts, ticket.key, ticket.source, {"category": category, "wanted": wanted})


def draw_pair(ticket: Ticket, make: Callable[..., Wish], rng: np.random.Generator) -> tuple[str, dict, Scene]:
    """Words, wish and a room that grants it and belongs to the split of the ticket."""
    while True:
        words, wanted = make(rng)
        scene = grant(wanted, rng)
        if ticket.owns(scene):
            return words, wanted, scene


# ---- wishes ----


def single(rng: np.random.Generator) -> Wish:
    name = (pick(rng, COLOURS) if rng.random() < 0.5 else None, pick(rng, KINDS))
    return a(called(name)), wish([name])


def two(rng: np.random.Generator) -> Wish:
    """Two things of different names, coloured or not."""
    first, second = distinct(rng, 2)
    names = [(c if rng.random() < 0.5 else None, k) for c, k in (first, second)]
    if names[0] == names[1]:
        names = [first, second]
    return listing([a(called(name)) for name in names]), wish(names)


def count(rng: np.random.Generator) -> Wish:
    number = int(rng.integers(2, 5))
    colour, kind = (pick(rng, COLOURS) if rng.random() < 0.7 else None), pick(rng, KINDS)
    plural = PLURALS[kind] if colour is None else f"{colour} {PLURALS[kind]}"
    return f"{NUMBERS[number]} {plural}", wish([(colour, kind)] * number)


def colour(rng: np.random.Generator) -> Wish:
    name = (pick(rng, COLOURS), pick(rng, KINDS))
    return a(called(name)), wish([name])


def position(rng: np.random.Generator) -> Wish:
    first, second = distinct(rng, 2)
    relation = pick(rng, tuple(RELATIONS))
    words = f"{a(called(first))} {RELATIONS[relation]} {a(called(second))}"
    return words, wish([first, second], relation=relation)


def binding(rng: np.random.Generator) -> Wish:
    """Two or three coloured things, whose colours must not be exchanged."""
    names = distinct(rng, int(rng.integers(2, 4)))
    return listing([a(called(name)) for name in names]), wish(names)


def layout(rng: np.random.Generator) -> Wish:
    """Up to six things at named cells, and mostly the agent as well."""
    scene = random_scene(rng)
    names: list[Name] = [(thing.colour, thing.kind) for thing in scene.things]
    cells = [(thing.row, thing.column) for thing in scene.things]
    words = [f"{a(called(name))} at {place(*cell)}" for name, cell in zip(names, cells, strict=True)]
    agent = scene.agent if rng.random() < 0.8 else None
    if agent:
        words.append(f"the agent at {place(*agent[:2])}, facing {agent[2]}")
    return listing(words), wish(names, cells=cells, agent=agent)


CATEGORIES: dict[str, Callable[[np.random.Generator], Wish]] = {
    f.__name__: f for f in (single, two, count, colour, position, binding)
}


def wish(names: list[Name], *, cells=None, relation: str | None = None, agent=None) -> dict:
    cells = cells or [(None, None)] * len(names)
    things = [[*name, *cell] for name, cell in zip(names, cells, strict=True)]
    return {"things": things, "relation": relation, "agent": list(agent) if agent else None}


def called(name: Name) -> str:
    return " ".join(word for word in name if word)


def distinct(rng: np.random.Generator, number: int) -> list[Name]:
    """Different (colour, kind) pairs."""
    order = rng.permutation(len(COLOURS) * len(KINDS))[:number]
    return [(COLOURS[i // len(KINDS)], KINDS[i % len(KINDS)]) for i in order]


# ---- granting them ----


def grant(wanted: dict, rng: np.random.Generator) -> Scene:
    """A random room that satisfies a wish: what was left open is random."""
    while True:
        names = [(kind, colour or pick(rng, COLOURS)) for colour, kind, _, _ in wanted["things"]]
        scene = random_scene(rng, names=names)
        if wanted["things"][0][2] is not None:
            things = tuple(Thing(kind, colour, *cell) for colour, kind, *cell in wanted["things"])
            scene = Scene(things, tuple(wanted["agent"]) if wanted["agent"] else scene.agent)
        if satisfies(scene, wanted) and scene.agent[:2] not in {(t.row, t.column) for t in scene.things}:
            return scene
