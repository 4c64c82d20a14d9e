"""Workers that hang or die before they are ready are started again, later each time, and not for ever."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from litchi.cli import find_checkpoint
from litchi.config import BadInput
from litchi.serve import keeper
from litchi.serve.fleet import Fleet
from litchi.serve.keeper import Keeper, Member
from litchi.serve.pipe import Pipe
from litchi.serve.run import run
from tests.serve.test_fleet import CONFIG, QUESTION, Heard, until

LOADING = ("read ", "checked ", "packed ")
"""How what a worker says begins while it loads."""


@contextmanager
def starting(config=CONFIG) -> Iterator[Fleet]:
    """A fleet whose `start` runs beside the test, which sees it come about or fail."""
    fleet = Fleet(find_checkpoint("tiny"), config)
    said: list[BaseException] = []

    def start() -> None:
        try:
            fleet.start()
        except BaseException as error:
            said.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    try:
        yield fleet
        thread.join(120)
        assert not thread.is_alive() and not said
    finally:
        fleet.close()
        thread.join(60)
    assert all(member.process.poll() is not None for member in fleet.members)


def stop(member: Member) -> None:
    os.kill(member.process.pid, signal.SIGSTOP)


def at(place: int, fleet: Fleet) -> Member | None:
    return next((member for member in fleet.members if member.place == place), None)


def test_a_worker_that_hangs_while_it_loads_is_replaced(monkeypatch, caplog) -> None:
    """It is stopped in the middle of its load; the other serves in the meantime, and both in the end."""
    told: list[str] = []
    doomed: list[Member] = []
    stopped: list[Member] = []

    class Overheard(Pipe):
        def receive(self) -> dict | None:
            message = super().receive()
            while stopped and message is not None and stopped[0].pipe is self:  # said before it heard the signal
                message = super().receive()
            told.append((message or {}).get("doing", ""))
            if doomed and doomed[0].pipe is self and told[-1].startswith(LOADING):
                stopped.append(doomed[0])
                stop(stopped[0])
            return message

    def launched_there(place: int, folder: Path, config) -> Member:
        member = launched(place, folder, config)
        doomed.extend([member] if place == 1 else [])
        return member

    launched = keeper.launched
    monkeypatch.setattr(keeper, "launched", launched_there)
    monkeypatch.setattr(keeper, "Pipe", Overheard)
    with starting() as fleet:
        until(lambda: fleet.gauges()["workers_ready"] == 1 and stopped)
        [hung] = stopped
        assert not hung.ready
        heard = Heard()
        fleet.submit(QUESTION, heard, stream=False)
        assert heard.wait() and heard.error is None
        assert fleet.restarts == 0 and at(1, fleet) is hung and hung.process.poll() is None
        hung.moved -= fleet.config.start_patience  # instead of a patience that another start might not live up to
        until(lambda: fleet.gauges()["workers_ready"] == 2)
        assert fleet.restarts == 1 and hung.process.returncode == -signal.SIGKILL
    assert "worker 1 had done nothing for" in caplog.text and f"since it {hung.doing}" in caplog.text
    steps = Counter(doing.split()[0] for doing in told if doing)
    assert min(steps[word] for word in ("read", "checked", "looked")) > 4, "silent starts look like those that hang"


@pytest.fixture
def doomed(monkeypatch) -> list[Member]:
    """Every worker is stopped as soon as it is started; all of them in their order."""
    began: list[Member] = []
    launched = keeper.launched

    def stopped(place: int, folder: Path, config) -> Member:
        member = launched(place, folder, config)
        stop(member)
        began.append(member)
        return member

    monkeypatch.setattr(keeper, "launched", stopped)
    return began


def test_starts_that_all_hang_are_tried_again_later_each_time_and_end_with_one_line(doomed: list[Member]) -> None:
    fleet = Fleet(find_checkpoint("tiny"), replace(CONFIG, start_patience=0.2))
    with pytest.raises(BadInput, match=r"no worker starts: each failed 3 times in a row .* done nothing for .* since"):
        fleet.start()
    assert not any(member.process.poll() is None for member in (*doomed, *fleet.members))
    for place in (0, 1):
        first, second, third, *_ = [member.moved for member in doomed if member.place == place]
        assert 0.2 + keeper.PAUSE <= second - first and 0.2 + 2 * keeper.PAUSE <= third - second


def test_one_place_where_nothing_starts_does_not_end_those_that_serve(monkeypatch, caplog) -> None:
    """Such as a device that is broken: the others answer, and it is tried again, ever more rarely."""
    monkeypatch.setattr(keeper, "PAUSE", 0.01)
    launched, tried = keeper.launched, []

    def broken(place: int, folder: Path, config) -> Member:
        if place == 1:
            tried.append(time.monotonic())
            raise OSError("no device")
        return launched(place, folder, config)

    monkeypatch.setattr(keeper, "launched", broken)
    with caplog.at_level(logging.WARNING), starting() as fleet:
        until(lambda: fleet.opened and len(tried) > keeper.STILLBORN + 1)
        assert fleet.alive and fleet.failed[1] > keeper.STILLBORN
        heard = Heard()
        fleet.submit(QUESTION, heard, stream=False)
        assert heard.wait() and heard.error is None
    pauses = [b - a for a, b in zip(tried, tried[1:], strict=False)]
    assert all(pause >= 0.01 * 2**at for at, pause in enumerate(pauses))
    assert "worker 1 could not be started (no device); starting it again in" in caplog.text


class Lives(Keeper):
    """Workers without work."""

    def hear(self, member, message) -> None:
        raise AssertionError(message)

    def orphaned(self, member) -> None: ...

    def drop(self, error) -> None: ...


def test_a_start_that_gets_on_is_waited_for_however_long_it_takes() -> None:
    lives = Lives(Path(), CONFIG)

    class Scripted:
        words = [{"doing": "read this"}, {"doing": "read that"}]
        moved: list[float] = []

        def receive(self) -> dict | None:
            self.moved.append(member.moved)
            return self.words.pop(0) if self.words else None

        def shut(self) -> None: ...

    with subprocess.Popen(["sleep", "100"], start_new_session=True) as process:
        member = Member(0, process, Scripted())  # type: ignore[arg-type]
        lives.members.append(member)
        lives.listen(member)
    first, second, third = Scripted.moved
    assert first < second < third and member.doing == "read that" and lives.restarts == 1


def test_what_a_first_start_refuses_is_told_at_once_and_what_a_later_one_refuses_is_tried_again() -> None:
    lives = Lives(Path(), CONFIG)
    members = [Member(place, None, None) for place in range(2)]  # type: ignore[arg-type]
    lives.welcome(members[0], None)
    lives.fails(members[1], "input", "the weights are torn")
    assert lives.alive and members[1].fault == "the weights are torn"
    fresh = Lives(Path(), CONFIG)
    fresh.fails(members[1], "input", "the weights are torn")
    assert not fresh.alive and fresh.fault == "the weights are torn"


@pytest.mark.parametrize("stops", [True, False])
def test_a_door_that_stood_still_itself_does_not_take_it_for_its_workers_doing(monkeypatch, stops: bool) -> None:
    """As on a machine that was stopped and goes on: every worker would be killed, with all that it answers."""
    lives, now, rounds = Lives(Path(), CONFIG), [0.0], iter(range(200))
    member = Member(0, SimpleNamespace(returncode=0), None, ready=True, moved=0.0)  # type: ignore[arg-type]
    lives.members.append(member)

    def wait(seconds: float) -> None:
        now[0] += seconds + 1000 * stops
        lives.closing = next(rounds) == (50 if stops else 150)

    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(lives.changed, "wait", wait)
    lives.watch()
    assert now[0] > CONFIG.worker_patience and bool(member.fault) != stops


def test_what_has_been_started_is_started_again_without_harm() -> None:
    """The door does so when it opens, and its workers may have given up since."""
    lives = Lives(Path(), CONFIG)
    lives.welcome(Member(0, None, None), None)  # type: ignore[arg-type]
    lives.give_up("no worker starts")
    lives.begin()
    assert lives.fault == "no worker starts" and lives.watcher.ident is None


def test_a_server_whose_workers_have_all_given_up_ends_with_that_line(monkeypatch) -> None:
    monkeypatch.setattr(keeper, "PAUSE", 0.01)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the server of this test is no main thread's
    found: list[BaseException] = []
    config = replace(CONFIG, workers=1, port=0)
    fleet = Fleet(find_checkpoint("tiny"), config).start()

    def serve() -> None:
        try:
            run(config, fleet, lambda env, seed: None)  # type: ignore[arg-type,return-value]
        except BadInput as error:
            found.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    until(lambda: fleet.ended.__name__ == "ended")

    def failing(*_: object) -> Member:
        raise OSError("no memory")

    monkeypatch.setattr(keeper, "launched", failing)
    [member] = fleet.members
    member.process.kill()
    thread.join(120)
    assert not thread.is_alive(), "it serves on without workers"
    assert "no worker starts: each failed 3 times in a row" in str(found[0]) and "no memory" in str(found[0])
