"""A frozen network as an eye: a picture becomes a grid of its features, which the trunk reads one after another."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from litchi.model.efficientnet import CHANNELS, EfficientNetLite, Layer, resize
from litchi.schema.sight import Seen, seen_in_order

NAME = "EfficientNet-Lite0"


@dataclass(frozen=True, slots=True)
class FrozenEyeConfig:
    """EfficientNet-Lite0, its map averaged over about `num_tokens` cells as square as the picture's shape allows."""

    token: str
    """The control token that stands for a picture in a template, and under each of its tokens."""
    num_tokens: int = 16
    pixels: int = 56
    """Height and width of a cell, to which a picture is brought."""
    layer: Layer = "head"

    @property
    def channels(self) -> int:
        return CHANNELS[self.layer]


class FrozenEye:
    """It keeps what it has seen, so that a picture met again costs nothing."""

    def __init__(self, config: FrozenEyeConfig, network: EfficientNetLite) -> None:
        self.config, self.network = config, network.eval()
        self.seen: dict[bytes, Float[Tensor, "rows columns C"]] = {}

    def look(self, pixels: UInt8[np.ndarray, "h w 3"]) -> list[str | Seen]:
        key = hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).digest()
        if key not in self.seen:
            self.seen[key] = self.features(pixels).half()
        return [seen_in_order([self.seen[key].float()])]

    @torch.no_grad()
    def features(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "rows columns C"]:
        rows, columns = self.shape(*pixels.shape[:2])
        whole = torch.from_numpy(np.array(pixels, order="C"))[None]
        sized = resize(whole, rows * self.config.pixels, columns * self.config.pixels)
        x_Chw = self.network.features(sized, self.config.layer)[0].permute(2, 0, 1)
        return F.adaptive_avg_pool2d(x_Chw, (rows, columns)).permute(1, 2, 0)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells."""
        rows = min(max(round(math.sqrt(self.config.num_tokens * height / width)), 1), self.config.num_tokens)
        return rows, self.config.num_tokens // rows
