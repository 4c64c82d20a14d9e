"""What adapters by request cost: words a second of 8 requests with four adapters among them, beside none.

    python bench/adapters.py [--weights bfloat16] [--rounds 3]

SmolLM2-135M-Instruct. The adapters are random and change all seven projections of every layer. One engine answers both
crowds in turn, so that nothing differs but the adapters; each crowd reads its prompts first and is then timed.
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
from litchi.schema.request import Delta, Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve.engine import Engine
from litchi.serve.scheduler import EngineConfig

REQUESTS, WORDS = 8, 48


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", default="bfloat16", choices=("bfloat16", "float32", "int8", "int4"))
    parser.add_argument("--path", default="native", choices=("native", "torch"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    args = parser.parse_args()
    loaded = load(find_checkpoint("smollm2"))
    for rank in args.ranks:
        adapters = Adapters(loaded.model, [random_adapter(loaded.model, str(i), rank) for i in range(4)])
        config = EngineConfig(path=args.path, weights=args.weights, remember=False)
        engine = Engine(loaded.model, loaded.processor, config, adapters=adapters)
        crowds = [[""] * REQUESTS, [str(i % 4) for i in range(REQUESTS)]]
        for names in crowds:
            rate(engine, names, words=4)
        pairs = [[rate(engine, names) for names in crowds] for _ in range(args.rounds)]
        bare = statistics.median(bare for bare, _ in pairs)
        ratio = statistics.median(theirs / bare for bare, theirs in pairs)
        measure = f"decode, {REQUESTS} requests, four adapters of rank {rank}, {args.path} {args.weights}"
        append("adapters", measure, ratio * bare, "tokens/s", peer="no adapter", peer_figure=bare)
    return 0


def rate(engine: Engine, names: list[str], words: int = WORDS) -> float:
    """Words a second that requests with these adapters are told, from when each has its first."""
    params = SamplingParams(max_tokens=words + 1, ignore_eos=True)
    told: list[list[float]] = [[] for _ in names]
    for index, name in enumerate(names):

        def put(piece: object, at: list[float] = told[index]) -> None:
            if isinstance(piece, Delta) and piece.tokens:
                at.append(time.perf_counter())

        text = Text(text=f"Tell me a long story about number {index}.", role=Role.USER)
        engine.submit(Request(parts=(text,), params=params, adapter=name), put)
    while engine.step():
        pass
    begun, over = max(each[0] for each in told), max(each[-1] for each in told)
    return sum(at > begun for each in told for at in each) / (over - begun)


def random_adapter(model: Model, name: str, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(int(name))
    updates = {}
    for ours, matrix in matrices_of(model).values():
        down = torch.randn(rank, matrix.in_features, generator=generator) / matrix.in_features**0.5
        updates[ours] = Update(down, torch.randn(matrix.out_features, rank, generator=generator) * 0.01)
    return Adapter(name, name, updates)


if __name__ == "__main__":
    sys.exit(main())
