"""The reference decoder is slow and obvious, one request at a time; engines and policies must equal it.

With `cached=False` every step reads the whole document again: the oracle. With a cache every step reads only what is
new.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.cache import KVCache
from litchi.model.network import Flow, Mask, Model, Velocity
from litchi.model.sampling import euler, reveal, sample_token
from litchi.schema.arrays import MASK
from litchi.schema.processor import Builder, Continuous, Discrete, Processor, grid_places
from litchi.schema.request import DRAWING, Completion, Delta, Request, SamplingParams
from litchi.schema.sample import Action, Image, Role
from litchi.schema.sequence import Modality, pack, window

CANNOT_DRAW = "this checkpoint has no codec, so that it cannot draw: ask it for words"

FLOW_STEPS = 20
"""Euler steps of a flow when the request names none."""


@dataclass(slots=True)
class State:
    """A document being written, what of it the model has read, and the randomness of its request."""

    builder: Builder
    cache: KVCache | None
    generator: torch.Generator
    read: int = 0

    def fork(self) -> State:
        """A draft that may be extended and dropped."""
        return State(self.builder.fork(), self.cache.fork() if self.cache else None, self.generator, self.read)


class Generator:
    """A `Sampler` on one model, in this process."""

    def __init__(self, model: Model, processor: Processor, *, cached: bool = True) -> None:
        self.model, self.processor, self.cached = model.eval(), processor, cached

    def complete(self, request: Request) -> Completion:
        """The whole answer at once."""
        deltas = list(self.stream(request))
        return Completion(
            parts=tuple(d.part for d in deltas if d.part is not None),
            text="".join(d.text for d in deltas),
            finish=deltas[-1].finish or "stop",
            prompt_tokens=deltas[-1].prompt_tokens,
            tokens=tuple(t for d in deltas for t in d.tokens),
            logprobs=tuple(p for d in deltas for p in d.logprobs),
        )

    @torch.no_grad()
    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer piece by piece; the last delta carries the reason why it ends, and the length of the prompt."""
        state = self.begin(request)
        read = len(state.builder.tokens)
        for delta in self.answer(state, request):
            yield delta if delta.finish is None else replace(delta, prompt_tokens=read)

    def answer(self, state: State, request: Request) -> Iterator[Delta]:
        match request.want:
            case "chat":
                yield from self.chat(state, request)
            case "image":
                yield from self.plan(state, request)
            case "frame":
                state.builder.token(self.processor.tokenizer.picture)
                yield Delta(part=self.draw(state, request, Role.NONE), finish="stop")
            case "action":
                yield self.act(state, request)

    def begin(self, request: Request) -> State:
        cache = KVCache.empty(self.model.config.num_layers) if self.cached else None
        generator = torch.Generator().manual_seed(request.params.seed)
        state = State(self.processor.prompt(request.parts), cache, generator)
        if self.full(state):
            most = self.model.config.max_length
            raise BadInput(f"the prompt has {len(state.builder.tokens)} tokens, this model reads {most}: shorten it")
        return state

    def full(self, state: State) -> bool:
        """Whether the document has as many tokens as the network may read."""
        return 0 < self.model.config.max_length <= len(state.builder.tokens)

    # ---- text ----

    def chat(self, state: State, request: Request) -> Iterator[Delta]:
        """Sample until the turn ends: at its end token, or with a picture where the model opens one."""
        tokenizer, params = self.processor.tokenizer, request.params
        self.processor.open(state.builder, request.parts)
        ids: list[int] = []
        said = ""
        for _ in range(params.max_tokens):
            index, logprob = sample_token(self.speakable(self.scores(state)), params, state.generator)
            logprobs = (logprob,) if params.logprobs else ()
            if index in tokenizer.ends:
                yield Delta(text=tokenizer.decode(ids)[len(said) :], finish="stop")
                return
            state.builder.token(index)
            if index == tokenizer.picture:
                picture = self.draw(state, replace(request, params=drawing(params)), Role.ASSISTANT)
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
            if self.full(state):
                break
        yield Delta(text=tokenizer.decode(ids)[len(said) :], finish="length")

    def plan(self, state: State, request: Request) -> Iterator[Delta]:
        """Sample words until the model opens a picture, and draw it: the turn may not end without one."""
        if not self.processor.draws:
            raise BadInput(CANNOT_DRAW)
        tokenizer, params = self.processor.tokenizer, request.params
        self.processor.open(state.builder, request.parts)
        ids: list[int] = []
        for _ in range(params.max_tokens):
            scores_V = self.speakable(self.scores(state))
            scores_V[list(tokenizer.ends)] = float("-inf")
            index, _ = sample_token(scores_V, params, state.generator)
            if index == tokenizer.picture:
                break
            state.builder.token(index)
            ids.append(index)
        yield Delta(text=tokenizer.decode(ids), tokens=tuple(ids))
        state.builder.token(tokenizer.picture)
        yield Delta(part=self.draw(state, request, Role.ASSISTANT), finish="stop")

    def speakable(self, scores_V: Tensor) -> Tensor:
        """A copy of the scores with what a turn cannot hold ruled out: roles, padding, placeholders and actions."""
        tokenizer = self.processor.tokenizer
        ruled_out = torch.tensor(
            sorted(self.processor.controls - tokenizer.ends - {tokenizer.picture}), dtype=torch.long
        )
        return scores_V.index_fill(0, ruled_out, float("-inf"))

    # ---- pictures ----

    def draw(self, state: State, request: Request, role: Role) -> Image:
        """Denoise one picture and append its clean copy."""
        foreseen = role is Role.NONE
        modality, codec = self.processor.codec_for(frame=foreseen)
        if codec is None or not self.processor.draws:
            raise BadInput(CANNOT_DRAW)
        if request.height % codec.patch or request.width % codec.patch:
            raise BadInput(
                f"a picture's sides must be multiples of {codec.patch}, not {request.height}x{request.width}"
            )
        places = grid_places(request.height // codec.patch, request.width // codec.patch)
        params = request.params
        rows = self.denoise(state, modality, places, steps=params.steps or (1 if foreseen else 0), request=request)
        state.builder.vectors(modality, rows, torch.ones(len(rows)), 0.0, places, self.processor.tokenizer.patch)
        state.builder.time += 1
        return Image(pixels=codec.decode(rows, request.height, request.width), role=role)

    # ---- actions ----

    def act(self, state: State, request: Request) -> Delta:
        """The next action of a policy: one token of a discrete space, or a denoised chunk of a continuous one."""
        match self.processor.space(request.space):
            case Discrete():
                allowed = torch.tensor(self.processor.action_ids(request.space))
                choice, logprob = sample_token(self.scores(state)[allowed], request.params, state.generator)
                action = Action.discrete(choice, request.space)
                return Delta(part=action, tokens=(int(allowed[choice]),), logprobs=(logprob,), finish="stop")
            case Continuous() as space:
                places = [(i, i) for i in range(space.chunk)]
                steps = request.params.steps or FLOW_STEPS
                rows = self.denoise(state, Modality.ACTION, places, steps=steps, request=request)
                return Delta(part=Action(values=space.restore(rows), space=request.space), finish="stop")

    # ---- reading ----

    def denoise(self, state: State, modality: Modality, places, *, steps: int, request: Request) -> Tensor:
        """Rows (N, C) of a span, from nothing to clean, against what was read before."""
        match self.model.config.modalities[modality]:
            case Mask(digits=digits):
                value = torch.full((len(places), digits), MASK)
                steps = steps or value.numel()
                for step in range(steps):
                    time = float((value != MASK).float().mean())
                    x_ND = self.read_span(state, modality, value, time, places)
                    scores = self.model.clean(x_ND, modality, value, time)
                    left, params = steps - step, request.params
                    value = reveal(value, scores, steps_left=left, params=params, generator=state.generator)
                    if not bool((value == MASK).any()):
                        break
                return value
            case Flow(channels=channels) | Velocity(channels=channels):
                value = torch.randn(len(places), channels, generator=state.generator)
                steps = steps or FLOW_STEPS
                for step in range(steps):
                    time = step / steps
                    x_ND = self.read_span(state, modality, value, time, places)
                    clean = self.model.clean(x_ND, modality, value, time)
                    value = euler(value, clean, time, 1 / steps)
                return value
            case other:
                raise BadInput(f"{modality} is read through {type(other).__name__} and cannot be generated")

    def read_span(self, state: State, modality: Modality, value: Tensor, time: float, places) -> Tensor:
        """Hidden states (N, D) of a span in some state of denoising; the state is left as it was."""
        if state.cache is not None and state.read < len(state.builder.tokens):
            self.read(state)
        draft = state.fork()
        times = torch.full((len(value),), time)
        draft.builder.vectors(modality, value, times, 1.0, places, self.processor.tokenizer.patch)
        return self.read(draft)[-len(value) :]

    def scores(self, state: State) -> Tensor:
        """Scores (V,) of the next token."""
        return self.model.logits(self.read(state)[-1])

    def read(self, state: State) -> Tensor:
        """Hidden states of what is new (with a cache) or of everything (without)."""
        sequence = state.builder.build()
        if state.cache is None:
            return self.model(pack([sequence]))
        new = window(sequence, state.read, len(sequence))
        state.read = len(sequence)
        return self.model(pack([new]), state.cache)


def drawing(params: SamplingParams) -> SamplingParams:
    """How a picture within a conversation is drawn: greedy words do not mean a greedy picture."""
    return params if params.temperature > 0 else replace(DRAWING, seed=params.seed, steps=params.steps)


def held(text: str, stops: tuple[str, ...]) -> int:
    """How many last characters must wait: the beginning of a stop string, or of a character not all here yet."""
    torn = len(text) - len(text.rstrip("\ufffd"))
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=torn)
