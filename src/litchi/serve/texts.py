"""Texts without a conversation: /v1/completions continues them, /v1/embeddings turns each into one vector."""

from __future__ import annotations

import base64
import codecs
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from litchi.schema.request import Delta, Scored
from litchi.schema.spelling import shown
from litchi.serve.answers import DONE, Choice, event, fresh, prompt_rows
from litchi.serve.exchange import Desk, Stopped
from litchi.serve.prompts import Continuations, read_completion, read_embedding
from litchi.serve.tokens import Words


class Texts:
    """The endpoints."""

    def __init__(self, desk: Desk):
        self.desk, self.words = desk, Words.of(desk.worker.sampler)

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/completions", self.complete, methods=["POST"])
        router.add_api_route("/v1/embeddings", self.embed, methods=["POST"])
        return router

    async def complete(self, request: Request) -> Response:
        ask = await self.desk.read(request, read_completion)
        writer = Writer(ask, self.desk.models.told(ask.requests), self.words)
        if ask.stream:
            return await self.desk.stream(request, ask.requests, writer)
        choices = await self.desk.collect(request, ask.requests, writer.receipt)
        return Stopped() if choices is None else JSONResponse(writer.whole(choices))

    async def embed(self, request: Request) -> Response:
        ask = await self.desk.read(request, read_embedding)
        name = fresh("embd")
        made = await self.desk.collect(request, ask.requests, name if ask.store else "")
        if made is None:
            return Stopped()
        vectors = [np.array(choice.vector, "<f4") for choice in made]
        told = [base64.b64encode(v.tobytes()).decode() if ask.base64 else v.tolist() for v in vectors]
        data = [{"object": "embedding", "index": i, "embedding": each} for i, each in enumerate(told)]
        read = sum(choice.prompt_tokens or 0 for choice in made)
        body = {"id": name, "object": "list", "data": data, "model": self.desk.models.told(ask.requests)}
        return JSONResponse(body | {"usage": {"prompt_tokens": read, "total_tokens": read}})


class Writer:
    """Writes the bodies of one answer of /v1/completions, which share id, time and model."""

    def __init__(self, ask: Continuations, model: str, words: Words):
        self.ask, self.model, self.words = ask, model, words
        self.id, self.created = fresh("cmpl"), int(time.time())
        self.receipt = self.id if ask.store else ""
        self.columns = {index: Columns(words) for index in range(len(ask.requests))}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        told = []
        for number, index in enumerate(self.best(choices)):
            choice = choices[index]
            body: dict[str, Any] = {"index": number, "text": self.echo(index) + choice.text, "logprobs": None}
            if self.ask.top is not None:
                prompt = choice.prompt if self.ask.echoes else []
                body["logprobs"] = self.columns[index].of([*prompt, *choice.scored])
            elif choice.prompt:
                body["prompt_logprobs"] = prompt_rows(choice.prompt)
            told.append(body | {"finish_reason": choice.finish, "stop_reason": choice.matched})
        return self.head() | {"choices": told, "usage": self.usage(choices)}

    def best(self, choices: Sequence[Choice]) -> list[int]:
        """Which answers are told: of each prompt's the likeliest, by the mean of its words, if there are too many."""
        each, found = len(choices) // self.ask.num_prompts, []
        for first in range(0, len(choices), each):
            own = range(first, first + each)
            found += own if each == self.ask.n else sorted(own, key=lambda i: -likelihood(choices[i]))[: self.ask.n]
        return found

    def opening(self, index: int) -> str:
        return self.chunk(index, self.echo(index)) if self.echo(index) else ""

    def piece(self, index: int, delta: Delta) -> str:
        scored = [*(delta.prompt if self.ask.echoes else ()), *delta.scored, *([delta.ended] if delta.ended else [])]
        logprobs = self.columns[index].of(scored) if self.ask.top is not None and scored else None
        return self.chunk(index, delta.text, logprobs=logprobs) if delta.text or logprobs else ""

    def closing(self, index: int, choice: Choice) -> str:
        return self.chunk(index, "", finish_reason=choice.finish, stop_reason=choice.matched)

    def ending(self, choices: Sequence[Choice]) -> str:
        told = event(self.head() | {"choices": [], "usage": self.usage(choices)}) if self.ask.usage else ""
        return told + DONE

    def head(self) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return head | {"seed": self.ask.seed}

    def chunk(self, index: int, text: str, **more: Any) -> str:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None} | more
        return event(self.head() | {"choices": [choice]})

    def echo(self, index: int) -> str:
        if self.ask.echoes is None:
            return ""
        text = self.ask.echoes[index]
        return self.words.text(self.ask.requests[index].tokens) if text is None else text

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Tokens read and made; a prompt of several answers is read once."""
        each = len(choices) // self.ask.num_prompts
        read, made = sum(c.prompt_tokens or 0 for c in choices[::each]), sum(len(c.tokens) for c in choices)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def likelihood(choice: Choice) -> float:
    """The mean of the log-probabilities of its words."""
    worth = [scored.logprob for scored in choice.scored if scored.logprob is not None]
    return sum(worth) / len(worth) if worth else 0.0


class Columns:
    """OpenAI's four columns over the tokens of one text, piece by piece; offsets are in characters of that text."""

    def __init__(self, words: Words):
        self.words, self.at = words, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, scored: Sequence[Scored]) -> dict[str, Any]:
        offsets = []
        for token in scored:
            offsets.append(self.at)
            if not self.words.is_control(token.token):
                self.at += len(self.decoder.decode(token.spelling))
        return {
            "tokens": [shown(token.spelling) for token in scored],
            "token_logprobs": [token.logprob for token in scored],
            "top_logprobs": [likeliest(token) for token in scored],
            "text_offset": offsets,
        }


def likeliest(token: Scored) -> dict[str, float] | None:
    """The likeliest tokens by what they say, and the token itself; None where nothing was predicted."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in (*token.top, token):
        if each.logprob is not None:
            found.setdefault(shown(each.spelling), each.logprob)  # the best first
    return found
