"""The clock for requests gives up who is slow, and nobody else: tests/serve/test_attacks.py has those who are."""

from __future__ import annotations

import json
import threading

from tests.serve.test_attacks import ASK, CHAT, connect, send

RAW = json.dumps(ASK).encode()


def head(*more: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(RAW)}", *more, "", ""]
    return "\r\n".join(lines).encode()


def test_a_client_may_pause_and_its_connection_is_kept(serve) -> None:
    with serve(patience=2.0) as served, connect(served.url) as connection:
        for _ in range(4):  # longer together than the patience for one
            for piece in (head()[:9], head()[9:] + RAW[:5], RAW[5:]):
                threading.Event().wait(0.2)
                connection.sendall(piece)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_a_request(serve, painter) -> None:
    with serve(painter(pause=0.3), patience=1.5) as served:
        assert b" 200 " in send(served.url, head("Connection: close") + RAW)


def test_a_long_body_that_keeps_coming_is_waited_for(serve) -> None:
    """Three pauses of half the patience each, but at more than 16 KiB a second."""
    raw = RAW + b" " * 200_000
    lines = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
    with serve(patience=1.0) as served, connect(served.url) as connection:
        connection.sendall(lines.encode())
        for start in range(0, len(raw), 50_000):
            connection.sendall(raw[start : start + 50_000])
            threading.Event().wait(0.5)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
