"""Questions about a scene with exactly one right answer, asked so that the question alone says little about it.

An answer is drawn first, then a question that has it. What a guesser who never looks can score is measured by
`question_only_baseline`, and belongs next to every accuracy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from litchi.data.words import PLURALS, a, pick, place, the
from litchi.envs.scene import STEPS, Scene, Thing, related
from litchi.envs.tiles import COLOURS, KINDS
from litchi.schema.sample import Sample

RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
SIDES = {"up": "above", "down": "below", "left": "to the left of", "right": "to the right of"}
PRONOUN_SIDES = {"up": "above it", "down": "below it", "left": "to its left", "right": "to its right"}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked (`topic`, in the terms of its kind) and the one right answer."""

    kind: str
    topic: tuple
    answer: str

    @property
    def group(self) -> str:
        """Answers that are balanced against each other; all things are one group."""
        loose = self.kind in ("adjacent", "front") and self.answer.startswith("a ") and self.answer != "a wall"
        return "thing" if loose else self.answer


# ---- what can be asked ----


def relation(scene: Scene) -> list[Question]:
    """Is a left of, right of, above or below b: by columns or rows alone."""
    found = unique(scene)
    pairs = [(x, y) for x in found for y in found if x is not y]
    return [Question("relation", (x, r, y), yes(related(x, r, y))) for x, y in pairs for r in RELATIONS]


def adjacent(scene: Scene) -> list[Question]:
    """What is directly next to a thing on a side."""
    return [Question("adjacent", (t, side), beside(scene, t, side)) for t in unique(scene) for side in STEPS]


def count(scene: Scene) -> list[Question]:
    """How many of a kind, up to four."""
    counts = Counter(thing.kind for thing in scene.things)
    return [Question("count", (kind,), str(counts[kind])) for kind in KINDS if counts[kind] <= 4]


def colour(scene: Scene) -> list[Question]:
    """The colour of the only thing of its kind."""
    counts = Counter(thing.kind for thing in scene.things)
    return [Question("colour", (t.kind,), t.colour) for t in scene.things if counts[t.kind] == 1]


def exists(scene: Scene) -> list[Question]:
    names = {(thing.colour, thing.kind) for thing in scene.things}
    return [Question("exists", (c, k), yes((c, k) in names)) for c in COLOURS for k in KINDS]


def where(scene: Scene) -> list[Question]:
    agent = Question("where", ("the agent",), place(*scene.agent[:2]))
    return [agent, *(Question("where", (the(thing),), place(thing.row, thing.column)) for thing in unique(scene))]


def facing(scene: Scene) -> list[Question]:
    return [Question("facing", (), scene.agent[2])]


def front(scene: Scene) -> list[Question]:
    row, column, direction = scene.agent
    down, right = STEPS[direction]
    return [Question("front", (), named(scene.at(row + down, column + right)))]


def nearest(scene: Scene) -> list[Question]:
    """Which of two things is fewer steps from the agent, rows plus columns; never asked of ties."""
    row, column, _ = scene.agent
    found = [(t, abs(t.row - row) + abs(t.column - column)) for t in unique(scene)]
    pairs = [(x, y) for x in found for y in found if x[1] != y[1]]
    return [Question("nearest", (x, y), the(x if m < n else y)) for (x, m), (y, n) in pairs]


KINDS_OF_QUESTION: dict[str, Callable[[Scene], list[Question]]] = {
    f.__name__: f for f in (relation, adjacent, count, colour, exists, where, facing, front, nearest)
}


def unique(scene: Scene) -> list[Thing]:
    """The things that colour and kind single out."""
    counts = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if counts[thing.name] == 1]


def beside(scene: Scene, thing: Thing, side: str) -> str:
    down, right = STEPS[side]
    return named(scene.at(thing.row + down, thing.column + right))


def named(found: Thing | str) -> str:
    match found:
        case Thing():
            return a(found.name)
        case "nothing":
            return "nothing"
        case "agent":
            return "the agent"
    return a(found)


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


# ---- how it is said ----


def phrase(question: Question, rng: np.random.Generator) -> str:
    """One of several ways to ask; the way is drawn without a look at the answer."""
    match question.kind, question.topic:
        case "relation", (x, r, y):
            x, r, y = the(x), RELATIONS[r], the(y)
            forms = [f"Is {x} {r} {y}?", f"Is {x} {r} {y}, yes or no?", f"Tell me, is {x} {r} {y}?"]
        case "adjacent", (thing, side):
            s, x = SIDES[side], the(thing)
            forms = [f"What is directly {s} {x}?", f"What do you see directly {s} {x}?"]
            forms.append(f"Directly {s} {x}, what is there?")
        case "count", (kind,):
            forms = [f"How many {PLURALS[kind]} are there?", f"How many {PLURALS[kind]} does the room have?"]
            forms.append(f"Count the {PLURALS[kind]}.")
        case "colour", (kind,):
            forms = [f"What colour is the {kind}?", f"Which colour does the {kind} have?"]
            forms.append(f"Tell me the colour of the {kind}.")
        case "exists", (c, k):
            forms = [f"Is there a {c} {k}?", f"Do you see a {c} {k}?", f"Does the room have a {c} {k}?"]
        case "where", (x,):
            forms = [f"Where is {x}?", f"At which row and column is {x}?", f"Tell me where {x} is."]
        case "facing", ():
            forms = ["Which way is the agent facing?", "Which direction does the agent face?"]
            forms.append("Where is the agent looking?")
        case "front", ():
            forms = ["What is in front of the agent?", "What does the agent face?"]
            forms.append("What is right in front of the agent?")
        case "nearest", (x, y):
            x, y = the(x), the(y)
            forms = [f"Which is closer to the agent, {x} or {y}?", f"Which is nearer to the agent, {x} or {y}?"]
        case _:
            raise ValueError(f"no words for a question of kind {question.kind!r} about {question.topic}")
    return pick(rng, forms)


def follow_up(last: Question, new: Question) -> str | None:
    """How `new` is asked right after `last` was answered, leaning on it; None if it cannot."""
    match last.kind, last.topic, new.kind, new.topic:
        case "adjacent", (x, _), "adjacent", (y, side) if x == y:
            return f"And what is directly {PRONOUN_SIDES[side]}?"
        case "where", (_,), "where", (x,):
            return f"What about {x}?"
        case "count", (_,), "count", (kind,):
            return f"And how many {PLURALS[kind]}?"
        case "colour", (_,), "colour", (kind,):
            return f"And the {kind}?"
        case "exists", (_, _), "exists", (c, k):
            return f"And a {c} {k}?"
        case "exists", (c, k), "where", (x,) if last.answer == "yes" and x == f"the {c} {k}":
            return "Where is it?"
        case "nearest", (_, _), "where", (x,) if x == last.answer:
            return "And where is it?"
    return None


# ---- how it is answered ----

THINKS = ("relation", "nearest")
"""Kinds whose answer compares two things: it says where they are, how they compare, and only then what follows."""


def reply(question: Question, scene: Scene) -> str:
    """The answer as it is given. Where two things are compared, the last sentence is the answer: "So yes."."""
    match question.kind, question.topic:
        case "relation", (x, _, y):
            return f"{stands(x)}. {stands(y)}. {lies(x, y)}. So {question.answer}."
        case "nearest", (x, y):
            row, column, _ = scene.agent
            agent = f"The agent is at {place(row, column)}."
            return f"{agent} {stands(x)}, {steps(x, scene)}. {stands(y)}, {steps(y, scene)}. So {question.answer}."
    return question.answer


def stands(thing: Thing) -> str:
    return f"The {thing.name} is at {place(thing.row, thing.column)}"


def lies(x: Thing, y: Thing) -> str:
    """On which sides of y x lies: "It is above and to the left"."""
    vertical = {-1: "above", 0: "", 1: "below"}[int(np.sign(x.row - y.row))]
    across = {-1: "to the left", 0: "", 1: "to the right"}[int(np.sign(x.column - y.column))]
    return "It is " + " and ".join(filter(None, (vertical, across)))


def steps(thing: Thing, scene: Scene) -> str:
    """How far a thing is from the agent, rows and then columns: "1 + 2 = 3 steps away"."""
    rows, columns = abs(thing.row - scene.agent[0]), abs(thing.column - scene.agent[1])
    return f"{rows} + {columns} = {rows + columns} steps away"


# ---- which is asked ----

FOLLOW_UPS = 0.3
"""The share of turns that lean on the one before, where they can."""

WEIGHTS: dict[str, dict[str, float]] = {
    "adjacent": {"thing": 0.64, "a wall": 0.19, "nothing": 0.17, "the agent": 0.56},
    "front": {"thing": 0.72, "a wall": 0.2, "nothing": 0.08},
    "count": {"0": 2.17, "1": 1.86, "2": 1.82, "3": 2.08, "4": 2.63},
}
"""How often a group of answers is tried: the fewer of our scenes have it, the more. Chosen by measuring the outcome."""


TRIED_MORE = ("front", "front", "front", "adjacent", "count")
"""Kinds that are tried more often than others, because their rare answers are often tried in vain."""


Book = Callable[[str], list[Question]]
"""All questions of a kind about one scene."""


def book(scene: Scene) -> Book:
    return cache(lambda kind: KINDS_OF_QUESTION[kind](scene))


def choose(book: Book, rng: np.random.Generator, asked: Sequence[Question]) -> Question:
    """A question of a random kind with a random answer that has not been asked."""
    while True:
        question = balanced(book(pick(rng, (*KINDS_OF_QUESTION, *TRIED_MORE))), rng)
        if question is not None and question not in asked:
            return question


def choose_follow_up(book: Book, rng: np.random.Generator, asked: Sequence[Question]) -> tuple[Question, str] | None:
    """A question that leans on the last one, and its words; None if that came to nothing."""
    kinds = {"exists": ("exists", "where"), "nearest": ("where",)}.get(asked[-1].kind, (asked[-1].kind,))
    question = balanced([q for q in book(pick(rng, kinds)) if q not in asked and follow_up(asked[-1], q)], rng)
    return (question, follow_up(asked[-1], question) or "") if question is not None else None


def balanced(questions: Sequence[Question], rng: np.random.Generator) -> Question | None:
    """One of the questions: first a group of answers, then one of it. None if a rare answer was tried in vain."""
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.group].append(question)
    if not groups:
        return None
    weights = WEIGHTS.get(questions[0].kind)
    if weights is None:
        return pick(rng, groups[pick(rng, sorted(groups))])
    names = sorted(weights)
    name = names[int(rng.choice(len(names), p=[weights[n] / sum(weights.values()) for n in names]))]
    return pick(rng, groups[name]) if name in groups else None


# ---- what a guesser scores ----


def question_only_baseline(train: Iterable[Sample], test: Iterable[Sample]) -> dict[str, float]:
    """Accuracy of each kind for a guesser who sees only the question.

    It answers with the most frequent answer to that exact question in `train`, or else of that kind. Samples are
    dialogues whose `meta["turns"]` lists {kind, question, answer}.
    """
    by_text: dict[str, Counter] = defaultdict(Counter)
    by_kind: dict[str, Counter] = defaultdict(Counter)
    for sample in train:
        for turn in sample.meta["turns"]:
            by_text[turn["question"]][turn["answer"]] += 1
            by_kind[turn["kind"]][turn["answer"]] += 1
    right: Counter = Counter()
    total: Counter = Counter()
    for sample in test:
        for turn in sample.meta["turns"]:
            seen = by_text.get(turn["question"]) or by_kind.get(turn["kind"]) or Counter({"": 1})
            right[turn["kind"]] += seen.most_common(1)[0][0] == turn["answer"]
            total[turn["kind"]] += 1
    return {kind: right[kind] / total[kind] for kind in sorted(total)}
