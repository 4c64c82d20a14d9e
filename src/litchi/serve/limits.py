"""What a stranger may send: sizes are checked before anything is decoded, hosts before anything is fetched."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Pillow

from litchi.config import BadInput
from litchi.serve.darkroom import Darkroom, TooLarge, decode
from litchi.serve.fetch import Visit, is_address

T = TypeVar("T")

DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<params>(?:;[\w=.+-]+)*?)(?P<base64>;base64)?,", re.ASCII)

MAX_VALUES = 1 << 20
"""Of one body: objects, lists, and what commas part, those within texts included."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may hold. Sizes in bytes, pictures in pixels; a side of the model's pictures is `side`."""

    side: int
    max_body_bytes: int
    max_image_bytes: int
    max_pixels: int
    max_images: int
    max_text: int
    """Characters of all texts of a request together."""
    max_tokens: int
    """Tokens of one answer."""
    sees: bool = True
    """Whether the model is shown pictures."""
    watches: bool = False
    """Whether the model reads films as such; one that only sees is shown some of their frames."""
    max_frames: int = 32
    """Frames of one film."""
    visit: Visit | None = None
    """What fetches the pictures of this request; None where no address is followed."""
    darkroom: Darkroom | None = None
    """Where pictures are decoded; None where whoever sends them may have them decoded in this process."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture at the model's size. `note` says what was done to it; empty if nothing."""

    pixels: UInt8[np.ndarray, "h w 3"]
    note: str = ""


async def read_body(chunks: AsyncIterator[bytes], declared: str | None, limits: Limits) -> bytes:
    """The body of a request; stops reading at the limit, whatever the declared Content-Length says."""
    refusal = TooLarge(f"the body is larger than {limits.max_body_bytes} bytes; send less or a smaller picture")
    if declared is not None and declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise refusal
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limits.max_body_bytes:
            raise refusal
    return bytes(body)


def read_json(body: bytes | str) -> dict[str, Any]:
    """A JSON object; NaN and Infinity, which JSON does not have, are refused."""
    marks = (b"{", b"[", b",") if isinstance(body, bytes) else ("{", "[", ",")
    # Objects take a hundred times the memory of the three bytes that they are written in.
    if sum(map(body.count, marks)) > MAX_VALUES:  # pyrefly: ignore
        raise TooLarge(f"the body holds more than {MAX_VALUES} values; send less")

    def refuse(constant: str) -> None:
        raise BadInput(f"the body holds {constant}, which is not JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the body is not JSON: {error}; send Content-Type application/json") from None
    if not isinstance(value, dict):
        raise BadInput(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def decode_picture(url: str, limits: Limits, where: str = "image_url") -> Picture:
    """The picture at a URL, as the model reads it: RGB, `side` x `side`, or in its own size where `side` is 0.

    An address is fetched where its host is listed. A picture of another size is resized with nearest neighbour, which
    gives back an enlarged tile world exactly, and the note says so.
    """
    return read_url(url, limits, where, partial(_picture, limits=limits, where=where))


def read_url(url: str, limits: Limits, where: str, decode: Callable[[bytes], T]) -> T:
    """What `decode` makes of the bytes that a URL holds or names. Raises BadInput, Busy."""
    if limits.visit is not None and is_address(url):
        return limits.visit.read(url, limits.max_image_bytes, where, decode)
    return decode(_bytes_of(url, limits, where))


def _picture(raw: bytes, limits: Limits, where: str) -> Picture:
    develop = decode if limits.darkroom is None else limits.darkroom.decode
    try:
        pixels, size = develop(raw, limits.side, limits.max_pixels)
    except BadInput as error:
        raise type(error)(f"{where} {error}") from None
    if not limits.side or size == (limits.side, limits.side):
        return Picture(pixels)
    note = f"{where} was resized from {size[0]}x{size[1]} to {limits.side}x{limits.side} (nearest neighbour)"
    return Picture(pixels, note)


def encode_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return out.getvalue()


def data_url(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def _bytes_of(url: str, limits: Limits, where: str) -> bytes:
    if re.match(r"(https?|ftp|file):", url, re.IGNORECASE):
        raise BadInput(f"{where}: addresses are not fetched; send the picture itself as data:image/png;base64,...")
    head = DATA_URL.match(url[:200])
    if head is None or not head["base64"]:
        raise BadInput(f"{where} must be a data URL: data:image/png;base64,...")
    if (len(url) - head.end()) * 3 // 4 > limits.max_image_bytes + 2:
        raise TooLarge(f"{where} holds more than {limits.max_image_bytes} bytes; send a smaller picture")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise BadInput(f"{where} is not valid base64 after the comma") from None
