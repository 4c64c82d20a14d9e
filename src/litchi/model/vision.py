"""A vision transformer for understanding: pixel patches in, one row of the trunk's width out (ViT with LLaVA's MLP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Tower:
    """Pixel patches read by a ViT and an MLP projector; never drawn, so it has no loss of its own."""

    channels: int
    """Values of one patch: patch * patch * 3."""
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    grid: int = 32
    """Rows and columns of the position table."""


class VisionLayer(nn.Module):
    def __init__(self, c: Tower) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.up, self.down = nn.Linear(c.width, 4 * c.width), nn.Linear(4 * c.width, c.width)

    def forward(self, x_ND: Tensor, mask_NN: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_ND)).unflatten(-1, (3, self.num_heads, -1)).permute(1, 2, 0, 3)
        o_HNK = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask_NN)[0]
        x_ND = x_ND + self.out(o_HNK.transpose(0, 1).flatten(1))
        return x_ND + self.down(F.gelu(self.up(self.norm2(x_ND))))


class VisionTower(nn.Module):
    """Reads all pictures of a batch at once; a patch attends to the patches of its own picture."""

    def __init__(self, c: Tower, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(c.channels, c.width)
        self.place = nn.Embedding(2 * c.grid, c.width)
        self.grid = c.grid
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.width)
        self.project = nn.Sequential(nn.Linear(c.width, width), nn.GELU(), nn.Linear(width, width))

    def forward(
        self, value_NC: Float[Tensor, "N C"], picture_N: Int[Tensor, "N"], place_N2: Int[Tensor, "N 2"]
    ) -> Float[Tensor, "N D"]:
        """`picture` numbers the picture of each patch, `place` is its row and column within it, in [0, grid)."""
        offset = torch.tensor([0, self.grid], device=place_N2.device)
        x_ND = self.patch(value_NC) + self.place(place_N2 + offset).sum(1)
        mask_NN = picture_N[:, None] == picture_N[None]
        for layer in self.layers:
            x_ND = layer(x_ND, mask_NN)
        return self.project(self.norm(x_ND))
