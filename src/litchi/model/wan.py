"""The video autoencoder of Wan 2.1: convolutions that never see a later frame, four frames and 8 x 8 pixels a latent.

The first frame is a latent of its own, so that a picture is a clip of one frame. What a layer must remember of earlier
frames lies in `Past`, so that a clip can come in pieces and is coded as if it had come whole.

B clips of F frames of H x W pixels, C channels of latents, f x h x w cells, W width. Modules carry the names of
diffusers' `AutoencoderKLWan`; the original names are those of https://github.com/Wan-Video/Wan2.1, wan/modules/vae.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from litchi.config import BadInput
from litchi.model.transfer import MAX_DEPTH, MAX_WIDTH, Place, Said, check_scales

CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
"""Qwen-Image codes pictures with the same network."""

MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
DEVIATION = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
DEVIATION += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
"""Of each channel of Wan 2.1's latents, as its authors measured them."""


@dataclass(frozen=True, slots=True)
class WanConfig:
    """Widths of the stages are `width` times `multiples`, from the finest; between two of them the grid halves."""

    channels: int = 16
    width: int = 96
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    num_blocks: int = 2
    """Residual blocks of a stage of the encoder; the decoder has one more."""
    temporal: tuple[bool, ...] = (False, True, True)
    """Whether the frames halve as well, for each step from one stage to the next."""
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION

    def __post_init__(self) -> None:
        check_scales(self.mean, self.deviation, self.channels)
        if len(self.temporal) != len(self.multiples) - 1:
            raise BadInput(f"{CLASSES[0]}: {len(self.multiples)} stages have {len(self.multiples) - 1} steps between")
        if self.width * max(self.multiples) > MAX_WIDTH or any(self.width * m % 2 for m in self.multiples):
            raise BadInput(f"{CLASSES[0]}: widths must be even, at most {MAX_WIDTH}: check base_dim and dim_mult")

    @property
    def factor(self) -> int:
        """Pixels along a side of a cell."""
        return 2 ** len(self.temporal)

    @property
    def frames(self) -> int:
        """Frames of a cell, but for the first, which has one."""
        return 2 ** sum(self.temporal)

    @property
    def shift(self) -> tuple[float, ...]:
        return self.mean

    @property
    def scale(self) -> tuple[float, ...]:
        """Rows are (latent - shift) * scale."""
        return tuple(1 / deviation for deviation in self.deviation)


WAN21 = WanConfig()


@dataclass(slots=True)
class Past:
    """What each layer that mixes frames keeps of those that it has read; one for each clip and direction."""

    last: dict[nn.Module, Tensor] = field(default_factory=dict)


# ---- the network --------------------------------------------------------------------------------------------------


class WanAutoencoder(nn.Module):
    """Encoder and decoder of clips, and of pictures as clips of one frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = WanEncoder(config), WanDecoder(config)
        self.quant_conv = CausalConv(2 * config.channels, 2 * config.channels, (1, 1, 1))
        self.post_quant_conv = CausalConv(config.channels, config.channels, (1, 1, 1))

    def encode(self, pixels_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The mean of the latents of pictures in [-1, 1]."""
        return self.encode_clip(pixels_B3HW[:, :, None], Past())[:, :, 0]

    def decode(self, latents_BChw: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pictures, in [-1, 1] up to what the network overshoots."""
        return self.decode_clip(latents_BChw[:, :, None], Past())[:, :, 0]

    def encode_clip(self, clip_B3FHW: Float[Tensor, "B 3 F H W"], past: Past) -> Float[Tensor, "B C f h w"]:
        """The mean of the latents of what comes next of a clip in [-1, 1].

        A clip begins with one frame and goes on in groups of `config.frames`. Raises BadInput for another count.
        """
        begun, count = bool(past.last), clip_B3FHW.shape[2]
        if (count - (not begun)) % self.config.frames or not count:
            said = "goes on in" if begun else "begins with one frame and has after it"
            raise BadInput(f"a clip {said} groups of {self.config.frames} frames, but {count} came: cut or repeat some")
        return self.quant_conv(self.encoder(clip_B3FHW, past), past).chunk(2, dim=1)[0]

    def decode_clip(self, latents_BCfhw: Float[Tensor, "B C f h w"], past: Past) -> Float[Tensor, "B 3 F H W"]:
        """The frames of what comes next of a clip's latents."""
        return self.decoder(self.post_quant_conv(latents_BCfhw, past), past)


class WanEncoder(nn.Module):
    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        widths = [c.width * multiple for multiple in (1, *c.multiples)]
        self.conv_in = CausalConv(3, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, (inputs, width) in enumerate(zip(widths, widths[1:], strict=False)):
            self.down_blocks.extend(CausalResidual(width if j else inputs, width) for j in range(c.num_blocks))
            if i < len(c.temporal):
                self.down_blocks.append(ShrinkFrames(width) if c.temporal[i] else Shrink(width))
        self.mid_block = CausalMiddle(widths[-1])
        self.norm_out, self.conv_out = ChannelNorm(widths[-1]), CausalConv(widths[-1], 2 * c.channels)

    def forward(self, x_B3FHW: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x_B3FHW, past)
        for layer in (*self.down_blocks, self.mid_block):
            x = layer(x, past)
        return self.conv_out(F.silu(self.norm_out(x)), past)


class WanDecoder(nn.Module):
    def __init__(self, c: WanConfig) -> None:
        super().__init__()
        widths = [c.width * multiple for multiple in (c.multiples[-1], *c.multiples[::-1])]
        self.conv_in, self.mid_block = CausalConv(c.channels, widths[0]), CausalMiddle(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (inputs, width) in enumerate(zip(widths, widths[1:], strict=False)):
            stage = CausalStage(inputs // 2 if i else inputs, width, c.num_blocks + 1)
            if i < len(c.temporal):
                grow = GrowFrames(width) if c.temporal[-1 - i] else Grow(width)
                stage.upsamplers = nn.ModuleList([grow])
            self.up_blocks.append(stage)
        self.norm_out, self.conv_out = ChannelNorm(widths[-1]), CausalConv(widths[-1], 3)

    def forward(self, x_BCfhw: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x_BCfhw, past)
        for layer in (self.mid_block, *self.up_blocks):
            x = layer(x, past)
        return self.conv_out(F.silu(self.norm_out(x)), past)


class CausalStage(nn.Module):
    def __init__(self, inputs: int, width: int, count: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(CausalResidual(width if i else inputs, width) for i in range(count))
        self.upsamplers = nn.ModuleList()

    def forward(self, x_BWfhw: Tensor, past: Past) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x_BWfhw = layer(x_BWfhw, past)
        return x_BWfhw


class CausalMiddle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(width)])
        self.resnets = nn.ModuleList(CausalResidual(width, width) for _ in range(2))

    def forward(self, x_BWfhw: Tensor, past: Past) -> Tensor:
        first, last = self.resnets
        return last(self.attentions[0](first(x_BWfhw, past)), past)


class CausalResidual(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(inputs), ChannelNorm(width)
        self.conv1, self.conv2 = CausalConv(inputs, width), CausalConv(width, width)
        self.conv_shortcut = CausalConv(inputs, width, (1, 1, 1)) if inputs != width else None

    def forward(self, x_BWfhw: Tensor, past: Past) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x_BWfhw)), past)
        kept = x_BWfhw if self.conv_shortcut is None else self.conv_shortcut(x_BWfhw, past)
        return kept + self.conv2(F.silu(self.norm2(inner)), past)


class FrameAttention(nn.Module):
    """One head as wide as the layer; a cell reads all cells of its frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width, dims=2)
        self.to_qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x_BWfhw: Tensor) -> Tensor:
        x_NWhw = to_frames(x_BWfhw)
        qkv_N1PK = self.to_qkv(self.norm(x_NWhw)).flatten(2).transpose(1, 2)[:, None]
        read_NWP = F.scaled_dot_product_attention(*qkv_N1PK.chunk(3, dim=-1))[:, 0].transpose(1, 2)
        return x_BWfhw + to_clip(self.proj(read_NWP.reshape(x_NWhw.shape)), len(x_BWfhw))


class CausalConv(nn.Conv3d):
    """A frame is seen with those before it; before the first lies zero."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        _, height, width = kernel
        super().__init__(inputs, outputs, kernel, padding=(0, height // 2, width // 2))

    def forward(self, input: Tensor, past: Past | None = None) -> Tensor:
        """Without a past, `input` is a whole clip."""
        if (reach := self.kernel_size[0] - 1) == 0:
            return super().forward(input)
        before = None if past is None else past.last.get(self)
        padded = F.pad(input, (0, 0, 0, 0, reach, 0)) if before is None else torch.cat([before, input], dim=2)
        if past is not None:
            past.last[self] = padded[:, :, -reach:].clone()  # a view would keep the whole clip
        return super().forward(padded)


class ChannelNorm(nn.Module):
    """Values of a cell by the root of their mean square, over channels. `dims` are those that follow the channels."""

    def __init__(self, width: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *(1,) * dims))

    def forward(self, x_BW: Tensor) -> Tensor:
        return F.normalize(x_BW, dim=1) * len(self.gamma) ** 0.5 * self.gamma


class Shrink(nn.Module):
    """Half as high and wide; a cell is seen with its neighbours to the right and below."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))

    def forward(self, x_BWfhw: Tensor, past: Past) -> Tensor:
        return to_clip(self.resample(to_frames(x_BWfhw)), len(x_BWfhw))


class ShrinkFrames(Shrink):
    """Also half as many frames: the first stays, then each two are read with the one before them."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x_BWfhw: Tensor, past: Past) -> Tensor:
        x = super().forward(x_BWfhw, past)
        before = past.last.get(self)
        past.last[self] = x[:, :, -1:].clone()
        if before is not None:
            return self.time_conv(torch.cat([before, x], dim=2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Grow(nn.Module):
    """Twice as high and wide, half as many channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width // 2, 3, padding=1))

    def forward(self, x_BWfhw: Tensor, past: Past) -> Tensor:
        return to_clip(self.resample(to_frames(x_BWfhw)), len(x_BWfhw))


class GrowFrames(Grow):
    """Also twice as many frames: the first stays alone and unseen by the rest, each other becomes two."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.time_conv = CausalConv(width, 2 * width, (3, 1, 1))

    def forward(self, x_BWfhw: Tensor, past: Past) -> Tensor:
        begun = self in past.last
        past.last[self] = x_BWfhw.new_empty(0)
        alone, rest = x_BWfhw.split([0 if begun else 1, x_BWfhw.shape[2] - (not begun)], dim=2)
        if rest.shape[2]:
            two_B2Wfhw = self.time_conv(rest, past).unflatten(1, (2, -1))
            rest = two_B2Wfhw.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return super().forward(torch.cat([alone, rest], dim=2), past)


def to_frames(x_BWfhw: Tensor) -> Tensor:
    return x_BWfhw.transpose(1, 2).flatten(0, 1)


def to_clip(x_NWhw: Tensor, count: int) -> Tensor:
    return x_NWhw.unflatten(0, (count, -1)).transpose(1, 2)


# ---- configurations -----------------------------------------------------------------------------------------------


def read_wan(config: Mapping[str, Any]) -> WanConfig:
    """The `config.json` of diffusers as ours. Raises BadInput for what the network cannot compute."""
    said = Said(config, str(config.get("_class_name", CLASSES[0])))
    for key in ("in_channels", "out_channels", "input_channels"):
        said.only(key, 3, 3)
    said.only("attn_scales", [], [], ())
    said.only("is_residual", False, False, None)
    said.only("patch_size", None, None, 1)
    said.only("decoder_base_dim", None, None, config.get("base_dim", 96))
    return WanConfig(
        channels=said.count("z_dim", 16),
        width=said.count("base_dim", 96),
        multiples=said.counts("dim_mult", (1, 2, 4, 4)),
        num_blocks=said.count("num_res_blocks", 2, MAX_DEPTH),
        temporal=said.flags("temperal_downsample", (False, True, True)),
        mean=said.reals("latents_mean", MEAN),
        deviation=said.reals("latents_std", DEVIATION),
    )


def write_wan(c: WanConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers builds the same network."""
    return {
        "_class_name": CLASSES[0],
        "base_dim": c.width,
        "z_dim": c.channels,
        "dim_mult": list(c.multiples),
        "num_res_blocks": c.num_blocks,
        "attn_scales": [],
        "temperal_downsample": list(c.temporal),
        "dropout": 0.0,
        "latents_mean": list(c.mean),
        "latents_std": list(c.deviation),
        "scale_factor_temporal": c.frames,
        "scale_factor_spatial": c.factor,
    }


# ---- names --------------------------------------------------------------------------------------------------------


RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
OUTER = {"quant_conv": "conv1", "post_quant_conv": "conv2"}


def wan_places(c: WanConfig, naming: Literal["diffusers", "original"]) -> list[Place]:
    """Every tensor under diffusers' name, or under that of `Wan2.1_VAE.pth`."""
    with torch.device("meta"):
        names = [name for name, _ in WanAutoencoder(c).named_parameters()]
    if naming == "diffusers":
        return [Place(name, name) for name in names]
    return [Place(original_name(name, c.num_blocks + 2), name) for name in names]


def original_name(name: str, stride: int) -> str:
    """Theirs lists blocks and steps of a half in one row; a stage of the decoder takes `stride` places of it."""
    stem, _, kind = name.rpartition(".")
    match stem.split("."):
        case [half, "down_blocks", at, *inner]:
            stem = f"{half}.downsamples.{at}.{within(inner)}"
        case [half, "up_blocks", stage, "resnets", block, inner]:
            stem = f"{half}.upsamples.{int(stage) * stride + int(block)}.{RESIDUAL[inner]}"
        case [half, "up_blocks", stage, "upsamplers", _, *inner]:
            stem = f"{half}.upsamples.{int(stage) * stride + stride - 1}.{within(inner)}"
        case [half, "mid_block", "resnets", block, inner]:
            stem = f"{half}.middle.{2 * int(block)}.{RESIDUAL[inner]}"
        case [half, "mid_block", "attentions", _, inner]:
            stem = f"{half}.middle.1.{inner}"
        case [half, end]:
            stem = f"{half}.{ENDS[end]}"
        case [outer]:
            stem = OUTER[outer]
    return f"{stem}.{kind}"


def within(inner: list[str]) -> str:
    """A step keeps its names; what stands in a block has others."""
    return RESIDUAL.get(".".join(inner), ".".join(inner))
