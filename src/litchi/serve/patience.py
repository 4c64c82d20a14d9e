"""A client that sends its request too slowly is given up: connections held for nothing are the cheapest attack."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

RATE = 16_384
"""Bytes a second that a body must come at, on the whole, to be waited for any longer."""


class Patient(H11Protocol):
    """uvicorn's protocol with a clock, which runs while a request is awaited or has begun and is not here whole."""

    patience: float
    clock: asyncio.TimerHandle | None = None
    began = 0.0
    received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.wait()

    def data_received(self, data: bytes) -> None:
        if self.clock is None:
            self.wait()
        self.received += len(data)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self.rest()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self.rest()  # its own protocol pings from here on
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # A request that came together with the last one has begun without a byte of its own.
        if self.clock is None and self.conn.their_state is h11.SEND_BODY:
            self.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self.rest()
        super().connection_lost(exc)

    def wait(self) -> None:
        self.began, self.received = self.loop.time(), 0
        self.clock = self.loop.call_later(self.patience, self.ring)

    def rest(self) -> None:
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None

    def ring(self) -> None:
        body = self.conn.their_state is h11.SEND_BODY
        if body and self.received >= RATE * (self.loop.time() - self.began):
            self.clock = self.loop.call_later(self.patience, self.ring)
            return
        self.clock = None
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = h11.Response(status_code=408, headers=[(b"connection", b"close"), (b"content-length", b"0")])
            self.transport.write((self.conn.send(head) or b"") + (self.conn.send(h11.EndOfMessage()) or b""))
        self.transport.close()


def patient(seconds: float) -> type[Patient]:
    """A protocol that waits as long."""
    return type("Patient", (Patient,), {"patience": seconds})
