"""How a request is answered, step by step, without saying who runs the network: the one place for every decoder.

A program is a Python generator. It yields a `Read` where it needs the network to read on, and is sent what was found;
it yields a `Delta` where a piece of the answer is there. The reference decoder gives it one read at a time, an engine
reads for many programs at once, and both must find the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.chooser import Chooser
from litchi.model.network import Flow, Mask, Model, Velocity
from litchi.model.sampling import euler, reveal, sample_token, score
from litchi.schema.arrays import MASK
from litchi.schema.processor import Builder, Continuous, Discrete, Processor, grid_places
from litchi.schema.request import DRAWING, Delta, Request, SamplingParams, Scored
from litchi.schema.sample import Action, Image, Role
from litchi.schema.sequence import Modality
from litchi.schema.speech import Speech

CANNOT_DRAW = "this checkpoint has no codec, so that it cannot draw: ask it for words"

FLOW_STEPS = 20
"""Euler steps of a flow when the request names none."""

ROWS = 64
"""Tokens of a prompt that are scored at once: scores are as wide as the vocabulary."""


@dataclass(frozen=True, slots=True)
class Read:
    """Read what of a document is new.

    `rows` hidden states (rows, D) of its end are wanted, or with `scores` the scores (V,) of the next token; neither,
    and the answer is None. A draft is read and forgotten: a span that is not clean yet. The first read of a program may
    want the rows of its whole prompt (an embedding, or what each token of the prompt was worth): a cache that other
    requests filled does not hold them.
    """

    builder: Builder
    rows: int = 0
    scores: bool = False
    draft: bool = False


Steps = Generator[Read | Delta, Tensor | None, None]


class Program:
    """One request, its document, and its randomness."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        request: Request,
        logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Raises BadInput if the prompt is empty or too long for the network, and for what `Chooser` refuses."""
        self.model, self.processor, self.request = model, processor, request
        self.params, self.logits = request.params, logits or model.logits
        self.generator = torch.Generator().manual_seed(request.params.seed)
        self.chooser = Chooser(processor, self.params, model.config.vocab_size, self.generator)
        self.builder = processor.prompt(request.parts, request.tools)
        for index in self.chooser.known(request.tokens, "the prompt"):
            self.builder.token(index)
        self.prompt_tokens = len(self.builder.tokens)
        most, silent = model.config.max_length, request.want == "embed" or not self.params.max_tokens
        if 0 < most < self.prompt_tokens + (not silent):
            raise BadInput(f"the prompt has {self.prompt_tokens} tokens, this model reads {most}: shorten it")
        if not self.prompt_tokens and request.want in ("text", "embed"):
            raise BadInput("the prompt has no tokens: there is nothing to go on from; send a word")

    def full(self) -> bool:
        """Whether the document has as many tokens as the network may read."""
        return 0 < self.model.config.max_length <= len(self.builder.tokens)

    def steps(self) -> Steps:
        """The last delta carries the reason why the answer ends, and the length of the prompt."""
        answer, found = self.answer(), None
        while True:
            try:
                step = answer.send(found)
            except StopIteration:
                return
            if isinstance(step, Delta) and step.finish is not None:
                step = replace(step, prompt_tokens=self.prompt_tokens)
            found = yield step

    def answer(self) -> Steps:
        match self.request.want:
            case "chat":
                self.processor.open(self.builder, self.request.parts)
                yield from self.say()
            case "text":
                yield from self.say()
            case "embed":
                yield from self.embed()
            case "image":
                yield from self.plan()
            case "frame":
                self.builder.token(self.processor.tokenizer.picture)
                picture = yield from self.draw(Role.NONE, self.params)
                yield Delta(part=picture, finish="stop")
            case "action":
                yield from self.act()

    # ---- text ----

    def say(self) -> Steps:
        """Sample until the answer ends: at an end, or in a turn with a picture where the model opens one."""
        tokenizer, params, chooser = self.processor.tokenizer, self.params, self.chooser
        first_V = yield from self.tell_prompt()
        chooser.begin(self.builder.tokens)
        speech, said = Speech(tokenizer.sounds), ""
        for count in range(1, params.max_tokens + 1):
            scores_V = first_V if first_V is not None and count == 1 else (yield from self.scores())
            index = chooser.choose(scores_V, count, pictures=self.request.want == "chat")
            told = chooser.told(index, scores_V)
            if index in chooser.ends:
                matched = index if index in params.stop_token_ids else None
                ended = next(iter(told.scored), None)
                yield Delta(text=speech.text[len(said) :], finish="stop", matched=matched, ended=ended)
                return
            chooser.say(index)
            self.builder.token(index)
            if index == tokenizer.picture:
                picture = yield from self.draw(Role.ASSISTANT, drawing(params))
                yield replace(told, part=picture, finish="stop")
                return
            text = speech.add(index)
            # What may begin a stop string has not been said yet.
            cuts = [(place, stop) for stop in params.stop if (place := text.find(stop, len(said))) >= 0]
            if cuts and count >= params.min_tokens:
                place, stop = min(cuts)
                yield replace(told, text=text[len(said) : place], finish="stop", matched=stop)
                return
            if chooser.done:
                yield replace(told, text=text[len(said) :], finish="stop")
                return
            sure = max(len(said), len(text) - held(text, params.stop))
            yield replace(told, text=text[len(said) : sure])
            said = text[:sure]
            if self.full():
                break
        yield Delta(text=speech.text[len(said) :], finish="length")

    def tell_prompt(self) -> Generator[Read | Delta, Tensor | None, Tensor | None]:
        """What each token of the prompt was worth, if that is asked; then also the scores (V,) of the next token."""
        count, ids = self.params.prompt_logprobs, self.builder.tokens
        if count is None:
            return None
        x_TD = yield Read(self.builder, rows=len(ids))
        assert x_TD is not None
        spellings = self.processor.tokenizer.spellings
        told = [Scored(ids[0], spellings[ids[0]], None)]
        for start in range(1, len(ids), ROWS):
            logits_NV = self.logits(x_TD[start - 1 : start - 1 + ROWS])
            told += score(logits_NV[: len(ids) - start], ids[start : start + ROWS], count, spellings)
        shown = {int(i) for blocks in self.builder.rows.values() for block in blocks for i in block.index}
        yield Delta(prompt=tuple(replace(s, logprob=None, top=()) if i in shown else s for i, s in enumerate(told)))
        return self.logits(x_TD[-1])

    def embed(self) -> Steps:
        """One vector (D,) of length 1 that stands for the prompt."""
        x_TD = yield Read(self.builder, rows=len(self.builder.tokens))
        assert x_TD is not None
        pooled_D = x_TD.float().mean(0) if self.request.pooling == "mean" else x_TD[-1].float()
        yield Delta(vector=tuple(torch.nn.functional.normalize(pooled_D, dim=0).tolist()), finish="stop")

    def plan(self) -> Steps:
        """Sample words until the model opens a picture, and draw it: the turn may not end without one."""
        if not self.processor.draws:
            raise BadInput(CANNOT_DRAW)
        tokenizer, params = self.processor.tokenizer, self.params
        self.processor.open(self.builder, self.request.parts)
        ids: list[int] = []
        for _ in range(params.max_tokens):
            scores_V = yield from self.scores()
            scores_V = self.chooser.speakable(scores_V)
            scores_V[list(tokenizer.ends)] = float("-inf")
            index, _ = sample_token(scores_V, params, self.generator)
            if index == tokenizer.picture:
                break
            self.builder.token(index)
            ids.append(index)
        yield Delta(text=tokenizer.decode(ids), tokens=tuple(ids))
        self.builder.token(tokenizer.picture)
        picture = yield from self.draw(Role.ASSISTANT, params)
        yield Delta(part=picture, finish="stop")

    def scores(self) -> Generator[Read, Tensor | None, Tensor]:
        """Scores (V,) of the next token."""
        found = yield Read(self.builder, scores=True)
        assert found is not None
        return found

    # ---- pictures ----

    def draw(self, role: Role, params: SamplingParams) -> Generator[Read | Delta, Tensor | None, Image]:
        """Denoise one picture and append its clean copy."""
        height, width = self.request.height, self.request.width
        foreseen = role is Role.NONE
        modality, codec = self.processor.codec_for(frame=foreseen)
        if codec is None or not self.processor.draws:
            raise BadInput(CANNOT_DRAW)
        if height % codec.patch or width % codec.patch:
            raise BadInput(f"a picture's sides must be multiples of {codec.patch}, not {height}x{width}")
        places = grid_places(height // codec.patch, width // codec.patch)
        steps = params.steps or (1 if foreseen else 0)
        rows = yield from self.denoise(modality, places, params, steps)
        self.builder.vectors(modality, rows, torch.ones(len(rows)), 0.0, places, self.processor.tokenizer.patch)
        self.builder.time += 1
        return Image(pixels=codec.decode(rows, height, width), role=role)

    # ---- actions ----

    def act(self) -> Steps:
        """The next action of a policy: one token of a discrete space, or a denoised chunk of a continuous one."""
        name = self.request.space
        match self.processor.space(name):
            case Discrete():
                allowed = torch.tensor(self.processor.action_ids(name))
                scores_V = yield from self.scores()
                choice, logprob = sample_token(scores_V[allowed], self.params, self.generator)
                action = Action.discrete(choice, name)
                yield Delta(part=action, tokens=(int(allowed[choice]),), logprobs=(logprob,), finish="stop")
            case Continuous() as space:
                places = [(i, i) for i in range(space.chunk)]
                steps = self.params.steps or FLOW_STEPS
                rows = yield from self.denoise(Modality.ACTION, places, self.params, steps)
                yield Delta(part=Action(values=space.restore(rows), space=name), finish="stop")

    # ---- spans ----

    def denoise(
        self, modality: Modality, places: list[tuple[int, int]], params: SamplingParams, steps: int
    ) -> Generator[Read | Delta, Tensor | None, Tensor]:
        """Rows (N, C) of a span, from nothing to clean, against what was read before."""
        match self.model.config.modalities[modality]:
            case Mask(digits=digits):
                value = torch.full((len(places), digits), MASK)
                steps = steps or value.numel()
                for step in range(steps):
                    time = float((value != MASK).float().mean())
                    x_ND = yield from self.read_span(modality, value, time, places)
                    scores = self.model.clean(x_ND, modality, value, time)
                    value = reveal(value, scores, steps_left=steps - step, params=params, generator=self.generator)
                    if not bool((value == MASK).any()):
                        break
                return value
            case Flow(channels=channels) | Velocity(channels=channels):
                value = torch.randn(len(places), channels, generator=self.generator)
                steps = steps or FLOW_STEPS
                for step in range(steps):
                    time = step / steps
                    x_ND = yield from self.read_span(modality, value, time, places)
                    clean = self.model.clean(x_ND, modality, value, time)
                    value = euler(value, clean, time, 1 / steps)
                return value
            case other:
                raise BadInput(f"{modality} is read through {type(other).__name__} and cannot be generated")

    def read_span(
        self, modality: Modality, value: Tensor, time: float, places: list[tuple[int, int]]
    ) -> Generator[Read | Delta, Tensor | None, Tensor]:
        """Hidden states (N, D) of a span in some state of denoising; the document is left as it was."""
        yield Read(self.builder)
        draft = self.builder.fork()
        times = torch.full((len(value),), time)
        draft.vectors(modality, value, times, 1.0, places, self.processor.tokenizer.patch)
        found = yield Read(draft, rows=len(value), draft=True)
        assert found is not None
        return found


def drawing(params: SamplingParams) -> SamplingParams:
    """How a picture within a conversation is drawn: greedy words do not mean a greedy picture."""
    return params if params.temperature > 0 else replace(DRAWING, seed=params.seed, steps=params.steps)


def held(text: str, stops: tuple[str, ...]) -> int:
    """How many last characters must wait: the beginning of a stop string, or of a character not all here yet."""
    torn = len(text) - len(text.rstrip("\ufffd"))
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=torn)
