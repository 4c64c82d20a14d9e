"""What remembering what was read saves: a conversation of 16 turns, and 64 questions behind the same examples.

    python bench/prefix.py

SmolLM2-135M-Instruct, once with the memory of pages and once without, in turn; the answers must be the same to the last
bit of every log-probability.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.model.generate import whole
from litchi.model.weights import load
from litchi.schema.request import Completion, Request, SamplingParams
from litchi.schema.sample import Part, Role, Text
from litchi.serve.engine import Engine
from litchi.serve.scheduler import EngineConfig

ROUNDS = 3
WORDS = Path("README.md").read_text().split()


def main() -> int:
    loaded = load(find_checkpoint("smollm2"))
    different = 0
    for name, play in (("a conversation of 16 turns", conversation), ("64 questions after 6 examples", examples)):
        pairs = []
        for _ in range(ROUNDS):
            told = []
            for remember in (True, False):
                engine = Engine(loaded.model, loaded.processor, EngineConfig(remember=remember)).start()
                began = time.perf_counter()
                answers = play(engine)
                told.append((time.perf_counter() - began, answers, engine.load()))
                engine.close()
            (ours, answers, load_), (theirs, others, _) = told
            pairs.append((ours, theirs))
            different += sum(a != b for a, b in zip(answers, others, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        theirs = statistics.median(b for _, b in pairs)
        append(
            "prefix", f"{name}, pages remembered", ratio * theirs, "s", peer="nothing remembered", peer_figure=theirs
        )
        print(f"{name}: {load_.tokens_cached} tokens remembered, {load_.tokens_read} read")
    append("prefix", "answers that the memory changes", different, f"of {ROUNDS * 80}")
    return 1 if different else 0


def conversation(engine: Engine) -> list[Completion]:
    """Each turn is asked with all before it."""
    parts: list[Part] = []
    answers = []
    for turn in range(16):
        parts.append(Text(text=" ".join(WORDS[30 * turn : 30 * turn + 40]) + " What is this?", role=Role.USER))
        params = SamplingParams(max_tokens=24, logprobs=True)
        answers.append(engine.complete(Request(parts=tuple(parts), params=params)))
        parts.append(Text(text=answers[-1].text, role=Role.ASSISTANT))
    return answers


def examples(engine: Engine) -> list[Completion]:
    """All at once, as an evaluation asks."""
    shown = "\n\n".join(f"Question: {' '.join(WORDS[40 * i : 40 * i + 40])}\nAnswer: {WORDS[i]}" for i in range(6))
    params = SamplingParams(max_tokens=4, logprobs=True)
    texts = [f"{shown}\n\nQuestion: {' '.join(WORDS[9 * i : 9 * i + 9])}\nAnswer:" for i in range(64)]
    requests = [Request(parts=(Text(text=text, role=Role.NONE),), params=params, want="text") for text in texts]
    first = engine.complete(requests[0])
    streams = [engine.stream(request) for request in requests[1:]]
    heads = [next(stream) for stream in streams]
    return [first, *(whole([head, *stream]) for head, stream in zip(heads, streams, strict=True))]


if __name__ == "__main__":
    sys.exit(main())
