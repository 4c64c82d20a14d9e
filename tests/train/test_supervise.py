"""A rank that is lost is named, and the run ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from litchi.train.blame import Standing
from litchi.train.supervise import Overdue, Plan, Process, environment, supervise
from tests.train import toy

PLAN = Plan(ranks=3, restarts=2, poll=0.02, settle=30.0)
TWO = replace(PLAN, ranks=2)
STUCK = replace(TWO, settle=0.5)
"""For a rank that does not end by itself, for which nobody would wait longer."""


class Forked:
    """A rank of the toy, as a child of the server."""

    def __init__(self, place: Mapping[str, str], folder: Path, trick: str, steps: int) -> None:
        self.process = toy.SERVER.Process(target=toy.live, args=(dict(place), folder, trick, steps), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, sig: int, /) -> None:
        os.kill(self.pid, sig)

    def kill(self) -> None:
        self.process.kill()


def start(trick: str, steps: int, command: Sequence[str], place: Mapping[str, str], log: Path) -> Process:
    return Forked(place, log.parents[1], trick, steps)


def run(folder: Path, trick: str, plan: Plan = PLAN, steps: int = toy.STEPS) -> int:
    return supervise([], folder, plan, partial(start, trick, steps))


def assert_same_result(folder: Path, size: int = 3, steps: int = toy.STEPS) -> None:
    step, weights = toy.restore(folder)
    assert (step, weights.tolist()) == (steps, toy.expected(size, steps))


@pytest.mark.parametrize(
    ("trick", "plan", "words"),
    [
        ("1 kill 5", TWO, ["rank 1 (", "was killed by SIGKILL", "in step 5"]),
        (
            "2 raise 5",
            PLAN,
            ["rank 2 (", "failed in step 5 at tests/train/toy.py:", "in play", "ValueError: a tile is"],
        ),
        (
            "1 sleep 5",
            PLAN,
            ["rank 1 (", "hangs in step 5", "in read_from_a_dead_disk, for", "ranks 0, 2 wait in all_"],
        ),
        (
            "1 stop 5",
            STUCK,
            ["rank 1 (", "silent for", "in step 5", "rank 0 waits in all_reduce at tests", "stopped by a"],
        ),
        (
            "0 hold 5",
            STUCK,
            ["rank 0 (", "silent for", "in step 5", "rank 1 waits in all_reduce at tests/train/toy.py"],
        ),
    ],
    ids=["killed", "failed", "hung", "stopped", "holding"],
)
def test_a_lost_rank_is_named_and_the_run_is_as_if_it_had_not_been(tmp_path, capfd, trick, plan, words):
    assert run(tmp_path, trick, plan) == 0
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("litchi:")]
    assert all(word in line for word in words) and "restart 1 from the last checkpoint" in line, line
    assert_same_result(tmp_path, plan.ranks)


def test_a_rank_that_skips_a_collective_is_named(tmp_path, capfd):
    """It waits in the next one; the others are in the majority."""
    assert run(tmp_path, "2 skip 5") == 0
    said = capfd.readouterr().err
    assert "rank 2 (" in said and "in barrier at tests/train/toy.py" in said, said
    assert "ranks 0, 1 wait in all_reduce" in said, said
    assert_same_result(tmp_path)


def test_a_rank_that_always_dies_at_one_step_is_given_up(tmp_path, capfd):
    assert run(tmp_path, "0 always-kill 3", replace(TWO, restarts=1)) == 1
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and "given up after 1 restarts, the last 1 without a new step" in said[-1], said


def test_what_no_restart_mends_ends_the_run(tmp_path, capfd):
    assert run(tmp_path, "1 always-refuse 2", TWO) == 2
    assert "restart" not in capfd.readouterr().err


def test_a_far_slower_rank_has_all_restarted_once(tmp_path, capfd):
    assert run(tmp_path, "1 slow 0", replace(TWO, far_slower=3.0), steps=30) == 0
    said = capfd.readouterr().err
    assert "rank 1 (" in said and "is slow" in said and said.count("restart") == 1, said
    assert_same_result(tmp_path, size=2, steps=30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_the_ranks_save_and_stop(tmp_path, capfd, number):
    """The order comes once training goes on, and no later than its end; the same command then goes on from there."""
    over = threading.Event()

    def order() -> None:
        while not (tmp_path / "toy.txt").exists():
            if over.wait(0.01):
                return
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=order)
    thread.start()
    try:
        assert run(tmp_path, "1 obey 4", TWO) == 130
    finally:
        over.set()
        thread.join()
    step, weights = toy.restore(tmp_path)
    assert 2 <= step <= 4 and weights.tolist() == toy.expected(2, step)
    assert signal.getsignal(number) is before
    assert run(tmp_path, "", TWO) == 0
    assert_same_result(tmp_path, size=2)


class Clock:
    """Time as a test lets it pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nobody_is_overdue_for_a_time_that_nobody_saw(monkeypatch):
    """A job that was suspended for an hour, or a machine whose clock was set, has no rank that hangs."""
    monkeypatch.setattr("time.monotonic", clock := Clock())
    overdue, standing = Overdue(PLAN), Standing(1, "host", 1, since=-3600.0, limit=2.0)
    assert not overdue(standing)
    clock.now += 3600.0
    overdue.pace.look()
    assert not overdue(standing)
    for _ in range(200):
        clock.now += 0.1
        overdue.pace.look()
    assert not overdue(standing) and overdue.pace.seconds < standing.limit + PLAN.lag
    for _ in range(20):
        clock.now += 0.1
        overdue.pace.look()
    assert overdue(standing)
    assert not overdue(replace(standing, since=4600.0)), "it goes on"
    assert not overdue(replace(standing, limit=0.0)), "it has not said what its limit is"


def test_ranks_are_told_what_torchrun_tells(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("litchi.train.supervise.cores", lambda: 9)
    place = environment(2, 4, 1234, 1)
    assert place["RANK"] == place["LOCAL_RANK"] == "2" and place["WORLD_SIZE"] == place["LOCAL_WORLD_SIZE"] == "4"
    assert place["MASTER_PORT"] == "1234" and place["TORCHELASTIC_RESTART_COUNT"] == "1"
    assert place["OMP_NUM_THREADS"] == "2"


REAL = """
import json, os, pathlib, sys
rank = os.environ["RANK"]
pathlib.Path(sys.argv[1], "rank" + rank).write_text(json.dumps([os.getsid(0) == os.getpid(), dict(os.environ)]))
print("rank", rank, "lacks a module")
sys.exit(3 if rank == "1" else 0)
"""


def test_real_processes_are_started_and_say_their_last_words(tmp_path, capfd):
    """In sessions of their own, so that the Ctrl-C of a terminal reaches them once."""
    command = [sys.executable, "-c", REAL, str(tmp_path)]
    assert supervise(command, tmp_path, replace(TWO, restarts=0)) == 1
    out, said = capfd.readouterr()
    assert out == "rank 0 lacks a module\n", "rank 0 speaks for all"
    assert said.startswith("litchi: rank 1 ended with code 3 before it began: rank 1 lacks a module ("), said
    for rank in range(2):
        own_session, place = json.loads((tmp_path / f"rank{rank}").read_text())
        assert own_session and (place["RANK"], place["WORLD_SIZE"]) == (str(rank), "2")
