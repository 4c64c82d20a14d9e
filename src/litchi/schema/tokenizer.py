"""Byte-level BPE with control tokens that typed text can never produce, from the `tokenizers` library."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from litchi.schema.sample import Role
from litchi.schema.speech import Sounds
from litchi.schema.spelling import Spellings

PAD, END, PICTURE, PATCH = "<|pad|>", "<|end|>", "<|image|>", "<|patch|>"
"""Padding, end of a turn, "a picture follows", and the placeholder under a vector."""

ROLES = {role: f"<|{role.value}|>" for role in Role if role is not Role.NONE}


class Tokenizer:
    """Text to ids and back. Control tokens are addressed by name through `control`, never by typing them."""

    def __init__(self, backend: Backend) -> None:
        backend.encode_special_tokens = True  # a user who types <|end|> has typed seven characters
        self.backend = backend
        self.pad, self.end, self.picture, self.patch = (self.control(name) for name in (PAD, END, PICTURE, PATCH))
        self.ends = frozenset({self.end})
        self.roles = {role: self.control(name) for role, name in ROLES.items()}

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int, actions: Sequence[str] = (), phrases: int = 0
    ) -> Tokenizer:
        """Learn merges from texts: first within words, then `phrases` more that join words (SuperBPE, Liu et al. 2025).

        `actions` are further control tokens, one for each discrete action. Phrases come on top of `vocab_size`.
        """
        texts = list(texts)
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, END, PICTURE, PATCH, *ROLES.values(), *actions],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(join_words(backend, texts, phrases) if phrases else backend)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        return cls(Backend.from_file(str(path)))

    def save(self, path: Path) -> None:
        self.backend.save(str(path), pretty=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def control(self, name: str) -> int:
        """The id of a control token. Raises KeyError if the vocabulary has none of that name."""
        index = self.backend.token_to_id(name)
        if index is None:
            raise KeyError(f"the tokenizer has no control token {name!r}")
        return index

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def spellings(self) -> Spellings:
        return Spellings(self.backend)

    @cached_property
    def sounds(self) -> Sounds:
        return Sounds(self.backend)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)


def join_words(backend: Backend, texts: Iterable[str], count: int) -> Backend:
    """The same tokenizer with up to `count` merges more that cross the borders of words, the most frequent first.

    Only pieces are joined of which one nearly always stands beside the other, and no digit: what is fixed is read in
    one step, and what can vary, a colour or a place, keeps a token of its own.
    """
    counted = Counter(texts)
    pieces = [backend.encode(text, add_special_tokens=False).tokens for text in counted]
    weights = list(counted.values())
    single: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    holders: dict[tuple[str, str], set[int]] = {}

    def tally(index: int, sign: int) -> None:
        for word in pieces[index]:
            single[word] += sign * weights[index]
        for pair in pairwise(pieces[index]):
            pairs[pair] += sign * weights[index]
            holders.setdefault(pair, set()).add(index)

    for index in range(len(pieces)):
        tally(index, 1)
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        fixed = [pair for pair, n in pairs.items() if n > 0 and inseparable(pair, n, single)]
        if not fixed:
            break
        best = min(fixed, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for index in sorted(holders.pop(best)):
            tally(index, -1)
            pieces[index] = merged(pieces[index], best)
            tally(index, 1)
    state = json.loads(backend.to_str())
    for left, right in merges:
        state["model"]["vocab"].setdefault(left + right, len(state["model"]["vocab"]))
        state["model"]["merges"].append([left, right])
    state["pre_tokenizer"]["use_regex"] = False
    return Backend.from_str(json.dumps(state))


TOGETHER = 0.8
"""Of the occurrences of the rarer of two pieces, how many must be beside the other."""


def inseparable(pair: tuple[str, str], together: int, single: Counter[str]) -> bool:
    rarer = min(single[pair[0]], single[pair[1]])
    return together >= TOGETHER * rarer and not any(c.isdigit() for c in "".join(pair))


def merged(words: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every occurrence of a pair joined, from the left."""
    out: list[str] = []
    for word in words:
        if out and (out[-1], word) == pair:
            out[-1] += word
        else:
            out.append(word)
    return out
