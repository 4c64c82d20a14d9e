"""Every parameter of sampling, as OpenAI's client sends it, does to a real model's answer what it is for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx
import pytest

from litchi.cli import load_sampler
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Text
from tests.serve.test_chat import BLUE, user

openai = pytest.importorskip("openai")
SAID = [{"role": "user", "content": "where is the red ball"}]


@pytest.fixture(scope="module")
def tiny(served_by) -> Iterator[object]:
    with served_by(load_sampler("tiny"), max_tokens=2048) as served:
        yield served


@pytest.fixture(scope="module")
def client(tiny):
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(client):
    def one(**params: object):
        known = {"model": "tiny", "messages": SAID, "max_tokens": 12}
        other = {name: params.pop(name) for name in tuple(params) if name in EXTRA}
        extra = {"return_token_ids": True} | other
        return client.chat.completions.create(**known | params, extra_body=extra)

    return one


EXTRA = {"top_k", "min_p", "repetition_penalty", "stop_token_ids", "min_tokens", "ignore_eos", "prompt_logprobs"}


def ids(answer) -> list[int]:
    return answer.choices[0].token_ids


def test_a_bias_rules_an_id_in_or_out(ask) -> None:
    first = ids(ask())[0]
    assert first not in ids(ask(logit_bias={str(first): -100}))
    assert set(ids(ask(logit_bias={"300": 100}))) == {300}


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_keeps_from_saying_it_again_and_its_negative_makes_it(ask, name: str) -> None:
    """A bias makes one id win by some, so that only the penalty can end its row."""
    forced = {"logit_bias": {"300": 40}, "max_tokens": 24, "ignore_eos": True}
    assert ids(ask(**forced)).count(300) == 24
    counts = [ids(ask(**forced, **{name: p})).count(300) for p in (2.0, -2.0)]
    assert counts[1] == 24
    # Presence is taken once and cannot win against 40; frequency grows with every use.
    assert counts[0] == 24 if name == "presence_penalty" else counts[0] < 24


def test_repetition_is_penalised_in_what_was_read_as_well(ask) -> None:
    usual, other = ids(ask(max_tokens=40)), ids(ask(max_tokens=40, repetition_penalty=10.0))
    assert usual != other
    assert len(set(other)) / len(other) > len(set(usual)) / len(usual)


def test_one_candidate_is_greedy_by_each_of_the_truncations(ask) -> None:
    greedy = ids(ask())
    for only in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ids(ask(temperature=2.0, seed=5, **only)) == greedy
    assert ids(ask(temperature=2.0, seed=5)) != greedy
    assert ids(ask(temperature=2.0, seed=5)) == ids(ask(temperature=2.0, seed=5, top_k=-1))


def test_several_answers_are_those_of_seeds_counted_up(client) -> None:
    asked = {"model": "tiny", "messages": SAID, "max_tokens": 12, "temperature": 1.5}
    three = client.chat.completions.create(**asked, n=3, seed=40)
    alone = [client.chat.completions.create(**asked, seed=40 + i).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in three.choices] == alone
    assert len(set(alone)) > 1


def test_an_id_stops_the_answer_and_is_named(ask) -> None:
    told = ids(ask())
    place = next(i for i in range(2, len(told)) if told[i] not in told[:i])
    stopped = ask(stop_token_ids=[told[place]])
    assert ids(stopped) == told[:place]
    assert (stopped.choices[0].finish_reason, stopped.choices[0].stop_reason) == ("stop", told[place])


def test_a_stop_string_is_named(ask) -> None:
    text = ask().choices[0].message.content
    stopped = ask(stop=["never said", text[4:7]])
    assert stopped.choices[0].message.content == text[: text.index(text[4:7])]
    assert stopped.choices[0].stop_reason == text[4:7]


def test_an_answer_is_as_long_as_it_must_be(ask, tiny) -> None:
    """A picture would end the answer as well: it is ruled out by a bias, and until `min_tokens` by itself."""
    end, picture = tiny.sampler.processor.tokenizer.end, tiny.sampler.processor.tokenizer.picture
    drawn = ask(max_tokens=100)
    assert ids(drawn)[-1] == picture and picture not in ids(ask(max_tokens=30, min_tokens=30))
    blind = {"messages": [user("what do you see", BLUE)], "logit_bias": {str(picture): -100}}
    usual = ask(max_tokens=100, **blind)
    assert usual.choices[0].finish_reason == "stop"
    count = len(ids(usual))
    longer = ask(max_tokens=100, min_tokens=count + 5, **blind)
    assert len(ids(longer)) >= count + 5 and ids(longer)[:count] == ids(usual) and end not in ids(longer)
    deaf = ask(max_tokens=count + 9, ignore_eos=True, **blind)
    assert len(ids(deaf)) == count + 9 and ids(deaf)[count] == end
    assert deaf.choices[0].finish_reason == "length"


def test_a_stop_string_waits_for_the_shortest_answer(ask) -> None:
    text = ask(max_tokens=12).choices[0].message.content
    first = text.split()[0]
    stopped = ask(max_tokens=30, stop=[first], min_tokens=6)
    assert len(ids(stopped)) >= 6 and stopped.choices[0].message.content.startswith(first)


def test_both_names_of_the_longest_answer_hold(ask) -> None:
    assert len(ids(ask(max_tokens=3))) == 3
    assert len(ids(ask(max_tokens=9, max_completion_tokens=4))) == 4


def test_logprobs_are_the_models_own_whatever_bends_the_choice(ask) -> None:
    """A bias changes what is said first, and not what it was worth."""
    answer = ask(logprobs=True, top_logprobs=5)
    rows = answer.choices[0].logprobs.content
    assert [row.id for row in rows] == ids(answer)
    for row in rows:
        assert (
            len(row.top_logprobs) == 5
            and row.logprob == row.top_logprobs[0].logprob
            and row.token == row.top_logprobs[0].token
        )
        worth = [each.logprob for each in row.top_logprobs]
        assert worth == sorted(worth, reverse=True) and sum(map(math.exp, worth)) <= 1 + 1e-6
    second = rows[0].top_logprobs[1]
    other = ask(logprobs=True, logit_bias={str(second.id): 100}, max_tokens=1)
    assert other.choices[0].logprobs.content[0].logprob == second.logprob
    assert b"".join(bytes(row.bytes) for row in rows).decode() == answer.choices[0].message.content


def test_a_stream_tells_the_same_logprobs(client, ask) -> None:
    asked = {"model": "tiny", "messages": SAID, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    rows = ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [row for c in chunks if c.choices[0].logprobs for row in c.choices[0].logprobs.content]
    assert [r.model_dump() for r in streamed] == [r.model_dump() for r in rows]


def test_the_prompt_is_told_token_by_token(ask, tiny) -> None:
    answer = ask(prompt_logprobs=3)
    rows = answer.choices[0].prompt_logprobs
    assert len(rows) == answer.usage.prompt_tokens + 1  # and the token that opens the answer
    assert rows[0] is None and all(3 <= len(row) <= 4 for row in rows[1:])
    assert ids(answer) == ids(ask())
    part = (Text(text=SAID[0]["content"], role=Role.USER),)
    told = tiny.sampler.complete(Request(parts=part, params=SamplingParams(max_tokens=1, prompt_logprobs=0)))
    assert [row[str(s.token)]["logprob"] for row, s in zip(rows[1:], told.prompt[1:], strict=True)] == [
        s.logprob for s in told.prompt[1:]
    ]


BAD = {
    "n": (9, "from 1 to 8"),
    "top_logprobs": (21, "from 0 to 20"),
    "logit_bias": ({str(i): 1 for i in range(1025)}, "at most 1024"),
    "stop": (["x" * 257], "at most 256 characters"),
    "stop_token_ids": (list(range(65)), "at most 64"),
    "min_p": (1.5, "from 0 to 1"),
    "presence_penalty": (3, "from -2 to 2"),
    "frequency_penalty": (-3, "from -2 to 2"),
    "repetition_penalty": (0, "from 0.01 to 10"),
    "min_tokens": (2049, "from 0 to 2048"),
    "max_tokens": (2049, "from 1 to 2048"),
    "ignore_eos": ("yes", "true or false"),
    "prompt_logprobs": (21, "from 0 to 20"),
    "top_k": (-2, "from -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_too_much_names_the_field_and_the_limit(tiny, name: str) -> None:
    value, limit = BAD[name]
    answer = httpx.post(f"{tiny.url}/v1/chat/completions", json={"messages": SAID, name: value})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and name in message and limit in message


@pytest.mark.parametrize(
    ("name", "value"), [("logit_bias", {"672": 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"3": 101}),
                        ("stop_token_ids", [672]), ("stop_token_ids", [True]), ("top_logprobs", 3)],
)  # fmt: skip
def test_what_means_nothing_is_refused(tiny, name: str, value: object) -> None:
    answer = httpx.post(f"{tiny.url}/v1/chat/completions", json={"messages": SAID, name: value})
    assert answer.status_code == 400 and name in answer.json()["error"]["message"]
