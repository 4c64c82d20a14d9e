"""The text of ids that come one by one, each read once: after every id the same as decoding all of them again.

Two decoders are followed step by step: byte-level BPE's, whose tokens are bytes that are read as UTF-8 in the end, and
SentencePiece's, where tokens of single bytes stand for a character only if a whole run of them does. Any other decoder
may do to a text what it likes, and decodes all ids again.
"""

from __future__ import annotations

import codecs
import json

from tokenizers import Tokenizer as Backend

from litchi.schema.spelling import BYTE, LETTERS

PIECES = (
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class Sounds:
    """What each id of a tokenizer adds to a text: bytes, a piece of text, or None for a control token."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.silent = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        steps = tuple(decoder.get("decoders", ()))
        self.byte_level = decoder.get("type") == "ByteLevel"
        self.pieces = steps[:3] == PIECES and steps[3:] in ((), (STRIP,))
        self.strips = steps[3:] == (STRIP,)
        self.known: dict[int, bytes | str | None] = {}

    def of(self, index: int) -> bytes | str | None:
        if index not in self.known:
            token = self.backend.id_to_token(index)
            self.known[index] = None if token is None or token in self.silent else self.sound(token)
        return self.known[index]

    def sound(self, token: str) -> bytes | str:
        if self.byte_level:
            return bytes(LETTERS[c] for c in token) if all(c in LETTERS for c in token) else token.encode()
        byte = BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ")


class Speech:
    """One text as it grows. It equals `Tokenizer.decode` of all ids that were added."""

    def __init__(self, sounds: Sounds) -> None:
        self.sounds, self.settled, self.open = sounds, "", b""
        self.ids: list[int] = []
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, index: int) -> str:
        """The text with one more token."""
        if not (self.sounds.byte_level or self.sounds.pieces):
            self.ids.append(index)
            return self.text
        match self.sounds.of(index):
            case bytes(sound) if self.sounds.byte_level:
                self.settled += self.decoder.decode(sound)
                self.open = self.decoder.getstate()[0]
            case bytes(sound):
                self.open += sound
            case str(sound):
                self.settled, self.open = self.settled + self.run + sound, b""
        return self.text

    @property
    def text(self) -> str:
        if self.sounds.byte_level:
            return self.settled + self.open.decode(errors="replace")
        if self.sounds.pieces:
            text = self.settled + self.run
            return text[1:] if self.sounds.strips and text.startswith(" ") else text
        return self.sounds.backend.decode(self.ids, skip_special_tokens=True)

    @property
    def run(self) -> str:
        """What the last tokens of single bytes say together: characters, or a mark for each if they are none."""
        try:
            return self.open.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(self.open)
