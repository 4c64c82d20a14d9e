"""Three-axis rotary positions: each pair of a head turns with time, height or width, interleaved.

For text t = h = w, which equals plain RoPE, so checkpoints of language models load unchanged. The interleaving is
Qwen3-VL's (apply_interleaved_mrope): pair 1, 4, 7, ... turn with h, pair 2, 5, 8, ... with w, the rest with t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """Every frequency divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3:
    """Slow pairs divided by `factor`, fast ones left, a ramp between (Llama 3.1, as transformers computes it)."""

    factor: float
    low: float
    """Turns within `length` up to which a pair counts as slow."""
    high: float
    """Turns from which a pair counts as fast."""
    length: int
    """Tokens of the texts first trained on."""


Scaling = Linear | Llama3


def pair_axes(
    num_pairs: int, sections: tuple[int, int] | None = None, device: torch.device | None = None
) -> Int[Tensor, "num_pairs"]:
    """Which axis (0 t, 1 h, 2 w) each of the `num_pairs` rotary pairs turns with.

    `sections` are the pairs of h and of w, a third each if not given; t has the rest.
    """
    axes = torch.zeros(num_pairs, dtype=torch.long, device=device)
    for axis, count in enumerate(sections or (num_pairs // 3,) * 2, start=1):
        axes[axis : 3 * count : 3] = axis
    return axes


def scaled(frequency: Tensor, scaling: Scaling | None) -> Tensor:
    match scaling:
        case Linear(factor):
            return frequency / factor
        case Llama3(factor, low, high, length):
            turns = length * frequency / (2 * math.pi)
            share = ((turns - low) / (high - low)).clamp(0, 1)
            return (1 - share) * frequency / factor + share * frequency
    return frequency


def rotations(
    positions: Int[Tensor, "T 3"],
    head_width: int,
    theta: float,
    scaling: Scaling | None = None,
    sections: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, K/2) of the angles by which each pair of a head turns."""
    num_pairs = head_width // 2
    frequency = theta ** (-torch.arange(num_pairs, device=positions.device, dtype=torch.float32) / num_pairs)
    frequency = scaled(frequency, scaling)
    along = positions[:, pair_axes(num_pairs, sections, positions.device)].float()
    angle = (along * frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x_THK: Float[Tensor, "T H K"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "T H K"]:
    """Turn pairs (i, i + K/2), the order that Hugging Face checkpoints use."""
    cos, sin = rotation
    a, b = x_THK.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_THK.dtype)
