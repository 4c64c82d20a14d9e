"""Which bytes a token stands for: a text is made of characters, but a token may be half of one."""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer as Backend

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spellings:
    """The bytes of each id of a tokenizer; a control token is spelled by its name."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.added = set(backend.get_added_tokens_decoder())
        self.byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))
        self.known: dict[int, bytes] = {}

    def __getitem__(self, index: int) -> bytes:
        if index not in self.known:
            self.known[index] = self.spell(index, self.backend.id_to_token(index) or "")
        return self.known[index]

    def spell(self, index: int, piece: str) -> bytes:
        if index in self.added:
            return piece.encode()
        if self.byte_level:
            return b"".join(bytes([LETTERS[c]]) if c in LETTERS else c.encode() for c in piece)
        if byte := BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()


def byte_letters() -> dict[str, int]:
    """The letter by which byte-level BPE writes each byte (GPT-2): itself if it prints, otherwise one above 255."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = byte_letters()


def shown(spelling: bytes) -> str:
    """A spelling as text; bytes that are no whole character as OpenAI writes them."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
