"""Name: a picture, a question, and one right answer in a few words, beside a guesser who never looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from litchi.eval.item import Figure, Headline, Item, Json, Task
from litchi.eval.receipt import question, said, shown
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Sample

PARAMS = SamplingParams(max_tokens=16)


def name(title: str, samples: Sequence[Sample], guess: Callable[[Sample], str], guesser: str, note: str = "") -> Task:
    """The task `title`. Samples are dialogues of one turn: `meta["turns"]` is [{kind, question, answer}].

    `guess` answers a sample without a look at its picture; `guesser` says in words how.
    """
    right, guessed = Figure("answers right", "right"), Figure("answers right", "guess_right")
    details = (Figure("answers right", "right", over="each"), Figure("guesses right", "guess_right", over="each"))

    def prompt(sample: Sample) -> Iterator[Item]:
        asked = tuple(takewhile(lambda part: part.role is not Role.ASSISTANT, shown(sample.parts)))
        [turn] = sample.meta["turns"]
        truth = {"answer": turn["answer"], "guess": guess(sample)}
        yield question(sample, Request(parts=asked, params=PARAMS), truth, said, kind=turn["kind"])

    return Task(title, samples, prompt, score, Headline(right, guessed, guesser, note), details)


def score(part: str, truth: Json, answer: Json) -> dict[str, float]:
    return {
        "n": 1.0,
        "right": float(plain(answer) == plain(truth["answer"])),
        "guess_right": float(plain(truth["guess"]) == plain(truth["answer"])),
    }


def plain(text: str) -> str:
    """Case, spacing and a final stop do not matter."""
    return " ".join(text.casefold().split()).rstrip(".")
