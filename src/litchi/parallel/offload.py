"""The optimizer's state in the memory of the CPU while weights stay where they are: 8 bytes fewer a weight on a GPU.

Gradients come to the CPU, AdamW steps there in fp32 on a copy of the weights, and the weights go back (ZeRO-Offload,
Ren et al. 2021). Muon is not for this: it multiplies matrices, which a CPU takes too long for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litchi.config import BadInput


def offload(optimizers: Sequence[torch.optim.Optimizer], *, exact: bool) -> list[torch.optim.Optimizer]:
    """The same optimizers with their state on the CPU; call before the first step.

    `exact` is the layout's: AdamW is then taken apart into operations that round every value alike. Raises BadInput for
    Muon.
    """
    if any(not isinstance(optimizer, torch.optim.AdamW) for optimizer in optimizers):
        raise BadInput("Muon's state cannot be offloaded to the CPU: set train.optimizer.matrix_lr=0")
    return [OffloadedAdamW(optimizer, exact=exact) for optimizer in optimizers]


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW over weights anywhere, whose state lies on the CPU. oracle: torch.optim.AdamW"""

    def __init__(self, like: torch.optim.Optimizer, *, exact: bool) -> None:
        super().__init__([dict(group) for group in like.param_groups], like.defaults)
        self.copies = {p: host_copy(p) for group in self.param_groups for p in group["params"]}
        self.seen: dict[nn.Parameter, int] = {}
        """The version of each weight that its copy has."""
        groups = [group | {"params": [self.copies[p] for p in group["params"]]} for group in self.param_groups]
        self.inner = torch.optim.AdamW(groups)
        self.way = {"fused": not exact, "foreach": exact}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.fetch()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner |= {key: outer[key] for key in ("lr", "betas", "eps", "weight_decay")} | self.way
        self.inner.step()
        for p, copy in self.copies.items():
            if copy.grad is not None:
                p.copy_(copy, non_blocking=True)
                self.seen[p], self.state[p] = p._version, self.inner.state[copy]

    def fetch(self) -> None:
        """Gradients, weights that others have written since the last step, and state that was loaded."""
        for p, copy in self.copies.items():
            if p._version != self.seen.get(p):
                copy.copy_(p, non_blocking=True)
            if p.grad is None:
                copy.grad = None
            else:
                copy.grad = host_copy(p) if copy.grad is None else copy.grad
                copy.grad.copy_(p.grad, non_blocking=True)
            if p in self.state and self.state[p] is not self.inner.state.get(copy):
                self.inner.state[copy] = {key: value.cpu() for key, value in self.state[p].items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State goes straight to the CPU, and never to where the weights are."""
        self.inner.load_state_dict(state_dict)
        for p, copy in self.copies.items():
            if copy in self.inner.state:
                self.state[p] = self.inner.state[copy]
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            outer |= {key: value for key, value in inner.items() if key != "params"}


def host_copy(x: Tensor) -> nn.Parameter:
    """Memory for its values on the CPU in fp32, from which a GPU copies without waiting."""
    held = torch.empty(x.shape, dtype=torch.float32, pin_memory=x.is_cuda)
    return nn.Parameter(held)
