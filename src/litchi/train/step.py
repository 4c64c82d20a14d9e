"""One optimizer step over any number of microbatches and ranks, divided once by the weight of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from litchi.config import BadInput
from litchi.model.network import Model
from litchi.model.objective import corrupt
from litchi.parallel.gradient import Pair, backward, clip, global_weights, norm
from litchi.parallel.mesh import DATA
from litchi.parallel.modality import complete
from litchi.parallel.plan import Placed
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
    placed: Placed,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    *,
    scale: Mapping[str, float],
    clip_at: float,
    dtype: torch.dtype,
    draw: tuple[int, int],
) -> Metrics:
    """The gradient of all microbatches of all ranks, then one step of optimizers, whatever it is."""
    metrics = find_gradient(placed, batches, scale=scale, dtype=dtype, draw=draw)
    step_optimizers(placed, optimizers, metrics, clip_at)
    return metrics


def find_gradient(
    placed: Placed,
    batches: Sequence[Batch],
    *,
    scale: Mapping[str, float],
    dtype: torch.dtype,
    draw: tuple[int, int],
    chunk: int = 0,
) -> Metrics:
    """The gradient of all microbatches of all ranks, in each leaf's `local.grad`.

    `batches` are this rank's, one a round: microbatch m of the step is of data rank m % ranks in round m // ranks.
    `draw` is (seed, step): with m, all that corruption depends on. Raises BadInput if nothing at all is supervised.
    """
    world = placed.world
    for stage in placed.models:
        stage.train()
    first, ranks = world.index(*DATA), world.degree(*DATA)
    pairs = [whole_pair(placed.model, b, microbatch_generator(*draw, first + i * ranks)) for i, b in enumerate(batches)]
    weight = global_weights(placed, pairs)
    if not any(weight.values()):
        raise BadInput("no token and no vector of this batch is supervised: give parts a weight above 0")
    totals = backward(placed, pairs, weight, scale, dtype, chunk)
    losses = {name: totals[name] / w for name, w in weight.items() if w != 0}  # not a number is told, too
    return Metrics(losses, weight, norm(placed), ranks * sum(len(b) for b in batches))


def step_optimizers(
    placed: Placed, optimizers: Sequence[torch.optim.Optimizer], metrics: Metrics, clip_at: float
) -> None:
    """One step along the gradient that was found, clipped; 0 does not clip."""
    clip(placed, metrics.gradient_norm, clip_at)
    for optimizer in optimizers:
        optimizer.step()


def whole_pair(model: Model, batch: Batch, generator: torch.Generator) -> Pair:
    """A batch with every modality, and what is read of it."""
    whole = complete(batch, model.config)
    return whole, corrupt(model, whole, generator)


def microbatch_generator(seed: int, step: int, microbatch: int) -> torch.Generator:
    """The randomness of one microbatch, which does not know who reads it."""
    digest = blake2b(f"{seed}/{step}/{microbatch}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
