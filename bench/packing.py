"""Do ranks finish together if batches show a vision tower evenly much?

    python bench/packing.py

Two ranks train one small network that sees (ZeRO-3, gloo) on conversations, every third with a picture of 4 to 196
patches: batches as they are, and with an eye on lengths alone, in turn. Only tokens of documents count.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from bench.row import append
from litchi.model.network import ModelConfig
from litchi.model.vision import Tower
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import Layout, join
from litchi.parallel.plan import build, initialise
from litchi.schema.sample import Image, Role, Sample, Text
from litchi.schema.sequence import TokenSequence
from litchi.train.batches import BatchConfig, Batches, num_patches, ranked
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.run import tame_memory
from litchi.train.step import train_step
from tests.laws.documents import WORDS, processor

PROCESSOR = processor(tower=True)
MODEL = ModelConfig(
    vocab_size=len(PROCESSOR.tokenizer),
    width=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_width=32,
    mlp_width=384,
    modalities={"vision": Tower(48, width=192, num_layers=6, num_heads=4, grid=16)},
)
CONFIG = BatchConfig(rows=4, row=512, lookahead=256)
RANKS, ROUNDS, STEPS = 2, 7, 4


@dataclass(frozen=True, slots=True)
class Turn:
    """A rank's: patches and tokens of documents of each step, and the seconds of all."""

    patches: list[int]
    tokens: int
    seconds: float


def main() -> None:
    with Crew(RANKS) as crew:
        ranks = crew.run(take_turns)
    paces: dict[str, list[float]] = {}
    for name in WAYS:
        turns = list(zip(*(rank[name] for rank in ranks), strict=True))
        steps = [step for turn in turns for step in zip(*(t.patches for t in turn), strict=True)]
        uneven = statistics.mean(max(step) / max(statistics.mean(step), 1) for step in steps)
        append("packing", f"most patches of {RANKS} ranks beside their mean, {name}", uneven, "of 1")
        full = statistics.mean(t.tokens for turn in turns for t in turn) / (STEPS * CONFIG.rows * CONFIG.row)
        append("packing", f"share of rows that is documents, {name}", full, "of 1")
        paces[name] = [sum(t.tokens for t in turn) / turn[0].seconds for turn in turns]
    ours, theirs = paces.values()
    figure, ratio = statistics.median(ours), statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    what = f"tokens of {RANKS} ranks, pictures spread evenly"
    append("packing", what, figure, "tokens/s", peer="by length alone", peer_figure=figure / ratio)


def take_turns() -> dict[str, list[Turn]]:
    tame_memory()
    world = join(Layout(), torch.device("cpu"))
    placed = build(MODEL, world)
    initialise(placed, 0)
    optimizers = build_optimizers(placed.learned(), OptimizerConfig(lr=1e-3, matrix_lr=0.0))
    streams = {name: Batches(sample, PROCESSOR, CONFIG, 0, world.rank, RANKS) for name in WAYS}
    found: dict[str, list[Turn]] = {name: [] for name in streams}
    options = {"scale": {}, "clip_at": 1.0, "dtype": torch.float32, "draw": (0, 0)}
    for _ in range(ROUNDS + 1):
        for name, stream in streams.items():
            with patch("litchi.train.batches.ranked", WAYS[name]):
                batches = [next(stream) for _ in range(STEPS)]
            dist.barrier()
            began = time.perf_counter()
            for batch in batches:
                train_step(placed, optimizers, [batch], **options)
            seconds = time.perf_counter() - began
            tokens = sum(int((batch.tokens != PROCESSOR.tokenizer.pad).sum()) for batch in batches)
            found[name].append(Turn([num_patches(batch) for batch in batches], tokens, seconds))
    return {name: turns[1:] for name, turns in found.items()}


def by_length(waiting: list[tuple[int, TokenSequence]], *, shown: bool) -> list[tuple[int, TokenSequence]]:
    """Whether a document shows a picture does not matter."""
    return [waiting[0], *sorted(waiting, key=lambda pair: -len(pair[1]))]


WAYS = {"pictures spread evenly": ranked, "by length alone": by_length}


def sample(position: int) -> Sample:
    """A conversation of 10 to 120 words; of every third one a picture, of 4 to 196 patches, most of them small."""
    rng = np.random.default_rng(position)
    asked, told = (" ".join(rng.choice(WORDS, size=rng.integers(5, 60))) for _ in range(2))
    talk = [Text(text=asked, role=Role.USER), Text(text=told, role=Role.ASSISTANT, weight=1.0)]
    if position % 3 == 0:
        side = 8 * int(np.clip(rng.lognormal(1.2, 0.6), 1, 7.5))
        talk.insert(0, Image(pixels=rng.integers(0, 256, (side, side, 3), dtype=np.uint8), role=Role.USER))
    return Sample(tuple(talk), key=str(position), source="talk")


if __name__ == "__main__":
    main()
