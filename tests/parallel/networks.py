"""A small network as ranks of several layouts hold it, and the pieces that each saves of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from litchi.parallel.mesh import Layout, World, join
from litchi.parallel.pieces import Part, Piece, piece_of

WEIGHTS, RESUME = "model/model.safetensors", "resume/optimizer.safetensors"

SHAPES = {"embed": (10, 6), "layers.0.in": (8, 6), "layers.0.out": (6, 8), "norm": (6,), "bias": (1,), "odd": (5, 3)}
SPLITS = {"embed": 0, "layers.0.in": 0, "layers.0.out": 1}
"""Which dim ranks of tensor parallelism cut; some of their parts do not divide evenly over ranks of FSDP."""


class Net(nn.Module):
    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.held = nn.ParameterList([nn.Parameter(value) for value in values.values()])

    def forward(self) -> Tensor:
        return sum((p.float() ** 2).sum() for p in self.held)  # type: ignore[return-value]


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def place(layout: Layout) -> World:
    return join(layout, torch.device("cpu"))


def build(world: World, seed: int) -> tuple[Net, torch.optim.Optimizer]:
    """The network after one step of Adam: the values of a seed, cut over `tensor`, sharded by FSDP2 over the data."""
    whole, index, degree = values(seed), world.index("tensor"), world.degree("tensor")
    net = Net({n: t.chunk(degree, SPLITS[n])[index].clone() if n in SPLITS else t for n, t in whole.items()})
    if world.mesh is not None and world.degree("replicate", "spread") > 1:
        axes = ("replicate", "spread") if world.degree("replicate") > 1 else ("spread",)
        fully_shard(net, mesh=world.mesh[axes])
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, foreach=False)
    net().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(0.5)
    optimizer.step()
    return net, optimizer


def files(world: World, net: Net, optimizer: torch.optim.Optimizer) -> dict[str, list[Piece]]:
    """What this rank holds of the weights and of the optimizer's state."""
    weights, state = [], []
    for name, parameter in zip(SHAPES, net.held, strict=True):
        part = Part(SPLITS[name], world.index("tensor"), world.degree("tensor")) if name in SPLITS else None
        weights.append(piece_of(name, parameter.data, part))
        entry = optimizer.state[parameter]
        state += [piece_of(f"{name}.{key}", entry[key], part) for key in ("exp_avg", "exp_avg_sq")]
        state.append(piece_of(f"{name}.step", entry["step"]))
    return {WEIGHTS: weights, RESUME: state}
