"""A matrix rounded to four bits so that what it makes of its inputs changes least: later columns make good for earlier.

What rounding costs is the sum of squares of error x input: e H e', H being the inputs' products with each other. With
H = M M' for an upper triangle M, that is the sum of squares of e M, whose column j holds the errors of columns up to j
only. So columns are rounded in their order, each from where it would be best after the errors made so far: GPTQ
(Frantar et al., 2022), written as Babai's nearest plane, which needs one Cholesky factor and no inverse. Steps are
looked for as `rounding.search` does, group by group, where columns count by the diagonal of M. Then columns are gone
through again (coordinate descent): the first of them knew nothing of the errors to come.

N outputs (rows), I inner values (columns), a multiple of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from litchi.model.compiled import compiler
from litchi.model.native import library
from litchi.model.packing import BLOCK, KINDS, dequantise, nearest, unpack_groups
from litchi.model.rounding import TOP, inverse, search

DAMP = 0.01
"""Of the mean square of inputs, added to all: directions in which nothing was read are not free."""
SWEEPS = 2
"""Through all columns, after the first; a third and fourth win next to nothing more."""
SETTLE = 4
"""How often at most weights are rounded again until they stay what they are."""


def feed_back(weight: Float[Tensor, "N I"], products: Float[Tensor, "I I"]) -> Float[Tensor, "N I"]:
    """The weights on a grid of four bits, which packing keeps bit for bit.

    `products` are those of the inputs, X' X, whose diagonal is changed here: matrices of this size are what memory goes
    to, three of them at most. Row by row it is the better of this and `round_alone` on just these inputs.
    """
    alone, mean = round_alone(weight), float(products.diagonal().mean())
    if mean <= 0:
        return alone
    damp = DAMP * mean
    products.diagonal().add_(damp)
    columns = weight.T.contiguous()
    rounded, grid = in_order(columns, products)
    for _ in range(SWEEPS):
        look_again(columns, products, rounded, grid)
    found = settled(rounded.T.contiguous())
    better = cost(weight - found, products, damp) <= cost(weight - alone, products, damp)
    return torch.where(better[:, None], found, alone)


def in_order(weight_IN: Tensor, products: Tensor) -> tuple[Float[Tensor, "I N"], list[Grid]]:
    """Columns one after another, each where it makes good what those before it missed; and the grid of each group."""
    reach = upper(products)
    diagonal = reach.diagonal().clone()
    reach, own = reach.div_(diagonal), diagonal.square()
    rounded, missed, grids = torch.empty_like(weight_IN), torch.empty_like(weight_IN), []
    for start in range(0, len(products), BLOCK):
        group = slice(start, start + BLOCK)
        pull = reach[:start, group].T @ missed[:start]
        # Where the group would go if it could go anywhere: there, not where each of its columns would go alone, it is
        # that its steps should lie.
        free = torch.linalg.solve_triangular(reach[group, group].T, pull, upper=False, unitriangular=True)
        grid = Grid(*lines((weight_IN[group] + free).T, own[group] / own[group].mean()))
        grids.append(grid)
        for j in range(start, start + BLOCK):
            aim = weight_IN[j] + pull[j - start] + reach[start:j, j] @ missed[start:j]
            rounded[j] = grid.nearest(aim)
            missed[j] = weight_IN[j] - rounded[j]
    return rounded, grids


def look_again(weight_IN: Tensor, products: Tensor, rounded_IN: Tensor, grids: list[Grid]) -> None:
    """Change what is rounded: every column once more, to where it is best beside all others as they are now."""
    for start, grid in zip(range(0, len(products), BLOCK), grids, strict=True):
        group = slice(start, start + BLOCK)
        pull = products[group] @ (weight_IN - rounded_IN)
        for j in range(start, start + BLOCK):
            was = rounded_IN[j].clone()
            rounded_IN[j] = grid.nearest(was + pull[j - start] / products[j, j])
            pull.addr_(products[j, group], was - rounded_IN[j])


@dataclass(frozen=True, slots=True)
class Grid:
    """The steps of one group of each row."""

    scale: Float[Tensor, "N"]
    least: Float[Tensor, "N"]

    def nearest(self, value: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        return ((value - self.least) * inverse(self.scale)).round().clamp(0, TOP) * self.scale + self.least


def round_alone(weight: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
    """The weights that packing would make of these, each group by itself. oracle: packing.nearest"""
    if compiler() is None:
        return dequantise(*nearest(weight))
    weight, shape = weight.float().contiguous(), (*weight.shape, KINDS["int4"])
    packed = torch.empty(library().litchi_packed(*shape), dtype=torch.uint8)
    library().litchi_pack(weight.data_ptr(), *shape, packed.data_ptr(), 1, torch.get_num_threads())
    return unpack_groups(packed.view(-(-len(weight) // BLOCK), weight.shape[1] // BLOCK, -1), 4)[: len(weight)]


def cost(missed: Float[Tensor, "N I"], products: Float[Tensor, "I I"], damp: float = 0.0) -> Float[Tensor, "N"]:
    """The squares by which each output changes, over all inputs; `damp` is what stands on the diagonal beside them."""
    return ((missed @ products - damp * missed) * missed).sum(1)


def lines(groups: Float[Tensor, "N 32"], worth: Float[Tensor, "32"]) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Scales and least values. oracle: rounding.search"""
    if compiler() is None:
        found = search(groups, worth)
        return found.scale, found.least
    groups, worth = groups.contiguous(), worth.contiguous()
    scale, least = torch.empty(2, len(groups)).unbind()
    places = (groups.data_ptr(), worth.data_ptr(), len(groups), scale.data_ptr(), least.data_ptr())
    library().litchi_fit(*places, torch.get_num_threads())
    return scale, least


def settled(rounded: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
    """Weights that packing keeps: a group that uses one step only may have to move by a rounding of fp16."""
    for _ in range(SETTLE):
        again = round_alone(rounded)
        if torch.equal(again, rounded):
            break
        rounded = again
    return rounded


def upper(products: Float[Tensor, "I I"]) -> Float[Tensor, "I I"]:
    """M, so that M M' are the products, or these with more on their diagonal if they have no root in fp32."""
    more = 0.0
    while True:
        flipped = products.flip(0, 1)
        flipped.diagonal().add_(more)
        root, failed = torch.linalg.cholesky_ex(flipped)
        del flipped
        if not failed:
            return root.flip(0, 1)
        more = max(10 * more, DAMP * float(products.diagonal().mean()))
