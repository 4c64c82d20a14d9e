"""A stranger's picture is decoded in a process of its own, kept warm, which may crash, swell or hang without the door.

What goes over the socket between them is lengths and raw bytes, and nothing that the child says is believed: neither
sizes that were not asked for nor more bytes than fit. No torch here, so that a child starts at once.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, MpoImagePlugin, TiffImagePlugin  # noqa: F401 (a child that is shut in can load no more)

from litchi.config import BadInput

if TYPE_CHECKING:
    from jaxtyping import UInt8

    Pixels = UInt8[np.ndarray, "h w 3"]

log = logging.getLogger("litchi.serve")

FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
MAX_SCANS = 100
"""Passes that a JPEG may take over its pixels; encoders write about ten, a hostile file a hundred thousand."""
MAX_SIDE = 65_535
"""Of a picture, as JPEG has it: libwebp takes 20 s for a canvas of sixteen million pixels in one line."""

SECONDS, CPU_SECONDS = 15.0, 8
"""For one picture, by the clock and of a processor."""
BYTES, BYTES_OF_PIXEL = 512 << 20, 48
"""Of address space: what a child has anyway, and what a pixel takes in the steps from a file to RGB."""
MOST, WAIT = max(2, min(4, os.cpu_count() or 2)), 5
"""Pictures that are decoded at once, and the seconds after which who finds others there is asked to come again."""
LIFE = 1000
"""Pictures of one child."""
COMMAND = ["-m", "litchi.serve.darkroom"]
KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""What a child needs of our environment; keys and passwords may stand in the rest."""

ASKED = struct.Struct("<3Q")
"""The side that is wanted (0: the picture's own), the most pixels, and the bytes that follow."""
TOLD = struct.Struct("<5Q")
"""PIXELS, height, width, and the height and width of the file; else another verdict and the bytes of its text."""
PIXELS, FAULT, LARGE, SPENT = range(4)
MAX_FAULT = 1000
TOO_MUCH = "takes too much to decode; send a smaller picture, or save it again as PNG"


class TooLarge(BadInput):
    """Bad input by its size alone: HTTP 413."""


def decode(raw: bytes, side: int, max_pixels: int) -> tuple[Pixels, tuple[int, int]]:
    """RGB on white, `side` square by nearest neighbour unless that is 0, and the width and height that it had.

    Raises BadInput and TooLarge, whose texts go on from the name of the picture.
    """
    # Pillow reads only the header in `open`; pixels are decoded after the size was accepted.
    if raw[:2] == b"\xff\xd8" and raw.count(b"\xff\xda") > MAX_SCANS:
        raise TooLarge(f"is a JPEG of more than {MAX_SCANS} scans; save it again, or as PNG")
    try:
        with Pillow.open(io.BytesIO(raw), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels or max(width, height) > MAX_SIDE:
                most = f"at most {max_pixels} are read, {MAX_SIDE} in a line: send a smaller one"
                raise TooLarge(f"has {width}x{height} pixels; {most}")
            upright = ImageOps.exif_transpose(picture)
            size = upright.size
            wanted = (side, side) if side else size
            flat = (upright if size == wanted else upright.resize(wanted, Pillow.Resampling.NEAREST)).convert("RGBA")
            paper = Pillow.new("RGBA", wanted, "white")
            return np.asarray(Pillow.alpha_composite(paper, flat).convert("RGB")), size
    except (BadInput, MemoryError):
        raise
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise TooLarge(f"has far too many pixels; at most {max_pixels} are read") from None
    except Exception as error:
        # Pillow's decoders raise whatever their parsers meet in a broken file: OSError, SyntaxError, struct.error, ...
        kinds = ", ".join(FORMATS)
        raise BadInput(f"is not a picture that can be read ({type(error).__name__}); send {kinds}") from None


class Darkroom:
    """Children, started where they are needed and kept; any thread may come, and waits while all are taken."""

    def __init__(self, max_pixels: int, seconds: float = SECONDS, most: int = MOST, wait: float = WAIT) -> None:
        self.bytes, self.seconds, self.wait = BYTES + BYTES_OF_PIXEL * max_pixels, seconds, wait
        self.places = threading.BoundedSemaphore(most)
        self.lock = threading.Lock()
        self.idle: list[Child] = []
        self.busy: list[Child] = []
        self.closed = False

    def warm(self) -> None:
        """Have a child ready before somebody comes; it starts beside us."""
        with self.lock:
            self.idle += [] if self.closed else [Child(self.bytes)]

    def decode(self, raw: bytes, side: int, max_pixels: int) -> tuple[Pixels, tuple[int, int]]:
        """As `decode`, which it equals, but that it also raises Busy, and TooLarge where that would take too much."""
        if not self.places.acquire(timeout=self.wait):
            from litchi.serve.worker import Busy  # here, so that the child starts without torch

            raise Busy(round(self.wait) or 1)
        try:
            child = self.take()
            try:
                found = child.decode(raw, side, max_pixels, time.monotonic() + self.seconds)
                self.give(child, fresh=child.count >= LIFE)
                return found
            except BadInput:
                self.give(child, fresh=child.spent)
                raise
            except (OSError, ValueError):  # it hangs, it died, or it says what cannot be
                self.give(child, fresh=True)
                log.warning("a picture of %d bytes took too much to decode, and its process with it", len(raw))
                raise BadInput(TOO_MUCH) from None
        finally:
            self.places.release()

    def take(self) -> Child:
        with self.lock:
            if self.closed:
                raise BadInput("cannot be read: the server is stopping; ask again later")
            while self.idle and self.idle[-1].process.poll() is not None:
                self.idle.pop().end()  # the system ended it while it had nothing to do
            child = self.idle.pop() if self.idle else Child(self.bytes)
            self.busy.append(child)
            return child

    def give(self, child: Child, *, fresh: bool) -> None:
        """Back to the others, or another one in its place."""
        with self.lock:
            self.busy.remove(child)
            if fresh or self.closed:
                child.end()
            if not self.closed:
                self.idle.append(Child(self.bytes) if fresh else child)

    def close(self) -> None:
        """End all children, also those that are at work."""
        with self.lock:
            self.closed = True
            while self.idle:
                self.idle.pop().end()
            for child in self.busy:
                child.process.kill()  # who waits for it reads that, and ends it


class Child:
    """The door's end of one process."""

    def __init__(self, most_bytes: int) -> None:
        self.count, self.spent = 0, False
        """What it has decoded, and whether it has said that it will decode no more."""
        self.socket, theirs = socket.socketpair()
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        env = kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, *COMMAND, str(most_bytes), str(CPU_SECONDS)]
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
            )

    def decode(self, raw: bytes, side: int, max_pixels: int, until: float) -> tuple[Pixels, tuple[int, int]]:
        """Raises what it was told, OSError if it hangs or dies, ValueError for what it could not mean."""
        self.count += 1
        for piece in (ASKED.pack(side, max_pixels, len(raw)), raw):
            self.socket.settimeout(left(until))
            self.socket.sendall(piece)
        verdict, *told = TOLD.unpack(receive(self.socket, TOLD.size, until))
        if verdict != PIXELS:
            if not 0 < told[0] <= MAX_FAULT:
                raise ValueError("a fault that is too long to be ours")
            self.spent = verdict == SPENT
            kind = TooLarge if verdict == LARGE else BadInput
            raise kind(bytes(receive(self.socket, told[0], until)).decode())
        height, width, *had = told
        if min(told) < 1 or (height, width) != ((side, side) if side else tuple(had)) or had[0] * had[1] > max_pixels:
            raise ValueError("a picture that was not asked for")
        pixels = np.frombuffer(receive(self.socket, height * width * 3, until), np.uint8)
        return pixels.reshape(height, width, 3), (had[1], had[0])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()


def left(until: float) -> float:
    """Seconds; never 0, which would mean not to wait at all."""
    return max(until - time.monotonic(), 1e-3)


def receive(line: socket.socket, count: int, until: float | None = None) -> bytearray:
    """So many bytes. Raises OSError if the other end is gone, or says nothing until then."""
    body = bytearray(count)
    view, at = memoryview(body), 0
    while at < count:
        line.settimeout(None if until is None else left(until))
        if not (got := line.recv_into(view[at:])):
            raise ConnectionError("the other end is gone")
        at += got
    return body


# ---- the child ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Decode what comes on standard input, a socket, until it is closed or a picture takes too much."""
    most_bytes, cpu_seconds = map(int, sys.argv[1:])
    line = socket.socket(fileno=0)
    warnings.simplefilter("ignore")
    warm()
    shut_in(most_bytes)
    spent = False
    while not spent:
        try:
            side, max_pixels, count = ASKED.unpack(receive(line, ASKED.size))
            raw = bytes(receive(line, count))
        except ConnectionError:
            return
        allow(cpu_seconds)
        try:
            pixels, (width, height) = decode(raw, side, max_pixels)
            line.sendall(TOLD.pack(PIXELS, *pixels.shape[:2], height, width))
            line.sendall(np.ascontiguousarray(pixels).data)
        except BadInput as error:
            fault = str(error).encode()[:MAX_FAULT]
            line.sendall(TOLD.pack(LARGE if isinstance(error, TooLarge) else FAULT, len(fault), 0, 0, 0) + fault)
        except MemoryError:
            spent = True
            line.sendall(TOLD.pack(SPENT, len(TOO_MUCH), 0, 0, 0) + TOO_MUCH.encode())


def warm() -> None:
    """Load whatever decoding one picture of each kind loads."""
    for kind in FORMATS:
        out = io.BytesIO()
        Pillow.new("RGBA" if kind in ("PNG", "WEBP") else "L", (8, 8)).save(out, kind)
        decode(out.getvalue(), 4, 64)
    for name in ("latin-1", "ascii", "utf-16", "utf-8"):
        b"".decode(name)


def shut_in(most_bytes: int) -> None:
    """No more memory than that, and no file, socket, process or core from here on: a decoder needs none."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def allow(cpu_seconds: int) -> None:
    """So many further seconds of a processor, whole ones."""
    import resource

    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + 1 + cpu_seconds, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
