"""Completions and embeddings are what the network says of the same ids, as OpenAI's client and harnesses read them."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch

from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.schema.sequence import pack
from tests.model.test_adopt import adopted, folder  # noqa: F401 (fixtures: a random Llama of transformers, adopted)

openai = pytest.importorskip("openai")
transformers = pytest.importorskip("transformers")
PROMPTS = ["where is the red ball", "a blue key and"]


@pytest.fixture(scope="module")
def served(adopted, served_folder) -> Iterator[object]:  # noqa: F811
    with served_folder(adopted, "serve.engine.weights=float32") as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def encode(served):
    return served.sampler.processor.tokenizer.encode


@pytest.fixture(scope="module")
def theirs(folder):  # noqa: F811
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def complete(client, prompt, **params):
    return client.completions.create(model="llama", prompt=prompt, **{"max_tokens": 6} | params)


def test_a_prompt_goes_on_as_transformers_has_it(client, encode, theirs) -> None:
    ids = torch.tensor([encode(PROMPTS[0])])
    expected = theirs.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    answer = complete(client, PROMPTS[0], logprobs=0)
    end = 2
    told = expected[: expected.index(end)] if end in expected else expected
    assert answer.usage.completion_tokens == len(told)
    assert len(answer.choices[0].logprobs.tokens) == len(expected)


def test_echoed_likelihoods_are_those_of_transformers(client, encode, theirs) -> None:
    ids = encode(PROMPTS[0])
    with torch.no_grad():
        logprob = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprob[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    answer = complete(client, ids, echo=True, logprobs=1, max_tokens=1).choices[0]
    assert answer.logprobs.token_logprobs[0] is None and answer.logprobs.top_logprobs[0] is None
    # bfloat16 weights on both sides; sums in another order
    assert answer.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=2e-2)
    assert answer.text.startswith(PROMPTS[0])


def test_the_best_of_many_answers_are_told_the_likeliest_first(client) -> None:
    """They are those that the same seeds give one by one; all are paid for."""
    asked = {"temperature": 1.5, "seed": 5, "logprobs": 0, "extra_body": {"ignore_eos": True}}
    every = complete(client, PROMPTS, n=6, **asked)
    told = complete(client, PROMPTS, n=2, best_of=6, **asked)

    def worth(choice) -> float:
        return -sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    expected = [c for first in (0, 6) for c in sorted(every.choices[first : first + 6], key=worth)[:2]]
    assert [c.text for c in told.choices] == [c.text for c in expected]
    assert len({c.text for c in every.choices}) > 6 and [c.index for c in told.choices] == [0, 1, 2, 3]
    assert told.usage == every.usage
    quiet = complete(client, PROMPTS, n=2, best_of=6, **asked | {"logprobs": None})
    assert [c.text for c in quiet.choices] == [c.text for c in expected] and quiet.choices[0].logprobs is None


def harness_reads(choice, ctxlen: int) -> tuple[float, bool]:
    """A continuation's likelihood and whether it is greedy, as lm-eval 0.4 takes them from a body."""
    told = choice["logprobs"]
    logprobs, tops = told["token_logprobs"][ctxlen:-1], told["top_logprobs"][ctxlen:-1]
    return sum(logprobs), all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True))


def test_a_harness_finds_the_likelihood_of_a_continuation(served, encode) -> None:
    """One token is made after what is echoed, even where the model ends at once: the harness cuts one off."""
    context, whole = encode("a blue key"), encode("a blue key and nothing else")
    body = {"prompt": [whole, whole], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    model, processor = served.sampler.model, served.sampler.processor
    for bias in ({}, {"2": 100}):
        choices = httpx.post(f"{served.url}/v1/completions", json=body | {"logit_bias": bias}).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert all(len(choice["logprobs"]["tokens"]) == len(whole) + 1 for choice in choices)
        builder = processor.prompt(())
        for index in whole:
            builder.token(index)
        with torch.no_grad():
            logprob = model.logits(model(pack([builder.build()]))).log_softmax(-1)
        expected = sum(float(logprob[i, whole[i + 1]]) for i in range(len(context) - 1, len(whole) - 1))
        found, greedy = harness_reads(choices[0], len(context))
        assert found == pytest.approx(expected, abs=1e-3) and not greedy


def test_a_greedy_continuation_is_found_greedy(served, client, encode) -> None:
    context = encode(PROMPTS[1])
    made = served.sampler.complete(
        Request(parts=(), tokens=tuple(context), want="text", params=SamplingParams(max_tokens=4))
    )
    body = {"prompt": [*context, *made.tokens], "max_tokens": 1, "logprobs": 1, "echo": True}
    [choice] = httpx.post(f"{served.url}/v1/completions", json=body).json()["choices"]
    assert harness_reads(choice, len(context))[1]


def test_offsets_point_into_the_text(client) -> None:
    choice = complete(client, PROMPTS[0], echo=True, logprobs=2, temperature=1.0, seed=4).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.text_offset) == len(told.token_logprobs) == len(told.top_logprobs)
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith("bytes:") and "\ufffd" not in choice.text[:offset]:
            assert choice.text[offset:].startswith(token) or offset == len(choice.text)
    assert all(2 <= len(top) <= 3 for top in told.top_logprobs[1:])
    assert all(sum(map(math.exp, top.values())) <= 1 + 1e-6 for top in told.top_logprobs[1:])


def test_text_and_ids_and_lists_of_both_are_one(client, encode) -> None:
    alone = [complete(client, prompt).choices[0].text for prompt in PROMPTS]
    assert [complete(client, encode(prompt)).choices[0].text for prompt in PROMPTS] == alone
    for prompt in (PROMPTS, [encode(prompt) for prompt in PROMPTS]):
        answer = complete(client, prompt, n=2)
        assert [choice.text for choice in answer.choices] == [alone[0]] * 2 + [alone[1]] * 2
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == sum(len(encode(prompt)) for prompt in PROMPTS)


def test_a_stream_says_the_same(client) -> None:
    for params in ({}, {"echo": True, "logprobs": 1}, {"echo": True, "max_tokens": 0}):
        whole = complete(client, PROMPTS, **params)
        usage = {"include_usage": True}
        chunks = list(complete(client, PROMPTS, stream=True, stream_options=usage, **params))
        for index, choice in enumerate(whole.choices):
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
            assert "".join(c.text for c in mine) == choice.text
            assert mine[-1].finish_reason == choice.finish_reason
            if choice.logprobs:
                rows = [x for c in mine if c.logprobs for x in c.logprobs.token_logprobs]
                offsets = [x for c in mine if c.logprobs for x in c.logprobs.text_offset]
                assert (rows, offsets) == (choice.logprobs.token_logprobs, choice.logprobs.text_offset)
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_stop_string_ends_a_completion(client) -> None:
    text = complete(client, PROMPTS[0], max_tokens=12).choices[0].text
    stop = text[3:5]
    choice = complete(client, PROMPTS[0], max_tokens=12, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def states(served, text: str) -> torch.Tensor:
    builder = served.sampler.processor.prompt((Text(text=text, role=Role.NONE),))
    with torch.no_grad():
        return served.sampler.model(pack([builder.build()])).float()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_is_the_pooled_states_of_length_one(served, client, pooling: str) -> None:
    made = client.embeddings.create(model="llama", input=PROMPTS, extra_body={"pooling": pooling})
    for text, found in zip(PROMPTS, made.data, strict=True):
        x = states(served, text)
        expected = torch.nn.functional.normalize(x.mean(0) if pooling == "mean" else x[-1], dim=0)
        assert found.embedding == pytest.approx(expected.tolist(), abs=1e-5)
        assert np.linalg.norm(found.embedding) == pytest.approx(1, abs=1e-5)
    assert made.usage.prompt_tokens == sum(len(states(served, text)) for text in PROMPTS)


def test_an_embedding_comes_as_numbers_or_packed(served, client, encode) -> None:
    body = {"input": PROMPTS[0], "encoding_format": "base64"}
    packed = httpx.post(f"{served.url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    plain = client.embeddings.create(model="llama", input=encode(PROMPTS[0]), encoding_format="float")
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == pytest.approx(plain.data[0].embedding, abs=1e-6)


BAD = [
    ("completions", {}, "prompt must be"),
    ("completions", {"prompt": []}, "prompt must be"),
    ("completions", {"prompt": ["a", 3]}, "prompt must be"),
    ("completions", {"prompt": [[1], "a"]}, "prompt must be"),
    ("completions", {"prompt": [-1]}, "prompt must be"),
    ("completions", {"prompt": ""}, "the prompt has no tokens"),
    ("completions", {"prompt": [100_000]}, "the prompt names the id 100000"),
    ("completions", {"prompt": ["a"] * 129}, "at most 128"),
    ("completions", {"prompt": ["a"] * 20, "n": 8}, "at most 128"),
    ("completions", {"prompt": "a", "n": 9}, "n must be an integer from 1 to 8"),
    ("completions", {"prompt": "a", "logprobs": 21}, "logprobs must be an integer from 0 to 20"),
    ("completions", {"prompt": "a", "logprobs": True}, "logprobs must be an integer"),
    ("completions", {"prompt": "a", "suffix": "b"}, "suffix is not supported"),
    ("completions", {"prompt": "a", "best_of": 9}, "best_of must be an integer from 1 to 8"),
    ("completions", {"prompt": "a", "best_of": 2, "n": 3}, "raise best_of or lower n"),
    ("completions", {"prompt": "a", "best_of": 3, "stream": True}, "set stream to false"),
    ("completions", {"prompt": ["a"] * 20, "best_of": 8}, "at most 128"),
    ("completions", {"prompt": "a", "max_tokens": 0}, "from 1"),
    ("completions", {"prompt": "a " * 300}, "this model reads 256: shorten it"),
    ("completions", {"prompt": "\ud800"}, "surrogate"),
    ("embeddings", {"input": "a", "dimensions": 8}, "dimensions: this model was not trained"),
    ("embeddings", {"input": "a", "encoding_format": "int8"}, "'float' or 'base64'"),
    ("embeddings", {"input": ""}, "no tokens"),
    ("embeddings", {"input": "a", "pooling": "max"}, "'mean' or 'last'"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "reason"), BAD)
def test_what_cannot_be_done_is_refused_with_its_mend(served, path: str, body: dict, reason: str) -> None:
    import json

    answer = httpx.post(f"{served.url}/v1/{path}", content=json.dumps(body), timeout=30)
    assert answer.status_code == 400 and reason in answer.json()["error"]["message"], answer.text
