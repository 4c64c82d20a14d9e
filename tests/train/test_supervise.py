"""A rank that is lost is named, and the run ends as if it had not been."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from litchi.train.supervise import Plan, Process, environment, supervise
from tests.house.sources import ROOT
from tests.train import toy

PLAN = Plan(ranks=3, restarts=2, poll=0.05, settle=1.0, lag=1.0)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.train.toy"])  # torch is imported once for all ranks of all tests


class Forked:
    """A rank of the toy, as a child of the server."""

    def __init__(self, place: Mapping[str, str], folder: Path, trick: str, steps: int) -> None:
        self.process = SERVER.Process(target=live, args=(dict(place), folder, trick, steps), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, sig: int, /) -> None:
        os.kill(self.pid, sig)

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> None:
        self.process.join()


def live(place: dict[str, str], folder: Path, trick: str, steps: int) -> None:
    os.environ.update(place)
    sys.stderr = (folder / f"said_{place['RANK']}").open("a")  # failing is what is tried here
    toy.train(folder, trick, steps)


def start(trick: str, steps: int, command: Sequence[str], place: Mapping[str, str], log: Path) -> Process:
    return Forked(place, log.parents[1], trick, steps)


def run(folder: Path, trick: str, plan: Plan = PLAN, steps: int = toy.STEPS) -> int:
    return supervise([], folder, plan, partial(start, trick, steps))


def assert_same_result(folder: Path, size: int = 3, steps: int = toy.STEPS) -> None:
    step, weights = toy.restore(folder)
    assert (step, weights.tolist()) == (steps, toy.expected(size, steps))


@pytest.mark.parametrize(
    ("trick", "words"),
    [
        ("1 kill 5", ["rank 1 (", "was killed by SIGKILL", "in step 5"]),
        ("2 raise 5", ["rank 2 (", "failed in step 5", "toy.py:", "in play", "ValueError: a tile is torn"]),
        (
            "1 sleep 5",
            ["rank 1 (", "hangs in step 5", "in read_from_a_dead_disk, for", "ranks 0, 2 wait in all_reduce"],
        ),
        (
            "2 stop 5",
            ["rank 2 (", "silent for", "in step 5", "wait in all_reduce at tests", "stopped by a signal"],
        ),
        ("0 hold 5", ["rank 0 (", "silent for", "in step 5", "ranks 1, 2 wait in all_reduce at tests/train/toy.py"]),
    ],
    ids=["killed", "failed", "hung", "stopped", "holding"],
)
def test_a_lost_rank_is_named_and_the_run_is_as_if_it_had_not_been(tmp_path, capfd, trick, words):
    assert run(tmp_path, trick) == 0
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("litchi:")]
    assert all(word in line for word in words) and "restart 1 from the last checkpoint" in line, line
    assert_same_result(tmp_path)


def test_a_rank_that_skips_a_collective_is_named(tmp_path, capfd):
    """It waits in the next one; the others are in the majority."""
    assert run(tmp_path, "2 skip 5") == 0
    said = capfd.readouterr().err
    assert "rank 2 (" in said and "in barrier at tests/train/toy.py" in said, said
    assert "ranks 0, 1 wait in all_reduce" in said, said
    assert_same_result(tmp_path)


def test_a_rank_that_always_dies_at_one_step_is_given_up(tmp_path, capfd):
    assert run(tmp_path, "0 always-kill 3") == 1
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3 and "given up after 2 restarts, the last 2 without a new step" in said[-1], said


def test_what_no_restart_mends_ends_the_run(tmp_path, capfd):
    assert run(tmp_path, "1 always-refuse 2") == 2
    assert "restart" not in capfd.readouterr().err


def test_a_far_slower_rank_has_all_restarted_once(tmp_path, capfd):
    assert run(tmp_path, "1 slow 0", Plan(ranks=2, restarts=2, far_slower=3.0, poll=0.05), steps=30) == 0
    said = capfd.readouterr().err
    assert "rank 1 (" in said and "is slow" in said and said.count("restart") == 1, said
    assert_same_result(tmp_path, size=2, steps=30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_the_ranks_save_and_stop(tmp_path, capfd, number):
    """The order comes once training goes on; the same command then goes on from there."""

    def order() -> None:
        while not (tmp_path / "toy.txt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=order)
    thread.start()
    assert run(tmp_path, "1 slow 0", Plan(ranks=2, far_slower=1e9, poll=0.02)) == 130
    thread.join()
    step, weights = toy.restore(tmp_path)
    assert 2 <= step < toy.STEPS and weights.tolist() == toy.expected(2, step)
    assert signal.getsignal(number) is before
    assert run(tmp_path, "", Plan(ranks=2)) == 0
    assert_same_result(tmp_path, size=2)


def test_ranks_are_told_what_torchrun_tells(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("litchi.train.supervise.cores", lambda: 9)
    place = environment(2, 4, 1234, 1)
    assert place["RANK"] == place["LOCAL_RANK"] == "2" and place["WORLD_SIZE"] == place["LOCAL_WORLD_SIZE"] == "4"
    assert place["MASTER_PORT"] == "1234" and place["TORCHELASTIC_RESTART_COUNT"] == "1"
    assert place["OMP_NUM_THREADS"] == "2"


def test_real_processes_without_a_supervisor_go_away(tmp_path):
    """A supervisor that is killed leaves no rank behind that holds a GPU."""
    code = (
        "import sys; from pathlib import Path; from litchi.train.supervise import *; "
        "supervise([sys.executable, '-m', 'tests.train.toy', sys.argv[1]], Path(sys.argv[1]), Plan(1))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env={**os.environ, "TRICK": "0 sleep 3"}
    )
    path = tmp_path / "ranks" / "rank_00000.json"
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    rank = int(path.read_text().split('"pid": ')[1].split(",")[0])
    process.kill()
    process.wait()
    while alive(rank) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(rank)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
