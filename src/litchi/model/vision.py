"""A vision transformer for understanding: pixel patches in, one row of the trunk's width out (ViT with LLaVA's MLP).

N patches of all pictures of a batch, P pictures, W width of the tower, D width of the trunk. Modules carry CLIP's names
in transformers; SigLIP, DINOv2 and ViT are the same network with other choices (model/towers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


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
    mlp_width: int = 0
    """0 is four times the width."""
    activation: Activation = "gelu"
    epsilon: float = 1e-5
    table: Literal["axes", "cells"] = "axes"
    """A position is the sum of its row's and its column's, or has a row of its own; then a picture is grid x grid."""
    class_token: bool = False
    """A row for each picture that reads and is read, and is dropped at the end."""
    patch_bias: bool = True
    norm_before: bool = False
    norm_after: bool = True
    scales: bool = False
    """Whether what a layer adds is scaled value by value (DINOv2)."""
    take: int = 0
    """Layers that are run; their rows are taken as they are (LLaVA leaves out the last). 0 runs all, and the norm."""
    merge: int = 1
    """A token shows merge x merge patches, whose rows the projector reads as one (SmolVLM's pixel shuffle)."""
    projector: Literal["mlp", "linear"] = "mlp"
    """Two layers with GELU between (LLaVA), or one matrix (SmolVLM)."""
    newline: bool = False
    """Whether a learned row ends each line of patches (LLaVA-NeXT)."""


def activation(name: Activation) -> Callable[[Tensor], Tensor]:
    match name:
        case "gelu":
            return F.gelu
        case "gelu_tanh":
            return partial(F.gelu, approximate="tanh")
        case "quick_gelu":
            return lambda x: x * torch.sigmoid(1.702 * x)


class VisionAttention(nn.Module):
    def __init__(self, c: Tower) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.width, c.width) for _ in range(3))
        self.out_proj = nn.Linear(c.width, c.width)

    def forward(self, x_ND: Tensor, mask_NN: Tensor) -> Tensor:
        q, k, v = (p(x_ND).unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for p in self.projections)
        o_HNK = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask_NN)[0]
        return self.out_proj(o_HNK.transpose(0, 1).flatten(1))

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj


class VisionMLP(nn.Module):
    def __init__(self, c: Tower) -> None:
        super().__init__()
        width = c.mlp_width or 4 * c.width
        self.fc1, self.fc2, self.activation = (
            nn.Linear(c.width, width),
            nn.Linear(width, c.width),
            activation(c.activation),
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_ND)))


class VisionLayer(nn.Module):
    def __init__(self, c: Tower) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(c.width, eps=c.epsilon) for _ in range(2))
        self.self_attn, self.mlp = VisionAttention(c), VisionMLP(c)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(c.width)) if c.scales else None for _ in range(2))

    def forward(self, x_ND: Tensor, mask_NN: Tensor) -> Tensor:
        x_ND = x_ND + scaled(self.self_attn(self.layer_norm1(x_ND), mask_NN), self.scale1)
        return x_ND + scaled(self.mlp(self.layer_norm2(x_ND)), self.scale2)


def scaled(x_ND: Tensor, scale_D: Tensor | None) -> Tensor:
    return x_ND if scale_D is None else x_ND * scale_D


class VisionEncoder(nn.Module):
    """The tower without what connects it: reads all pictures at once; a patch attends to those of its own picture."""

    def __init__(self, c: Tower) -> None:
        super().__init__()
        self.config = c
        self.patch_embedding = nn.Linear(c.channels, c.width, bias=c.patch_bias)
        cells = c.grid * c.grid if c.table == "cells" else 2 * c.grid
        self.position_embedding = nn.Embedding(cells + c.class_token, c.width)
        if c.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.pre_layernorm = nn.LayerNorm(c.width, eps=c.epsilon) if c.norm_before else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.num_layers))
        self.post_layernorm = nn.LayerNorm(c.width, eps=c.epsilon) if c.norm_after else nn.Identity()

    def forward(
        self, value_NC: Float[Tensor, "N C"], picture_N: Int[Tensor, "N"], place_N2: Int[Tensor, "N 2"]
    ) -> Float[Tensor, "N W"]:
        """`picture` numbers the picture of each patch, `place` is its row and column within it, in [0, grid)."""
        x_ND = self.patch_embedding(value_NC) + self.places(place_N2)
        first = 0
        if self.config.class_token:
            pictures = picture_N.unique()
            first = len(pictures)
            row_D = self.class_embedding + self.position_embedding.weight[0]
            x_ND, picture_N = torch.cat([row_D.expand(first, -1), x_ND]), torch.cat([pictures, picture_N])
        x_ND = self.pre_layernorm(x_ND)
        mask_NN = picture_N[:, None] == picture_N[None]
        if take := self.config.take:
            return self.run(x_ND, mask_NN, take)[first:]
        return self.post_layernorm(self.run(x_ND, mask_NN, len(self.layers)))[first:]

    def run(self, x_ND: Tensor, mask_NN: Tensor, num_layers: int) -> Tensor:
        for layer in self.layers[:num_layers]:
            x_ND = layer(x_ND, mask_NN)
        return x_ND

    def places(self, place_N2: Tensor) -> Tensor:
        grid, first = self.config.grid, int(self.config.class_token)
        if self.config.table == "cells":
            return self.position_embedding(place_N2[:, 0] * grid + place_N2[:, 1] + first)
        offset = torch.tensor([first, first + grid], device=place_N2.device)
        return self.position_embedding(place_N2 + offset).sum(1)


class VisionTower(nn.Module):
    """The tower and what brings its rows to the trunk's width."""

    def __init__(self, c: Tower, width: int) -> None:
        super().__init__()
        self.config = c
        self.encoder = VisionEncoder(c)
        wide = c.width * c.merge**2
        match c.projector:
            case "mlp":
                self.project = nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))
            case "linear":
                self.project = nn.Linear(wide, width, bias=False)
        if c.newline:
            self.newline = nn.Parameter(torch.zeros(width))

    def forward(self, value_NC: Float[Tensor, "N C"], place_N3: Int[Tensor, "N 3"]) -> Float[Tensor, "N D"]:
        """One row for each token. `place` is its picture, and its row and column counted from the middle."""
        if not self.config.newline:
            return self.project(self.rows(value_NC, place_N3))
        x_ND = self.newline.expand(len(value_NC), -1)
        seen = (place_N3[:, 0] >= 0).nonzero()[:, 0]
        return x_ND.index_copy(0, seen, self.project(self.rows(value_NC[seen], place_N3[seen])))

    def rows(self, value_NC: Tensor, place_N3: Tensor) -> Tensor:
        """The encoder's rows, those of the patches of one token side by side."""
        c, m = self.config, self.config.merge
        place_N2 = (place_N3[:, 1:] + c.grid // m // 2) * m
        if m == 1:
            return self.encoder(value_NC, place_N3[:, 0], place_N2.clamp(0, c.grid - 1))
        within = torch.cartesian_prod(*[torch.arange(m, device=value_NC.device)] * 2)
        place = (place_N2[:, None] + within).flatten(0, 1).clamp(0, c.grid - 1)
        picture = place_N3[:, 0].repeat_interleave(m * m)
        return (
            self.encoder(value_NC.unflatten(1, (m * m, -1)).flatten(0, 1), picture, place)
            .unflatten(0, (-1, m * m))
            .flatten(1)
        )
