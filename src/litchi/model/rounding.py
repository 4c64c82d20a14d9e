"""Which sixteen steps lie nearest to a group of 32 weights: what `native_pack.h` looks for, slowly and to the same bit.

A group is kept as integers, a scale and a least value, both fp16; a weight is scale * q + least. The whole range of a
group is a good choice for 8 bits and a poor one for 4: a few large values then make every step wide. So many lines are
tried, and the one of the least squares is kept. Weights that lie on such a grid already stay what they are to the bit.

N groups; every sum runs over the 32 values of a group one after another, as C++ does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK, TOP = 32, 15
STEPS = (8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 15.5, 16.0, 16.5, 17.0, 18.0)
"""In which the range of a group is divided; beyond 15 both ends are cut off."""
ONE_END = (15.5, 16.5, 17.5, 18.5)
"""The same where one end is cut off."""
AGAIN = 2
"""How often the best line is drawn again through what it makes of the values."""
EXACT = 1 / 32
"""Of a step: what is missed by less, root mean square, was on a grid and rounded since. It is left alone."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Scales and least values of groups, as fp16 has them, and the squares of what they miss."""

    scale: Float[Tensor, "N"]
    least: Float[Tensor, "N"]
    missed: Float[Tensor, "N"]

    def else_(self, other: Fit, where: Bool[Tensor, "N"]) -> Fit:
        """The other one there."""
        pairs = ((other.scale, self.scale), (other.least, self.least), (other.missed, self.missed))
        return Fit(*(torch.where(where, theirs, ours) for theirs, ours in pairs))


def search(w: Float[Tensor, "N 32"], worth: Float[Tensor, "32"] | None = None) -> Fit:
    """The best lines found for groups of fp32 values; `worth` is what a miss of each inner value counts."""
    count = torch.ones(BLOCK) if worth is None else worth
    low, range_ = w.amin(1), w.amax(1) - w.amin(1)
    best = fit(w, count, range_ / TOP, low)
    for grid in few_steps(w, low, range_):
        best = best.else_(grid, grid.missed < best.missed)
    apart, everywhere = range_.clamp(min=1e-30), best.missed > 0
    for steps, cut in [(s, max(0.0, (s - TOP) * 0.5)) for s in STEPS]:
        best = better(best, line(w, count, low + range_ * share(cut, steps), torch.tensor(steps) / apart), everywhere)
    found = best
    for down in range(8):
        best = better(best, fit(w, count, found.scale, low - found.scale * down), everywhere)
    off = best.missed * (1 / EXACT**2) > best.scale * best.scale * total(count)
    for steps, cut in [(s, cut) for s in ONE_END for cut in (0.0, s - TOP)]:
        best = better(best, line(w, count, low + range_ * share(cut, steps), torch.tensor(steps) / apart), off)
    for _ in range(AGAIN):
        best = better(best, line(w, count, best.least, inverse(best.scale)), off)
    return best


def integers(w: Float[Tensor, "N 32"], scale: Float[Tensor, "N"], least: Float[Tensor, "N"]) -> Float[Tensor, "N 32"]:
    """The nearest steps, of 0 to 15."""
    return ((w - least[:, None]) * inverse(scale)[:, None]).round().clamp(0, TOP)


def better(best: Fit, other: Fit, where: Bool[Tensor, "N"]) -> Fit:
    return best.else_(other, (other.missed < best.missed) & where)


def fit(w: Tensor, worth: Tensor, scale: Tensor, least: Tensor) -> Fit:
    """What is missed once scale and least value are fp16."""
    scale, least = scale.half().float(), least.half().float()
    missed = w - (integers(w, scale, least) * scale[:, None] + least[:, None])
    return Fit(scale, least, added(missed * missed * worth))


def line(w: Tensor, worth: Tensor, least: Tensor, inverse_: Tensor) -> Fit:
    """The line nearest to the values, once they have been cut to the integers that `inverse_` gives."""
    value = w - least[:, None]
    q = (value * inverse_[:, None]).round().clamp(0, TOP)
    counted = q * worth
    ones, squares, values, products = map(added, (counted, counted * q, value * worth, counted * value))
    apart = total(worth) * squares - ones * ones
    scale = (total(worth) * products - values * ones) / torch.where(apart > 0, apart, torch.ones_like(apart))
    return fit(w, worth, scale, least + (values - scale * ones) / total(worth))


def few_steps(w: Tensor, low: Tensor, range_: Tensor) -> Iterator[Fit]:
    """Groups on a grid of which they use less than eight steps: no line finds their place among the sixteen."""
    for steps in range(1, 8):
        scale = (range_ / steps).half().float()
        off = (w[:, :8] - low[:, None]) * inverse(scale)[:, None]
        near = ((off - off.round()).abs() < 0.125).all(1) & (scale > 0)
        for down in range(TOP - steps + 1):
            least = (low - scale * down).half().float()
            same = (integers(w, scale, least) * scale[:, None] + least[:, None] == w).all(1) & near
            yield Fit(scale, least, torch.where(same, 0.0, torch.inf))


def inverse(scale: Tensor) -> Tensor:
    return 1 / scale.clamp(min=1e-30)


def share(cut: float, steps: float) -> Tensor:
    return torch.tensor(cut) / torch.tensor(steps)


def total(worth: Tensor) -> Tensor:
    return added(worth[None])[0]


def added(x: Float[Tensor, "N 32"]) -> Float[Tensor, "N"]:
    """One after another, from 0."""
    sum_ = torch.zeros(len(x))
    for column in x.unbind(1):
        sum_ = sum_ + column
    return sum_
