"""The guard stands before every endpoint: who may ask, and from which page.

A server on loopback is reachable by every page that its user's browser has open. So a request that names an Origin must
come from our own page, and a request to loopback must name a loopback Host (otherwise a stranger's domain, pointed at
127.0.0.1, is "our own page").
"""

from __future__ import annotations

import base64
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from litchi.serve.answers import error

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/health", "/favicon.ico")
SUBPROTOCOL = "litchi"
KEY_PROTOCOL = "litchi-key."


class Guard:
    """ASGI middleware. `hosts` are the Host names answered to, () for any; an empty `key` asks for none."""

    def __init__(self, app: ASGIApp, key: str, hosts: tuple[str, ...]):
        self.app, self.key, self.hosts = app, key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            # Refused before it is accepted: the handshake fails with 403.
            return await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})
        await refusal.response()(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> Refusal | None:
        host = headers.get("host", "")
        if self.hosts and name_of(host) not in self.hosts:
            return Refusal(403, f"this server does not answer to the host {host[:80]!r}; set allowed_hosts", "bad_host")
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy that believes the other of the two sees other requests in the same bytes.
            return Refusal(400, "a request has Content-Length or Transfer-Encoding, not both", "smuggling", close=True)
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host:
            return Refusal(403, "requests from pages of other origins are refused", "bad_origin")
        # A picture or a script of a page names no Origin, but browsers say that the page is another's.
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_open(path):
            return Refusal(403, "requests from pages of other origins are refused", "bad_origin")
        if self.key and not is_open(path) and not self._knows(headers):
            mend = "send Authorization: Bearer KEY"
            return Refusal(401, f"a valid API key is needed: {mend}", "invalid_api_key", "authentication_error")
        return None

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")  # as headers are decoded: the bytes that were sent
        if scheme.lower() != "bearer":
            key = _key_of(headers.get("sec-websocket-protocol", ""))
        # Constant time: how long a refusal takes must not say how much of the key was right.
        return hmac.compare_digest(key, self.key.encode())


class Refusal:
    def __init__(
        self, status: int, message: str, code: str, kind: str = "permission_error", *, close: bool = False
    ) -> None:
        self.status, self.message, self.code, self.kind, self.close = status, message, code, kind, close

    def response(self) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        headers |= {"Connection": "close"} if self.close else {}
        return JSONResponse(error(self.message, self.code, self.kind), self.status, headers)


def is_open(path: str) -> bool:
    """Whether a path asks for no key: the page, its files and /health."""
    return path in OPEN or path.startswith("/web/")


def _place(origin: str) -> str | None:
    """The host and port of an origin; None if it has none, as "null"."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def name_of(host: str) -> str:
    """The name of a Host header without its port; [::1]:80 -> ::1."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _key_of(protocols: str) -> bytes:
    """The key in a WebSocket's subprotocols: a browser sets no other header there, and an address would be logged."""
    for each in protocols.split(","):
        if each.strip().startswith(KEY_PROTOCOL):
            packed = each.strip().removeprefix(KEY_PROTOCOL)
            try:
                return base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
            except ValueError:
                return b""
    return b""
