"""A mixture of experts in place of one MLP: each token is read by the few experts that its router likes best.

T tokens, D width, F MLP width of an expert, E experts, R experts that read a token, N = T R readings, sorted by expert.
Names and arithmetic are Qwen3-MoE's (softmax over all experts, then the best R, their shares made to add up to 1 if so
configured).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Work = Callable[[Tensor, Tensor, Sequence[nn.Module]], Tensor]
"""Readings (N, D) sorted by expert, how many each expert has (E), the experts -> what they make of them (N, D)."""


@dataclass(frozen=True, slots=True)
class Mixture:
    num_experts: int
    num_chosen: int
    width: int
    """Of the MLP of one expert."""
    renormalise: bool = True
    """Whether the shares of the chosen experts add up to 1."""


class SparseMLP(nn.Module):
    """Tokens sorted by expert, read, put back in order, and added up by their shares."""

    def __init__(self, m: Mixture, width: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.mixture = m
        self.work: Work = apply_experts
        """What experts do with their readings; ranks that share out the experts put their own form here."""
        self.gate = nn.Linear(width, m.num_experts, bias=False)
        self.experts = nn.ModuleList(make(m.width) for _ in range(m.num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        share_TR, chosen_TR = self.choose(x_TD)
        order_N = chosen_TR.flatten().argsort(stable=True)
        counts_E = count_readings(chosen_TR, self.mixture.num_experts)
        read_ND = self.work(x_TD[order_N // self.mixture.num_chosen], counts_E, [*self.experts])
        read_TRD = torch.empty_like(read_ND).index_copy(0, order_N, read_ND).unflatten(0, chosen_TR.shape)
        return (read_TRD * share_TR[..., None].to(read_TRD.dtype)).sum(1)

    def choose(self, x_TD: Tensor) -> tuple[Float[Tensor, "T R"], Int[Tensor, "T R"]]:
        """The shares and numbers of the experts that each token likes best."""
        share_TE = F.softmax(self.gate(x_TD).float(), dim=-1)
        share_TR, chosen_TR = share_TE.topk(self.mixture.num_chosen, dim=-1)
        if self.mixture.renormalise:
            share_TR = share_TR / share_TR.sum(-1, keepdim=True)
        return share_TR, chosen_TR


def count_readings(chosen_TR: Int[Tensor, "T R"], num_experts: int) -> Int[Tensor, "E"]:
    """How many tokens each expert reads. The shape does not depend on values, as that of `bincount` does."""
    counts_E = chosen_TR.new_zeros(num_experts)
    return counts_E.scatter_add(0, chosen_TR.flatten(), torch.ones_like(chosen_TR).flatten())


def apply_experts(x_ND: Tensor, counts_E: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """The first `counts[0]` rows through the first expert, the next through the second, and so on; counts may be 0.

    Off the CPU in one grouped product a matrix where that is possible; on the CPU that is a loop of its own, and no
    faster.
    """
    if x_ND.device.type == "cpu" or not groupable(x_ND, experts):
        return apply_experts_loop(x_ND, counts_E, experts)
    return apply_experts_grouped(x_ND, counts_E, experts)


def apply_experts_loop(x_ND: Tensor, counts_E: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """One product after another: the oracle. An expert that no one chose does nothing, and gets no gradient."""
    pieces = zip(x_ND.split(counts_E.tolist()), experts, strict=True)
    read = [expert(x) for x, expert in pieces if len(x)]
    return torch.cat(read) if read else x_ND


def apply_experts_grouped(x_ND: Tensor, counts_E: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """All experts at once, without waiting to learn the counts; one that no one chose gets a gradient of zeros.

    Reads the experts' matrices, so that hooks on them do not run. oracle: apply_experts_loop
    """
    dtype = product_dtype(x_ND)
    end_E = counts_E.cumsum(0).to(torch.int32)

    def product(x: Tensor, name: str) -> Tensor:
        weight_EFD = torch.stack([getattr(expert, name).weight.to(dtype) for expert in experts])
        return F.grouped_mm(x.to(dtype), weight_EFD.mT, offs=end_E)

    return product(F.silu(product(x_ND, "gate_proj")) * product(x_ND, "up_proj"), "down_proj")


def groupable(x_ND: Tensor, experts: Sequence[nn.Module]) -> bool:
    """Whether `grouped_mm` takes them: SwiGLU without biases, in bfloat16, rows of whole 16 bytes."""
    first = experts[0]
    plain = all(
        getattr(getattr(first, name, None), "bias", 0) is None for name in ("gate_proj", "up_proj", "down_proj")
    )
    return plain and product_dtype(x_ND) == torch.bfloat16 and all(n % 8 == 0 for n in first.gate_proj.weight.shape)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product is made in, which autocast decides for `linear` but not for `grouped_mm`."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else x.dtype
