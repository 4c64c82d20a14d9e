"""Put a network onto the ranks of a world, from outside, in one order: slices of matrices, then what ZeRO divides.

The names of parameters never change: a checkpoint of any layout is read in any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from litchi.model.network import Model, ModelConfig, first_value
from litchi.model.vision import SineTable
from litchi.parallel import shard, tensor
from litchi.parallel.leaf import Leaf, local_of
from litchi.parallel.mesh import World


@dataclass(slots=True)
class Placed:
    """A network in its place, and its parameters by name."""

    model: Model
    world: World
    leaves: dict[str, Leaf]

    def learned(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves.values() if leaf.parameter.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """The values on this rank, by name."""
        return {name: leaf.local.detach() for name, leaf in self.leaves.items()}


def build(c: ModelConfig, world: World, *, freeze: Callable[[Model], None] = lambda model: None) -> Placed:
    """A network without values, in its place; `fill` gives it some. No rank ever holds more than its part."""
    with torch.device("meta"):
        model = Model(c)
    freeze(model)
    placed = apply(model, world)
    model.to_empty(device=world.device)
    return take_leaves(placed)


def apply(model: Model, world: World) -> Placed:
    """Put a network, with values or without, in its place; it is changed."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensor.apply(model, world)
    shard.apply(model, world, set())
    shared = tensor.shares_tokens(model.config, world)
    leaves = {}
    for name, parameter in model.named_parameters():
        cut = tensor.slice_of(name, len(shapes[name]), shared=shared) if world.degree("tensor") > 1 else tensor.Slice()
        leaves[name] = Leaf(name, parameter, parameter, shapes[name], cut, world)
    placed = Placed(model, world, leaves)
    return placed if any(p.is_meta for p in model.parameters()) else take_leaves(placed)


def take_leaves(placed: Placed) -> Placed:
    """Look up the parameters again, after they have been given memory."""
    shard.settle_memory(placed.model)
    for name, parameter in placed.model.named_parameters():
        placed.leaves[name].parameter, placed.leaves[name].local = parameter, local_of(parameter)
    return placed


@torch.no_grad()
def fill(placed: Placed, values: Callable[[str, tuple[int, ...]], Tensor], names: Iterable[str] | None = None) -> None:
    """Give every parameter (or those named) its part of a whole value, one after another."""
    for name in placed.leaves if names is None else names:
        leaf = placed.leaves[name]
        leaf.local.copy_(leaf.part(values(name, leaf.shape)))


def initialise(placed: Placed, seed: int) -> None:
    """First values, which do not know the layout."""
    fill(placed, first_values(placed, seed))


def first_values(placed: Placed, seed: int) -> Callable[[str, tuple[int, ...]], Tensor]:
    """What each parameter begins with, from (seed, name) alone; fixed tables have their own values."""
    c = placed.model.config
    tables = {f"{name}.weight": m for name, m in placed.model.named_modules() if isinstance(m, SineTable)}
    return lambda name, shape: tables[name].values() if name in tables else first_value(c, name, shape, seed)
