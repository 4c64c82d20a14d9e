"""Cross-entropy by chunks is cross-entropy, and scores of all tokens never exist at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litchi.model.network import Model, ModelConfig, initialise
from litchi.model.objective import loss_of, text_loss
from litchi.schema.sequence import Batch, pack
from tests.laws.texts import document

VOCAB = 64


def model(tied: bool) -> Model:
    config = ModelConfig(
        vocab_size=VOCAB, width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_width=16, mlp_width=40, tied=tied
    )
    made = Model(config)
    initialise(made, 0)
    return made


def batch() -> Batch:
    return pack([document(n, seed=n) for n in (20, 3, 14)])  # 34 labels


def learned(made: Model, chunk: int) -> tuple[float, dict[str, Tensor]]:
    made.zero_grad()
    loss = loss_of(made, batch(), batch(), chunk)
    loss.over({"text": 7.0}, {}).backward()
    return float(loss.total["text"].detach()), {
        n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 8, 17, 33])
def test_chunks_are_invisible(tied: bool, chunk: int):
    made = model(tied)
    plain, gradients = learned(made, 0)
    total, by_chunks = learned(made, chunk)
    assert total == pytest.approx(plain, rel=1e-6)
    assert by_chunks.keys() == gradients.keys()
    for name, gradient in gradients.items():  # fp32 sums in another order
        assert float((by_chunks[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()), name


def test_a_chunk_of_all_tokens_is_the_plain_path():
    made = model(True)
    (plain, gradients), (total, by_chunks) = learned(made, 0), learned(made, 34)
    assert total == plain and all(torch.equal(by_chunks[n], g) for n, g in gradients.items())


def test_chunks_in_bfloat16_are_no_further_from_fp32_than_the_plain_path():
    made = model(False)
    _, exact = learned(made, 0)
    with torch.autocast("cpu", torch.bfloat16):
        rough, by_chunks = learned(made, 0)[1], learned(made, 8)[1]

    def error(found: dict[str, Tensor]) -> float:
        return max(float((found[n] - g).norm() / g.norm()) for n, g in exact.items())

    assert error(by_chunks) <= 1.1 * error(rough) < 0.1


def test_a_frozen_head_gets_no_gradient_and_passes_one_on():
    made = model(False)
    gradients = learned(made, 0)[1]
    made.lm_head.weight.requires_grad_(False)
    by_chunks = learned(made, 8)[1]
    assert "lm_head.weight" not in by_chunks
    for name, gradient in by_chunks.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-7, msg=name)


def test_without_gradients_the_sum_is_the_same():
    made = model(True)
    plain, _ = learned(made, 0)
    with torch.no_grad():
        assert float(loss_of(made, batch(), batch(), 8).total["text"]) == pytest.approx(plain, rel=1e-6)


class Widest(TorchDispatchMode):
    """The most rows that any tensor as wide as the vocabulary had."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == VOCAB:
            self.rows = max(self.rows, len(out))
        return out


@pytest.mark.parametrize(("chunk", "rows"), [(0, 200), (50, 50)])
def test_scores_exist_for_one_chunk_at_a_time(chunk: int, rows: int):
    made, x = model(True), torch.randn(200, 32, requires_grad=True)
    with Widest() as widest:
        text_loss(made, x, torch.arange(200) % VOCAB, torch.ones(200), chunk).backward()
    assert widest.rows == rows
