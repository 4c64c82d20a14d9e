"""The tiny autoencoders of the TAESD family (TAESD, TAESDXL, TAESD3, TAEF1, TAEF2): pictures to latents and back, fast.

Each was distilled from the large autoencoder whose latents it shares, already normalised as a diffusion model reads
them. B pictures of H x W pixels, C channels of latents, h x w cells, W width.
Sources: https://github.com/madebyollin/taesd, and `AutoencoderTiny` of diffusers for its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from litchi.config import BadInput
from litchi.model.transfer import MAX_DEPTH, Place, Said, check_scales

CLASS = "AutoencoderTiny"


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Blocks of each stage; between two stages the grid halves (encoder) or doubles (decoder)."""

    channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    normed: bool = False
    """Whether blocks of the coarsest stage first add a branch with a group norm over the whole picture (TAEF2)."""
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    """Rows are (latent - shift) * scale; one number for all channels, or one each."""

    def __post_init__(self) -> None:
        check_scales(self.shift, self.scale, self.channels)
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise BadInput(f"{CLASS}: its halves have {len(self.encoder_blocks)} and {len(self.decoder_blocks)} stages")

    @property
    def factor(self) -> int:
        """Pixels along a side of a cell."""
        return 2 ** (len(self.encoder_blocks) - 1)


class TinyBlock(nn.Module):
    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))
        self.pool = None
        if normed:
            first, last = (nn.Conv2d(a * width, b * width, 1, bias=False) for a, b in ((1, 4), (4, 1)))
            self.pool = nn.Sequential(first, nn.GroupNorm(4, 4 * width), nn.ReLU(), last)

    def forward(self, x_BWhw: Tensor) -> Tensor:
        if self.pool is not None:
            x_BWhw = x_BWhw + self.pool(x_BWhw)
        return F.relu(x_BWhw + self.conv(x_BWhw))


class TinyAutoencoder(nn.Module):
    """Encoder and decoder, each a plain stack of convolutions and blocks."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Sequential(*encoder_layers(config))
        self.decoder = nn.Sequential(*decoder_layers(config))

    def encode(self, pixels_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of pixels in [-1, 1]; sides must be multiples of `config.factor`."""
        return self.encoder(pixels_B3HW / 2 + 0.5)

    def decode(self, latents_BChw: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels, in [-1, 1] up to what the network overshoots. Latents beyond 3 are bent back, as in training."""
        return self.decoder((latents_BChw / 3).tanh() * 3) * 2 - 1


def encoder_layers(c: TinyConfig) -> Iterator[nn.Module]:
    for i, count in enumerate(c.encoder_blocks):
        yield conv(c.width, c.width, stride=2, bias=False) if i else conv(3, c.width)
        yield from (TinyBlock(c.width, c.normed and i + 1 == len(c.encoder_blocks)) for _ in range(count))
    yield conv(c.width, c.channels)


def decoder_layers(c: TinyConfig) -> Iterator[nn.Module]:
    yield conv(c.channels, c.width)
    yield nn.ReLU()
    for i, count in enumerate(c.decoder_blocks):
        if i:
            yield nn.Upsample(scale_factor=2)
            yield conv(c.width, c.width, bias=False)
        yield from (TinyBlock(c.width, c.normed and i == 0) for _ in range(count))
    yield conv(c.width, 3)


def conv(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


# ---- configurations -----------------------------------------------------------------------------------------------


def read_tiny(config: Mapping[str, Any]) -> TinyConfig:
    """The `config.json` of diffusers as ours. Raises BadInput for what the network cannot compute."""
    said = Said(config, CLASS)
    for key in ("in_channels", "out_channels"):
        said.only(key, 3, 3)
    said.only("act_fn", "relu", "relu")
    said.only("upsample_fn", "nearest", "nearest")
    said.only("upsampling_scaling_factor", 2, 2)
    widths = {*said.counts("encoder_block_out_channels", [64]), *said.counts("decoder_block_out_channels", [64])}
    if len(widths) > 1:
        raise BadInput(f"{CLASS}: stages of unlike width {sorted(widths)} cannot be computed here; one width can")
    return TinyConfig(
        channels=said.count("latent_channels", 4),
        width=widths.pop(),
        encoder_blocks=said.counts("num_encoder_blocks", (1, 3, 3, 3), MAX_DEPTH),
        decoder_blocks=said.counts("num_decoder_blocks", (3, 3, 3, 1), MAX_DEPTH),
        shift=said.reals("shift_factor", (0.0,)),
        scale=said.reals("scaling_factor", (1.0,)),
    )


def write_tiny(c: TinyConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers builds the same network. Raises BadInput where it cannot."""
    if c.normed:
        raise BadInput(f"{CLASS} of diffusers has no group norm (TAEF2 has): keep the files of its owners")
    if len(c.scale) > 1 or len(c.shift) > 1:
        raise BadInput(f"{CLASS} of diffusers has one scale for all channels")
    stages = len(c.encoder_blocks)
    return {
        "_class_name": CLASS,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": c.channels,
        "encoder_block_out_channels": [c.width] * stages,
        "decoder_block_out_channels": [c.width] * stages,
        "num_encoder_blocks": list(c.encoder_blocks),
        "num_decoder_blocks": list(c.decoder_blocks),
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
        "shift_factor": c.shift[0],
        "scaling_factor": c.scale[0],
    }


def infer_tiny(tensors: Mapping[str, Tensor]) -> TinyConfig:
    """The configuration of a member of the family, from its tensors under either naming; all share their depth."""
    first = next((tensors[name] for name in ("encoder.0.weight", "encoder.layers.0.weight") if name in tensors), None)
    last = next((tensors[name] for name in ("encoder.14.bias", "encoder.layers.14.bias") if name in tensors), None)
    if first is None or last is None or first.dim() != 4 or last.dim() != 1:
        raise BadInput("these are not the tensors of a TAESD, TAESDXL, TAESD3, TAEF1 or TAEF2: name its configuration")
    return TinyConfig(channels=len(last), width=len(first), normed=any(".pool." in name for name in tensors))


def tiny_places(c: TinyConfig, naming: Literal["diffusers", "original"]) -> list[Place]:
    """Every tensor under diffusers' name, or under the one in its owners' two files, before which their half stands."""
    with torch.device("meta"):
        names = [name for name, _ in TinyAutoencoder(c).named_parameters()]
    found = []
    for name in names:
        half, index, rest = name.split(".", 2)
        if naming == "diffusers":
            found.append(Place(f"{half}.layers.{index}.{rest}", name))
        else:  # their decoder counts what bends latents back as its first layer
            found.append(Place(f"{half}.{int(index) + (half == 'decoder')}.{rest}", name))
    return found
