"""A frozen network as an eye: a picture becomes a grid of its features, which the trunk reads one after another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from litchi.model.efficientnet import EfficientNetLite0
from litchi.schema.sight import Seen, seen_in_order


@dataclass(frozen=True, slots=True)
class FrozenEyeConfig:
    """EfficientNet-Lite0 behind a grid of `rows` x `columns` tokens; features in between are averaged."""

    token: str
    """The control token that stands for a picture in a template, and under each of its tokens."""
    rows: int = 4
    columns: int = 4


class FrozenEye:
    """It keeps what it has seen, so that a picture met again costs nothing."""

    def __init__(self, config: FrozenEyeConfig, network: EfficientNetLite0) -> None:
        self.config, self.network = config, network.eval()
        self.seen: dict[bytes, Float[Tensor, "rows columns C"]] = {}

    def look(self, pixels: UInt8[np.ndarray, "h w 3"]) -> list[str | Seen]:
        key = hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + bytes(str(pixels.shape), "ascii")).digest()
        if key not in self.seen:
            self.seen[key] = self.features(pixels).half()
        return [seen_in_order([self.seen[key].float()])]

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> Float[Tensor, "rows columns C"]:
        x_ChW = self.network.features(pixels[None])[0].permute(2, 0, 1)
        return F.adaptive_avg_pool2d(x_ChW, (self.config.rows, self.config.columns)).permute(1, 2, 0)
