"""Put a network onto the ranks of a world, from outside, in one stated order (`apply`).

The names of parameters never change: a checkpoint of any layout is read in any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from litchi.model.network import Model, ModelConfig, first_value
from litchi.model.vision import SineTable
from litchi.parallel import context, expert, recompute, shard, tensor, tower
from litchi.parallel.leaf import Leaf, local_of
from litchi.parallel.mesh import World
from litchi.parallel.pipeline import Pipeline, split
from litchi.parallel.recompute import Recompute


@dataclass(slots=True)
class Placed:
    """A network in its place, and the parameters of this rank by name."""

    model: Model
    """What this rank has of it; of several stages the first."""
    world: World
    leaves: dict[str, Leaf]
    pipeline: Pipeline | None = None

    @property
    def models(self) -> list[Model]:
        """One for each stage of this rank."""
        return [self.model] if self.pipeline is None else self.pipeline.models

    def learned(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves.values() if leaf.parameter.requires_grad]


def build(
    c: ModelConfig,
    world: World,
    *,
    freeze: Callable[[Model], None] = lambda model: None,
    again: Recompute = "none",
) -> Placed:
    """A network without values, in its place; `fill` gives it some. No rank ever holds more than its part."""
    with torch.device("meta"):
        model = Model(c)
    freeze(model)
    placed = apply(model, world, again=again)
    for stage in placed.models:
        stage.to_empty(device=world.device)
    return take_leaves(placed)


def apply(model: Model, world: World, *, again: Recompute = "none") -> Placed:
    """Put a network, with values or without, in its place; it is changed.

    In this order: slices of matrices, tokens of a batch, its pictures, experts, what layers compute again, stages, and
    last what ZeRO divides. Raises BadInput if something cannot be divided.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensor.apply(model, world)
    context.apply(model, world)
    tower.apply(model, world)
    expert.apply(model, world)
    recompute.apply(model, again)
    pipeline = split(model, world) if world.degree("pipeline") > 1 else None
    placed = Placed(model if pipeline is None else pipeline.models[0], world, {}, pipeline)
    shared_out = world.degree("expert") > 1
    for stage in placed.models:
        whole = {p for name, p in stage.named_parameters() if shared_out and expert.is_expert(name)}
        shard.apply(stage, world, whole | (pipeline.borrowed(stage) if pipeline else set()))
    copies = pipeline.copies() if pipeline else set()
    for name, parameter in parameters(placed):
        cut = slice_of(name, len(shapes[name]), model.config, world)
        placed.leaves[name] = Leaf(
            name,
            parameter,
            parameter,
            shapes[name],
            cut,
            world,
            expert=shared_out and expert.is_expert(name),
            copy=name in copies,
        )
    return placed if any(leaf.parameter.is_meta for leaf in placed.leaves.values()) else take_leaves(placed)


def slice_of(name: str, num_dims: int, c: ModelConfig, world: World) -> tensor.Slice:
    """What this rank has of a parameter, beside others of the tensor axis."""
    if world.degree("tensor") == 1:
        return tensor.Slice()
    own = tower.slice_of(name) if tower.shares(world) else None
    return own or tensor.slice_of(name, num_dims, shared=tensor.shares_tokens(c, world))


def parameters(placed: Placed) -> Iterator[tuple[str, nn.Parameter]]:
    return placed.model.named_parameters() if placed.pipeline is None else placed.pipeline.named_parameters()


def take_leaves(placed: Placed) -> Placed:
    """Look up the parameters again, after they have been given memory."""
    for stage in placed.models:
        shard.settle_memory(stage)
    for name, parameter in parameters(placed):
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
    modules = (found for stage in placed.models for found in stage.named_modules())
    tables = {f"{name}.weight": m for name, m in modules if isinstance(m, SineTable)}
    return lambda name, shape: tables[name].values() if name in tables else first_value(c, name, shape, seed)
