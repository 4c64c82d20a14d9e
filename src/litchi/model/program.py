"""How a request is answered, step by step, without saying who runs the network: the one place for every decoder.

A program is a Python generator. It yields a `Read` where it needs the network to read on, and is sent what was found;
it yields a `Delta` where a piece of the answer is there. The reference decoder gives it one read at a time, an engine
reads for many programs at once, and both must find the same.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.network import Flow, Mask, Model, Velocity
from litchi.model.sampling import euler, reveal, sample_token
from litchi.schema.arrays import MASK
from litchi.schema.processor import Builder, Continuous, Discrete, Processor, grid_places
from litchi.schema.request import DRAWING, Delta, Request, SamplingParams
from litchi.schema.sample import Action, Image, Role
from litchi.schema.sequence import Modality

CANNOT_DRAW = "this checkpoint has no codec, so that it cannot draw: ask it for words"

FLOW_STEPS = 20
"""Euler steps of a flow when the request names none."""


@dataclass(frozen=True, slots=True)
class Read:
    """Read what of a document is new.

    `rows` hidden states (rows, D) of its end are wanted, or with `scores` the scores (V,) of the next token; neither,
    and the answer is None. A draft is read and forgotten: a span that is not clean yet.
    """

    builder: Builder
    rows: int = 0
    scores: bool = False
    draft: bool = False


Steps = Generator[Read | Delta, Tensor | None, None]


class Program:
    """One request, its document, and its randomness."""

    def __init__(self, model: Model, processor: Processor, request: Request) -> None:
        """Raises BadInput if the prompt is longer than the network reads."""
        self.model, self.processor, self.request = model, processor, request
        self.params = request.params
        self.generator = torch.Generator().manual_seed(request.params.seed)
        self.builder = processor.prompt(request.parts)
        self.prompt_tokens = len(self.builder.tokens)
        if self.full():
            most = model.config.max_length
            raise BadInput(f"the prompt has {self.prompt_tokens} tokens, this model reads {most}: shorten it")

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
                yield from self.chat()
            case "image":
                yield from self.plan()
            case "frame":
                self.builder.token(self.processor.tokenizer.picture)
                picture = yield from self.draw(Role.NONE, self.params)
                yield Delta(part=picture, finish="stop")
            case "action":
                yield from self.act()

    # ---- text ----

    def chat(self) -> Steps:
        """Sample until the turn ends: at its end token, or with a picture where the model opens one."""
        tokenizer, params = self.processor.tokenizer, self.params
        self.processor.open(self.builder, self.request.parts)
        ids: list[int] = []
        said = ""
        for _ in range(params.max_tokens):
            scores_V = yield from self.scores()
            index, logprob = sample_token(self.speakable(scores_V), params, self.generator)
            logprobs = (logprob,) if params.logprobs else ()
            if index in tokenizer.ends:
                yield Delta(text=tokenizer.decode(ids)[len(said) :], finish="stop")
                return
            self.builder.token(index)
            if index == tokenizer.picture:
                picture = yield from self.draw(Role.ASSISTANT, drawing(params))
                yield Delta(part=picture, tokens=(index,), logprobs=logprobs, finish="stop")
                return
            ids.append(index)
            text = tokenizer.decode(ids)
            if cut := [text.index(stop) for stop in params.stop if stop in text]:
                yield Delta(text=text[len(said) : min(cut)], tokens=(index,), logprobs=logprobs, finish="stop")
                return
            sure = max(len(said), len(text) - held(text, params.stop))
            yield Delta(text=text[len(said) : sure], tokens=(index,), logprobs=logprobs)
            said = text[:sure]
            if self.full():
                break
        yield Delta(text=tokenizer.decode(ids)[len(said) :], finish="length")

    def plan(self) -> Steps:
        """Sample words until the model opens a picture, and draw it: the turn may not end without one."""
        if not self.processor.draws:
            raise BadInput(CANNOT_DRAW)
        tokenizer, params = self.processor.tokenizer, self.params
        self.processor.open(self.builder, self.request.parts)
        ids: list[int] = []
        for _ in range(params.max_tokens):
            scores_V = yield from self.scores()
            scores_V = self.speakable(scores_V)
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

    def speakable(self, scores_V: Tensor) -> Tensor:
        """A copy of the scores with what a turn cannot hold ruled out: roles, padding, placeholders and actions."""
        return scores_V.index_fill(0, self.processor.unspeakable, float("-inf"))

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
