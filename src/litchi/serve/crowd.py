"""A crowd of clients at any OpenAI-compatible address: how long each waited, and how much all of them got.

With a rate, visitors come as a Poisson process whatever the server does, and each is timed from when he came, not from
when there was time for him: a server that stalls is not spared those who came meanwhile. Without one, a fixed number of
them ask one question after another. Tokens are those that the server itself counts in the usage of each stream.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from litchi.config import BadInput
from litchi.record import need

WORDS = (
    "the of and to in is was for it with as his on be at by had not are but from or have an they which one you "
    "were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our "
    "man me even most made after "
).split()
RESAMPLES = 1000
UNSEEN = "a stream that ended before its last event"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who comes and what is asked. Times are in seconds."""

    url: str = "http://127.0.0.1:8000"
    model: str = ""
    """The first that the server names, if empty."""
    key: str = ""
    requests: int = 100
    concurrency: int = 8
    """How many are under way at once; with a rate, there is no bound."""
    rate: float = 0.0
    """Visitors a second; 0 for a closed loop."""
    prompt_tokens: int = 64
    max_tokens: int = 64
    bodies: tuple[dict[str, Any], ...] = ()
    """What is asked in turn, over what would be asked anyway; without any, words drawn at random."""
    ignore_eos: bool = False
    timeout: float = 120.0
    seed: int = 0


@dataclass(slots=True)
class Visit:
    """One question and what came of it; times are seconds since the visitor came."""

    began: float
    """Since the first visitor may have come."""
    pieces: list[float] = field(default_factory=list)
    """When each piece of text came."""
    total: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    counted: bool = False
    """Whether the server said how many tokens there were; else every piece is taken for one."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure of all visits, with the interval in which 95 of 100 resamples of the visits have it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a crowd found. Times are in seconds; a figure of which nothing is known is None."""

    url: str
    model: str
    requests: int
    answered: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    tokens: int
    counted: bool
    """Whether all tokens are the server's own count."""
    tokens_per_second: float
    requests_per_second: float
    first: dict[str, Spread | None]
    """Time to the first piece of text: p50 and p99."""
    between: dict[str, Spread | None]
    """From one piece to the next."""
    per_token: dict[str, Spread | None]
    """From the first piece to the last, for each token after the first."""
    whole: dict[str, Spread | None]
    """Time to the last event."""


def crowd(plan: Plan, heard: Callable[[Visit], None] = lambda visit: None) -> Report:
    """Send the crowd; `heard` is told of each visit that ends. Raises BadInput if the server cannot be asked at all."""
    return asyncio.run(_crowd(plan, heard))


async def _crowd(plan: Plan, heard: Callable[[Visit], None]) -> Report:
    httpx = need("serve", "httpx")
    root = plan.url.rstrip("/").removesuffix("/v1") + "/v1"
    headers = {"Authorization": f"Bearer {plan.key}"} if plan.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=root, headers=headers, timeout=plan.timeout, limits=limits) as client:
        model = plan.model or await first_model(client, httpx)
        usual: dict[str, Any] = {"model": model, "max_tokens": plan.max_tokens, "temperature": 0, "stream": True}
        usual |= {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if plan.ignore_eos else {})
        # One visit before all others, which is not counted: connections are warm, and words become tokens at some rate.
        probe = await visit(client, usual | said(" ".join(WORDS)) | {"max_tokens": 1}, 0.0, httpx)
        if probe.error:
            raise BadInput(f"{root} answers no chat: {probe.error}; look at --url, --model and --key")
        bodies = questions(plan, usual, len(WORDS) / (probe.prompt_tokens or len(WORDS)))
        began = time.perf_counter()
        visits = await (poisson if plan.rate else closed)(plan, bodies, client, httpx, began, heard)
        return report(plan, model, visits, time.perf_counter() - began)


async def first_model(client: Any, httpx: Any) -> str:
    try:
        answer = await client.get("/models")
        return answer.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        told = str(error).split("\n")[0]
        mend = "look at --url and --key, or name a --model"
        raise BadInput(f"{client.base_url}models names no model ({told}): {mend}") from None


def questions(plan: Plan, usual: dict[str, Any], words_per_token: float) -> Iterator[dict[str, Any]]:
    """The bodies in order. Each text is another one, so that no server remembers having read it."""
    draw = random.Random(plan.seed)
    count = max(1, round(plan.prompt_tokens * words_per_token))
    for index in range(plan.requests):
        if plan.bodies:
            yield usual | plan.bodies[index % len(plan.bodies)]
        else:
            yield usual | said(" ".join(draw.choices(WORDS, k=count)))


def said(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


async def closed(
    plan: Plan, bodies: Iterator[dict], client: Any, httpx: Any, began: float, heard: Callable[[Visit], None]
) -> list[Visit]:
    """A fixed number of visitors, each of whom asks again when he has been answered."""
    visits: list[Visit] = []

    async def one() -> None:
        for body in bodies:
            visits.append(made := await visit(client, body, time.perf_counter() - began, httpx))
            heard(made)

    await asyncio.gather(*(one() for _ in range(min(plan.concurrency, plan.requests))))
    return visits


async def poisson(
    plan: Plan, bodies: Iterator[dict], client: Any, httpx: Any, began: float, heard: Callable[[Visit], None]
) -> list[Visit]:
    """Visitors who come at random, whether others have been answered or not."""
    draw, at, tasks = random.Random(f"arrivals {plan.seed}"), 0.0, []

    async def one(body: dict, comes: float) -> Visit:
        made = await visit(client, body, comes, httpx, time.perf_counter() - began - comes)
        heard(made)
        return made

    for body in bodies:
        at += draw.expovariate(plan.rate)
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(body, at)))
    return list(await asyncio.gather(*tasks))


async def visit(client: Any, body: dict[str, Any], began: float, httpx: Any, late: float = 0.0) -> Visit:
    """Ask once and read the stream. `late` is how long the visitor has been waiting already."""
    made, start, done = Visit(began), time.perf_counter() - late, False
    try:
        async with client.stream("POST", "/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                made.error = f"HTTP {answer.status_code}"
            async for line in answer.aiter_lines():
                if made.error or not line.startswith("data:"):
                    continue
                done |= (data := line[5:].strip()) == "[DONE]"
                if not done:
                    hear(made, json.loads(data), time.perf_counter() - start)
        made.error = made.error or ("" if done else UNSEEN)
    except httpx.HTTPError as error:
        made.error = type(error).__name__
    except (ValueError, LookupError, TypeError, AttributeError):
        made.error = "an event that is not OpenAI's"
    made.total = time.perf_counter() - start
    if not made.counted:
        made.tokens = len(made.pieces)
    return made


def hear(made: Visit, event: dict[str, Any], now: float) -> None:
    """One event of a stream."""
    if event.get("error"):
        made.error = f"an error in the stream ({event['error'].get('code') or event['error'].get('type')})"
    if usage := event.get("usage"):
        made.prompt_tokens, made.tokens = usage.get("prompt_tokens") or 0, usage["completion_tokens"]
        made.counted = True
    # The first event of many servers names a role only: nobody reads that.
    deltas = [choice.get("delta") or {} for choice in event.get("choices") or ()]
    if any(delta.get(name) for delta in deltas for name in ("content", "tool_calls", "reasoning_content")):
        made.pieces.append(now)


def report(plan: Plan, model: str, visits: Sequence[Visit], seconds: float) -> Report:
    fine = [made for made in visits if not made.error]
    tokens = sum(made.tokens for made in fine)
    long = [made for made in fine if made.tokens > 1 and len(made.pieces) > 1]
    return Report(
        url=plan.url,
        model=model,
        requests=len(visits),
        answered=len(fine),
        errors=dict(Counter(made.error for made in visits if made.error).most_common()),
        seconds=seconds,
        prompt_tokens=sum(made.prompt_tokens for made in fine),
        tokens=tokens,
        counted=all(made.counted for made in fine),
        tokens_per_second=tokens / seconds,
        requests_per_second=len(fine) / seconds,
        first=percentiles([made.pieces[:1] for made in fine]),
        between=percentiles([np.diff(made.pieces).tolist() for made in fine]),
        per_token=percentiles([[(made.pieces[-1] - made.pieces[0]) / (made.tokens - 1)] for made in long]),
        whole=percentiles([[made.total] for made in fine]),
    )


def percentiles(groups: Sequence[Sequence[float]]) -> dict[str, Spread | None]:
    """p50 and p99 of what the visits found; visits are resampled whole, since what one of them found hangs together."""
    found_by = [np.asarray(group) for group in groups if len(group)]
    if not found_by:
        return {"p50": None, "p99": None}
    draw, wanted = np.random.default_rng(0), (50, 99)
    all_of = np.concatenate(found_by)
    found = np.empty((RESAMPLES, len(wanted)))
    for row in found:
        picked = draw.integers(len(found_by), size=len(found_by))
        row[:] = np.percentile(np.concatenate([found_by[index] for index in picked]), wanted)
    bounds = np.percentile(found, (2.5, 97.5), axis=0)
    values = np.percentile(all_of, wanted)
    return {f"p{p}": Spread(float(values[i]), *map(float, bounds[:, i])) for i, p in enumerate(wanted)}


def read_bodies(path: Path) -> tuple[dict[str, Any], ...]:
    """JSON lines: fields of a chat's body each, or a `prompt` instead of `messages`. Raises BadInput."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is not a file of JSON lines ({error}): give one object a line") from None
    for index, row in enumerate(rows):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("prompt", ""), str)
            or not {"prompt", "messages"} & {*row}
        ):
            raise BadInput(f"{path}, line {index + 1}: give an object with a prompt, a text, or messages")
    if not rows:
        raise BadInput(f"{path} holds no prompts: give one object a line")
    return tuple((said(row.pop("prompt")) if "prompt" in row else {}) | row for row in rows)
