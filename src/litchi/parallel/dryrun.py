"""A layout is built and stepped through on fake ranks: what would fail on a cluster fails here, for nothing.

The network is placed by `plan.apply` as in training, and one rank of the world runs its forward and backward passes,
all hooks and collectives included, on tensors that have shapes and no memory.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from dataclasses import dataclass, replace

import torch

from litchi.model.network import Model
from litchi.parallel import plan
from litchi.parallel.anatomy import Workload, prepare, text_batch
from litchi.parallel.fake import FakeMeter, fake_tensors, fake_world
from litchi.parallel.gradient import backward
from litchi.parallel.mesh import AXES, Layout, degrees


@dataclass(frozen=True, slots=True)
class DryRun:
    """What one rank would do in a step of `microbatches` of its own."""

    ranks: int
    rank: int
    microbatches: int
    parameters: int
    """Values on this rank."""
    peak: int
    """Bytes: weights, gradients, activations and copies; no optimizer."""
    operations: int
    collectives: dict[str, tuple[int, int]]
    """Kind and number of ranks -> how often, and bytes."""
    seconds: float
    resident: int
    """The most memory that this process has had, in bytes."""


def rehearse(w: Workload, layout: Layout, *, rank: int = 0, least: bool = True) -> DryRun:
    """`layout` is resolved. With `least` a rank reads only as many microbatches as the layout needs.

    Raises BadInput as `plan.apply` does.
    """
    began = time.perf_counter()
    size = layout.data * layout.context * layout.tensor * layout.pipeline
    with fake_world(layout, size, rank) as world:
        with torch.device("meta"):
            model = Model(replace(w.model, modalities={}))
        placed = plan.apply(model, world, again=w.recompute)
        del model
        for stage in placed.models:
            prepare(stage, w, world)
        count = fewest(layout) if least else w.microbatches // layout.data
        with fake_tensors():
            for stage in placed.models:
                stage.to_empty(device="cpu")
            plan.take_leaves(placed)
            meter = FakeMeter(listing=True)
            for leaf in placed.leaves.values():
                meter.see(leaf.local)
            batch = text_batch(w.rows, w.row)
            with meter.lasting():
                dtype = torch.float32 if w.dtype == "float32" else torch.bfloat16
                backward(placed, [(batch, batch)] * count, {"text": 1.0}, {}, dtype, w.chunk)
        parameters = sum(leaf.local.numel() for leaf in placed.leaves.values())
    return DryRun(
        ranks=size,
        rank=rank,
        microbatches=count,
        parameters=parameters,
        peak=meter.peak,
        operations=len(meter.ops),
        collectives=told(meter),
        seconds=time.perf_counter() - began,
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def told(meter: FakeMeter) -> dict[str, tuple[int, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for op in meter.ops:
        if op.kind == "collective":
            name = f"{op.name.strip('_')} of {len(op.group) or '?'}"
            counts[name] += 1
            sizes[name] += op.num_bytes
    return {name: (counts[name], sizes[name]) for name in sorted(counts)}


def fewest(layout: Layout) -> int:
    """Microbatches that a schedule needs at least."""
    if layout.pipeline == 1:
        return 1
    return 2 * layout.pipeline if layout.schedule == "dualpipev" else layout.pipeline


def first_rank_of(layout: Layout, stage: int) -> int:
    """A rank of the world that holds this place of its pipeline."""
    sizes = degrees(layout)
    rest = 1
    for axis in AXES[1:]:
        rest *= sizes[axis]
    return stage * rest
