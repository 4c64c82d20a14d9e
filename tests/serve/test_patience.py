"""The clock for requests gives up who is slow, and nobody else: tests/serve/test_attacks.py has those who are.

The time of these tests is told by them, so that a machine that stands still for seconds makes nobody slow.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from litchi.serve import patience
from litchi.serve.patience import Patient
from tests.serve.test_attacks import ASK, CHAT, connect, said, send

RAW = json.dumps(ASK).encode()


class Clock:
    """The time that a server's protocols believe it is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made: list[Any] = []
        """All protocols, one for each connection."""

    def goes(self, seconds: float) -> None:
        """Let time pass, and what is due by then happen; returns when it has."""
        self.now += seconds
        for protocol in list(self.made):
            done = threading.Event()
            protocol.loop.call_soon_threadsafe(lambda p=protocol, done=done: (p.look(), done.set()))
            assert done.wait(60)

    def patient(self, seconds: float) -> type[Patient]:
        clock = self

        class Told(Patient):
            """Rings by the told time."""

            patience = seconds
            due: float | None = None

            def connection_made(self, transport: Any) -> None:
                self.loop = Loop(self.loop, clock, self)
                clock.made.append(self)
                super().connection_made(transport)

            def look(self) -> None:
                if self.due is not None and self.due <= clock.now:
                    self.due = None
                    self.ring()

        return Told


class Loop:
    """A protocol's loop, but for the time and the clock of its patience."""

    def __init__(self, real: Any, clock: Clock, protocol: Any) -> None:
        self.real, self.clock, self.protocol = real, clock, protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def time(self) -> float:
        return self.clock.now

    def call_later(self, seconds: float, what: Callable, *more: object) -> Any:
        if what != self.protocol.ring:
            return self.real.call_later(60 * seconds, what, *more)  # how long uvicorn keeps idle lines
        self.protocol.due = self.clock.now + seconds
        return self

    def cancel(self) -> None:
        self.protocol.due = None


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(patience, "patient", made.patient)
    return made


def until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends, "it did not come about"
        threading.Event().wait(0.002)


def head(*more: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(RAW)}", *more, "", ""]
    return "\r\n".join(lines).encode()


def test_a_client_may_pause_and_its_connection_is_kept(serve, clock) -> None:
    with serve(patience=2.0) as served, connect(served.url) as connection:
        for _ in range(4):  # longer together than the patience for one
            for piece in (head()[:9], head()[9:] + RAW[:5], RAW[5:]):
                clock.goes(0.6)
                connection.sendall(piece)
            answer = b""
            while not answer.endswith(b"}}"):
                piece = connection.recv(65_536)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200")


def test_who_pauses_for_longer_is_given_up(serve, clock) -> None:
    with serve(patience=2.0) as served, connect(served.url) as connection:
        connection.sendall(head() + RAW[:5])
        until(lambda: bool(clock.made and clock.made[0].received))
        clock.goes(1.9)
        connection.sendall(RAW[5:9])
        until(lambda: clock.made[0].received == len(head()) + 9)
        clock.goes(0.2)
        assert b" 408 " in said(connection)


def test_an_answer_may_take_longer_than_a_request(serve, painter, clock) -> None:
    slow = painter()
    slow.gate.clear()

    def later() -> None:
        until(lambda: bool(slow.requests))
        clock.goes(100.0)
        slow.gate.set()

    with serve(slow, patience=1.5) as served:
        waits = threading.Thread(target=later)
        waits.start()
        assert b" 200 " in send(served.url, head("Connection: close") + RAW)
        waits.join()


def test_a_long_body_that_keeps_coming_is_waited_for(serve, clock) -> None:
    """Four pauses of half the patience each, but at more than 16 KiB a second."""
    raw = RAW + b" " * 200_000
    lines = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
    with serve(patience=1.0) as served, connect(served.url) as connection:
        connection.sendall(lines.encode())
        for start in range(0, len(raw), 50_000):
            connection.sendall(raw[start : start + 50_000])
            come = len(lines) + min(start + 50_000, len(raw))
            if come < len(lines) + len(raw):
                until(lambda come=come: bool(clock.made) and clock.made[0].received == come)
                clock.goes(0.5)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
