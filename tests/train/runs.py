"""A run small enough for a test: words, pictures and chunks of actions, every sample drawn from its position alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from litchi.model.network import Flow, Mask, ModelConfig
from litchi.schema.processor import Processor
from litchi.schema.sample import Sample
from litchi.train.batches import BatchConfig
from litchi.train.optimizer import OptimizerConfig
from litchi.train.pictures import SEARCHED
from litchi.train.run import TrainConfig, run
from litchi.train.schedule import Trapezoid
from tests.laws.documents import part, processor

PROCESSOR = processor()

CONFIG = TrainConfig(
    num_steps=6,
    batches=BatchConfig(rows=2, row=96, lookahead=6, emphasis={"even": 2.0}),
    num_accumulate=2,
    optimizer=OptimizerConfig(lr=1e-2, matrix_lr=1e-2),
    schedule=Trapezoid(warmup=2, decay=0.5),
    device="cpu",
    threads=1,
    log_every=1,
    save_every=2,
)

MODEL = ModelConfig(
    vocab_size=len(PROCESSOR.tokenizer),
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_width=12,
    mlp_width=24,
    modalities={"image": Mask(digits=4, levels=9), "action": Flow(3)},
)

RUN = json.dumps({"name": "test"})
KINDS = ("user", "answer", "see", "draw", "frame", "step", "move")
DRAWN = 6
"""Samples from this position on end in no picture, so that few are drawn beside a checkpoint: that takes long."""


def sample(position: int) -> Sample:
    rng = np.random.default_rng(position)
    kinds = [str(kind) for kind in rng.choice(KINDS, size=rng.integers(1, 4))]
    if kinds[-1] in ("draw", "frame") and position >= DRAWN:
        kinds.append("answer")
    source = "odd" if position % 2 else "even"
    return Sample(tuple(part(kind, rng) for kind in kinds), key=str(position), source=source)


def train(
    folder: Path, config: TrainConfig = CONFIG, p: Processor = PROCESSOR, samples: Callable[[int], Sample] = sample
) -> Path:
    return run(config, MODEL, p, samples, folder, RUN)


class CtrlC:
    """The samples of the run, and a Ctrl-C after training has asked for `count` of them."""

    def __init__(self, count: int) -> None:
        self.left = SEARCHED + count  # sample pictures are looked for first

    def __call__(self, position: int) -> Sample:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return sample(position)
