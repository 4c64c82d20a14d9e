"""A mixture: each token gets exactly what its experts make of it, however readings are sorted and multiplied."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from litchi.model.moe import Mixture, SparseMLP, apply_experts_grouped, apply_experts_loop, groupable
from litchi.model.network import MLP, Model, ModelConfig, initialise
from litchi.schema.sequence import pack
from tests.laws.texts import document

WIDTH = 32
MIXTURE = Mixture(num_experts=6, num_chosen=2, width=16)
CONFIG = ModelConfig(
    vocab_size=64, width=WIDTH, num_layers=2, num_heads=2, num_kv_heads=1, head_width=16, mixture=MIXTURE
)


def mixture(mixture: Mixture = MIXTURE) -> SparseMLP:
    generator = torch.Generator().manual_seed(0)
    made = SparseMLP(mixture, WIDTH, partial(MLP, CONFIG))
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.3, generator=generator)
    return made


def tokens(count: int = 40) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


def by_token(m: SparseMLP, x_TD: Tensor) -> Tensor:
    """One token and one expert at a time: what the sentence at the top of the file says."""
    rows = []
    for x in x_TD:
        share = torch.softmax(m.gate(x), -1)
        best = share.topk(m.mixture.num_chosen)
        total = best.values.sum() if m.mixture.renormalise else 1.0
        rows.append(sum(s / total * m.experts[int(e)](x) for s, e in zip(best.values, best.indices, strict=True)))
    return torch.stack(rows)


def gradients(m: SparseMLP, work, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, gradients by name (zeros where there is none), and that of the input."""
    m.work, x_TD = work, x_TD.clone().requires_grad_()
    m.zero_grad()
    out = m(x_TD)
    out.square().sum().backward()
    assert x_TD.grad is not None
    return (
        out.detach(),
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in m.named_parameters()},
        x_TD.grad,
    )


@pytest.mark.parametrize("renormalise", [True, False])
def test_every_token_is_read_by_its_experts_alone(renormalise: bool):
    m = mixture(Mixture(6, 2, 16, renormalise))
    torch.testing.assert_close(m(tokens()), by_token(m, tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_grouped_products_are_the_loop(count: int):
    """With one token most experts have none. fp32: sums of products in another order."""
    m = mixture()
    loop, by_loop, into_loop = gradients(m, apply_experts_loop, tokens(count))
    grouped, by_group, into_group = gradients(m, apply_experts_grouped, tokens(count))
    torch.testing.assert_close(grouped, loop, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(into_group, into_loop, rtol=1e-5, atol=1e-4)
    for name, gradient in by_loop.items():
        torch.testing.assert_close(by_group[name], gradient, rtol=1e-5, atol=1e-4, msg=name)


def test_grouped_products_are_made_in_what_autocast_says():
    m, x = mixture(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        assert groupable(x, m.experts)
        loop, grouped = (gradients(m, work, x) for work in (apply_experts_loop, apply_experts_grouped))
    assert loop[0].dtype == grouped[0].dtype == torch.bfloat16
    # 8 bits of each product; sums of a gradient in another order
    torch.testing.assert_close(grouped[0], loop[0], rtol=0.02, atol=0.02 * float(loop[0].abs().max()))
    for name, gradient in loop[1].items():
        assert float((grouped[1][name] - gradient).norm()) <= 0.02 * float(gradient.norm()), name


def test_what_grouped_products_do_not_take_goes_through_the_loop():
    x = tokens().bfloat16()
    assert not groupable(x, [MLP(CONFIG, 12)])  # rows of 24 bytes
    assert not groupable(x, [torch.nn.Linear(WIDTH, WIDTH)])
    assert not groupable(x.float(), mixture().experts)


def test_a_mixture_learns_inside_the_model():
    model = Model(CONFIG)
    initialise(model, 0)
    batch = pack([document(7, seed=1), document(5, seed=2)])
    model(batch).square().sum().backward()
    chosen = [n for n, p in model.named_parameters() if "mlp.experts" in n and p.grad is not None]
    assert chosen and model.layers[0].experts[0].mlp.gate.weight.grad is not None
