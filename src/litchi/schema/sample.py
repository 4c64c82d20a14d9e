"""A sample is one document as it is stored: parts in the units of the world, before anybody chose a tokenizer.

Arrays are numpy. Nothing here knows tokens, models or files; `data.shards` stores samples and `schema.processor`
turns them into the `TokenSequence` that a model reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8


class Role(StrEnum):
    """Who speaks a part. `NONE` is plain text without a chat frame, `WORLD` is what an environment shows."""

    NONE = ""
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    WORLD = "world"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A piece of text. `weight` is the loss weight of its tokens: 0 means read only."""

    text: str
    role: Role = Role.NONE
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One picture, 8-bit RGB. With `weight > 0` the model learns to draw it, otherwise it only sees it."""

    pixels: UInt8[np.ndarray, "h w 3"]
    role: Role = Role.NONE
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """Frames in order at `fps` frames a second; each frame is drawn or seen as an `Image` would be."""

    frames: UInt8[np.ndarray, "f h w 3"]
    fps: float
    role: Role = Role.NONE
    weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A chunk of `k` actions at `hz` a second, in the physical units of `space`.

    `space` names the normaliser in the processor, which also says whether the actions are discrete: then `values` is
    (1, 1) and holds the index of the action.
    """

    values: Float32[np.ndarray, "k A"]
    space: str
    hz: float = 1.0
    role: Role = Role.NONE
    weight: float = 0.0

    @classmethod
    def discrete(cls, index: int, space: str, weight: float = 0.0) -> Action:
        return cls(values=np.array([[index]], np.float32), space=space, weight=weight)


Part = Text | Image | Video | Action


@dataclass(frozen=True, slots=True)
class Sample:
    """One document.

    `key` is unique in its source; `meta` is JSON data for scorers (the truth), never shown to a model.
    """

    parts: tuple[Part, ...]
    key: str
    source: str
    meta: Mapping[str, Any] = field(default_factory=dict)
