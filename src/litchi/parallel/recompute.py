"""Activation checkpointing: what layers computed in the forward is forgotten, and computed again for the backward.

Applied from outside to the layers of the trunk and of vision towers, before ZeRO divides them. Only the `forward` of a
layer is replaced, so that names of parameters stay. Gradients keep every bit: the same operations run twice. (Chen et
al. 2016; Korthikanti et al. 2022 for `selective`.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from litchi.model.network import Model
from litchi.model.vision import VisionEncoder

Recompute = Literal["none", "selective", "full"]
"""What is computed again: nothing; what is cheap, so that products of matrices and attention are kept; all of a layer,
so that only what it was given is kept."""

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._grouped_mm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
"""Operations whose answers `selective` keeps."""


def apply(model: Model, kind: Recompute, every: int = 1) -> None:
    """Let every `every`-th layer, from the first on, compute again what `kind` says. Call before `shard.apply`.

    Layers of a stack that is compiled are compiled after this.
    """
    if kind == "none":
        return
    towers = [module for module in model.modules() if isinstance(module, VisionEncoder)]
    for layers in (model.layers, *(tower.layers for tower in towers)):
        for layer in list(layers)[::every]:
            layer.forward = partial(again, layer.forward, kind)


def again(forward: Callable[..., Tensor], kind: Recompute, *given: Any, **named: Any) -> Tensor:
    """One layer. No operation in it draws random numbers, so that their state need not be kept."""
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    run = partial(checkpoint, forward, *given, use_reentrant=False, preserve_rng_state=False, **named)
    return run(context_fn=partial(create_selective_checkpoint_contexts, policy)) if kind == "selective" else run()


def policy(_context: Any, operation: Any, *_given: Any, **_named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
