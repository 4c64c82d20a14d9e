"""Whether a step is sound is judged before the optimizer takes it, from numbers that all ranks have alike.

A loss is a spike when its logarithm lies far above the running median, in units of the running spread; both are robust,
so that a few bad steps do not make the next bad one look usual. What is judged enters the history only if it is sound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from litchi.config import BadInput

NORM = "gradient norm"
SOFT = 0.1
"""Added to a value before its logarithm is taken: the loss of what is nearly learned jumps by large factors, from 0.002
to 0.02, and means nothing by it."""


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """What is done with a step whose loss or gradient is not finite, or spikes."""

    policy: Literal["off", "skip", "stop"] = "skip"
    """With "skip" the step's gradient is dropped and the run goes on, with "stop" it ends; the step can be replayed."""
    warmup: int = 100
    """Sound steps before a spike can be told from what is usual; what is not finite is caught from the first."""
    window: int = 200
    """Sound steps that are remembered."""
    deviations: float = 10.0
    """Spreads (1.4826 times the median absolute deviation) above the median at which a value is a spike."""
    least_spread: float = 0.1
    """The smallest spread of a logarithm: ten of them are a factor of 2.7."""
    max_skipped: int = 10
    """Steps in a row that may be skipped; more mean that the run, not the batch, is at fault."""


@dataclass(frozen=True, slots=True)
class History:
    """What is usual: logarithms of the last sound values, by name. A checkpoint keeps it (`to_json`, `from_json`), so
    that a continuation judges alike."""

    values: dict[str, list[float]] = field(default_factory=dict)
    skipped: int = 0
    """Steps skipped since the last sound one."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """`reason` is empty for a sound step."""

    reason: str
    history: History

    @property
    def sound(self) -> bool:
        return not self.reason


def judge(config: GuardConfig, history: History, losses: Mapping[str, float], gradient_norm: float) -> Judgement:
    """Judge a step by its mean loss of each modality and the norm of its gradient before clipping.

    All are global figures, the same on all ranks, and so is the answer. Pure; whether a step that is not sound is
    skipped or ends the run is what `check` says.
    """
    if config.policy == "off":
        return Judgement("", history)
    values = {f"loss/{name}": value for name, value in losses.items()} | {NORM: gradient_norm}
    found = (fault(config, history.values.get(name, []), name, value) for name, value in values.items())
    reason = "; ".join(filter(None, found))
    if reason:
        return Judgement(reason, replace(history, skipped=history.skipped + 1))
    kept = dict(history.values)
    for name, value in values.items():
        kept[name] = [*kept.get(name, []), level(value)][-config.window :]
    return Judgement("", History(kept))


def fault(config: GuardConfig, usual: list[float], name: str, value: float) -> str:
    """What is wrong with one value; empty if nothing is."""
    if not math.isfinite(value):
        return f"{name} is {value}"
    if len(usual) < config.warmup:
        return ""
    middle = statistics.median(usual)
    spread = max(config.least_spread, 1.4826 * statistics.median(abs(x - middle) for x in usual))
    deviations = (level(value) - middle) / spread
    if deviations <= config.deviations:
        return ""
    return f"{name} {value:.4g} is {deviations:.0f} spreads above its usual {math.exp(middle) - SOFT:.3g}"


def level(value: float) -> float:
    return math.log(max(value, 0.0) + SOFT)


def check(config: GuardConfig, judgement: Judgement, step: int) -> None:
    """Raises BadInput where a step that is not sound must end the run. It is in the ledger already."""
    if judgement.sound:
        return
    replay = f"replay it with `litchi train RECIPE --replay {step}`"
    if config.policy == "stop":
        raise BadInput(f"step {step}: {judgement.reason}: {replay}, or set train.guard.policy=skip")
    if judgement.history.skipped > config.max_skipped:
        raise BadInput(
            f"step {step}: {judgement.reason}, and {judgement.history.skipped - 1} steps before it were skipped: "
            f"{replay}; lower the learning rate, or set train.guard.policy=off if the data has changed"
        )
