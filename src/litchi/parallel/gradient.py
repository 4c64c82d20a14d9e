"""From microbatches to one gradient: backward over this rank's, the sum over all ranks, its norm, and clipping.

Nothing here depends on how many ranks share the work, if `Layout.exact`: sums are taken in one order, and squares are
added as integers, whose sum has no order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from litchi.model.network import Model, drawn
from litchi.model.objective import Loss, loss_of, weights_of
from litchi.parallel.collectives import Counter, all_reduce, gather_all, tree_all_reduce
from litchi.parallel.context import share
from litchi.parallel.leaf import Leaf
from litchi.parallel.mesh import DATA, EXPERT_SHARD, SHARD, World
from litchi.parallel.pipeline import Pipeline
from litchi.parallel.plan import Placed
from litchi.schema.sequence import Batch

Pair = tuple[Batch, Batch]
"""The truth, and what is read of it."""


# ---- microbatches -------------------------------------------------------------------------------------------------


def global_weights(placed: Placed, pairs: Sequence[Pair]) -> dict[str, float]:
    """The loss weight of each modality over all microbatches of all ranks, added in the order of microbatches."""
    names = ["text", *drawn(placed.model.config)]
    own = [weights_of(placed.model, batch, corrupted) for batch, corrupted in pairs]
    rows = [weight.get(name, 0.0) for weight in own for name in names]
    return dict(zip(names, in_order(rows, len(names), placed.world.group(*DATA)), strict=True))


def in_order(rows: Sequence[float], width: int, group: dist.ProcessGroup | None) -> list[float]:
    """Sums over rounds and ranks of `width` numbers a microbatch; microbatch m is of rank m % ranks."""
    ranks = gather_all(rows, group)
    sums = [0.0] * width
    for start in range(0, len(rows), width):
        for found in ranks:
            sums = [a + b for a, b in zip(sums, found[start : start + width], strict=True)]
    return sums


def backward(
    placed: Placed,
    pairs: Sequence[Pair],
    weight: Mapping[str, float],
    scale: Mapping[str, float],
    dtype: torch.dtype = torch.float32,
    chunk: int = 0,
) -> dict[str, float]:
    """Leaves the whole gradient in each leaf's `local.grad`; returns the loss sum of each modality over all ranks.

    `pairs` are the microbatches of this rank's data, one a round; `chunk` is that of `objective.text_loss`.
    """
    model, world, learned = placed.model, placed.world, placed.learned()
    names = ["text", *drawn(model.config)]
    shares = [(share(batch, model.config, world), share(read, model.config, world)) for batch, read in pairs]
    for leaf in learned:
        leaf.parameter.grad = None
    if placed.pipeline is not None:
        losses, sums = stages(placed, placed.pipeline, shares, weight, scale, dtype, chunk)
    else:
        losses, sums = rounds(placed, shares, partial(Loss.over, weight=weight, scale=scale), dtype, chunk)
    for leaf, gradient in zip(learned, sums, strict=True):
        leaf.local.grad = gradient
    add_up_slices(learned, world)
    totals = [float(loss.total[name].detach()) if name in loss.total else 0.0 for loss in losses for name in names]
    totals = totals or [0.0] * len(names)
    return dict(zip(names, in_order(totals, len(names), world.group("pipeline", *DATA, "context")), strict=True))


def stages(
    placed: Placed,
    pipeline: Pipeline,
    pairs: Sequence[Pair],
    weight: Mapping[str, float],
    scale: Mapping[str, float],
    dtype: torch.dtype,
    chunk: int,
) -> tuple[list[Loss], list[Tensor | None]]:
    """As `rounds`, all microbatches in a schedule: the loss is where the last stage is.

    With a tied table whose two ends lie on one rank (zbv, dualpipev) sums are not exact: both add into one tensor.
    """
    world, learned = placed.world, placed.learned()
    counters = {id(model): Counter() for model in pipeline.models}
    names = {id(model): {name for name, _ in model.named_parameters()} for model in pipeline.models}
    of_model = {key: [leaf for leaf in learned if leaf.name in found] for key, found in names.items()}

    def take(model: Model) -> None:
        """One microbatch's gradient of a stage, out of the way of the next."""
        leaves = of_model[id(model)]
        add_up_whole(leaves, world)
        counters[id(model)].push([leaf.parameter.grad for leaf in leaves])
        for leaf in leaves:
            leaf.parameter.grad = None

    exact = world.layout.exact and len(learned) == sum(map(len, of_model.values()))
    loss = pipeline.backward(pairs, weight, scale, dtype, chunk, after=take if exact else None)
    if exact:
        for key, leaves in of_model.items():
            for leaf, gradient in zip(leaves, counters[key].total(), strict=True):
                leaf.parameter.grad = gradient
        pipeline.tie()
    else:
        add_up_whole(learned, world)
    return ([] if loss is None else [loss]), [leaf.grad for leaf in learned]


def rounds(
    placed: Placed, pairs: Sequence[Pair], over: Callable[[Loss], Tensor], dtype: torch.dtype, chunk: int
) -> tuple[list[Loss], list[Tensor | None]]:
    """One microbatch after the other: their losses, and the sum of their gradients over all ranks of data."""
    model, world, learned = placed.model, placed.world, placed.learned()
    counter, losses = Counter(), []
    for index, (batch, corrupted) in enumerate(pairs):
        if isinstance(model, FSDPModule):
            last = index == len(pairs) - 1
            model.set_requires_gradient_sync(last or world.layout.exact or world.layout.zero > 1)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(model, batch, corrupted, chunk)
        over(loss).backward()
        losses.append(Loss({m: total.detach() for m, total in loss.total.items()}, loss.weight))
        if world.layout.exact:
            add_up_whole(learned, world)
            counter.push([leaf.grad for leaf in learned])
            for leaf in learned:
                leaf.parameter.grad = None
    if world.layout.exact:
        return losses, counter.total()
    add_up_whole(learned, world)
    return losses, [leaf.grad for leaf in learned]


# ---- sums over ranks ----------------------------------------------------------------------------------------------


def add_up_whole(leaves: Sequence[Leaf], world: World) -> None:
    """Sum the gradients of what ZeRO does not divide, in place, as one message for each set of ranks."""
    add = tree_all_reduce if world.layout.exact else all_reduce
    whole = [leaf for leaf in leaves if not leaf.divided]
    for found, group in (
        ([leaf.grad for leaf in whole if not leaf.expert], world.group("replicate", *SHARD)),
        ([leaf.grad for leaf in whole if leaf.expert], world.group("replicate", *EXPERT_SHARD)),
    ):
        if group is not None:
            together(found, partial(add, group=group))


def add_up_slices(leaves: Sequence[Leaf], world: World) -> None:
    """Sum over ranks of tensor parallelism what each knows of its own tokens or heads only."""
    if (group := world.group("tensor")) is not None:
        together([leaf.local.grad for leaf in leaves if leaf.cut.partial], partial(all_reduce, group=group))


def together(tensors: Sequence[Tensor | None], act: Callable[[Tensor], Tensor]) -> None:
    """Do something in place to many tensors as if they were one."""
    present = [t for t in tensors if t is not None]
    if not present:
        return
    flat = torch.cat([t.reshape(-1) for t in present])
    act(flat)
    for t, changed in zip(present, flat.split([t.numel() for t in present]), strict=True):
        t.copy_(changed.view_as(t))


# ---- the norm -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def norm(placed: Placed) -> float:
    """The norm of the whole gradient, the same bits on every rank and for every number of ranks.

    Squares of a row are added in 64 bits; rows are added as integers, in units of the largest row's 2^-k.
    """
    own = [leaf.local.grad for leaf in placed.learned() if leaf.local.grad is not None and leaf.owned()]
    rows = [row_squares(gradient) for gradient in own if gradient.numel()]
    squares = torch.cat(rows) if rows else torch.zeros(1, dtype=torch.float64, device=placed.world.device)
    most, count = squares.amax(), torch.tensor(len(squares), device=squares.device)
    if placed.world.mesh is not None:
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        dist.all_reduce(count)
    if not bool(most.isfinite()):
        return float("nan")
    if float(most) == 0.0:
        return 0.0
    exponent = 61 - int(torch.frexp(most)[1]) - int(count).bit_length()
    total = torch.ldexp(squares, torch.tensor(exponent)).round().long().sum()
    if placed.world.mesh is not None:
        dist.all_reduce(total)
    return float(torch.ldexp(total.double(), torch.tensor(-exponent)).sqrt())


def row_squares(gradient: Tensor) -> Tensor:
    """The sum of squares of each row, in 64 bits; of a vector, each square."""
    if gradient.dim() < 2:
        return gradient.double().square()
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64).square()


@torch.no_grad()
def clip(placed: Placed, found: float, limit: float) -> None:
    """Scale the gradient to the norm `limit` if its norm `found` is larger."""
    if limit and found > limit:
        factor = limit / (found + 1e-6)
        torch._foreach_mul_([g for leaf in placed.learned() if (g := leaf.local.grad) is not None], factor)
