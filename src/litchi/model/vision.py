"""A vision transformer for understanding: pixel patches in, one row of the trunk's width out (ViT with LLaVA's MLP).

N patches of all pictures of a batch, P pictures, W width of the tower, D width of the trunk. Modules carry CLIP's names
in transformers; SigLIP, DINOv2 and ViT are the same network with other choices (model/towers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from litchi.model.rope import rotate

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True, slots=True)
class Tower:
    """Pixel patches read by a ViT and an MLP projector; never drawn, so it has no loss of its own."""

    channels: int
    """Values of one patch: patch * patch * 3, for each of its frames."""
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    grid: int = 32
    """Rows and columns of the position table."""
    mlp_width: int = 0
    """0 is four times the width."""
    activation: Activation = "gelu"
    epsilon: float = 1e-5
    table: Literal["axes", "cells", "corner", "stretched", "resized"] = "axes"
    """A position is the sum of its row's and its column's, or has a row of its own. Then a picture lies in the middle
    of the grid, or in its first corner (BAGEL); or the table is stretched over it (bilinear, corner on corner: Qwen-VL)
    or resized to it as a picture would be (bilinear, smoothed where it shrinks: SigLIP2)."""
    turns: bool = False
    """Whether heads turn with a patch's row and column (Qwen-VL)."""
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
    projector: Literal["mlp", "mlp_tanh", "linear", "merger"] = "mlp"
    """Two layers with GELU between (LLaVA) or its tanh form (BAGEL), one matrix (SmolVLM), or the two behind a norm of
    their own (Qwen3-VL)."""
    sines: int = 0
    """Rows and columns of a fixed table of sines that is added behind the projector (BAGEL)."""
    frames: int = 1
    """Frames of a film that one patch covers (Qwen-VL)."""
    deep: tuple[int, ...] = ()
    """Layers whose rows are merged too, and added to what the first layers of the trunk write (DeepStack)."""
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

    def forward(self, x_ND: Tensor, mask_NN: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (p(x_ND).unflatten(-1, (self.num_heads, -1)) for p in self.projections)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (x_NHK.transpose(0, 1)[None] for x_NHK in (q, k, v))
        o_HNK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NN)[0]
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

    def forward(self, x_ND: Tensor, mask_NN: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x_ND = x_ND + scaled(self.self_attn(self.layer_norm1(x_ND), mask_NN, rotation), self.scale1)
        return x_ND + scaled(self.mlp(self.layer_norm2(x_ND)), self.scale2)


def scaled(x_ND: Tensor, scale_D: Tensor | None) -> Tensor:
    return x_ND if scale_D is None else x_ND * scale_D


class VisionEncoder(nn.Module):
    """The tower without what connects it: reads all pictures at once; a patch attends to those of its own picture."""

    def __init__(self, c: Tower) -> None:
        super().__init__()
        self.config = c
        self.patch_embedding = nn.Linear(c.channels, c.width, bias=c.patch_bias)
        cells = 2 * c.grid if c.table == "axes" else c.grid * c.grid
        self.position_embedding = nn.Embedding(cells + c.class_token, c.width)
        if c.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.pre_layernorm = nn.LayerNorm(c.width, eps=c.epsilon) if c.norm_before else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.num_layers))
        self.post_layernorm = nn.LayerNorm(c.width, eps=c.epsilon) if c.norm_after else nn.Identity()

    def forward(
        self, value_NC: Float[Tensor, "N C"], picture_N: Int[Tensor, "N"], place_N2: Int[Tensor, "N 2"]
    ) -> Float[Tensor, "N W"]:
        """`picture` numbers the picture of each patch, `place` is its row and column within it, in [0, grid).

        Where the table is stretched or resized, a picture may have more rows and columns than the grid.
        """
        *_, x_ND = self.states(value_NC, picture_N, place_N2)
        return x_ND if self.config.take else self.post_layernorm(x_ND)

    def states(self, value_NC: Tensor, picture_N: Tensor, place_N2: Tensor) -> Iterator[Float[Tensor, "N W"]]:
        """The rows after each layer that is run."""
        c = self.config
        x_ND = self.patch_embedding(value_NC) + self.places(picture_N, place_N2)
        rotation = axial(place_N2, c.width // c.num_heads) if c.turns else None
        first = 0
        if c.class_token:
            pictures = picture_N.unique()
            first = len(pictures)
            row_D = self.class_embedding + self.position_embedding.weight[0]
            x_ND, picture_N = torch.cat([row_D.expand(first, -1), x_ND]), torch.cat([pictures, picture_N])
        x_ND = self.pre_layernorm(x_ND)
        mask_NN = picture_N[:, None] == picture_N[None]
        for layer in self.layers[: c.take or None]:
            x_ND = layer(x_ND, mask_NN, rotation)
            yield x_ND[first:]

    def places(self, picture_N: Tensor, place_N2: Tensor) -> Float[Tensor, "N W"]:
        grid, first = self.config.grid, int(self.config.class_token)
        match self.config.table:
            case "axes":
                offset = torch.tensor([first, first + grid], device=place_N2.device)
                return self.position_embedding(place_N2 + offset).sum(1)
            case "cells" | "corner":
                return self.position_embedding(place_N2[:, 0] * grid + place_N2[:, 1] + first)
        side_N2 = sides(picture_N, place_N2)
        if self.config.table == "resized":
            down_NG, across_NG = (resized(place_N2[:, axis], side_N2[:, axis], grid) for axis in range(2))
            return (down_NG[:, :, None] * across_NG[:, None]).flatten(1) @ self.position_embedding.weight
        exact_N2 = place_N2 * (grid - 1) / (side_N2 - 1).clamp(min=1)
        low_N2 = exact_N2.floor().long().clamp(max=grid - 1)
        high_N2, share_N2 = (low_N2 + 1).clamp(max=grid - 1), exact_N2 - low_N2
        ends = [((low_N2[:, i], 1 - share_N2[:, i]), (high_N2[:, i], share_N2[:, i])) for i in range(2)]
        x_ND = torch.zeros_like(self.position_embedding(low_N2[:, 0]))
        for (rows, down), (columns, across) in product(*ends):
            x_ND = x_ND + self.position_embedding(rows * grid + columns) * (down * across)[:, None]
        return x_ND


def resized(place_N: Tensor, side_N: Tensor, grid: int) -> Float[Tensor, "N G"]:
    """What each line of a grid adds to a line of a picture that the grid is resized to: a triangle."""
    scale_N = grid / side_N.float()
    centre_N = (place_N + 0.5) * scale_N - 0.5
    away_NG = (torch.arange(grid, device=place_N.device) - centre_N[:, None]).abs() / scale_N.clamp(min=1)[:, None]
    share_NG = (1 - away_NG).clamp(min=0)
    return share_NG / share_NG.sum(1, keepdim=True)


def axial(place_N2: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """Half of the pairs of a head turn with the row, half with the column, at the same frequencies (Qwen2-VL)."""
    num = head_width // 4
    frequency = 10_000.0 ** (-torch.arange(num, device=place_N2.device, dtype=torch.float32) / num)
    angle = (place_N2[:, :, None] * frequency).flatten(1)[:, None]
    return angle.cos(), angle.sin()


def corners(picture_N: Tensor, place_N2: Tensor, which: Literal["amin", "amax"]) -> Int[Tensor, "N 2"]:
    """The smallest or largest row and column of each patch's picture."""
    pictures, of_N = picture_N.unique(return_inverse=True)
    empty = place_N2.new_zeros(len(pictures), 2)
    return empty.scatter_reduce(0, of_N[:, None].expand(-1, 2), place_N2, which, include_self=False)[of_N]


def sides(picture_N: Tensor, place_N2: Tensor) -> Int[Tensor, "N 2"]:
    """Rows and columns of each patch's picture."""
    return corners(picture_N, place_N2, "amax") - corners(picture_N, place_N2, "amin") + 1


class SineTable(nn.Module):
    """A fixed row for each place of a grid, counted from the corner of a picture: its column as sines and cosines, and
    then its row (MAE, DiT). Not trained; it is saved with the weights, as BAGEL saves it."""

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.weight = nn.Parameter(self.values(), requires_grad=False)

    def values(self) -> Float[Tensor, "G*G W"]:
        """What the table says."""
        frequency = 10_000.0 ** (-torch.arange(self.width // 4, dtype=torch.float64) / (self.width // 4))
        angle_GF = torch.arange(self.grid)[:, None] * frequency
        line_GF = torch.cat([angle_GF.sin(), angle_GF.cos()], 1).float()
        return torch.cat([line_GF.expand(self.grid, -1, -1), line_GF[:, None].expand(-1, self.grid, -1)], 2).flatten(
            0, 1
        )

    def forward(self, place_N3: Int[Tensor, "N 3"]) -> Float[Tensor, "N W"]:
        """`place` is a picture, and a row and column there, as `Vectors` has it."""
        place_N2 = (place_N3[:, 1:] - corners(place_N3[:, 0], place_N3[:, 1:], "amin")).clamp(max=self.grid - 1)
        return F.embedding(place_N2[:, 0] * self.grid + place_N2[:, 1], self.weight)


class Merger(nn.Module):
    """The rows of the patches of one token as one, through two layers; the norm is before they are put side by side, or
    after."""

    def __init__(self, c: Tower, width: int, *, late: bool) -> None:
        super().__init__()
        wide = c.width * c.merge**2
        self.norm = nn.LayerNorm(wide if late else c.width, eps=c.epsilon)
        self.linear_fc1, self.linear_fc2 = nn.Linear(wide, wide), nn.Linear(wide, width)

    def forward(self, x_NPW: Float[Tensor, "N P W"]) -> Float[Tensor, "N D"]:
        late = self.norm.weight.shape[0] > x_NPW.shape[2]
        x_NF = self.norm(x_NPW.flatten(1)) if late else self.norm(x_NPW).flatten(1)
        return self.linear_fc2(F.gelu(self.linear_fc1(x_NF)))


class VisionTower(nn.Module):
    """The tower and what brings its rows to the trunk's width."""

    def __init__(self, c: Tower, width: int) -> None:
        super().__init__()
        self.config = c
        self.encoder = VisionEncoder(c)
        wide = c.width * c.merge**2
        match c.projector:
            case "mlp" | "mlp_tanh":
                gelu = nn.GELU("none" if c.projector == "mlp" else "tanh")
                self.project = nn.Sequential(nn.Linear(wide, width), gelu, nn.Linear(width, width))
            case "linear":
                self.project = nn.Linear(wide, width, bias=False)
            case "merger":
                self.project = Merger(c, width, late=False)
        self.deep = nn.ModuleList(Merger(c, width, late=True) for _ in c.deep)
        if c.sines:
            self.sines = SineTable(c.sines, width)
        if c.newline:
            self.newline = nn.Parameter(torch.zeros(width))

    def forward(self, value_NC: Float[Tensor, "N C"], place_N3: Int[Tensor, "N 3"]) -> Float[Tensor, "N X D"]:
        """The row of each token, and those that are added deeper. `place` is its picture, row and column."""
        if not self.config.newline:
            return self.rows(value_NC, place_N3)
        x_NXD = self.newline.expand(len(value_NC), 1, -1)
        seen = (place_N3[:, 0] >= 0).nonzero()[:, 0]
        return x_NXD.index_copy(0, seen, self.rows(value_NC[seen], place_N3[seen]))

    def rows(self, value_NC: Tensor, place_N3: Tensor) -> Float[Tensor, "N X D"]:
        c, patches = self.config, self.config.merge**2
        value_NC = value_NC.unflatten(1, (patches, -1)).flatten(0, 1)
        where = place_N3[:, 0].repeat_interleave(patches), self.spread(place_N3)
        deep, x_ND = [], value_NC
        for index, x_ND in enumerate(self.encoder.states(value_NC, *where)):
            if index in c.deep:
                deep.append(self.deep[c.deep.index(index)](x_ND.unflatten(0, (-1, patches))))
        x_NPW = (x_ND if c.take else self.encoder.post_layernorm(x_ND)).unflatten(0, (-1, patches))
        x_ND = self.project(x_NPW if c.projector == "merger" else x_NPW.flatten(1))
        if c.sines:
            x_ND = x_ND + self.sines(place_N3)
        return torch.stack([x_ND, *deep], 1)

    def spread(self, place_N3: Tensor) -> Int[Tensor, "N 2"]:
        """Row and column, from 0, of every patch of every token."""
        c, m = self.config, self.config.merge
        if c.table in ("corner", "stretched", "resized"):
            place_N2 = place_N3[:, 1:] - corners(place_N3[:, 0], place_N3[:, 1:], "amin")
        else:
            place_N2 = place_N3[:, 1:] + c.grid // m // 2
        within = torch.cartesian_prod(*[torch.arange(m, device=place_N3.device)] * 2).view(-1, 2)
        place_N2 = (place_N2[:, None] * m + within).flatten(0, 1)
        return place_N2 if c.table in ("stretched", "resized") else place_N2.clamp(0, c.grid - 1)
