"""Attacks by addresses of pictures on a server that does fetch from some hosts: nobody else is reached or told of.

Each test is an attack that works on a server written without it in mind; docs/security.md names them one by one.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from litchi.serve import exchange, fetch
from litchi.serve.fetch import Fetcher, is_permitted
from tests.serve.test_attacks import CHAT, is_well
from tests.serve.test_attacks_by_pictures import png, shows
from tests.serve.test_attacks_in_bodies import ask, within

Answer = Callable[[socket.socket], None]
NAME = "pictures.test"


def picture() -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(np.full((64, 64, 3), (255, 0, 0), np.uint8)).save(out, "PNG")
    return out.getvalue()


def says(body: bytes, status: str = "200 OK", *lines: str, length: int | None = None) -> Answer:
    size = len(body) if length is None else length
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {size}", *lines, "", ""]).encode()
    return lambda line: line.sendall(head + body)


class Host:
    """A real server on loopback, which answers each path as it is told and keeps every head that it heard."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heard: list[bytes] = []
        self.sent = 0
        self.paths: dict[str, Answer] = {"/a.png": says(picture())}
        self.over = threading.Event()
        self.lines: list[socket.socket] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            self.lines.append(line)
            threading.Thread(target=self.answer, args=(line,), daemon=True).start()

    def answer(self, line: socket.socket) -> None:
        head = b""
        with contextlib.suppress(OSError), line:
            while b"\r\n\r\n" not in head and (piece := line.recv(4096)):
                head += piece
            self.heard.append(head)
            path = head.split(b" ")[1].decode("latin-1") if head.count(b" ") > 1 else ""
            self.paths.get(path, says(b"no such thing", "404 Not Found"))(line)

    def endless(self, head: bytes, piece: bytes, pause: float = 0.0) -> Answer:
        def answer(line: socket.socket) -> None:
            line.sendall(head)
            while not self.over.wait(pause) if pause else not self.over.is_set():
                line.sendall(piece)
                self.sent += len(piece)

        return answer

    def url(self, path: str = "/a.png", name: str = NAME) -> str:
        return f"http://{name}:{self.port}{path}"

    def close(self) -> None:
        self.over.set()
        for each in (self.listener, *self.lines):
            each.close()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def names(monkeypatch) -> dict[str, list[str]]:
    """What names stand for: the system's answer, but for those in the table."""
    table, real = {NAME: ["127.0.0.1"]}, socket.getaddrinfo

    def resolve(name, port, *rest, **more):
        found = [real(each, port, *rest, **more) for each in table.get(name, [name])]
        return [row for rows in found for row in rows]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return table


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(exchange, "Fetcher", lambda *hosts: Fetcher(*hosts, seconds=0.6))


@contextlib.contextmanager
def fetching(serve, host: Host, **more: object) -> Iterator:
    """A door that may fetch from the host, though it is on loopback."""
    with serve(fetch_inner_hosts=(f"http://{NAME}:{host.port}",), **more) as served:
        yield served


def no_line() -> socket.socket:
    raise ConnectionRefusedError


# ---- whom -----------------------------------------------------------------------------------------------------------


def test_no_spelling_of_a_host_passes_for_a_listed_one(serve, host, names, monkeypatch) -> None:
    """The trap answers with a picture, so that whoever is led there is answered 200."""
    monkeypatch.setattr(fetch, "is_permitted", lambda *_, **__: True)  # the list stands alone, without a second wall
    trap = Host()
    at, good = f"127.0.0.1:{trap.port}", f"{NAME}:{host.port}"
    names |= {f"{NAME}.evil.test": ["127.0.0.1"], "localtest.me": ["127.0.0.1"]}
    hosts = [at, f"127.1:{trap.port}", f"0x7f000001:{trap.port}", f"2130706433:{trap.port}", f"0177.0.0.1:{trap.port}"]
    hosts += [
        f"[::ffff:127.0.0.1]:{trap.port}",
        f"localtest.me:{trap.port}",
        f"{NAME}:{trap.port}",
        f"{NAME}.:{trap.port}",
    ]
    hosts += [f"{NAME}@{at}", f"{good}@{at}", f"{good}%40{at}", f"{at}#@{good}", f"{at}\\@{good}", f"{at}?@{good}"]
    hosts += [f"{NAME}.evil.test:{trap.port}", f"{at}%23@{good}", f"{at}%00.{good}", f"{good}\t@{at}", f"{at} {good}"]
    hosts += [f"{NAME}%2eevil.test:{trap.port}", f"①②⑦.0.0.1:{trap.port}", f"{NAME}:{host.port}0", f":@{at}", f"@{at}"]
    with fetching(serve, host) as served:
        for url in [f"{kind}://{each}/a.png" for each in hosts for kind in ("http", "HTTP", "https")]:
            assert ask(served.url, shows(url))[0] == 400, url
        assert not trap.heard and not host.heard
        for spelled in (host.url(), host.url().upper().replace("/A.PNG", "/a.png")):
            assert ask(served.url, shows(spelled))[0] == 200
    trap.close()


def test_a_listed_name_that_stands_for_an_inner_address_is_not_connected_to(serve, host, names, monkeypatch) -> None:
    dialled: list = []
    monkeypatch.setattr(fetch, "dial", lambda rows, until: dialled.append(rows) or no_line())
    stands = "localtest.me=127.0.0.1 six.test=::1 mapped.test=::ffff:127.0.0.1 ten.test=10.0.0.1 any.test=0.0.0.0 "
    stands += "cloud.test=169.254.169.254 shared.test=100.64.0.1 ula.test=fd00::1 nat.test=64:ff9b::7f00:1 "
    stands += "link.test=fe80::1 many.test=224.0.0.1 azure.test=168.63.129.16 old.test=2002:7f00:1:: "
    names |= {name: [address] for name, address in (each.split("=") for each in stands.split())}
    names["both.test"] = ["93.184.216.34", "127.0.0.1"]
    hosts = [*names, "127.0.0.1", "127.1", "0x7f000001", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "localhost"]
    with serve(fetch_hosts=tuple(f"http://{name}:{host.port}" for name in hosts)) as served:
        for name in hosts:
            assert ask(served.url, shows(host.url(name=name)))[0] == 400, name
    assert not dialled and not host.heard
    inner = "10.1.2.3 127.9.9.9 172.16.0.1 192.168.1.1 100.64.0.1 ::1 fd12::1".split()
    never = (
        "169.254.169.254 100.100.100.200 fd00:ec2::254 0.0.0.0 255.255.255.255 fe80::1 ::ffff:10.0.0.1 ff02::1".split()
    )
    assert [is_permitted(each, inner=True) for each in inner + never] == [True] * len(inner) + [False] * len(never)
    assert not any(is_permitted(each, inner=False) for each in inner + never)
    assert is_permitted("93.184.216.34", inner=False) and is_permitted("2606:4700::1", inner=False)


def test_a_name_that_changes_between_check_and_connection_is_connected_to_as_checked(serve, host, monkeypatch) -> None:
    """DNS rebinding: the name is public when it is looked up first, and loopback from then on."""
    answers, asked, real = iter(["93.184.216.34"]), [], socket.getaddrinfo
    met, connect = [], socket.socket.connect

    def resolve(name, port, *rest, **more):
        asked.append(name)
        return real(next(answers, "127.0.0.1") if name == NAME else name, port, *rest, **more)

    def met_there(self, address):
        if address[0].startswith("93."):
            met.append(address)
            raise ConnectionRefusedError
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", met_there)
    with serve(fetch_hosts=(f"http://{NAME}:{host.port}",)) as served:
        assert ask(served.url, shows(host.url()))[0] == 400
        assert met == [("93.184.216.34", host.port)] and asked.count(NAME) == 1 and not host.heard
        assert ask(served.url, shows(host.url()))[0] == 400  # loopback by now
    assert not host.heard


def test_no_redirect_is_followed(serve, host, names) -> None:
    trap = Host()
    goals = [
        "file:///etc/passwd",
        f"http://127.0.0.1:{trap.port}/a.png",
        host.url("/secret.png"),
        "//127.1/",
        "/secret.png",
    ]
    goals += ["gopher://127.0.0.1:1/", "http://169.254.169.254/latest/meta-data/", f"data:image/png;base64,{'A' * 40}"]
    host.paths["/secret.png"] = says(picture())
    for index, goal in enumerate(goals):
        for status in ("301 Moved", "302 Found", "303 Other", "307 Same", "308 Same"):
            host.paths[f"/{index}/{status[:3]}"] = says(picture(), status, f"Location: {goal}")
        host.paths[f"/{index}/200"] = says(b"<html>", "200 OK", f"Refresh: 0; url={goal}", f"Location: {goal}")
    paths = [path for path in host.paths if path.count("/") == 2]
    with fetching(serve, host) as served:
        for path in paths:
            assert ask(served.url, shows(host.url(path)))[0] == 400, path
    assert [head.split(b" ")[1].decode() for head in host.heard] == paths and not trap.heard
    trap.close()


def test_no_other_scheme_is_known(serve, host, names) -> None:
    kinds = "file ftp gopher dict ldap sftp smb s3 jar netdoc php unix ws wss view-source".split()
    with fetching(serve, host) as served:
        for kind in [*kinds, "http+unix", "https+http", "url:http", " http", "http:http"]:
            for rest in (f"://{NAME}:{host.port}/a.png", ":///etc/passwd", ":/etc/passwd", ":/a.png"):
                assert ask(served.url, shows(kind + rest))[0] == 400, kind + rest
        for odd in (
            f"http:/{NAME}/a",
            f"http:{NAME}:{host.port}/a.png",
            f"//{NAME}:{host.port}/a.png",
            "http://",
            "http:///a",
        ):
            assert ask(served.url, shows(odd))[0] == 400, odd
    assert not host.heard


def test_an_address_writes_no_second_line_and_carries_no_key(serve, host, names) -> None:
    with fetching(serve, host, api_key="secret") as served:
        key = {"Authorization": "Bearer secret", "Cookie": "session=1"}
        for odd in ("/a.png\r\nX-Evil: 1", "/a.png HTTP/1.1\r\n\r\nGET /b", "/a.png\nX: 1", "/\u010a", "/a b", "/\x00"):
            assert httpx.post(served.url + CHAT, json=shows(host.url(odd)), headers=key).status_code == 400
        assert not host.heard
        assert httpx.post(served.url + CHAT, json=shows(host.url("/a.png")), headers=key).status_code == 200
        [head] = host.heard
        assert head.startswith(b"GET /a.png HTTP/1.1\r\n") and b"Accept-Encoding: identity\r\n" in head
        assert not any(word in head.lower() for word in (b"secret", b"cookie", b"authorization", b"referer", b"x-evil"))


def test_no_proxy_of_the_environment_is_asked(serve, host, names, monkeypatch) -> None:
    trap = Host()
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{trap.port}")
    with fetching(serve, host) as served:
        body = shows(host.url())
        with httpx.Client(trust_env=False) as client:
            assert client.post(served.url + CHAT, json=body).status_code == 200
    assert len(host.heard) == 1 and not trap.heard
    trap.close()


def test_a_host_proves_its_name(serve, host, names, monkeypatch, tmp_path) -> None:
    """Somebody on the way who answers for a host: with a certificate of nobody's, of another host's, out of date."""
    trustme, ssl = pytest.importorskip("trustme"), pytest.importorskip("ssl")
    good, bad = trustme.CA(), trustme.CA()
    roots = tmp_path / "roots.pem"
    good.cert_pem.write_to_path(str(roots))
    monkeypatch.setenv("SSL_CERT_FILE", str(roots))
    past = datetime(2020, 1, 1)
    certs = {"good": good.issue_cert(NAME), "other": good.issue_cert("evil.test"), "nobody": bad.issue_cert(NAME)}
    certs["old"] = good.issue_cert(NAME, not_before=past, not_after=past.replace(year=2021))
    plain = host.answer
    for kind, cert in certs.items():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cert.configure_cert(context)

        def answer(line: socket.socket, context=context) -> None:
            with contextlib.suppress(OSError), line:
                plain(context.wrap_socket(line, server_side=True))

        monkeypatch.setattr(host, "answer", answer)
        with serve(fetch_inner_hosts=(f"{NAME}:{host.port}",)) as served:
            body = shows(f"https://{NAME}:{host.port}/a.png")
            assert ask(served.url, body)[0] == (200 if kind == "good" else 400), kind
            assert len(host.heard) == 1, kind


# ---- what it answers ------------------------------------------------------------------------------------------------


def test_a_body_without_end_is_cut_off(serve, host, names) -> None:
    ok = b"HTTP/1.1 200 OK\r\n"
    host.paths |= {
        "/body": host.endless(ok + b"\r\n", bytes(65_536)),
        "/lies": host.endless(ok + b"Content-Length: 10000000000\r\n\r\n", bytes(65_536)),
        "/chunks": host.endless(ok + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(65_536) + b"\r\n"),
        "/crumbs": host.endless(ok + b"Transfer-Encoding: chunked\r\n\r\n", (b"1;" + b"x" * 4000 + b"\r\na\r\n") * 16),
        "/minus": host.endless(ok + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", bytes(65_536)),
        "/trailer": host.endless(ok + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 10_000),
        "/line": host.endless(b"HTTP/1.1 200 ", b"x" * 65_536),
        "/heads": host.endless(ok, b"X: y\r\n" * 10_000),
        "/goon": host.endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2000),
    }
    with fetching(serve, host, max_image_bytes=100_000) as served:
        for path in list(host.paths)[1:]:
            host.sent = 0
            with within(60 << 20):
                began = time.monotonic()
                assert ask(served.url, shows(host.url(path)))[0] == 400, path
            assert time.monotonic() - began < 15 and host.sent < 16 << 20, (
                path
            )  # of which most lies in the system's buffers
        assert is_well(served.url)


def test_a_slow_answer_is_given_up_and_hinders_nobody(serve, host, names, quick) -> None:
    drop = host.endless(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", 0.05)
    host.paths |= {"/body": drop, "/heads": host.endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.05)}
    host.paths |= {"/start": host.endless(b"", b"H", 0.05), "/never": lambda line: host.over.wait(30) and None}
    with fetching(serve, host) as served:
        for path in list(host.paths)[1:]:
            began = time.monotonic()
            with contextlib.ExitStack() as stack:
                others = stack.enter_context(contextlib.closing(Background(served.url, shows(*[host.url(path)] * 8))))
                assert is_well(served.url)
                assert others.status() == 400, path
            assert 0.4 < time.monotonic() - began < 10, path  # for eight pictures together


class Background:
    """A question asked in another thread."""

    def __init__(self, url: str, body: object) -> None:
        self.found: list[int] = []
        self.thread = threading.Thread(target=lambda: self.found.append(ask(url, body)[0]))
        self.thread.start()

    def status(self) -> int:
        self.thread.join(30)
        return self.found[0]

    def close(self) -> None:
        self.thread.join(30)


def test_a_handshake_or_a_name_that_never_ends_is_given_up(serve, host, names, quick, monkeypatch) -> None:
    host.paths |= {"": lambda line: host.over.wait(30) and None}
    resolve, over = socket.getaddrinfo, threading.Event()

    def slow(name, *rest, **more):
        if name == "slow.test":
            over.wait(30)
        return resolve(name, *rest, **more)

    with serve(fetch_inner_hosts=(f"{NAME}:{host.port}", "slow.test")) as served:
        began = time.monotonic()
        assert ask(served.url, shows(f"https://{NAME}:{host.port}/a.png"))[0] == 400
        monkeypatch.setattr(socket, "getaddrinfo", slow)
        assert ask(served.url, shows("https://slow.test/a.png"))[0] == 400
        assert time.monotonic() - began < 15
        over.set()


def test_no_more_are_fetched_at_once_than_there_are_places(serve, host, names, monkeypatch) -> None:
    """Else a slow host takes every thread that reads bodies, and nobody is answered."""
    monkeypatch.setattr(fetch, "MAX_AT_ONCE", 2)
    host.paths["/never"] = lambda line: host.over.wait(30) and None
    with fetching(serve, host) as served:
        waiting = [Background(served.url, shows(host.url("/never"))) for _ in range(2)]
        began = time.monotonic()
        while len(host.heard) < 2 and time.monotonic() - began < 15:
            time.sleep(0.01)
        answer = httpx.post(served.url + CHAT, json=shows(host.url()))
        assert answer.status_code == 429 and answer.headers["retry-after"] and is_well(served.url)
        host.over.set()
        assert [each.status() for each in waiting] == [400, 400]
        assert ask(served.url, shows(host.url()))[0] == 200


def test_what_is_packed_is_not_unpacked(serve, host, names) -> None:
    bomb = gzip.compress(bytes(64 << 20), 9)
    kinds = ("gzip", "x-gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "GZIP")
    for index, kind in enumerate(kinds):
        body = bomb if index % 2 else picture()  # which only says that it is packed
        host.paths[f"/{index}"] = says(body, "200 OK", f"Content-Encoding: {kind}")
    host.paths["/whole"] = says(gzip.compress(picture()), "200 OK", "Content-Encoding: gzip")
    with fetching(serve, host) as served:
        for path in list(host.paths)[1:]:
            with within(20 << 20):
                assert ask(served.url, shows(host.url(path)))[0] == 400, path


def test_pictures_that_were_fetched_pass_the_same_bounds(serve, host, names) -> None:
    host.paths |= {
        "/pixels": says(png(60_000, 60_000, b"x")),
        "/svg": says(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        "/tiff": says(b"II*\0" + bytes(99)),
        "/large": says(picture() + bytes(9 << 20)),
        "/short": says(picture(), length=len(picture()) + 9),
        "/cut": says(picture()[:60]),
        "/empty": says(b""),
    }
    with fetching(serve, host) as served:
        for path in list(host.paths)[1:]:
            with within(60 << 20):
                assert ask(served.url, shows(host.url(path)))[0] == 400, path
        assert ask(served.url, shows(*[host.url()] * 9))[0] == 400
        assert len(host.heard) == 7, "nine pictures are refused before the first is fetched"


def test_who_asks_is_not_told_what_a_host_answered(serve, host, names) -> None:
    """Else the door maps the network behind it: what listens, what is there, and what asks for a password."""
    kinds = ("404 Not Found", "401 Unauthorized", "403 No", "500 Broken", "204 None", "206 Part", "200 OK", "999 What")
    for index, status in enumerate(kinds):
        host.paths[f"/{index}"] = says(b"the password is swordfish", status, "WWW-Authenticate: Basic realm=inner")
    host.paths["/odd"] = lambda line: line.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    host.paths["/gone"] = lambda line: None
    with socket.create_server(("127.0.0.1", 0)) as shut:
        closed = shut.getsockname()[1]
    listed = tuple(f"http://{name}" for name in (f"{NAME}:{host.port}", f"{NAME}:{closed}", "nowhere.invalid"))
    names["nowhere.invalid"] = []
    urls = [host.url(path) for path in list(host.paths)[1:]]
    urls += [f"http://{NAME}:{closed}/a.png", "http://nowhere.invalid/a.png"]
    with serve(fetch_inner_hosts=listed) as served:
        told = {ask(served.url, shows(url)) for url in urls}
    assert len(told) == 1 and next(iter(told))[0] == 400, told
