"""Tokenizers that come with other people's weights: a tokenizer.json, or the tables in the metadata of a GGUF file.

Source of the splits: the tokenizer.json of each publisher, whose names llama.cpp gives in `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from litchi.config import BadInput
from litchi.schema.sentencepiece import backend_of, from_tables

WORDS = r"""[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens in `tokenizer.ggml.token_type`."""


def split(pattern: str) -> list:
    whole = pre_tokenizers.Split(Regex(SHORT_FORMS + pattern), "isolated", invert=False)
    return [whole, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


SPLITS = {
    "default": lambda: [byte_level()],
    "gpt-2": lambda: [byte_level()],
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), byte_level()],
    "llama-bpe": lambda: split(WORDS % r"\p{N}{1,3}"),
    "qwen2": lambda: split(WORDS % r"\p{N}"),
}


def from_file(path: Path) -> Backend:
    """Raises BadInput for a file that is missing or no tokenizer."""
    if not path.is_file():
        mend = "save the tokenizer with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise BadInput(f"{path} is missing, and so is tokenizer.model: {mend}")
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise BadInput(f"{path} is no tokenizer ({str(error)[:200]}): download it again") from error


def from_gguf(metadata: Mapping[str, Any]) -> Backend:
    """The BPE that a GGUF file carries, byte-level or sentencepiece's.

    Raises BadInput for another kind, or tables that do not fit.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return backend_of(from_tables(metadata).extended({}, frozenset(ends_of(metadata))))
    if kind != "gpt2":
        raise BadInput(
            f"GGUF: a tokenizer of kind {kind!r} is not read, gpt2 and llama are: convert the folder instead"
        )
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise BadInput(f"GGUF: words split as {name!r} are not known; these are: {', '.join(SPLITS)}")
    tokens, types = listed(metadata, "tokens"), listed(metadata, "token_type")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or len(types) != len(tokens):
        raise BadInput(
            "GGUF: tokenizer.ggml.tokens has repetitions, or is not as long as token_type: download it again"
        )
    backend = Backend(models.BPE(vocab, [pair(merge, vocab) for merge in listed(metadata, "merges")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[name]())
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return backend


def ends_of(metadata: Mapping[str, Any]) -> list[str]:
    """What begins, ends or fills a text: control tokens, whatever their type says."""
    tokens = listed(metadata, "tokens")
    found = [metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("bos", "eos", "eot", "eom", "padding")]
    return [tokens[index] for index in found if isinstance(index, int) and 0 <= index < len(tokens)]


def pair(merge: str, vocab: Mapping[str, int]) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= vocab.keys():
        raise BadInput(f"GGUF: the merge {merge[:80]!r} joins what the vocabulary does not hold: download it again")
    return left, right


def listed(metadata: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list):
        raise BadInput(f"GGUF: tokenizer.ggml.{key} is missing: convert the original folder instead")
    return found
