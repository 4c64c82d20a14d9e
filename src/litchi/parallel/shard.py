"""ZeRO by FSDP2: parameters, gradients and the optimizer's state divided over ranks of data and context parallelism.

Gradients are summed, never averaged: the loss is divided by its global weight before. With `Layout.exact` the sum is
taken in one order whatever the number of ranks (`collectives.tree_sum`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from litchi.model.network import Model
from litchi.model.vision import VisionEncoder
from litchi.parallel.collectives import all_reduce, tree_all_reduce, tree_reduce_scatter
from litchi.parallel.mesh import SHARD, World


class TreeReduceScatter(ReduceScatter):
    """FSDP2's hook for a reduce-scatter of one's own. oracle: dist.reduce_scatter_tensor"""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(tree_reduce_scatter(input_tensor, group))


def divides(world: World) -> bool:
    """Whether a layout leaves ZeRO something to divide."""
    return world.layout.zero > 0 and world.degree(*SHARD) > 1


def apply(model: Model, world: World, whole: set[nn.Parameter]) -> None:
    """Wrap every layer of the trunk and of towers, then the rest; the parameters in `whole` stay undivided."""
    mesh = world.submesh(*SHARD)
    if mesh is None or not divides(world):
        return
    for module in units(model):
        again = world.layout.zero == 3 and module is not model  # heads are read after the forward
        fully_shard(module, mesh=mesh, reshard_after_forward=again, ignored_params=whole or None)
        settle(module, world)


def units(model: Model) -> list[nn.Module]:
    """What is gathered and reduced at once, inner ones first."""
    towers = [m for m in model.modules() if isinstance(m, VisionEncoder)]
    return [*model.layers, *(layer for tower in towers for layer in tower.layers), model]


def settle(module: nn.Module, world: World) -> None:
    """How one unit reduces its gradients."""
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    exact = world.layout.exact
    if exact:
        module.set_custom_reduce_scatter(TreeReduceScatter())
    if (replicas := world.group("replicate")) is not None:
        add_up = tree_all_reduce if exact else all_reduce
        module.set_all_reduce_hook(lambda gradient: discard(add_up(gradient, replicas)))


def settle_memory(model: nn.Module) -> None:
    """Let FSDP2 lay out its memory now and not in the first forward, so that parts stay where they are."""
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()


def discard(_: Tensor) -> None:
    """FSDP2's hooks give nothing back."""
