"""Describe: a caption is taken apart into facts, and the facts are compared with what stands in the room.

The parser shares no code with whatever wrote the captions: it states on its own what a sentence claims.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile

from litchi.eval.item import Figure, Headline, Item, Json, Task
from litchi.eval.receipt import question, said, shown
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Sample

PARAMS = SamplingParams(max_tokens=320)

HEADLINE = Headline(
    Figure("facts, micro-F1", "overlap", "size"),
    Figure("facts, micro-F1", "other_overlap", "other_size"),
    "facts of another room",
    "facts: every thing with colour and place, the agent with place and direction, what it carries",
)
DETAILS = (
    Figure("precision", "matched", "said"),
    Figure("recall", "matched", "true"),
    Figure("agent right", "agent"),
    Figure("captions with every fact and no other", "complete"),
    Figure("sentences understood", "understood", "sentences"),
)

CLAIMS = {
    "agent": re.compile(r"the agent is (?:at|in) row (\d+),? column (\d+),? (?:and )?facing (\w+)"),
    "carries": re.compile(r"(?:the agent|it) (?:carries|is carrying|holds) an? (\w+) (\w+)"),
    "thing": re.compile(r"there is an? (\w+) (\w+) (?:at|in) row (\d+),? column (\d+)"),
}
"""A claim is a whole sentence; what fits none of these claims nothing."""


def describe(samples: Sequence[Sample]) -> Task:
    others = {s.key: facts_of(samples[i - 1]) for i, s in enumerate(samples)}

    def prompt(sample: Sample) -> Iterator[Item]:
        asked = tuple(takewhile(lambda part: part.role is not Role.ASSISTANT, shown(sample.parts)))
        truth = {"facts": facts_of(sample), "other": others[sample.key]}
        yield question(sample, Request(parts=asked, want="chat", params=PARAMS), truth, said)

    return Task("describe", samples, prompt, score, HEADLINE, DETAILS)


def facts_of(sample: Sample) -> list[str]:
    """The truth as facts in words, from the `meta` of a sample."""
    things = [" ".join(map(str, ("thing", *fact))) for fact in sample.meta["facts"]]
    agent, carried = sample.meta.get("agent"), sample.meta.get("carried")
    return [
        *([" ".join(map(str, ("agent", *agent)))] if agent else []),
        *([" ".join(map(str, ("carries", *carried)))] if carried else []),
        *things,
    ]


def claims(caption: str) -> list[str | None]:
    """What each sentence of a caption claims, None for one that claims nothing we know."""
    sentences = [" ".join(s.split()) for s in re.split(r"[.!\n]+", caption.casefold()) if s.strip()]
    return [claim(sentence) for sentence in sentences]


def claim(sentence: str) -> str | None:
    for name, pattern in CLAIMS.items():
        if found := pattern.fullmatch(sentence):
            return " ".join((name, *found.groups()))
    return None


def score(part: str, truth: Json, answer: Json) -> dict[str, float]:
    """A claim made twice counts twice as said and once as true, so that rambling costs."""
    made = claims(answer)
    found, true, other = (Counter(facts) for facts in (filter(None, made), truth["facts"], truth["other"]))
    matched = (found & true).total()
    agent = [fact for fact in true if fact.startswith("agent")]
    values = {
        "overlap": 2 * matched,
        "size": found.total() + true.total(),
        "other_overlap": 2 * (other & true).total(),
        "other_size": other.total() + true.total(),
        "matched": matched,
        "said": found.total(),
        "true": true.total(),
        "agent": agent == [fact for fact in found if fact.startswith("agent")],
        "complete": found == true,
        "understood": found.total(),
        "sentences": len(made),
        "n": 1,
    }
    return {name: float(value) for name, value in values.items()}
