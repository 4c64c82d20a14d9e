"""A response is what a chat of the same turns is answered, and a conversation goes on from where it stood."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from litchi.cli import load_sampler
from litchi.serve import replies
from tests.model.test_adopt import folder  # noqa: F401 (fixture that the next one needs)
from tests.serve.test_chat import BLUE
from tests.serve.test_grammars import ROOM, is_room
from tests.serve.test_tools import WEATHER, is_weather
from tests.serve.test_tools import served as with_tools  # noqa: F401 (fixture: a model whose template shows tools)

openai = pytest.importorskip("openai")
FIRST, SECOND = "what do you see", "where is it"
SEEN = [
    {"role": "user", "content": [{"type": "input_image", "image_url": BLUE}, {"type": "input_text", "text": FIRST}]},
]
SEEN_IN_CHAT = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": BLUE}}, {"type": "text", "text": FIRST}],
}


@pytest.fixture(scope="module")
def tiny(served_by) -> Iterator[object]:
    with served_by(load_sampler("tiny")) as served:
        yield served


@pytest.fixture(scope="module")
def client(tiny):
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, *messages: dict, **more: object) -> str:
    answer = client.chat.completions.create(model="tiny", messages=list(messages), max_tokens=40, **more)
    return answer.choices[0].message.content


def respond(client, said: object, **more: object):
    return client.responses.create(**{"model": "tiny", "input": said, "max_output_tokens": 40} | more)


def test_a_response_is_the_chats_answer_pictures_and_instructions_included(client) -> None:
    system = {"role": "system", "content": "be brief"}
    answer = respond(client, SEEN, instructions="be brief")
    assert answer.output_text == chat(client, system, SEEN_IN_CHAT) != ""
    assert answer.instructions == "be brief" and answer.usage.output_tokens > 0
    assert answer.output[0].role == "assistant"


def test_a_conversation_goes_on_from_a_response_without_its_instructions(client) -> None:
    first = respond(client, SEEN, instructions="be brief")
    second = respond(client, SECOND, previous_response_id=first.id)
    said = [SEEN_IN_CHAT, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": SECOND}]
    assert second.previous_response_id == first.id
    assert second.output_text == chat(client, *said)
    by_hand = [*SEEN, *(item.model_dump() for item in first.output), {"role": "user", "content": SECOND}]
    assert respond(client, by_hand).output_text == second.output_text
    # The first one stands as it stood: another branch may go on from it.
    assert respond(client, SECOND, previous_response_id=first.id).output_text == second.output_text


def test_what_words_were_worth_is_what_the_chat_tells(client) -> None:
    asked = {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    whole = respond(client, SEEN, **asked)
    chatted = client.chat.completions.create(
        model="tiny", messages=[SEEN_IN_CHAT], max_tokens=40, logprobs=True, top_logprobs=2
    )
    told = whole.output[0].content[0].logprobs
    expected = chatted.choices[0].logprobs.content
    assert [(row.token, row.logprob) for row in told] == [(row.token, row.logprob) for row in expected]
    assert len(told) > 2 and all(len(row.top_logprobs) == 2 for row in told) and whole.top_logprobs == 2
    events = list(respond(client, SEEN, stream=True, **asked))
    rows = [row for e in events if e.type == "response.output_text.delta" for row in e.logprobs]
    assert [(row.token, row.logprob) for row in rows] == [(row.token, row.logprob) for row in told]
    assert events[-1].response.output[0].content[0].logprobs == told
    plain = respond(client, SEEN)
    assert plain.output[0].content[0].logprobs == [] and plain.output_text == whole.output_text
    with pytest.raises(
        openai.BadRequestError, match="include must be a list of at most 8, of message.output_text.logprobs"
    ):
        respond(client, SEEN, include=["file_search_call.results"])
    with pytest.raises(openai.BadRequestError, match="at most 8"):
        respond(client, SEEN, include=["message.output_text.logprobs"] * 9)


def test_a_stream_tells_the_same(client) -> None:
    whole = respond(client, SEEN)
    events = list(respond(client, SEEN, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{whole.status}"
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert told == whole.output_text == events[-1].response.output_text
    assert kinds.count("response.output_text.delta") > 2
    with client.responses.stream(model="tiny", input=SEEN, max_output_tokens=40) as stream:
        assert stream.until_done().get_final_response().output_text == told


def test_what_is_cut_is_incomplete(client) -> None:
    cut = respond(client, SEEN, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.usage.output_tokens == 2


def test_a_stored_response_is_found_until_it_is_deleted(client) -> None:
    answer = respond(client, FIRST)
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    client.responses.delete(answer.id)
    for lost in (answer.id, respond(client, FIRST, store=False).id):
        with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
            client.responses.retrieve(lost)
        with pytest.raises(openai.NotFoundError):
            respond(client, SECOND, previous_response_id=lost)


def test_the_store_forgets_the_oldest_by_number_and_by_size(monkeypatch) -> None:
    store = replies.Store()
    monkeypatch.setattr(replies, "MAX_STORED", 3)
    for name in "abc":
        store.put({"id": name}, [{"content": name}])
    store.get("a")  # so that it is not the oldest
    store.put({"id": "d"}, [])
    assert set(store.kept) == {"a", "c", "d"}
    monkeypatch.setattr(replies, "MAX_STORED_CHARACTERS", 400)
    store.put({"id": "large"}, [{"content": "x" * 101}])
    assert "large" not in store.kept
    for name in "efghijk":
        store.put({"id": name}, [{"content": "x" * 70}])
    assert store.characters == sum(len(told) for _, told in store.kept.values()) <= 400


def test_an_answer_has_the_format_that_is_asked_for(client) -> None:
    text = {"format": {"type": "json_schema", "name": "room", "schema": ROOM}}
    assert is_room(respond(client, FIRST, text=text, max_output_tokens=200).output_text)


def test_tools_are_called_and_answered(with_tools) -> None:  # noqa: F811
    tool = {"type": "function", **WEATHER["function"]}
    asked = {"model": "llama", "input": FIRST, "tools": [tool], "max_output_tokens": 200, "temperature": 1.0}
    asked |= {"tool_choice": {"type": "function", "name": "weather"}, "extra_body": {"seed": 3}}
    with openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.responses.create(**asked)
        [call] = answer.output
        assert (call.type, call.name) == ("function_call", "weather") and is_weather(call.arguments)
        events = list(client.responses.create(**asked, stream=True))
        told = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
        assert told == [call.arguments] and events[-1].response.output[0].arguments == call.arguments
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        after = {"model": "llama", "tools": [tool], "max_output_tokens": 8}
        stored = client.responses.create(**after, input=[result], previous_response_id=answer.id)
        by_hand = [{"role": "user", "content": FIRST}, call.model_dump(), result]
        assert client.responses.create(**after, input=by_hand).output_text == stored.output_text
        assert stored.usage.input_tokens > answer.usage.input_tokens


BAD = {
    "nothing": ({}, 400, "input is missing"),
    "a file": ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]}, 400, "file_id"),
    "an address": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x/y.png"}]}]},
        400,
        "not fetched",
    ),
    "a kind": ({"input": [{"type": "web_search_call"}]}, 400, "input[0].type must be"),
    "a misspelling": ({"input": "a", "max_output_token": 3}, 400, "max_output_tokens"),
    "in the background": ({"input": "a", "background": True}, 400, "background is not supported"),
    "too long": ({"input": "a", "max_output_tokens": 5000}, 400, "from 1 to 1024"),
    "a tool of theirs": ({"input": "a", "tools": [{"type": "web_search"}]}, 400, "tools[0].type must be"),
    "another model": ({"input": "a", "model": "gpt-4o"}, 404, "'tiny'"),
    "unknown": ({"input": "a", "previous_response_id": "resp_x"}, 404, "no response"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_refused(tiny, name: str) -> None:
    body, status, reason = BAD[name]
    answer = httpx.post(f"{tiny.url}/v1/responses", json=body, timeout=30)
    assert answer.status_code == status and reason in answer.json()["error"]["message"], answer.text
