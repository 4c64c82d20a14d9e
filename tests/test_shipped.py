"""The checkpoint that the repository ships is what its board says: small, whole, and scored again on a part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from litchi.act.policy import Policy, RandomAgent
from litchi.act.run import play
from litchi.cli import find_checkpoint, load_sampler, run_of
from litchi.config import from_json
from litchi.data.jobs import JOBS
from litchi.data.ticket import Ticket
from litchi.envs.minigrid import ACTIONS, SPACE, Room
from litchi.eval.board import Board
from litchi.eval.run import run as evaluate
from litchi.model.network import count
from litchi.schema.episode import Episode

FOLDER = Path(__file__).parents[1] / "checkpoints" / "tiny"
PART = {"talk": 8, "describe": 12, "draw": 24, "foresee": 3, "watch": 16, "act": 24}
"""Test samples of each ability that are asked again."""

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="no checkpoint is shipped yet: none has reached its bars (docs/log.md)"
)

DOUBT = 1e-3
"""How improbable the new figure may be if the board tells the truth."""


@pytest.fixture(scope="module")
def board() -> Board:
    return from_json(Board, (FOLDER / "board.json").read_text())


def test_it_is_small_and_whole() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    assert count(load_sampler("tiny").model) <= 5_000_000
    assert {"run.json", "meta.json", "board.json"} <= {path.name for path in files}
    assert not any(path.suffix in (".pkl", ".pt", ".pth", ".bin") for path in files)


def test_its_board_has_six_abilities_with_enough_items(board: Board) -> None:
    assert [row.ability for row in board.rows] == ["talk", "describe", "draw", "foresee", "watch", "act"]
    assert all(row.score.n >= 512 and row.baseline.value < row.score.value for row in board.rows)


def test_it_scores_again_what_its_board_says(board: Board, tmp_path: Path) -> None:
    """A fresh evaluation of a part: each share must be probable if the board is right."""
    config = replace(run_of(find_checkpoint("tiny"), []).eval, **PART, free_dialogues=0, drift_steps=0)
    samples = {s: [JOBS[s](Ticket(s, "test", i, 0)) for i in range(n)] for s, n in PART.items() if s != "act"}
    sampler = load_sampler("tiny")
    room = Room("BabyAI-GoToRedBall-v0", "agent")

    def policy(seed: int) -> Episode:
        return play(room, Policy(sampler, SPACE), seed, 64)

    def blind(seed: int) -> Episode:
        return play(room, RandomAgent(len(ACTIONS), seed, SPACE), seed, 64)

    again = evaluate(config, sampler, samples, policy, blind, tmp_path, model="tiny")
    for printed, found in zip(board.rows, again.rows, strict=True):
        hits = round(found.score.value * found.score.n)
        chance = binomtest(hits, found.score.n, min(max(printed.score.value, 0.001), 0.999)).pvalue
        assert chance > DOUBT, f"{found.ability}: the board says {printed.score.value:.3f}, now {found.score.value:.3f}"
