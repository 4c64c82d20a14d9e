"""Do 1, 2 and 4 ranks end with the same weights, and what do sums in one order cost beside the library's?

    python bench/exact.py

The runs learn words, pictures and actions, with clipping, AdamW and Muon; one is killed on 4 ranks and on 2, while it
trains and while it saves, all ranks and the supervisor at once, and goes on on 4. The price is that of a whole step of
four gloo ranks, ours and the library's in turn; the ratio is the median of the rounds'.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench import kills
from bench.kills import adopt, await_moment, begin, children, end_all, fingerprint, finish, follow
from bench.row import append
from litchi.model.network import Model as Network
from litchi.model.network import ModelConfig, count
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import Layout, join
from litchi.parallel.plan import build, initialise
from litchi.train.certify import MODEL, microbatch
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.step import train_step

RUN = replace(kills.RUN, num_steps=24)
SMALL = replace(MODEL, width=128, mlp_width=384, head_width=16)
LARGE = replace(MODEL, width=512, num_layers=6, mlp_width=1_408, head_width=64)
ROUNDS, STEPS = 7, 3


def main() -> int:
    torch.set_num_threads(1)
    adopt()
    with tempfile.TemporaryDirectory() as scratch:
        ends = dict(runs(Path(scratch)))
    for name, digest in ends.items():
        print(f"{name:40} {digest[:16]}")
    same = len(set(ends.values()))
    append("exact", f"different weights after {'; '.join(ends)}", same, "of 1")
    with Crew(4) as crew:
        for config in (SMALL, LARGE):
            size = count(Network(config)) / 1e6
            for zero in (2, 3):
                ours, theirs = price(crew, config, zero)
                what = f"step of 4 ranks, {size:.1f} M parameters, ZeRO-{zero}, 8 microbatches, sums in one order"
                append("exact", what, ours, "s", peer="sums of the library", peer_figure=theirs)
    return 0 if same == 1 else 1


def runs(scratch: Path) -> Iterator[tuple[str, str]]:
    """The SHA-256 of all weights, optimizers' states and the ledger at the end of each run."""
    draw = random.Random(0)
    for sizes in ((1,), (2,), (4,), (4, 2, 4)):
        folder = scratch / "".join(map(str, sizes))
        for size in sizes[:-1]:
            before = follow(folder)[0]
            command = begin(folder, size, RUN)
            await_moment(folder, command, before, draw, in_save=size == 2)
            end_all(command, children(command))
        finish(folder, begin(folder, sizes[-1], RUN))
        yield ", SIGKILL, ".join(f"{size} ranks" for size in sizes), fingerprint(folder, RUN.num_steps)


def price(crew: Crew, config: ModelConfig, zero: int) -> tuple[float, float]:
    """Seconds a step, exact and not, the ratio being the median of rounds that took turns."""
    found = crew.run(partial(take_turns, config, zero))[0]
    ratio = statistics.median(ours / theirs for ours, theirs in found)
    theirs = statistics.median(theirs for _, theirs in found)
    return ratio * theirs, theirs


def take_turns(config: ModelConfig, zero: int) -> list[tuple[float, float]]:
    steps = []
    for exact in (True, False):
        world = join(Layout(zero=zero, exact=exact), torch.device("cpu"))
        placed = build(config, world)
        initialise(placed, 0)
        optimizers = build_optimizers(placed.learned(), OptimizerConfig(lr=1e-3, matrix_lr=0.0))
        batches = [microbatch("image", m) for m in range(world.rank, 8, world.size)]
        options = {"scale": {}, "clip_at": 1.0, "dtype": torch.float32, "draw": (0, 0)}
        steps.append(partial(train_step, placed, optimizers, batches, **options))
    for step in steps:
        step()
    return [(clock(steps[0]), clock(steps[1])) for _ in range(ROUNDS)]


def clock(step) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    sys.exit(main())
