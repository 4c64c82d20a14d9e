"""Pictures by address: from listed hosts, at the very address that was checked, within bounds, and nothing else told.

A server that fetches for strangers reaches what they cannot. So a name is resolved once and all that it means must be
public, the connection goes there and nowhere else, no redirect is followed, nothing is unpacked, and whatever fails is
told in the same words: who asks does not learn whether something listens, or what it said.
"""

from __future__ import annotations

import http.client
import io
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from litchi.config import BadInput
from litchi.serve.worker import Busy

log = logging.getLogger("litchi.serve")
T = TypeVar("T")

SECONDS = 10.0
"""For all pictures of one request together, whatever the time goes to."""
MAX_AT_ONCE = 16
"""Of the 40 threads that read bodies; who comes when all are out is asked to come again."""
MAX_NAMES = 4
"""Names that are resolved at once: the system's resolver cannot be stopped."""
SPARE = 1 << 20
"""Bytes that the heads and chunks of one answer may take beside the picture."""

ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?:(?P<name>[a-z0-9.-]{1,253})|\[(?P<six>[0-9a-f:.]{2,45})\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?](?:(?![#\\])[!-~]){0,2048})?",
    re.ASCII | re.IGNORECASE,
)
"""Far less than RFC 3986 has: no user, no escapes in a host, no blanks, no fragment; no two read it apart."""

NEVER = tuple(
    map(
        ip_network,
        "0.0.0.0/8 100.100.100.200/32 168.63.129.16/32 169.254.0.0/16 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 "
        "198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 fd00:ec2::254/128 fd20:ce::254/128 2001::/23 "
        "2001:db8::/32 2002::/16 3fff::/20".split(),
    )
)
"""Special, reserved, multicast, clouds' metadata services (169.254 and elsewhere), and IPv6 that carries IPv4."""
INNER = tuple(
    map(ip_network, "10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7".split())
)
"""What only somebody's own network reaches."""
PUBLIC = (ip_network("0.0.0.0/0"), ip_network("2000::/3"))
"""All of IPv4, and what of IPv6 is given out: no ::ffff:0:0/96 (mapped), 64:ff9b::/96 (NAT64), fe80::/10 (local)."""


class Unfit(Exception):
    """What came is not what was asked for; said to the log only."""


@dataclass(frozen=True, slots=True)
class Host:
    """Whom a picture may be fetched from. The port is part of it."""

    scheme: str
    name: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Until:
    """A moment of `time.monotonic`."""

    end: float

    def left(self) -> float:
        """Seconds, more than none. Raises TimeoutError."""
        if (left := self.end - time.monotonic()) <= 0:
            raise TimeoutError("it took too long")
        return left


class Fetcher:
    """Fetches for all requests. Any thread may call."""

    def __init__(self, hosts: Iterable[str], inner: Iterable[str] = (), seconds: float = SECONDS) -> None:
        """`inner` hosts may be at private addresses too. Raises BadInput for what is no host."""
        self.inner = frozenset(listed(entry, "serve.fetch_inner_hosts") for entry in inner)
        self.hosts = self.inner | frozenset(listed(entry, "serve.fetch_hosts") for entry in hosts)
        self.seconds = seconds
        self.places = threading.BoundedSemaphore(MAX_AT_ONCE)
        self.names = ThreadPoolExecutor(MAX_NAMES, thread_name_prefix="litchi-names")
        self.tls = ssl.create_default_context()

    def visit(self) -> Visit:
        """The fetches of one request."""
        return Visit(self)

    def fetch(self, host: Host, target: str, most: int, until: Until) -> bytes:
        """At most `most` bytes. Raises OSError, ValueError, HTTPException or Unfit; of Busy the caller may know."""
        if not self.places.acquire(blocking=False):
            raise Busy(1)
        try:
            with self.connect(host, until) as line:
                return ask(line, host, target, most, until)
        finally:
            self.places.release()

    def connect(self, host: Host, until: Until) -> socket.socket:
        """A line to an address that was checked, TLS with the host's name proved where it is wanted."""
        line = dial(self.resolve(host, until), until)
        if host.scheme == "http":
            return line
        line.settimeout(until.left())  # of the whole handshake
        try:
            return self.tls.wrap_socket(line, server_hostname=host.name)
        except BaseException:
            line.close()
            raise

    def resolve(self, host: Host, until: Until) -> list[tuple[Any, ...]]:
        """What `getaddrinfo` says of a host, once, and all of it may be connected to."""
        found = self.names.submit(socket.getaddrinfo, host.name, host.port, type=socket.SOCK_STREAM)
        rows = found.result(until.left())
        for row in rows:
            # One bad address among good ones is a trap, not a spare.
            if not is_permitted(str(row[4][0]), inner=host in self.inner):
                raise Unfit("its name stands for an address that is not public")
        return rows


@dataclass(slots=True)
class Visit:
    """What one request has fetched, by one thread; the time runs from the first."""

    fetcher: Fetcher
    until: Until | None = None

    def read(self, url: str, most: int, where: str, decode: Callable[[bytes], T]) -> T:
        """What `decode` makes of at most `most` bytes at an address. Raises BadInput, Busy."""
        host, target = place_of(url, where)
        if host not in self.fetcher.hosts:
            raise BadInput(f"{where}: nothing is fetched from this host; send the picture as data:image/png;base64,...")
        self.until = self.until or Until(time.monotonic() + self.fetcher.seconds)
        try:
            return decode(self.fetcher.fetch(host, target, most, self.until))
        except (OSError, ValueError, http.client.HTTPException, Unfit) as error:  # BadInput is a ValueError
            log.info("nothing was fetched from %s: %s: %s", host, type(error).__name__, str(error)[:200])
        mend = "send it as data:image/png;base64,..."
        raise BadInput(f"{where}: nothing that can be read was fetched from this address; {mend}")


def is_address(url: str) -> bool:
    return re.match(r"https?:", url, re.IGNORECASE) is not None


def place_of(url: str, where: str) -> tuple[Host, str]:
    """Host and target of an address. Raises BadInput for one that could be read in two ways."""
    found = ADDRESS.fullmatch(url)
    if found is None:
        raise BadInput(f"{where} must be a plain https://HOST/PATH without user or fragment, escaped where not ASCII")
    scheme, target = found["scheme"].lower(), found["target"] or "/"
    host = Host(scheme, (found["name"] or found["six"]).lower(), int(found["port"] or (443, 80)[scheme == "http"]))
    return host, target if target[0] == "/" else f"/{target}"


def listed(entry: str, setting: str) -> Host:
    """`HOST` or `HOST:PORT`, by https unless it says `http://`. Raises BadInput."""
    found = ADDRESS.fullmatch(entry if "://" in entry else f"https://{entry}")
    if found is None or found["target"]:
        raise BadInput(f"{setting} holds {entry!r}; give HOST, HOST:PORT or http://HOST")
    return place_of(found[0], setting)[0]


def is_permitted(address: str, *, inner: bool) -> bool:
    """Whether strangers may have us connect to an address; with `inner` also to one of a private network."""
    ip = ip_address(address)
    if any(ip in network for network in NEVER):
        return False
    within = any(ip in network for network in INNER)
    return inner if within else any(ip in network for network in PUBLIC)


def dial(rows: list[tuple[Any, ...]], until: Until) -> socket.socket:
    """A connection to the first that answers. Numbers only: no name is resolved again."""
    fault: Exception = Unfit("its name stands for nothing")
    for family, kind, protocol, _, address in rows:
        line = socket.socket(family, kind, protocol)
        try:
            line.settimeout(until.left())
            line.connect(address)
            return line
        except OSError as error:
            line.close()
            fault = error
    raise fault


def ask(line: socket.socket, host: Host, target: str, most: int, until: Until) -> bytes:
    """The body of a GET, as it is sent."""
    shown = f"[{host.name}]" if ":" in host.name else host.name
    port = "" if host.port == {"http": 80, "https": 443}[host.scheme] else f":{host.port}"
    head = (f"GET {target} HTTP/1.1", f"Host: {shown}{port}", "Accept: image/*, video/*", "Accept-Encoding: identity")
    line.settimeout(until.left())
    line.sendall("\r\n".join((*head, "User-Agent: litchi", "Connection: close", "", "")).encode("ascii"))
    # A response of http.client alone: a connection of it would open another line where this one is closed.
    response = http.client.HTTPResponse(Heard(line, most + SPARE, until), method="GET")  # pyrefly: ignore
    with response:
        response.begin()
        if response.status != 200:
            raise Unfit(f"it answered {response.status}, and only 200 is read")
        if response.getheader("Content-Encoding", "identity").strip().lower() != "identity":
            raise Unfit("it is packed")
        body = response.read(most + 1)
        if len(body) > most:
            raise Unfit(f"it has more than {most} bytes")
        if response.length:
            raise Unfit("it is cut off")
        return body


class Heard(io.RawIOBase):
    """What a line says, as the one file that `HTTPResponse` reads; bounded in bytes and in time, heads included."""

    def __init__(self, line: socket.socket, most: int, until: Until) -> None:
        self.line, self.most, self.until = line, most, until

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.line.settimeout(self.until.left())
        count = self.line.recv_into(buffer)
        self.most -= count
        if self.most < 0:
            raise Unfit("it says more than is read")
        return count
