"""What adapters by request cost: words a second of 8 requests with four adapters among them, beside none.

    python bench/adapters.py [--weights bfloat16] [--rounds 3]

SmolLM2-135M-Instruct. The adapters are random and change all seven projections of every layer. One engine answers both
crowds in turn, so that nothing differs but the adapters; each crowd reads its prompts first and is then timed. Then the
crowd is answered one by one: every bit of every log-probability must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.model.adapters import Adapter, Update, matrices_of
from litchi.model.lowrank import Adapters
from litchi.model.network import Model
from litchi.model.weights import load
from litchi.schema.request import Completion, Delta, Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve.engine import Engine
from litchi.serve.scheduler import EngineConfig

REQUESTS = 8


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", default="bfloat16", choices=("bfloat16", "float32", "int8", "int4"))
    parser.add_argument("--path", default="native", choices=("native", "torch"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=48, help="of each answer")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    args = parser.parse_args()
    loaded, different = load(find_checkpoint("smollm2")), 0
    for rank in args.ranks:
        adapters = Adapters(loaded.model, [random_adapter(loaded.model, str(i), rank) for i in range(4)])
        config = EngineConfig(path=args.path, weights=args.weights, remember=False)
        engine = Engine(loaded.model, loaded.processor, config, adapters=adapters)
        crowds = [[""] * REQUESTS, [str(i % 4) for i in range(REQUESTS)]]
        for names in crowds:
            rate(engine, names, 4)
        pairs = [[rate(engine, names, args.words) for names in crowds] for _ in range(args.rounds)]
        bare = statistics.median(bare for bare, _ in pairs)
        ratio = statistics.median(theirs / bare for bare, theirs in pairs)
        measure = f"decode, {REQUESTS} requests, four adapters of rank {rank}, {args.path} {args.weights}"
        append("adapters", measure, ratio * bare, "tokens/s", peer="no adapter", peer_figure=bare)
        crowd = questions(crowds[1], args.words // 2)
        alone = [said for each in crowd for said in answers(engine, [each])]
        different += sum(a != b for a, b in zip(answers(engine, crowd), alone, strict=True))
    measure = f"answers that neighbours with adapters change, {args.path} {args.weights}"
    append("adapters", measure, different, f"of {REQUESTS * len(args.ranks)}")
    return 1 if different else 0


def rate(engine: Engine, names: list[str], words: int) -> float:
    """Words a second that requests with these adapters are told, from when each has its first."""
    told: list[list[float]] = [[] for _ in names]
    for index, request in enumerate(questions(names, words + 1)):

        def put(piece: object, at: list[float] = told[index]) -> None:
            if isinstance(piece, Delta) and piece.tokens:
                at.append(time.perf_counter())

        engine.submit(request, put)
    while engine.step():
        pass
    begun, over = max(each[0] for each in told), max(each[-1] for each in told)
    return sum(at > begun for each in told for at in each) / (over - begun)


def questions(names: list[str], words: int) -> list[Request]:
    params = SamplingParams(max_tokens=words, ignore_eos=True, logprobs=True)
    texts = [Text(text=f"Tell me a long story about number {index}.", role=Role.USER) for index in range(len(names))]
    return [Request(parts=(t,), params=params, adapter=name) for t, name in zip(texts, names, strict=True)]


def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    """Asked all at once."""
    told: list[list[Completion]] = [[] for _ in requests]
    for request, mine in zip(requests, told, strict=True):
        engine.submit(request, lambda piece, mine=mine: mine.append(piece), stream=False)
    while engine.step():
        pass
    return [pieces[0] for pieces in told]


def random_adapter(model: Model, name: str, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(int(name))
    updates = {}
    for ours, matrix in matrices_of(model).values():
        down = torch.randn(rank, matrix.in_features, generator=generator) / matrix.in_features**0.5
        updates[ours] = Update(down, torch.randn(matrix.out_features, rank, generator=generator) * 0.01)
    return Adapter(name, name, updates)


if __name__ == "__main__":
    sys.exit(main())
