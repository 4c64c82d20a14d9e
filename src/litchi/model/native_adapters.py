"""Adapters as the native path reads them: updates of each of its four products of a layer, packed panel by panel.

oracle: `lowrank.Adapters`

L layers, R rank, I inner values and O outputs of a matrix, P panels of 32 outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_int32, c_void_p
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litchi.model.adapters import MAX_RANK, Adapter, Update
from litchi.model.network import ModelConfig
from litchi.model.packing import BLOCK, KINDS, Format, pack

SUMS = 4
"""Ranks that the C++ sums at once: those of each matrix are filled up to a multiple with zeros."""


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


class Room(Protocol):
    """Memory that gives bytes at a cache line, as `native.Arena` does."""

    def take(self, size: int) -> Tensor: ...


class PackedAdapters:
    """Adapters of a network, packed once."""

    def __init__(self, adapters: Mapping[str, Adapter], c: ModelConfig, weights: Format, arena: Room) -> None:
        """Their weights are fp32 where the network's are, and bf16 beside all others."""
        self.config, self.arena = c, arena
        self.form: Format = "float32" if weights == "float32" else "bfloat16"
        self.dtype = torch.float32 if weights == "float32" else torch.bfloat16
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
        if not any(updates):
            return CUpdate()
        filled = [None if update is None else fill(update) for update in updates]
        down = torch.cat([update.down for update in filled if update is not None])
        assert len(down) <= 3 * MAX_RANK, "the C++ has room for so many sums"
        self.widest = max(self.widest, len(down))
        first, panels = 0, []
        for update, width in zip(filled, widths, strict=True):
            rank = 0 if update is None else len(update.down)
            parts = [None] * (width // BLOCK) if update is None else list(pack(update.up, self.form))
            panels.append([(part, first, rank) for part in parts])
            first += rank
        ordered = (
            [panel for pair in zip(*panels, strict=True) for panel in pair] if len(panels) == 2 else sum(panels, [])
        )
        each = down.to(self.dtype).unflatten(0, (-1, SUMS)).unflatten(2, (-1, 64 // self.dtype.itemsize))
        at = self.hold([each.transpose(1, 2), *(part for part, *_ in ordered if part is not None)])
        ups = iter(at[1:])
        array = (CWidening * len(ordered))(*(CWidening(next(ups) if r else None, f, r) for _, f, r in ordered))
        self.held.append(array)
        return CUpdate(at[0], ctypes.addressof(array), len(down), KINDS[self.form])

    def hold(self, pieces: Sequence[Tensor]) -> list[int]:
        """Where pieces lie, one behind the other."""
        whole = torch.cat([piece.flatten() for piece in pieces]).to(self.dtype)
        room = self.arena.take(whole.nbytes).copy_(whole.view(torch.uint8))
        self.held.append(room)
        sizes = [piece.numel() * self.dtype.itemsize for piece in pieces]
        return [room.data_ptr() + sum_ for sum_ in accumulate([0, *sizes[:-1]])]


def fill(update: Update) -> Update:
    """With zeros, up to a rank that the C++ sums at once."""
    missing = -len(update.down) % SUMS
    return Update(F.pad(update.down, (0, 0, 0, missing)), F.pad(update.up, (0, missing)))


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
