"""What guessing ahead saves, which must change no bit: text that repeats itself and free chat, one and four at once.

    python bench/guess.py [--rounds 2] [--guess ngram draft]

SmolLM2-135M-Instruct by the native path in bfloat16, with and without guesses in turn: from the document itself
(ngram), and by the same weights in 4 bits (draft). Text that repeats is greedy; chat is sampled at a temperature of
0.8, since this model's greedy chat repeats itself soon. All answers and log-probabilities must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.model.generate import whole
from litchi.model.weights import load
from litchi.schema.request import Completion, Delta, Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve.engine import Engine, runner_of
from litchi.serve.scheduler import EngineConfig

TOKENS, MANY = 160, 4
CODE = '''def area(shape):
    """The area of a shape, by its kind."""
    if shape.kind == "circle":
        return 3.14159 * shape.radius * shape.radius
    if shape.kind == "square":
        return shape.side * shape.side
    if shape.kind == "triangle":
        return 0.5 * shape.base * shape.height
    raise ValueError("unknown kind " + shape.kind)
'''
STORY = (
    "The village of Lowick lies between two hills. A narrow river runs through it, and an old stone bridge joins its "
    "two halves. Every Friday the farmers bring apples, cheese and bread to the market. Children play under the "
    "bridge in summer, and in winter they skate on the frozen river. The baker, Mr. Brown, wakes up before "
    "everybody else."
)
ASKED = {
    "repeated": (
        f"Repeat this code exactly:\n\n```python\n{CODE}```",
        f"Copy the following text word for word:\n\n{STORY}",
        f"Rename the function to surface, change nothing else:\n\n```python\n{CODE}```",
        f"Replace Friday by Monday in this text, and write all of it again:\n\n{STORY}",
    ),
    "chat": (
        "Why is the sky blue?",
        "Tell me a short story about a fox and a lantern.",
        "What should I think of before I buy a bicycle?",
        "Explain to a child how bread is made.",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--guess", nargs="+", default=["ngram", "draft"], choices=("ngram", "draft"))
    parser.add_argument("--show", action="store_true", help="print only, and add no row to the results")
    asked = parser.parse_args()
    loaded = load(find_checkpoint("smollm2"))
    runner = runner_of(loaded.model, EngineConfig())
    plain, *guessing = (
        Engine(loaded.model, loaded.processor, EngineConfig(guess=guess, remember=False), runner=runner)
        for guess in ("none", *asked.guess)
    )
    different = 0
    for name, texts in ASKED.items():
        how = params(0.8 if name == "chat" else 0.0)
        requests = [Request(parts=(Text(text=text, role=Role.USER),), params=how) for text in texts]
        run(plain, requests[:1])  # to warm up
        for guess, engine in zip(asked.guess, guessing, strict=True):
            for count in (1, MANY):
                different += compare(f"{name}, {count} at once, {guess}", plain, engine, requests, count, asked)
    print(f"{different} answers differ")
    return 1 if different else 0


def params(temperature: float) -> SamplingParams:
    return SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=1, logprobs=True)


def compare(
    what: str, plain: Engine, engine: Engine, requests: list[Request], count: int, asked: argparse.Namespace
) -> int:
    """A row of the medians; how many answers differ."""
    before, ratios, rates, words, different = engine.load(), [], [], 0, 0
    for turn in range(asked.rounds * (1 if count == 1 else 2)):  # as groups are fewer
        for first in range(0, len(requests), count):
            group = requests[first : first + count]
            order = (engine, plain) if (turn + first // count) % 2 else (plain, engine)
            done = {id(each): run(each, group) for each in order}
            (ours, answers), (theirs, others) = done[id(engine)], done[id(plain)]
            tokens = sum(len(answer.tokens) for answer in answers)
            ratios.append(theirs / ours)
            rates.append(tokens / theirs)
            words += tokens
            different += sum(a != b for a, b in zip(answers, others, strict=True))
    made, ratio, rate = engine.load(), statistics.median(ratios), statistics.median(rates)
    what += f": {made.accepted - before.accepted} of {made.guesses - before.guesses} guesses accepted, {words} tokens"
    if asked.show:
        print(f"{what}: {ratio * rate:.1f} tokens/s, without {rate:.1f}, ratio {ratio:.3f}", flush=True)
    else:
        append("guess", what, ratio * rate, "tokens/s", peer="no guesses", peer_figure=rate)
    return different


def run(engine: Engine, requests: list[Request]) -> tuple[float, list[Completion]]:
    """Seconds from the first question to the last word, and the answers."""
    told: list[list[Delta]] = [[] for _ in requests]
    began = time.perf_counter()
    for request, deltas in zip(requests, told, strict=True):
        engine.submit(request, taker(deltas))
    while engine.step():
        pass
    return time.perf_counter() - began, [whole(deltas) for deltas in told]


def taker(deltas: list[Delta]):  # noqa: ANN201
    def take(piece: object) -> None:
        if isinstance(piece, Delta):
            deltas.append(piece)

    return take


if __name__ == "__main__":
    sys.exit(main())
