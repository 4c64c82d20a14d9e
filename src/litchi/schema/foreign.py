"""The processor of a language model that others trained: its own tokenizer, and turns laid out by its own template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer as Backend

from litchi.config import BadInput
from litchi.schema.chat import ChatTemplate, Message
from litchi.schema.processor import Builder, Noising, Processor
from litchi.schema.protocol import Codec
from litchi.schema.sample import Image, Part, Role, Text
from litchi.schema.sight import Eye, Seen
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

    def __init__(self, backend: Backend, config: ChatConfig, *, take: bool = False) -> None:
        """`take`: nobody else has `backend`, so that it need not be copied, which takes as long as to read it."""
        backend = backend if take else Backend.from_str(backend.to_str())
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
    """Conversations by the template, or plain text (role none) after the token that begins one.

    With `eye`, users may show pictures: the template says where with a control token, and each becomes the tokens that
    `eye` lays out, read one after another like words. `codec` is kept for a model that draws in a way of its own: no
    turn here is drawn with it.
    """

    def __init__(self, tokenizer: ForeignTokenizer, eye: Eye | None = None, *, codec: Codec | None = None) -> None:
        super().__init__(tokenizer, codec, {}, Noising())
        source = tokenizer.config.template
        bos, eos = tokenizer.config.bos, next(iter(tokenizer.config.ends), "")
        self.template = ChatTemplate(source, tokenizer.backend, bos=bos, eos=eos) if source else None
        self.eye = eye
        self.shown = tokenizer.control(eye.config.token) if eye is not None else -1
        if eye is not None and self.shown not in tokenizer.added:
            raise BadInput(f"{eye.config.token!r} is no control token of the tokenizer: people could type a picture")

    def prompt(self, parts: Sequence[Part], tools: Sequence[str] = ()) -> Builder:
        builder = Builder()
        self.extend(builder, parts, None, whole=False, tools=tools)
        return builder

    def extend(
        self,
        builder: Builder,
        parts: Sequence[Part],
        rng: np.random.Generator | None,
        *,
        whole: bool,
        tools: Sequence[str] = (),
    ) -> None:
        pictures = [part for part in parts if isinstance(part, Image)]
        texts = [self.text(part) for part in parts if not isinstance(part, Image)]
        if pictures and (self.eye is None or self.template is None):
            raise BadInput("this model reads text only, not images: leave them out")
        if all(part.role is Role.NONE for part in parts):
            for index in self.tokenizer.bos:
                builder.token(index)
            for text in texts:
                for index in self.tokenizer.encode(text.text):
                    builder.token(index, text.weight if rng is not None else 0.0)
            return
        if self.template is None:
            raise BadInput("this model has no chat template: it only continues plain text (role none)")
        turns = joined([part for part in parts if isinstance(part, (Text, Image))])
        begun = None if whole or turns[-1].role is not Role.ASSISTANT else turns.pop()
        tokens = self.template.encode(turns, opened=not whole, tools=tools)
        if (places := tokens.ids.count(self.shown)) != len(pictures):
            raise BadInput(f"the chat template shows {places} of {len(pictures)} pictures: show them in a user's turn")
        left = iter(pictures)
        for index, weight in zip(tokens.ids, tokens.weights, strict=True):
            if index == self.shown:
                self.show(builder, next(left))
            else:
                builder.token(index, weight if rng is not None else 0.0)
        for index in self.tokenizer.encode(begun.text) if begun is not None else ():
            builder.token(index)

    def show(self, builder: Builder, picture: Image) -> None:
        assert self.eye is not None and self.template is not None
        for found in self.eye.look(picture.pixels):
            if isinstance(found, Seen):
                builder.patches(found.value, found.place, found.index, found.steps, self.shown)
                continue
            for piece in self.template.speller.split(found):
                name = self.template.speller.secret.get(piece)
                for index in self.tokenizer.encode(piece) if name is None else [self.tokenizer.control(piece)]:
                    builder.token(index)

    def open(self, builder: Builder, parts: Sequence[Part]) -> None:
        """Nothing: `prompt` has already opened the turn, as the template does."""

    def text(self, part: Part) -> Text:
        if not isinstance(part, Text):
            raise BadInput(f"this model reads text only, not {type(part).__name__.lower()}s: leave them out")
        return part

    @property
    def sees(self) -> bool:
        return self.eye is not None

    @property
    def draws(self) -> bool:
        return False

    @property
    def controls(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added)


def joined(parts: Sequence[Text | Image]) -> list[Message]:
    """Neighbouring parts of one speaker are one turn; a picture stands where it was shown in its text."""
    turns: list[Message] = []
    for part in parts:
        # Each tool answers for itself.
        goes_on = turns and turns[-1].role is part.role is not Role.TOOL
        last = turns.pop() if goes_on else Message(part.role, "")
        if isinstance(part, Image):
            if part.role is Role.ASSISTANT:
                raise BadInput("this model draws no pictures: show them in a user's turn")
            turns.append(replace(last, pictures=(*last.pictures, len(last.text))))
        else:
            weight = max(last.weight, part.weight) if part.role is Role.ASSISTANT else 0.0
            turns.append(replace(last, text=last.text + part.text, weight=weight))
    return turns
