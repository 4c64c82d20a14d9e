"""`litchi serve` on a language model of others: OpenAI's client talks with it, and pictures are refused plainly."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Text
from tests.model.test_adopt import adopted, folder  # noqa: F401 (fixtures: a random Llama of transformers, adopted)
from tests.serve.test_chat import BLUE, user

openai = pytest.importorskip("openai")
ASKED = [user("where is the red ball"), {"role": "assistant", "content": "it is in row 2"}, user("what do you see")]
PARTS = (
    Text(text="where is the red ball", role=Role.USER),
    Text(text="it is in row 2", role=Role.ASSISTANT),
    Text(text="what do you see", role=Role.USER),
)
LENGTH = 24


@pytest.fixture(scope="module")
def served(adopted, served_folder) -> Iterator[object]:  # noqa: F811
    """A server with what `litchi serve FOLDER` makes of the folder, on a port of its own."""
    with served_folder(adopted) as served:
        yield served


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(served, **params: object):
    request = Request(parts=PARTS, params=SamplingParams(max_tokens=LENGTH, **params))
    return served.sampler.complete(request)


def test_it_is_listed_as_one_that_only_talks(client):
    [model] = client.models.list()
    assert (model.id, model.abilities) == ("llama", ["talk"])


def test_it_answers_as_the_model_does_and_counts_its_tokens(client, served):
    expected = said(served)
    answer = client.chat.completions.create(model="llama", messages=ASKED, max_tokens=LENGTH)
    assert answer.choices[0].message.content == expected.text != ""
    assert answer.choices[0].finish_reason == expected.finish
    prompt = len(served.sampler.processor.prompt(PARTS).tokens)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, len(expected.tokens))


def test_a_stream_says_the_same(client, served):
    asked = {"model": "llama", "messages": ASKED, "max_tokens": LENGTH}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    expected = said(served)
    assert "".join(choice.delta.content or "" for choice in told) == expected.text
    assert len([choice for choice in told if choice.delta.content]) > 3
    assert told[-1].finish_reason == expected.finish
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)


def test_a_stop_string_ends_it(client, served):
    whole = said(served).text
    stop = whole[len(whole) // 2]
    answer = client.chat.completions.create(model="llama", messages=ASKED, max_tokens=LENGTH, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)] != whole
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_words_again(client, served):
    asked = {"model": "llama", "messages": ASKED, "max_tokens": LENGTH, "temperature": 1.0}
    texts = [client.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in (3, 3, 4)]
    assert texts[0] == texts[1] == said(served, temperature=1.0, seed=3).text != texts[2]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("chat/completions", {"messages": [user("what is it", BLUE)]}, "this model reads text only, not images"),
        ("images/generations", {"prompt": "a red ball"}, "cannot draw: ask it for words"),
        ("next", {"want": "frame", "parts": [user("x", BLUE)["content"][0]]}, "this model reads text only"),
        ("next", {"want": "action", "space": "minigrid", "parts": [{"type": "text", "text": "go"}]}, "unknown action"),
        ("chat/completions", {"messages": [user("x" * 300)]}, "this model reads 256: shorten it"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_it_cannot_do_is_refused_in_one_plain_line(served, path: str, body: dict, reason: str, stream: bool):
    if stream and path == "chat/completions":
        body = body | {"stream": True}
    answer = httpx.post(f"{served.url}/v1/{path}", json=body, timeout=30)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert reason in message and "\n" not in message


def test_a_world_is_refused_when_it_should_be_dreamed(served):
    websockets = pytest.importorskip("websockets.sync.client")
    from litchi.serve.limits import data_url

    start = {"type": "start", "image": data_url(np.zeros((64, 64, 3), np.uint8))}
    with websockets.connect(served.url.replace("http", "ws") + "/v1/worlds") as socket:
        socket.send(json.dumps(start))
        assert json.loads(socket.recv(60))["type"] == "frame"
        socket.send(json.dumps({"type": "action", "action": "left"}))
        told = json.loads(socket.recv(60))
    assert told["type"] == "error" and "this model reads text only" in told["message"]
