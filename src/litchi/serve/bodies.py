"""The bodies that the door takes, as JSON Schema: the same names and bounds that our own code reads them by.

Nothing is parsed through these. They are told at /openapi.json, and held to what is read by tests: the names are the
same (`tests/serve/test_openapi.py`), and what is outside of a schema is refused (`tests/serve/test_schemathesis.py`).
What only the model can say, such as whether a regular expression is one, is not in them: that is a 400 as well.
"""

from __future__ import annotations

from typing import Any

from litchi.schema.sample import Role
from litchi.serve.calls import MAX_CALLS, MAX_TOOLS, NAME
from litchi.serve.fields import MAX_OBJECTS
from litchi.serve.grammars import GUIDED, KINDS, MAX_CHARACTERS, MAX_CHOICES
from litchi.serve.limits import Limits
from litchi.serve.models import Models
from litchi.serve.params import MAX_BIAS, MAX_ID, MAX_N, MAX_SEED, MAX_STOP_IDS, MAX_STOP_LENGTH, MAX_STOPS, MAX_TOP
from litchi.serve.prompts import MAX_PROMPTS
from litchi.serve.replies import INCLUDED, MAX_INCLUDED
from litchi.serve.wire import ECHOED, HARMLESS, STREAM_OPTIONS

Schema = dict[str, Any]
ANY: Schema = {"description": "Taken and not read."}
FLAG: Schema = {"type": ["boolean", "null"]}
TEXT: Schema = {"type": "string"}
NULL: Schema = {"type": "null"}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


def number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def integer(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def choice(*values: Any) -> Schema:
    """One of these, or nothing."""
    return {"enum": [*values, None]}


def listed(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def record(properties: dict[str, Schema], *required: str, more: bool = False) -> Schema:
    """An object; without `more`, of these names only."""
    body: Schema = {"type": "object", "properties": properties, "required": list(required)}
    return body if more else body | {"additionalProperties": False}


IDS = listed({"type": "integer", "minimum": 0, "maximum": MAX_ID}, 1, 1 << 20)
UNREAD = {name: ANY for name in HARMLESS} | {"store": FLAG}
PICTURE_URL = {
    "type": "string",
    "description": "A data URL of a PNG, JPEG, GIF or WebP, or the address of one at a host that is listed here.",
    "examples": [PIXEL],
}
PICTURE = record(
    {
        "type": {"const": "image_url"},
        "image_url": {"anyOf": [PICTURE_URL, record({"url": PICTURE_URL, "detail": ANY}, "url")]},
    },
    "type",
    "image_url",
)
FILM_URL = {"type": "string", "description": "A data URL of a GIF, WebP, APNG, MP4 or WebM.", "examples": [PIXEL]}
FILM = record(
    {
        "type": {"const": "video_url"},
        "video_url": {"anyOf": [FILM_URL, record({"url": FILM_URL, "detail": ANY}, "url")]},
    },
    "type",
    "video_url",
)
PIECE = {"anyOf": [record({"type": {"const": "text"}, "text": TEXT}, "type", "text", more=True), PICTURE, FILM]}


def sampling(limits: Limits, least: int = 1) -> dict[str, Schema]:
    """`params.SAMPLING`, of whatever is sampled."""
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
    return {
        "max_tokens": integer(least, limits.max_tokens),
        "max_completion_tokens": integer(least, limits.max_tokens),
        "temperature": number(0, 2),
        "top_p": number(1e-6, 1),
        "top_k": integer(-1, 1 << 20),
        "seed": integer(0, MAX_SEED),
        "steps": integer(0, 256),
        "stop": maybe({"anyOf": [stop, listed(stop, 0, MAX_STOPS)]}),
    }


def choosing(limits: Limits) -> dict[str, Schema]:
    """`params.CHOOSING`, of words."""
    bias = {"type": "number", "minimum": -100, "maximum": 100}
    names = {"pattern": "^[0-9]{1,10}$"}
    return {
        "min_p": number(0, 1),
        "presence_penalty": number(-2, 2),
        "frequency_penalty": number(-2, 2),
        "repetition_penalty": number(0.01, 10),
        "logit_bias": {
            "type": ["object", "null"], "propertyNames": names, "additionalProperties": bias, "maxProperties": MAX_BIAS,
        },
        "stop_token_ids": maybe(IDS | {"minItems": 0, "maxItems": MAX_STOP_IDS}),
        "min_tokens": integer(0, limits.max_tokens),
        "ignore_eos": FLAG,
        "prompt_logprobs": integer(0, MAX_TOP),
    }  # fmt: skip


def guided() -> dict[str, Schema]:
    """`grammars.GUIDED`: an answer has one grammar."""
    text = {"type": ["string", "null"], "maxLength": MAX_CHARACTERS}
    kinds = {
        "guided_json": {"type": ["object", "string", "null"]},
        "guided_regex": text,
        "guided_choice": maybe(listed(TEXT, 1, MAX_CHOICES)),
        "guided_grammar": text,
    }
    types = {"enum": ["text", "json_object", "json_schema", "regex"]}
    one = record({kind: kinds[name] for kind, name in KINDS.items()}) | {"minProperties": 1}
    found = kinds | {
        "response_format": maybe(record({"type": types}, "type", more=True)),
        "structured_outputs": maybe(one),
    }
    return {name: found[name] for name in GUIDED}


def tools() -> dict[str, Schema]:
    """`wire.TOOLS`, in the words of either API."""
    function = {
        "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "string", "null"]},
        "strict": ANY,
    }
    kind = choice("function")
    nested = record({"type": kind, "function": record(function, "name")}, "function", more=True)
    either = {"anyOf": [nested, record({"type": kind, "function": NULL} | function, "name")]}
    wanted = {"anyOf": [choice("none", "auto", "required"), {"type": "object"}]}
    return {"tools": maybe(listed(either, 0, MAX_TOOLS)), "tool_choice": wanted, "parallel_tool_calls": FLAG}


def messages() -> Schema:
    more = {name: ANY for name in ("name", *ECHOED)}
    pieces = listed(PIECE, 1, MAX_OBJECTS)
    text = record({"type": {"const": "text"}, "text": TEXT}, "type", "text", more=True)
    arguments = {"type": ["string", "null"], "description": "A JSON object in a text."}
    called = record({"name": TEXT, "arguments": arguments}, "name", more=True)
    call = record({"id": {"type": ["string", "null"]}, "function": called}, "function", more=True)
    calls = {"tool_calls": maybe(listed(call, 0, MAX_CALLS))}
    spoken = {"role": {"enum": ["system", "developer", "user"]}, "content": {"anyOf": [TEXT, pieces]}}
    result = {"role": {"const": "tool"}, "content": {"anyOf": [TEXT, listed(text, 1, MAX_OBJECTS)]}}
    said = {"role": {"const": "assistant"}, "content": {"anyOf": [TEXT, pieces, NULL]}}
    unread = {"tool_calls": ANY, "tool_call_id": ANY}
    each = [
        record(spoken | unread | more, "role", "content"),
        record(result | unread | more, "role", "content"),
        record(said | unread | more | calls, "role"),
    ]
    examples = [[{"role": "user", "content": [{"type": "image_url", "image_url": PIXEL}]}]]
    return listed({"anyOf": each}, 1, MAX_OBJECTS) | {"examples": examples}


def prompts(limits: Limits) -> Schema:
    """A text, token ids, or a list of either."""
    text, ids = TEXT | {"maxLength": limits.max_text}, IDS | {"maxItems": limits.max_text}
    return {"anyOf": [text, ids, listed(text, 1, MAX_PROMPTS), listed(ids, 1, MAX_PROMPTS)]}


def streaming() -> Schema:
    return maybe(record({name: ANY for name in STREAM_OPTIONS} | {"include_usage": FLAG}))


def chat(models: Models, limits: Limits) -> Schema:
    own = {
        "model": choice(*models.names),
        "messages": messages(),
        "n": integer(1, MAX_N),
        "stream": FLAG,
        "stream_options": streaming(),
        "logprobs": FLAG,
        "top_logprobs": integer(0, MAX_TOP),
        "return_token_ids": FLAG,
        "modalities": choice(["text"], ["text", "image"], ["image", "text"]),
    }
    return record(own | sampling(limits) | choosing(limits) | UNREAD | guided() | tools(), "messages")


def completion(models: Models, limits: Limits) -> Schema:
    own = {
        "model": choice(*models.names),
        "prompt": prompts(limits),
        "n": integer(1, MAX_N),
        "stream": FLAG,
        "stream_options": streaming(),
        "logprobs": integer(0, MAX_TOP),
        "echo": FLAG,
        "suffix": choice(""),
        "best_of": integer(1, MAX_N),
        "use_beam_search": choice(False),
        "skip_special_tokens": choice(True),
        "spaces_between_special_tokens": choice(True),
        "include_stop_str_in_output": choice(False),
    }
    return record(own | sampling(limits, least=0) | choosing(limits) | UNREAD | guided(), "prompt")


def embedding(models: Models, limits: Limits) -> Schema:
    own = {"model": choice(*models.names), "input": prompts(limits), "encoding_format": choice("float", "base64")}
    own |= {"dimensions": NULL, "user": ANY, "pooling": choice("mean", "last"), "store": FLAG}
    return record(own, "input")


def drawing(models: Models, limits: Limits) -> Schema:
    own = {
        "model": choice(*models.names),
        "prompt": TEXT | {"maxLength": limits.max_text},
        "n": integer(1, MAX_N),
        "size": choice(f"{limits.side}x{limits.side}", "auto"),
        "response_format": choice("b64_json"),
        "output_format": choice("png"),
    }
    looks = {name: ANY for name in ("quality", "style", "background", "moderation")}
    return record(own | looks | sampling(limits) | UNREAD, "prompt")


def following(models: Models, limits: Limits) -> Schema:
    row = listed({"type": "number"}, 1, 256)
    action = {"type": {"const": "action"}, "values": listed(row, 1, 256), "space": TEXT, "hz": number(1e-3, 1e6)}
    role = choice(*(role.value for role in Role))
    text = record({"type": {"const": "text"}, "text": TEXT, "role": role}, "type", "text", more=True)
    parts = {"anyOf": [text, PICTURE, record(action, "type", "values", "space")]}
    own = {
        "model": choice(*models.names),
        "want": {"enum": ["frame", "action"]},
        "parts": listed(parts, 1, MAX_OBJECTS),
    }
    return record(own | {"space": {"type": ["string", "null"]}, "store": FLAG} | sampling(limits), "want", "parts")


def response(models: Models, limits: Limits) -> Schema:
    text = {"type": ["string", "null"]}
    said = record({"type": {"enum": ["input_text", "output_text"]}, "text": TEXT}, "type", "text", more=True)
    seen = record({"type": {"const": "input_image"}, "image_url": PICTURE_URL, "file_id": NULL}, "type", "image_url",
                  more=True)  # fmt: skip
    content = {"anyOf": [TEXT, listed({"anyOf": [said, seen]}, 1, MAX_OBJECTS)]}
    roles = {"enum": ["system", "developer", "user", "assistant", "tool"]}
    items = [
        record({"type": choice("message"), "role": roles, "content": content}, "role", "content", more=True),
        record({"type": {"const": "function_call"}, "name": TEXT, "arguments": text, "call_id": text}, "type", "name",
               more=True),
        record({"type": {"const": "function_call_output"}, "output": TEXT, "call_id": text}, "type", "output",
               more=True),
        record({"type": {"const": "reasoning"}}, "type", more=True),
    ]  # fmt: skip
    own = {
        "model": choice(*models.names),
        "input": {"anyOf": [TEXT, listed({"anyOf": items}, 1, MAX_OBJECTS)]},
        "instructions": text,
        "previous_response_id": text,
        "max_output_tokens": integer(1, limits.max_tokens),
        "stream": FLAG,
        "text": maybe(record({"format": guided()["response_format"], "verbosity": ANY})),
        "truncation": choice("disabled"),
        "include": maybe(listed({"enum": list(INCLUDED)}, 0, MAX_INCLUDED)),
        "background": choice(False),
        "top_logprobs": integer(0, MAX_TOP),
    }
    unread = {name: ANY for name in ("stream_options", "reasoning", "max_tool_calls", "prompt_cache_retention")}
    return record(own | unread | sampling(limits) | choosing(limits) | UNREAD | tools(), "input")


def tokenizing(models: Models, limits: Limits) -> Schema:
    own = {"model": choice(*models.names), "prompt": {"type": ["string", "null"], "maxLength": limits.max_text}}
    own |= {"messages": maybe(messages()), "add_generation_prompt": choice(True)}
    return record(own | {"add_special_tokens": FLAG, "return_token_strs": FLAG})


def detokenizing(models: Models, limits: Limits) -> Schema:
    return record(
        {"model": choice(*models.names), "tokens": IDS | {"minItems": 0, "maxItems": limits.max_text}}, "tokens"
    )


def swap(checkpoints: tuple[str, ...], models: Models, limits: Limits) -> Schema:
    """Only folders that the server was started with."""
    return record({"checkpoint": {"enum": list(checkpoints)} if checkpoints else TEXT}, "checkpoint")
