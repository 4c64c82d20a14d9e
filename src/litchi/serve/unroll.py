"""A stranger's film to a few of its frames, within seconds, bytes and pixels: the whole of a child process.

A film is walked through twice: first for how long each frame stands, then for the frames that are seen at even times.
No torch here, so that the child starts at once.
"""

from __future__ import annotations

import io
import json
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Pillow

from litchi.config import BadInput
from litchi.record import need
from litchi.serve.darkroom import MAX_SIDE, warm

CPU_SECONDS, BYTES, WRITTEN = 8, 2 << 30, 1 << 28
MAX_FRAMES = 1024
MAX_PIXELS = 128 << 20
"""Of all frames of a film together, those that nobody is shown included: each is decoded."""
MAX_SECONDS = 3600.0
USUAL = 0.1
"""Seconds that a frame stands which says 0, as browsers have it."""
KINDS = "GIF, WebP, APNG, MP4 or WebM"


@dataclass(frozen=True, slots=True)
class Wanted:
    """At most `most` frames, `side` pixels square or in their own size where that is 0, together of `max_pixels`."""

    side: int
    most: int
    max_pixels: int
    even: bool
    """Whether frames are even in time, so that one which stands longer comes more often; else each comes once."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a film, read while it is there: `picture` is asked before the next."""

    stands: float
    """Seconds; 0 where nobody says."""
    width: int
    height: int
    picture: Callable[[], Pillow.Image]


def unroll(raw: bytes, wanted: Wanted) -> tuple[UInt8[np.ndarray, "f h w 3"], float, str]:
    """Frames, how many of them a second has, and what was done. Raises BadInput for what is no film or too much."""
    durations = [frame.stands or USUAL for frame in walk(raw, wanted)]
    if not durations:
        raise BadInput("holds no frames; send one with a picture at least")
    if sum(durations) > MAX_SECONDS:
        raise BadInput(f"is longer than {MAX_SECONDS:g} seconds; send a part of it")
    order, fps = chosen(durations, wanted.most)
    shown = set(order)
    kept: dict[int, UInt8[np.ndarray, "h w 3"]] = {}
    size = (0, 0)
    for index, frame in enumerate(walk(raw, wanted)):
        if index not in shown:
            continue
        picture = frame.picture()
        size = size if any(size) else picture.size
        kept[index] = flat(picture, (wanted.side, wanted.side) if wanted.side else size)
        if len(shown) * kept[index].shape[0] * kept[index].shape[1] > wanted.max_pixels:
            raise BadInput(f"has more than {wanted.max_pixels} pixels in the {len(shown)} frames that are shown")
    notes = [f"{len(shown)} of its {len(durations)} frames are shown"] * (len(shown) < len(durations))
    if wanted.side and size != (wanted.side, wanted.side):
        notes.append(f"frames were resized from {size[0]}x{size[1]} to {wanted.side}x{wanted.side} (nearest neighbour)")
    return np.stack([kept[index] for index in (order if wanted.even else sorted(shown))]), fps, ", ".join(notes)


def chosen(durations: list[float], most: int) -> tuple[list[int], float]:
    """Which frame stands in the middle of each of at most `most` even spells of a film, and how many a second has.

    A spell is as short as the shortest frame if there are not too many then: writers join frames that are alike, and
    they come apart again.
    """
    ends = list(accumulate(durations))
    count = max(1, min(most, round(ends[-1] / min(durations))))
    spell = ends[-1] / count
    return [min(bisect_right(ends, (i + 0.5) * spell), len(ends) - 1) for i in range(count)], 1 / spell


def flat(picture: Pillow.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """As a picture that is sent alone: on white, resized with nearest neighbour."""
    whole = picture if picture.size == size else picture.resize(size, Pillow.Resampling.NEAREST)
    paper = Pillow.new("RGBA", size, "white")
    return np.asarray(Pillow.alpha_composite(paper, whole.convert("RGBA")).convert("RGB"))


# ---- readers ------------------------------------------------------------------------------------------------------


def walk(raw: bytes, wanted: Wanted) -> Iterator[Frame]:
    """The frames, counted and measured; who reads them is said by the first bytes and by no name. Raises BadInput."""
    if is_drawn(raw):
        frames = drawn(raw, wanted.max_pixels)
    elif raw[4:8] == b"ftyp" or raw[:4] == b"\x1aE\xdf\xa3":
        frames = filmed(raw, wanted.max_pixels)
    else:
        raise BadInput(f"is no film that is read here; send {KINDS}")
    spent = 0
    for index, frame in enumerate(frames):
        spent += frame.width * frame.height
        if index >= MAX_FRAMES or spent > MAX_PIXELS:
            raise BadInput(f"has more than {MAX_FRAMES} frames or {MAX_PIXELS} pixels in all; send a part of it")
        yield frame


def is_drawn(raw: bytes) -> bool:
    return raw[:4] == b"GIF8" or raw[:8] == b"\x89PNG\r\n\x1a\n" or (raw[:4] == b"RIFF" and raw[8:12] == b"WEBP")


def drawn(raw: bytes, max_pixels: int) -> Iterator[Frame]:
    """GIF, WebP and APNG, by Pillow."""
    with Pillow.open(io.BytesIO(raw), formats=("GIF", "WEBP", "PNG")) as film:
        first = int(bool(film.info.get("default_image")))  # what stands in an APNG's place where it is not known
        for index in range(first, MAX_FRAMES + 2):
            check_size(film.width, film.height, max_pixels)
            with suppress(EOFError):
                film.seek(index)
            if film.tell() != index:
                return
            check_size(film.width, film.height, max_pixels)  # a GIF's grows with its frames
            film.load()
            yield Frame(film.info.get("duration", 0) / 1000, film.width, film.height, lambda: film)


def filmed(raw: bytes, max_pixels: int) -> Iterator[Frame]:
    """MP4 and WebM, by FFmpeg, which is told the container and may open nothing else."""
    av = need("films", "av")
    kind = "mp4" if raw[4:8] == b"ftyp" else "webm"
    with av.open(io.BytesIO(raw), format=kind, options={"protocol_whitelist": ""}) as container:
        if not container.streams.video:
            return
        stream = container.streams.video[0]
        check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        usual = 1 / float(stream.average_rate) if stream.average_rate else USUAL
        for frame, after in pairwise(chain(container.decode(stream), [None])):
            check_size(frame.width, frame.height, max_pixels)
            known = after is not None and after.time is not None and frame.time is not None
            stands = after.time - frame.time if known else usual
            yield Frame(max(stands, 0.0), frame.width, frame.height, lambda frame=frame: upright(frame))


def upright(frame: Any) -> Pillow.Image:
    """The picture as its telephone was held."""
    picture = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise BadInput(f"has {width}x{height} pixels; at most {max_pixels} are read: send a smaller one")


# ---- the child ----------------------------------------------------------------------------------------------------


def main() -> None:
    """A line of JSON for the film on standard input, and behind it the bytes of its frames."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    frames = None
    raw = sys.stdin.buffer.read()
    try:
        if is_drawn(raw):  # what reads movies loads its parts one by one
            warm()
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # from here on no file and no socket is opened
        frames, fps, note = unroll(raw, Wanted(**json.loads(sys.argv[1])))
        told: dict[str, Any] = {"shape": frames.shape, "fps": fps, "note": note}
    except BadInput as error:
        told = {"fault": str(error)}
    except Exception as error:
        # Decoders raise whatever their parsers meet in a broken file, and MemoryError at the limit.
        told = {"fault": f"is not a film that can be read ({type(error).__name__}); send {KINDS}"}
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\n")
    if frames is not None:
        sys.stdout.buffer.write(np.ascontiguousarray(frames).tobytes())


if __name__ == "__main__":
    main()
