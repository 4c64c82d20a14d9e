"""How many tokens a second the tiny model trains on, compiled, beside plain bf16, fp32, and the oracle's dense mask."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from bench.row import append
from litchi.data.jobs import JOBS
from litchi.data.ticket import Ticket
from litchi.model.network import Model, initialise
from litchi.parallel.fuse import fuse
from litchi.parallel.mesh import World
from litchi.parallel.plan import apply
from litchi.schema.sequence import Batch
from litchi.train.batches import Batches
from litchi.train.fit import fit_processor
from litchi.train.optimizer import build_optimizers
from litchi.train.run import tame_memory
from litchi.train.step import train_step
from recipes.tiny import run

STEPS = 6


def main() -> None:
    tame_memory()
    recipe = run()
    sources = [source for source in recipe.mixture if source not in ("act", "play")]

    def sample(position: int):
        source = sources[position % len(sources)]
        return JOBS[source](Ticket(source, "train", position // len(sources), 0))

    processor = fit_processor(recipe.fit, map(sample, range(600)), seed=0)
    batches = Batches(sample, processor, recipe.train.batches, 0)
    group = [next(batches) for _ in range(STEPS + 1)]
    config = replace(recipe.model, vocab_size=len(processor.tokenizer))
    plain, compiled = Model(config), Model(config)
    fuse(compiled, torch.device("cpu"))
    ours = pace(compiled, group, torch.bfloat16)
    peers = {
        "bf16 by rows, not compiled": pace(plain, group, torch.bfloat16),
        "fp32 by rows, not compiled": pace(plain, group, torch.float32),
        "bf16 under a dense mask": pace(plain, [replace(batch, row=0) for batch in group], torch.bfloat16),
    }
    for peer, figure in peers.items():
        append("train_step", "tokens trained, bf16 by rows, compiled", ours, "tokens/s", peer=peer, peer_figure=figure)


def pace(model: Model, group: list[Batch], dtype: torch.dtype) -> float:
    """Tokens a second over all but the first batch."""
    initialise(model, 0)
    placed = apply(model, World())
    optimizers = build_optimizers(placed.learned(), run().train.optimizer)
    options = {"scale": {}, "clip_at": 1.0, "dtype": dtype, "draw": (0, 0)}
    train_step(placed, optimizers, group[:1], **options)
    began = time.perf_counter()
    for batch in group[1:]:
        train_step(placed, optimizers, [batch], **options)
    return sum(len(b) for b in group[1:]) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
