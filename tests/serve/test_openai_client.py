"""OpenAI's own client finds in our answers what it looks for: its error classes, its parsers and its stream helpers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Literal

import pytest

from litchi.cli import find_checkpoint
from litchi.serve.loading import load_engine
from litchi.serve.run import ServeConfig
from tests.serve.test_chat import wait_for

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
pytest.importorskip("llguidance", reason="pip install litchi[serve]")

KEY = "open sesame"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Where is the agent?"}], "max_tokens": 12}


class Seen(pydantic.BaseModel):
    colour: Literal["red", "green"]
    shape: Literal["ball", "box"]


@pytest.fixture(scope="module")
def tiny(served_by) -> Iterator[object]:
    with served_by(load_engine(find_checkpoint("tiny"), ServeConfig()), api_key=KEY) as served:
        yield served


def client_of(served, key: str = KEY, **more: object):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, **{"max_retries": 0, **more})


@pytest.fixture(scope="module")
def client(tiny) -> Iterator[object]:
    with client_of(tiny) as client:
        yield client


def test_models_are_listed_and_retrieved(client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]


def test_every_refusal_is_the_error_that_the_client_has_for_it(tiny, client) -> None:
    with client_of(tiny, "wrong") as stranger, pytest.raises(openai.AuthenticationError, match="Bearer") as refused:
        stranger.chat.completions.create(**ASKED)
    assert (refused.value.status_code, refused.value.code) == (401, "invalid_api_key")
    foreign = {"extra_headers": {"Origin": "https://example.com"}}
    body = {"extra_body": {"temprature": 1}}
    for kind, code, more in (
        (openai.BadRequestError, "bad_input", {"temperature": 9}),
        (openai.BadRequestError, "bad_input", body),
        (openai.NotFoundError, "model_not_found", {"model": "gpt-6"}),
        (openai.PermissionDeniedError, "bad_origin", foreign),
    ):
        with pytest.raises(kind) as refused:
            client.chat.completions.create(**ASKED | more)
        assert refused.value.code == code and refused.value.body["message"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-6")
    for ask in (client.embeddings.create, client.completions.create, client.images.generate, client.responses.create):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(model="gpt-6", **{"input" if ask.__self__ in (client.embeddings, client.responses) else "prompt": "a"})
        assert refused.value.code == "model_not_found"


def test_a_full_queue_is_a_rate_limit_that_the_client_waits_out(serve, painter) -> None:
    """Its own retries come after the seconds that Retry-After says, and then it is answered."""
    slow = painter()
    slow.gate.clear()
    with serve(slow, max_queue=0) as served, client_of(served) as hasty, client_of(served, max_retries=4) as patient:
        first = threading.Thread(target=hasty.chat.completions.create, kwargs=ASKED)
        first.start()
        wait_for(lambda: slow.requests)
        with pytest.raises(openai.RateLimitError) as refused:
            hasty.chat.completions.create(**ASKED)
        assert refused.value.code == "queue_full" and int(refused.value.response.headers["retry-after"]) >= 1
        threading.Timer(0.3, slow.gate.set).start()
        assert patient.chat.completions.create(**ASKED).choices[0].message.content.startswith("I see")
        first.join(60)


def test_a_fault_is_an_error_before_the_stream_and_within_it(serve, painter) -> None:
    class Falling(painter):
        def _chat(self, request, images, last):
            yield from list(super()._chat(request, images, last))[:2]
            raise RuntimeError

    exploding = ASKED | {"messages": [{"role": "user", "content": "explode"}]}
    with serve() as served, client_of(served) as client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**exploding, stream=True)
    said = []
    with serve(Falling()) as served, client_of(served) as client:
        stream = client.chat.completions.create(**ASKED, stream=True)
        with pytest.raises(openai.APIError, match="its log says why"):
            for chunk in stream:
                said.append(chunk.choices[0].delta.content)
    assert "".join(said) == "I see "


def test_an_answer_is_parsed_into_what_was_asked_for(client) -> None:
    chat = client.chat.completions.parse(**ASKED | {"max_tokens": 300}, response_format=Seen)
    assert isinstance(chat.choices[0].message.parsed, Seen)
    reply = client.responses.parse(model="tiny", input="Where is the agent?", max_output_tokens=300, text_format=Seen)
    assert isinstance(reply.output_parsed, Seen) and reply.output_parsed == chat.choices[0].message.parsed


def test_the_clients_stream_helpers_gather_the_whole_answer(client) -> None:
    whole = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2)
    with client.chat.completions.stream(**ASKED, logprobs=True, top_logprobs=2) as stream:
        kinds = [event.type for event in stream]
        gathered = stream.get_final_completion()
    assert {"content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= set(kinds)
    assert gathered.choices[0].message.content == whole.choices[0].message.content
    assert gathered.choices[0].logprobs.model_dump() == whole.choices[0].logprobs.model_dump() | {"refusal": None}
    reply = {"model": "tiny", "input": "Where is the agent?", "max_output_tokens": 12}
    with client.responses.stream(**reply) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text == client.responses.create(**reply).output_text


def test_a_stream_tells_its_usage_last_however_it_is_asked_for(client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}  # as load generators ask
    for ask in (client.chat.completions.create, client.completions.create):
        said = {k: v for k, v in ASKED.items() if k != "messages"} | {"prompt": "a"}
        body = ASKED if ask.__self__ is client.chat.completions else said
        *_, last = ask(**body, stream=True, stream_options=options)
        assert last.usage.completion_tokens == ask(**body).usage.completion_tokens and not last.choices


def test_many_at_once_ask_through_one_client_that_does_not_block(tiny) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key=KEY, max_retries=0) as client:
            made = await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(5)))
            stream = await client.chat.completions.create(**ASKED, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [*(each.choices[0].message.content for each in made), streamed]

    assert len(set(asyncio.run(ask()))) == 1


def test_vectors_come_packed_as_the_client_asks_and_unpacked_as_it_gives(client) -> None:
    made = client.embeddings.create(model="tiny", input=["a red ball", "a box"])
    plain = client.embeddings.create(model="tiny", input=["a red ball", "a box"], encoding_format="float")
    assert [each.embedding for each in made.data] == [each.embedding for each in plain.data]
    assert json.loads(made.model_dump_json())["usage"]["prompt_tokens"] > 0
