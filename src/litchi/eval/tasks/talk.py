"""Talk: questions about a picture over several turns, each asked after the true turns before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from litchi.eval.item import Figure, Headline, Item, Json, Task
from litchi.eval.receipt import question, said, shown
from litchi.schema.digest import digest
from litchi.schema.protocol import Sampler
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Sample, Text

PARAMS = SamplingParams(max_tokens=96)

HEADLINE = Headline(
    Figure("answers right", "right"),
    Figure("answers right", "baseline"),
    "majority answer to the question, unseen",
    'every turn after the true history; a whole answer counts, or what follows "So"',
)
DETAILS = (
    Figure("by kind", "right", over="each"),
    Figure("baseline by kind", "baseline", over="each"),
    *(Figure(f"turn {turn}", f"right@{turn}", f"n@{turn}") for turn in range(1, 9)),
    Figure("free-running answers right", "hits", "turns", part="free"),
    Figure("free-running dialogues all right", "right", part="free"),
)


@dataclass(frozen=True, slots=True)
class Majority:
    """The picture-blind guess: the commonest answer to this very question, or else to its kind, or else to all."""

    by_question: dict[str, str]
    by_kind: dict[str, str]
    overall: str

    @classmethod
    def fit(cls, samples: Iterable[Sample]) -> Majority:
        turns = [turn for sample in samples for turn in sample.meta["turns"]]
        return cls(
            commonest((turn["question"], turn["answer"]) for turn in turns),
            commonest((turn["kind"], turn["answer"]) for turn in turns),
            commonest(("", turn["answer"]) for turn in turns).get("", ""),
        )

    def guess(self, kind: str, text: str) -> str:
        return self.by_question.get(text, self.by_kind.get(kind, self.overall))


def talk(samples: Sequence[Sample], train: Iterable[Sample] = (), free_dialogues: int = 64) -> Task:
    """The task. The baseline is fitted on `train`; without it on the test itself, which can only make it stronger."""
    majority = Majority.fit(train or samples)
    free = {sample.key for sample in samples[:free_dialogues]}

    def prompt(sample: Sample) -> Iterator[Item]:
        parts, turns = shown(sample.parts), sample.meta["turns"]
        places = [i for i, part in enumerate(parts) if part.role is Role.ASSISTANT]
        for number, (place, turn) in enumerate(zip(places, turns, strict=True), 1):
            guess = majority.guess(turn["kind"], turn["question"])
            truth = {"turn": number, "question": turn["question"], "answer": turn["answer"], "baseline": guess}
            request = Request(parts=parts[:place], want="chat", params=PARAMS)
            yield question(sample, request, truth, said, name=str(number), kind=turn["kind"])
        if sample.key in free:
            yield dialogue(sample, places)

    return Task("talk", samples, prompt, score, HEADLINE, DETAILS)


def dialogue(sample: Sample, places: Sequence[int]) -> Item:
    """The same questions with the model's own answers as history: what a user meets."""
    parts = shown(sample.parts)

    def ask(sampler: Sampler) -> list[str]:
        own, answers = list(parts), []
        for place in places:
            answers.append(said(sampler.complete(Request(parts=tuple(own[:place]), params=PARAMS))))
            own[place] = Text(text=answers[-1], role=Role.ASSISTANT)
        return answers

    truth = [turn["answer"] for turn in sample.meta["turns"]]
    return Item(f"{sample.key}/free", sample.key, digest(Request(parts=parts, params=PARAMS)), truth, ask, part="free")


def score(part: str, truth: Json, answer: Json) -> dict[str, float]:
    if part == "free":
        hits = sum(concluded(a) == plain(b) for a, b in zip(answer, truth, strict=True))
        return {"right": float(hits == len(truth)), "n": 1.0, "hits": float(hits), "turns": float(len(truth))}
    right = float(concluded(answer) == plain(truth["answer"]))
    baseline = float(plain(truth["baseline"]) == plain(truth["answer"]))
    turn = truth["turn"]
    return {"right": right, "baseline": baseline, "n": 1.0, f"right@{turn}": right, f"n@{turn}": 1.0}


def plain(text: str) -> str:
    """Case, spacing and a final stop do not make an answer wrong; a different word does."""
    return " ".join(text.casefold().split()).rstrip(".")


def concluded(text: str) -> str:
    """What a reply comes to: all of it, or what its last sentence says after "So"."""
    return plain(text).rpartition(". so ")[2]


def commonest(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The most frequent value of each key; of equals the first in the alphabet, so that order cannot matter."""
    counts: dict[str, Counter[str]] = {}
    for key, value in pairs:
        counts.setdefault(key, Counter())[value] += 1
    return {key: min(count, key=lambda v: (-count[v], v)) for key, count in counts.items()}
