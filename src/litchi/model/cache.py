"""The reference key-value cache: contiguous, one tensor a layer, with the columns that the visibility rule needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litchi.schema.sequence import Batch


@dataclass(slots=True)
class Columns:
    """What the visibility rule asks of tokens: which document, which span, and whether later spans may read them."""

    docs: Tensor
    spans: Tensor
    readable: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Columns:
        return cls(batch.docs, batch.spans, batch.readable)

    def then(self, other: Columns) -> Columns:
        pairs = ((self.docs, other.docs), (self.spans, other.spans), (self.readable, other.readable))
        return Columns(*(torch.cat(pair) for pair in pairs))


@dataclass(slots=True)
class KVCache:
    """Keys and values of every token read so far, in the order in which they were read."""

    columns: Columns | None
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(cls, num_layers: int) -> KVCache:
        return cls(None, [torch.empty(0)] * num_layers, [torch.empty(0)] * num_layers)

    def __len__(self) -> int:
        return 0 if self.columns is None else self.columns.docs.shape[0]

    def admit(self, batch: Batch) -> Columns:
        """Add the columns of a batch that is about to be read; returns those of all keys."""
        fresh = Columns.of(batch)
        self.columns = fresh if self.columns is None else self.columns.then(fresh)
        return self.columns

    def extend(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values; returns all of them, (M, G, K)."""
        if self.keys[layer].numel():
            k_TGK = torch.cat([self.keys[layer], k_TGK])
            v_TGK = torch.cat([self.values[layer], v_TGK])
        self.keys[layer], self.values[layer] = k_TGK, v_TGK
        return k_TGK, v_TGK

    def fork(self) -> KVCache:
        """A copy that may be extended and dropped: denoising reads the past without writing to it. Shares tensors."""
        return replace(self, keys=list(self.keys), values=list(self.values))
