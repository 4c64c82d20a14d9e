"""Films that are sent: unrolled in a process of its own, and shown whole to a model that watches, else as pictures.

What reads MP4 is large and written in C, and a kilobyte of GIF may hold an hour: so a child does it (`unroll`), which
may crash, swell or hang without us.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import UInt8

from litchi.config import BadInput
from litchi.schema.sample import Image, Part, Role, Video
from litchi.serve.darkroom import KEPT
from litchi.serve.limits import Limits, read_url
from litchi.serve.unroll import Wanted
from litchi.serve.worker import Busy

MAX_FILMS = 4
"""In one conversation."""
SECONDS = 15.0
"""For one film, by the clock; its child has fewer of a processor."""
MAX_AT_ONCE, WAIT = 2, 5
PLACES = threading.BoundedSemaphore(MAX_AT_ONCE)
COMMAND = ["-m", "litchi.serve.unroll"]


@dataclass(frozen=True, slots=True)
class Film:
    """Frames in order at `fps` a second, and what was done to them in words; empty if nothing."""

    frames: UInt8[np.ndarray, "f h w 3"]
    fps: float
    note: str = ""


def share_of(pieces: Iterable[Any], limits: Limits) -> int:
    """The frames that each film of a conversation may show. Raises BadInput for more films or pictures than fit."""
    kinds = [piece.get("type") for piece in pieces if isinstance(piece, dict)]
    films, pictures = kinds.count("video_url"), kinds.count("image_url")
    if films > MAX_FILMS:
        raise BadInput(f"at most {MAX_FILMS} films fit into one conversation; drop the oldest messages")
    if not films or limits.watches:
        return limits.max_frames
    if (share := (limits.max_images - pictures) // films) < 1:
        raise BadInput(f"at most {limits.max_images} pictures and frames fit into one conversation; drop the oldest")
    return min(share, limits.max_frames)


def film_parts(url: str, role: Role, limits: Limits, most: int, where: str) -> tuple[list[Part], str]:
    """What a model is shown of a film, and what was done to it. Raises BadInput, Busy."""
    if not limits.watches and not limits.sees:
        raise BadInput(f"{where}: this model neither watches films nor sees pictures; send text only")
    wanted = Wanted(side=limits.side, most=most, max_pixels=limits.max_pixels, even=limits.watches)
    film = read_url(url, limits, where, partial(unrolled, wanted=wanted, where=where))
    if limits.watches:
        return [Video(frames=film.frames, fps=film.fps, role=role)], film.note
    return [Image(pixels=pixels, role=role) for pixels in film.frames], film.note


def unrolled(raw: bytes, wanted: Wanted, where: str) -> Film:
    """The frames that are wanted of a film. Blocks as long as that takes; raises BadInput, and Busy if others do."""
    if not PLACES.acquire(timeout=WAIT):
        raise Busy(WAIT)
    try:
        told, body = _unroll(raw, wanted)
        if "fault" in told:
            raise BadInput(f"{where} {told['fault']}")
        frames = np.frombuffer(body, np.uint8).reshape(told["shape"])
        return Film(frames, told["fps"], f"{where}: {told['note']}" if told["note"] else "")
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        if isinstance(error, BadInput):
            raise
        # It hangs, or it died in the middle of a word.
        raise BadInput(f"{where} takes too much to unroll; send a shorter or smaller one") from None
    finally:
        PLACES.release()


def _unroll(raw: bytes, wanted: Wanted) -> tuple[dict[str, Any], bytes]:
    """What the child says, and the bytes of its frames."""
    command = [sys.executable, *COMMAND, json.dumps(asdict(wanted))]
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    env = kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # A file and not a pipe: the child's own limit on what it writes then bounds what we read.
    with tempfile.TemporaryFile() as out:
        done = subprocess.run(
            command, input=raw, stdout=out, stderr=subprocess.DEVNULL, timeout=SECONDS, env=env, check=False
        )
        out.seek(0)
        if done.returncode != 0:
            return {"fault": "takes too much to unroll; send a shorter or smaller one"}, b""
        return json.loads(out.readline(1 << 16)), out.read()
