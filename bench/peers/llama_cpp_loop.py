"""llama.cpp's own batched loop, without a server: sequences that are decoded together, one token each a step.

Run by bench/engine.py in an environment of its own: python llama_cpp_loop.py MODEL.gguf PROMPTS.json
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time

import llama_cpp as ll
import numpy as np


def main() -> None:
    began = time.perf_counter()
    asked = json.load(open(sys.argv[2]))
    ll.llama_backend_init()
    ll.llama_log_set(SILENT, None)
    model = ll.llama_model_load_from_file(sys.argv[1].encode(), ll.llama_model_default_params())
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16_384, 512, 512, 16
    params.n_threads = params.n_threads_batch = asked["threads"]
    context = ll.llama_init_from_model(model, params)
    vocab = ll.llama_model_get_vocab(model)
    started = time.perf_counter() - began
    prompts = [tokens_of(vocab, text) for text in asked["prompts"]]
    found = {}
    for count in asked["counts"]:
        found[count] = [run(context, vocab, prompts[:count], asked["tokens"]) for _ in range(asked["rounds"])]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"start": started, "memory": memory, "found": found}))


@ll.llama_log_callback
def SILENT(_level, _text, _data) -> None:
    pass


def tokens_of(vocab, text: str) -> list[int]:
    raw = text.encode()
    room = (ll.llama_token * (len(raw) + 8))()
    count = ll.llama_tokenize(vocab, raw, len(raw), room, len(room), True, False)
    return list(room[:count])


def run(context, vocab, prompts: list[list[int]], num_tokens: int) -> dict:
    """Read all prompts, then decode greedily; seconds of each and of every step."""
    ll.llama_memory_clear(ll.llama_get_memory(context), True)
    size, num_vocab = 512, ll.llama_vocab_n_tokens(vocab)
    batch = ll.llama_batch_init(size, 0, 1)
    began = time.perf_counter()
    last, first = [], []
    for number, prompt in enumerate(prompts):
        for start in range(0, len(prompt), size):
            piece = prompt[start : start + size]
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                put(batch, i, token, start + i, number, start + i + 1 == len(prompt))
            assert ll.llama_decode(context, batch) == 0
        last.append(best(context, len(piece) - 1, num_vocab))
        first.append(time.perf_counter() - began)
    prefill = time.perf_counter() - began
    steps = []
    for step in range(1, num_tokens):
        mark = time.perf_counter()
        batch.n_tokens = len(prompts)
        for number, prompt in enumerate(prompts):
            put(batch, number, last[number], len(prompt) + step - 1, number, True)
        assert ll.llama_decode(context, batch) == 0
        last = [best(context, number, num_vocab) for number in range(len(prompts))]
        steps.append(time.perf_counter() - mark)
    seconds = time.perf_counter() - began
    ll.llama_batch_free(batch)
    return {"prefill": prefill, "seconds": seconds, "first": first, "steps": steps, "prompt": sum(map(len, prompts))}


def put(batch, i: int, token: int, position: int, sequence: int, wanted: bool) -> None:
    batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
    batch.seq_id[i][0], batch.logits[i] = sequence, wanted


def best(context, index: int, num_vocab: int) -> int:
    scores = ll.llama_get_logits_ith(context, index)
    return int(np.ctypeslib.as_array(ctypes.cast(scores, ctypes.POINTER(ctypes.c_float)), (num_vocab,)).argmax())


if __name__ == "__main__":
    main()
