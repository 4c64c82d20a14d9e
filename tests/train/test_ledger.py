"""The ledger has one row for every step, and a replay finds what the run found."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from litchi.config import BadInput
from litchi.train.guard import GuardConfig, History, judge
from litchi.train.ledger import Ledger
from litchi.train.replay import Replay, replay
from litchi.train.step import Metrics
from tests.train.runs import CONFIG, MODEL, PROCESSOR, RUN, sample, train

ROTTEN = Metrics({"text": math.nan}, {"text": 1.0}, 2.0, 10)
JUDGED = judge(GuardConfig(), History(), ROTTEN.losses, ROTTEN.gradient_norm)


def test_the_ledger_rewinds_and_spells_what_is_not_finite(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.rows() == []
    ledger.rewind(1)
    for step in (3, 9):
        ledger.write(step, ROTTEN, JUDGED)
    row = {"step": 3, "loss/text": "nan", "gradient_norm": 2.0, "reason": "loss/text is nan"}
    assert ledger.rows() == [row, row | {"step": 9}]
    Ledger(tmp_path).rewind(9)
    assert ledger.rows() == [row]


def test_a_torn_row_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write(3, ROTTEN, JUDGED)
    with ledger.path.open("a") as file:
        file.write('{"step": 4, "rea')
    assert [row["step"] for row in Ledger(tmp_path).rows()] == [3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps; its checkpoints are those of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder


def again(folder: Path, step: int, seed: int = CONFIG.seed) -> Replay:
    return replay(replace(CONFIG, seed=seed), MODEL, PROCESSOR, sample, folder, RUN, step)


@pytest.mark.parametrize(("step", "begun"), [(1, 0), (3, 0), (5, 4), (6, 4)])
def test_a_step_taken_again_finds_the_same_to_the_last_digit(folder: Path, step: int, begun: int) -> None:
    found = again(folder, step)
    assert found.same and found.begun == begun
    assert found.documents and all(source in ("odd", "even") for source, _ in found.documents)


def test_another_run_does_not_find_the_same(folder: Path) -> None:
    assert not again(folder, 2, seed=1).same


def test_a_step_that_was_never_taken_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="its steps are 1 to 6"):
        again(folder, 7)
