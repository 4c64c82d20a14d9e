"""Which rank stands where: the axes of parallelism, how many ranks each has, and the process groups along them.

The axes, from the outermost: `pipeline`, `replicate`, `spread`, `expert`, `context`, `tensor`. Ranks that differ along
the last are neighbours, so that they share a machine. Data parallelism is `replicate` times `spread` times `expert`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh, ProcessGroup, init_device_mesh

from litchi.config import BadInput

Axis = Literal["pipeline", "replicate", "spread", "expert", "context", "tensor"]
AXES: tuple[Axis, ...] = ("pipeline", "replicate", "spread", "expert", "context", "tensor")
DATA: tuple[Axis, ...] = ("replicate", "spread", "expert")
"""The axes whose ranks read different documents."""
SHARD: tuple[Axis, ...] = ("spread", "expert", "context")
"""The axes over which ZeRO divides a parameter; one that experts share out is divided over `EXPERT_SHARD`."""
EXPERT_SHARD: tuple[Axis, ...] = ("spread", "context")

Schedule = Literal["gpipe", "1f1b", "interleaved", "loop", "zero_bubble", "zbv", "dualpipev"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks each axis has; the product is the number of ranks. Nothing here changes what is learned."""

    data: int = 0
    """Ranks that read different documents; 0 is whatever the other axes leave."""
    replicate: int = 1
    """Groups of data parallelism that each hold all weights between them (HSDP); 1 is one such group."""
    zero: Literal[0, 1, 2, 3] = 3
    """What data parallelism divides: 0 nothing, 1 the optimizer's state, 2 gradients as well, 3 weights as well.

    In a pipeline 3 gathers a stage's weights anew for every microbatch, or with the schedules that find gradients of
    weights apart (zero_bubble, zbv, dualpipev) keeps them together during a step, as 2 does.
    """
    tensor: int = 1
    sequence: bool = True
    """Whether ranks of tensor parallelism share out tokens between the matrices (Megatron's sequence parallelism)."""
    context: int = 1
    """Ranks among which the tokens of one batch are shared out."""
    attention: Literal["ulysses", "gather"] = "ulysses"
    """What ranks of an axis of context exchange: heads for tokens, or all keys and values."""
    tower: Literal["copied", "shared"] = "copied"
    """Whether each rank of the tensor and context axes runs the vision tower on all pictures of a batch that it reads
    of, or on its share of them, whose rows it then gives to the others."""
    pipeline: int = 1
    schedule: Schedule = "1f1b"
    expert: int = 1
    """Ranks of data parallelism that share out the experts of an MLP."""
    exact: bool = True
    """Whether gradients of microbatches are added in one order, whatever the number of ranks of data parallelism."""


@dataclass(frozen=True, slots=True)
class World:
    """This rank's place. `mesh` is None for a process that is alone."""

    layout: Layout = field(default_factory=lambda: Layout(data=1))
    """With every degree a number above 0."""
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None

    def degree(self, *axes: Axis) -> int:
        """Ranks along these axes taken together."""
        count = 1
        for axis in axes:
            count *= degrees(self.layout)[axis]
        return count

    def index(self, *axes: Axis) -> int:
        """This rank's place along these axes taken together, the first named counting most."""
        place = 0
        for axis in axes:
            at = 0 if self.mesh is None else self.mesh.get_local_rank(axis)
            place = place * self.degree(axis) + at
        return place

    def submesh(self, *axes: Axis) -> DeviceMesh | None:
        """A mesh of one dimension along these axes; None where they have one rank."""
        if self.mesh is None or self.degree(*axes) == 1:
            return None
        return self.mesh[axes[0]] if len(axes) == 1 else self.mesh[axes]._flatten("_".join(axes))

    def everyone(self) -> ProcessGroup | None:
        """All ranks; None for one that is alone."""
        return None if self.mesh is None else dist.group.WORLD

    def group(self, *axes: Axis) -> ProcessGroup | None:
        """The ranks that differ from this one along these axes only; None where there is no other."""
        submesh = self.submesh(*axes)
        return None if submesh is None else submesh.get_group()


def degrees(layout: Layout) -> dict[Axis, int]:
    """The ranks of every axis of a layout whose `data` is known."""
    spread = layout.data // (layout.replicate * layout.expert)
    return {
        "pipeline": layout.pipeline,
        "replicate": layout.replicate,
        "spread": spread,
        "expert": layout.expert,
        "context": layout.context,
        "tensor": layout.tensor,
    }


def resolve(layout: Layout, size: int) -> Layout:
    """The layout for `size` ranks, its `data` filled in. Raises BadInput, naming the degree that does not divide."""
    for name in ("replicate", "tensor", "context", "pipeline", "expert"):
        if getattr(layout, name) < 1:
            raise BadInput(f"train.layout.{name}={getattr(layout, name)}: give it a number from 1 up")
    others = layout.tensor * layout.context * layout.pipeline
    if size % others:
        said = f"tensor {layout.tensor} x context {layout.context} x pipeline {layout.pipeline}"
        raise BadInput(f"{size} ranks cannot be laid out as {said}: start a multiple of {others} ranks")
    data = layout.data or size // others
    if data * others != size:
        raise BadInput(f"train.layout asks for {data * others} ranks and {size} were started: set train.layout.data=0")
    if data % (layout.replicate * layout.expert):
        said = f"replicate {layout.replicate} x expert {layout.expert}"
        raise BadInput(f"{data} ranks of data parallelism cannot be divided by {said}: lower one of them")
    return replace(layout, data=data)


def started_by_launcher() -> bool:
    """Whether torchrun, or `litchi train --ranks`, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(layout: Layout, device: torch.device) -> World:
    """This process's place among those that were started with it: NCCL between GPUs, gloo between CPUs.

    Raises BadInput if the layout does not fit their number.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    layout = resolve(layout, size)
    if size == 1:
        return World(layout, device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    shape = tuple(degrees(layout).values())
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    return World(layout, rank, size, device, mesh)


def leave(world: World) -> None:
    """Wait for all, then end the connections."""
    if world.mesh is not None:
        dist.barrier()
        dist.destroy_process_group()
