"""Watch: a film of frames and a question; the answer names what the agent did between them, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from litchi.eval.item import Figure, Headline, Item, Json, Task
from litchi.eval.receipt import question, said, shown
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Sample

PARAMS = SamplingParams(max_tokens=96)

HEADLINE = Headline(
    Figure("whole sequences right", "right"),
    Figure("whole sequences right", "majority_right"),
    "majority phrase throughout",
    "every phrase of the sequence, in order",
)
DETAILS = (
    Figure("phrases right", "hits", "phrases"),
    Figure("phrases right, majority phrase throughout", "majority_hits", "phrases"),
    Figure("phrases right, copy of another film's answer", "copy_hits", "phrases"),
    Figure("whole sequences right, copy of another film's answer", "copy_right"),
    Figure("answers of the right length", "length"),
)


def watch(samples: Sequence[Sample], train: Iterable[Sample] = ()) -> Task:
    """The task. The majority phrase is counted on `train`; without it on the test itself."""
    counts = Counter(phrase for sample in train or samples for phrase in sample.meta["answer"])
    majority = min(counts, key=lambda phrase: (-counts[phrase], phrase), default="")
    others = {s.key: samples[i - 1].meta["answer"] for i, s in enumerate(samples)}

    def prompt(sample: Sample) -> Iterator[Item]:
        asked = tuple(takewhile(lambda part: part.role is not Role.ASSISTANT, shown(sample.parts)))
        truth = {"answer": list(sample.meta["answer"]), "majority": majority, "copy": list(others[sample.key])}
        yield question(sample, Request(parts=asked, want="chat", params=PARAMS), truth, said)

    return Task("watch", samples, prompt, score, HEADLINE, DETAILS)


def score(part: str, truth: Json, answer: Json) -> dict[str, float]:
    true = truth["answer"]
    found = phrases(answer)
    values: dict[str, float] = {"n": 1.0, "phrases": float(len(true)), "length": float(len(found) == len(true))}
    guesses = {"": found, "majority_": [truth["majority"]] * len(true), "copy_": truth["copy"]}
    for name, guess in guesses.items():
        values[f"{name}right"] = float(guess == true)
        values[f"{name}hits"] = float(sum(a == b for a, b in zip(guess, true, strict=False)))
    return values


def phrases(text: str) -> list[str]:
    """The comma-separated phrases of an answer; case, spacing and a final stop do not matter."""
    return [" ".join(phrase.split()) for phrase in text.casefold().strip().rstrip(".").split(",")]
