"""What the planner predicts beside what is measured, for layouts and sizes that one machine can run."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from litchi.parallel.anatomy import Workload, text_batch
from litchi.parallel.meter import Meter
from litchi.parallel.mesh import DATA, Layout, join
from litchi.parallel.plan import build, initialise
from litchi.schema.sequence import Batch
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.run import State, average, tame_memory
from litchi.train.step import train_step


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one rank: peak bytes of tensors, growth of the process's peak, seconds of a step."""

    peak: int
    resident: int
    seconds: float
    phases: dict


def measure(w: Workload, layout: Layout, steps: int) -> Measured:
    """Train a few steps of a workload on this rank."""
    tame_memory()
    gc.collect()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    world = join(layout, torch.device("cpu"))
    placed = build(w.model, world)
    initialise(placed, 0)
    learned = placed.learned()
    held = {leaf.name: leaf.local.detach().clone() for leaf in learned} if w.average else {}
    optimizers = build_optimizers(learned, OptimizerConfig(matrix_lr=4e-3 if w.muon else 0.0))
    state = State(0, placed, held, optimizers, [])
    batches = [tokens(w, m) for m in range(world.index(*DATA), w.microbatches, world.degree(*DATA))]

    def step() -> None:
        options = {"scale": {}, "clip_at": 1.0, "dtype": getattr(torch, w.dtype), "draw": (0, state.step)}
        train_step(placed, optimizers, batches, **options)
        if w.average:
            average(state, 0.998)
        state.step += 1

    step()
    gc.collect()
    meter = Meter(x for x in gc.get_objects() if isinstance(x, Tensor))
    with meter.lasting():
        step()
    took = []
    for _ in range(steps):
        if world.size > 1:
            dist.barrier()
        began = time.perf_counter()
        step()
        took.append(time.perf_counter() - began)
    return Measured(meter.peak, resident("VmHWM") - before, median(took), {})


def tokens(w: Workload, m: int) -> Batch:
    from dataclasses import replace

    generator = torch.Generator().manual_seed(m)
    ids = torch.randint(w.model.vocab_size, (w.tokens,), generator=generator)
    batch = text_batch(w.rows, w.row)
    return replace(batch, tokens=ids, labels=ids)


def resident(name: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
