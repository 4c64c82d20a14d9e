"""Request bodies in OpenAI's words to our `Request`s, with every value checked, and neither network nor model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from litchi.config import BadInput
from litchi.schema.request import DRAWING, Request
from litchi.schema.sample import Action, Image, Part, Role, Text
from litchi.serve.calls import Style, Toolbox, as_said, read_calls, read_tools
from litchi.serve.fields import Fields, show
from litchi.serve.films import film_parts, share_of
from litchi.serve.grammars import GUIDED, read_grammar
from litchi.serve.limits import Limits, decode_picture
from litchi.serve.models import Models
from litchi.serve.params import CHOOSING, MAX_N, MAX_SEED, MAX_TOP, SAMPLING, read_params

# Said by OpenAI clients, without any bearing on what a small model answers.
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Said by OpenAI clients, and would change the answer: accepted only at the value that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"], ["text", "image"], ["image", "text"]),
}
MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id")
# What a client may send back with an assistant's message that it received.
ECHOED = ("images", "refusal", "annotations", "audio", "function_call", "reasoning_content")
ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}


# The last chunk tells what all of them would: how long a prompt is, is known no earlier.
STREAM_OPTIONS = ("include_usage", "include_obfuscation", "continuous_usage_stats")
TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
NO_TOOLS = Toolbox("hermes")


class Missing(BadInput):
    """Bad input that names what is not here: HTTP 404."""


class UnknownModel(Missing):
    """A model that is not here."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a body asks for: `requests` one for each of `n` answers, their seeds counted up from `seed`."""

    requests: tuple[Request, ...]
    seed: int
    stream: bool = False
    usage: bool = False
    """Whether a stream ends with a chunk of usage."""
    token_ids: bool = False
    """Whether choices carry the sampled ids."""
    notes: tuple[str, ...] = ()
    """What was done to the input, in words."""
    tools: Toolbox = NO_TOOLS
    store: bool = True
    """Whether what was asked may be kept for a receipt."""


def read_chat(body: dict[str, Any], models: Models, limits: Limits, style: Style = "hermes") -> Ask:
    """A body of POST /v1/chat/completions to a model that writes calls in a style. Raises BadInput, UnknownModel."""
    fields = Fields(body)
    own = ("model", "messages", "n", "stream", "stream_options", "logprobs", "top_logprobs", "return_token_ids")
    fields.known((*own, *SAMPLING, *CHOOSING, *HARMLESS, *NEUTRAL, *GUIDED, *TOOLS))
    adapter = read_model(fields, models)
    fields.neutral(NEUTRAL)
    tools, grammar = read_tools(fields, style), read_grammar(fields)
    if tools.grammar is not None and grammar is not None:
        raise BadInput("tool_choice and response_format ask for two answers at once; leave one out")
    parts, notes = read_messages(fields.objects("messages"), limits, style)
    check_text([*tools.told, *(part.text for part in parts if isinstance(part, Text))], limits)
    params = replace(read_params(fields, limits), logprobs=fields.flag("logprobs"))
    params = replace(params, top_logprobs=fields.integer("top_logprobs", 0, 0, MAX_TOP))
    params = replace(params, grammar=tools.grammar or grammar)
    if params.top_logprobs and not params.logprobs:
        raise BadInput("top_logprobs needs logprobs: send true for that as well")
    options = fields.inner("stream_options")
    options.known(STREAM_OPTIONS)
    size = {"height": limits.side, "width": limits.side}
    request = Request(parts=parts, want="chat", params=params, tools=tools.told, adapter=adapter, **size)
    return Ask(
        requests=repeated(request, fields.integer("n", 1, 1, MAX_N)),
        seed=params.seed,
        stream=fields.flag("stream"),
        usage=options.flag("include_usage"),
        token_ids=fields.flag("return_token_ids"),
        notes=notes,
        tools=tools,
        store=fields.flag("store", True),
    )


def read_drawing(body: dict[str, Any], models: Models, limits: Limits) -> Ask:
    """A body of POST /v1/images/generations. Raises BadInput, UnknownModel."""
    fields = Fields(body)
    looks = ("quality", "style", "background", "output_format", "moderation")
    fields.known(("model", "prompt", "n", "size", "response_format", *SAMPLING, *HARMLESS, *looks))
    adapter = read_model(fields, models)
    prompt = fields.text("prompt")
    check_text([prompt], limits)
    fields.choice("size", "auto", (f"{limits.side}x{limits.side}", "auto"))
    fields.choice("response_format", "b64_json", ("b64_json",))
    fields.choice("output_format", "png", ("png",))
    params = read_params(fields, limits, DRAWING)
    text = Text(text=prompt, role=Role.USER)
    size = {"height": limits.side, "width": limits.side}
    request = Request(parts=(text,), want="image", params=params, adapter=adapter, **size)
    requests = repeated(request, fields.integer("n", 1, 1, MAX_N))
    return Ask(requests=requests, seed=params.seed, store=fields.flag("store", True))


def read_next(body: dict[str, Any], models: Models, limits: Limits) -> Ask:
    """A body of POST /v1/next, this project's own: the next frame or action after `parts`, which are our `Part`s."""
    fields = Fields(body)
    fields.known(("model", "want", "parts", "space", "store", *SAMPLING))
    adapter = read_model(fields, models)
    want = "frame" if fields.choice("want", None, ("frame", "action")) == "frame" else "action"
    pieces = fields.objects("parts")
    if num_pictures(piece.value for piece in pieces) > limits.max_images:
        raise BadInput(f"at most {limits.max_images} frames are read; send the last ones")
    parts = [_read_part(each, limits) for each in pieces]
    check_text([p.text for p in parts if isinstance(p, Text)], limits)
    params = replace(read_params(fields, limits), seed=fields.integer("seed", 0, 0, MAX_SEED))
    size = {"height": limits.side, "width": limits.side}
    space = fields.text("space", "")
    request = Request(parts=tuple(parts), want=want, params=params, space=space, adapter=adapter, **size)
    return Ask(requests=(request,), seed=params.seed, store=fields.flag("store", True))


def read_messages(
    messages: list[Fields], limits: Limits, style: Style = "hermes"
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The parts of a conversation, and what was done to them in words."""
    parts: list[Part] = []
    notes: list[str] = []
    # Counted before any is decoded: thousands of small files fit into one body, each of millions of pixels.
    shown = [each.get("content") for each in messages if isinstance(each.get("content"), list)]
    if num_pictures(piece for content in shown for piece in content) > limits.max_images:
        raise BadInput(f"at most {limits.max_images} pictures fit into one conversation; drop the oldest messages")
    most = share_of((piece for content in shown for piece in content), limits)
    for message in messages:
        message.known((*MESSAGE, *ECHOED))
        role = ROLES[message.choice("role", None, tuple(ROLES))]
        content = message.get("content")
        calls = read_calls(message) if role is Role.ASSISTANT else []
        if not isinstance(content, str | list | None):
            raise BadInput(f"{message.where}content must be a text or a list of parts, got {show(content)}")
        if calls and not isinstance(content, list):
            parts.append(Text(text=as_said(content if isinstance(content, str) else "", calls, style), role=role))
        elif role is Role.TOOL:
            parts.append(Text(text=_result(message), role=role))
        elif isinstance(content, str):
            parts.append(Text(text=content, role=role))
        else:
            for each in message.objects("content"):
                found, note = _read_content(each, role, limits, most)
                parts += found
                notes += [note] if note else []
            if calls:
                parts.append(Text(text=as_said("", calls, style), role=role))
    check_text([p.text for p in parts if isinstance(p, Text)], limits)
    if parts[-1].role not in (Role.USER, Role.TOOL):
        raise BadInput("the last message must be the user's or a tool's: there is nothing to answer")
    return tuple(parts), tuple(notes)


def num_pictures(pieces: Iterable[Any]) -> int:
    return sum(isinstance(piece, dict) and piece.get("type") == "image_url" for piece in pieces)


def _result(message: Fields) -> str:
    """What a tool answered: one text, whatever pieces it came in."""
    if isinstance(message.get("content"), str):
        return message.text("content")
    pieces = message.objects("content")
    for piece in pieces:
        piece.choice("type", None, ("text",))
    return "".join(piece.text("text") for piece in pieces)


def _read_content(fields: Fields, role: Role, limits: Limits, most: int = 0) -> tuple[list[Part], str]:
    """What a piece shows, a film in at most `most` frames, and what was done to it."""
    kind = fields.choice("type", None, ("text", "image_url", "video_url"))
    if kind == "text":
        return [Text(text=fields.text("text"), role=role)], ""
    fields.known(("type", kind))
    link = fields.get(kind)
    inner = Fields({"url": link} if isinstance(link, str) else link, f"{fields.where}{kind}.")
    inner.known(("url", "detail"))
    if kind == "video_url":
        return film_parts(inner.text("url"), role, limits, most, f"{inner.where}url")
    picture = decode_picture(inner.text("url"), limits, f"{inner.where}url")
    return [Image(pixels=picture.pixels, role=role)], picture.note


def _read_part(fields: Fields, limits: Limits) -> Part:
    match fields.choice("type", None, ("text", "image_url", "action")):
        case "action":
            fields.known(("type", "values", "space", "hz"))
            hz = fields.number("hz", 1.0, 1e-3, 1e6)
            return Action(values=_read_values(fields), space=fields.text("space"), hz=hz)
        case "text":
            role = fields.choice("role", "user", tuple(r.value for r in Role))
            return Text(text=fields.text("text"), role=Role(role))
        case _:
            [part], _ = _read_content(fields, Role.NONE, limits)
            return part


def _read_values(fields: Fields) -> np.ndarray:
    """Rows of numbers, (k, A)."""
    rows = fields.get("values")
    fault = BadInput(f"{fields.where}values must be a list of rows of numbers, all of one length, at most 256 by 256")
    if not isinstance(rows, list) or not 0 < len(rows) <= 256 or not all(isinstance(row, list) for row in rows):
        raise fault
    if len({len(row) for row in rows}) != 1 or not 0 < len(rows[0]) <= 256:
        raise fault
    if not all(type(x) in (int, float) and abs(x) < 1e30 for row in rows for x in row):
        raise fault
    return np.array(rows, np.float32)


def read_model(fields: Fields, models: Models) -> str:
    """The adapter that a body names as its model; empty for the base."""
    asked = fields.text("model", models.base)
    if asked not in models.names:
        raise UnknownModel(f"no model {show(asked)} here; this server has {models} (GET /v1/models)")
    return models.adapter(asked)


def check_text(texts: Sequence[str], limits: Limits) -> None:
    if (length := sum(map(len, texts))) > limits.max_text:
        raise BadInput(f"the texts have {length} characters, more than {limits.max_text}; shorten the conversation")
    for text in texts:
        # JSON may spell half a surrogate pair, which no UTF-8 tokenizer can take.
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadInput("a text holds half of a surrogate pair, which is not Unicode; send whole characters")


def repeated(request: Request, n: int) -> tuple[Request, ...]:
    first = request.params
    return tuple(replace(request, params=replace(first, seed=(first.seed + i) % (MAX_SEED + 1))) for i in range(n))
