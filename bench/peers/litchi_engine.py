"""Our engine on the same prompts, in a process of its own.

Run by bench/engine.py: python litchi_engine.py CHECKPOINT PROMPTS.json WEIGHTS
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

BEGAN = time.perf_counter()

import torch  # noqa: E402

from litchi.model.weights import load  # noqa: E402
from litchi.schema.request import Delta, Request, SamplingParams  # noqa: E402
from litchi.schema.sample import Role, Text  # noqa: E402
from litchi.serve.engine import Engine, EngineConfig  # noqa: E402


def main() -> None:
    asked = json.load(open(sys.argv[2]))
    torch.set_num_threads(asked["threads"])
    loaded = load(Path(sys.argv[1]), check=False)
    config = EngineConfig(weights=sys.argv[3], remember=False, path=asked.get("path", "auto"), guess="none")
    engine = Engine(loaded.model, loaded.processor, config, take=True)
    started = time.perf_counter() - BEGAN
    params = SamplingParams(max_tokens=asked["tokens"], ignore_eos=True)
    requests = [
        Request(parts=(Text(text=text, role=Role.NONE),), want="text", params=params) for text in asked["prompts"]
    ]
    run(engine, requests[:1])  # as peers read a prompt to warm up
    found = {count: [run(engine, requests[:count]) for _ in range(asked["rounds"])] for count in asked["counts"]}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"start": started, "memory": memory, "found": found}))


def run(engine: Engine, requests: list[Request]) -> dict:
    marks: list[list[float]] = [[] for _ in requests]

    def taker(index: int) -> Callable[[object], None]:
        def take(piece: object) -> None:
            if isinstance(piece, Delta) and piece.tokens:
                marks[index].append(time.perf_counter())

        return take

    began = time.perf_counter()
    read = engine.tokens_read
    tracks = [engine.submit(request, taker(index)) for index, request in enumerate(requests)]
    while engine.step():
        pass
    seconds = time.perf_counter() - began
    first = [times[0] - began for times in marks]
    last = max(times[0] for times in marks)
    steps = [b - a for times in marks for a, b in zip(times, times[1:], strict=False) if a >= last]
    prompt = sum(track.program.prompt_tokens for track in tracks)
    assert engine.tokens_read - read >= prompt
    return {"prefill": last - began, "seconds": seconds, "first": first, "steps": steps, "prompt": prompt}


if __name__ == "__main__":
    main()
