"""Muon for the matrices of the trunk, AdamW for everything else.

Muon (Jordan 2024) steps along the orthogonalised momentum of a matrix; with Moonlight's scale (Liu et al. 2025,
arXiv 2502.16982) its steps have the size of AdamW's, so that both share one learning rate schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from litchi.parallel.collectives import all_gather
from litchi.parallel.leaf import Leaf

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration; chosen by Jordan to inflate small singular values fast."""


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Learning rates are peaks; the schedule multiplies them."""

    lr: float = 2e-3
    """Of AdamW: embeddings, norms, ways in and heads."""
    matrix_lr: float = 4e-3
    """Of Muon: matrices of the trunk. 0 gives them to AdamW as well."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    momentum: float = 0.95
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""


class Muon(torch.optim.Optimizer):
    """All matrices of one shape are orthogonalised at once, put together from all ranks. oracle: torch.optim.Muon"""

    def __init__(self, leaves: Iterable[Leaf], *, lr: float, momentum: float, weight_decay: float) -> None:
        self.leaves = {leaf.local: leaf for leaf in leaves}
        super().__init__(list(self.leaves), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Leaf]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(self.leaves[p].shape, []).append(self.leaves[p])
            for members in shapes.values():
                self.step_shape(members, group)

    def step_shape(self, members: list[Leaf], group: dict) -> None:
        directions = []
        for leaf in members:
            p = leaf.local
            state = self.state[p]
            velocity = state.setdefault("momentum", torch.zeros_like(p))
            velocity.lerp_(p.grad, 1 - group["momentum"])
            directions.append(leaf.whole(p.grad.lerp(velocity, group["momentum"])))  # Nesterov
        updates = share_out(torch.stack(directions), members[0].twins())
        scale = 0.2 * max(members[0].shape) ** 0.5
        for leaf, update in zip(members, updates, strict=True):
            leaf.local.mul_(1 - group["lr"] * group["weight_decay"])
            leaf.local.add_(leaf.part(update).to(leaf.local.dtype), alpha=-group["lr"] * scale)


def share_out(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A stack orthogonalised between ranks that all have it, each doing some. oracle: `orthogonalise`, to rounding"""
    if group is None:
        return orthogonalise(x)
    ranks, each = group.size(), -(-len(x) // group.size())
    mine = x[torch.distributed.get_rank(group) :: ranks]
    done = x.new_zeros(each, *x.shape[1:], dtype=torch.bfloat16)
    if len(mine):
        done[: len(mine)] = orthogonalise(mine)
    return all_gather(done, group).unflatten(0, (ranks, each)).transpose(0, 1).flatten(0, 1)[: len(x)]


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each of a stack (n, rows, columns), roughly, in bfloat16."""
    a, b, c = COEFFICIENTS
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).bfloat16()
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y if wide else y.mT


def build_optimizers(leaves: Iterable[Leaf], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon over matrices inside layers, AdamW over the rest; vectors and scalars do not decay.

    On a CPU torch's fused AdamW rounds the last few values of a tensor otherwise than the rest, so that a tensor cut
    elsewhere would end with other bits; where the layout is to be exact it is taken apart into single operations.
    """
    leaves = list(leaves)
    matrices, decayed, plain = [], [], []
    for leaf in leaves:
        trunk = leaf.name.startswith("layers.") and len(leaf.shape) == 2
        (matrices if trunk and config.matrix_lr else decayed if len(leaf.shape) >= 2 else plain).append(leaf)
    groups = [
        {"params": [leaf.local for leaf in decayed], "weight_decay": config.weight_decay},
        {"params": [leaf.local for leaf in plain], "weight_decay": 0.0},
    ]
    fused = any(leaf.local.is_cuda or not leaf.world.layout.exact for leaf in leaves)
    adamw = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-10, fused=fused, foreach=not fused
    )
    if not matrices:
        return [adamw]
    muon = Muon(matrices, lr=config.matrix_lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return [adamw, muon]
