"""What a harness asks of a remote tokenizer: ids, texts, names of control tokens, and how turns are laid out."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import jinja2
import pytest

from litchi.cli import load_sampler
from litchi.schema.sample import Role, Text
from tests.model.test_adopt import adopted, folder  # noqa: F401 (fixtures: a random Llama of transformers, adopted)

SAID = [{"role": "user", "content": "where is the red ball"}]


@pytest.fixture(scope="module")
def llama(adopted, served_folder) -> Iterator[object]:  # noqa: F811
    with served_folder(adopted) as served:
        yield served


@pytest.fixture(scope="module")
def tiny(served_by) -> Iterator[object]:
    with served_by(load_sampler("tiny"), api_key="open sesame") as served:
        yield served


@pytest.fixture(params=["llama", "tiny"])
def ask(request):
    served = request.getfixturevalue(request.param)
    with httpx.Client(base_url=served.url, headers={"Authorization": "Bearer open sesame"}) as client:
        client.sampler = served.sampler
        yield client


def ids(ask, **body: object) -> list[int]:
    answer = ask.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["count"] == len(answer.json()["tokens"])
    return answer.json()["tokens"]


def test_text_is_found_again(ask) -> None:
    text = "where is the red ball? 荔枝"
    made = ids(ask, prompt=text, add_special_tokens=False)
    assert made == ask.sampler.processor.tokenizer.encode(text)
    assert ask.post("/detokenize", json={"tokens": made}).json()["prompt"] == text


def test_names_of_control_tokens_are_one_id_as_harnesses_expect(ask) -> None:
    info = ask.get("/tokenizer_info").json()
    for name in (info["eos_token"], info["pad_token"]):
        assert ids(ask, prompt=name, add_special_tokens=False) == [ask.sampler.processor.tokenizer.control(name)]
        assert ask.post("/detokenize", json={"tokens": ids(ask, prompt=name)}).json()["prompt"] == name


def test_a_conversation_laid_out_by_the_told_template_has_the_ids_that_the_server_reads(ask) -> None:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        ask.get("/tokenizer_info").json()["chat_template"]
    )
    text = template.render(messages=SAID, add_generation_prompt=True)
    processor = ask.sampler.processor
    parts = (Text(text=SAID[0]["content"], role=Role.USER),)
    builder = processor.prompt(parts)
    processor.open(builder, parts)
    assert ids(ask, prompt=text, add_special_tokens=False) == ids(ask, messages=SAID) == builder.tokens


def test_strings_of_tokens_are_told_if_asked(ask) -> None:
    answer = ask.post("/tokenize", json={"prompt": "the red ball", "return_token_strs": True}).json()
    assert "".join(answer["token_strs"]).endswith("the red ball")
    assert answer["max_model_len"] == ask.sampler.model.config.max_length or answer["max_model_len"] is None


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/tokenizer_info", "/metrics", "/v1/models"])
def test_every_path_asks_for_the_key(tiny, path: str) -> None:
    answer = (
        httpx.get(tiny.url + path)
        if path in ("/metrics", "/tokenizer_info", "/v1/models")
        else httpx.post(tiny.url + path, json={})
    )
    assert answer.status_code == 401


def test_bad_bodies_are_refused(ask) -> None:
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": 3}), ("/detokenize", {"tokens": [10**6]}),
                       ("/detokenize", {"tokens": "a"}), ("/tokenize", {"prompt": "a", "promt": "b"})):  # fmt: skip
        assert ask.post(path, json=body).status_code == 400, (path, body)


def test_a_server_without_a_tokenizer_says_so(serve) -> None:
    with serve() as served:
        answer = httpx.post(f"{served.url}/tokenize", json={"prompt": "a"})
    assert answer.status_code == 400 and "send text" in answer.json()["error"]["message"]
