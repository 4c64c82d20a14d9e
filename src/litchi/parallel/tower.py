"""A plan of the vision tower's own: ranks that have the same batch share out its pictures, and rows go back to all.

The trunk cuts matrices and tokens; a tower is small and reads whole pictures, so that its weights stay whole, and each
rank of the tensor and context axes runs it on some pictures (Megatron-LM's and MegaScale's plans for encoders do
likewise). A rank without a picture runs it on none: nobody waits for it.

N rows of all pictures of a batch, n of one rank's, m the most of any rank; X rows of a token, D width of the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.distributed import ProcessGroup

from litchi.model.network import Model
from litchi.model.vision import VisionTower
from litchi.parallel.collectives import all_gather, exchange, reduce_scatter
from litchi.parallel.mesh import World
from litchi.parallel.tensor import Slice


def shares(world: World) -> bool:
    """Whether pictures are shared out."""
    return world.layout.tower == "shared" and world.degree("context", "tensor") > 1


def apply(model: Model, world: World) -> None:
    """Let each tower of the network read this rank's pictures only. The model then reads batches with all of them."""
    group = world.group("context", "tensor") if shares(world) else None  # formed here, by all
    if group is None:
        return
    for module in model.modules():
        if isinstance(module, VisionTower):
            module.rows = partial(shared_rows, module.rows, world=world, group=group)


def slice_of(name: str) -> Slice | None:
    """What ranks of tensor parallelism know of a tower's gradient: that of their own pictures. None for all else."""
    _, _, inside = name.partition(".tower.")
    return Slice(partial=True) if inside and inside != "newline" else None


def shared_rows(
    rows: Callable[[Tensor, Tensor], Tensor], value_NC: Tensor, place_N3: Tensor, *, world: World, group: ProcessGroup
) -> Tensor:
    """This rank's pictures through the tower, and the rows of all. oracle: `VisionTower.rows`"""
    ranks = world.degree("context", "tensor")
    owner_N = deal(place_N3[:, 0], ranks)
    own = (owner_N == world.index("context", "tensor")).nonzero()[:, 0]
    x_nXD = rows(value_NC[own], place_N3[own])
    count = owner_N.bincount(minlength=ranks)
    most = int(count.max())
    if most == 0:
        return x_nXD
    order_N = owner_N.argsort(stable=True)
    within_N = torch.empty_like(order_N)
    within_N[order_N] = torch.arange(len(order_N), device=order_N.device) - (count.cumsum(0) - count)[owner_N[order_N]]
    x_mXD = F.pad(x_nXD, (0, 0, 0, 0, 0, most - len(x_nXD)))
    everyone = exchange(x_mXD, all_gather, partial(give_back, world=world), group)
    return everyone[owner_N * most + within_N]


def give_back(grad: Tensor, _group: ProcessGroup, *, world: World) -> Tensor:
    """The gradient of the rows that this rank made: ranks of context parallelism each know that of their own tokens,
    those of tensor parallelism all know it whole."""
    grad_ctmXD = grad.unflatten(0, (world.degree("context"), world.degree("tensor"), -1))
    return reduce_scatter(grad_ctmXD[:, world.index("tensor")].flatten(0, 1), world.group("context"))


def deal(picture_N: Int[Tensor, "N"], ranks: int) -> Int[Tensor, "N"]:
    """Which rank reads each row: pictures stay whole, and the largest go first, each to the rank that has the least."""
    pictures, of_N, sizes = picture_N.unique(return_inverse=True, return_counts=True)
    load, owner = [0] * ranks, [0] * len(pictures)
    for picture, size in sorted(enumerate(sizes.tolist()), key=lambda pair: -pair[1]):
        owner[picture] = min(range(ranks), key=lambda rank: load[rank])
        load[owner[picture]] += size
    return torch.tensor(owner, dtype=torch.long, device=picture_N.device)[of_N]
