"""A mixture of experts in place of one MLP: each token is read by the few experts that its router likes best.

T tokens, D width, E experts, R experts that read a token. Names and arithmetic are Qwen3-MoE's (softmax over all
experts, then the best R, their shares made to add up to 1 if so configured).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Mixture:
    num_experts: int
    num_chosen: int
    width: int
    """Of the MLP of one expert."""
    renormalise: bool = True
    """Whether the shares of the chosen experts add up to 1."""


class SparseMLP(nn.Module):
    """Tokens sorted by expert: one dense product for each expert that anyone chose."""

    def __init__(self, m: Mixture, width: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.mixture = m
        self.gate = nn.Linear(width, m.num_experts, bias=False)
        self.experts = nn.ModuleList(make(m.width) for _ in range(m.num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        share_TE = F.softmax(self.gate(x_TD).float(), dim=-1)
        share_TR, chosen_TR = share_TE.topk(self.mixture.num_chosen, dim=-1)
        if self.mixture.renormalise:
            share_TR = share_TR / share_TR.sum(-1, keepdim=True)
        out_TD = torch.zeros_like(x_TD)
        for index in chosen_TR.unique().tolist():
            rows, places = (chosen_TR == index).nonzero(as_tuple=True)
            read = self.experts[index](x_TD[rows]) * share_TR[rows, places, None].to(x_TD.dtype)
            out_TD = out_TD.index_add(0, rows, read)
        return out_TD
