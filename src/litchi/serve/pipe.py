"""Messages between the door and its workers: JSON behind its length, over a socket that only the two of them hold.

Nothing is pickled, so that whoever might write there could not have anything run. Numbers come as they were to the bit,
pictures as PNG.
"""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
from typing import Any, TypeVar

from litchi.config import parse, plain
from litchi.schema.digest import with_arrays, without_arrays

T = TypeVar("T")
LENGTH = struct.Struct(">I")


class Pipe:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.stream = end.makefile("rb")
        self.out: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        # A thread of its own, so that nobody waits for a worker that does not read.
        self.writer = threading.Thread(target=self.write, name="litchi-pipe", daemon=True)
        self.writer.start()

    def send(self, message: dict[str, Any]) -> None:
        """Goes out in order, as soon as the other end reads; if that is gone, nowhere."""
        self.out.put(message)

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the other end is gone."""
        try:
            head = self.stream.read(LENGTH.size)
            if len(head) < LENGTH.size:
                return None
            (length,) = LENGTH.unpack(head)
            body = self.stream.read(length)
            return json.loads(body) if len(body) == length else None
        except (OSError, ValueError):  # it was killed in the middle of a message, or this end is closed
            return None

    def close(self) -> None:
        """What is sent already goes out first."""
        self.out.put(None)
        self.writer.join(timeout=5)
        self.shut()

    def shut(self) -> None:
        """At once: the other end reads that it is over."""
        try:
            self.end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.end.close()

    def write(self) -> None:
        while (message := self.out.get()) is not None:
            body = json.dumps(message, separators=(",", ":")).encode()
            try:
                self.end.sendall(LENGTH.pack(len(body)) + body)
            except OSError:
                return


def written(value: object) -> dict[str, Any]:
    """A dataclass as JSON data; `read` makes it again."""
    pictures: dict[str, str] = {}
    data = without_arrays(plain(value, type(value)), pictures)
    return {"type": type(value).__name__, "data": data, "pictures": pictures}


def read(told: dict[str, Any], *kinds: type[T]) -> T:
    """Raises BadInput for what is none of `kinds`."""
    kind = next((kind for kind in kinds if kind.__name__ == told["type"]), kinds[0])
    return parse(kind, with_arrays(told["data"], told["pictures"]), kind.__name__)
