"""The one place where modality is dispatched on the way out: scores to a token, digits or a cleaner vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from litchi.schema.arrays import MASK
from litchi.schema.request import SamplingParams, Scored
from litchi.schema.spelling import Spellings

CERTAIN = 0.999
"""A digit at least this probable is revealed at once: walls need no turn of their own."""


@dataclass(slots=True)
class Past:
    """How often each id has been said, and which have been read or said: what penalties look at."""

    said_V: Float[Tensor, "V"]
    met_V: Bool[Tensor, "V"]

    @classmethod
    def of(cls, prompt: Sequence[int], vocab_size: int) -> Past:
        met_V = torch.zeros(vocab_size, dtype=torch.bool)
        met_V[list(prompt)] = True
        return cls(torch.zeros(vocab_size), met_V)

    def say(self, index: int) -> None:
        self.said_V[index] += 1
        self.met_V[index] = True


def adjust(scores_V: Float[Tensor, "V"], params: SamplingParams, past: Past) -> Float[Tensor, "V"]:
    """Scores after penalties and bias: repetition, frequency, presence, bias; those that are neutral do nothing."""
    if params.repetition_penalty != 1:
        weaker = torch.where(scores_V > 0, scores_V / params.repetition_penalty, scores_V * params.repetition_penalty)
        scores_V = torch.where(past.met_V, weaker, scores_V)
    if params.frequency_penalty:
        scores_V = scores_V - params.frequency_penalty * past.said_V
    if params.presence_penalty:
        scores_V = scores_V - params.presence_penalty * (past.said_V > 0)
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        scores_V = scores_V.index_add(0, torch.tensor(ids), torch.tensor(bias, dtype=scores_V.dtype))
    return scores_V


def draw(logprob_V: Float[Tensor, "V"], params: SamplingParams, generator: torch.Generator) -> int:
    """The next id: the likeliest, or one drawn from what truncation leaves."""
    if params.temperature == 0:
        return int(logprob_V.argmax())
    return int(torch.multinomial(truncate(logprob_V / params.temperature, params), 1, generator=generator))


def sample_token(scores_V: Float[Tensor, "V"], params: SamplingParams, generator: torch.Generator) -> tuple[int, float]:
    """The next id, and its log-probability under the unchanged scores."""
    logprob_V = scores_V.float().log_softmax(-1)
    index = draw(logprob_V, params, generator)
    return index, float(logprob_V[index])


def score(scores_NV: Float[Tensor, "N V"], ids: Sequence[int], count: int, spellings: Spellings) -> list[Scored]:
    """Each id with its log-probability under the row of scores before it, and the `count` likeliest in its place."""
    logprob_NV = scores_NV.float().log_softmax(-1)
    index_N = torch.tensor(ids).unsqueeze(-1)
    own_N = logprob_NV.gather(-1, index_N)
    rank_N = 1 + (logprob_NV > own_N).sum(-1)
    best = logprob_NV.topk(min(count, logprob_NV.shape[-1]))
    rows = zip(ids, own_N[:, 0].tolist(), rank_N.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    found = []
    for index, logprob, rank, likeliest, values in rows:
        pairs = enumerate(zip(likeliest, values, strict=True), 1)
        top = tuple(Scored(other, spellings[other], value, place) for place, (other, value) in pairs)
        found.append(Scored(index, spellings[index], logprob, rank, top))
    return found


def truncate(logprob: Float[Tensor, "... V"], params: SamplingParams) -> Float[Tensor, "... V"]:
    """Probabilities with all but the `top_k` best and the `top_p` mass set to 0 (Holtzman et al. 2020).

    So is what has less than `min_p` of the best one's probability (Nguyen et al. 2024).
    """
    if params.top_p >= 1 and not params.top_k:  # a sort of the whole vocabulary takes longer than a small network
        probability = logprob.softmax(-1)
        return probability * (probability >= params.min_p * probability.amax(-1, keepdim=True))
    best, order = logprob.softmax(-1).sort(descending=True, stable=True)
    keep = best.cumsum(-1) - best < params.top_p
    if params.top_k:
        keep &= torch.arange(best.shape[-1]) < params.top_k
    if params.min_p:
        keep &= best >= params.min_p * best[..., :1]
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
