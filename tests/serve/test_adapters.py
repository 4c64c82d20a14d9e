"""Requests with different adapters are answered in the same steps, each to the bit as if it were alone; and through the
door an adapter is a model of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import torch

from litchi.cli import find_checkpoint, load_engine, main
from litchi.config import BadInput
from litchi.model import exact
from litchi.model.adapters import Adapter, read_adapter
from litchi.model.compiled import compiler
from litchi.model.generate import Generator, whole
from litchi.model.lowrank import Adapters
from litchi.model.network import Model
from litchi.model.packing import Format
from litchi.model.weights import load
from litchi.schema.digest import digest
from litchi.schema.processor import Processor
from litchi.schema.request import Completion, Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve.engine import Engine
from litchi.serve.run import ServeConfig
from litchi.serve.runner import NativeRunner
from litchi.serve.scheduler import EngineConfig
from tests.laws.documents import WORDS, model, processor
from tests.model.lora_folders import lora_folder
from tests.serve.test_engine import Alone, Answer, play, request, same

NAMES = ("", "one", "two")
SCHEDULES = 8


def drawn(net: Model, name: str, **said: object) -> Adapter:
    with TemporaryDirectory() as folder:
        return read_adapter(lora_folder(Path(folder), net, **said), name, net)


@lru_cache
def network() -> tuple[Processor, Model, Adapters]:
    p = processor()
    net = exact.apply(model(p, wide=True))
    return p, net, shelf(net)


def shelf(net: Model, seed: int = 0) -> Adapters:
    one = drawn(net, "one", rank=3, seed=seed)
    return Adapters(net, [one, drawn(net, "two", rank=16, seed=1, targets=("q_proj", "v_proj", "down_proj"))])


def settings(rng: random.Random, **more: object) -> EngineConfig:
    return EngineConfig(
        max_running=rng.choice((1, 6, 16)),
        step_tokens=rng.choice((1, 5, 17, 64, 512)),
        page=rng.choice((32, 64)),
        cache_tokens=rng.choice((128, 128, 128, 2048)),
        remember=rng.random() < 0.8,
        **more,
    )


def requests_of(rng: random.Random) -> list[Request]:
    """Of any want, and often the same but for the adapter."""
    first = [request(rng, "mask") for _ in range(rng.randrange(4, 9))]
    found = [replace(asked, adapter=rng.choice(NAMES)) for asked in (*first, *first)]
    rng.shuffle(found)
    return found


def name_of(asked: Request) -> str:
    return asked.adapter + digest(asked)


def say(engine: Engine, asked: Request) -> Completion:
    answer = Answer()
    engine.submit(asked, answer.take)
    while engine.step():
        pass
    return whole(answer.deltas)


# ---- the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_schedule_and_no_neighbours_adapter_changes_an_answer(dtype: Format) -> None:
    """The oracle has no engine, no pages and one adapter at a time, for the whole network."""
    p, net, adapters = network()
    alone = deepcopy(model(p, wide=True))
    oracle = Generator(exact.apply(alone), p, cached=False, dtype=getattr(torch, dtype), adapters=shelf(alone))
    bare = Generator(exact.apply(model(p, wide=True)), p, cached=False, dtype=getattr(torch, dtype))
    expected: dict[str, Completion] = {}
    gave_way = recalled = 0
    for seed in range(SCHEDULES):
        rng = random.Random(f"adapters{seed}")
        asked = requests_of(rng)
        engine = Engine(net, p, settings(rng, path="torch", weights=dtype), adapters=adapters)
        for each, answer in zip(asked, play(engine, asked, rng), strict=True):
            assert answer.error is None, answer.error
            if answer.deltas and answer.deltas[-1].finish:
                if name_of(each) not in expected:
                    expected[name_of(each)] = (oracle if each.adapter else bare).complete(each)
                assert same(whole(answer.deltas), expected[name_of(each)]), (seed, each)
        assert engine.pages.num_free == len(engine.pages.readers) - 1
        gave_way, recalled = gave_way + engine.preempted, recalled + engine.tokens_cached
    assert gave_way and recalled


@pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_nor_does_one_on_the_native_path(weights: Format) -> None:
    p, net, adapters = network()
    kind = torch.float32 if weights == "float32" else torch.bfloat16
    runner = NativeRunner(net, kind, weights, adapters=adapters)
    oracle, bare = (Alone(net, p, weights, made) for made in (runner, NativeRunner(net, kind, weights)))
    oracle.adapters, expected, gave_way = adapters, {}, 0
    for seed in range(SCHEDULES):
        rng = random.Random(f"{weights}adapters{seed}")
        asked = requests_of(rng)
        engine = Engine(net, p, settings(rng, path="native", weights=weights), runner=runner, adapters=adapters)
        for each, answer in zip(asked, play(engine, asked, rng), strict=True):
            assert answer.error is None, answer.error
            if answer.deltas and answer.deltas[-1].finish:
                if name_of(each) not in expected:
                    expected[name_of(each)] = (oracle if each.adapter else bare).complete(each)
                assert same(whole(answer.deltas), expected[name_of(each)]), (seed, each)
        gave_way += engine.preempted
    assert gave_way


@pytest.mark.parametrize("path", ["torch", pytest.param("native", marks=pytest.mark.skipif(not compiler(), reason="g++"))])
def test_both_paths_say_what_the_merged_network_says(path: str) -> None:
    """In float32, but for the order of sums: the likelihoods of a prompt, which is read in pieces beside others."""
    p, net, adapters = network()
    merged = deepcopy(model(p, wide=True))
    for module, update in adapters.known["one"].updates.items():
        merged.get_submodule(module).weight.data += update.up @ update.down
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    asked = Request(parts=(Text(text=" ".join(WORDS), role=Role.USER),), params=params, want="text")
    engine = Engine(net, p, EngineConfig(path=path, weights="float32", step_tokens=16), adapters=adapters)
    answers = [Answer() for _ in NAMES]
    for name, answer in zip(NAMES, answers, strict=True):
        engine.submit(replace(asked, adapter=name), answer.take)
    while engine.step():
        pass
    said = {name: worth(whole(answer.deltas)) for name, answer in zip(NAMES, answers, strict=True)}
    expected = worth(Generator(merged, p).complete(asked))
    torch.testing.assert_close(said["one"], expected, atol=1e-4, rtol=1e-4)
    assert all((said[name] - expected).abs().max() > 0.01 for name in ("", "two"))


def worth(said: Completion) -> torch.Tensor:
    return torch.tensor([each.logprob for each in said.prompt[1:]])


def test_what_was_read_with_one_adapter_is_not_found_by_another() -> None:
    p, net, adapters = network()
    asked = Request(parts=(Text(text=" ".join(WORDS * 2), role=Role.USER),), params=SamplingParams(max_tokens=2))
    engine = Engine(net, p, EngineConfig(path="torch", page=8), weights="w", adapters=adapters)
    for name, found in (("", False), ("one", False), ("two", False), ("one", True), ("", True)):
        before = engine.tokens_cached
        say(engine, replace(asked, adapter=name))
        assert bool(engine.tokens_cached > before) == found, name
    engine.adapters = shelf(net, seed=7)  # another content under the same name
    before = engine.tokens_cached
    say(engine, replace(asked, adapter="one"))
    assert engine.tokens_cached == before


def test_an_adapter_that_is_not_here_is_refused() -> None:
    p, net, adapters = network()
    asked = Request(parts=(Text(text="where", role=Role.USER),), adapter="tow")
    for sampler in (Engine(net, p, EngineConfig(path="torch"), adapters=adapters), Generator(net, p, adapters=adapters)):
        with pytest.raises(BadInput, match="no adapter 'tow' here: did you mean 'two'"):
            list(sampler.stream(asked))


def test_a_request_without_an_adapter_has_the_digest_that_it_had() -> None:
    asked = Request(parts=())
    assert digest(asked) != digest(replace(asked, adapter="x"))
    assert digest(asked) == "27c1f9428b845b45f74978a1e407739d56da53b9323a9586348eced2ca04a848"
