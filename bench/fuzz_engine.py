"""Hundreds of random schedules on real weights: does any change a bit of any answer, and what does that promise cost?

    python bench/fuzz_engine.py [--schedules 80] [--path native]

Each schedule draws arrivals, lengths, chunk and page sizes, memory, preemptions, cancels, shared beginnings, and
whether words are guessed ahead. Every answer and every log-probability must equal those of an oracle that reads each
document alone and whole for every token: the reference decoder (torch), or the same kernels (native). Networks:
SmolLM2-135M-Instruct (text) and the tiny checkpoint (text, pictures, frames, actions; always torch, since its heads are
56 wide), both in fp32 and bf16. With torch also the cost: the time of the same requests with the rules off, in turn;
native knows no other way to add.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.model import exact
from litchi.model.generate import Generator, whole
from litchi.model.native import supports
from litchi.model.weights import Checkpoint, load
from litchi.schema.request import Completion, Request, SamplingParams
from litchi.schema.sample import Action, Image, Role, Text
from litchi.serve.engine import Engine, runner_of
from litchi.serve.runner import Runner
from litchi.serve.scheduler import EngineConfig
from tests.serve.test_engine import Alone, Answer, play, same

TEXT = Path(__file__).read_text() + Path("README.md").read_text()
ROUNDS = 5
Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--schedules", type=int, default=80, help="of each network and type")
    parser.add_argument("--path", choices=("native", "torch"), default="native")
    parser.add_argument("--show", action="store_true", help="print only, and add no row to the results")
    asked = parser.parse_args()
    wrong = 0
    for name, draw in (("smollm2", spoken), ("tiny", seen)):
        loaded = load(find_checkpoint(name))
        pool = [draw(random.Random(f"{name}{i}")) for i in range(40)]
        for dtype in DTYPES:
            wrong += fuzz(loaded, name, pool, dtype, asked)
            if name == "smollm2" and asked.path == "torch":
                price(loaded, dtype, show=asked.show)
    print(f"{4 * asked.schedules} schedules, {wrong} answers differ")
    return 1 if wrong else 0


def fuzz(loaded: Checkpoint, name: str, pool: list[Request], dtype: Dtype, asked: argparse.Namespace) -> int:
    """How many answers differ."""
    path = asked.path if supports(loaded.model.config) else "torch"
    runner = runner_of(loaded.model, EngineConfig(path=path, weights=dtype))
    if path == "native":
        oracle = Alone(loaded.model, loaded.processor, dtype, runner)
    else:
        steady = exact.apply(deepcopy(loaded.model))
        oracle = Generator(steady, loaded.processor, cached=False, dtype=getattr(torch, dtype))
    expected: dict[int, Completion] = {}
    told = differ = gave_way = remembered = 0
    for seed in range(asked.schedules):
        engine, answers = schedule(loaded, pool, seed, dtype, runner)
        for index, answer in answers:
            if answer.deltas and answer.deltas[-1].finish:
                if index not in expected:
                    expected[index] = oracle.complete(pool[index])
                told, differ = told + 1, differ + (not same(whole(answer.deltas), expected[index]))
        gc.collect()  # engines and what they ran hold on to each other
        gave_way, remembered = gave_way + engine.preempted, remembered + engine.tokens_cached
    what = f"{name} {dtype} by {path}, {asked.schedules} schedules, {gave_way} preemptions"
    what += f", {remembered} tokens remembered"
    print(f"{what}: {told} answers, {differ} differ", flush=True)
    if not asked.show:
        append("fuzz_engine", f"{what}: equal", told - differ, "answers", peer="answers", peer_figure=told)
    return differ


def schedule(
    loaded: Checkpoint, pool: list[Request], seed: int, dtype: Dtype, runner: Runner
) -> tuple[Engine, list[tuple[int, Answer]]]:
    """Requests of a pool by their index, and what each was told."""
    rng = random.Random(f"{dtype}{seed}")
    chosen = [rng.randrange(len(pool)) for _ in range(rng.randrange(3, 9))]
    config = EngineConfig(
        max_running=rng.choice((1, 4, 16)),
        step_tokens=rng.choice((7, 32, 128, 512)),
        page=rng.choice((32, 64, 128)),
        cache_tokens=rng.choice((768, 768, 4096)),
        remember=rng.random() < 0.8,
        weights=dtype,
        guess=rng.choice(("none", "ngram")),
    )
    engine = Engine(loaded.model, loaded.processor, config, runner=runner)
    answers = play(engine, [pool[index] for index in chosen], rng)
    return engine, list(zip(chosen, answers, strict=True))


def spoken(rng: random.Random) -> Request:
    """A question about a piece of text; pieces often begin alike, some fill more than one block of 512 keys."""
    start, words = rng.choice((0, 0, 700)), rng.choice((10, 10, 40, 60, 120, 240))
    text = Text(text=" ".join(TEXT[start:].split()[:words]) + f" What is {rng.randrange(9)}?", role=Role.USER)
    params = SamplingParams(
        max_tokens=rng.choice((1, 4, 10)), temperature=rng.choice((0.0, 0.8)), seed=rng.randrange(9), logprobs=True
    )
    return Request(parts=(text,), params=params)


def seen(rng: random.Random) -> Request:
    """Of every want that the tiny checkpoint has, about real rooms."""
    from litchi.envs.minigrid import SPACE, Room
    from litchi.serve.sessions import frame_of

    pixels = frame_of(Room("BabyAI-GoToLocal-v0").reset(rng.randrange(4)))
    want = rng.choice(("chat", "chat", "image", "frame", "action"))
    words = Text(
        text=rng.choice(("What do you see?", "Where is the red ball?", "a room with a blue key")), role=Role.USER
    )
    parts: tuple = (words,)
    if want == "chat":
        parts = (Image(pixels=pixels, role=Role.USER), words)
    if want in ("frame", "action"):
        parts = (Text(text="go to the red ball", role=Role.USER), Image(pixels=pixels))
    if want == "frame":
        parts = (*parts[1:], Action.discrete(rng.randrange(3), SPACE))
    params = SamplingParams(
        max_tokens=rng.choice((2, 12, 30)),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(9),
        steps=rng.choice((0, 2)),
        logprobs=True,
    )
    return Request(parts=parts, want=want, params=params, space=SPACE)


def price(loaded: Checkpoint, dtype: Dtype, *, show: bool) -> None:
    """Sixteen conversations at once with the rules, and without, in turn."""
    params = SamplingParams(max_tokens=24)
    texts = [" ".join(TEXT.split()[9 * i : 9 * i + 100]) for i in range(16)]
    requests = [Request(parts=(Text(text=text, role=Role.USER),), params=params) for text in texts]
    engines = [
        Engine(
            deepcopy(loaded.model),
            loaded.processor,
            EngineConfig(path="torch", weights=dtype, exact=steady, remember=False),
        )
        for steady in (True, False)
    ]
    pairs = [[clock(engine, requests) for engine in engines] for _ in range(ROUNDS + 1)][1:]
    ratio = statistics.median(a / b for a, b in pairs)
    theirs = statistics.median(b for _, b in pairs)
    print(f"{dtype}: {ratio:.3f} times the time without the rules", flush=True)
    if not show:
        append(
            "fuzz_engine",
            f"16 conversations of smollm2, {dtype}, exact",
            ratio * theirs,
            "s",
            peer="rules off",
            peer_figure=theirs,
        )


def clock(engine: Engine, requests: list[Request]) -> float:
    for request in requests:
        engine.submit(replace(request), lambda _: None)
    began = time.perf_counter()
    while engine.step():
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
