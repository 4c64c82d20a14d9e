"""Whoever does not stand where the others stand is to blame; and a rank knows where it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from litchi.config import BadInput
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import Layout, World, join
from litchi.train.blame import HUNG, Standing, blame, read_standings, standing_path, straggling, write_standing
from litchi.train.calls import stacks
from litchi.train.watch import SUPERVISED, Shares, Watch, WatchConfig, await_path, locate
from tests.train.toy import SERVER

CODE, TREE = "src/litchi/model/network.py:50 in forward", "src/litchi/parallel/collectives.py:9 in total"


def stands(rank: int, line: str = TREE, collective: str = "all_reduce", **more) -> Standing:
    return replace(
        Standing(rank, host=f"host{rank}", pid=100 + rank, step=41, phase="train", since=1000.0, at=1065.0),
        line=line,
        collective=collective,
        **more,
    )


def named(*standings: Standing, size: int = 0, ends: dict[int, int] | None = None) -> tuple[tuple[int, ...], str]:
    found = blame({s.rank: s for s in standings}, size or len(standings), ends or {}, silent=30.0)
    return found.ranks, found.line


# ---- blame --------------------------------------------------------------------------------------------------------


def test_who_is_in_no_collective_keeps_the_others_waiting() -> None:
    ranks, line = named(stands(0), stands(1), stands(2, CODE, ""), stands(3))
    assert ranks == (2,)
    assert line == (
        f"rank 2 (host2, process 102) hangs in step 42 at {CODE}, for 65 s; ranks 0, 1, 3 wait in all_reduce at {TREE}"
    )


def test_who_has_ended_early_keeps_the_others_waiting() -> None:
    ranks, line = named(stands(0), stands(1, "", "", phase="done"))
    assert ranks == (1,) and "rank 1 (host1, process 101) has ended after step 41 (done)" in line


def test_who_is_silent_is_to_blame_wherever_it_was_seen() -> None:
    ranks, line = named(stands(0), stands(1, at=1005.0, step=40), stands(2, CODE, ""))
    assert ranks == (1,) and "has been silent for 60 s in step 42" in line and "last seen in step 41 in all_red" in line


def test_who_never_began_is_to_blame() -> None:
    assert named(stands(0), stands(2), size=3) == ((1,), "rank 1 did not begin: no word from it")


def test_who_waits_elsewhere_than_most_has_skipped_a_collective() -> None:
    ranks, line = named(stands(0), stands(1, TREE, "all_gather"), stands(2))
    assert ranks == (1,) and "in all_gather" in line and "ranks 0, 2 wait in all_reduce" in line


def test_of_two_ranks_that_wait_in_different_places_none_is_accused() -> None:
    ranks, line = named(stands(0), stands(1, TREE, "all_gather"))
    assert ranks == () and "none is in the majority" in line and "host0" in line and "host1" in line


def test_where_all_wait_alike_the_wire_is_named() -> None:
    ranks, line = named(stands(0), stands(1))
    assert ranks == () and line.endswith("look at what connects host0, host1")


def test_counts_tell_where_lines_do_not() -> None:
    """On a GPU all main threads wait for their device. Here 0 and 1 wait for 2 and 3 along one axis, and 2 for 3."""
    wait = "src/litchi/train/step.py:58 in train_step"
    ranks, _ = named(
        stands(0, wait, "", issued={"world": 9, "tensor0": 4}),
        stands(1, wait, "", issued={"world": 9, "tensor0": 4}),
        stands(2, wait, "", issued={"world": 8, "tensor1": 4}),
        stands(3, wait, "", issued={"world": 8, "tensor1": 3}),
    )
    assert ranks == (3,)


def test_a_signal_is_to_blame_before_those_who_fail_of_it() -> None:
    broken = "RuntimeError: Connection closed by peer"
    ranks, line = named(
        stands(0, failure=broken), stands(1, CODE, "", step=40), stands(2, failure=broken), ends={0: 1, 1: -9, 2: 1}
    )
    assert ranks == (1,) and "was killed by SIGKILL" in line and "in step 42; last seen in step 41" in line


def test_who_fails_by_itself_is_to_blame_before_those_who_fail_of_it() -> None:
    ranks, line = named(
        stands(0, failure="RuntimeError: Connection closed by peer", at=1064.0),
        stands(1, CODE, "", failure="ValueError: torn"),
        ends={0: 1, 1: 1},
    )
    assert ranks == (1,) and line.endswith(f"failed in step 42 at {CODE}, 65 s into it: ValueError: torn")


def test_who_gave_up_waiting_is_not_to_blame() -> None:
    assert named(stands(0), stands(1, CODE, ""), stands(2), ends={0: HUNG, 2: HUNG})[0] == (1,)


def test_who_gave_up_and_ended_is_not_silent() -> None:
    """The others may end later, on a machine that stood still in between."""
    ranks, line = named(stands(0), stands(1, CODE, "", at=1005.0), stands(2), ends={0: HUNG, 1: HUNG, 2: HUNG})
    assert ranks == (1,) and "hangs in step 42" in line and "ranks 0, 2 wait in all_reduce" in line


def test_a_slow_rank_is_slow_against_the_others() -> None:
    standings = {rank: stands(rank, own=own) for rank, own in enumerate([0.1, 0.1, 0.4, 0.1])}
    found = straggling(standings, 1.5)
    assert found.slow == (2,) and found.slowest == 2 and found.ratio == pytest.approx(0.4 / 0.175)
    assert found.line == "rank 2 (host2, process 102) is slow: 0.4 s of work a step, 4.0 times the others"
    assert straggling(standings, 5.0).slow == ()
    assert straggling({0: stands(0, own=0.4)}, 1.5).ratio == 1.0


def test_calls_of_a_thread_that_runs_on_are_calls() -> None:
    """Each stack is one that the thread had, from where it stood out to its beginning."""
    begun, over = threading.Event(), threading.Event()

    def inner(depth: int) -> None:
        if depth:
            inner(depth - 1)

    def busy() -> None:
        begun.set()
        while not over.is_set():
            inner(5)

    thread = threading.Thread(target=busy)
    thread.start()
    begun.wait()
    seen = []
    try:
        while len(seen) < 300 or (len({len(stack) for stack in seen}) < 3 and len(seen) < 30_000):
            seen.append(stacks()[thread.ident or 0])
            over.wait(0.0001)  # or it would not run on
    finally:
        over.set()
        thread.join()
    for stack in seen:
        names = [call.function for call in stack if call.path == __file__]
        assert names in [["inner"] * n + ["busy"] for n in range(8)], names
        assert stack[-1].function == "_bootstrap"
    assert len({len(stack) for stack in seen}) > 2


ENTERING = """
import ctypes, threading, time
from litchi.train.calls import stacks

libc, over, begun = ctypes.CDLL(None), threading.Event(), threading.Barrier(5)
enter = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: None)

def breed():
    begun.wait()
    while not over.is_set():
        thread = ctypes.c_ulong()
        if not libc.pthread_create(ctypes.byref(thread), None, enter, None):
            libc.pthread_join(thread, None)

breeders = [threading.Thread(target=breed) for _ in range(4)]
for breeder in breeders:
    breeder.start()
begun.wait()
until = time.monotonic() + 3
try:
    while time.monotonic() < until:
        found = stacks()
        assert all("breed" in {call.function for call in found[breeder.ident]} for breeder in breeders)
finally:
    over.set()
"""


def test_stacks_are_seen_while_threads_of_other_libraries_come_and_go() -> None:
    """Each enters the list of Python's threads without the interpreter's lock, as torch's do in a backward pass."""
    asked = subprocess.run([sys.executable, "-c", ENTERING], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, (asked.returncode, asked.stderr)


def test_a_torn_or_missing_standing_is_no_standing(tmp_path: Path) -> None:
    standing_path(tmp_path, 0).write_text('{"rank": 0, "ho')
    assert read_standings(tmp_path, 2) == {}
    long, short = stands(0, issued={f"group{i}": i for i in range(999)}), stands(0)
    for standing in (short, long, short):
        write_standing(tmp_path, standing)
        assert read_standings(tmp_path, 1) == {0: standing}


# ---- watch --------------------------------------------------------------------------------------------------------


def test_a_rank_writes_where_it_stands(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def forward(self) -> tuple[str, str]:
            return watch.module(), watch.located()[0]

    model = nn.Sequential(Layer())
    with Watch(World(), tmp_path, WatchConfig(sample=0.001, beat=0.001), model) as watch:
        watch.step(7)
        module, line = model[0]()
        assert module == "0" and line == f"src/litchi/train/calls.py:{line.split(':')[1].split()[0]} in walk"
        with watch.during("save"):
            until = time.monotonic() + 60
            while (saving := here(tmp_path)).phase != "save" and time.monotonic() < until:
                pass
            assert watch.limit() == 1800.0
    assert saving.step == 7 and saving.line.startswith(("tests/train/test_watch.py:", "src/litchi/"))
    assert here(tmp_path).phase == "done" and not watch.thread.is_alive()


def here(folder: Path) -> Standing:
    return read_standings(folder / "ranks", 1)[0]


def test_what_ends_a_rank_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError), Watch(World(), tmp_path):
        raise ValueError("torn\nin two")
    assert here(tmp_path).failure == "ValueError: torn in two" and "test_watch.py" in here(tmp_path).line
    with pytest.raises(KeyboardInterrupt), Watch(World(), tmp_path):
        raise KeyboardInterrupt
    assert here(tmp_path).failure == "" and here(tmp_path).phase == "done"


def test_patience_ends_once_steps_have_a_length(tmp_path: Path) -> None:
    watch = Watch(World(), tmp_path)
    for step in range(4):
        assert watch.limit() == 1800.0
        watch.step(step)
    assert watch.limit() == 60.0
    watch.times.extend([10.0] * 9)
    assert watch.limit() == 200.0
    strict = Watch(World(), tmp_path, WatchConfig(hang_after=5.0))
    strict.now = "train"
    strict.times.extend([10.0] * 9)
    assert strict.limit() == 5.0


def test_a_rank_alone_is_not_ended_in_a_debugger(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody waits for it and nobody would start it again; it says where it stands and goes on."""
    config = WatchConfig(sample=0.01, grace=0.0)
    with Watch(World(), tmp_path, config) as watch:
        watch.config = replace(config, patience=0.05)  # now that the main thread stands here
        until = time.monotonic() + 60
        while not (tmp_path / "ranks" / "rank_00000.trace").exists() and time.monotonic() < until:
            time.sleep(0.01)
    said = capfd.readouterr().err
    assert said.startswith("litchi: rank 0 (") and "hangs in step 1 at tests/train/test_watch.py:" in said, said


def test_a_rank_that_was_suspended_has_not_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour in which the watch did not look either is a pause of the machine."""
    clock = time.monotonic
    with Watch(World(), tmp_path, WatchConfig(patience=600.0, sample=0.01, grace=0.0)) as watch:
        monkeypatch.setattr("time.monotonic", lambda: clock() + 3600.0)
        for _ in range(3):  # looks that have begun after it
            looked = watch.pace.looked
            while watch.pace.looked == looked:
                time.sleep(0.001)
    assert watch.pace.seconds < 600.0
    assert not (tmp_path / "ranks" / "rank_00000.trace").exists()


def test_own_time_is_what_is_not_waited() -> None:
    shares = Shares()
    for step in range(40):
        assert step > 30 or not shares.own, "a few steps say nothing"
        shares.sample(True)
        shares.sample(True)
        shares.sample(False)
        shares.step(0.3)
    assert shares.own == pytest.approx(0.1, rel=0.1)


def hang(folder: Path) -> None:
    sys.stderr = (folder / "said").open("w")
    with Watch(World(), folder, WatchConfig(hang_after=0.5, sample=0.01, grace=0.0)) as watch:
        for step in range(5):
            watch.step(step)
        time.sleep(600)


def orphan(folder: Path) -> None:
    os.environ[SUPERVISED] = "1"
    with Watch(World(), folder, WatchConfig(sample=0.01)) as watch:
        watch.parent = -1  # as if it had been another process
        time.sleep(600)


def ended(function: Callable[[Path], None], folder: Path) -> int | None:
    """The exit code of a process that does this."""
    process = SERVER.Process(target=function, args=(folder,), daemon=True)
    process.start()
    process.join(600)
    return process.exitcode


def test_a_rank_that_was_given_a_time_ends_itself_with_a_report(tmp_path: Path) -> None:
    """Without a supervisor it says itself what is wrong, and leaves what every thread was doing."""
    assert ended(hang, tmp_path) == HUNG
    said = (tmp_path / "said").read_text()
    assert said.startswith("litchi: rank 0 (") and "hangs in step 5 at tests/train/test_watch.py:" in said, said
    assert "Thread" in (tmp_path / "ranks" / "rank_00000.trace").read_text()


def test_a_rank_whose_supervisor_is_gone_holds_no_gpu(tmp_path: Path) -> None:
    assert ended(orphan, tmp_path) == HUNG


# ---- collectives --------------------------------------------------------------------------------------------------


def late(kind: str, folder: Path) -> tuple[str, str]:
    """What rank 0 is seen to wait in; rank 1 comes when that has been seen."""
    world, told, begun = join(Layout(), torch.device("cpu")), folder / "seen", threading.Event()
    dist.barrier()
    if world.rank == 1:
        await_path(told, patience=120.0)
        collective(kind, begun)
        return ("", "")
    seen: list[tuple[str, str]] = []
    main = threading.get_ident()

    def look() -> None:
        begun.wait()
        until = time.monotonic() + 60
        while not seen and time.monotonic() < until:
            if (found := locate(stacks().get(main, ())))[1]:
                seen.append(found)
        told.touch()

    thread = threading.Thread(target=look)
    thread.start()
    collective(kind, begun)
    thread.join()
    return seen[0]


def collective(kind: str, begun: threading.Event) -> None:
    """`begun` is set where nothing is left but what is to be seen."""
    x = torch.ones(4)
    if kind == "wait":
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        begun.set()
        work.wait()
        return
    begun.set()
    match kind:
        case "all_gather_object":
            dist.all_gather_object([None, None], kind)
        case "all_reduce":
            dist.all_reduce(x)
        case "barrier":
            dist.barrier()


@pytest.fixture(scope="module")
def pair():
    with Crew(2) as crew:
        yield crew


@pytest.mark.parametrize("kind", ["all_reduce", "barrier", "wait", "all_gather_object"])
def test_a_collective_is_seen_by_the_name_it_was_called_by(pair: Crew, tmp_path: Path, kind: str) -> None:
    line, seen = pair.run(late, kind, tmp_path)[0]
    assert seen == kind and line.startswith("tests/train/test_watch.py:") and line.endswith("in collective")


def uneven(folder: str) -> float:
    """Rank 1 works, rank 0 waits for it; what the metrics of rank 0 say of that in the end."""
    world, found = join(Layout(), torch.device("cpu")), 0.0
    with Watch(world, Path(folder), WatchConfig(sample=0.002, beat=0.02)) as watch:
        for step in range(4000):
            time.sleep(0.02 if world.rank == 1 else 0.0)
            found = watch.row().get("straggling", 0.0)
            known = torch.tensor(found > 1.5)
            dist.broadcast(known, src=0)
            watch.step(step)
            if known:
                break
    return found


def test_the_straggler_shows_in_the_metrics(pair: Crew, tmp_path: Path) -> None:
    """At first not all steps may say so, on a machine that does other things as well."""
    assert 1.5 < pair.run(uneven, str(tmp_path))[0] <= 2.0, "rank 1 works nearly all of the time, rank 0 nearly none"


def test_what_rank_0_makes_is_awaited(tmp_path: Path) -> None:
    path = tmp_path / "processor"
    threading.Timer(0.05, path.mkdir).start()
    await_path(path, patience=20.0)
    with pytest.raises(BadInput, match="is the folder shared by all machines"):
        await_path(tmp_path / "never", patience=0.0)


def test_standings_are_plain_json(tmp_path: Path) -> None:
    with Watch(World(), tmp_path):
        pass
    assert json.loads(standing_path(tmp_path / "ranks", 0).read_text())["rank"] == 0
