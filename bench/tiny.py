"""What the shipped checkpoint scored, as rows, read from its board (`litchi eval tiny --checkpoint tiny`)."""

from __future__ import annotations

import json
from pathlib import Path

from bench.row import append
from litchi.config import from_json
from litchi.eval.board import Board

ROOT = Path(__file__).resolve().parents[1]

MORE = ("changed tiles right", "drift: exact up to step 20", "layout")
"""Figures beside the headlines that a bar or the log names."""


def main() -> None:
    folder = ROOT / "checkpoints" / "tiny"
    board = from_json(Board, (folder / "board.json").read_text())
    for row in board.rows:
        append(
            "tiny",
            f"{row.ability}: {row.score.name}",
            row.score.value,
            "share",
            peer=row.baseline.name,
            peer_figure=row.baseline.value,
        )
        for detail in row.details:
            if detail.name in MORE:
                append("tiny", f"{row.ability}: {detail.name}", detail.value, "share")
    meta = json.loads((folder / "meta.json").read_text())
    append("tiny", "training time", meta["seconds"] / 60, "minutes", peer="bound", peer_figure=100.0)


if __name__ == "__main__":
    main()
