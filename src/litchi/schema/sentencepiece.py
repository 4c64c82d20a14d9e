"""The BPE models of sentencepiece as tokenizers of ours: out of a `.model` file, or the tables of a GGUF file.

Where sentencepiece looks for the two neighbours whose piece scores best, `tokenizers` has a list of merges; the list is
derived here from pieces and scores so that the ids are the same. What would not be the same is refused: unigram models,
normalisers that rewrite text, scores that tie. One thing is left as transformers and llama.cpp have it: a text that
begins with a user-defined piece has no dummy prefix before it. Sources: sentencepiece's `sentencepiece_model.proto`,
whose file is read as plain protobuf (https://protobuf.dev/programming-guides/encoding) and without trust.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from litchi.config import BadInput

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, in both formats."""

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

MAX_FILE, MAX_PIECE = 1 << 24, 256
"""Bytes of a file, and characters of a piece; the largest that are published have 4 MB and 100."""

MEND = "save the tokenizer with AutoTokenizer.from_pretrained(...).save_pretrained(...) and convert the folder again"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A vocabulary of sentencepiece: text, score and type of each id, and how a text begins."""

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    prefix: str = "first"
    """Where a space is put before: the "first" stretch of a text, "always" also behind a control token, or "never"."""
    bos: str = ""
    """The piece that begins a text."""

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.scores) == len(self.types):
            raise BadInput("the tables of the sentencepiece vocabulary are not of one length: download it again")

    def of(self, *types: int) -> list[str]:
        return [text for text, kind in zip(self.texts, self.types, strict=True) if kind in types]

    def extended(self, added: Mapping[int, str], special: Collection[str]) -> Pieces:
        """With pieces that a configuration adds, by their ids; those that `special` names are control tokens.

        So are user-defined pieces of such names: what a template writes, nobody may type.
        """
        texts, scores = list(self.texts), list(self.scores)
        theirs = zip(self.texts, self.types, strict=True)
        types = [CONTROL if kind == USER_DEFINED and text in special else kind for text, kind in theirs]
        for index, text in sorted(added.items()):
            if index == len(texts):
                texts, scores = [*texts, text], [*scores, 0.0]
                types.append(CONTROL if text in special else USER_DEFINED)
            elif index > len(texts) or texts[index] != text:
                here = repr(texts[index]) if index < len(texts) else f"behind the last, {len(texts) - 1}"
                raise BadInput(
                    f"the added token {text!r} has id {index}, which is {here}: download the tokenizer again"
                )
        return replace(self, texts=texts, scores=scores, types=types)


# ---- a tokenizer --------------------------------------------------------------------------------------------------


def backend_of(pieces: Pieces) -> Backend:
    """The tokenizer. Raises BadInput for a vocabulary whose ids the library cannot give."""
    check(pieces)
    vocab = {text: index for index, text in enumerate(pieces.texts)}
    merges = merges_of(scored(pieces))
    unknown, fallback = next(iter(pieces.of(UNKNOWN)), None), vocab.keys() >= set(BYTES)
    backend = Backend(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = prefixed(pieces.prefix)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if pieces.prefix == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    controls = [AddedToken(text, special=True, normalized=False) for text in pieces.of(UNKNOWN, CONTROL)]
    backend.add_special_tokens(controls)
    backend.add_tokens([AddedToken(text, normalized=True) for text in pieces.of(USER_DEFINED)])
    return backend


def scored(pieces: Pieces) -> dict[str, float]:
    """The pieces that merges make, and their scores."""
    rows = zip(pieces.texts, pieces.scores, pieces.types, strict=True)
    return {text: score for text, score, kind in rows if kind == NORMAL}


def prefixed(scheme: str) -> pre_tokenizers.PreTokenizer:
    """A space before a text, even before one that begins with a space, as sentencepiece has it.

    Metaspace puts none before its own mark. So its mark is a space here, of which the normaliser has left none, and a
    second one writes that space as sentencepiece does.
    """
    spaced = pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False)
    return pre_tokenizers.Sequence([spaced, pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)])


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best first."""
    merges: list[tuple[str, str]] = []
    for _, tied in groupby(sorted(scores, key=scores.__getitem__, reverse=True), key=scores.__getitem__):
        pieces = list(tied)
        cuts = [(piece[:at], piece[at:]) for piece in pieces for at in splits(piece)]
        pairs = [(left, right) for left, right in cuts if left in scores and right in scores]
        if len(pieces) > 1:  # runs of one character, of which the left one grows as long as it can
            pairs.sort(key=lambda pair: -len(pair[0]))
        merges += pairs
    return merges


def splits(piece: str) -> list[int]:
    """Where a piece may be cut, in the order in which its pairs are merged.

    Of two pairs that overlap and make the same piece sentencepiece takes the left one: of ab|a|ba it makes aba|ba. Here
    the earlier pair in the list is taken, so that "ab a" must stand before "a ba". They overlap where the piece goes on
    after `at` characters as it began.
    """
    order: list[int] = []
    for at in range(1, len(piece)):
        far = len(piece) - at
        if far > at and piece.startswith(piece[far:]) and not piece.startswith(piece[at:]):
            order.append(far)
        order.append(at)
    return list(dict.fromkeys(order))


def check(pieces: Pieces) -> None:
    texts, types = set(pieces.texts), set(pieces.types)
    if len(texts) < len(pieces.texts):
        raise BadInput("the sentencepiece vocabulary has a piece twice: download it again")
    if "" in texts or any(len(text) > MAX_PIECE for text in texts):
        raise BadInput(f"a sentencepiece is empty or has more than {MAX_PIECE} characters: download it again")
    if not types <= set(range(NORMAL, BYTE + 1)):
        raise BadInput(f"a sentencepiece is of the unknown type {max(types)}: {MEND}")
    if (found := set(pieces.of(BYTE))) and found != set(BYTES):
        raise BadInput(f"the sentencepiece vocabulary has {len(found)} pieces for bytes, not <0x00> to <0xFF>: {MEND}")
    if not found and not pieces.of(UNKNOWN):
        raise BadInput(f"the sentencepiece vocabulary has no piece for what it does not know: {MEND}")
    if short := [text for text in pieces.of(UNKNOWN, CONTROL, UNUSED) if len(text) == 1]:
        raise BadInput(f"the control token {short[0]!r} is one character, which anybody can type: {MEND}")
    if pieces.prefix != "never" and (led := [text for text in pieces.of(USER_DEFINED) if text[0] in " " + SPACE]):
        raise BadInput(f"the user-defined piece {led[0]!r} begins with a space, and so does every text: {MEND}")
    check_scores(pieces)


def check_scores(pieces: Pieces) -> None:
    """That merges have an order, and that the characters of what can be merged are pieces themselves."""
    scores = scored(pieces)
    merged = [text for text in scores if len(text) > 1]
    if not all(math.isfinite(scores[text]) for text in merged):
        raise BadInput(f"a score of the sentencepiece vocabulary is no number: {MEND}")
    count = Counter(scores[text] for text in merged)
    if tied := [text for text in merged if count[scores[text]] > 1 and len(set(text)) > 1]:
        raise BadInput(
            f"the score of the sentencepiece {tied[0]!r} is that of another, so that neither is first: {MEND}"
        )
    known = scores.keys() | set(pieces.of(USER_DEFINED))
    if unknown := [text for text in merged if not known >= set(text)]:
        raise BadInput(f"the sentencepiece {unknown[0]!r} has characters that are no pieces themselves: {MEND}")
    for text in pieces.of(UNUSED):
        if any({text[:at], text[at:]} <= scores.keys() for at in range(1, len(text))):
            raise BadInput(f"the sentencepiece {text!r} is unused and yet made of others: {MEND}")


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def from_tables(metadata: Mapping[str, Any]) -> Pieces:
    """The vocabulary of a GGUF file of kind `llama`. Raises BadInput for tables that are missing or no such."""
    known = (("tokens", str), ("scores", float), ("token_type", int))
    texts, scores, types = (table(metadata, key, kind) for key, kind in known)
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces") or metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise BadInput("GGUF: this tokenizer rewrites text before it cuts it, which is not read: convert the folder")
    prefix = "first" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    return Pieces(texts, scores, types, prefix)


def table(metadata: Mapping[str, Any], key: str, kind: type) -> list:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list) or not all(type(each) is kind for each in found):
        raise BadInput(f"GGUF: tokenizer.ggml.{key} is missing or holds something else: convert the original folder")
    return found


# ---- files --------------------------------------------------------------------------------------------------------

UNIGRAM, BPE = 1, 2
KINDS = {UNIGRAM: "unigram", 3: "word", 4: "char"}

SIZES = {1: 8, 2: 0, 5: 4}
"""Bytes of a field by its wire type; of 2 they are counted in front of it."""


def from_model(path: Path) -> Pieces:
    """The vocabulary of a `tokenizer.model`. Raises BadInput for what is none, or cuts text in another way."""
    size = path.stat().st_size
    if size > MAX_FILE:
        raise BadInput(f"{path} has {size} bytes, at most {MAX_FILE} are read: name a sentencepiece model")
    whole = Message(path, path.read_bytes())
    rows = [Message(path, value) for number, value in whole.fields() if number == 1 and isinstance(value, bytes)]
    texts, scores = [row.text(1) for row in rows], [row.real(2) for row in rows]
    types = [row.count(3, NORMAL) for row in rows]
    spec, rules, back = (Message(path, whole.raw(number)) for number in (2, 3, 5))
    if not texts:
        raise BadInput(f"{path} holds no pieces: name a sentencepiece model, or download it again")
    if (kind := spec.count(3, UNIGRAM)) != BPE:
        raise BadInput(f"{path} is a {KINDS.get(kind, 'strange')} model of sentencepiece, only BPE is read: {MEND}")
    refused = {
        "a table of characters that it replaces (precompiled_charsmap)": rules.raw(2) or back.raw(2),
        "collapsed spaces (remove_extra_whitespaces)": rules.count(4, 1),
        "spaces that stay spaces (escape_whitespaces)": not rules.count(5, 1),
        "spaces behind words (treat_whitespace_as_suffix)": spec.count(24, 0),
        "bytes that are no fallback (byte_fallback)": (BYTE in types) != bool(spec.count(35, 0)),
    }
    if why := [what for what, is_so in refused.items() if is_so]:
        raise BadInput(f"{path} asks for {why[0]}, which is not read: {MEND}")
    begin = spec.count(41, 1)
    bos = texts[begin] if begin < len(texts) else ""  # -1, for none, is a large number here
    prefix = "first" if rules.count(3, 1) else "never"
    return Pieces(texts, scores, types, prefix, bos)


class Message:
    """A protobuf message whose lengths are all checked. Of a field that is repeated `last` has the last."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data
        self.last = dict(self.fields())

    def fields(self) -> Iterator[tuple[int, int | bytes]]:
        at = 0
        while at < len(self.data):
            tag, at = self.varint(at)
            wire = tag & 7
            if wire == 0:
                value, at = self.varint(at)
                yield tag >> 3, value
                continue
            if wire not in SIZES:
                self.refuse(f"a field of the wire type {wire}")
            size, at = (SIZES[wire], at) if SIZES[wire] else self.varint(at)
            if size > len(self.data) - at:
                self.refuse(f"a field of {size} bytes where {len(self.data) - at} are left")
            yield tag >> 3, self.data[at : at + size]
            at += size

    def varint(self, at: int) -> tuple[int, int]:
        value = 0
        for place, byte in enumerate(self.data[at : at + 10]):
            value |= (byte & 127) << 7 * place
            if byte < 128:
                return value, at + place + 1
        self.refuse("a number without an end")

    def count(self, number: int, default: int) -> int:
        found = self.last.get(number, default)
        return found if isinstance(found, int) else self.refuse(f"no number as field {number}")

    def raw(self, number: int) -> bytes:
        found = self.last.get(number, b"")
        return found if isinstance(found, bytes) else self.refuse(f"a number as field {number}")

    def text(self, number: int) -> str:
        try:
            return self.raw(number).decode()
        except UnicodeDecodeError:
            self.refuse("text that is not UTF-8")

    def real(self, number: int) -> float:
        found = self.raw(number) or bytes(4)
        return struct.unpack("<f", found)[0] if len(found) == 4 else self.refuse(f"no 32 bits as field {number}")

    def refuse(self, what: str) -> NoReturn:
        raise BadInput(f"{self.path} is no sentencepiece model, it has {what}: download it again")
