"""Whatever breaks off, a client, a program, a step or the engine, ends that alone: the rest is told and goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from litchi.model.program import Program, Steps
from litchi.serve.engine import Engine, EngineConfig
from tests.serve.test_chat import leave_waiting
from tests.serve.test_engine import network

CHAT = "/v1/chat/completions"


class Gate:
    """Stands before each step of an engine: open, open for some steps, shut, slow by `pause` seconds, or broken for the
    next one."""

    def __init__(self, engine: Engine) -> None:
        self.open, self.waiting = threading.Event(), threading.Event()
        self.fault: Exception | None = None
        self.pause, self.left = 0.0, 0
        self.open.set()
        self.run, engine.runner.run = engine.runner.run, self.pass_through

    def let(self, steps: int) -> None:
        """Open for so many steps, of which a test may then be sure."""
        self.left = steps
        self.open.set()

    @property
    def held(self) -> bool:
        """Whether the engine stands before it: what comes and goes now is seen before the next step but one."""
        return self.waiting.is_set() and not self.open.is_set()

    def pass_through(self, pieces, pages):
        self.waiting.set()
        assert self.open.wait(120)
        self.waiting.clear()
        if self.left:
            self.left -= 1
            if not self.left:
                self.open.clear()
        threading.Event().wait(self.pause)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return self.run(pieces, pages)


@pytest.fixture
def engine(served_by) -> Callable:
    """`with engine(max_running=2) as (engine, gate, client):`; all pages are free again and the thread lives."""

    @contextmanager
    def one(**settings: object) -> Iterator[tuple[Engine, Gate, httpx.Client]]:
        p, net = network("mask")
        made = Engine(net, p, EngineConfig(path="torch", page=8, cache_tokens=2048, guess="none", **settings))
        gate = Gate(made)
        with served_by(made, side=8) as served, httpx.Client(base_url=served.url, timeout=120) as client:
            try:
                yield made, gate, client
            finally:
                gate.open.set()
        assert made.pages.num_free == len(made.pages.readers) - 1, "pages were lost"

    return one


def body(text: str = "where is the key", max_tokens: int = 6, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "ignore_eos": True} | more


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def until(condition: Callable[[], bool]) -> None:
    """The event only paces the looking."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 120, "it did not come about within two minutes"
        threading.Event().wait(0.005)


def num_free(engine: Engine) -> bool:
    return engine.pages.num_free == len(engine.pages.readers) - 1


def test_a_client_that_leaves_a_stream_frees_its_pages(engine) -> None:
    with engine() as (made, gate, client):
        gate.let(8)
        with client.stream("POST", CHAT, json=body(max_tokens=1000, stream=True)) as answer:
            lines = answer.iter_lines()  # whose end is the connection's
            next(lines)
            until(lambda: gate.held)
            assert made.load().running == 1 and not num_free(made)
        until(lambda: made.running[0].cancelled)
        gate.open.set()
        until(lambda: not made.load().running and num_free(made))
        assert made.num_steps < 12
        assert client.post(CHAT, json=body()).status_code == 200


def test_a_program_that_raises_ends_alone(engine, monkeypatch) -> None:
    """It raises in the middle of its answer, while others are answered in the same steps."""
    say = Program.say

    def trapped(program: Program) -> Steps:
        steps, found = say(program), None
        while program.params.seed != 13 or len(program.builder.tokens) < program.prompt_tokens + 4:
            try:
                found = yield steps.send(found)
            except StopIteration:
                return
        raise RuntimeError("the ladder fell")

    with engine() as (made, _, client), ThreadPoolExecutor(6) as pool:
        alone = said(client.post(CHAT, json=body(max_tokens=24)))
        monkeypatch.setattr(Program, "say", trapped)
        seeds = [1, 13, 2, 13, 3, 4]
        asked = [pool.submit(client.post, CHAT, json=body(max_tokens=24, seed=seed)) for seed in seeds]
        for seed, answer in zip(seeds, [each.result() for each in asked], strict=True):
            if seed == 13:
                assert answer.status_code == 500 and "ladder" not in answer.text
            else:
                assert said(answer) == alone
        with client.stream("POST", CHAT, json=body(max_tokens=24, seed=13, stream=True)) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "server_error"
        assert made.alive and num_free(made)


def test_a_step_that_fails_ends_those_it_read_for_and_no_thread(engine) -> None:
    with engine() as (made, gate, client), ThreadPoolExecutor(2) as pool:
        alone = said(client.post(CHAT, json=body()))
        gate.open.clear()
        asked = [pool.submit(client.post, CHAT, json=body(seed=seed)) for seed in (1, 2)]
        assert gate.waiting.wait(120)
        gate.fault = RuntimeError("out of memory")
        gate.open.set()
        answers = [each.result() for each in asked]
        failed = [answer for answer in answers if answer.status_code == 500]
        assert failed and "memory" not in "".join(answer.text for answer in answers)
        assert all(answer.headers["connection"] == "close" for answer in failed), "the server closes it behind them"
        assert made.alive and said(client.post(CHAT, json=body())) == alone
        assert client.get("/health").status_code == 200


def test_who_leaves_while_waiting_frees_the_place_at_the_next_step(engine) -> None:
    """Not when those before have ended, or leaving would fill the queue as well as waiting does."""
    with engine(max_running=1) as (made, gate, client), ExitStack() as held:
        gate.let(20)
        first = held.enter_context(client.stream("POST", CHAT, json=body(max_tokens=120, stream=True)))
        lines = first.iter_lines()
        next(lines)
        until(lambda: gate.held)
        left = [held.enter_context(leave_waiting(str(client.base_url))) for _ in range(3)]
        until(lambda: made.load().waiting == 3)
        for each in left:
            each.close()
        until(lambda: [track.cancelled for track in made.waiting] == [True] * 3)
        gate.let(2)  # the one that has begun, and the next
        until(lambda: not made.load().waiting)
        assert made.load().running == 1
        until(lambda: client.get("/health").json()["queue"]["waiting"] == 0)
        gate.open.set()
        assert "[DONE]" in "".join(lines)


def test_an_engine_that_is_closed_tells_every_client_the_end(engine) -> None:
    """Those who are answered, streamed or whole, and those who wait."""
    with engine(max_running=2) as (made, gate, client), ThreadPoolExecutor(6) as pool:
        gate.open.clear()
        asked = [pool.submit(client.post, CHAT, json=body(max_tokens=1000, stream=i % 2 == 0)) for i in range(6)]
        until(lambda: made.load().running + made.load().waiting == 6)
        gate.let(8)
        until(lambda: made.num_steps == 8 and gate.held)
        assert made.load().running == 2 and made.load().waiting == 4
        closing = threading.Thread(target=made.close)
        closing.start()
        gate.open.set()
        closing.join(60)
        for answer in (each.result(60) for each in asked):
            assert answer.status_code in (200, 503) and '"stopping"' in answer.text, answer.text[-300:]
            assert "[DONE]" not in answer.text
        assert not made.alive and client.get("/health").status_code == 503


def test_a_server_that_stops_ends_every_answer(served_by) -> None:
    p, net = network("mask")
    made = Engine(net, p, EngineConfig(path="torch", page=8, cache_tokens=2048, guess="none", max_running=2))
    gate = Gate(made)
    with ThreadPoolExecutor(4) as pool:
        with served_by(made, side=8, drain=1.0) as served:
            address, stream = served.url + CHAT, body(max_tokens=1000, stream=True)
            gate.pause = 0.01
            asked = [pool.submit(httpx.post, address, json=stream, timeout=60) for _ in range(4)]
            until(lambda: made.load().running == 2 and made.num_steps > 4)
        began = time.monotonic()
        for each in asked:
            fault = each.exception(30)
            assert fault is None or isinstance(fault, httpx.TransportError)
    assert time.monotonic() - began < 30 and not made.alive and num_free(made)


def test_a_server_that_is_told_to_stop_ends_what_it_has_begun_and_begins_nothing(served_by) -> None:
    p, net = network("mask")
    made = Engine(net, p, EngineConfig(path="torch", page=8, cache_tokens=2048, guess="none", max_running=2))
    gate = Gate(made)
    with ThreadPoolExecutor(4) as pool:
        with served_by(made, side=8, drain=20.0) as served:
            gate.open.clear()
            whole = body(max_tokens=60) | {"ignore_eos": True}
            asked = [
                pool.submit(httpx.post, served.url + CHAT, json=whole | {"stream": i % 2 == 0}, timeout=60)
                for i in range(4)
            ]
            until(lambda: made.load().running + made.load().waiting == 4)
            gate.let(8)
            until(lambda: made.num_steps == 8 and gate.held)
            gate.pause = 0.01
            gate.open.set()
        answers = [each.result(60) for each in asked]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert all("length" in answer.text for answer in answers)
        with pytest.raises(httpx.ConnectError):
            httpx.post(served.url + CHAT, json=whole)
    assert not made.alive and num_free(made)
