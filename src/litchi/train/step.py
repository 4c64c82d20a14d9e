"""One optimizer step over any number of microbatches, divided once by the weight of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from litchi.config import BadInput
from litchi.model.network import Model
from litchi.model.objective import Loss, corrupt, loss_of, weights_of
from litchi.schema.sequence import Batch


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a step tells: mean loss and weight by modality, the norm of the gradient before clipping, tokens read."""

    losses: Mapping[str, float]
    weights: Mapping[str, float]
    gradient_norm: float
    num_tokens: int

    def row(self) -> dict[str, float]:
        losses = {f"loss/{m}": v for m, v in self.losses.items()}
        return {**losses, "gradient_norm": self.gradient_norm, "tokens": self.num_tokens}


def train_step(
    model: Model,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    *,
    scale: Mapping[str, float],
    clip: float,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Metrics:
    """Gradients of all microbatches, then one step. Raises BadInput if nothing at all is supervised."""
    model.train()
    pairs = [(batch, corrupt(model, batch, generator)) for batch in batches]
    weight: dict[str, float] = {}
    for batch, corrupted in pairs:
        for m, w in weights_of(model, batch, corrupted).items():
            weight[m] = weight.get(m, 0.0) + w
    if not any(weight.values()):
        raise BadInput("no token and no vector of this batch is supervised: give parts a weight above 0")
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    whole: Loss | None = None
    for batch, corrupted in pairs:
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(model, batch, corrupted)
        loss.over(weight, scale).backward()
        whole = loss if whole is None else whole + loss
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
    for optimizer in optimizers:
        optimizer.step()
    assert whole is not None
    return Metrics(whole.means(), weight, float(norm), sum(len(b) for b in batches))
