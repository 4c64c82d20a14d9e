"""A request is a question to a model, a completion its whole answer, a delta a piece of it as it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from litchi.schema.sample import Part

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like: JSON of a schema, text that a regular expression matches, or a Lark grammar."""

    kind: Literal["schema", "regex", "lark"]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled and spans denoised. Temperature 0 is greedy."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    seed: int = 0
    steps: int = 0
    """Denoising steps of a span; 0 takes the default of the modality."""
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    """Whether deltas carry the log-probability of each sampled token."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are told beside each sampled one."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens are told beside each token of the prompt; None does not tell of the prompt."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest are not sampled."""
    presence_penalty: float = 0.0
    """Taken from the score of whatever has been said."""
    frequency_penalty: float = 0.0
    """Taken from it once more each time that it has been said."""
    repetition_penalty: float = 1.0
    """Scores of what has been read or said are divided by it, or multiplied where negative (Keskar et al. 2019)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its score)."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the answer as the model's own end does."""
    min_tokens: int = 0
    """The answer does not end before it has so many tokens."""
    ignore_eos: bool = False
    """Whether the model's own end is a token like others."""
    grammar: Grammar | None = None


DRAWING = SamplingParams(temperature=1.0, top_p=0.95)
"""How pictures are planned and drawn unless told otherwise: greedy, a request has one answer for ever, and a model that
does not plan draws bare floors. Chosen on prompts that belong to no test (docs/log.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to continue, and with what.

    `want` says what comes next: "chat" is an assistant turn (text, and pictures where the model chooses to draw),
    "image" is one picture by the assistant, before it the words that it plans with (at most `max_tokens`), "frame" is
    the next frame of a world after the last action, "action" is the next action of a policy in `space`. "text"
    continues plain words without a turn, and "embed" asks for one vector that stands for the whole prompt.
    """

    parts: tuple[Part, ...]
    want: Literal["chat", "image", "frame", "action", "text", "embed"] = "chat"
    params: SamplingParams = field(default_factory=SamplingParams)
    space: str = ""
    height: int = 64
    """Size in pixels of a picture to draw or a frame to foresee."""
    width: int = 64
    tokens: tuple[int, ...] = ()
    """Ids to read after the parts, just as they are."""
    tools: tuple[str, ...] = ()
    """What may be called: for each tool a JSON object, as the chat template is shown it."""
    pooling: Literal["mean", "last"] = "mean"
    """Which of the last hidden states make an embedding: the mean of all, or that of the last token."""
    adapter: str = ""
    """The name of what changes the network for this request; empty for the network as it is."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its log-probability under the model's own scores, and the likeliest in its place, best first."""

    token: int
    spelling: bytes
    logprob: float | None
    """None for the first token of a document, before which nothing was read."""
    rank: int = 0
    """1 for the likeliest; 0 if not told."""
    top: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer. Text comes as it is decoded, a picture or an action when its span is clean."""

    text: str = ""
    part: Part | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    """How many tokens the request was read as; told by the last delta."""
    scored: tuple[Scored, ...] = ()
    """One for each of `tokens`, if `logprobs` were asked for."""
    prompt: tuple[Scored, ...] = ()
    """One for each token of the prompt, if `prompt_logprobs` were asked for; told by the first delta."""
    vector: tuple[float, ...] = ()
    """An embedding, of length 1 in the Euclidean norm."""
    matched: str | int | None = None
    """The stop string or the id that ended the answer; told by the last delta."""
    ended: Scored | None = None
    """The token that ended the answer, which is none of `tokens`, if `logprobs` were asked for and there was one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer. `parts` are its pictures and actions, `text` its words; `prompt_tokens` counts what was read."""

    parts: tuple[Part, ...]
    text: str
    finish: FinishReason
    prompt_tokens: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    scored: tuple[Scored, ...] = ()
    prompt: tuple[Scored, ...] = ()
    vector: tuple[float, ...] = ()
    matched: str | int | None = None
    ended: Scored | None = None
