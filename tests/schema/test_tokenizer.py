"""Text to tokens and back: phrases shorten what is fixed and leave alone what can vary."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from litchi.schema.chat import built, rename
from litchi.schema.tokenizer import Tokenizer
from tests.schema.test_chat import FAMILIES, each_case, tokenizer

laws = settings(max_examples=60, deadline=None, derandomize=True)
COLOURS = ("red", "green", "blue", "grey")
ANSWERS = [
    f"There is a {colour} {kind} at row {row}, column {column}."
    for colour in COLOURS
    for kind in ("ball", "box")
    for row in range(1, 4)
    for column in range(1, 4)
]
QUESTIONS = [
    f"{ask} {colour} {kind}?" for ask in ("Where is the", "Draw my") for colour in COLOURS for kind in ("ball", "box")
]
TEXTS = ANSWERS + 9 * QUESTIONS


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=400)


@pytest.fixture(scope="module")
def phrased() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=400, phrases=20)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([index]) for index in tokenizer.encode(text)]


def test_phrases_join_what_always_stands_together(plain: Tokenizer, phrased: Tokenizer) -> None:
    assert pieces(plain, TEXTS[0])[:4] == ["There", " is", " a", " red"]
    assert pieces(phrased, TEXTS[0]) == ["There is a", " red", " ball", " at row", " 1", ", column", " 1", "."]


def test_phrases_leave_apart_what_can_vary(phrased: Tokenizer) -> None:
    for index in range(len(phrased)):
        piece = phrased.decode([index])
        words = piece.split()
        assert len(words) == 1 or not any(word in COLOURS or word.isdigit() for word in words), piece


def test_fewer_phrases_are_made_when_nothing_more_is_fixed() -> None:
    few, many = (Tokenizer.train(TEXTS, vocab_size=400, phrases=n) for n in (20, 2_000))
    assert len(few) == len(many)


@laws
@given(st.text(max_size=60))
def test_any_text_comes_back(phrased: Tokenizer, text: str) -> None:
    assert phrased.decode(phrased.encode(text)) == text


@laws
@given(st.sampled_from(["<|end|>", "<|user|>", "<|image|>", "There is a<|end|>"]))
def test_a_typed_control_token_stays_text(phrased: Tokenizer, text: str) -> None:
    assert phrased.end not in phrased.encode(text)
    assert phrased.decode(phrased.encode(text)) == text


def test_phrases_survive_a_file(phrased: Tokenizer, tmp_path) -> None:
    phrased.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert all(again.encode(text) == phrased.encode(text) for text in TEXTS)


@each_case
def test_a_tokenizer_that_is_handed_over_is_the_one_that_is_read(family: str, kind: str) -> None:
    backend = tokenizer(kind, FAMILIES[family][3])
    backend.add_tokens(["two words", AddedToken("<tool>", lstrip=True, normalized=False)])
    state = json.loads(backend.to_str())
    renamed = rename(state, {"</s>": "secretword"})
    for each in (state, renamed):
        assert json.loads(built(each).to_str()) == json.loads(Backend.from_str(json.dumps(each)).to_str())
    assert built(renamed).token_to_id("secretword") == backend.token_to_id("</s>")
