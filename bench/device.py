"""The engine on a GPU: words a second beside transformers, its share of what the device can do, the price of exactness.

    python bench/device.py [CHECKPOINT] [--counts 1 16 64] [--tokens 128]

A checkpoint of ours, SmolLM2-135M unless another is named, in bfloat16. What the device can do is measured first, by a
copy and a product. A step of decoding reads all weights and the keys and values of what was read before; a prompt costs
two operations for each weight and token. On a machine without a GPU it measures the same on the CPU, to show that it
runs, and writes no row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.cli import main as cli
from litchi.model.weights import load
from litchi.schema.request import Delta, Request, SamplingParams
from litchi.serve.engine import Engine
from litchi.serve.placing import placing
from litchi.serve.scheduler import EngineConfig

PROMPT, LONG, ROUNDS = 128, 2048, 3
CUDA = torch.cuda.is_available()
WAYS = {"": {}, ", not exact": {"exact": False}, ", eager": {"graphs": False}}


@dataclass(frozen=True, slots=True)
class Figures:
    rate: float
    """Words of answers a second, while all answer."""
    step: float
    """Seconds of a step then."""
    first: float
    """Seconds until the last has its first word."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="smollm2")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 16, 64] if CUDA else [1, 2])
    parser.add_argument("--tokens", type=int, default=128 if CUDA else 8)
    asked = parser.parse_args()
    folder = find_checkpoint(asked.checkpoint)
    bandwidth, product = limits()
    print(f"a copy moves {bandwidth / 1e9:,.0f} GB/s, a product does {product / 1e12:,.1f} TFLOP/s in bfloat16")
    found = {way: ours(folder, asked.counts, asked.tokens, bandwidth, product, way) for way in WAYS}
    theirs = transformers(folder, asked.counts, asked.tokens)
    for way, by_count in found.items():
        for count, figures in by_count.items():
            peer = {"peer": "transformers, bfloat16", "peer_figure": theirs[count]} if count in theirs else {}
            row(f"answers of {count} at once{way}", figures.rate, "tokens/s", **peer)
    for count in asked.counts:
        row(f"price of exactness, {count} at once", found[""][count].step / found[", not exact"][count].step, "times")


def row(measure: str, figure: float, unit: str, **peer: object) -> None:
    if CUDA:
        append("device", f"{torch.cuda.get_device_name()}: {measure}", figure, unit, **peer)  # type: ignore[arg-type]
    else:
        print(f"{measure}: {figure:.4g} {unit} {peer or ''}")


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], times: int = 10) -> float:
    work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def limits() -> tuple[float, float]:
    """Bytes a second that are read or written, and operations a second of a product in bfloat16."""
    place, side = ("cuda", 8192) if CUDA else ("cpu", 512)
    source = torch.empty(1 << 30 if CUDA else 1 << 26, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=place, dtype=torch.bfloat16) for _ in range(2))
    copied = seconds_of(lambda: target.copy_(source))
    return 2 * source.numel() / copied, 2 * side**3 / seconds_of(lambda: a @ b)


def ours(
    folder: Path, counts: list[int], tokens: int, bandwidth: float, product: float, way: str
) -> dict[int, Figures]:
    c = EngineConfig(
        max_running=max(counts), cache_tokens=1 << 16, guess="none", remember=False, path="auto" if CUDA else "torch"
    )
    c = replace(c, exact=WAYS[way].get("exact", True))
    began = time.perf_counter()
    loaded = load(folder, check=False, place=placing(c))
    engine = Engine(loaded.model, loaded.processor, c, take=True).look()
    reader = getattr(engine.runner, "reader", None)
    if reader is not None and not WAYS[way].get("graphs", True):
        reader.make_graphs = None
    print(f"{engine.runner.name}{way}: {engine.mode}; there after {time.perf_counter() - began:.1f} s")
    weights = sum(p.numel() for name, p in loaded.model.named_parameters() if not name.startswith("embed_positions"))
    m, found = loaded.model.config, {}
    for count in counts:
        rounds = [play(engine, count, PROMPT, tokens) for _ in range(1 + ROUNDS)][1:]  # the first one captures
        found[count] = figures = sorted(rounds, key=lambda f: f.rate)[len(rounds) // 2]
        kept = count * (PROMPT + tokens / 2) * 2 * m.num_layers * m.num_kv_heads * m.head_width
        share = 2 * (weights + kept) / figures.step / bandwidth
        row(f"bandwidth used in decoding, {count} at once{way}", share, "share of a copy's")
    rounds = [play(engine, 1, LONG, 1).first for _ in range(1 + ROUNDS)][1:]
    row(
        f"a prompt of {LONG} tokens{way}",
        2 * weights * LONG / statistics.median(rounds) / product,
        "share of a product's",
    )
    engine.close()
    return found


def play(engine: Engine, count: int, prompt: int, tokens: int) -> Figures:
    """So many at once, each with a prompt of its own."""
    marks: list[list[float]] = [[] for _ in range(count)]
    size = engine.model.config.vocab_size
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    for index, own in enumerate(marks):

        def take(piece: object, own: list[float] = own) -> None:
            if isinstance(piece, Delta) and piece.tokens:
                own.append(time.perf_counter())

        ids = tuple((31 * index + 7 * at) % (size - 100) + 50 for at in range(prompt))
        engine.submit(Request(parts=(), tokens=ids, want="text", params=params), take)
    while engine.step():
        pass
    last, end = max(own[0] for own in marks), max(own[-1] for own in marks)
    steps = [b - a for own in marks for a, b in zip(own, own[1:], strict=False) if a >= last]
    said = sum(at > last for own in marks for at in own)
    return Figures(said / (end - last) if end > last else float("nan"), statistics.median(steps or [0.0]), last - began)


def transformers(folder: Path, counts: list[int], tokens: int) -> dict[int, float]:
    """Words a second of a batch by `generate`, its prompt included; nothing where transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: pip install transformers", file=sys.stderr)
        return {}
    place, found = "cuda" if CUDA else "cpu", {}
    with tempfile.TemporaryDirectory() as exported:
        assert cli(["convert", str(folder), exported + "/hf", "--to", "huggingface", "--dtype", "bfloat16"]) == 0
        model = AutoModelForCausalLM.from_pretrained(exported + "/hf", dtype=torch.bfloat16).to(place).eval()
    for count in counts:
        ids = torch.arange(count * PROMPT, device=place).view(count, PROMPT) % (model.config.vocab_size - 100) + 50

        def decode(length: int, ids: torch.Tensor = ids) -> float:
            told = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
            return seconds_of(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **told), 2)

        found[count] = count * (tokens - 1) / (decode(tokens) - decode(1))
    return found


if __name__ == "__main__":
    main()
