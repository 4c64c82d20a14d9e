"""What llama.cpp's own arithmetic makes of texts: all scores of windows, and the likelihood of options after questions.

Run by bench/formats.py in an environment of its own: python llama_cpp_scores.py MODEL.gguf WORK.json SCORES.npy
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp as ll
import numpy as np
from llama_cpp_loop import SILENT, put


def main() -> None:
    asked = json.load(open(sys.argv[2]))
    ll.llama_backend_init()
    ll.llama_log_set(SILENT, None)
    model = ll.llama_model_load_from_file(sys.argv[1].encode(), ll.llama_model_default_params())
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 1024, 512, 512, 1
    params.n_threads = params.n_threads_batch = asked["threads"]
    context = ll.llama_init_from_model(model, params)
    num_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    reader = Reader(context, num_vocab)
    np.save(sys.argv[3], np.stack([reader.read(window, 0, wanted=True) for window in asked["windows"]]))
    print(json.dumps([reader.worths(question, options) for question, options in asked["items"]]))


class Reader:
    """One sequence, whose end can be read again in another way."""

    def __init__(self, context, num_vocab: int) -> None:
        self.context, self.num_vocab = context, num_vocab
        self.batch = ll.llama_batch_init(512, 0, 1)

    def read(self, ids: list[int], start: int, *, wanted: bool) -> np.ndarray:
        """Scores (n, V) of all tokens, or of the last."""
        memory = ll.llama_get_memory(self.context)
        ll.llama_memory_seq_rm(memory, 0, start, -1)
        self.batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            put(self.batch, i, token, start + i, 0, wanted or i + 1 == len(ids))
        assert ll.llama_decode(self.context, self.batch) == 0
        return np.stack([self.row(i) for i in range(0 if wanted else len(ids) - 1, len(ids))])

    def row(self, index: int) -> np.ndarray:
        scores = ll.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(ctypes.cast(scores, ctypes.POINTER(ctypes.c_float)), (self.num_vocab,)).copy()

    def worths(self, question: list[int], options: list[list[int]]) -> list[float]:
        first, found = self.read(question, 0, wanted=False), []
        for option in options:
            rest = [self.read(option[:-1], len(question), wanted=True)] if len(option) > 1 else []
            scores = np.concatenate([first, *rest]).astype(np.float64)
            most = scores.max(1, keepdims=True)
            log = scores - most - np.log(np.exp(scores - most).sum(1, keepdims=True))
            found.append(float(log[np.arange(len(option)), option].sum()))
        return found


if __name__ == "__main__":
    main()
