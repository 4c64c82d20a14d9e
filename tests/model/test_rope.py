"""Positions turn pairs: for text as plain RoPE does, for pictures along three axes, and only differences are felt."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.model.rope import pair_axes, rotate, rotations

laws = settings(max_examples=25, deadline=None, derandomize=True)
positions = st.tuples(*[st.integers(0, 500)] * 3)
THETA = 10_000.0


def plain(x_TK: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE of Su et al. 2021 in complex numbers: pair i of token t turns by t / theta^(2i/K)."""
    T, K = x_TK.shape
    pairs = torch.complex(x_TK[:, : K // 2].double(), x_TK[:, K // 2 :].double())
    angle = torch.arange(T)[:, None].double() * theta ** (-2 * torch.arange(K // 2).double() / K)
    turned = pairs * torch.exp(1j * angle)
    return torch.cat([turned.real, turned.imag], dim=1).float()


def turned(x_K: torch.Tensor, position: tuple[int, int, int]) -> torch.Tensor:
    return rotate(x_K[None, None], rotations(torch.tensor([position]), len(x_K), THETA))[0, 0]


def vector(seed: int, width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def test_text_turns_as_plain_rope_does() -> None:
    for width, theta in ((8, 1e4), (32, 1e4), (64, 5e5)):
        x_THK = torch.randn(300, 2, width, generator=torch.Generator().manual_seed(width))
        text = torch.arange(300)[:, None].expand(-1, 3)
        found = rotate(x_THK, rotations(text, width, theta))
        for head in range(2):
            # fp32 angles of up to 300 radians are exact to 300 * 2^-24
            torch.testing.assert_close(found[:, head], plain(x_THK[:, head], theta), rtol=1e-4, atol=2e-4)


@laws
@given(positions, st.sampled_from([6, 12, 32]))
def test_turning_keeps_lengths(position: tuple[int, int, int], width: int) -> None:
    x = vector(0, width)
    torch.testing.assert_close(turned(x, position).norm(), x.norm())


@laws
@given(positions, positions, st.tuples(*[st.integers(-200, 200)] * 3), st.sampled_from([6, 12, 32]))
def test_only_differences_of_positions_are_felt(a, b, shift, width: int) -> None:
    q, k = vector(1, width), vector(2, width)
    score = turned(q, a) @ turned(k, b)
    moved = [tuple(x + d for x, d in zip(p, shift, strict=True)) for p in (a, b)]
    # fp32 angles of up to 700 radians are off by 4e-5, times products of up to 30
    torch.testing.assert_close(turned(q, moved[0]) @ turned(k, moved[1]), score, rtol=1e-3, atol=5e-3)


def test_every_axis_is_felt_and_pairs_are_shared_out_in_turn() -> None:
    assert pair_axes(8).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert [int((pair_axes(16) == axis).sum()) for axis in range(3)] == [6, 5, 5]
    x = vector(3, 12)
    still = turned(x, (5, 5, 5))
    for position in ((6, 5, 5), (5, 6, 5), (5, 5, 6)):
        assert not torch.allclose(turned(x, position), still)
