"""The bytes of the tokens of a text are the bytes of the text, whichever way the tokenizer writes them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from litchi.schema.spelling import LETTERS, Spellings, shown
from litchi.schema.tokenizer import END, Tokenizer

OWN = Tokenizer.train(["where is the red ball", "荔枝 is a fruit"], vocab_size=300)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text())
def test_bytes_of_tokens_are_the_bytes_of_the_text(text: str) -> None:
    assert b"".join(OWN.spellings[index] for index in OWN.encode(text)) == text.encode()


def test_every_byte_has_one_letter() -> None:
    assert sorted(LETTERS.values()) == list(range(256))


def test_a_control_token_is_spelled_by_its_name() -> None:
    assert OWN.spellings[OWN.end] == END.encode()


def test_sentencepiece_writes_bytes_and_spaces_in_its_own_way() -> None:
    vocab = {"<unk>": 0, "\u2581a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    spellings = Spellings(backend)
    assert (spellings[1], spellings[2 + 0xE8]) == (b" a", b"\xe8")


def test_half_a_character_is_shown_as_bytes() -> None:
    assert (shown("荔".encode()), shown("荔".encode()[:2])) == ("荔", "bytes:\\xe8\\x8d")
