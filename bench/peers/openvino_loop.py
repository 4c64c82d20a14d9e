"""OpenVINO GenAI's continuous batching on the same GGUF file.

Run by bench/engine.py in an environment of its own: python openvino_loop.py MODEL.gguf PROMPTS.json
"""

from __future__ import annotations

import json
import resource
import sys
import time

import openvino_genai as ov


def main() -> None:
    began = time.perf_counter()
    asked = json.load(open(sys.argv[2]))
    scheduler = ov.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = 2, 16, False
    properties = {"INFERENCE_NUM_THREADS": asked["threads"], "scheduler_config": scheduler}
    pipe = ov.LLMPipeline(sys.argv[1], "CPU", **properties)
    started = time.perf_counter() - began
    config = ov.GenerationConfig(max_new_tokens=asked["tokens"], ignore_eos=True, do_sample=False)
    config.apply_chat_template = False
    found = {}
    for count in asked["counts"]:
        found[count] = [run(pipe, config, asked["prompts"][:count]) for _ in range(asked["rounds"])]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"start": started, "memory": memory, "found": found}))


def run(pipe, config, prompts: list[str]) -> dict:
    began = time.perf_counter()
    answer = pipe.generate(prompts, config)
    seconds = time.perf_counter() - began
    metrics = answer.perf_metrics
    alone = len(prompts) == 1  # of several it tells means over all of them, which are no times of steps
    return {
        "seconds": seconds,
        "first": [metrics.get_ttft().mean / 1000 if alone else float("nan")],
        "steps": [metrics.get_tpot().mean / 1000] if alone else [],
        "tokens": metrics.get_num_generated_tokens(),
    }


if __name__ == "__main__":
    main()
