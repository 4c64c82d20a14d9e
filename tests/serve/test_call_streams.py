"""A stream of calls is the answer given whole: its text, its calls and their arguments, wherever the pieces are cut."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.schema.request import Completion, Delta, Request
from litchi.serve.callreader import Argued, Begun, Brackets, CallReader, Ended
from litchi.serve.calls import Toolbox, as_said
from litchi.serve.tokens import Words
from tests.model.test_adopt import folder  # noqa: F401 (fixture that the next one needs)
from tests.serve.test_tools import SAID, WEATHER, ask
from tests.serve.test_tools import served as with_tools  # noqa: F401 (fixture: a model whose template shows tools)

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

STYLES = ("hermes", "llama")
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
FRAGMENTS = (
    '<tool_call>', '\n</tool_call>', '</tool_call>', '<tool', '{"name": "f", "arguments": ',
    '{"name": "g", "parameters": ', '{"name": "f"}', '{"name": "h", "arguments": {}}',
    '{"arguments": {"x": 1}, "name": "g"}', '{"x": "ä🍈"}', '{"x": [1, {}]}', '{"x": "}</tool_call>"}',
    '{"x": "\\"}\\u00e9"}', '{"x": oops}', '{"x": "cut\n', '}', '; ', ', "more": [2]}', '{}', ' ', '\n',
    '<tool_call>{"name": "f", "arguments": {"x": 1', '<tool_call>\n{"name": "g", "arguments": {"x": [true, ',
    'Well', '🍈', '<', '{', '"', '\\', '3',
)  # fmt: skip
spoken = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
cuts = st.lists(st.integers(0, 10_000), max_size=9)


def pieces_of(raw: bytes, places: list[int]) -> list[str]:
    """A text as tokens of bytes tell it: a character that is cut comes when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    edges = sorted({0, len(raw), *(place % (len(raw) + 1) for place in places)})
    return [decoder.decode(raw[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def read(pieces: list[str], style: str) -> tuple[list[object], CallReader]:
    """What a reader tells: texts and arguments that follow each other joined."""
    reader = CallReader(Toolbox(style, ("{}",), ("f", "g")))  # type: ignore[arg-type]
    found: list[object] = []
    for each in [*(p for piece in pieces for p in reader.feed(piece)), *reader.close()]:
        if isinstance(each, str | Argued) and found and type(found[-1]) is type(each):
            last = found.pop()
            each = last + each if isinstance(each, str) else Argued(last.text + each.text)  # type: ignore[union-attr]
        found.append(each)
    return found, reader


def nameless(found: list[object]) -> list[object]:
    """Without the ids of calls, which are random."""
    return [("begun", each.call.name) if isinstance(each, Begun) else each for each in found]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(spoken, cuts, st.sampled_from(STYLES))
def test_wherever_an_answer_is_cut_the_same_is_told_in_the_same_order(text: str, places: list[int], style: str) -> None:
    whole, by_whole = read([text], style)
    told, by_pieces = read(pieces_of(text.encode(), places), style)
    each, _ = read(list(text), style)
    assert nameless(told) == nameless(whole) == nameless(each)
    assert by_pieces.text == by_whole.text and by_pieces.cut == by_whole.cut


@settings(max_examples=400, deadline=None, derandomize=True)
@given(spoken, st.sampled_from(STYLES))
def test_what_is_told_is_a_story_of_calls_that_begin_are_argued_and_end(text: str, style: str) -> None:
    """And every character of a call's arguments and of the content was said, in that order."""
    found, reader = read([text], style)
    state = "talk"
    for each in found:
        allowed = {str: "talk", Begun: "talk", Argued: "begun", Ended: "argued"}[type(each)]
        assert state == allowed, found
        state = {Begun: "begun", Argued: "argued"}.get(type(each), "talk")
    assert (state == "argued") == reader.cut and state != "begun"
    at = 0
    for each in found:
        said = each if isinstance(each, str) else each.text if isinstance(each, Argued) else ""
        if said and said not in ("{}", '{"x": 1}'):  # what stands otherwise in its call is written anew
            assert (at := text.find(said, at) + len(said)) >= len(said), (said, text)
    calls = [call for call in reader.calls if call.arguments]
    assert all(call.arguments.startswith("{") for call in calls) and len(calls) == len(reader.calls)


def test_arguments_go_out_while_they_are_written() -> None:
    for style in STYLES:
        text = as_said("", [], style) + ("<tool_call>\n" if style == "hermes" else "")  # type: ignore[arg-type]
        text += '{"name": "f", "arguments": {"long": "' + "words " * 50 + '"}}'
        reader = CallReader(Toolbox(style, ("{}",), ("f", "g")))  # type: ignore[arg-type]
        waits = [len(text[: at + 1]) for at, sign in enumerate(text) if reader.feed(sign) == []]
        assert max(waits[:-1]) == text.index('{"long') and waits[-1] == len(text)  # the last is the object's bracket


NOT_OURS = 'A <tool_call>{"name": "h", "arguments": {}}</tool_call>'
NO_OBJECT = '<tool_call>{"name": "f", "arguments": 3}</tool_call>'
TWO = """A
<tool_call>
{"name": "f", "arguments": {"x": "ä🍈"}}
</tool_call>
<tool_call>
{"name": "g", "arguments": {}}
</tool_call>"""
BEGUN = '<tool_call>{"name": "f", "arguments": '
END = "</tool_call>"
IN_ONE = '<tool_call>{"name": "f"}; {"arguments": {"a": 1}, "name": "g"}</tool_call>B'
HALF_A_PAIR = '<tool_call>{"arguments": {"x": "\\ud83c"}, "name": "f"}</tool_call>'
WRITTEN = {
    "several": (TWO, "A", [("f", '{"x": "ä🍈"}'), ("g", "{}")], "tool_calls"),
    "in one tag": (IN_ONE, "B", [("f", "{}"), ("g", '{"a": 1}')], "tool_calls"),
    "the tag in a string": (BEGUN + f'{{"x": "{END}"}}}}{END}', None, [("f", f'{{"x": "{END}"}}')], "tool_calls"),
    "no brace": (BEGUN + '{"x": 1}' + END, None, [("f", '{"x": 1}')], "tool_calls"),
    "more in it": (BEGUN + '{}, "id": {"a": "}"}}' + END + " B", " B", [("f", "{}")], "tool_calls"),
    "malformed": (BEGUN + '{"x": [1, oops}\n' + END + "B", "B", [("f", '{"x": [1, oops}\n')], "tool_calls"),
    "an endless string": (BEGUN + '{"x": "a\n' + END + "B", "B", [("f", '{"x": "a\n')], "tool_calls"),
    "an object after it": (BEGUN + '{}}; {"a": 1}' + END, '; {"a": 1}' + END, [("f", "{}")], "tool_calls"),
    "cut": (BEGUN + '{"x": "ä🍈', None, [("f", '{"x": "ä🍈')], "stop"),
    "half a tag": (BEGUN + '{"x": 1 </tool', None, [("f", '{"x": 1 </tool')], "stop"),
    "half a pair": (HALF_A_PAIR, None, [("f", '{"x": "\\ud83c"}')], "tool_calls"),
    "not ours": (NOT_OURS, NOT_OURS, [], "stop"),
    "no object": (NO_OBJECT, NO_OBJECT, [], "stop"),
    "hardly begun": (BEGUN, BEGUN, [], "stop"),
    "none after one": (BEGUN + "{}} no <tool_call>{" + END, " no <tool_call>{" + END, [("f", "{}")], "tool_calls"),
}


class Reciter:
    """Says what the request's last words are, [a text, where it is cut], and cuts characters as well."""

    def stream(self, request: Request) -> Iterator[Delta]:
        text, places = json.loads(request.parts[-1].text)  # type: ignore[union-attr]
        for piece in pieces_of(text.encode(), places):
            yield Delta(text=piece, tokens=(1,))
        yield Delta(finish="stop", prompt_tokens=1)

    def complete(self, request: Request) -> Completion:
        text = json.loads(request.parts[-1].text)[0]  # type: ignore[union-attr]
        return Completion(parts=(), text=text, finish="stop", prompt_tokens=1, tokens=(1,))


@pytest.fixture(scope="module")
def client(served_by) -> Iterator[object]:
    with served_by(Reciter()) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        yield client


def say(text: str, places: list[int]) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": json.dumps([text, places])}], "tools": TOOLS}


def gathered(chunks: list) -> tuple[str | None, list[tuple[str, str]], str]:
    """As a client puts a stream together; what OpenAI's says of its form is looked at on the way."""
    text, calls, finish = "", [], ""
    for choice in (chunk.choices[0] for chunk in chunks if chunk.choices):
        text, finish = text + (choice.delta.content or ""), choice.finish_reason or finish
        for row in choice.delta.tool_calls or []:
            if row.index == len(calls):
                assert row.id.startswith("call_") and row.type == "function" and row.function.arguments == ""
                calls.append((row.function.name, ""))
            else:
                assert row.index == len(calls) - 1 and row.id is None and row.function.name is None
                calls[-1] = (calls[-1][0], calls[-1][1] + row.function.arguments)
    return text or None, calls, finish


def told(choice) -> tuple[str | None, list[tuple[str, str]], str]:  # noqa: ANN001 (theirs)
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    return choice.message.content or None, calls, choice.finish_reason


def items(response) -> list[tuple[object, ...]]:  # noqa: ANN001 (theirs)
    return [
        (item.type, item.status, item.content[0].text if item.type == "message" else (item.name, item.arguments))
        for item in response.output
    ]


CUTS = ([], [*range(400)], [7, 33, 61, 62, 63, 64, 99])


@pytest.mark.parametrize("name", WRITTEN)
def test_openais_client_gathers_from_a_stream_what_it_is_given_whole(client, name: str) -> None:
    text, content, calls, finish = WRITTEN[name]
    chat, flat = client.chat.completions, [tool["function"] | {"type": "function"} for tool in TOOLS]
    assert told(chat.create(**say(text, [])).choices[0]) == (content, calls, finish)
    whole = client.responses.create(model="tiny", input=json.dumps([text, []]), tools=flat)
    assert [each[2] for each in items(whole) if each[0] == "function_call"] == calls
    assert whole.output_text == (content or "")
    for places in CUTS:
        assert gathered(list(chat.create(**say(text, places), stream=True))) == (content, calls, finish)
        with chat.stream(**say(text, places)) as stream:
            assert told(stream.get_final_completion().choices[0]) == (content, calls, finish)
        asked = {"model": "tiny", "input": json.dumps([text, places]), "tools": flat}
        with client.responses.stream(**asked) as stream:
            assert items(stream.until_done().get_final_response()) == items(whole)
        check_events(list(client.responses.create(**asked, stream=True)))


def check_events(events: list) -> None:
    """Every item is opened, told in pieces and closed, each under one place and one id."""
    final, closed = events[-1].response.output, []
    opened, argued = {}, {}
    for event in events:
        match event.type:
            case "response.output_item.added":
                assert event.output_index == len(opened)
                opened[event.output_index] = event.item
                assert event.item.type != "function_call" or event.item.arguments == ""
            case "response.function_call_arguments.delta":
                assert event.item_id == opened[event.output_index].id
                argued[event.item_id] = argued.get(event.item_id, "") + event.delta
            case "response.function_call_arguments.done":
                assert event.arguments == argued[event.item_id]
            case "response.output_item.done":
                assert event.item.to_dict() == final[event.output_index].to_dict()
                closed.append(event.output_index)
    assert sorted(closed) == sorted(opened) and [item.id for item in opened.values()] == [item.id for item in final]


def test_a_model_that_writes_calls_alone_streams_them_too(served_by, monkeypatch) -> None:
    monkeypatch.setattr(Words, "style", "llama")
    one, other = '{"name": "f", "parameters": {"x": "ä🍈"}}', '{"name": "g", "parameters": {"y": [1]}}'
    wanted = [("f", '{"x": "ä🍈"}'), ("g", '{"y": [1]}')]
    spoken = (
        (f"{one}; {other}", None, wanted),
        (f"{one} and so", " and so", wanted[:1]),
        ('{"a": 1}', '{"a": 1}', []),
        (f"Well {one}", f"Well {one}", []),
    )
    with served_by(Reciter()) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        for text, content, calls in spoken:
            for places in CUTS:
                finish = "tool_calls" if calls else "stop"
                asked = say(text, places)
                assert told(client.chat.completions.create(**asked).choices[0]) == (content, calls, finish)
                assert gathered(list(client.chat.completions.create(**asked, stream=True))) == (content, calls, finish)


@pytest.fixture(scope="module")
def forced(with_tools) -> Iterator[object]:  # noqa: F811
    with openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="none") as client:
        yield client


@pytest.mark.parametrize("more", [{}, {"stop": ["place"]}, {"stop": [", "]}, {"max_tokens": 30}, {"max_tokens": 9}])
def test_forced_calls_stream_as_they_are_whole_also_where_they_are_cut(forced, more: dict) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = {"tools": [WEATHER], "tool_choice": choice, "seed": 3, "temperature": 1.0} | more
    whole = told(ask(forced, **asked).choices[0])
    chunks = list(ask(forced, **asked, stream=True))
    assert gathered(chunks) == whole
    if not more:
        rows = [row for chunk in chunks for row in chunk.choices[0].delta.tool_calls or []]
        assert len(rows) > 5 and json.loads(whole[1][0][1])
    if "stop" in more:
        assert whole[2] == "stop"


class Weather(pydantic.BaseModel):
    place: Literal["here", "there"]
    days: Literal[1, 2, 3]


def test_openais_client_parses_the_arguments_of_a_stream_as_they_grow(forced) -> None:
    tool = openai.pydantic_function_tool(Weather)
    choice = {"type": "function", "function": {"name": "Weather"}}
    asked = {"model": "llama", "messages": SAID, "tools": [tool], "tool_choice": choice, "max_tokens": 200}
    with forced.chat.completions.stream(**asked, seed=3, temperature=1.0) as stream:
        events = [event for event in stream if event.type.startswith("tool_calls.")]
        [call, *_] = stream.get_final_completion().choices[0].message.tool_calls
    grown = [event for event in events if event.type == "tool_calls.function.arguments.delta" and event.index == 0]
    assert "".join(event.arguments_delta for event in grown) == call.function.arguments and len(grown) > 5
    assert isinstance(call.function.parsed_arguments, Weather)


def test_a_call_that_was_cut_may_be_sent_back(forced) -> None:
    """Whoever keeps a conversation sends it as he received it."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "he'}}
    turns = [*SAID, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "call_1", "content": "that is no JSON"}]
    assert ask(forced, messages=turns, tools=[WEATHER], max_tokens=4).usage.completion_tokens == 4


def test_brackets_in_strings_are_none() -> None:
    assert Brackets().feed('{"a": "}\\"}", "b": {}} and', "") == (22, True)
    assert Brackets().feed('{"a": "</t>"</t>', "</t>") == (12, True)
