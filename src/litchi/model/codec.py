"""Pictures as a few tokens: raw pixel patches without parameters, or a discrete autoencoder lossless on its tiles.

The FSQ codec (finite scalar quantisation, Mentzer et al. 2023) works on square tiles. Each tile becomes one digit, the
index of its point on the FSQ lattice; a token holds the digits of the tiles that its patch covers. One digit a tile,
and not one a lattice dimension, so that tiles can be sampled apart without mixing the codes of two different things.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from litchi.config import BadInput


@dataclass(frozen=True, slots=True)
class PixelCodecConfig:
    """Patches of `patch` x `patch` pixels, scaled to [-1, 1]."""

    patch: int = 16


@dataclass(frozen=True, slots=True)
class TileCodecConfig:
    """FSQ over tiles of `tile` pixels, `patch` pixels a token, a lattice of `levels`."""

    patch: int = 16
    tile: int = 8
    levels: tuple[int, ...] = (4, 4, 4, 4)
    width: int = 96

    @property
    def digits(self) -> int:
        return (self.patch // self.tile) ** 2

    @property
    def codes(self) -> int:
        return math.prod(self.levels)


CodecConfig = PixelCodecConfig | TileCodecConfig


class PixelCodec:
    """No parameters: a token is its patch. For flows, and for a vision tower."""

    def __init__(self, config: PixelCodecConfig) -> None:
        self.config, self.patch = config, config.patch

    def encode(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "N C"]:
        return cut(pixels, self.patch).float() / 127.5 - 1

    def decode(self, rows: Float[Tensor, "N C"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        return join(to_bytes(rows), self.patch, height, width)


class TileCodec(nn.Module):
    """Each tile through a small MLP to a lattice point and back."""

    def __init__(self, config: TileCodecConfig) -> None:
        super().__init__()
        self.config, self.patch = config, config.patch
        values, dims, w = config.tile**2 * 3, len(config.levels), config.width
        self.encoder = nn.Sequential(nn.Linear(values, w), nn.GELU(), nn.Linear(w, w), nn.GELU(), nn.Linear(w, dims))
        self.decoder = nn.Sequential(
            nn.Linear(sum(config.levels), w), nn.GELU(), nn.Linear(w, w), nn.GELU(), nn.Linear(w, values)
        )
        self.known: dict[bytes, int] = {}

    @torch.no_grad()
    def encode(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "N C"]:
        """Digits of the tiles of each patch. A tile seen before is looked up. oracle: TileCodec.quantise"""
        check_size(pixels, self.patch)
        tiles = cut(pixels, self.config.tile)
        keys = [row.tobytes() for row in tiles.numpy()]
        fresh = sorted({k: i for i, k in enumerate(keys) if k not in self.known}.items())
        if fresh:
            if len(self.known) > 100_000:  # photographs would fill memory
                self.known.clear()
                return self.encode(pixels)
            found = self.quantise(tiles[[i for _, i in fresh]])
            self.known |= dict(zip((k for k, _ in fresh), found.tolist(), strict=True))
        digits = torch.tensor([self.known[k] for k in keys], dtype=torch.float32)
        return self.group(digits, pixels.shape[0], pixels.shape[1])

    @torch.no_grad()
    def decode(self, rows: Float[Tensor, "N C"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        digits = self.ungroup(rows, height, width).long().cpu()
        return join(to_bytes(self.decoder(self.points(digits))), self.config.tile, height, width)

    def quantise(self, tiles: UInt8[Tensor, "n values"]) -> Int[Tensor, "n"]:
        """The index of the lattice point of each tile."""
        top = torch.tensor(self.config.levels) - 1
        step = (self.encoder(tiles.float() / 127.5 - 1).clamp(0, 1) * top).round().long()
        return (step * strides(self.config.levels)).sum(-1)

    def points(self, index: Int[Tensor, "n"]) -> Float[Tensor, "n features"]:
        """What the decoder reads of an index: each lattice dimension as one of its levels."""
        steps = (index[:, None] // strides(self.config.levels)) % torch.tensor(self.config.levels)
        return torch.cat([F.one_hot(steps[:, i], n).float() for i, n in enumerate(self.config.levels)], dim=-1)

    def group(self, digits: Float[Tensor, "n"], height: int, width: int) -> Float[Tensor, "N C"]:
        side, t = self.patch // self.config.tile, self.config.tile
        grid = digits.view(height // self.patch, side, width // t // side, side)
        return grid.permute(0, 2, 1, 3).reshape(-1, side * side)

    def ungroup(self, rows: Float[Tensor, "N C"], height: int, width: int) -> Float[Tensor, "n"]:
        side = self.patch // self.config.tile
        grid = rows.view(height // self.patch, width // self.patch, side, side)
        return grid.permute(0, 2, 1, 3).reshape(-1)


def build_codec(config: CodecConfig) -> PixelCodec | TileCodec:
    match config:
        case PixelCodecConfig():
            return PixelCodec(config)
        case TileCodecConfig():
            return TileCodec(config)


def regroup(codec: PixelCodec | TileCodec, patch: int) -> PixelCodec | TileCodec:
    """The same codec with tokens of another size; a tile codec shares its weights."""
    match codec:
        case PixelCodec():
            return PixelCodec(PixelCodecConfig(patch))
        case TileCodec():
            other = TileCodec(replace(codec.config, patch=patch))
            other.encoder, other.decoder, other.known = codec.encoder, codec.decoder, codec.known
            return other


def fit(codec: TileCodec, tiles: UInt8[Tensor, "n values"], *, seed: int, max_steps: int = 8_000) -> float:
    """Train on distinct tiles until every one comes back to the byte; returns the share that does.

    Codes are chosen first (`spread`), so that no two tiles can share one; the encoder then learns to find them, and the
    decoder to draw from them. Raises ValueError if there are more tiles than codes.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in codec.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            nn.init.zeros_(parameter)
    values = tiles.float() / 127.5 - 1
    steps = spread(values, codec.config.levels)
    index = (steps * strides(codec.config.levels)).sum(-1)
    points = codec.points(index)
    top = torch.tensor(codec.config.levels) - 1

    def found() -> bool:
        return bool((codec.quantise(tiles) == index).all())

    def drawn() -> bool:
        return bool((to_bytes(codec.decoder(points)) == tiles).all())

    descend(codec.encoder, lambda: F.mse_loss(codec.encoder(values), steps / top), max_steps, found)
    descend(codec.decoder, lambda: F.mse_loss(codec.decoder(points), values), max_steps, drawn)
    codec.known.clear()
    return lossless(codec, tiles)


def spread(values: Float[Tensor, "n values"], levels: tuple[int, ...]) -> Int[Tensor, "n dims"]:
    """A lattice point for each tile, all distinct, like tiles near each other.

    Tiles are sorted along the first principal component and cut into as many equal groups as the first dimension has
    levels, each group along the second component, and so on.
    """
    if len(values) > math.prod(levels):
        raise ValueError(f"{len(values)} distinct tiles, but {math.prod(levels)} codes: raise the codec's levels")
    centred = (values - values.mean(0)).double()
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[: len(levels)]
    along = F.pad(centred @ axes.T, (0, len(levels) - len(axes)))
    steps = torch.zeros(len(values), len(levels), dtype=torch.long)
    groups = [torch.arange(len(values))]
    for dim, count in enumerate(levels):
        cuts = []
        for group in groups:
            pieces = group[along[group, dim].argsort(stable=True)].tensor_split(count)
            for level, piece in enumerate(pieces):
                steps[piece, dim] = level
            cuts += [piece for piece in pieces if len(piece)]
        groups = cuts
    return steps


def descend(part: nn.Module, loss: Callable[[], Tensor], max_steps: int, done: Callable[[], bool]) -> None:
    """Adam with a cosine over at most `max_steps`, looking every hundred whether it is done."""
    optimizer = torch.optim.Adam(part.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    for step in range(max_steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99 and done():
            return


@torch.no_grad()
def lossless(codec: TileCodec, tiles: UInt8[Tensor, "n values"]) -> float:
    """The share of tiles that come back to the byte."""
    back = to_bytes(codec.decoder(codec.points(codec.quantise(tiles))))
    return float((back == tiles).all(1).float().mean())


def strides(levels: tuple[int, ...]) -> Int[Tensor, "dims"]:
    return torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])


def cut(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[Tensor, "n values"]:
    """Square pieces in reading order, flattened. Raises BadInput if the size does not divide the picture."""
    check_size(pixels, size)
    height, width = pixels.shape[:2]
    x = torch.from_numpy(np.array(pixels, order="C")).view(height // size, size, width // size, size, 3)
    return x.permute(0, 2, 1, 3, 4).reshape(-1, size * size * 3)


def check_size(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> None:
    height, width = pixels.shape[:2]
    if height % size or width % size:
        raise BadInput(f"a picture of {height}x{width} cannot be cut into patches of {size}: resize it to a multiple")


def join(tiles: UInt8[Tensor, "n values"], size: int, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The inverse of `cut`."""
    x = tiles.cpu().view(height // size, width // size, size, size, 3)
    return x.permute(0, 2, 1, 3, 4).reshape(height, width, 3).numpy()


def to_bytes(values: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
