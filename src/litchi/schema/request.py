"""A request is a question to a model, a completion its whole answer, a delta a piece of it as it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from litchi.schema.sample import Part

FinishReason = Literal["stop", "length", "cancelled"]


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


DRAWING = SamplingParams(temperature=1.0, top_p=0.95)
"""How pictures are planned and drawn unless told otherwise: greedy, a request has one answer for ever, and a model that
does not plan draws bare floors. Chosen on prompts that belong to no test (docs/log.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to continue, and with what.

    `want` says what comes next: "chat" is an assistant turn (text, and pictures where the model chooses to draw),
    "image" is one picture by the assistant, before it the words that it plans with (at most `max_tokens`), "frame" is
    the next frame of a world after the last action, "action" is the next action of a policy in `space`.
    """

    parts: tuple[Part, ...]
    want: Literal["chat", "image", "frame", "action"] = "chat"
    params: SamplingParams = field(default_factory=SamplingParams)
    space: str = ""
    height: int = 64
    """Size in pixels of a picture to draw or a frame to foresee."""
    width: int = 64


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer. `parts` are its pictures and actions, `text` its words; `prompt_tokens` counts what was read."""

    parts: tuple[Part, ...]
    text: str
    finish: FinishReason
    prompt_tokens: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
