"""How fast the reference decoder answers on the shipped checkpoint, with the cache and without it."""

from __future__ import annotations

import time
from pathlib import Path

from bench.row import append
from litchi.data.jobs import JOBS
from litchi.data.ticket import Ticket
from litchi.model.generate import Generator
from litchi.model.weights import load
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role

ASKED = 12


def main() -> None:
    loaded = load(Path(__file__).resolve().parents[1] / "checkpoints" / "tiny")
    cached, oracle = (Generator(loaded.model, loaded.processor, cached=flag) for flag in (True, False))
    captions = [Request(parts=before_answer("describe", i)) for i in range(ASKED)]
    fast, slow = tokens_per_second(cached, captions), tokens_per_second(oracle, captions)
    append(
        "decode",
        "caption tokens, one request",
        fast,
        "tokens/s",
        peer="oracle that reads everything again",
        peer_figure=slow,
    )
    rollouts = [JOBS["foresee"](Ticket("foresee", "test", i, 0)).parts[:2] for i in range(ASKED)]
    frames = [Request(parts=parts, want="frame") for parts in rollouts]
    append("decode", "frames foreseen, one session", per_second(cached, frames), "frames/s")
    drawings = [
        Request(parts=before_answer("draw", i), want="image", params=SamplingParams(temperature=1.0))
        for i in range(ASKED)
    ]
    append("decode", "pictures drawn", per_second(cached, drawings), "pictures/s")


def before_answer(source: str, index: int) -> tuple:
    parts = JOBS[source](Ticket(source, "test", index, 0)).parts
    first = next(i for i, part in enumerate(parts) if part.role is Role.ASSISTANT)
    return parts[:first]


def tokens_per_second(generator: Generator, requests: list[Request]) -> float:
    began = time.perf_counter()
    made = sum(len(generator.complete(request).tokens) for request in requests)
    return made / (time.perf_counter() - began)


def per_second(generator: Generator, requests: list[Request]) -> float:
    began = time.perf_counter()
    for request in requests:
        generator.complete(request)
    return len(requests) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
