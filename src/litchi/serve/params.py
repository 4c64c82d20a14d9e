"""How a stranger may say how to sample: OpenAI's parameters and what users of other servers expect, all bounded."""

from __future__ import annotations

import secrets
from typing import Any

from litchi.config import BadInput
from litchi.schema.request import SamplingParams
from litchi.serve.fields import Fields, show
from litchi.serve.limits import Limits

MAX_N = 8
MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_STOP_IDS = 64
MAX_TOP = 20
MAX_BIAS = 1024
MAX_SEED = 2**31 - 1
MAX_ID = 2**31 - 1

GREEDY = SamplingParams()
"""How words are sampled unless told otherwise."""

SAMPLING = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "steps", "stop")
CHOOSING = (
    "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stop_token_ids",
    "min_tokens", "ignore_eos", "prompt_logprobs",
)  # fmt: skip
"""What only words are sampled by."""


def read_params(fields: Fields, limits: Limits, usual: SamplingParams = GREEDY, least: int = 1) -> SamplingParams:
    """Words are greedy and drawings sampled unless a temperature is given. Without a seed one is drawn and told.

    At least `least` tokens must be asked for. Raises BadInput, which names the field and its bounds.
    """
    longest = fields.integer("max_tokens", min(usual.max_tokens, limits.max_tokens), least, limits.max_tokens)
    top_k = fields.integer("top_k", 0, -1, 1 << 20)
    return SamplingParams(
        max_tokens=fields.integer("max_completion_tokens", longest, least, limits.max_tokens),
        temperature=fields.number("temperature", usual.temperature, 0.0, 2.0),
        top_p=fields.number("top_p", usual.top_p, 1e-6, 1.0),
        top_k=max(top_k, 0),  # other servers say -1 for all
        seed=fields.integer("seed", secrets.randbelow(MAX_SEED - MAX_N), 0, MAX_SEED),
        steps=fields.integer("steps", 0, 0, 256),
        stop=read_stop(fields.get("stop")),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 10.0),
        logit_bias=read_bias(fields.get("logit_bias")),
        stop_token_ids=read_ids(fields, "stop_token_ids", MAX_STOP_IDS),
        min_tokens=fields.integer("min_tokens", 0, 0, limits.max_tokens),
        ignore_eos=fields.flag("ignore_eos"),
        prompt_logprobs=read_count(fields, "prompt_logprobs"),
    )


def read_count(fields: Fields, name: str) -> int | None:
    """How many of the likeliest tokens to tell; None if the field is absent."""
    return None if fields.get(name) is None else fields.integer(name, None, 0, MAX_TOP)


def read_stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise BadInput(f"stop must be a string or a list of at most {MAX_STOPS} strings, none empty, got {show(value)}")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise BadInput(f"stop: a string has at most {MAX_STOP_LENGTH} characters; send a shorter one")
    return tuple(stops)


def read_ids(fields: Fields, name: str, most: int) -> tuple[int, ...]:
    ids = [] if fields.get(name) is None else fields.get(name)
    if not is_ids(ids) or len(ids) > most:
        raise BadInput(f"{fields.where}{name} must be a list of at most {most} token ids, got {show(fields.get(name))}")
    return tuple(ids)


def is_ids(value: Any) -> bool:
    """Whether a value is a list of integers that may be token ids."""
    return isinstance(value, list) and all(type(index) is int and 0 <= index <= MAX_ID for index in value)


def read_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """OpenAI's object: ids as strings, biases from -100 to 100."""
    fault = BadInput(f"logit_bias must be an object of at most {MAX_BIAS} token ids with numbers from -100 to 100")
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIAS:
        raise fault
    found: dict[int, float] = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) <= MAX_ID):
            raise fault
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise fault
        found[int(name)] = float(bias)
    return tuple(found.items())
