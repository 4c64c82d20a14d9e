"""Which ids may come next if the answer must match a grammar: llguidance's parser, under limits of its own.

Its limits count steps and not seconds, so that a grammar that is refused is refused everywhere. Whoever lets strangers
in compiles their grammar in another process first (`serve/trial.py`): what makes this library fail must not end ours.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from litchi.config import BadInput
from litchi.record import need
from litchi.schema.grammar import SIZES, STEPS, written
from litchi.schema.request import Grammar
from litchi.schema.tokenizer import Tokenizer


class Constraint:
    """One answer under one grammar."""

    def __init__(self, tokenizer: Tokenizer, grammar: Grammar) -> None:
        """Raises BadInput for a grammar that does not compile within the limits."""
        library = need("serve", "llguidance")
        limits = library.LLParserLimits(**STEPS, **SIZES, verbose_errors=False)
        self.matcher: Any = library.LLMatcher(known(tokenizer), written(grammar), limits=limits, log_level=0)
        self.check()

    def allowed(self, size: int) -> Bool[Tensor, "V"]:
        """For each of `size` ids, whether the answer may go on with it. Raises BadInput where the limits end."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        self.check()
        mask_V = np.unpackbits(bits, bitorder="little", count=min(size, 8 * len(bits))).astype(bool)
        return torch.from_numpy(np.pad(mask_V, (0, size - len(mask_V))))

    def accept(self, index: int) -> None:
        self.matcher.consume_token(index)
        self.check()

    @property
    def done(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        return self.matcher.is_stopped()

    def check(self) -> None:
        if self.matcher.is_error():
            reason = next(iter(self.matcher.get_error().splitlines()), "")[:200]
            raise BadInput(f"the grammar of the answer does not work ({reason}); make it simpler")


TOKENIZERS: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()
LOCK = threading.Lock()


def known(tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance knows it; made once, which takes a second for a large vocabulary."""
    with LOCK:
        if tokenizer not in TOKENIZERS:
            make, ends = need("serve", "llguidance").LLTokenizer, sorted(tokenizer.ends)
            TOKENIZERS[tokenizer] = make(tokenizer.backend.to_str(), eos_token=ends or None)
        return TOKENIZERS[tokenizer]
