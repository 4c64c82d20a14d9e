"""Attacks on the line: what a stranger who reaches the port may try before any model is asked.

Each test is an attack that works on a server written without it in mind; docs/security.md names them one by one.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import litchi.serve

sync = pytest.importorskip("websockets.sync.client")
exceptions = pytest.importorskip("websockets.exceptions")

HERE = Path(litchi.serve.__file__).parent
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


def connect(url: str) -> socket.socket:
    at = urlsplit(url)
    return socket.create_connection((at.hostname, at.port), timeout=30)


def said(connection: socket.socket) -> bytes:
    """All that the server says until it closes."""
    found = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            found += piece
    return found


def send(url: str, raw: bytes) -> bytes:
    """What comes back for bytes on a connection of their own, until the server closes it."""
    with connect(url) as connection:
        with suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(raw)
        return said(connection)


def get(url: str, target: str, *lines: str) -> tuple[int, bytes]:
    """Status and answer of a GET whose target is sent as it stands."""
    host = [] if any(line.lower().startswith("host") for line in lines) else [f"Host: {urlsplit(url).netloc}"]
    head = "\r\n".join([f"GET {target} HTTP/1.1", *host, "Connection: close", *lines, "", ""])
    answer = send(url, head.encode("latin-1"))
    return int(answer.split(b" ", 2)[1]), answer


def is_well(url: str) -> bool:
    """Answered at once: three seconds of this process's own work, in which the server is, and ten of a busy machine."""
    began, worked = time.monotonic(), time.process_time()
    status = httpx.get(f"{url}/health", timeout=20, verify=False).status_code
    return status == 200 and time.monotonic() - began < 10 and time.process_time() - worked < 3


# ---- pickles on sockets -------------------------------------------------------------------------------------------


def test_no_module_of_the_server_can_unpickle_or_run_what_it_is_sent() -> None:
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml", "zmq", "multiprocessing", "importlib"}
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "os.system", "os.popen"}
    found = []
    for path in HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] in modules]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                found.append(f"{path.name}: {ast.unparse(node.func)}")
    assert not found and any(HERE.rglob("*.py"))


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


def listening() -> set[str]:
    """The sockets of this process that accept connections, by inode."""
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()
    ]
    open_ones = {row[9] for row in rows if row[3] == "0A"}
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}").removeprefix("socket:[").removesuffix("]"))
    return found & open_ones


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="sockets are listed by Linux")
def test_a_pickle_on_the_only_listening_socket_is_a_bad_request(serve, tmp_path: Path) -> None:
    before = listening()
    with serve() as served:
        assert len(listening() - before) == 1
        raw = pickle.dumps(Payload(tmp_path / "made"))
        for kind in (raw, len(raw).to_bytes(4, "little") + raw, b"\x80" + raw + b"\r\n\r\n"):
            assert send(served.url, kind + b"\r\n\r\n").startswith(b"HTTP/1.1 400")
        answer = httpx.post(served.url + CHAT, content=raw, headers={"Content-Type": "application/python-pickle"})
        assert answer.status_code == 400
        assert not (tmp_path / "made").exists() and is_well(served.url)


# ---- requests within requests -------------------------------------------------------------------------------------

INNER = "GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n"
SMUGGLED = {
    "both lengths": ("Content-Length: {n}\r\nTransfer-Encoding: chunked", "0\r\n\r\n" + INNER),
    "both, the other order": ("Transfer-Encoding: chunked\r\nContent-Length: 4", "0\r\n\r\n" + INNER),
    "two lengths": ("Content-Length: 0\r\nContent-Length: {n}", INNER),
    "a list of lengths": ("Content-Length: 0, {n}", INNER),
    "a signed length": ("Content-Length: +0", INNER),
    "a length in hexadecimal": ("Content-Length: 0x0", INNER),
    "a coding nobody has": ("Transfer-Encoding: xchunked", "0\r\n\r\n" + INNER),
    "two codings": ("Transfer-Encoding: chunked, identity", "0\r\n\r\n" + INNER),
    "twice chunked": ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "0\r\n\r\n" + INNER),
    "blank before the colon": ("Transfer-Encoding : chunked", "0\r\n\r\n" + INNER),
    "a control character": ("Transfer-Encoding: \x0bchunked", "0\r\n\r\n" + INNER),
    "a signed chunk": ("Transfer-Encoding: chunked", "+0\r\n\r\n" + INNER),
    "a chunk that is longer than it says": ("Transfer-Encoding: chunked", "1\r\nabc\r\n0\r\n\r\n" + INNER),
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_request_within_a_request_is_not_answered(door, name: str) -> None:
    host = urlsplit(door.url).netloc
    head, body = SMUGGLED[name]
    body = body.format(host=host)
    raw = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\n{head.format(n=len(body))}\r\n\r\n{body}"
    answer = send(door.url, raw.encode("latin-1"))
    assert answer.count(b"HTTP/1.1 ") == 1 and answer[9:12] in (b"400", b"501"), answer
    assert b'"owned_by"' not in answer and is_well(door.url)


# ---- floods and slowness ------------------------------------------------------------------------------------------


def test_endless_heads_are_cut_off(door) -> None:
    line = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    floods = [b"GET /" + b"a" * 4_000_000, line + b"A: " + b"a" * 4_000_000, line + b"A: b\r\n" * 500_000]
    floods += [b"\0" * 4_000_000, b"\r\n" * 2_000_000, line + b"a" * 4_000_000]
    floods += [f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + more
               for more in (b"1;" + b"a" * 4_000_000, b"0\r\n" + b"A: b\r\n" * 500_000)]  # fmt: skip
    for raw in floods:
        answer = send(door.url, raw)
        assert answer[9:12] in (b"", b"400", b"431"), answer[:100]
    assert is_well(door.url)


HALF = [b"", b"GET", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nA", b"POST " + CHAT.encode() + b" HTTP/1.1\r\n"]
BODY = b"POST " + CHAT.encode() + b' HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{"'
CHUNK = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{"
SECOND = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + BODY


def test_clients_that_stop_half_way_are_given_up_and_hinder_nobody(serve) -> None:
    with serve(patience=3.0) as served, ExitStack() as held:
        slow = []
        for begun in (*HALF, BODY, CHUNK, SECOND) * 20:
            slow.append(held.enter_context(connect(served.url)))
            slow[-1].sendall(begun)
        assert is_well(served.url) and httpx.post(served.url + CHAT, json=ASK).status_code == 200
        answers = [said(each) for each in slow]
        assert all(b" 408 " in answer for answer in answers)
        assert is_well(served.url)


def test_a_drop_now_and_then_does_not_keep_a_connection(serve) -> None:
    """Slowloris proper: there is always one more byte."""
    with serve(patience=0.4) as served:
        for begun, drop in ((HALF[2], b"\r\nA: b"), (BODY, b"a"), (CHUNK, b"a"), (b"", b"\r\n"), (SECOND, b" ")):
            pace, began = threading.Event(), time.monotonic()
            with connect(served.url) as connection, suppress(ConnectionError):
                connection.sendall(begun)
                while time.monotonic() - began < 20:
                    pace.wait(0.05)
                    connection.sendall(drop)
            assert time.monotonic() - began < 15, begun


# ---- sockets of worlds --------------------------------------------------------------------------------------------


def world_of(url: str, **more: object):
    return sync.connect(url.replace("http", "ws") + "/v1/worlds", **more)


def test_a_message_over_the_limit_ends_its_socket_however_it_is_packed(serve) -> None:
    big = json.dumps({"type": "start", "image": "a" * 3_000_000})
    packed = json.dumps({"type": "start", "image": "a" * 80_000_000})  # 80 kB on the line
    with serve(max_body_bytes=100_000) as served:
        for message, compression in (
            (big, None),
            (packed, "deflate"),
            ([big[i : i + 9000] for i in range(0, 999_000, 9000)], None),
        ):
            with world_of(served.url, compression=compression) as socket:
                with pytest.raises(exceptions.ConnectionClosed) as found:
                    socket.send(message)
                    socket.recv(timeout=30)
                assert found.value.rcvd is None or found.value.rcvd.code == 1009
        assert is_well(served.url)


def test_sockets_beyond_the_limit_are_turned_away_and_places_come_back(serve) -> None:
    with serve(max_worlds=3) as served:
        for _ in range(3):
            with ExitStack() as held:
                sockets = [held.enter_context(world_of(served.url)) for _ in range(8)]
                for socket in sockets:
                    with suppress(exceptions.ConnectionClosed):
                        socket.send('{"type": "start", "seed": 0}')
                kinds = [json.loads(socket.recv(timeout=30))["type"] for socket in sockets]
                assert kinds == ["frame"] * 3 + ["error"] * 5
            ends = time.monotonic() + 60
            while httpx.get(f"{served.url}/health", verify=False).json()["worlds"]:
                assert time.monotonic() < ends, "their places were not given back"
                threading.Event().wait(0.01)
