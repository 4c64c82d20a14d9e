"""Verifying a board: every score follows from its answer, every figure from the rows, and nothing was touched since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from litchi.config import BadInput, from_json
from litchi.eval.board import Board, Row
from litchi.eval.item import Task
from litchi.eval.receipt import read_rows
from litchi.eval.run import EvalConfig, make, tally
from litchi.schema.episode import Episode


def load(folder: Path) -> Board:
    """The board of a folder. Raises BadInput if there is none."""
    path = folder / "board.json"
    if not path.exists():
        raise BadInput(f"no board in {folder}: run the evaluation to its end first")
    return from_json(Board, path.read_text(encoding="utf-8"))


def verify(board: Board, folder: Path) -> list[str]:
    """What is wrong with a board, one line a fault; empty if all of it follows from the rows in `folder`.

    It needs neither model nor samples: a row holds its answer and its truth.
    """
    config = from_json(EvalConfig, board.config)
    tasks = [make(name, config, {}, {}, unplayed, unplayed) for name in config.abilities]
    if missing := [task.name for task in tasks if not (folder / f"{task.name}.jsonl").exists()]:
        return [f"{name}: its rows are missing" for name in missing]
    faults = [fault for task in tasks for fault in row_faults(task, folder)]
    derived = {row.ability: row for row in tally(config, board.model, tasks, folder).rows}
    printed = {row.ability: row for row in board.rows}
    if list(derived) != list(printed):
        return [*faults, f"the board has rows {', '.join(printed)}, its config asks for {', '.join(derived)}"]
    return [*faults, *(fault for name, row in printed.items() for fault in figure_faults(row, derived[name]))]


def row_faults(task: Task, folder: Path) -> Iterator[str]:
    for row in read_rows(folder / f"{task.name}.jsonl"):
        if row.task != task.name:
            yield f"{task.name}: {row.key} is a row of {row.task}"
        elif task.score(row.part, row.truth, row.answer) != row.score:
            yield f"{task.name}: the score of {row.key} does not follow from its answer"


def figure_faults(printed: Row, derived: Row) -> Iterator[str]:
    name = printed.ability
    if printed.digest != derived.digest:
        yield f"{name}: the rows changed after the board was made"
    for what in ("score", "baseline", "p", "bar", "note"):
        if getattr(printed, what) != getattr(derived, what):
            yield f"{name}: the board says {what} {getattr(printed, what)}, its rows give {getattr(derived, what)}"
    for one in sorted(set(printed.details) ^ set(derived.details), key=lambda estimate: estimate.name):
        side = "the board says" if one in printed.details else "its rows give"
        yield f"{name}: {side} {one}"


def unplayed(seed: int) -> Episode:
    raise AssertionError("verifying plays nothing")
