"""A peer to measure against: a Llama and its training loop, each written out once and compiled whole, as nanoGPT is.

B rows, T tokens of a row, D width, H heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * mlp_width, bias=False), nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x_BTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        o_BHTK = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True)
        x_BTD = x_BTD + self.out(o_BHTK.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(F.silu(gate) * up)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Plain(nn.Module):
    def __init__(self, vocab: int, width: int, layers: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.table = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, row_BT: Tensor) -> Tensor:
        """The mean cost of the next token."""
        frequency = 10_000.0 ** (-torch.arange(0, self.head_width, 2) / self.head_width)
        angle = torch.arange(row_BT.shape[1])[:, None] * frequency
        x_BTD, cos, sin = self.table(row_BT), angle.cos(), angle.sin()
        for block in self.blocks:
            x_BTD = block(x_BTD, cos, sin)
        logits = F.linear(self.norm(x_BTD), self.table.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), row_BT[:, 1:].flatten())


class PlainLoop:
    """One optimizer step a call."""

    def __init__(self, model: Plain, *, lr: float, betas: tuple[float, float], decay: float) -> None:
        torch.manual_seed(0)
        self.model, self.compiled = model, torch.compile(model)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

    def step(self, row_BT: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.compiled(row_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
