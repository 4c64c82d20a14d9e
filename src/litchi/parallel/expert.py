"""Expert parallelism: ranks share out the experts of every mixture; readings travel to their experts and back.

No reading is dropped, and an expert waits for all that are sent to it (GShard's exchange, Lepikhin et al. 2020, without
its capacity). Ranks of the axis read different documents. A gradient of an expert is thereby already the sum over the
axis; it is still summed over `EXPERT_SHARD` and replicas, all else over all axes of data.

N readings of this rank's tokens, M those that came to its experts, D width, E experts, e of one rank, n ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from litchi.config import BadInput
from litchi.model.moe import SparseMLP, Work, apply_experts_grouped, groupable
from litchi.model.network import Model
from litchi.parallel.collectives import all_gather
from litchi.parallel.mesh import World


def apply(model: Model, world: World) -> None:
    """Leave each rank its experts, under their names, and let readings travel.

    Raises BadInput if there are no experts, or if they cannot be divided.
    """
    group, degree = world.group("expert"), world.degree("expert")
    if group is None:
        return
    mixture = model.config.mixture
    if mixture is None:
        raise BadInput(f"train.layout.expert={degree}, but an MLP of this network has no experts: set it to 1")
    if mixture.num_experts % degree:
        raise BadInput(f"{mixture.num_experts} experts cannot be shared out over {degree} ranks: choose a divisor")
    own = held(mixture.num_experts, world)
    for module in mixtures(model).values():
        for index in range(mixture.num_experts):
            if index not in own:
                del module.experts._modules[str(index)]
        module.work = partial(exchange_readings, group=group)


def held(num_experts: int, world: World) -> range:
    """Which experts are this rank's."""
    each = num_experts // world.degree("expert")
    return range(each * world.index("expert"), each * (world.index("expert") + 1))


def is_expert(name: str) -> bool:
    """Whether a parameter is of an expert of a mixture, so that ranks of the axis hold different ones."""
    return ".mlp.experts." in name


def mixtures(model: Model) -> dict[str, SparseMLP]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseMLP)}


# ---- readings -----------------------------------------------------------------------------------------------------


def exchange_readings(
    x_ND: Tensor, counts_E: Int[Tensor, "E"], experts: Sequence[nn.Module], *, group: ProcessGroup
) -> Tensor:
    """Readings sorted by expert, to those who hold the experts and back. oracle: moe.apply_experts_loop

    A rank to which nothing comes exchanges as often as the others.
    """
    size, each = group.size(), len(experts)
    sent_nE = all_gather(counts_E[None], group).unflatten(1, (size, each))
    came_ne = sent_nE[:, dist.get_rank(group)]
    sent, came = counts_E.view(size, each).sum(1).tolist(), came_ne.sum(1).tolist()
    x_MD = travel(x_ND, sent, came, group)
    expert_M = torch.arange(each, device=x_ND.device).repeat(size).repeat_interleave(came_ne.flatten())
    order_M = expert_M.argsort(stable=True)
    read_MD = read_all(x_MD[order_M], came_ne.sum(0), list(experts))
    return travel(torch.empty_like(read_MD).index_copy(0, order_M, read_MD), came, sent, group)


def read_all(x_MD: Tensor, counts_e: Int[Tensor, "e"], experts: Sequence[nn.Module]) -> Tensor:
    """As `moe.apply_experts`, but an expert without readings runs as well: its gradient is zeros, on every rank."""
    if x_MD.device.type != "cpu" and groupable(x_MD, experts):
        return apply_experts_grouped(x_MD, counts_e, experts)
    return torch.cat([expert(x) for x, expert in zip(x_MD.split(counts_e.tolist()), experts, strict=True)])


def travel(x: Tensor, sent: list[int], came: list[int], group: ProcessGroup) -> Tensor:
    """The first `sent[0]` rows to rank 0, the next to rank 1, and so on; what came from them, in their order."""
    return _Travel.apply(x, sent, came, group)


class _Travel(torch.autograd.Function):
    """Gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], came: list[int], group: ProcessGroup) -> Tensor:
        ctx.way_back = came, sent, group
        return moved(x, sent, came, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return moved(grads[0], *ctx.way_back), None, None, None


def moved(x: Tensor, sent: list[int], came: list[int], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(came), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), came, sent, group=group)
    return out


# ---- balance ------------------------------------------------------------------------------------------------------


@contextmanager
def counting(model: Model) -> Iterator[dict[str, Int[Tensor, "E"]]]:
    """How many of this rank's readings each expert has while this lasts, for every mixture by its name."""
    counts: dict[str, Tensor] = {}
    works = {name: module.work for name, module in mixtures(model).items()}
    for name, module in mixtures(model).items():
        module.work = partial(counted, name=name, counts=counts, work=works[name])
    try:
        yield counts
    finally:
        for name, module in mixtures(model).items():
            module.work = works[name]


def counted(
    x_ND: Tensor, counts_E: Tensor, experts: Sequence[nn.Module], *, name: str, counts: dict[str, Tensor], work: Work
) -> Tensor:
    counts[name] = counts.get(name, 0) + counts_E
    return work(x_ND, counts_E, experts)


def imbalance(counts_E: Int[Tensor, "E"]) -> float:
    """Readings of the busiest expert over the mean: 1 is even, E is all on one. 1 if there are none."""
    total = int(counts_E.sum())
    return int(counts_E.max()) * len(counts_E) / total if total else 1.0
