"""Every rank reads and writes every modality, also those that its documents lack, so that no rank waits for another.

An absent modality is vectors without rows. What reads and writes it gets a gradient of zeros, where it had none.
"""

from __future__ import annotations

import torch

from litchi.model.network import Features, Flow, Kind, Mask, ModelConfig, Velocity
from litchi.model.vision import Tower
from litchi.schema.sequence import Batch, Modality, Vectors, with_vectors


def complete(batch: Batch, config: ModelConfig) -> Batch:
    """The same batch with vectors of every modality that the network reads, in the order of their names as `pack` has
    them: all ranks meet the readers in one order, and randomness is drawn as before."""
    device = batch.tokens.device
    absent = {Modality(m): empty(kind, device) for m, kind in config.modalities.items() if m not in batch.vectors}
    return with_vectors(batch, dict(sorted({**batch.vectors, **absent}.items())))


def empty(kind: Kind, device: torch.device) -> Vectors:
    """No rows, as wide as the reader of a kind takes them."""
    return Vectors(
        index=torch.zeros(0, dtype=torch.long, device=device),
        place=torch.zeros(0, 3, dtype=torch.long, device=device),
        value=torch.zeros(0, row_width(kind), device=device),
        time=torch.zeros(0, device=device),
        weight=torch.zeros(0, device=device),
    )


def row_width(kind: Kind) -> int:
    """Values of one row of `Vectors.value`."""
    match kind:
        case Mask(digits=digits):
            return digits
        case Tower(channels=channels, merge=merge):
            return channels * merge**2
        case Flow(channels) | Velocity(channels) | Features(channels):
            return channels
