"""Two evaluations of the same items, compared item by item: the difference, its interval, whether it is proven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from litchi.config import BadInput, from_json
from litchi.eval.board import Board
from litchi.eval.item import Row, Task, columns, paired
from litchi.eval.receipt import read_rows
from litchi.eval.run import EvalConfig, make
from litchi.eval.statistics import Interval, holm, paired_bootstrap
from litchi.eval.verify import load, unplayed
from litchi.record import table


@dataclass(frozen=True, slots=True)
class Difference:
    """First minus second in one ability; `p` is corrected for all abilities compared."""

    ability: str
    measure: str
    interval: Interval
    p: float
    n: int


def compare(first: Path, second: Path) -> list[Difference]:
    """The abilities that two folders both measured. Raises BadInput if they were not asked the same items."""
    boards = load(first), load(second)
    tasks = [task for task in tasks_of(boards[0]) if task.name in {row.ability for row in boards[1].rows}]
    sides = [(headline_rows(task, first), headline_rows(task, second)) for task in tasks]
    for task, (ours, theirs) in zip(tasks, sides, strict=True):
        if {row.key: row.request for row in ours} != {row.key: row.request for row in theirs}:
            raise BadInput(f"{first} and {second} asked different items of {task.name}: evaluate both by one config")
    heads = [task.headline.figure for task in tasks]
    chances = holm([paired(head, ours, head, theirs) for head, (ours, theirs) in zip(heads, sides, strict=True)])
    found = []
    for task, head, (ours, theirs), p in zip(tasks, heads, sides, chances, strict=True):
        (a1, b1, strata), (a2, b2, _) = columns(head, ours), columns(head, theirs)
        interval = paired_bootstrap((a1, b1), (a2, b2), strata)
        found.append(Difference(task.name, head.name, interval, p, len(ours)))
    return found


def show(differences: Sequence[Difference], first: str, second: str) -> None:
    """Print the comparison."""
    rows = [
        (d.ability, d.measure, f"{d.interval.value:+.3f}", f"{d.interval.low:+.3f} to {d.interval.high:+.3f}", d.n, d.p)
        for d in differences
    ]
    columns = ("ability", "measure", "difference", "95 % interval", "n", "p (Holm)")
    table(f"{first} - {second}", columns, rows)


def tasks_of(board: Board) -> list[Task]:
    config = from_json(EvalConfig, board.config)
    return [make(name, config, {}, {}, unplayed, unplayed) for name in config.abilities]


def headline_rows(task: Task, folder: Path) -> list[Row]:
    """The rows of the headline in the order of their keys."""
    rows = read_rows(folder / f"{task.name}.jsonl")
    return sorted((row for row in rows if row.part == task.headline.figure.part), key=lambda row: row.key)
