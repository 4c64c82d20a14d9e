"""Adapters as the native path reads them: updates of each of its four products of a layer, packed panel by panel.

oracle: `lowrank.Adapters`

L layers, R rank, I inner values and O outputs of a matrix, P panels of 32 outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_int32, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from litchi.model.adapters import Adapter, Update
from litchi.model.network import ModelConfig
from litchi.model.packing import BLOCK, KINDS, Format

SUMS = 4
"""Sums that the C++ makes at once: ranks are filled up to a multiple with zeros."""


class CWidening(Structure):
    _fields_ = [("up", c_void_p), ("first", c_int32), ("count", c_int32)]


class CUpdate(Structure):
    _fields_ = [("down", c_void_p), ("panels", c_void_p), ("rank", c_int32), ("kind", c_int32)]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The adapters of the sequences of one call, as an array of pointers that is kept while it runs."""

    pointers: ctypes.Array[c_void_p]
    widest: int
    """The largest rank of a product, its matrices together."""

    @property
    def given(self) -> tuple[int, int]:
        """What the C++ is told."""
        return ctypes.addressof(self.pointers), self.widest


class PackedAdapters:
    """Adapters of a network, packed once."""

    def __init__(self, adapters: Mapping[str, Adapter], c: ModelConfig, weights: Format) -> None:
        """Their weights are fp32 where the network's are, and bf16 beside all others."""
        self.config, self.dtype = c, torch.float32 if weights == "float32" else torch.bfloat16
        self.held: list[object] = []
        """What the pointers point to."""
        self.widest = SUMS
        self.known = {name: self.whole(adapter) for name, adapter in adapters.items()}

    def of(self, names: Sequence[str]) -> Chosen | None:
        """For sequences that name their adapters, or ""; None if none does."""
        if not any(names):
            return None
        pointers = (c_void_p * len(names))(*(self.known[name] if name else None for name in names))
        return Chosen(pointers, self.widest)

    def whole(self, adapter: Adapter) -> int:
        """The address of its updates, four for each layer."""
        c, found = self.config, []
        heads, groups = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
        for layer in range(c.num_layers):
            updates = {n: adapter.updates.get(f"layers.{layer}.experts.0.{n}") for n in WIDTHS}
            for names in SITES:
                sizes = {"heads": heads, "groups": groups, "width": c.width, "mlp": c.mlp_width}
                found.append(self.site([updates[n] for n in names], [sizes[WIDTHS[n]] for n in names]))
        array = (CUpdate * len(found))(*found)
        self.held.append(array)
        return ctypes.addressof(array)

    def site(self, updates: Sequence[Update | None], widths: Sequence[int]) -> CUpdate:
        """Of matrices that are one product: those of attention one after another, gate and up panel by panel."""
        there = [update for update in updates if update is not None]
        if not there:
            return CUpdate()
        down = torch.cat([update.down for update in there])
        down = F.pad(down, (0, 0, 0, -len(down) % SUMS))
        self.widest = max(self.widest, len(down))
        first, panels = 0, []
        for update, width in zip(updates, widths, strict=True):
            panels.append([CWidening(None, 0, 0)] * (width // BLOCK))
            if update is not None:
                panels[-1] = self.panels(update, first)
                first += len(update.down)
        ordered = (
            [panel for pair in zip(*panels, strict=True) for panel in pair] if len(panels) == 2 else sum(panels, [])
        )
        array = (CWidening * len(ordered))(*ordered)
        self.held.append(array)
        kind = KINDS["float32" if self.dtype == torch.float32 else "bfloat16"]
        return CUpdate(self.hold(down), ctypes.addressof(array), len(down), kind)

    def panels(self, update: Update, first: int) -> list[CWidening]:
        rank = len(update.down)
        at = self.hold(update.up.unflatten(0, (-1, BLOCK)).mT)
        size = rank * BLOCK * self.dtype.itemsize
        return [CWidening(at + index * size, first, rank) for index in range(len(update.up) // BLOCK)]

    def hold(self, weight: Tensor) -> int:
        kept = weight.to(self.dtype).contiguous().clone()
        self.held.append(kept)
        return kept.data_ptr()


SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The four products of a layer, as `Trunk.layer` puts matrices together; the C++ has the same order."""

WIDTHS = {
    "self_attn.q_proj": "heads",
    "self_attn.k_proj": "groups",
    "self_attn.v_proj": "groups",
    "self_attn.o_proj": "width",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "width",
}
"""How many outputs a matrix has."""
