"""What every step found, in steps.jsonl, so that any of them can be taken again and compared.

A batch is a pure function of the run and its step, and so is a step: the ledger holds figures, not data.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from litchi.record import append, drop_torn_line, read, replace_text
from litchi.train.guard import Judgement
from litchi.train.step import Metrics

STEPS = "steps.jsonl"


class Ledger:
    """One row a step; one whose gradient was dropped has a reason. A `silent` one writes nothing."""

    def __init__(self, folder: Path, *, silent: bool = False) -> None:
        self.path, self.silent = folder / STEPS, silent
        folder.mkdir(parents=True, exist_ok=True)
        if not silent:
            drop_torn_line(self.path)

    def write(self, step: int, metrics: Metrics, judgement: Judgement) -> None:
        if self.silent:
            return
        row = {"step": step, **figures(metrics)} | ({"reason": judgement.reason} if judgement.reason else {})
        append(self.path, (json.dumps(row) + "\n").encode())

    def rewind(self, step: int) -> None:
        """Drop the rows of `step` and later: a run that goes on from there writes them again."""
        if not self.silent and self.path.exists():
            kept = [row for row in self.rows() if row["step"] < step]
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        return read(self.path)

    def row(self, step: int) -> dict[str, Any] | None:
        return next((row for row in self.rows() if row["step"] == step), None)


def figures(metrics: Metrics) -> dict[str, float | str]:
    """To all digits: two runs of a step are compared by them."""
    found = {f"loss/{name}": value for name, value in metrics.losses.items()}
    return {name: spelled(value) for name, value in {**found, "gradient_norm": metrics.gradient_norm}.items()}


def spelled(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
