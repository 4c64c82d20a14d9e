"""The one place where modality is dispatched on the way out: scores to a token, digits or a cleaner vector."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from litchi.schema.arrays import MASK
from litchi.schema.request import SamplingParams

CERTAIN = 0.999
"""A digit at least this probable is revealed at once: walls need no turn of their own."""


def sample_token(scores_V: Float[Tensor, "V"], params: SamplingParams, generator: torch.Generator) -> tuple[int, float]:
    """The next id, and its log-probability under the unchanged scores."""
    logprob_V = scores_V.float().log_softmax(-1)
    if params.temperature == 0:
        index = int(logprob_V.argmax())
    else:
        index = int(torch.multinomial(truncate(logprob_V / params.temperature, params), 1, generator=generator))
    return index, float(logprob_V[index])


def truncate(logprob: Float[Tensor, "... V"], params: SamplingParams) -> Float[Tensor, "... V"]:
    """Probabilities with all but the `top_k` best and the `top_p` mass set to 0 (Holtzman et al. 2020)."""
    best, order = logprob.softmax(-1).sort(descending=True, stable=True)
    keep = best.cumsum(-1) - best < params.top_p
    if params.top_k:
        keep &= torch.arange(best.shape[-1]) < params.top_k
    return torch.zeros_like(best).scatter(-1, order, best * keep)


def reveal(
    value_NC: Float[Tensor, "N C"],
    scores_NCL: Float[Tensor, "N C L"],
    *,
    steps_left: int,
    params: SamplingParams,
    generator: torch.Generator,
) -> Float[Tensor, "N C"]:
    """Show some of the hidden digits: all that are certain, and in random order enough to finish in `steps_left`.

    Digits shown together are sampled apart from each other, so that few steps are for pictures without choices in them.
    """
    hidden = value_NC == MASK
    highest, guess = scores_NCL.float().softmax(-1).max(-1)
    certain = highest >= CERTAIN
    if params.temperature > 0:
        tempered_NCL = truncate(scores_NCL.float() / params.temperature, params)
        sampled = torch.multinomial(tempered_NCL.flatten(0, 1), 1, generator=generator).view(hidden.shape)
        guess = torch.where(certain, guess, sampled)
    order = (
        torch.rand(hidden.shape, generator=generator).masked_fill(~hidden, math.inf).masked_fill(certain & hidden, -1)
    )
    due = math.ceil(int((hidden & ~certain).sum()) / steps_left) + int((hidden & certain).sum())
    chosen = torch.zeros_like(hidden).flatten()
    chosen[order.flatten().argsort(stable=True)[:due]] = True
    return torch.where(chosen.view_as(hidden) & hidden, guess.to(value_NC.dtype), value_NC)


def euler(value_NC: Float[Tensor, "N C"], clean_NC: Float[Tensor, "N C"], time: float, step: float) -> Tensor:
    """One step along the straight path from noise to the predicted clean value (rectified flow)."""
    return value_NC + (clean_NC - value_NC) * min(1.0, step / (1 - time))
