"""Tools that a model may call: how they are told, how calls are forced by a grammar, and how they are sent back.

What a model says to call a tool is text like other text, and it is kept as such: a call that a client sends back stands
in the conversation just as the model writes calls, so that each turn continues what was read before.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from litchi.config import BadInput
from litchi.schema.request import Grammar
from litchi.serve.fields import Fields
from litchi.serve.grammars import read_schema
from litchi.serve.trial import check

Style = Literal["hermes", "llama"]
"""`<tool_call>{"name": ..., "arguments": ...}</tool_call>`, as Hermes and Qwen write, or `{"name": ..., "parameters":
...}` and nothing else, as Llama 3.1 does."""

MAX_TOOLS, MAX_NAME, MAX_CALLS, MAX_GRAMMAR = 64, 64, 32, 131_072
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
ARGUMENTS: dict[Style, str] = {"hermes": "arguments", "llama": "parameters"}


def style_of(template: str) -> Style:
    """How the model of a chat template writes calls, by what the template tells it."""
    return "llama" if OPEN not in template and ('"parameters"' in template or "python_tag" in template) else "hermes"


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str
    """JSON, an object, as the model wrote it: cut where it was cut, and no JSON where it wrote none."""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a request; `told` is what the template shows, empty where none may be called."""

    style: Style
    told: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    grammar: Grammar | None = None
    """What an answer that must be a call looks like."""


def read_tools(fields: Fields, style: Style) -> Toolbox:
    """`tools`, `tool_choice` and `parallel_tool_calls` of a body. Raises BadInput, which names the field."""
    value = fields.get("tools")
    choice, parallel = fields.get("tool_choice"), fields.flag("parallel_tool_calls", True)
    if not value:
        if value is not None and not isinstance(value, list):
            raise BadInput(f"{fields.where}tools must be a list of objects")
        if choice not in (None, "none", "auto"):
            raise BadInput(f"{fields.where}tool_choice needs tools; send them, or leave it out")
        return Toolbox(style)
    if len(tools := fields.objects("tools")) > MAX_TOOLS:
        raise BadInput(f"{fields.where}tools has {len(tools)} members, at most {MAX_TOOLS} are read; send fewer")
    found = [_read_tool(tool) for tool in tools]
    names = [function["name"] for function in found]
    if len(set(names)) < len(names):
        raise BadInput(f"{fields.where}tools: two have the same name; rename one")
    if choice == "none":
        return Toolbox(style)
    told = tuple(json.dumps({"type": "function", "function": f}, ensure_ascii=False) for f in found)
    wanted = found if choice in (None, "auto", "required") else [_chosen(fields, found)]
    several = choice == "required" and parallel
    grammar = None if choice in (None, "auto") else forced(wanted, style, several=several)
    if grammar is not None:
        if len(grammar.source) > MAX_GRAMMAR:
            raise BadInput(f"{fields.where}tools: their schemas are longer than {MAX_GRAMMAR} characters together")
        check(grammar)
    return Toolbox(style, told, tuple(names), grammar)


def _read_tool(fields: Fields) -> dict[str, Any]:
    """A function, from the Chat API's object around it or the Responses API's own."""
    fields.choice("type", "function", ("function",))
    inner = Fields(fields.get("function"), f"{fields.where}function.") if fields.get("function") is not None else fields
    inner.known(("name", "description", "parameters", "strict", *(("type",) if inner is fields else ())))
    name = inner.text("name")
    if not NAME.fullmatch(name):
        raise BadInput(f"{inner.where}name must be 1 to {MAX_NAME} letters, digits, dots, dashes or underscores")
    schema = inner.get("parameters")
    parameters = read_schema(schema if schema is not None else {"type": "object"}, f"{inner.where}parameters")
    return {"name": name, "description": inner.text("description", ""), "parameters": parameters}


def _chosen(fields: Fields, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    choice = fields.get("tool_choice")
    where = f"{fields.where}tool_choice"
    if not isinstance(choice, dict):
        raise BadInput(f"{where} must be 'none', 'auto', 'required' or an object that names a function")
    inner = Fields(choice, f"{where}.")
    if inner.get("function") is not None:
        inner = Fields(inner.get("function"), f"{where}.function.")
    name = inner.text("name")
    for tool in tools:
        if tool["name"] == name:
            return tool
    raise BadInput(f"{inner.where}name is {name[:80]!r}, which is none of the tools")


def forced(tools: Sequence[dict[str, Any]], style: Style, *, several: bool) -> Grammar:
    """One call of one of the tools, or with `several` one after another, as the model writes them."""
    either, definitions = [], {}
    for index, tool in enumerate(tools):
        definitions[f"tool{index}"] = moved(tool["parameters"], f"#/$defs/tool{index}")
        body = {"name": {"const": tool["name"]}, ARGUMENTS[style]: {"$ref": f"#/$defs/tool{index}"}}
        either.append({"type": "object", "properties": body, "required": list(body), "additionalProperties": False})
    layout = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    schema = {"anyOf": either, "$defs": definitions, "x-guidance": layout}
    if style == "llama":
        return Grammar("schema", json.dumps(schema))
    more = r' ("\n" call)*' if several else ""
    lark = f'start: call{more}\ncall: "{OPEN}\\n" body "\\n{CLOSE}"\nbody: %json {json.dumps(schema)}\n'
    return Grammar("lark", lark)


def moved(schema: Any, root: str) -> Any:
    """A schema that stands at `root` of another one: what it refers to is found there."""
    if isinstance(schema, list):
        return [moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    here = {name: moved(value, root) for name, value in schema.items()}
    if isinstance(target := here.get("$ref"), str) and target.startswith("#"):
        here["$ref"] = root + target[1:]
    return here


def as_said(content: str, calls: Sequence[Call], style: Style) -> str:
    """What an assistant said that made these calls."""
    written = [f'{{"name": {json.dumps(c.name)}, "{ARGUMENTS[style]}": {c.arguments}}}' for c in calls]
    if style == "llama":
        return content + "; ".join(written)
    return "\n".join([*([content] if content else []), *(f"{OPEN}\n{each}\n{CLOSE}" for each in written)])


def read_calls(fields: Fields, name: str = "tool_calls") -> list[Call]:
    """The calls of an assistant's message that a client sends back."""
    if not fields.get(name):
        return []
    if len(calls := fields.objects(name)) > MAX_CALLS:
        raise BadInput(f"{fields.where}{name} has {len(calls)} members, at most {MAX_CALLS} are read; send fewer")
    found = []
    for call in calls:
        inner = Fields(call.get("function"), f"{call.where}function.")
        found.append(Call(inner.text("name"), arguments_of(inner), call.text("id", "")))
    return found


def arguments_of(fields: Fields) -> str:
    """The arguments of a call, as they were said. Raises BadInput for what was never one's."""
    text = fields.text("arguments", "{}") or "{}"
    if not text.lstrip().startswith("{"):  # how it goes on is the model's affair, who may have been cut short
        raise BadInput(f"{fields.where}arguments must be a JSON object in a text; send back what was received")
    return text
