"""The board: one row an ability, with its interval, its baseline and its bar; as a table and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from litchi.eval.item import Estimate
from litchi.record import table

COLUMNS = ("ability", "measure", "score", "95 % interval", "n", "baseline", "its score", "p (Holm)", "bar")


@dataclass(frozen=True, slots=True)
class Row:
    """One ability. `p` is that the score and its baseline do not differ, corrected for the rows of this board."""

    ability: str
    score: Estimate
    baseline: Estimate
    p: float
    bar: float | None
    note: str
    details: tuple[Estimate, ...]
    digest: str
    """SHA-256 of the file of item rows."""

    @property
    def passed(self) -> bool | None:
        """Whether the score reaches the bar; None without one."""
        return None if self.bar is None else self.score.value >= self.bar


@dataclass(frozen=True, slots=True)
class Board:
    """What one model scored in one evaluation; `config` is the EvalConfig as JSON text."""

    model: str
    config: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed is not False for row in self.rows)


def show(board: Board) -> None:
    """Print the table, and under it what must be known to read it."""
    table(board.model or "board", COLUMNS, cells(board))
    for row in board.rows:
        if row.note:
            print(f"{row.ability}: {row.note}")


def show_details(board: Board) -> None:
    """Print every other figure of every ability."""
    columns = ("ability", "figure", "value", "95 % interval", "n", "method")
    table("details", columns, [(row.ability, d.name, *figures(d)) for row in board.rows for d in row.details])


def markdown(board: Board) -> str:
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *cells(board)]
    notes = [f"- {row.ability}: {row.note}" for row in board.rows if row.note]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *notes]) + "\n"


def cells(board: Board) -> list[tuple[str, ...]]:
    return [line(row) for row in board.rows]


def line(row: Row) -> tuple[str, ...]:
    score, between, n, _ = figures(row.score)
    mark = {None: "-", True: f"{row.bar}, reached", False: f"{row.bar}, missed"}[row.passed]
    p = "< 0.001" if row.p < 0.001 else f"{row.p:.3f}"
    baseline = (row.baseline.name, f"{row.baseline.value:.3f}")
    return (row.ability, row.score.name, score, between, n, *baseline, p, mark)


def figures(estimate: Estimate) -> Sequence[str]:
    between = f"{estimate.low:.3f} to {estimate.high:.3f}"
    return f"{estimate.value:.3f}", between, str(estimate.n), estimate.method
