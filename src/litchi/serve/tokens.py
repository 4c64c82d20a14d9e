"""Text to token ids and back, and what the tokenizer is, as the remote tokenizers of evaluation harnesses ask for it.

Unlike in a conversation, where what looks like a control token is only text, here it is one: whoever asks for ids says
himself what he does with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from tokenizers import Tokenizer as Backend

from litchi.config import BadInput
from litchi.schema.foreign import ForeignProcessor
from litchi.schema.processor import Processor
from litchi.schema.sample import Part
from litchi.serve.calls import Style, style_of
from litchi.serve.exchange import Desk
from litchi.serve.fields import Fields
from litchi.serve.limits import Limits
from litchi.serve.models import Models
from litchi.serve.params import read_ids
from litchi.serve.wire import check_text, read_messages, read_model

OWN_TEMPLATE = """\
{%- for message in messages -%}
    {{ '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""
"""How our own models lay out turns of text, for clients that render a conversation themselves."""


@dataclass(frozen=True)
class Words:
    """The tokenizer behind a sampler, and how many tokens its network reads (0: any number)."""

    processor: Processor | None
    max_length: int = 0

    @classmethod
    def of(cls, sampler: object) -> Words:
        """A sampler on a model has both; one at the other end of a wire may have neither."""
        model = getattr(sampler, "model", None)
        return cls(getattr(sampler, "processor", None), getattr(getattr(model, "config", None), "max_length", 0))

    @cached_property
    def style(self) -> Style:
        """How the model writes calls of tools."""
        processor = self.processor
        return style_of(processor.tokenizer.config.template if isinstance(processor, ForeignProcessor) else "")

    @property
    def known(self) -> Processor:
        if self.processor is None:
            raise BadInput("this server does not know the tokenizer of its model: send text")
        return self.processor

    @cached_property
    def parsing(self) -> Backend:
        """The tokenizer as one that finds control tokens in text."""
        backend = Backend.from_str(self.known.tokenizer.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def is_control(self, index: int) -> bool:
        return self.processor is not None and self.processor.is_control(index)

    def text(self, ids: Sequence[int]) -> str:
        return self.known.tokenizer.decode(ids)

    def ids(self, text: str) -> list[int]:
        return self.parsing.encode(text, add_special_tokens=False).ids

    def opened(self, parts: Sequence[Part]) -> list[int]:
        """The ids of a conversation whose answer comes next."""
        builder = self.known.prompt(parts)
        self.known.open(builder, parts)
        return builder.tokens

    def info(self) -> dict[str, Any]:
        """What a tokenizer_config.json says of it."""
        processor = self.known
        t = processor.tokenizer

        def name(index: int) -> str | None:
            return t.backend.id_to_token(index) if index >= 0 else None

        template, begin = OWN_TEMPLATE, None
        if isinstance(processor, ForeignProcessor):
            config = processor.tokenizer.config
            template, begin = config.template or None, config.bos or None
        told = {"tokenizer_class": type(t).__name__, "vocab_size": len(t), "chat_template": template}
        told |= {"bos_token": begin, "eos_token": name(t.end), "pad_token": name(t.pad)}
        return told | {"model_max_length": self.max_length or None}


class Tokens:
    """The endpoints."""

    def __init__(self, desk: Desk):
        self.desk, self.words = desk, Words.of(desk.worker.sampler)

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/tokenize", self.tokenize, methods=["POST"])
        router.add_api_route("/detokenize", self.detokenize, methods=["POST"])
        router.add_api_route("/tokenizer_info", self.info, methods=["GET"])
        return router

    async def tokenize(self, request: Request) -> Response:
        ids, strings = await self.desk.read(request, self.read_text)
        body = {"count": len(ids), "max_model_len": self.words.max_length or None, "tokens": ids}
        spellings = self.words.known.tokenizer.spellings
        told = [spellings[index].decode(errors="replace") for index in ids] if strings else None
        return JSONResponse(body | {"token_strs": told})

    async def detokenize(self, request: Request) -> Response:
        return JSONResponse({"prompt": await self.desk.read(request, self.read_ids)})

    async def info(self) -> Response:
        return JSONResponse(self.words.info())

    def read_text(self, body: dict[str, Any], models: Models, limits: Limits) -> tuple[list[int], bool]:
        """The ids that a body of /tokenize asks for, and whether their texts are wanted too."""
        fields = Fields(body)
        fields.known(
            ("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs")
        )
        read_model(fields, models)
        strings, begins = fields.flag("return_token_strs"), fields.flag("add_special_tokens", True)
        fields.neutral({"add_generation_prompt": (True,)})
        prompt = fields.text("prompt", "")
        check_text([prompt], limits)
        if fields.get("messages") is not None:
            parts, _ = read_messages(fields.objects("messages"), limits)
            return self.words.opened(parts), strings
        text = prompt or fields.text("prompt")
        tokenizer = self.words.known.tokenizer
        begin = getattr(tokenizer, "bos", []) if begins else []
        return [*begin, *self.words.ids(text)], strings

    def read_ids(self, body: dict[str, Any], models: Models, limits: Limits) -> str:
        fields = Fields(body)
        fields.known(("model", "tokens"))
        read_model(fields, models)
        if fields.get("tokens") is None:
            raise BadInput("tokens is missing; send a list of ids")
        ids, tokenizer = read_ids(fields, "tokens", limits.max_text), self.words.known.tokenizer
        if (most := max(ids, default=0)) >= len(tokenizer):
            raise BadInput(f"tokens names the id {most}, this tokenizer knows 0 to {len(tokenizer) - 1}")
        return tokenizer.backend.decode(list(ids), skip_special_tokens=False)
