"""Three-axis rotary positions: each pair of a head turns with time, height or width, interleaved.

For text t = h = w, which equals plain RoPE, so checkpoints of language models load unchanged. The interleaving is
Qwen3-VL's (apply_interleaved_mrope): pair 1, 4, 7, ... turn with h, pair 2, 5, 8, ... with w, the rest with t.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pair_axes(num_pairs: int) -> Int[Tensor, "num_pairs"]:
    """Which axis (0 t, 1 h, 2 w) each of the `num_pairs` rotary pairs turns with; t keeps what thirds leave over."""
    axes = torch.zeros(num_pairs, dtype=torch.long)
    each = num_pairs // 3
    axes[1 : 3 * each : 3] = 1
    axes[2 : 3 * each : 3] = 2
    return axes


def rotations(positions: Int[Tensor, "T 3"], head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, K/2) of the angles by which each pair of a head turns."""
    num_pairs = head_width // 2
    frequency = theta ** (-torch.arange(num_pairs, device=positions.device, dtype=torch.float32) / num_pairs)
    along = positions[:, pair_axes(num_pairs).to(positions.device)].float()
    angle = (along * frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x_THK: Float[Tensor, "T H K"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "T H K"]:
    """Turn pairs (i, i + K/2), the order that Hugging Face checkpoints use."""
    cos, sin = rotation
    a, b = x_THK.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_THK.dtype)
