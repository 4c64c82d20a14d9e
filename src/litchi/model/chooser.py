"""The next token of an answer: what may be said at all, what bends the scores, what must match, and then the draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.constraint import Constraint
from litchi.model.sampling import Past, adjust, draw, score
from litchi.schema.processor import Processor
from litchi.schema.request import Delta, SamplingParams

NEVER = float("-inf")


class Chooser:
    """The choices of one answer, and what they depend on beside the scores."""

    def __init__(self, processor: Processor, params: SamplingParams, vocab_size: int, generator: torch.Generator):
        """Raises BadInput for ids that the network does not know, and a grammar that does not compile."""
        self.processor, self.params, self.vocab_size, self.generator = processor, params, vocab_size, generator
        stops = frozenset(self.known(params.stop_token_ids, "stop_token_ids"))
        self.known([index for index, _ in params.logit_bias], "logit_bias")
        self.ends = stops if params.ignore_eos else stops | processor.tokenizer.ends
        grammar = params.grammar
        self.constraint = Constraint(processor.tokenizer, grammar) if grammar is not None else None
        self.past = Past.of((), vocab_size)
        self.silent = processor.silent
        bends = (params.temperature, params.frequency_penalty, params.presence_penalty, params.logit_bias, grammar)
        self.plain = not any(bends) and params.repetition_penalty == 1
        """Whether the likeliest token is taken, and nothing changes which that is."""

    def known(self, ids: Sequence[int], where: str) -> Sequence[int]:
        """The ids as they are. Raises BadInput for one that the network has no row for."""
        for index in ids:
            if not 0 <= index < self.vocab_size:
                most = self.vocab_size - 1
                raise BadInput(f"{where} names the id {index}, this model knows 0 to {most}: see /tokenize")
        return ids

    def begin(self, prompt: Sequence[int]) -> None:
        """The answer follows on these ids."""
        self.past = Past.of(prompt, self.vocab_size)

    def choose(self, scores_V: Tensor, count: int, *, pictures: bool) -> int:
        """Token `count` of the answer, counted from 1; with `pictures` it may open one. The scores stay as they are."""
        if self.plain and count > self.params.min_tokens:
            best = int(scores_V.argmax())
            if best not in self.silent and (pictures or best != self.processor.tokenizer.picture):
                return best  # what else may not be said is less likely still
        return draw(self.shape(scores_V, count, pictures).float().log_softmax(-1), self.params, self.generator)

    def shape(self, scores_V: Tensor, count: int, pictures: bool) -> Tensor:
        picture = self.processor.tokenizer.picture
        scores_V = adjust(self.speakable(scores_V), self.params, self.past)
        if not pictures and picture >= 0:
            scores_V[picture] = NEVER
        if self.constraint is not None:
            scores_V = scores_V.masked_fill(~self.constraint.allowed(len(scores_V)), NEVER)
        over = [index for index in self.ends | {picture} if index >= 0]
        if count > self.params.min_tokens or not over:
            return scores_V
        going_V = scores_V.index_fill(0, torch.tensor(over), NEVER)
        # A grammar may leave nothing but the end.
        return scores_V if bool(going_V.isneginf().all()) else going_V

    def speakable(self, scores_V: Tensor) -> Tensor:
        """A copy of the scores with what a turn cannot hold ruled out: roles, padding, placeholders and actions."""
        return scores_V.index_fill(0, self.processor.unspeakable, NEVER)

    def say(self, index: int) -> None:
        """The token has become part of the answer."""
        if not self.plain:
            self.past.say(index)
        if self.constraint is not None:
            self.constraint.accept(index)

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        return self.constraint is not None and self.constraint.done

    def told(self, index: int, scores_V: Tensor) -> Delta:
        """A token as the request wants to be told of it: its likelihood is the model's own, before all that bends."""
        if not self.params.logprobs:
            return Delta(tokens=(index,))
        spellings = self.processor.tokenizer.spellings
        [scored] = score(scores_V.unsqueeze(0), [index], self.params.top_logprobs, spellings)
        assert scored.logprob is not None
        return Delta(tokens=(index,), logprobs=(scored.logprob,), scored=(scored,))
