"""One parameter as one rank has it: which slice of it lies here, and how the whole is put together and cut again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from litchi.parallel.collectives import all_gather
from litchi.parallel.mesh import AXES, EXPERT_SHARD, SHARD, Axis, World
from litchi.parallel.tensor import Slice

Box = tuple[tuple[int, int], ...]
"""Begin and stop along each dimension."""


@dataclass(slots=True)
class Leaf:
    """`local` is what optimizers step: a plain tensor that shares its memory with the model's parameter."""

    name: str
    parameter: nn.Parameter
    local: nn.Parameter
    shape: tuple[int, ...]
    """Of the whole parameter."""
    cut: Slice
    world: World
    expert: bool = False
    """Whether ranks of the axis of experts hold different ones of its kind, so that each has this one whole."""
    copy: bool = False
    """Whether another rank of the pipeline has the same and speaks for it: a tied table, at the last stage."""

    @property
    def divided(self) -> bool:
        """Whether ZeRO divides its rows."""
        return isinstance(self.parameter, DTensor)

    @property
    def grad(self) -> Tensor | None:
        """The gradient's values on this rank."""
        grad = self.parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def rows(self) -> tuple[int, int]:
        """Begin and stop of the rows that are here, of those that this rank of tensor parallelism has."""
        length = self.shape[0] // (self.world.degree("tensor") if self.cut.dim == 0 else 1) if self.shape else 1
        if not self.divided:
            return 0, length
        each = -(-length // self.world.degree(*SHARD))
        begin = min(length, each * self.world.index(*SHARD))
        return begin, min(length, begin + each)

    def box(self) -> Box:
        """Where the values of this rank lie within the whole parameter."""
        bounds = [(0, length) for length in self.shape]
        if self.cut.dim is not None:
            each = self.shape[self.cut.dim] // self.world.degree("tensor")
            bounds[self.cut.dim] = (each * self.world.index("tensor"), each * (self.world.index("tensor") + 1))
        if self.divided:
            begin, stop = self.rows()
            bounds[0] = (bounds[0][0] + begin, bounds[0][0] + stop)
        return tuple(bounds)

    def owned(self) -> bool:
        """Whether this rank speaks for its values, where others have the same."""
        world = self.world
        held: tuple[Axis, ...] = SHARD if self.divided else ("expert",) if self.expert else ()
        if self.cut.dim is not None:
            held += ("tensor",)
        spare = [axis for axis in AXES if axis not in (*held, "pipeline")]
        return not self.copy and all(world.index(axis) == 0 for axis in spare)

    def twins(self) -> ProcessGroup | None:
        """Ranks that may share out work on the whole of it; None for one that is alone.

        Also None where sums are exact: products of a stack of matrices round otherwise when it is taken apart.
        """
        if self.world.layout.exact:
            return None
        return self.world.group("replicate", *(EXPERT_SHARD if self.expert else SHARD))

    def part(self, whole: Tensor) -> Tensor:
        """This rank's values of a whole parameter, or of anything with its shape."""
        for dim, (begin, stop) in enumerate(self.box()):
            whole = whole.narrow(dim, begin, stop - begin)
        return whole

    def whole(self, local: Tensor) -> Tensor:
        """All ranks' values put together; they all call this. `local` has the shape of this rank's values."""
        x = local
        if self.divided:
            length = self.shape[0] // (self.world.degree("tensor") if self.cut.dim == 0 else 1)
            each = -(-length // self.world.degree(*SHARD))
            padded = x.new_zeros(each, *x.shape[1:])
            padded[: x.shape[0]] = x
            x = all_gather(padded, self.world.group(*SHARD))[:length]
        if self.cut.dim is not None and (group := self.world.group("tensor")) is not None:
            x = torch.cat(all_gather(x[None], group).unbind(0), self.cut.dim)
        return x


def local_of(parameter: nn.Parameter) -> nn.Parameter:
    """The values on this rank as a parameter of their own, in the same memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    with torch.no_grad():
        return nn.Parameter(cast(DTensor, parameter).to_local(), requires_grad=parameter.requires_grad)
