"""An evaluation goes on where it stopped, says the same whatever happened, and its board follows from its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from litchi.config import BadInput, from_json, to_json
from litchi.envs.minigrid import demonstrate
from litchi.eval.board import Board, markdown
from litchi.eval.compare import compare, show
from litchi.eval.run import ABILITIES, Bars, EvalConfig, run
from litchi.eval.verify import load, verify
from litchi.schema.episode import Episode
from litchi.schema.request import Completion, Request
from litchi.schema.sample import Sample
from tests.eval.samplers import Oracle, Quiet, samples

CONFIG = EvalConfig(talk=2, describe=3, draw=12, foresee=1, watch=3, act=3, drift_steps=5, free_dialogues=1)


@cache
def test_samples() -> dict[str, list[Sample]]:
    return {name: samples(name, getattr(CONFIG, name)) for name in ABILITIES if name != "act"}


test_samples.__test__ = False  # type: ignore[attr-defined]


def oracle() -> Oracle:
    return Oracle(sample for found in test_samples().values() for sample in found)


def expert(seed: int) -> Episode:
    return demonstrate("BabyAI-GoToRedBall-v0", seed, "agent")


def idle(seed: int) -> Episode:
    return Episode((), task="", key=f"seed-{seed}")


def evaluate(folder: Path, sampler: Quiet | None = None, config: EvalConfig = CONFIG, model: str = "oracle") -> Board:
    return run(config, sampler or oracle(), test_samples(), expert, idle, folder, model=model)


class Killed(Exception):
    pass


class Mortal(Oracle):
    """Dies at its nth request."""

    def __init__(self, life: int) -> None:
        super().__init__(sample for found in test_samples().values() for sample in found)
        self.life = life

    def complete(self, request: Request) -> Completion:
        if self.asked == self.life:
            raise Killed
        return super().complete(request)


def test_the_oracle_tops_the_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = evaluate(tmp_path)
    assert [row.ability for row in board.rows] == list(ABILITIES)
    assert all(row.score.value == 1 and row.baseline.value < 1 for row in board.rows)
    assert board.passed
    printed = capsys.readouterr().out
    assert all(name in printed for name in ABILITIES)
    assert markdown(board).count("\n|") == 1 + len(ABILITIES)
    assert load(tmp_path) == board == from_json(Board, to_json(board))


def test_a_missed_bar_is_said(tmp_path: Path) -> None:
    board = evaluate(tmp_path, Quiet(), EvalConfig(abilities=("watch",), watch=3, bars=Bars(watch=0.5)))
    assert not board.passed
    assert "0.5, missed" in markdown(board)


@pytest.mark.parametrize("life", [0, 5, 31])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path, life: int) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    entire = oracle()
    expected = evaluate(whole, entire)
    with pytest.raises(Killed):
        evaluate(torn, Mortal(life))
    second = oracle()
    assert evaluate(torn, second) == expected
    # What an unfinished item had asked (a dialogue or a dream asks more than once) is asked again.
    assert entire.asked - life <= second.asked < entire.asked - life + 7
    for path in whole.iterdir():
        assert (torn / path.name).read_bytes() == path.read_bytes()


def test_a_torn_row_is_asked_again(tmp_path: Path) -> None:
    expected = evaluate(tmp_path)
    path = tmp_path / "describe.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again = oracle()
    assert evaluate(tmp_path, again) == expected
    assert again.asked == 1


def test_a_finished_evaluation_asks_nothing(tmp_path: Path) -> None:
    expected = evaluate(tmp_path)
    assert evaluate(tmp_path, Mortal(0)) == expected


def test_bars_may_move_but_questions_may_not(tmp_path: Path) -> None:
    evaluate(tmp_path)
    moved = from_json(EvalConfig, to_json(CONFIG).replace('"talk": null', '"talk": 0.9'))
    assert evaluate(tmp_path, Mortal(0), moved).rows[0].bar == 0.9
    with pytest.raises(BadInput, match="another evaluation"):
        evaluate(tmp_path, model="another")
    with pytest.raises(BadInput, match="another evaluation"):
        evaluate(tmp_path, config=EvalConfig(talk=1))


def test_an_ability_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no test samples of 'talk'"):
        run(CONFIG, Quiet(), {}, expert, idle, tmp_path)


def test_word_baselines_are_fitted_on_the_training_samples(tmp_path: Path) -> None:
    """A baseline that learned the one test film by heart is right; one that learned another is not."""
    [film, other] = samples("watch", 2)
    same = replace(film, meta={"answer": ["wait"] * 7})
    config = EvalConfig(abilities=("watch",), watch=1, baseline_samples=1)
    found = []
    for name, train in (("same", [same, *[other] * 9]), ("other", [other])):
        board = run(config, Quiet(), {"watch": [same]}, expert, idle, tmp_path / name, train={"watch": train})
        found.append(board.rows[0].baseline.value)
    assert found[0] == 1 > found[1]


# ---- verify ----


def test_an_untouched_board_verifies(tmp_path: Path) -> None:
    assert verify(evaluate(tmp_path), tmp_path) == []


def tamper(path: Path, change) -> None:
    """Change the first row of a file by `change`."""
    first, *rest = path.read_text().split("\n")
    row = json.loads(first)
    change(row)
    path.write_text("\n".join([json.dumps(row, ensure_ascii=False), *rest]))


@pytest.mark.parametrize("ability", ABILITIES)
def test_a_better_score_than_the_answer_is_caught(tmp_path: Path, ability: str) -> None:
    board = evaluate(tmp_path, Quiet())
    tamper(tmp_path / f"{ability}.jsonl", lambda row: row["score"].update({name: 1.5 for name in row["score"]}))
    faults = verify(board, tmp_path)
    assert any("does not follow from its answer" in fault for fault in faults)
    assert all(fault.startswith(ability) for fault in faults)


def test_another_answer_is_caught_even_with_its_score(tmp_path: Path) -> None:
    """The rows agree with themselves, but no longer with the board."""
    board = evaluate(tmp_path, Quiet())
    truth = test_samples()["watch"][0].meta["answer"]

    def right(row: dict) -> None:
        row["answer"] = ", ".join(truth)
        row["score"] |= {"right": 1.0, "hits": 7.0, "length": 1.0}

    tamper(tmp_path / "watch.jsonl", right)
    faults = verify(board, tmp_path)
    assert not any("does not follow" in fault for fault in faults)
    assert "watch: the rows changed after the board was made" in faults
    assert any("says score" in fault for fault in faults)


def test_a_prettier_board_is_caught(tmp_path: Path) -> None:
    evaluate(tmp_path, Quiet())
    path = tmp_path / "board.json"
    data = json.loads(path.read_text())
    data["rows"][0]["score"]["value"] = 0.99
    data["rows"][0]["details"][0]["high"] = 0.99
    path.write_text(json.dumps(data))
    assert len(verify(load(tmp_path), tmp_path)) == 3  # the score, and the detail as said and as derived


def test_a_lost_row_is_caught(tmp_path: Path) -> None:
    board = evaluate(tmp_path)
    path = tmp_path / "describe.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert any(fault.startswith("describe") for fault in verify(board, tmp_path))
    path.unlink()
    assert verify(board, tmp_path) == ["describe: its rows are missing"]


def test_there_is_no_board_before_the_end(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        evaluate(tmp_path, Mortal(5))
    with pytest.raises(BadInput, match="no board"):
        load(tmp_path)


# ---- compare ----


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    evaluate(tmp_path / "a", model="a")
    evaluate(tmp_path / "b", model="b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [d.ability for d in found] == list(ABILITIES)
    assert all((d.interval.low, d.interval.high, d.p) == (0, 0, 1) for d in found)


def test_a_difference_is_proven_by_enough_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The oracle against silence on ten films: McNemar's 2 x 0.5^10, with nothing to correct for."""
    config = EvalConfig(abilities=("watch",), watch=10)
    films = {"watch": samples("watch", 10)}
    run(config, Oracle(films["watch"]), films, expert, idle, tmp_path / "oracle")
    run(config, Quiet(), films, expert, idle, tmp_path / "quiet")
    [found] = compare(tmp_path / "oracle", tmp_path / "quiet")
    assert (found.interval.value, found.n, found.p) == (1, 10, pytest.approx(2 * 0.5**10))
    show([found], "oracle", "quiet")
    assert "+1.000" in capsys.readouterr().out


def test_different_items_are_not_compared(tmp_path: Path) -> None:
    for count in (2, 3):
        config = EvalConfig(abilities=("watch",), watch=count)
        run(config, Quiet(), test_samples(), expert, idle, tmp_path / str(count))
    with pytest.raises(BadInput, match="different items"):
        compare(tmp_path / "2", tmp_path / "3")
