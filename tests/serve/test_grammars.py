"""An answer matches the grammar that was asked for, and no grammar harms the server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import httpx
import pytest

from litchi.cli import load_sampler
from litchi.config import BadInput
from litchi.schema.request import Grammar
from litchi.serve import trial
from litchi.serve.grammars import _escaped as escaped
from litchi.serve.trial import check

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance", reason="pip install litchi[serve]")
SAID = [{"role": "user", "content": "where is the red ball"}]
ROOM = {
    "type": "object",
    "properties": {"row": {"type": "integer", "minimum": 1, "maximum": 9}, "colour": {"enum": ["red", "blue"]}},
    "required": ["row", "colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tiny(served_by) -> Iterator[object]:
    with served_by(load_sampler("tiny"), max_text=100_000) as served:
        yield served


@pytest.fixture(scope="module")
def client(tiny):
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, **params):
    extra = {name: params.pop(name) for name in tuple(params) if name.startswith(("guided", "structured"))}
    known = {"model": "tiny", "messages": SAID, "max_tokens": 120, "temperature": 1.0, "seed": 4}
    return client.chat.completions.create(**known | params, extra_body=extra).choices[0]


def is_room(text: str) -> bool:
    found = json.loads(text)
    return found.keys() == {"row", "colour"} and found["row"] in range(1, 10) and found["colour"] in ("red", "blue")


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_json_of_the_schema(client, seed: int) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "room", "schema": ROOM, "strict": True}}
    answer = ask(client, response_format=format, seed=seed)
    assert is_room(answer.message.content) and answer.finish_reason == "stop"
    assert is_room(ask(client, guided_json=ROOM, seed=seed).message.content)
    assert is_room(ask(client, structured_outputs={"json": json.dumps(ROOM)}, seed=seed).message.content)


def test_openais_client_parses_an_answer_into_a_class(client) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Place(pydantic.BaseModel):
        row: int = pydantic.Field(ge=1, le=9)
        empty: bool

    answer = client.chat.completions.parse(model="tiny", messages=SAID, response_format=Place, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Place)


def test_an_answer_is_an_object(client) -> None:
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=400, temperature=0)
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.lstrip().startswith("{")


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_matches_an_expression(client, seed: int) -> None:
    pattern = r"row [1-9](, column [1-9]){1,3}\."
    for more in ({"guided_regex": pattern}, {"structured_outputs": {"regex": pattern}}):
        assert re.fullmatch(pattern, ask(client, seed=seed, **more).message.content)


def test_an_answer_is_one_of_the_choices(client) -> None:
    choices = ["a.b", "c|d", "(e)", "f\\g"]
    assert ask(client, guided_choice=choices).message.content in choices
    assert [ask(client, guided_choice=[choice]).message.content for choice in choices] == choices


def test_a_grammar_holds_for_plain_text_streams_and_every_answer(client) -> None:
    made = client.completions.create(
        model="tiny", prompt="the ball", max_tokens=20, n=3, temperature=1.5, extra_body={"guided_regex": "(yes|no)!"}
    )
    assert all(choice.text in ("yes!", "no!") for choice in made.choices)
    chunks = client.chat.completions.create(
        model="tiny", messages=SAID, stream=True, extra_body={"guided_regex": "(yes|no)!"}
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) in ("yes!", "no!")


def test_greedy_takes_the_likeliest_that_the_grammar_allows(client) -> None:
    free = ask(client, temperature=0, max_tokens=1, logprobs=True, top_logprobs=20).logprobs.content[0]
    likeliest = next(row.token for row in free.top_logprobs if row.token.isalpha())
    bound = ask(client, temperature=0, max_tokens=1, guided_regex="[a-z]+ ?[a-z]*").message.content
    assert bound == likeliest or not likeliest.islower()


@pytest.mark.parametrize("text", ["a.b", "c|d", "(e)", "f\\g", "x-y [z]{2} ^$ #&~ /", "荔枝"])
def test_an_escaped_text_matches_itself(text: str) -> None:
    assert re.fullmatch(escaped(text), text)
    check(Grammar("regex", escaped(text)))


deep: dict = {"type": "object"}
for _ in range(40):
    deep = {"type": "object", "properties": {"a": deep}}
wide = {"allOf": [{"anyOf": [{"required": [f"p{i}_{j}"]} for j in range(8)]} for i in range(8)]}
BAD = {
    "deep": ({"guided_json": deep}, "guided_json has more than 32 levels"),
    "many": ({"guided_json": {"enum": list(range(5000))}}, "4096 values"),
    "long": ({"guided_json": {"description": "x" * 40_000}}, "at most 32768 are read"),
    "long pattern": ({"guided_regex": "a" * 40_000}, "guided_regex has 40000 characters"),
    "choices": ({"guided_choice": ["a"] * 257}, "1 to 256"),
    "unreadable": ({"guided_regex": "(a"}, "does not work"),
    "nested": ({"guided_regex": "(" * 5000 + "a" + ")" * 5000}, "does not work"),
    "no lark": ({"guided_grammar": "start"}, "does not work"),
    "no schema": ({"guided_json": {"type": "nonsense"}}, "does not work"),
    "explodes": ({"guided_json": wide | {"additionalProperties": False}}, "does not work"),
    "fetches": ({"guided_json": {"$ref": "http://example.com/x"}}, "does not work"),
    "two": ({"guided_regex": "a", "guided_json": ROOM}, "an answer has one grammar"),
    "missing": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema is missing"),
    "format": ({"response_format": {"type": "xml"}}, "response_format.type must be"),
    "outputs": ({"structured_outputs": {"json": ROOM, "regex": "a"}}, "exactly one"),
    "kind": ({"guided_json": [1]}, "must be a JSON schema"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_too_much_or_means_nothing_is_refused(tiny, name: str) -> None:
    body, reason = BAD[name]
    answer = httpx.post(f"{tiny.url}/v1/chat/completions", json={"messages": SAID} | body, timeout=60)
    assert answer.status_code == 400 and reason in answer.json()["error"]["message"], answer.text
    assert httpx.get(f"{tiny.url}/health").status_code == 200


def test_a_compiler_that_hangs_is_ended_and_one_that_dies_is_told(monkeypatch) -> None:
    """Other programs stand in for a compiler that meets a grammar which nobody has thought of."""
    hangs, dies = ("too long", "import time; time.sleep(60)", 0.5), ("too much", "import os; os.abort()", 60)
    for fault, program, seconds in (hangs, dies):
        monkeypatch.setattr(trial.sys, "executable", "python3")
        monkeypatch.setattr(trial, "COMMAND", ["-c", program])
        monkeypatch.setattr(trial, "SECONDS", seconds)
        began = time.monotonic()
        with pytest.raises(BadInput, match=fault):
            check(Grammar("regex", fault))
        assert time.monotonic() - began < 30


def test_a_grammar_too_complex_for_one_token_ends_its_answer_only(client, tiny) -> None:
    """Every repetition doubles the states: what the limits of a step do not allow is told, and the next one works."""
    hard = "(" + "|".join(f"(.*{c}.{{200}})" for c in "abcdefgh") + "){5}"
    try:
        ask(client, guided_regex=hard, max_tokens=64)
    except openai.BadRequestError as error:
        assert "does not work" in str(error)
    assert ask(client, guided_regex="yes").message.content == "yes"
