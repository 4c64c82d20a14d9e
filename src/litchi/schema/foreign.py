"""The processor of a language model that others trained: its own tokenizer, and turns laid out by its own template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer as Backend

from litchi.config import BadInput
from litchi.schema.chat import ChatTemplate, Message
from litchi.schema.processor import Builder, Noising, Processor
from litchi.schema.sample import Part, Role, Text
from litchi.schema.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """What a checkpoint says of its text besides the tokenizer."""

    template: str = ""
    """Jinja; empty for a model that only continues text."""
    bos: str = ""
    ends: tuple[str, ...] = ()
    """Control tokens that end a turn."""
    pad: str = ""
    begins: bool = False
    """Whether plain text begins with `bos`."""


class ForeignTokenizer(Tokenizer):
    """A tokenizer with control tokens of its own; those of ours that it lacks are -1, an id that nothing samples."""

    def __init__(self, backend: Backend, config: ChatConfig) -> None:
        backend = Backend.from_str(backend.to_str())
        backend.encode_special_tokens = True  # a user who types a control token has typed its letters
        self.backend, self.config = backend, config
        self.picture = self.patch = -1
        self.added = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        self.ends = frozenset(self.control(name) for name in config.ends)
        self.end = min(self.ends, default=-1)
        self.pad = self.control(config.pad) if config.pad else max(self.end, 0)
        self.bos = [self.control(config.bos)] if config.begins and config.bos else []
        self.roles: dict[Role, int] = {}

    def control(self, name: str) -> int:
        index = self.backend.token_to_id(name)
        if index is None:
            raise BadInput(f"the tokenizer has no token {name!r}, which its configuration names: download both again")
        return index


class ForeignProcessor(Processor):
    """Text only: conversations by the template, or plain text (role none) after the token that begins one."""

    def __init__(self, tokenizer: ForeignTokenizer) -> None:
        super().__init__(tokenizer, None, {}, Noising())
        source = tokenizer.config.template
        bos, eos = tokenizer.config.bos, next(iter(tokenizer.config.ends), "")
        self.template = ChatTemplate(source, tokenizer.backend, bos=bos, eos=eos) if source else None

    def extend(self, builder: Builder, parts: Sequence[Part], rng: np.random.Generator | None, *, whole: bool) -> None:
        texts = [self.text(part) for part in parts]
        if all(text.role is Role.NONE for text in texts):
            for index in self.tokenizer.bos:
                builder.token(index)
            for text in texts:
                for index in self.tokenizer.encode(text.text):
                    builder.token(index, text.weight if rng is not None else 0.0)
            return
        if self.template is None:
            raise BadInput("this model has no chat template: it only continues plain text (role none)")
        turns = joined(texts)
        begun = None if whole or turns[-1].role is not Role.ASSISTANT else turns.pop()
        tokens = self.template.encode(turns, opened=not whole)
        for index, weight in zip(tokens.ids, tokens.weights, strict=True):
            builder.token(index, weight if rng is not None else 0.0)
        for index in self.tokenizer.encode(begun.text) if begun is not None else ():
            builder.token(index)

    def open(self, builder: Builder, parts: Sequence[Part]) -> None:
        """Nothing: `prompt` has already opened the turn, as the template does."""

    def text(self, part: Part) -> Text:
        if not isinstance(part, Text):
            raise BadInput(f"this model reads text only, not {type(part).__name__.lower()}s: leave them out")
        return part

    @property
    def controls(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added)


def joined(texts: Sequence[Text]) -> list[Message]:
    """Neighbouring texts of one speaker are one turn."""
    turns: list[Message] = []
    for text in texts:
        if turns and turns[-1].role is text.role:
            last = turns.pop()
            turns.append(Message(text.role, last.text + text.text, max(last.weight, text.weight)))
        else:
            turns.append(Message(text.role, text.text, text.weight if text.role is Role.ASSISTANT else 0.0))
    return turns
