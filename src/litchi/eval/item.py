"""What an evaluation is made of: an item is asked, its answer becomes a row, and figures are read off the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from litchi.eval.statistics import Interval, bootstrap, mcnemar, swap_test, wilson, wilson_grouped
from litchi.schema.protocol import Sampler
from litchi.schema.sample import Sample

Json = Any
"""What JSON can hold: an answer and its truth are stored whole, so that a row can be scored again without the model."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to ask. `ask` puts it to a sampler and returns the answer in a form that JSON can hold.

    `group` names what the item shares with others (a picture, a rollout), so that intervals know it. `part` keeps apart
    what is counted apart ("" is the headline), `kind` is the category within it.
    """

    key: str
    group: str
    digest: str
    truth: Json
    ask: Callable[[Sampler], Json]
    part: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """The receipt of one item: what was asked (by digest), what was answered, the truth, and the score that follows."""

    task: str
    key: str
    group: str
    part: str
    kind: str
    request: str
    answer: Json
    truth: Json
    score: dict[str, float]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number read off the rows of one part: the sum of score `above` over the sum of score `below`.

    `over` is "all" rows at once, the "mean" of the figures of the kinds, or "each" kind by itself.
    """

    name: str
    above: str
    below: str = "n"
    part: str = ""
    over: Literal["all", "mean", "each"] = "all"
    share: bool = True
    """Whether it lies between 0 and 1, as Wilson's interval takes for granted."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure as measured; `n` counts the rows that had something to get right."""

    name: str
    value: float
    low: float
    high: float
    n: int
    method: str


@dataclass(frozen=True, slots=True)
class Headline:
    """The figure that stands for an ability, and the same figure of a named baseline on the same items."""

    figure: Figure
    baseline: Figure
    baseline_name: str
    note: str = ""


Score = Callable[[str, Json, Json], dict[str, float]]
"""(part, truth, answer) -> numbers; a pure function, so that every row can be scored again."""


@dataclass(frozen=True, slots=True)
class Task:
    """An ability: the samples it is measured on, what is asked about each, how answers score, what is reported."""

    name: str
    samples: Sequence[Sample]
    prompt: Callable[[Sample], Iterable[Item]]
    score: Score
    headline: Headline
    details: tuple[Figure, ...] = ()

    def items(self) -> Iterable[Item]:
        for sample in self.samples:
            yield from self.prompt(sample)


def measure(figure: Figure, rows: Sequence[Row]) -> list[Estimate]:
    """The estimates of a figure: one, or one for each kind; none where no row has anything to get right."""
    rows = [row for row in rows if row.part == figure.part and row.score.get(figure.below, 0) > 0]
    if not rows:
        return []
    if figure.over == "each":
        kinds = sorted({row.kind for row in rows})
        return [one(f"{figure.name}/{kind}", figure, [r for r in rows if r.kind == kind]) for kind in kinds]
    return [one(figure.name, figure, rows)]


def one(name: str, figure: Figure, rows: Sequence[Row]) -> Estimate:
    above, below, strata = columns(figure, rows)
    found = interval(above, below, strata, binary(figure, rows)) if figure.share else bootstrap(above, below, strata)
    return Estimate(name, found.value, found.low, found.high, len(rows), found.method)


def interval(above: np.ndarray, below: np.ndarray, strata: np.ndarray, is_binary: bool) -> Interval:
    """The interval of a share: Wilson for hits and misses, the bootstrap for the rest.

    Resampling what is all right (or all wrong) shows no spread; there the groups count as that many single trials.
    """
    if is_binary and len(np.unique(strata)) == 1:
        return wilson_grouped(above, below)
    found = bootstrap(above, below, strata)
    if found.value not in (0.0, 1.0):
        return found
    ends = wilson(found.value * len(above), len(above))
    return Interval(found.value, ends.low, ends.high, "Wilson, groups")


def p_value(headline: Headline, rows: Sequence[Row]) -> float:
    """That the score and its baseline do not differ, item by item."""
    rows = [row for row in rows if row.part == headline.figure.part]
    return paired(headline.figure, rows, headline.baseline, rows)


def paired(ours: Figure, our_rows: Sequence[Row], theirs: Figure, their_rows: Sequence[Row]) -> float:
    """The p-value of two figures on the same items: exact McNemar, or swaps of whole groups where items share one."""
    (a1, b1, strata), (a2, b2, _) = columns(ours, our_rows), columns(theirs, their_rows)
    single = len(a1) == len(our_rows) and len(np.unique(strata)) == 1
    if single and binary(ours, our_rows) and binary(theirs, their_rows):
        return mcnemar(a1.tolist(), a2.tolist())
    return swap_test((a1, b1), (a2, b2), strata)


def columns(figure: Figure, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(above, below, stratum) of each group, groups in the order of their names."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        total = sums.setdefault((row.kind if figure.over == "mean" else "", row.group), [0.0, 0.0])
        total[0] += row.score.get(figure.above, 0.0)
        total[1] += row.score.get(figure.below, 0.0)
    names = sorted(sums)
    above, below = np.array([sums[name] for name in names]).T
    kinds = sorted({kind for kind, _ in names})
    return above, below, np.array([kinds.index(kind) for kind, _ in names])


def binary(figure: Figure, rows: Sequence[Row]) -> bool:
    pairs = {(row.score.get(figure.above, 0.0), row.score.get(figure.below, 0.0)) for row in rows}
    return pairs <= {(0.0, 1.0), (1.0, 1.0), (0.0, 0.0)}


def figures(task: Task, rows: Sequence[Row]) -> list[Estimate]:
    """Every detail of a task that its rows can tell."""
    return [estimate for figure in task.details for estimate in measure(figure, rows)]


def scored(task: Task, item: Item, answer: Json) -> Row:
    score = task.score(item.part, item.truth, answer)
    return Row(task.name, item.key, item.group, item.part, item.kind, item.digest, answer, item.truth, score)
