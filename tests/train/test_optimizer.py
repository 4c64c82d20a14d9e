"""Our Muon is torch's, our schedules are what they say, and each parameter has one optimizer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from litchi.model.network import Model
from litchi.parallel.leaf import Leaf
from litchi.parallel.mesh import World
from litchi.parallel.plan import apply
from litchi.parallel.tensor import Slice
from litchi.train.optimizer import Muon, OptimizerConfig, build_optimizers, orthogonalise
from litchi.train.run import adjust
from litchi.train.schedule import Cosine, Trapezoid, factor
from tests.train.runs import MODEL

SHAPES = [(16, 16), (24, 16), (16, 24), (24, 16), (4, 40)]
ROUNDING = 0.08
"""bf16 has 8 bits, and torch's addmm rounds elsewhere; the iterations make small directions up to 480 times longer."""


def test_muon_is_torchs_step_by_step() -> None:
    """Both start each step from the same weights, so that rounding does not pile up."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    rates = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    leaves = [Leaf(str(i), p, p, tuple(p.shape), Slice(), World()) for i, p in enumerate(ours)]
    mine = Muon(leaves, **rates)
    oracle = torch.optim.Muon(theirs, nesterov=True, adjust_lr_fn="match_rms_adamw", **rates)
    for _ in range(4):
        before = [p.detach().clone() for p in ours]
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        oracle.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            assert float((a - b).detach().norm()) < ROUNDING * float((b - old).detach().norm())
            assert torch.equal(mine.state[a]["momentum"], oracle.state[b]["momentum_buffer"])
            b.data.copy_(a.data)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_orthogonalised_directions_are_about_as_long_as_each_other(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(x).float())
    # Jordan's coefficients stop at singular values between about 0.7 and 1.2; the smallest of a square start lower
    assert float(values.max()) < 1.3 and float(values.mean()) > 0.7


def test_a_stack_is_orthogonalised_one_by_one() -> None:
    x = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(1))
    each = torch.stack([orthogonalise(matrix[None])[0] for matrix in x])
    torch.testing.assert_close(orthogonalise(x), each, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("matrix_lr", [0.0, 0.01])
def test_every_parameter_has_one_optimizer_and_vectors_do_not_decay(matrix_lr: float) -> None:
    model = Model(MODEL)
    optimizers = build_optimizers(apply(model, World()).learned(), OptimizerConfig(matrix_lr=matrix_lr))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for group in groups for p in group["params"])
    matrices = {id(p) for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2}
    muon = {id(p) for o in optimizers if isinstance(o, Muon) for g in o.param_groups for p in g["params"]}
    assert muon == (matrices if matrix_lr else set())


def test_rates_follow_their_peaks_however_often_they_are_adjusted() -> None:
    optimizers = build_optimizers(apply(Model(MODEL), World()).learned(), OptimizerConfig(lr=0.1, matrix_lr=0.2))
    for rate in (0.5, 0.25, 1.0):
        adjust(optimizers, rate)
        assert [[g["lr"] for g in o.param_groups] for o in optimizers] == [[0.1 * rate] * 2, [0.2 * rate]]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Trapezoid(warmup=2, decay=0.5), [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (Trapezoid(warmup=0, decay=0.2, floor=0.1), [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.55]),
        (Cosine(warmup=2), [0.5, 1, 1, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]),
        (Cosine(warmup=2, floor=0.5), [0.5, 1, 1, 0.981, 0.927, 0.846, 0.75, 0.654, 0.573, 0.519]),
    ],
)
def test_a_schedule_rises_and_falls(schedule: Cosine | Trapezoid, factors: list[float]) -> None:
    assert [factor(schedule, step, 10) for step in range(10)] == pytest.approx(factors, abs=5e-4)


@settings(derandomize=True, deadline=None)
@given(
    st.one_of(
        st.builds(Cosine, st.integers(0, 50), st.floats(0, 1)),
        st.builds(Trapezoid, st.integers(0, 50), st.floats(0, 1), st.floats(0, 1)),
    ),
    st.integers(1, 60),
)
def test_a_factor_is_never_zero_before_the_end_nor_above_one(schedule: Cosine | Trapezoid, num_steps: int) -> None:
    factors = [factor(schedule, step, num_steps) for step in range(num_steps)]
    assert all(0 < f <= 1 for f in factors)
