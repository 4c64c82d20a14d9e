"""No answer of the engine depends on its neighbours, on chunks, pages, memory, or on who gave way: schedule fuzzing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import pytest
import torch

from litchi.config import BadInput
from litchi.model import exact
from litchi.model.compiled import compiler
from litchi.model.generate import Generator, whole
from litchi.model.network import Model
from litchi.model.packing import Format
from litchi.schema.processor import Processor
from litchi.schema.request import Completion, Delta, Request, SamplingParams
from litchi.schema.sample import Action, Image, Role, Text
from litchi.serve.engine import Engine
from litchi.serve.runner import Piece, Runner
from litchi.serve.scheduler import EngineConfig, Track
from tests.laws.documents import WORDS, model, processor

KINDS = {"mask": {}, "flow": {"flow": True}, "tower": {"tower": True}, "film": {"film": True}}
SCHEDULES = 12
"""Of each kind and type here; bench/fuzz_engine.py runs hundreds."""


@pytest.fixture
def threads(kind: str) -> Iterator[int]:
    """Sums must keep their order where threads share a product; all other tests run in one."""
    before, count = torch.get_num_threads(), 2 if kind == "mask" else 1
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@dataclass
class Answer:
    """What one request was told."""

    deltas: list[Delta] = field(default_factory=list)
    error: BaseException | None = None
    ended: bool = False

    def take(self, piece: Delta | BaseException | None) -> None:
        assert not self.ended
        if isinstance(piece, Delta):
            self.deltas.append(piece)
        else:
            self.error, self.ended = piece, True


class Alone(Engine):
    """The oracle of a path that the reference decoder does not have: one document at a time, all of it for every
    token, and nothing is remembered."""

    def __init__(
        self,
        net: Model,
        p: Processor,
        weights: Format,
        runner: Runner | None = None,
        *,
        kv: Literal["auto", "int8"] = "auto",
    ) -> None:
        settings = {"max_running": 1, "step_tokens": 1 << 30, "remember": False, "guess": "none"}
        config = EngineConfig(path="native", weights=weights, kv=kv, **settings)
        super().__init__(net, p, config, runner=runner)

    def commit(self, track: Track, piece: Piece, answer: torch.Tensor | None) -> None:
        assert track.wish is not None and piece.start == 0 and piece.stop == len(track.wish.builder.tokens)
        self.scheduler.give_back(track)
        self.advance(track, answer[0] if piece.scores and answer is not None else answer)

    def complete(self, request: Request) -> Completion:
        answer = Answer()
        self.submit(request, answer.take)
        while self.step():
            pass
        return whole(answer.deltas)


@lru_cache
def network(kind: str) -> tuple[Processor, Model]:
    p = processor(**KINDS[kind])
    flow = kind == "flow"
    return p, exact.apply(model(p, flow=flow))


def picture(rng: random.Random) -> np.ndarray:
    return np.random.default_rng(rng.randrange(4)).integers(0, 256, (8, rng.choice((8, 16)), 3), dtype=np.uint8)


def request(rng: random.Random, kind: str) -> Request:
    """Of any want; beginnings are often shared."""
    words = " ".join(random.Random(rng.randrange(3)).choices(WORDS, k=rng.choice((3, 20, 50))))
    parts: list = [Text(text=words, role=Role.USER)]
    if rng.random() < 0.5:
        parts.insert(0, Image(pixels=picture(rng), role=Role.USER))
    want = rng.choice(("chat", "chat", "image", "frame", "action"))
    if want in ("frame", "action"):
        parts += [Image(pixels=picture(rng)), Action.discrete(rng.randrange(3), "grid")]
    params = SamplingParams(
        max_tokens=rng.choice((1, 8, 24)),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(5),
        steps=rng.choice((1, 3)),
        logprobs=True,
    )
    space = rng.choice(("grid", "arm")) if kind == "flow" else "grid"
    return Request(parts=tuple(parts), want=want, params=params, space=space, height=8, width=16)


def same(a: Completion, b: Completion) -> bool:
    if (a.text, a.tokens, a.finish, a.logprobs, a.prompt_tokens) != (
        b.text,
        b.tokens,
        b.finish,
        b.logprobs,
        b.prompt_tokens,
    ):
        return False
    return all(same_part(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def same_part(a: object, b: object) -> bool:
    match a, b:
        case Image(), Image():
            return np.array_equal(a.pixels, b.pixels)
        case Action(), Action():
            return np.array_equal(a.values, b.values)
    return False


def play(engine: Engine, requests: Sequence[Request], rng: random.Random) -> list[Answer]:
    """Requests come between steps, and some are left before they are answered."""
    answers = [Answer() for _ in requests]
    pending = list(zip(requests, answers, strict=True))
    tracks = []
    while pending or engine.running or engine.waiting:
        for _ in range(rng.choice((0, 0, 1, 3))):
            if pending:
                asked, answer = pending.pop()
                tracks.append(engine.submit(asked, answer.take))
        if tracks and rng.random() < 0.03:
            engine.cancel(rng.choice(tracks))
        engine.step()
    return answers


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_schedule_changes_an_answer(kind: str, dtype: Literal["float32", "bfloat16"]) -> None:
    """Every answer equals, to the last bit of every log-probability, that of the oracle, which reads each time alone
    and everything again; and no page is lost."""
    p, net = network(kind)
    oracle = Generator(deepcopy(net), p, cached=False, dtype=getattr(torch, dtype))
    exact.apply(oracle.model)
    expected: dict[str, Completion] = {}
    gave_way = recalled = 0
    for seed in range(SCHEDULES):
        rng = random.Random(f"{kind}{seed}")
        requests = [request(rng, kind) for _ in range(rng.randrange(3, 13))]
        config = EngineConfig(
            max_running=rng.choice((1, 6, 16)),
            step_tokens=rng.choice((1, 5, 17, 64, 512)),
            page=rng.choice((8, 16, 64)),
            cache_tokens=rng.choice((128, 128, 2048)),
            remember=rng.random() < 0.8,
            path="torch",
            weights=dtype,
        )
        engine = Engine(net, p, config)
        for asked, answer in zip(requests, play(engine, requests, rng), strict=True):
            if answer.deltas and answer.deltas[-1].finish:
                key = repr(replace(asked, parts=())) + repr([str(x) for x in asked.parts])
                expected.setdefault(key, oracle.complete(asked))
                assert answer.error is None and same(whole(answer.deltas), expected[key]), (seed, config, asked)
            else:
                assert answer.error is None, answer.error
        assert engine.pages.num_free == len(engine.pages.readers) - 1
        gave_way, recalled = gave_way + engine.preempted, recalled + engine.tokens_cached
    assert gave_way and recalled


@pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("weights", "kv"), [*((w, "auto") for w in ("float32", "bfloat16", "int8", "int4", "w4a8")), ("bfloat16", "int8")]
)
def test_no_schedule_changes_an_answer_of_the_native_path(weights: Format, kv: Literal["auto", "int8"]) -> None:
    p = processor()
    net = model(p, wide=True)
    oracle, expected, gave_way = Alone(net, p, weights, kv=kv), {}, 0
    for seed in range(SCHEDULES):
        rng = random.Random(f"{weights}{kv}{seed}")
        requests = [request(rng, "mask") for _ in range(rng.randrange(6, 16))]
        config = EngineConfig(
            max_running=rng.choice((1, 6, 16)),
            step_tokens=rng.choice((1, 5, 17, 64, 512)),
            page=rng.choice((32, 64)),
            cache_tokens=rng.choice((128, 128, 128, 2048)),
            remember=rng.random() < 0.8,
            path="native",
            weights=weights,
            kv=kv,
        )
        engine = Engine(net, p, config)
        for asked, answer in zip(requests, play(engine, requests, rng), strict=True):
            assert answer.error is None
            if answer.deltas and answer.deltas[-1].finish:
                key = repr(replace(asked, parts=())) + repr([str(x) for x in asked.parts])
                expected.setdefault(key, oracle.complete(asked))
                assert same(whole(answer.deltas), expected[key]), (seed, config, asked)
        gave_way += engine.preempted
    assert gave_way


def test_a_conversation_goes_on_from_what_was_read() -> None:
    p, net = network("mask")
    engine = Engine(net, p, EngineConfig(path="torch", page=8))
    parts: list = [Text(text=" ".join(WORDS), role=Role.USER)]
    params = SamplingParams(max_tokens=5)
    for turn in range(3):
        answer = Answer()
        engine.submit(Request(parts=tuple(parts), params=params), answer.take)
        before = engine.tokens_cached
        while engine.step():
            pass
        done = whole(answer.deltas)
        assert bool(engine.tokens_cached > before) == bool(turn)
        parts += [Text(text=done.text or "so", role=Role.ASSISTANT), Text(text="and the key", role=Role.USER)]


def test_other_weights_remember_nothing() -> None:
    p, net = network("mask")
    engine = Engine(net, p, EngineConfig(path="torch", page=8), weights="one")
    asked = Request(parts=(Text(text=" ".join(WORDS), role=Role.USER),), params=SamplingParams(max_tokens=2))
    for weights, found in (("one", False), ("one", True), ("two", False)):
        engine.weights = weights
        before, answer = engine.tokens_cached, Answer()
        engine.submit(asked, answer.take)
        while engine.step():
            pass
        assert bool(engine.tokens_cached > before) == found


def test_what_does_not_fit_is_refused_or_ends_alone() -> None:
    p, net = network("mask")
    engine = Engine(net, p, EngineConfig(path="torch", page=8, cache_tokens=64))
    long = Request(parts=(Text(text=" ".join(WORDS * 4), role=Role.USER),))
    with pytest.raises(BadInput, match=r"the prompt has \d+ tokens, the cache 64: shorten it or raise"):
        engine.submit(long, lambda _: None)
    grows, short = Answer(), Answer()
    text = Text(text=" ".join(WORDS[:12]), role=Role.USER)
    engine.submit(Request(parts=(text,), params=SamplingParams(max_tokens=200, temperature=1.0)), grows.take)
    engine.submit(Request(parts=(text,), params=SamplingParams(max_tokens=3)), short.take)
    while engine.step():
        pass
    assert short.error is None and short.deltas[-1].finish
    assert grows.ended and (isinstance(grows.error, BadInput) or grows.deltas[-1].finish == "stop")


def test_a_step_that_fails_ends_those_who_were_read_for_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    p, net = network("mask")
    engine = Engine(net, p, EngineConfig(path="torch", page=8, step_tokens=8))
    run, asked = engine.runner.run, Request(parts=(Text(text="where is the key", role=Role.USER),))
    answers = [Answer() for _ in range(3)]
    for answer in answers:
        engine.submit(asked, answer.take)

    def fall(pieces: object, pages: object) -> list:
        engine.runner.run = run
        raise RuntimeError("out of memory")

    engine.runner.run = fall
    while engine.step():
        pass
    failed = [isinstance(answer.error, RuntimeError) for answer in answers]
    assert 1 <= sum(failed) < 3 and "a step of the engine failed" in caplog.text
    assert all(answer.ended and (answer.error or answer.deltas[-1].finish) for answer in answers)
    assert engine.pages.num_free == len(engine.pages.readers) - 1


def test_its_thread_answers_many_at_once() -> None:
    p, net = network("mask")
    engine = Engine(net, p, EngineConfig(path="torch")).start()
    asked = Request(parts=(Text(text="where is the key", role=Role.USER),), params=SamplingParams(max_tokens=6))
    streams = [engine.stream(asked) for _ in range(4)]
    firsts = [next(stream) for stream in streams]
    texts = [first.text + "".join(d.text for d in stream) for first, stream in zip(firsts, streams, strict=True)]
    assert len(set(texts)) == 1
    engine.close()
    with pytest.raises(BadInput, match="closing"):
        engine.complete(asked)
