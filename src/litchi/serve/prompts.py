"""Prompts that are no conversation: a text, token ids, or a list of either, as completions and embeddings take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from litchi.config import BadInput
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve.fields import Fields
from litchi.serve.grammars import GUIDED, read_grammar
from litchi.serve.limits import Limits
from litchi.serve.models import Models
from litchi.serve.params import CHOOSING, GREEDY, MAX_N, SAMPLING, is_ids, read_count, read_params
from litchi.serve.wire import HARMLESS, STREAM_OPTIONS, check_text, read_model, repeated

MAX_PROMPTS = 128
"""Prompts of one request, each counted once for every answer that is wanted."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}
"""Accepted at the value that changes nothing."""


@dataclass(frozen=True, slots=True)
class Continuations:
    """What a body of /v1/completions asks for; `echoes` are the texts to say before the answers, None for no echo."""

    requests: tuple[Request, ...]
    num_prompts: int
    n: int
    """Answers to each prompt that are told: of more, those whose words are the likeliest."""
    echoes: tuple[str | None, ...] | None
    seed: int
    stream: bool
    usage: bool
    top: int | None
    """How many of the likeliest tokens are told, None for no likelihoods."""
    store: bool
    """Whether what was asked may be kept for a receipt."""


def read_completion(body: dict[str, Any], models: Models, limits: Limits) -> Continuations:
    """A body of POST /v1/completions. Raises BadInput, UnknownModel."""
    fields = Fields(body)
    own = ("model", "prompt", "n", "best_of", "stream", "stream_options", "logprobs", "echo")
    fields.known((*own, *SAMPLING, *CHOOSING, *HARMLESS, *NEUTRAL, *GUIDED))
    adapter = read_model(fields, models)
    fields.neutral(NEUTRAL)
    prompts = read_prompts(fields, "prompt", limits)
    n = fields.integer("n", 1, 1, MAX_N)
    most, stream = fields.integer("best_of", n, 1, MAX_N), fields.flag("stream")
    if most < n:
        raise BadInput(f"best_of is {most} and n {n}: the best n are chosen among best_of; raise best_of or lower n")
    if stream and most > n:
        raise BadInput(f"best_of={most} chooses among whole answers, which are no stream: set stream to false")
    if len(prompts) * most > MAX_PROMPTS:
        raise BadInput(f"prompt and n ask for {len(prompts) * most} answers, at most {MAX_PROMPTS} at once; send fewer")
    echo, top = fields.flag("echo"), read_count(fields, "logprobs")
    params = read_params(fields, limits, replace(GREEDY, max_tokens=16), least=0 if echo else 1)
    params = replace(params, logprobs=top is not None or most > n, top_logprobs=top or 0, grammar=read_grammar(fields))
    if echo and top is not None:
        params = replace(params, prompt_logprobs=max(top, params.prompt_logprobs or 0))
    options = fields.inner("stream_options")
    options.known(STREAM_OPTIONS)
    each = [repeated(replace(prompt, params=params, adapter=adapter), most) for prompt in prompts]
    return Continuations(
        requests=tuple(request for requests in each for request in requests),
        num_prompts=len(prompts),
        n=n,
        echoes=tuple(said(prompt) for prompt in prompts for _ in range(most)) if echo else None,
        seed=params.seed,
        stream=stream,
        usage=options.flag("include_usage"),
        top=top,
        store=fields.flag("store", True),
    )


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What a body of /v1/embeddings asks for."""

    requests: tuple[Request, ...]
    base64: bool
    store: bool


def read_embedding(body: dict[str, Any], models: Models, limits: Limits) -> Embeddings:
    """A body of POST /v1/embeddings. Raises BadInput, UnknownModel."""
    fields = Fields(body)
    fields.known(("model", "input", "encoding_format", "dimensions", "user", "pooling", "store"))
    adapter = read_model(fields, models)
    if fields.get("dimensions") is not None:
        raise BadInput("dimensions: this model was not trained to shorten its vectors; leave it out and get them whole")
    pooling = "last" if fields.choice("pooling", "mean", ("mean", "last")) == "last" else "mean"
    prompts = read_prompts(fields, "input", limits)
    packed = fields.choice("encoding_format", "float", ("float", "base64")) == "base64"
    prompts = [replace(prompt, params=SamplingParams(max_tokens=0), adapter=adapter) for prompt in prompts]
    requests = tuple(replace(prompt, want="embed", pooling=pooling) for prompt in prompts)
    return Embeddings(requests, packed, fields.flag("store", True))


def read_prompts(fields: Fields, name: str, limits: Limits) -> list[Request]:
    """Requests to continue each prompt of a field, with nothing else said of them."""
    value = fields.get(name)
    if isinstance(value, str) or (is_ids(value) and value):
        value = [value]
    lists = isinstance(value, list) and (are_texts(value) or all(is_ids(each) and each for each in value))
    if not value or not lists:
        raise BadInput(f"{name} must be a text, a list of token ids, or a list of either, and not empty")
    if len(value) > MAX_PROMPTS:
        raise BadInput(f"{name} holds {len(value)} prompts, at most {MAX_PROMPTS} are read at once; send fewer")
    prompts = []
    for prompt in value:
        if isinstance(prompt, str):
            check_text([prompt], limits)
            prompts.append(Request(parts=(Text(text=prompt, role=Role.NONE),), want="text"))
            continue
        if len(prompt) > limits.max_text:
            raise BadInput(f"{name} has {len(prompt)} token ids, more than {limits.max_text}; send fewer")
        prompts.append(Request(parts=(), want="text", tokens=tuple(prompt)))
    return prompts


def are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def said(prompt: Request) -> str | None:
    """The text of a prompt; None for one of ids, whose text only a tokenizer knows."""
    return "".join(part.text for part in prompt.parts if isinstance(part, Text)) if prompt.parts else None
