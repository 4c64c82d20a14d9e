"""Workers die, hang and are born dead: who asked hears every bit of the answer once, and others are started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from litchi.cli import find_checkpoint
from litchi.config import BadInput
from litchi.schema.digest import bits
from litchi.schema.request import Completion, Delta, Grammar, Request, SamplingParams, Scored
from litchi.schema.sample import Action, Image, Role, Text
from litchi.serve.engine import Engine
from litchi.serve.fleet import Ask, Fleet
from litchi.serve.keeper import Member
from litchi.serve.loading import load_engine
from litchi.serve.pipe import Pipe, read, written
from litchi.serve.run import ServeConfig
from litchi.serve.scheduler import EngineConfig

CONFIG = ServeConfig(workers=2, engine=EngineConfig(path="torch", weights="float32"), side=64)
QUESTION = Request(
    parts=(Text(text="where is the red ball", role=Role.USER),),
    want="chat",
    params=SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, logprobs=True, top_logprobs=2),
)


class Heard:
    """Collects what one request is told; `each` is called with the ask after each piece."""

    def __init__(self, each: Callable[[], None] = lambda: None) -> None:
        self.pieces: list[Delta | Completion] = []
        self.error: BaseException | None = None
        self.over, self.each = threading.Event(), each

    def __call__(self, piece: Delta | Completion | BaseException | None) -> None:
        assert not self.over.is_set(), "told after its end"
        if isinstance(piece, Delta | Completion):
            self.pieces.append(piece)
            self.each()
            return
        self.error = piece
        self.over.set()

    def wait(self) -> list[Delta | Completion]:
        assert self.over.wait(180), "no end was told"
        return self.pieces


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    """The same checkpoint in an engine of this process."""
    engine = load_engine(find_checkpoint("tiny"), CONFIG).start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    made = Fleet(find_checkpoint("tiny"), CONFIG).start()
    yield made
    made.close()
    assert all(member.process.poll() is not None for member in made.members)


def same(told: list, engine: Engine, request: Request, *, stream: bool = True) -> bool:
    """Whether every bit is what the engine of this process says."""
    expected = list(engine.stream(request)) if stream else [engine.complete(request)]
    return [bits(piece) for piece in told] == [bits(piece) for piece in expected]


def questions(count: int) -> list[Request]:
    return [replace(QUESTION, params=replace(QUESTION.params, seed=seed)) for seed in range(count)]


def at(place: int, fleet: Fleet) -> Member:
    """The worker in a place, once it is ready."""
    until(lambda: any(member.place == place and member.ready for member in fleet.members))
    return next(member for member in fleet.members if member.place == place)


@pytest.fixture
def kill(monkeypatch) -> Callable[[Member, int | None], None]:
    """SIGKILL to a worker, or to one of its ranks. What it has said and nobody has heard by then is lost: how far a
    worker is ahead of the door, which may be slow, is a matter of luck."""
    hear, dead = Fleet.hear, set()

    def heard(fleet: Fleet, member: Member, message: dict) -> None:
        if member not in dead:
            hear(fleet, member, message)

    def killed(member: Member, rank: int | None = None) -> None:
        dead.add(member)
        os.kill(member.process.pid if rank is None else rank, signal.SIGKILL)

    monkeypatch.setattr(Fleet, "hear", heard)
    return killed


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not come about"
        threading.Event().wait(0.01)


def test_messages_come_as_they_were_sent() -> None:
    scored = Scored(3, b"\xff\x00", None, 2, (Scored(1, b"a", -0.1),))
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    parts = (Text(text="é\n", role=Role.USER), Image(pixels=pixels), Action.discrete(2, "minigrid"))
    params = SamplingParams(logit_bias=((3, -1.5),), grammar=Grammar("regex", "a+"), stop=("x",))
    request = Request(parts=parts, want="frame", params=params, tokens=(1, 2), tools=("{}",))
    delta = Delta(part=Image(pixels=pixels), logprobs=(0.1 + 0.2, float("-inf")), scored=(scored,), vector=(1e-300,))
    completion = Completion(parts=(parts[2],), text="a", finish="stop", prompt_tokens=1, tokens=(), ended=scored)
    ours, theirs = (Pipe(end) for end in socket.socketpair())
    for value in (request, delta, completion, replace(delta, part=None, matched=7)):
        ours.send(written(value))
        told = theirs.receive()
        assert told is not None
        back = read(told, Request, Delta, Completion)
        assert repr(back) == repr(value) and written(back) == written(value)
    ours.close()
    assert theirs.receive() is None
    theirs.close()


def test_workers_answer_with_the_bits_of_an_engine_alone(fleet: Fleet, alone: Engine) -> None:
    asked = questions(8)
    for stream in (True, False):
        heard = [Heard() for _ in asked]
        for request, each in zip(asked, heard, strict=True):
            fleet.submit(request, each, stream=stream)
        for request, each in zip(asked, heard, strict=True):
            assert same(each.wait(), alone, request, stream=stream) and each.error is None
    assert fleet.origin == alone.origin


@pytest.mark.parametrize("stream", [True, False])
def test_a_worker_that_is_killed_in_the_middle_of_answers_is_not_missed(
    fleet: Fleet, alone: Engine, kill: Callable, stream: bool
) -> None:
    """It is killed by the first piece that is heard of it, or the ninth of a stream."""
    asked, before, doomed = questions(10), fleet.restarts, at(0, fleet)
    pieces, lost = [], []

    def murder(index: int) -> None:
        with fleet.changed:  # not before all are asked
            pieces.extend([index] if asks[index].member is doomed else [])
            if len(pieces) == (9 if stream else 1) and not lost:
                lost.extend(ask for ask in asks if ask.member is doomed)
                kill(doomed)

    heard = [Heard(partial(murder, index)) for index in range(len(asked))]
    with fleet.changed:
        asks = [fleet.submit(request, each, stream=stream) for request, each in zip(asked, heard, strict=True)]
    for request, each in zip(asked, heard, strict=True):
        assert same(each.wait(), alone, request, stream=stream) and each.error is None
    assert len(lost) > 2 and all(ask.deaths == 1 for ask in lost), "nobody was asked again"
    until(lambda: fleet.gauges()["workers_ready"] == 2)
    assert fleet.restarts == before + 1


def test_a_request_of_which_workers_die_is_refused_and_others_are_answered(
    fleet: Fleet, alone: Engine, kill: Callable
) -> None:
    found: list[Ask] = []

    def murder() -> None:
        with fleet.changed:
            kill(found[0].member)

    poison, other = Heard(murder), Heard()
    with fleet.changed:
        found.append(fleet.submit(QUESTION, poison, stream=True))
    fleet.submit(questions(1)[0], other, stream=True)
    poison.wait()
    assert isinstance(poison.error, RuntimeError) and "3 workers" in str(poison.error)
    told = [bits(piece) for piece in alone.stream(QUESTION)]
    assert [bits(piece) for piece in poison.pieces] == told[: len(poison.pieces)]
    assert same(other.wait(), alone, questions(1)[0])
    until(lambda: fleet.gauges()["workers_ready"] == 2)


def test_a_worker_that_hangs_is_replaced(alone: Engine) -> None:
    fleet = Fleet(find_checkpoint("tiny"), replace(CONFIG, workers=1)).start()

    def forsaken() -> bool:
        """Instead of a patience so short that another might not live up to it: again, since it may yet be heard."""
        member.moved = time.monotonic() - fleet.config.worker_patience - 1
        return fleet.restarts > 0

    try:
        [member] = fleet.members
        os.kill(member.process.pid, signal.SIGSTOP)
        heard = Heard()
        fleet.submit(QUESTION, heard, stream=True)
        until(forsaken)
        assert member.process.returncode == -signal.SIGKILL and "had done nothing" in member.fault
        assert same(heard.wait(), alone, QUESTION) and fleet.restarts == 1
    finally:
        fleet.close()


def test_an_answer_whose_bits_nobody_knows_ends_with_an_error_and_is_not_sewn_together(
    fleet: Fleet, kill: Callable
) -> None:
    def murder() -> None:
        with fleet.changed:
            ask.member.origin = None  # as of an engine with exact=False
            kill(ask.member)

    heard = Heard(murder)
    with fleet.changed:
        ask = fleet.submit(QUESTION, heard, stream=True)
    heard.wait()
    assert ask.over and isinstance(heard.error, RuntimeError) and "made again alike" in str(heard.error)
    until(lambda: fleet.gauges()["workers_ready"] == 2)


def test_who_leaves_is_answered_no_further(fleet: Fleet) -> None:
    heard = Heard()
    most = 15_000  # a minute's work, so that there is something to leave; a chat ends with its turn all the same
    params = replace(QUESTION.params, max_tokens=most)
    ask = fleet.submit(replace(QUESTION, want="text", params=params), heard, stream=True)
    until(lambda: ask.heard > 0)
    fleet.cancel(ask)
    assert heard.wait() and heard.error is None and len(heard.pieces) < most
    until(lambda: fleet.gauges()["engine_running"] == 0)


def test_bad_input_is_told_as_such(fleet: Fleet) -> None:
    heard = Heard()
    fleet.submit(Request(parts=(), want="text"), heard, stream=True)
    heard.wait()
    assert isinstance(heard.error, BadInput) and "no tokens" in str(heard.error)


def test_a_folder_that_is_not_whole_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"meta\.json"):
        Fleet(tmp_path, replace(CONFIG, workers=1)).start()


def test_a_server_loses_no_request_when_its_workers_are_killed(
    fleet: Fleet, alone: Engine, served_by, kill: Callable, monkeypatch
) -> None:
    """Twenty clients, streams and whole answers; afterwards the door still knows both workers. Each is killed by the
    fifteenth message that is heard of it, with which not all that it was asked can have ended."""
    doomed, hear, messages = [at(place, fleet) for place in (0, 1)], Fleet.hear, Counter[Member]()

    def heard(self: Fleet, member: Member, message: dict) -> None:
        hear(self, member, message)
        messages[member] += "of" in message
        if messages[member] == 15 and member in doomed:
            assert member.asked, "nothing was left to do"
            kill(member)

    monkeypatch.setattr(Fleet, "hear", heard)

    @contextmanager
    def kept() -> Iterator[Fleet]:
        fleet.close, close = lambda: None, fleet.close  # the fixture closes it
        yield fleet
        fleet.close = close

    body = {"model": "tiny", "prompt": "where is the red ball", "max_tokens": 48, "temperature": 1.0}
    with kept(), served_by(fleet) as served, ThreadPoolExecutor(20) as pool:

        def ask(seed: int) -> str:
            whole = body | {"seed": seed, "stream": seed % 2 == 0}
            answer = httpx.post(f"{served.url}/v1/completions", json=whole, timeout=180)
            assert answer.status_code == 200, answer.text
            if seed % 2:
                return answer.json()["choices"][0]["text"]
            assert answer.text.rstrip().endswith("[DONE]")
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            return "".join(event["choices"][0]["text"] for event in events if event["choices"])

        for member in doomed:
            os.kill(member.process.pid, signal.SIGSTOP)  # until all have been asked
        asked = [pool.submit(ask, seed) for seed in range(20)]
        until(lambda: sum(len(member.asked) for member in doomed) == 20)
        assert all(len(member.asked) > 4 for member in doomed)
        for member in doomed:
            os.kill(member.process.pid, signal.SIGCONT)
        said = [each.result() for each in asked]
        assert all(member.process.returncode == -signal.SIGKILL for member in doomed)
        metrics = httpx.get(f"{served.url}/metrics").text
        assert "litchi_workers_restarted" in metrics and "litchi_engine_running" in metrics
    parts = (Text(text=body["prompt"]),)
    for seed in range(20):
        params = SamplingParams(max_tokens=48, temperature=1.0, seed=seed)
        assert said[seed] == alone.complete(Request(parts=parts, want="text", params=params)).text


def test_workers_end_with_the_door(tmp_path: Path) -> None:
    """Even if it is killed."""
    script = (
        "from tests.serve.test_fleet import CONFIG, Fleet, find_checkpoint\n"
        "fleet = Fleet(find_checkpoint('tiny'), CONFIG).start()\n"
        "print(*(member.process.pid for member in fleet.members), flush=True)\n"
        "input()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as door:
        assert door.stdout is not None
        pids = [int(word) for word in door.stdout.readline().split()]
        door.kill()
    assert len(pids) == 2
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
