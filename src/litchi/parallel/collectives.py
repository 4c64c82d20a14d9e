"""What ranks exchange: collectives that autograd runs backwards, and sums whose order does not depend on who sums.

Each function takes a process group, or None for a rank that is alone, and then exchanges nothing. The first dimension
is the one that is cut and joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 has these under new names, 2.11 under the old ones only
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# ---- without gradients --------------------------------------------------------------------------------------------


def all_gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks, in their order; every rank has as many."""
    if group is None:
        return x
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    gather_into(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's share of the rows of the sum."""
    if group is None:
        return x
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    scatter_into(out, x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks, in place."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def share(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's share of rows that all ranks have."""
    if group is None:
        return x
    length = x.shape[0] // group.size()
    return x.narrow(0, dist.get_rank(group) * length, length)


def gather_all(values: Sequence[float], group: ProcessGroup | None) -> list[list[float]]:
    """The numbers of every rank, in the order of ranks, as 64-bit floats."""
    mine = torch.tensor([list(values)], dtype=torch.float64)
    return mine.tolist() if group is None else all_gather(to_device(mine, group), group).tolist()


def to_device(x: Tensor, group: ProcessGroup) -> Tensor:
    """Where a group's collectives can read it."""
    return x.cuda() if dist.get_backend(group) == "nccl" else x


# ---- with gradients -----------------------------------------------------------------------------------------------


class _Exchange(torch.autograd.Function):
    """One collective forwards, another one backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: Any, backwards: Any, group: ProcessGroup) -> Tensor:
        ctx.backwards, ctx.group = backwards, group
        return forwards(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.backwards(grads[0], ctx.group), None, None, None


def exchange(x: Tensor, forwards: Any, backwards: Any, group: ProcessGroup | None) -> Tensor:
    return x if group is None else _Exchange.apply(x, forwards, backwards, group)


def same(x: Tensor, group: ProcessGroup) -> Tensor:
    return x.view_as(x)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    return all_reduce(x.clone(memory_format=torch.contiguous_format), group)


def gather_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """All rows; each rank goes on with its own part of the work, so that gradients are summed (Megatron's g-bar)."""
    return exchange(x, all_gather, reduce_scatter, group)


def scatter_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's rows of the sum of all parts."""
    return exchange(x, reduce_scatter, all_gather, group)


def enter(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Rows that all ranks have, into work that is shared out between them (Megatron's f)."""
    return exchange(x, same, summed, group)


def leave(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of all parts, for all ranks, out of shared work (Megatron's g)."""
    return exchange(x, summed, same, group)


def take_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's rows of what all ranks have; the whole gradient goes back to each of them."""
    return exchange(x, share, all_gather, group)


class _Weaken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def weaken(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Into work that every rank repeats: gradients are divided by their number, since they will be summed."""
    return x if group is None else _Weaken.apply(x, 1 / group.size())


# ---- sums in a fixed order ----------------------------------------------------------------------------------------


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Neighbours are added, then neighbours of the sums, and so on: 2 and 4 ranks agree on every bit."""
    while len(parts) > 1:
        odd = [parts[-1]] if len(parts) % 2 else []
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
    return parts[0]


def tree_reduce_scatter(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """As `reduce_scatter`, added in the order of `tree_sum`; as many bytes travel. oracle: tree_sum over all ranks"""
    if group is None:
        return x
    pieces = x.contiguous().view(group.size(), -1)
    received = torch.empty_like(pieces)
    dist.all_to_all_single(received, pieces, group=group)
    return tree_sum(received.unbind(0)).view(x.shape[0] // group.size(), *x.shape[1:])


def tree_all_reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """As `all_reduce`, in place and added in the order of `tree_sum`."""
    if group is None:
        return x
    flat = x.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % group.size()))
    whole = all_gather(tree_reduce_scatter(padded, group), group)
    return x.copy_(whole[: flat.numel()].view_as(x))


class Counter:
    """Adds what comes one after the other in the order of `tree_sum`: a binary counter whose digits are sums.

    Holds at most one list of tensors for each binary digit of the number of summands.
    """

    def __init__(self) -> None:
        self.digits: list[tuple[int, list[Tensor | None]]] = []

    def push(self, tensors: Sequence[Tensor | None]) -> None:
        size, summed_up = 1, list(tensors)
        while self.digits and self.digits[-1][0] == size:
            _, before = self.digits.pop()
            size, summed_up = 2 * size, [plus(a, b) for a, b in zip(before, summed_up, strict=True)]
        self.digits.append((size, summed_up))

    def total(self) -> list[Tensor | None]:
        """The sum of all; the counter is empty afterwards."""
        _, whole = self.digits.pop()
        while self.digits:
            _, before = self.digits.pop()
            whole = [plus(a, b) for a, b in zip(before, whole, strict=True)]
        return whole


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what is there, written into the first."""
    return b if a is None else a if b is None else a.add_(b)
