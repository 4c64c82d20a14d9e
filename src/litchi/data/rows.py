"""A sample as one row of a table: pictures as PNG, actions as raw float32 with their shape, `meta` as JSON."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image as Picture

from litchi.schema.sample import Action, Image, Part, Role, Sample, Text, Video

PART = pa.struct(
    [
        ("kind", pa.string()),
        ("role", pa.string()),
        ("weight", pa.float32()),
        ("text", pa.string()),
        ("frames", pa.list_(pa.binary())),
        ("values", pa.binary()),
        ("shape", pa.list_(pa.int32())),
        ("space", pa.string()),
        ("rate", pa.float32()),
    ]
)
"""`rate` is a video's frames a second or an action's hertz; what a kind does not have is null."""

SCHEMA = pa.schema([("key", pa.string()), ("source", pa.string()), ("meta", pa.string()), ("parts", pa.list_(PART))])


def to_row(sample: Sample) -> dict[str, Any]:
    meta = json.dumps(dict(sample.meta), ensure_ascii=False)
    return {"key": sample.key, "source": sample.source, "meta": meta, "parts": [to_struct(p) for p in sample.parts]}


def from_row(row: dict[str, Any]) -> Sample:
    parts = tuple(from_struct(struct) for struct in row["parts"])
    return Sample(parts, key=row["key"], source=row["source"], meta=json.loads(row["meta"]))


def to_struct(part: Part) -> dict[str, Any]:
    common = {"role": part.role.value, "weight": part.weight}
    match part:
        case Text():
            return common | {"kind": "text", "text": part.text}
        case Image():
            return common | {"kind": "image", "frames": [to_png(part.pixels)]}
        case Video():
            return common | {"kind": "video", "frames": [to_png(f) for f in part.frames], "rate": part.fps}
        case Action():
            values = np.ascontiguousarray(part.values, np.float32)
            shape = {"values": values.tobytes(), "shape": list(values.shape)}
            return common | {"kind": "action", "space": part.space, "rate": part.hz} | shape


def from_struct(struct: dict[str, Any]) -> Part:
    role, weight = Role(struct["role"]), struct["weight"]
    match struct["kind"]:
        case "text":
            return Text(text=struct["text"], role=role, weight=weight)
        case "image":
            return Image(pixels=from_png(struct["frames"][0]), role=role, weight=weight)
        case "video":
            frames = np.stack([from_png(png) for png in struct["frames"]])
            return Video(frames=frames, fps=struct["rate"], role=role, weight=weight)
        case "action":
            values = np.frombuffer(struct["values"], np.float32).reshape(struct["shape"])
            return Action(values=values, space=struct["space"], hz=struct["rate"], role=role, weight=weight)
    raise ValueError(f"unknown part kind {struct['kind']!r}")


def to_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def from_png(png: bytes) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(Picture.open(io.BytesIO(png)).convert("RGB"))
