"""The image autoencoder of Stable Diffusion and FLUX: residual convolutions around one layer of attention.

SD, SDXL, SD3 and FLUX.1 are this network with other sizes. B pictures of H x W pixels, C channels of latents, h x w
cells, W width. Modules carry the names of diffusers' `AutoencoderKL`; the original names are those of
https://github.com/black-forest-labs/flux, src/flux/modules/autoencoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from litchi.config import BadInput
from litchi.model.transfer import MAX_DEPTH, Place, Said, check_scales

CLASS = "AutoencoderKL"
EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class KLConfig:
    """Widths of the stages from the finest to the coarsest; between two of them the grid halves."""

    channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_blocks: int = 2
    """Residual blocks of a stage of the encoder; the decoder has one more."""
    groups: int = 32
    mixed: bool = False
    """Whether convolutions of one pixel stand between the latents and both halves (SD and SDXL)."""
    attends: bool = True
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    """Rows are (latent - shift) * scale; one number for all channels, or one each."""

    def __post_init__(self) -> None:
        check_scales(self.shift, self.scale, self.channels)
        if odd := [width for width in self.widths if width % self.groups]:
            raise BadInput(f"{CLASS}: a width of {odd[0]} does not divide into {self.groups} groups")

    @property
    def factor(self) -> int:
        """Pixels along a side of a cell."""
        return 2 ** (len(self.widths) - 1)


SD15 = KLConfig(mixed=True, scale=(0.18215,))
SDXL = KLConfig(mixed=True, scale=(0.13025,))
SD3 = KLConfig(channels=16, shift=(0.0609,), scale=(1.5305,))
FLUX = KLConfig(channels=16, shift=(0.1159,), scale=(0.3611,))


# ---- the network --------------------------------------------------------------------------------------------------


class KLAutoencoder(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config, double = config, 2 * config.channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(double, double, 1) if config.mixed else nn.Identity()
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1) if config.mixed else nn.Identity()

    def encode(self, pixels_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The mean of the latents of pixels in [-1, 1]; sides must be multiples of `config.factor`."""
        return self.quant_conv(self.encoder(pixels_B3HW)).chunk(2, dim=1)[0]

    def decode(self, latents_BChw: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels, in [-1, 1] up to what the network overshoots."""
        return self.decoder(self.post_quant_conv(latents_BChw))


class Encoder(nn.Module):
    def __init__(self, c: KLConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, c.widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(c.widths):
            stage = Stage(c.widths[max(i - 1, 0)], width, c.num_blocks, c.groups)
            if i + 1 < len(c.widths):
                stage.downsamplers = nn.ModuleList([Downsample(width)])
            self.down_blocks.append(stage)
        self.mid_block = Middle(c.widths[-1], c.groups, c.attends)
        self.conv_norm_out = nn.GroupNorm(c.groups, c.widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(c.widths[-1], 2 * c.channels, 3, padding=1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        x_BWhw = self.conv_in(x_B3HW)
        for stage in self.down_blocks:
            x_BWhw = stage(x_BWhw)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x_BWhw))))


class Decoder(nn.Module):
    def __init__(self, c: KLConfig) -> None:
        super().__init__()
        widths = c.widths[::-1]
        self.conv_in = nn.Conv2d(c.channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], c.groups, c.attends)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            stage = Stage(widths[max(i - 1, 0)], width, c.num_blocks + 1, c.groups)
            if i + 1 < len(widths):
                stage.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(c.groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        x_BWhw = self.mid_block(self.conv_in(x_BChw))
        for stage in self.up_blocks:
            x_BWhw = stage(x_BWhw)
        return self.conv_out(F.silu(self.conv_norm_out(x_BWhw)))


class Stage(nn.Module):
    """Blocks at one resolution, and the way to the next if there is one."""

    def __init__(self, inputs: int, width: int, count: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width if i else inputs, width, groups) for i in range(count))
        self.downsamplers = self.upsamplers = nn.ModuleList()

    def forward(self, x_BWhw: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x_BWhw = layer(x_BWhw)
        return x_BWhw


class Middle(nn.Module):
    def __init__(self, width: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([CellAttention(width, groups)] if attends else [])

    def forward(self, x_BWhw: Tensor) -> Tensor:
        first, last = self.resnets
        for layer in (first, *self.attentions, last):
            x_BWhw = layer(x_BWhw)
        return x_BWhw


class Residual(nn.Module):
    def __init__(self, inputs: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs, EPSILON), nn.GroupNorm(groups, width, EPSILON)
        self.conv1, self.conv2 = nn.Conv2d(inputs, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x_BWhw: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x_BWhw)))
        return self.conv_shortcut(x_BWhw) + self.conv2(F.silu(self.norm2(inner)))


class CellAttention(nn.Module):
    """One head as wide as the layer; a cell reads all cells of its picture."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BWhw: Tensor) -> Tensor:
        rows_BNW = self.group_norm(x_BWhw).flatten(2).transpose(1, 2)
        q, k, v = (project(rows_BNW)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        read_BNW = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x_BWhw + self.to_out[0](read_BNW).transpose(1, 2).reshape(x_BWhw.shape)


class Downsample(nn.Module):
    """Every second pixel, seen with its neighbours to the right and below; past the edge lies zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BWhw: Tensor) -> Tensor:
        return self.conv(F.pad(x_BWhw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BWhw: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BWhw, scale_factor=2.0, mode="nearest"))


# ---- configurations -----------------------------------------------------------------------------------------------


def read_kl(config: Mapping[str, Any]) -> KLConfig:
    """The `config.json` of diffusers as ours. Raises BadInput for what the network cannot compute."""
    said = Said(config, CLASS)
    for key in ("in_channels", "out_channels"):
        said.only(key, 3, 3)
    said.only("act_fn", "silu", "silu")
    widths = said.counts("block_out_channels", [64])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        said.only(key, [kind], [kind] * len(widths), (kind,) * len(widths))
    mixed = config.get("use_quant_conv", True)
    said.only("use_post_quant_conv", True, mixed)
    said.only("mid_block_add_attention", True, True, False)
    factor = said.reals("scaling_factor", (0.18215,))[0]
    shift = said.reals("latents_mean", said.reals("shift_factor", (0.0,)))
    return KLConfig(
        channels=said.count("latent_channels", 4),
        widths=widths,
        num_blocks=said.count("layers_per_block", 1, MAX_DEPTH),
        groups=said.count("norm_num_groups", 32),
        mixed=bool(mixed),
        attends=config.get("mid_block_add_attention", True),
        shift=shift,
        scale=tuple(factor / deviation for deviation in said.reals("latents_std", (1.0,)) if deviation),
    )


def write_kl(c: KLConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers builds the same network."""
    stages = len(c.widths)
    if len(c.scale) > 1 or len(c.shift) > 1:
        scales: dict[str, Any] = {"scaling_factor": 1.0, "latents_std": [1 / scale for scale in each(c.scale, c)]}
        scales |= {"latents_mean": list(each(c.shift, c))}
    else:
        scales = {"scaling_factor": c.scale[0], "shift_factor": c.shift[0] or None}
    return {
        "_class_name": CLASS,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": c.channels,
        "block_out_channels": list(c.widths),
        "layers_per_block": c.num_blocks,
        "norm_num_groups": c.groups,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "use_quant_conv": c.mixed,
        "use_post_quant_conv": c.mixed,
        "mid_block_add_attention": c.attends,
    } | scales


def each(values: tuple[float, ...], c: KLConfig) -> tuple[float, ...]:
    return values if len(values) > 1 else values * c.channels


# ---- names --------------------------------------------------------------------------------------------------------


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def kl_places(c: KLConfig, naming: Literal["diffusers", "original"]) -> list[Place]:
    """Every tensor under diffusers' name, or under that of FLUX's `ae.safetensors`."""
    with torch.device("meta"):
        names = [name for name, _ in KLAutoencoder(c).named_parameters()]
    if naming == "diffusers":
        return [Place(name, name) for name in names]
    return [original_place(name, len(c.widths)) for name in names]


def original_place(name: str, stages: int) -> Place:
    """Theirs counts the stages of both halves from the finest, and projects by convolutions of one pixel."""
    stem, _, kind = name.rpartition(".")
    match stem.split("."):
        case [half, "down_blocks", stage, "resnets", block, inner]:
            stem = f"{half}.down.{stage}.block.{block}.{shortcut(inner)}"
        case [half, "down_blocks", stage, "downsamplers", _, inner]:
            stem = f"{half}.down.{stage}.downsample.{inner}"
        case [half, "up_blocks", stage, "resnets", block, inner]:
            stem = f"{half}.up.{stages - 1 - int(stage)}.block.{block}.{shortcut(inner)}"
        case [half, "up_blocks", stage, "upsamplers", _, inner]:
            stem = f"{half}.up.{stages - 1 - int(stage)}.upsample.{inner}"
        case [half, "mid_block", "resnets", block, inner]:
            stem = f"{half}.mid.block_{int(block) + 1}.{inner}"
        case [half, "mid_block", "attentions", _, *inner]:
            projection = ".".join(inner)
            tail = (1, 1) if kind == "weight" and projection != "group_norm" else ()
            return Place(f"{half}.mid.attn_1.{ATTENTION[projection]}.{kind}", name, tail)
        case [half, "conv_norm_out"]:
            stem = f"{half}.norm_out"
    return Place(f"{stem}.{kind}", name)


def shortcut(inner: str) -> str:
    return "nin_shortcut" if inner == "conv_shortcut" else inner
