"""How weights and pages lie in memory for the native path: panels of 32 outputs, in the order in which they are read.

int8 and int4 are unsigned, in groups of 32 inner values with an fp16 scale and an fp16 least value for each output: a
weight is scale * q + least. What is multiplied with them is rounded to 16 bits in groups of 32. Eight bits take the
whole range of a group, four the steps that `rounding.search` finds nearest. `native_pack.h` does the same, to the bit.

N outputs, I inner values of a matrix; B panels of 32 outputs. L layers, P pages, G key-value heads, K head width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from litchi.model.rounding import integers, search

BLOCK = 32
"""Outputs of a panel, inner values of a group, tokens of a block of keys."""

Format = Literal["float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"]
"""What weights are rounded to; w8a8 and w4a8 round what layers read to 8 bits as well, as llama.cpp does: faster, and
further from fp32."""
KINDS: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "w8a8": 4, "w4a8": 5}
BITS = {"int8": 8, "int4": 4, "w8a8": 8, "w4a8": 4}


def pack(weight: Float[Tensor, "N I"], form: Format) -> Tensor:
    """Panels of a matrix, the last filled up with zeros."""
    weight = F.pad(weight, (0, 0, 0, -len(weight) % BLOCK))
    match form:
        case "float32":
            return weight.unflatten(0, (-1, BLOCK)).mT.contiguous()
        case "bfloat16":
            return weight.bfloat16().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()
        case _:
            return pack_groups(weight, BITS[form])


def pack_groups(weight: Float[Tensor, "N I"], bits: int) -> UInt8[Tensor, "B groups bytes"]:
    """`unpack_groups` is the way back."""
    q, scale, least = nearest(weight) if bits == 4 else quantise(weight, bits)
    quads = q.unflatten(0, (-1, 2, BLOCK // 2)).unflatten(4, (-1, 4))  # panel, half, lane, group, quad, value
    quads = quads[..., [0, 2, 1, 3]]  # a mask of every second byte finds a pair of neighbours
    quads = quads.permute(0, 3, 4, 1, 2, 5)  # panel, group, quad, half, lane, value
    if bits == 4:
        quads = quads[:, :, :, 0] | (quads[:, :, :, 1] << 4)
    sizes = torch.stack([scale, least], -1).unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1)
    return torch.cat([sizes.flatten(2).contiguous().view(torch.uint8), quads.flatten(2)], 2).contiguous()


def unpack_groups(packed: UInt8[Tensor, "B groups bytes"], bits: int) -> Float[Tensor, "N I"]:
    """The weights that panels stand for, with those that filled up the last."""
    sizes, quads = packed[:, :, : 4 * BLOCK].contiguous().view(torch.float16), packed[:, :, 4 * BLOCK :]
    scale, least = (x.transpose(1, 2).flatten(0, 1) for x in sizes.unflatten(2, (2, BLOCK)).unbind(2))
    quads = quads.unflatten(2, (8, -1, BLOCK // 2, 4))
    quads = torch.cat([quads & 15, quads >> 4], 3) if bits == 4 else quads
    quads = quads[..., [0, 2, 1, 3]].permute(0, 3, 4, 1, 2, 5)  # panel, half, lane, group, quad, value
    return dequantise(quads.flatten(4).flatten(0, 2), scale, least)


def quantise(weight: Float[Tensor, "N I"], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (N, groups, 32), scales and least values (N, groups), both fp16, which take the range of each group."""
    groups = weight.unflatten(1, (-1, BLOCK))
    least, most, top = groups.amin(2), groups.amax(2), 2**bits - 1
    scale, least = ((most - least) / top).half(), least.half()
    inverse = 1 / scale.float().clamp(min=1e-30)
    steps = (groups - least.float()[..., None]) * inverse[..., None]
    return steps.round().clamp(0, top).to(torch.uint8), scale, least


def nearest(weight: Float[Tensor, "N I"]) -> tuple[Tensor, Tensor, Tensor]:
    """The same in four bits, as near as `search` comes."""
    groups = weight.unflatten(1, (-1, BLOCK))
    found = search(groups.flatten(0, 1))
    q = integers(groups.flatten(0, 1), found.scale, found.least).view_as(groups).to(torch.uint8)
    return q, found.scale.half().view(groups.shape[:2]), found.least.half().view(groups.shape[:2])


def dequantise(q: Tensor, scale: Tensor, least: Tensor) -> Float[Tensor, "N I"]:
    return (q * scale.float()[..., None] + least.float()[..., None]).flatten(1)


def logical_keys(keys: Tensor) -> Float[Tensor, "L P G page K"]:
    """A copy of pages of keys in the order of their shape."""
    page, width = keys.shape[-2:]
    each = 4 // keys.element_size()
    blocks = keys.reshape(*keys.shape[:3], page // BLOCK, width // each, BLOCK, each)
    return blocks.transpose(4, 5).reshape(keys.shape)


def logical_values(values: Tensor) -> Float[Tensor, "L P G page K"]:
    """A copy of pages of values in the order of their shape."""
    page, width = values.shape[-2:]
    each = 4 // values.element_size()
    blocks = values.reshape(*values.shape[:3], page // BLOCK, width // BLOCK, BLOCK // each, BLOCK, each)
    return blocks.permute(0, 1, 2, 3, 5, 7, 4, 6).reshape(values.shape)
