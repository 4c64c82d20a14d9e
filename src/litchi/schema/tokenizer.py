"""Byte-level BPE with control tokens that typed text can never produce, from the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from litchi.schema.sample import Role

PAD, END, PICTURE, PATCH = "<|pad|>", "<|end|>", "<|image|>", "<|patch|>"
"""Padding, end of a turn, "a picture follows", and the placeholder under a vector."""

ROLES = {role: f"<|{role.value}|>" for role in Role if role is not Role.NONE}


class Tokenizer:
    """Text to ids and back. Control tokens are addressed by name through `control`, never by typing them."""

    def __init__(self, backend: Backend) -> None:
        backend.encode_special_tokens = True  # a user who types <|end|> has typed seven characters
        self.backend = backend
        self.pad, self.end, self.picture, self.patch = (self.control(name) for name in (PAD, END, PICTURE, PATCH))
        self.roles = {role: self.control(name) for role, name in ROLES.items()}

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, actions: Sequence[str] = ()) -> Tokenizer:
        """Learn merges from texts. `actions` are further control tokens, one for each discrete action."""
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
        return cls(backend)

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

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)
