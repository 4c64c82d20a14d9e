"""The reference decoder is slow and obvious, one request at a time; engines and policies must equal it.

With `cached=False` every step reads the whole document again: the oracle. With a cache every step reads only what is
new.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from litchi.model.cache import KVCache
from litchi.model.lowrank import Adapters
from litchi.model.network import Model
from litchi.model.program import Program, Read
from litchi.schema.processor import Processor
from litchi.schema.request import Completion, Delta, Request
from litchi.schema.sequence import pack, window


class Generator:
    """A `Sampler` on one model, in this process."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        *,
        cached: bool = True,
        dtype: torch.dtype = torch.float32,
        adapters: Adapters | None = None,
    ) -> None:
        """`dtype` is what matrices are multiplied in: float32 leaves that to the weights, bfloat16 is autocast's."""
        self.model, self.processor, self.cached, self.dtype = model.eval(), processor, cached, dtype
        self.adapters = adapters or Adapters(model)

    def complete(self, request: Request) -> Completion:
        """The whole answer at once."""
        return whole(list(self.stream(request)))

    @torch.no_grad()
    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer piece by piece; the last delta carries the reason why it ends, and the length of the prompt."""
        steps = Program(self.model, self.processor, request, self.logits).steps()
        cache = KVCache.empty(self.model.config.num_layers) if self.cached else None
        reader = Reader(self.model, cache, self.dtype)
        step = next(steps, None)
        while step is not None:
            found = None
            if isinstance(step, Read):
                with self.adapters.whole(request.adapter):
                    found = reader.read(step)
            else:
                yield step
            try:
                step = steps.send(found)
            except StopIteration:
                return

    def logits(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.model.logits(x_TD).float()


@dataclass(slots=True)
class Reader:
    """What of one document has been read."""

    model: Model
    cache: KVCache | None
    dtype: torch.dtype
    count: int = 0
    """Tokens that lie in the cache."""

    def read(self, wish: Read) -> Tensor | None:
        device = self.model.embed_tokens.weight.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.look(wish)

    def look(self, wish: Read) -> Tensor | None:
        sequence = wish.builder.build()
        if self.cache is None:
            if not (wish.rows or wish.scores):
                return None  # whatever is asked for later reads it
            x_TD = self.model(pack([sequence]))
        else:
            if self.count == len(sequence):
                return None  # what was asked to be read has been
            cache = self.cache.fork() if wish.draft else self.cache
            x_TD = self.model(pack([window(sequence, self.count, len(sequence))]), cache)
            self.count = self.count if wish.draft else len(sequence)
        if wish.scores:
            return self.model.logits(x_TD[-1]).float()
        return x_TD[-wish.rows :] if wish.rows else None


def whole(deltas: list[Delta]) -> Completion:
    """The answer that pieces make."""
    return Completion(
        parts=tuple(d.part for d in deltas if d.part is not None),
        text="".join(d.text for d in deltas),
        finish=deltas[-1].finish or "stop",
        prompt_tokens=deltas[-1].prompt_tokens,
        tokens=tuple(t for d in deltas for t in d.tokens),
        logprobs=tuple(p for d in deltas for p in d.logprobs),
        scored=tuple(s for d in deltas for s in d.scored),
        prompt=tuple(s for d in deltas for s in d.prompt),
        vector=deltas[-1].vector,
        matched=deltas[-1].matched,
        ended=deltas[-1].ended,
    )
