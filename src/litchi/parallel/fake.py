"""Fake ranks and fake tensors: the program itself runs, with shapes and without values, as any rank of any world.

torch's private pieces for it are all used here. Where a program asks what a value is, it is told what is usual: every
number is 1, and of a yes-or-no a given share is yes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from litchi.config import BadInput
from litchi.parallel.mesh import AXES, Axis, Layout, World, degrees, resolve
from litchi.parallel.meter import Meter

aten = torch.ops.aten


class FakeWorld(World):
    """A rank among ranks that are not there. Its meshes are made once: fake tensors cannot say who is in them."""

    def submesh(self, *axes: Axis) -> DeviceMesh | None:
        if axes not in MESHES:
            MESHES[axes] = World.submesh(self, *axes)
        return MESHES[axes]


MESHES: dict[tuple[Axis, ...], DeviceMesh | None] = {}
"""Of the fake world that is there; there is one at a time."""

USED: tuple[tuple[Axis, ...], ...] = (
    *((axis,) for axis in AXES),
    ("replicate", "spread", "expert"),
    ("spread", "expert", "context"),
    ("spread", "context"),
    ("replicate", "spread", "expert", "context"),
    ("replicate", "spread", "context"),
    ("pipeline", "replicate", "spread", "expert", "context"),
)
"""The axes that are asked for together."""


@contextmanager
def fake_world(layout: Layout, size: int, rank: int = 0) -> Iterator[World]:
    """This process as one rank of `size` that are not there. Raises BadInput if it is a rank of a real world."""
    layout = resolve(layout, size)
    if dist.is_initialized():
        raise BadInput("a rank of a real world cannot be one of a fake world: plan in a process of its own")
    if size == 1:
        yield World(layout)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        yield from among_fakes(layout, size, rank)


def among_fakes(layout: Layout, size: int, rank: int) -> Iterator[World]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    MESHES.clear()
    try:
        mesh = init_device_mesh("cpu", tuple(degrees(layout).values()), mesh_dim_names=AXES)
        world = FakeWorld(layout, rank, size, torch.device("cpu"), mesh)
        for axes in USED:
            world.submesh(*axes)
        yield world
    finally:
        MESHES.clear()
        dist.destroy_process_group()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it tensors have shapes and no values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class FakeMeter(Meter):
    """A meter of fake tensors, which answers what a program asks of values."""

    def __init__(self, *, listing: bool = False, share: float = 1.0) -> None:
        super().__init__(listing=listing)
        self.share = share
        """Of a yes-or-no that picks rows, how many are yes."""

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        match func:
            case aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
            case aten.nonzero.default:
                count = int(args[0].numel() * self.share)
                return torch.empty(count, args[0].dim(), dtype=torch.long)
            case aten.unique_consecutive.default:
                one = torch.empty(1, dtype=torch.long)
                return args[0][:1].clone(), torch.empty(0, dtype=torch.long), one
            case aten.index.Tensor | aten.index_put.default | aten.index_put_.default:
                x, index, *rest = args
                args = (x, [self.picked(i) for i in index], *rest)
        return func(*args, **kwargs)

    def picked(self, index: Tensor | None) -> Tensor | None:
        """Numbers of rows for a yes-or-no."""
        if index is None or index.dtype != torch.bool:
            return index
        return torch.empty(int(index.numel() * self.share), dtype=torch.long)
