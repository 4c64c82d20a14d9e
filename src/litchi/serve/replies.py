"""/v1/responses: a conversation that the server remembers, as OpenAI's newer clients hold it.

A response is the conversation so far and what was said last. `previous_response_id` goes on from one that was stored;
the store is bounded, and the oldest that nobody went on from is forgotten first.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from litchi.config import BadInput
from litchi.schema.request import Delta
from litchi.serve.answers import Choice, logprobs_of
from litchi.serve.callreader import Argued, Begun, CallReader, Ended, Piece
from litchi.serve.calls import Call, Style
from litchi.serve.exchange import Desk, Stopped
from litchi.serve.fields import Fields, show
from litchi.serve.limits import Limits
from litchi.serve.models import Models
from litchi.serve.params import CHOOSING, MAX_TOP, SAMPLING
from litchi.serve.tokens import Words
from litchi.serve.wire import HARMLESS, TOOLS, Ask, Missing, read_chat

MAX_STORED, MAX_STORED_CHARACTERS = 256, 32 << 20
"""Conversations kept, and what they hold together as JSON: pictures are the most of it."""

OWN = (
    "model", "input", "instructions", "previous_response_id", "max_output_tokens", "stream", "stream_options", "text",
    "truncation", "include", "background", "reasoning", "max_tool_calls", "top_logprobs", "prompt_cache_retention",
)  # fmt: skip
NEUTRAL = {"background": (False,), "truncation": ("disabled",)}
LOGPROBS = "message.output_text.logprobs"
INCLUDED, MAX_INCLUDED = (LOGPROBS, "reasoning.encrypted_content"), 8
"""What a response may be asked to hold besides; the last is empty, since nothing is thought apart from what is said."""


class UnknownResponse(Missing):
    """Bad input that goes on from a response which is not here."""


@dataclass
class Store:
    """Conversations by the id of their last response, as messages of the Chat API."""

    kept: OrderedDict[str, tuple[dict[str, Any], str]] = field(default_factory=OrderedDict)
    characters: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Bodies are read in other threads than those in which answers are kept."""

    def put(self, body: dict[str, Any], messages: Sequence[dict[str, Any]]) -> None:
        told = json.dumps(messages)
        if len(told) > MAX_STORED_CHARACTERS // 4:
            return  # one conversation does not push out all others
        with self.lock:
            self.kept[body["id"]] = (body, told)
            self.characters += len(told)
            while len(self.kept) > MAX_STORED or self.characters > MAX_STORED_CHARACTERS:
                self.drop(next(iter(self.kept)))

    def drop(self, name: str) -> None:
        with self.lock:
            self.get(name)
            self.characters -= len(self.kept.pop(name)[1])

    def get(self, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The response and its whole conversation. Raises UnknownResponse."""
        with self.lock:
            if name not in self.kept:
                mend = "send the whole conversation as input"
                raise UnknownResponse(f"no response {name[:80]!r} here, or no longer; {mend}")
            self.kept.move_to_end(name)
            body, told = self.kept[name]
        return body, json.loads(told)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a body of POST /v1/responses asks for."""

    ask: Ask
    messages: list[dict[str, Any]]
    """The conversation without the instructions, which belong to one response only."""
    told: dict[str, Any]
    """What a response repeats of its request."""
    stored: bool


class Replies:
    """The endpoints."""

    def __init__(self, desk: Desk, words: Words):
        self.desk, self.words, self.store = desk, words, Store()

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/responses", self.create, methods=["POST"])
        # One route, so that whoever uses another method is told of both.
        router.add_api_route("/v1/responses/{name}", self.kept, methods=["GET", "DELETE"])
        return router

    async def create(self, request: Request) -> Response:
        turn = await self.desk.read(request, self.read)
        writer = Writer(turn, self.desk.models.told(turn.ask.requests), self.store)
        if turn.ask.stream:
            return await self.desk.stream(request, turn.ask.requests, writer)
        spelled = turn.ask.requests[0].params.logprobs
        choices = await self.desk.collect(request, turn.ask.requests, writer.receipt, spelled=spelled)
        return Stopped() if choices is None else JSONResponse(writer.whole(choices[0]))

    async def kept(self, request: Request, name: str) -> Response:
        if request.method == "GET":
            return JSONResponse(self.store.get(name)[0])
        await to_thread.run_sync(self.desk.receipts.drop, name)  # it may be remembered for longer
        self.store.drop(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    def read(self, body: dict[str, Any], models: Models, limits: Limits) -> Turn:
        return read_turn(body, models, limits, self.words.style, self.store)


def read_turn(body: dict[str, Any], models: Models, limits: Limits, style: Style, store: Store) -> Turn:
    """A body as a chat of the same meaning. Raises BadInput, UnknownModel, UnknownResponse."""
    fields = Fields(body)
    fields.known((*OWN, *SAMPLING, *CHOOSING, *HARMLESS, *TOOLS))
    fields.neutral(NEUTRAL)
    before: list[dict[str, Any]] = []
    if previous := fields.text("previous_response_id", ""):
        before = store.get(previous)[1]
    messages = before + read_input(fields)
    instructions = fields.text("instructions", "")
    system = [{"role": "system", "content": instructions}] if instructions else []
    chat = {name: body[name] for name in (*SAMPLING, *CHOOSING, *HARMLESS, *TOOLS, "model", "stream") if name in body}
    chat |= {"messages": [*system, *messages]}
    if fields.get("max_output_tokens") is not None:
        fields.integer("max_completion_tokens", 1, 1, limits.max_tokens)  # not used, but not nonsense either
        chat["max_completion_tokens"] = fields.integer("max_output_tokens", None, 1, limits.max_tokens)
    top = fields.integer("top_logprobs", 0, 0, MAX_TOP)
    if top or LOGPROBS in read_included(fields):
        chat |= {"logprobs": True, "top_logprobs": top}
    text = fields.inner("text")
    text.known(("format", "verbosity"))
    if text.get("format") is not None:
        chat["response_format"] = text.get("format")
    ask = replace(read_chat(chat, models, limits, style), usage=False)
    params = ask.requests[0].params
    told = {
        "instructions": instructions or None,
        "previous_response_id": previous or None,
        "max_output_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "tools": body.get("tools") or [],
        "tool_choice": body.get("tool_choice") or "auto",
        "parallel_tool_calls": fields.flag("parallel_tool_calls", True),
        "text": {"format": text.get("format") or {"type": "text"}},
        "metadata": body.get("metadata") or {},
        "truncation": "disabled",
        "top_logprobs": top,
    }
    return Turn(ask, messages, told, fields.flag("store", True))


def read_included(fields: Fields) -> list[str]:
    found = [] if fields.get("include") is None else fields.get("include")
    if not isinstance(found, list) or len(found) > MAX_INCLUDED or not all(each in INCLUDED for each in found):
        raise BadInput(f"include must be a list of at most {MAX_INCLUDED}, of {', '.join(INCLUDED)}, got {show(found)}")
    return found


def read_input(fields: Fields) -> list[dict[str, Any]]:
    """`input`, a text or a list of items, as messages of the Chat API."""
    if isinstance(fields.get("input"), str):
        return [{"role": "user", "content": fields.text("input")}]
    messages: list[dict[str, Any]] = []
    for item in fields.objects("input"):
        match item.choice("type", "message", ("message", "function_call", "function_call_output", "reasoning")):
            case "message":
                messages.append({"role": item.text("role"), "content": read_content(item)})
            case "function_call":
                function = {"name": item.text("name"), "arguments": item.text("arguments", "{}")}
                call = {"id": item.text("call_id", ""), "type": "function", "function": function}
                if messages and messages[-1]["role"] == "assistant":
                    messages[-1].setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            case "function_call_output":
                output = item.text("output")
                messages.append({"role": "tool", "content": output, "tool_call_id": item.text("call_id", "")})
            case _:
                pass  # what a model thought is not read again
    return messages


def read_content(item: Fields) -> str | list[dict[str, Any]]:
    """What a message holds: its texts and pictures under the names of the Chat API."""
    if isinstance(item.get("content"), str):
        return item.text("content")
    parts: list[dict[str, Any]] = []
    for part in item.objects("content"):
        if part.choice("type", None, ("input_text", "output_text", "input_image")) == "input_image":
            if part.get("file_id") is not None:
                raise BadInput(f"{part.where}file_id: files are not kept here; send image_url with a data URL")
            parts.append({"type": "image_url", "image_url": {"url": part.text("image_url")}})
        else:
            parts.append({"type": "text", "text": part.text("text")})
    if item.get("role") == "assistant":
        return "".join(part.get("text", "") for part in parts)
    return parts


class Writer:
    """Writes one response, whole or as its events."""

    def __init__(self, turn: Turn, model: str, store: Store):
        self.turn, self.model, self.store = turn, model, store
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.receipt = self.id if turn.stored else ""
        self.message = f"msg_{uuid.uuid4().hex}"
        self.reader = CallReader(turn.ask.tools) if turn.ask.tools.names else None
        self.said, self.count = "", 0
        self.calls: list[Call] = []
        self.places: list[str] = []
        """The items of the output by their ids, in the order in which they began."""
        self.rows: list[dict[str, Any]] = []
        """What tokens were worth, if that is asked: those of calls as well."""
        self.shown = 0
        """How many of them an event has told."""

    def whole(self, choice: Choice) -> dict[str, Any]:
        self.rows = choice.logprobs if self.turn.ask.requests[0].params.logprobs else []
        self.piece(0, Delta(text=choice.text, finish="stop"))
        return self.end(choice)

    def opening(self, index: int) -> str:
        begun = self.body("in_progress", [], None)
        return self.event("response.created", response=begun) + self.event("response.in_progress", response=begun)

    def piece(self, index: int, delta: Delta) -> str:
        if self.turn.ask.requests[0].params.logprobs:
            self.rows += logprobs_of(delta)
        return "".join(map(self.told, self.hear(delta)))

    def closing(self, index: int, choice: Choice) -> str:
        told = self.call_done(self.calls[-1], "incomplete") if self.cut else ""
        if self.said:
            told += self.event("response.output_text.done", **self.at(), text=self.said, logprobs=self.rows)
            told += self.event("response.content_part.done", **self.at(), part=content(self.said, self.rows))
            item = self.item("completed", self.said)
            told += self.event("response.output_item.done", output_index=self.place(self.message), item=item)
        body = self.end(choice)
        kind = "response.completed" if body["status"] == "completed" else "response.incomplete"
        return told + self.event(kind, response=body)

    def ending(self, choices: Sequence[Choice]) -> str:
        return ""

    def hear(self, delta: Delta) -> list[Piece]:
        """What a piece makes certain."""
        if self.reader is None:
            return [delta.text] if delta.text else []
        return [*self.reader.feed(delta.text), *(self.reader.close() if delta.finish else [])]

    def told(self, piece: Piece) -> str:
        match piece:
            case str():
                told = "" if self.said else self.begin(self.message, self.item("in_progress", ""))
                told += (
                    "" if self.said else self.event("response.content_part.added", **self.at(), part=content("", []))
                )
                self.said += piece
                rows, self.shown = self.rows[self.shown :], len(self.rows)
                return told + self.event("response.output_text.delta", **self.at(), delta=piece, logprobs=rows)
            case Begun(call):
                self.calls.append(call)
                return self.begin(f"fc_{call.id}", call_item(call, "in_progress"))
            case Argued(text):
                call = self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + text)
                return self.event("response.function_call_arguments.delta", **self.at_call(call), delta=text)
            case Ended():
                return self.call_done(self.calls[-1], "completed")

    def begin(self, name: str, item: dict[str, Any]) -> str:
        self.places.append(name)
        return self.event("response.output_item.added", output_index=self.place(name), item=item)

    def place(self, name: str) -> int:
        return self.places.index(name)

    @property
    def cut(self) -> bool:
        """Whether the answer ended within its last call."""
        return self.reader is not None and self.reader.cut

    def call_done(self, call: Call, status: str) -> str:
        done = {"name": call.name, "arguments": call.arguments}
        told = self.event("response.function_call_arguments.done", **self.at_call(call), **done)
        place = self.place(f"fc_{call.id}")
        return told + self.event("response.output_item.done", output_index=place, item=call_item(call, status))

    def end(self, choice: Choice) -> dict[str, Any]:
        """The finished response, which is kept."""
        items = {f"fc_{call.id}": call_item(call, "completed") for call in self.calls}
        if self.cut:
            items[self.places[-1]]["status"] = "incomplete"
        items[self.message] = self.item("completed", self.said)
        output = [items[name] for name in self.places or [self.message]]
        read, made = choice.prompt_tokens or 0, len(choice.tokens)
        usage = {"input_tokens": read, "output_tokens": made, "total_tokens": read + made}
        usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        status = "incomplete" if choice.finish == "length" else "completed"
        body = self.body(status, output, usage)
        if self.turn.stored:
            calls = [{"id": c.id, "function": {"name": c.name, "arguments": c.arguments}} for c in self.calls]
            said = {"role": "assistant", "content": self.said} | ({"tool_calls": calls} if calls else {})
            self.store.put(body, [*self.turn.messages, said])
        return body

    def body(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        head = {"id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None}
        head |= {"incomplete_details": reason, "model": self.model, "output": output, "usage": usage}
        return head | self.turn.told | {"store": self.turn.stored, "seed": self.turn.ask.seed}

    def item(self, status: str, text: str) -> dict[str, Any]:
        parts = [content(text, self.rows)] if status == "completed" else []
        return {"id": self.message, "type": "message", "role": "assistant", "status": status, "content": parts}

    def at(self) -> dict[str, Any]:
        return {"item_id": self.message, "output_index": self.place(self.message), "content_index": 0}

    def at_call(self, call: Call) -> dict[str, Any]:
        return {"item_id": f"fc_{call.id}", "output_index": self.place(f"fc_{call.id}")}

    def event(self, kind: str, **more: Any) -> str:
        body = {"type": kind, "sequence_number": self.count} | more
        self.count += 1
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


def content(text: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": rows}


def call_item(call: Call, status: str) -> dict[str, Any]:
    head = {"id": f"fc_{call.id}", "type": "function_call", "status": status, "call_id": call.id}
    return head | {"name": call.name, "arguments": call.arguments}
