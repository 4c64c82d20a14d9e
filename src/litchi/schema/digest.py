"""What a request and an answer are to the last bit: SHA-256 of what they hold, and a request as JSON data and back.

Pictures are told by digests of their pixels and kept once, as PNG in base64: lossless, and readable by any tool.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Picture

from litchi.schema.request import Completion, Request

FIRST_FIELDS = frozenset("parts want params space height width".split())
FIRST_PARAMS = frozenset("max_tokens temperature top_p top_k seed steps stop logprobs".split())


def digest(request: Request) -> str:
    """SHA-256 of a request: every field, arrays by their bytes.

    A field that came after the first receipts counts only where it says something, so that those stay comparable.
    """
    plain, usual = asdict(request), asdict(Request(parts=()))
    for given, default, first in ((plain["params"], usual["params"], FIRST_PARAMS), (plain, usual, FIRST_FIELDS)):
        for name in given.keys() - first:
            if given[name] == default[name]:
                del given[name]
    return hashlib.sha256(json.dumps(plain, default=plain_array, sort_keys=True).encode()).hexdigest()


def told(completion: Completion) -> dict[str, str]:
    """SHA-256 of each field of an answer that is not as it always is: numbers by their bits, arrays by their bytes."""
    found = {}
    for field in fields(completion):
        value = getattr(completion, field.name)
        if field.default is MISSING or value != field.default:
            exact = json.dumps(bits(value), sort_keys=True)
            found[field.name] = hashlib.sha256(exact.encode()).hexdigest()
    return found


def bits(value: Any) -> Any:
    """JSON data that differs wherever `value` does: a decimal number would hide a zero's sign and a NaN's presence."""
    match value:
        case float():
            return value.hex()
        case bytes():
            return value.hex()
        case np.ndarray():
            return plain_array(value)
        case tuple() | list():
            return [bits(each) for each in value]
        case None | bool() | int() | str():
            return value
        case _:
            return {"type": type(value).__name__, **{f.name: bits(getattr(value, f.name)) for f in fields(value)}}


def plain_array(value: np.ndarray) -> list[Any]:
    return [str(value.dtype), value.shape, array_digest(value)]


def array_digest(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


# ---- arrays within JSON data ----------------------------------------------------------------------------------------


def without_arrays(data: Any, pictures: dict[str, str]) -> Any:
    """Nested data with arrays and bytes as JSON; the pictures among them go to `pictures`, by name."""
    match data:
        case np.ndarray() if data.dtype == np.uint8 and data.ndim == 3:
            name = hashlib.sha256(json.dumps(plain_array(data)).encode()).hexdigest()
            if name not in pictures:
                pictures[name] = picture_text(data)
            return {"picture": name}
        case np.ndarray() if data.dtype == np.uint8:
            return {"film": [without_arrays(frame, pictures) for frame in data]}
        case np.ndarray():
            return {"float32": data.tolist()}  # a float32 is a float64, which JSON tells exactly
        case bytes():
            return {"bytes": data.hex()}
        case dict():
            return {key: without_arrays(value, pictures) for key, value in data.items()}
        case list():
            return [without_arrays(value, pictures) for value in data]
        case _:
            return data


def with_arrays(data: Any, pictures: Mapping[str, str]) -> Any:
    """What `without_arrays` was given. Raises KeyError for a picture that is not there."""
    match data:
        case {"picture": str(name), **rest} if not rest:
            return picture_pixels(pictures[name])
        case {"film": list(frames), **rest} if not rest:
            return np.stack([with_arrays(frame, pictures) for frame in frames])
        case {"float32": list(rows), **rest} if not rest:
            return np.array(rows, np.float32)
        case {"bytes": str(text), **rest} if not rest:
            return bytes.fromhex(text)
        case dict():
            return {key: with_arrays(value, pictures) for key, value in data.items()}
        case list():
            return [with_arrays(value, pictures) for value in data]
        case _:
            return data


def picture_text(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def picture_pixels(text: str) -> UInt8[np.ndarray, "h w 3"]:
    return np.array(Picture.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
