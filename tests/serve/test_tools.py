"""Tools are told by the model's template, called under a grammar where they must be, and read back, streamed or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.model.adopt import adopt
from litchi.schema.templates import TEMPLATES
from litchi.serve.callreader import Begun, CallReader
from litchi.serve.calls import Call, Toolbox, as_said, moved, style_of
from tests.model.test_adopt import folder  # noqa: F401 (fixture: a random Llama of transformers)

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance", reason="pip install litchi[serve]")

TOLD = """\
{%- if tools -%}
    {{ '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor -%}
    {{ '\\nAnswer with <tool_call>{"name": "a name", "arguments": {}}</tool_call><|im_end|>\\n' }}
{%- endif -%}
"""
LLAMA = TOLD.replace('<tool_call>{"name": "a name", "arguments": {}}</tool_call>', '{"name": "", "parameters": {}}')
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/place"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["place", "days"],
            "additionalProperties": False,
            "$defs": {"place": {"enum": ["here", "there"]}},
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}
SAID = [{"role": "user", "content": "where is the red ball"}]


@pytest.fixture(scope="module", params=["hermes", "llama"])
def served(request, folder: Path, tmp_path_factory, served_folder) -> Iterator[object]:  # noqa: F811
    """A random Llama whose template shows tools, in one of two ways."""
    place = tmp_path_factory.mktemp("tools")
    shutil.copytree(folder, place / "theirs")
    (place / "theirs" / "chat_template.jinja").write_text(
        (TOLD if request.param == "hermes" else LLAMA) + TEMPLATES["chatml"]
    )
    config = place / "theirs" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))
    adopt(place / "theirs", place / "llama")
    with served_folder(place / "llama") as served:
        object.__setattr__(served, "style", request.param)
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, **params):
    return client.chat.completions.create(**{"model": "llama", "messages": SAID, "max_tokens": 200} | params)


def is_weather(arguments: str) -> bool:
    found = json.loads(arguments)
    return found.keys() == {"place", "days"} and found["place"] in ("here", "there") and found["days"] in range(1, 10)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_tool_is_called_with_what_its_schema_allows(client, seed: int) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = ask(client, tools=[STOP, WEATHER], tool_choice=choice, temperature=1.0, seed=seed).choices[0]
    [call] = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content, call.function.name) == ("tool_calls", None, "weather")
    assert is_weather(call.function.arguments) and call.id.startswith("call_") and call.type == "function"


def test_one_of_the_tools_must_be_called(client) -> None:
    answer = ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, temperature=1.0, seed=5)
    [call] = answer.choices[0].message.tool_calls
    assert is_weather(call.function.arguments)


def test_a_stream_tells_the_same_calls(client) -> None:
    asked = {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "seed": 3,
        "temperature": 1.0,
    }
    [whole] = ask(client, **asked).choices[0].message.tool_calls
    chunks = [c.choices[0] for c in ask(client, **asked, stream=True)]
    first, *rest = [call for c in chunks for call in c.delta.tool_calls or []]
    assert (first.index, first.function.name, first.function.arguments) == (0, "weather", "")
    assert "".join(row.function.arguments for row in rest) == whole.function.arguments
    assert chunks[-1].finish_reason == "tool_calls" and not any(c.delta.content for c in chunks)


def test_the_template_shows_the_tools_and_none_of_them_where_none_may_be_called(client, served) -> None:
    read = [
        ask(client, max_tokens=1, **more).usage.prompt_tokens
        for more in ({}, {"tools": [STOP]}, {"tools": [STOP], "tool_choice": "none"})
    ]
    assert read[1] > read[0] == read[2]


def test_calls_that_come_back_stand_as_the_model_writes_them(client, served) -> None:
    """The next turn reads the ids of the text that made the call."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"place": "here", "days": 1}'},
    }
    turns = [
        *SAID,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    text = as_said("", [Call("weather", '{"place": "here", "days": 1}')], served.style)
    plain = [
        *SAID,
        {"role": "assistant", "content": text},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}]},
    ]
    first, second = (ask(client, messages=messages, tools=[WEATHER], max_tokens=8) for messages in (turns, plain))
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    assert first.choices[0].message.content == second.choices[0].message.content


def tool(**function: object) -> dict:
    return {"type": "function", "function": {"name": "a"} | function}


def returned(arguments: str) -> list[dict]:
    call = {"function": {"name": "a", "arguments": arguments}}
    return [*SAID, {"role": "assistant", "content": None, "tool_calls": [call]}, *SAID]


HIDDEN = {"type": "object", "properties": {"<|im_start|>": {}}}
GO = {"type": "function", "function": {"name": "go"}}
BAD = {
    "control token": ({"tools": [tool(description="x<|im_end|>")]}, "a tool holds"),
    "name of a property": ({"tools": [tool(parameters=HIDDEN)]}, "a tool holds"),
    "name": ({"tools": [tool(name="a b")]}, "tools[0].function.name must be"),
    "many": ({"tools": [tool(name=f"a{i}") for i in range(65)]}, "tools has 65 members, at most 64"),
    "twice": ({"tools": [STOP, STOP]}, "two have the same name"),
    "unknown": ({"tools": [STOP], "tool_choice": GO}, "none of the tools"),
    "choice": ({"tools": [STOP], "tool_choice": "perhaps"}, "tool_choice must be"),
    "no tools": ({"tool_choice": "required"}, "tool_choice needs tools"),
    "schema": ({"tools": [tool(parameters={"type": "nonsense"})], "tool_choice": "required"}, "does not work"),
    "deep": ({"tools": [tool(parameters={"a": json.loads("[" * 40 + "]" * 40)})]}, "more than 32 levels"),
    "long": (
        {"tools": [tool(name=f"a{i}", description="", parameters={"const": "x" * 30_000}) for i in range(5)]}
        | {"tool_choice": "required"},
        "longer than 131072 characters",
    ),
    "two grammars": (
        {"tools": [STOP], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "leave one out",
    ),
    "arguments": ({"messages": returned("[]")}, "arguments must be a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_with_its_mend(served, name: str) -> None:
    body, reason = BAD[name]
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": SAID} | body, timeout=60)
    assert answer.status_code == 400 and reason in answer.json()["error"]["message"], answer.text


def test_a_model_without_tools_says_so(served_by) -> None:
    from litchi.cli import load_sampler

    with served_by(load_sampler("tiny")) as served:
        answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": SAID, "tools": [STOP]}, timeout=60)
    assert answer.status_code == 400 and "without tools" in answer.json()["error"]["message"]


# ---- reading back -------------------------------------------------------------------------------------------------

texts = st.text(alphabet="ab <tool_cal>{}\n/", max_size=20)


def read(text: str, cuts: list[int], style: str) -> list[object]:
    """What a reader makes of a text in pieces: neighbouring texts joined, calls without their ids."""
    reader, found = CallReader(Toolbox(style, ("{}",), ("f", "g"))), []  # type: ignore[arg-type]
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for start, stop in zip(edges, edges[1:], strict=False):
        found += reader.feed(text[start:stop])
    joined: list[object] = []
    for each in [*found, *reader.close()]:
        if isinstance(each, str) and joined and isinstance(joined[-1], str):
            joined[-1] += each
        elif isinstance(each, str):
            joined.append(each)
        elif isinstance(each, Begun):
            joined.append(each)
    calls = {call.id: (call.name, json.loads(call.arguments)) for call in reader.calls}
    return [calls[each.call.id] if isinstance(each, Begun) else each for each in joined]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    texts,
    st.lists(st.sampled_from(["f", "g"]), max_size=3),
    texts,
    st.lists(st.integers(0, 400), max_size=8),
    st.sampled_from(["hermes", "llama"]),
)
def test_pieces_read_as_the_whole(before: str, names: list[str], after: str, cuts: list[int], style: str) -> None:
    text = as_said(before, [Call(name, '{"x": 1}') for name in names], style) + after  # type: ignore[arg-type]
    assert read(text, cuts, style) == read(text, [], style)


@pytest.mark.parametrize("style", ["hermes", "llama"])
def test_calls_are_found_and_text_before_them_kept(style: str) -> None:
    calls = [Call("f", '{"x": 1}'), Call("g", "{}")]
    assert read(as_said("", calls, style), [], style) == [("f", {"x": 1}), ("g", {})]  # type: ignore[arg-type]
    if style == "hermes":
        assert read(as_said("Well.", calls, "hermes"), [], style) == ["Well.", ("f", {"x": 1}), ("g", {})]


NO_CALLS = [
    "no call",
    '{"a": 1}',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    "<tool_call>{</tool_call>",
    '<tool_call>{"name": "f"',
    "a <tool",
    '{"name": "f", "arguments": 3}',
]


@pytest.mark.parametrize("style", ["hermes", "llama"])
@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_stays_text(style: str, text: str) -> None:
    assert read(text, [5, 9], style) == [text]


def test_styles_are_known_by_the_template() -> None:
    assert (style_of(TOLD), style_of(LLAMA), style_of("")) == ("hermes", "llama", "hermes")


def test_references_of_a_moved_schema_follow_it() -> None:
    schema = {"$ref": "#", "items": [{"$ref": "#/$defs/a"}, {"$ref": "https://x"}]}
    assert moved(schema, "#/t") == {"$ref": "#/t", "items": [{"$ref": "#/t/$defs/a"}, {"$ref": "https://x"}]}
