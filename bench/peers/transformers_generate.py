"""transformers' generate in bfloat16, all prompts as one batch.

Run by bench/engine.py: python transformers_generate.py MODEL.gguf PROMPTS.json
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402


def main() -> None:
    asked, file = json.load(open(sys.argv[2])), Path(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(**place, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    started = time.perf_counter() - BEGAN
    run(model, tokenizer, asked["prompts"][:1], 8)
    found = {
        count: [run(model, tokenizer, asked["prompts"][:count], asked["tokens"]) for _ in range(asked["rounds"])]
        for count in asked["counts"]
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"start": started, "memory": memory, "found": found}))


class Marks(BaseStreamer):
    """When a step has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def run(model, tokenizer, prompts: list[str], num_tokens: int) -> dict:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    marks = Marks() if len(prompts) == 1 else None  # it streams single answers only
    began = time.perf_counter()
    model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, streamer=marks)
    seconds = time.perf_counter() - began
    times = marks.times[1:] if marks else [began + seconds]
    steps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return {"seconds": seconds, "first": [times[0] - began], "steps": steps, "prompt": int(inputs.attention_mask.sum())}


if __name__ == "__main__":
    main()
