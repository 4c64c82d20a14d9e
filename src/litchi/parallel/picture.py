"""A plan as a picture: what fills the memory of each layout, and when the ranks of the best one work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litchi.parallel.cost import Time
from litchi.parallel.memory import PARTS
from litchi.parallel.planner import Plan, Rung
from litchi.record import need

COLOURS = ("#4c78a8", "#9ecae9", "#72b7b2", "#f58518", "#e45756", "#b279a2")
WORKS = {"forward": "#4c78a8", "backward": "#f58518", "input": "#f58518", "weight": "#e45756"}
TIMES = {"compute": "#4c78a8", "exchange": "#e45756", "waiting": "#bab0ac", "optimizer": "#72b7b2"}


def draw(found: Plan, ladder: Sequence[Rung], path: Path, top: int = 12) -> None:
    """Write a PNG or SVG file. Raises BadInput without the extra "board"."""
    need("board", "matplotlib").use("Agg")
    plt: Any = need("board", "matplotlib.pyplot")
    rows = 3 if ladder else 2
    figure, axes = plt.subplots(rows, 1, figsize=(11, 4 * rows), layout="constrained")
    kind = "simulated from published figures" if found.machine.kind == "published" else "from measured figures"
    figure.suptitle(f"{found.machine.name} x {found.ranks}, {kind}")
    draw_memory(axes[0], found, top)
    best = found.choices[0]
    if best.time.rows:
        draw_stages(axes[1], best.time, best.name)
    else:
        draw_steps(axes[1], found, top)
    if ladder:
        draw_ladder(axes[2], ladder)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_memory(axis: Any, found: Plan, top: int) -> None:
    """One stacked bar a layout, and the line that they must stay under."""
    shown = found.choices[:top]
    names = [c.name for c in shown]
    left = [0.0] * len(shown)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        sizes = [getattr(c.memory, part) / 1e9 for c in shown]
        axis.barh(names, sizes, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if found.machine.device == "cuda":
        axis.axvline(found.room / 1e9, color="black", linestyle="--", label="room")
    axis.invert_yaxis()
    axis.set_xlabel("GB on the rank that has most, at its worst moment")
    axis.legend(fontsize=8)


def draw_stages(axis: Any, time: Time, name: str) -> None:
    """A row for each rank of the pipeline."""
    for rank, row in enumerate(time.rows):
        for moment in row:
            wide = moment.stop - moment.begin
            axis.barh(rank, wide, left=moment.begin, color=WORKS[moment.action.work], edgecolor="white", linewidth=0.3)
    axis.set_yticks(range(len(time.rows)), [f"stage rank {rank}" for rank in range(len(time.rows))])
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds of a step of {name}: forward blue, backward orange, weights red, waiting white")


def draw_steps(axis: Any, found: Plan, top: int) -> None:
    """Where the time of a step goes."""
    shown = found.choices[:top]
    left = [0.0] * len(shown)
    for part, colour in TIMES.items():
        seconds = [getattr(c.time, part) for c in shown]
        axis.barh([c.name for c in shown], seconds, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step")
    axis.legend(fontsize=8)


def draw_ladder(axis: Any, ladder: Sequence[Rung]) -> None:
    axis.plot([r.ranks for r in ladder], [100 * r.efficiency for r in ladder], marker="o")
    axis.set_xscale("log")
    axis.set_xlabel("ranks; simulated, not measured")
    axis.set_ylabel("% of the smallest cluster's tokens a rank")
    axis.set_ylim(0, 110)
