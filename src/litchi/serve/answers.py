"""Answers as bodies in OpenAI's form: completions, chunks of a stream, drawn pictures, errors."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from litchi.schema.request import Completion, Delta, Scored
from litchi.schema.sample import Action, Image, Part, Text
from litchi.schema.spelling import shown
from litchi.serve.callreader import Argued, Begun, CallReader
from litchi.serve.calls import Call
from litchi.serve.limits import data_url, encode_png
from litchi.serve.wire import Ask

DONE = "data: [DONE]\n\n"
"""The last event of a stream."""


@dataclass
class Choice:
    """One answer: a whole completion, or the deltas of a stream as far as they came."""

    parts: list[Part] = field(default_factory=list)
    text: str = ""
    finish: str = "stop"
    over: bool = False
    """Whether the last piece has come."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: int | None = None
    """None until the last delta of a stream has told it."""
    prompt: list[Scored] = field(default_factory=list)
    matched: str | int | None = None
    scored: list[Scored] = field(default_factory=list)
    """Every token, that which ended the answer as well."""
    vector: tuple[float, ...] = ()

    @classmethod
    def of(cls, answer: Completion) -> Choice:
        """A completion tells its text beside its other parts; a body's content holds both."""
        others = [part for part in answer.parts if not isinstance(part, Text)]
        said: list[Part] = [Text(text=answer.text)] if answer.text else []
        return cls(
            parts=[*said, *others],
            text=answer.text,
            finish=answer.finish,
            over=True,
            tokens=list(answer.tokens),
            prompt_tokens=answer.prompt_tokens,
            prompt=list(answer.prompt),
            matched=answer.matched,
            scored=[*answer.scored, *([answer.ended] if answer.ended else [])],
            vector=answer.vector,
        )

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += logprobs_of(delta)
        self.finish = delta.finish or self.finish
        self.prompt += delta.prompt
        self.scored += [*delta.scored, *([delta.ended] if delta.ended else [])]
        if delta.finish is not None:
            self.over = True
            self.matched = delta.matched
            self.prompt_tokens = delta.prompt_tokens or self.prompt_tokens
        if delta.part is not None:
            self.parts.append(delta.part)
        elif delta.text:
            said = self.parts.pop().text if self.parts and isinstance(self.parts[-1], Text) else ""
            self.parts.append(Text(text=said + delta.text))


class Writer:
    """Writes the bodies of one chat answer, which share id, time and model."""

    def __init__(self, ask: Ask, model: str):
        self.ask, self.model = ask, model
        self.id, self.created = fresh("chatcmpl"), int(time.time())
        self.receipt = self.id if ask.store else ""
        self.readers = {index: CallReader(ask.tools) for index in range(len(ask.requests))} if ask.tools.names else {}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        body = self._head("chat.completion")
        body["choices"] = [self._choice(i, choice) for i, choice in enumerate(choices)]
        return body | {"usage": usage(choices)}

    def opening(self, index: int) -> str:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, delta: Delta) -> str:
        """The events for a piece of text, of a call or a picture; empty if the delta shows none."""
        said, rows = self._said(index, delta)
        if isinstance(delta.part, Image):
            said["images"] = [picture_part(delta.part)]
        more: dict[str, Any] = {"logprobs": {"content": logprobs_of(delta)}} if delta.logprobs else {}
        if delta.prompt:
            more["prompt_logprobs"] = prompt_rows(delta.prompt)
        if self.ask.token_ids and delta.tokens:
            more["token_ids"] = list(delta.tokens)
        told = self._chunk(index, said, **more) if said or more else ""
        return told + "".join(self._chunk(index, {"tool_calls": [row]}) for row in rows)

    def closing(self, index: int, choice: Choice) -> str:
        return self._chunk(index, {}, finish_reason=self._finish(index, choice), stop_reason=choice.matched)

    def _said(self, index: int, delta: Delta) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The text of a delta, and what it tells of calls: first a name, then the arguments as they come."""
        if (reader := self.readers.get(index)) is None:
            return ({"content": delta.text} if delta.text else {}), []
        at, text, rows = len(reader.calls) - 1, "", []
        for piece in [*reader.feed(delta.text), *(reader.close() if delta.finish else [])]:
            match piece:
                case str():
                    text += piece
                case Begun():
                    at += 1
                    rows.append({"index": at} | call_body(piece.call))
                case Argued():
                    rows.append({"index": at, "function": {"arguments": piece.text}})
        return ({"content": text} if text else {}), rows

    def _finish(self, index: int, choice: Choice) -> str:
        """Why an answer ended; one that was cut within a call does not ask for calls to be made."""
        reader = self.readers.get(index)
        called = reader is not None and reader.calls and not reader.cut
        return "tool_calls" if called and choice.finish == "stop" else choice.finish

    def ending(self, choices: Sequence[Choice]) -> str:
        told = event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(choices)})
        return (told if self.ask.usage else "") + DONE

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "seed": self.ask.seed}
        return head | ({"notes": list(self.ask.notes)} if self.ask.notes else {})

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": None} | more
        return event(self._head("chat.completion.chunk") | {"choices": [choice]})

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        pictures = [picture_part(part) for part in choice.parts if isinstance(part, Image)]
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if reader := self.readers.get(index):
            reader.feed(choice.text)
            reader.close()
            message["content"] = reader.text or (None if reader.calls else "")
            message |= {"tool_calls": list(map(call_body, reader.calls))} if reader.calls else {}
        if pictures:
            message |= {"content": [_content(part) for part in choice.parts], "images": pictures}
        body: dict[str, Any] = {"index": index, "message": message}
        body |= {"finish_reason": self._finish(index, choice), "stop_reason": choice.matched}
        if choice.prompt:
            body["prompt_logprobs"] = prompt_rows(choice.prompt)
        body["logprobs"] = {"content": choice.logprobs} if self.ask.requests[0].params.logprobs else None
        return body | ({"token_ids": choice.tokens} if self.ask.token_ids else {})


def fresh(kind: str) -> str:
    """An id that no other response has."""
    return f"{kind}-{uuid.uuid4().hex}"


def call_body(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def drawings(answers: Sequence[Choice], ask: Ask) -> dict[str, Any]:
    """The body of an images response; the words that a picture was planned in are its `revised_prompt`."""
    data = []
    for answer in answers:
        picture = next(part for part in answer.parts if isinstance(part, Image))
        body = {"b64_json": base64.b64encode(encode_png(picture.pixels)).decode()}
        data.append(body | ({"revised_prompt": answer.text} if answer.text else {}))
    read, made = sum(a.prompt_tokens or 0 for a in answers), sum(len(a.tokens) for a in answers)
    counts = {"input_tokens": read, "output_tokens": made, "total_tokens": read + made}
    size = f"{ask.requests[0].width}x{ask.requests[0].height}"
    head = {"created": int(time.time()), "output_format": "png", "size": size, "seed": ask.seed}
    return head | {"data": data, "usage": counts}


def next_part(answer: Choice) -> dict[str, Any]:
    """The body of a /v1/next response: the frame or the action that comes next."""
    part = next(part for part in answer.parts if isinstance(part, Image | Action))
    counts = {"prompt_tokens": answer.prompt_tokens, "token_ids": list(answer.tokens)}
    return {"part": _content(part), "finish_reason": answer.finish} | counts


def error(message: str, code: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens read and made. The prompt of several choices is one prompt."""
    read, made = choices[0].prompt_tokens, sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": made + (read or 0)}


def logprobs_of(delta: Delta) -> list[dict[str, Any]]:
    """OpenAI's rows. A sampler that spells no tokens has the text of a delta said at its first one."""
    if delta.scored:
        return [row_of(scored) | {"top_logprobs": [row_of(each) for each in scored.top]} for scored in delta.scored]
    rows = []
    for i, (token, logprob) in enumerate(zip(delta.tokens, delta.logprobs, strict=False)):
        said = delta.text if i == 0 else ""
        raw = list(said.encode())
        rows.append({"token": said, "id": token, "logprob": logprob, "bytes": raw, "top_logprobs": []})
    return rows


def row_of(scored: Scored) -> dict[str, Any]:
    """One token in OpenAI's words."""
    head = {"token": shown(scored.spelling), "id": scored.token, "bytes": list(scored.spelling)}
    return head | {"logprob": scored.logprob}


def prompt_rows(scored: Sequence[Scored]) -> list[dict[str, Any] | None]:
    """What each token of a prompt was worth, in vLLM's words: by id, the token itself and the likeliest there."""
    rows: list[dict[str, Any] | None] = []
    for token in scored:
        said = {s.token: {"logprob": s.logprob, "rank": s.rank, "decoded_token": shown(s.spelling)}
                for s in (token, *token.top)}  # fmt: skip
        rows.append(None if token.logprob is None else {str(index): row for index, row in said.items()})
    return rows


def picture_part(image: Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image.pixels)}}


def _content(part: Part) -> dict[str, Any]:
    match part:
        case Text():
            return {"type": "text", "text": part.text}
        case Image():
            return picture_part(part)
        case Action():
            return {"type": "action", "values": part.values.tolist(), "space": part.space, "hz": part.hz}
        case _:
            raise TypeError(f"no body for {type(part).__name__}")
