"""What an answer must look like, as strangers say it: response_format, guided_* and structured_outputs, all bounded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from litchi.config import BadInput
from litchi.schema.request import Grammar
from litchi.serve.fields import Fields, show
from litchi.serve.trial import check

MAX_CHARACTERS, MAX_DEPTH, MAX_NODES, MAX_CHOICES = 32_768, 32, 4_096, 256

GUIDED = ("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
ANY_OBJECT = Grammar("schema", '{"type": "object"}')
KINDS = {"json": "guided_json", "regex": "guided_regex", "choice": "guided_choice", "grammar": "guided_grammar"}
"""What vLLM calls them within structured_outputs, and what it called them before."""


def read_grammar(fields: Fields) -> Grammar | None:
    """The one grammar that the fields ask for, compiled once. Raises BadInput, which names the field and its limit."""
    found = [grammar for name in GUIDED if (grammar := _read(fields, name)) is not None]
    if len(found) > 1:
        raise BadInput(f"an answer has one grammar; send one of {', '.join(GUIDED)}")
    for grammar in found:
        if grammar is not ANY_OBJECT:
            check(grammar)
    return found[0] if found else None


def read_schema(value: Any, where: str) -> Mapping[str, Any]:
    """A JSON schema within the limits, as an object or as JSON in a text."""
    if isinstance(value, str):
        _bounded(value, where)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadInput(f"{where} is not JSON; send the schema as an object") from None
    if not isinstance(value, dict):
        raise BadInput(f"{where} must be a JSON schema, an object, got {show(value)}")
    nodes, layer, depth = 0, [value], 0
    while layer:
        depth += 1
        nodes += len(layer)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise BadInput(f"{where} has more than {MAX_DEPTH} levels or {MAX_NODES} values; send a simpler schema")
        layer = [inner for outer in layer for inner in _within(outer)]
    _bounded(json.dumps(value), where)
    return value


def schema_grammar(schema: Mapping[str, Any]) -> Grammar:
    return Grammar("schema", json.dumps(schema, ensure_ascii=False))


def _within(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _bounded(text: str, where: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise BadInput(f"{where} has {len(text)} characters, at most {MAX_CHARACTERS} are read; send a shorter one")
    return text


def _read(fields: Fields, name: str) -> Grammar | None:
    value = fields.get(name)
    if value is None:
        return None
    match name:
        case "response_format":
            return _read_format(Fields(value, f"{fields.where}response_format."))
        case "structured_outputs":
            inner = Fields(value, f"{fields.where}structured_outputs.")
            inner.known(KINDS)
            given = {KINDS[kind]: inner.get(kind) for kind in KINDS if inner.get(kind) is not None}
            if len(given) != 1:
                raise BadInput(f"structured_outputs must have exactly one of {', '.join(KINDS)}")
            return _read(Fields(given, inner.where), next(iter(given)))
        case "guided_json":
            return schema_grammar(read_schema(value, f"{fields.where}{name}"))
        case "guided_choice":
            return Grammar("regex", _choices(value, f"{fields.where}{name}"))
        case "guided_regex":
            return Grammar("regex", _bounded(fields.text(name), f"{fields.where}{name}"))
        case _:
            return Grammar("lark", _bounded(fields.text(name), f"{fields.where}{name}"))


def _read_format(fields: Fields) -> Grammar | None:
    match fields.choice("type", None, ("text", "json_object", "json_schema", "regex")):
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            # The Responses API has the schema beside its type, the Chat API one level further in.
            inner = fields
            if fields.get("json_schema") is not None:
                inner = Fields(fields.get("json_schema"), f"{fields.where}json_schema.")
            if inner.get("schema") is None:
                raise BadInput(f"{inner.where}schema is missing")
            return schema_grammar(read_schema(inner.get("schema"), f"{inner.where}schema"))
        case "regex":
            name = "regex" if fields.get("regex") is not None else "pattern"
            return Grammar("regex", _bounded(fields.text(name), f"{fields.where}{name}"))
        case _:
            return None


def _choices(value: Any, where: str) -> str:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES or not all(isinstance(c, str) for c in value):
        raise BadInput(f"{where} must be a list of 1 to {MAX_CHOICES} strings, got {show(value)}")
    return _bounded("|".join(map(_escaped, value)), where)


def _escaped(text: str) -> str:
    """A text as a regular expression of Rust's, which knows no escapes of letters that Python would make."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/#&~-])", r"\\\1", text)
