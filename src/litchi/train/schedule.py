"""How the learning rate rises and falls, as a factor of its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `floor`."""

    warmup: int = 100
    floor: float = 0.0


@dataclass(frozen=True, slots=True)
class Trapezoid:
    """Linear warm-up, a plateau, and a linear fall over the last `decay` share of the steps (WSD)."""

    warmup: int = 100
    decay: float = 0.4
    floor: float = 0.0


Schedule = Cosine | Trapezoid


def factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """The factor at a step counted from 0."""
    rise = min(1.0, (step + 1) / max(1, schedule.warmup))
    match schedule:
        case Cosine(warmup, floor):
            done = min(1.0, max(0, step - warmup) / max(1, num_steps - warmup))
            fall = floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
        case Trapezoid(_, decay, floor):
            left = (num_steps - step) / max(1.0, decay * num_steps)
            fall = floor + (1 - floor) * min(1.0, left)
    return rise * fall
