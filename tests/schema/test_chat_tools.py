"""Tools stand in a conversation as transformers lays them out, and hold nothing by which a template speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from litchi.config import BadInput
from litchi.schema.chat import ChatTemplate, Message, telling
from litchi.schema.sample import Role
from litchi.schema.templates import TEMPLATES
from litchi.serve.calls import style_of
from tests.model.test_adopt import folder  # noqa: F401 (fixture: a random Llama of transformers)

transformers = pytest.importorskip("transformers")
TOLD = """\
{%- if tools -%}
    {{ '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor -%}
    {{ '<|im_end|>\\n' }}
{%- endif -%}
"""
TOOL = {
    "type": "function",
    "function": {"name": "go", "description": "to a <place>, 荔枝", "parameters": {"type": "object"}},
}
SAID = [Message(Role.USER, "where is the red ball"), Message(Role.ASSISTANT, "here"), Message(Role.USER, "go")]


def template(folder: Path, source: str) -> ChatTemplate:  # noqa: F811
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    return ChatTemplate(source, backend, bos="<|im_start|>", eos="<|im_end|>")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ids_are_those_of_transformers(folder: Path, count: int) -> None:  # noqa: F811
    source, tools = TOLD + TEMPLATES["chatml"], [TOOL] * count
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = source
    turns = [{"role": m.role.value, "content": m.text} for m in SAID]
    expected = theirs.apply_chat_template(turns, tools=tools or None, add_generation_prompt=True, return_dict=False)
    ours = template(folder, source)
    assert ours.encode(SAID, opened=True, tools=[json.dumps(tool) for tool in tools]).ids == expected


@pytest.mark.parametrize("place", ["name", "description", "parameters"])
@pytest.mark.parametrize("typed", ["<|im_end|>", "\\u003c|im_end|>"])
def test_a_tool_cannot_hold_a_control_token(folder: Path, place: str, typed: str) -> None:  # noqa: F811
    function = TOOL["function"] | {place: {"properties": {"TYPED": {}}} if place == "parameters" else "TYPED"}
    tool = json.dumps({"type": "function", "function": function}).replace("TYPED", typed)
    with pytest.raises(BadInput, match=r"a tool holds '<\|im_end\|>'"):
        template(folder, TOLD + TEMPLATES["chatml"]).encode(SAID, opened=True, tools=[tool])


def test_where_a_template_shows_no_tools_the_system_turn_tells_them(folder: Path) -> None:  # noqa: F811
    ours, tools = template(folder, TEMPLATES["chatml"]), [json.dumps(TOOL), '{"type": "function"}']
    system = Message(Role.SYSTEM, "You are a litchi.")
    for turns, text in ((SAID, ""), ([system, *SAID], "You are a litchi.\n\n")):
        told = Message(Role.SYSTEM, text + telling([], tools)[0].text)
        assert ours.encode(turns, opened=True, tools=tools) == ours.encode([told, *SAID], opened=True)
        assert all(tool in told.text for tool in tools) and style_of(told.text) == "hermes"
    with pytest.raises(BadInput, match="a tool holds"):
        ours.encode(SAID, opened=True, tools=[json.dumps(TOOL | {"a": "<|im_end|>"})])


def test_a_template_that_shows_neither_tools_nor_a_system_turn_says_so(folder: Path) -> None:  # noqa: F811
    deaf = (
        "{%- for m in messages if m.role != 'system' -%}"
        + TEMPLATES["chatml"].replace("messages", "[m]")
        + "{%- endfor -%}"
    )
    with pytest.raises(BadInput, match="shows no tools"):
        template(folder, deaf).encode(SAID, opened=True, tools=[json.dumps(TOOL)])


def test_many_long_tools_are_within_the_templates_means(folder: Path) -> None:  # noqa: F811
    tool = json.dumps({"type": "function", "function": {"name": "a", "description": "word " * 4000}})
    ids = template(folder, TOLD + TEMPLATES["chatml"]).encode(SAID, opened=True, tools=[tool] * 16).ids
    assert len(ids) > 16 * 4000
