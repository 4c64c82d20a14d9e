"""Tensor parallelism: each rank holds a slice of every matrix of the trunk, and hooks exchange what slices lack.

What reads the residual stream is cut by rows, what writes to it by columns, tables of the vocabulary by rows
(Megatron-LM, Shoeybi et al. 2019). With sequence parallelism (Korthikanti et al. 2022) ranks share out the tokens
between the matrices. T tokens, D width, V vocabulary. What reads and writes vectors is repeated on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from litchi.config import BadInput
from litchi.model.layout import check, split_dim
from litchi.model.moe import SparseMLP
from litchi.model.network import MLP, Expert, Model, ModelConfig, PlainMLP
from litchi.model.vision import Tower
from litchi.parallel.collectives import enter, gather_rows, leave, scatter_rows, take_rows, weaken
from litchi.parallel.mesh import World


@dataclass(frozen=True, slots=True)
class Slice:
    """What a rank of tensor parallelism has of a parameter."""

    dim: int | None = None
    """The dimension that is cut; None is all of it."""
    partial: bool = False
    """Whether each rank's gradient is of its own tokens or heads only, so that the ranks' must be summed."""


def shares_tokens(c: ModelConfig, world: World) -> bool:
    """Whether ranks share out tokens between matrices; what picks tokens by their number there needs all of them."""
    deep = any(isinstance(kind, Tower) and kind.deep for kind in c.modalities.values())
    return world.layout.sequence and world.degree("tensor") > 1 and c.experts == 1 and not deep


def slice_of(name: str, num_dims: int, *, shared: bool) -> Slice:
    """The rule, by a parameter's name. `shared` is what `shares_tokens` says."""
    if name.startswith(("readers.", "writers.")):
        return Slice()
    dim = split_dim(name, num_dims)
    if dim is not None:
        return Slice(dim)
    if name.endswith(("q_norm.weight", "k_norm.weight", "mlp.gate.weight")):
        return Slice(partial=True)
    return Slice(partial=shared and name != "embed_positions.weight")


def apply(model: Model, world: World, *, product: Any = F.linear, out: Any = leave) -> None:
    """Cut the trunk's matrices and put the hooks. Raises BadInput, naming the size that does not divide.

    `product` multiplies what is cut by columns, and `out` sums the parts of all ranks where they do not share tokens.
    """
    group, degree = world.group("tensor"), world.degree("tensor")
    if group is None:
        return
    c, index = model.config, world.index("tensor")
    check(c, degree, 1)
    if c.mixture is not None and c.mixture.width % degree:
        raise BadInput(f"experts of width {c.mixture.width} cannot be divided over {degree} ranks: choose a divisor")
    shared = shares_tokens(c, world)
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            cut = slice_of(f"{module_name}.{name}" if module_name else name, parameter.dim(), shared=shared)
            if cut.dim is not None:
                part = parameter.chunk(degree, cut.dim)[index].clone()
                setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    hook_ends(model, group, shared=shared)
    for module in model.modules():
        if isinstance(module, Expert):
            hook_expert(module, group, product, out, shared=shared)


def hook_ends(model: Model, group: ProcessGroup, *, shared: bool) -> None:
    """The table at the beginning, and at the end the norm, the head and its loss."""
    if hasattr(model, "embed_tokens"):
        model.embed_tokens.forward = partial(look_up, model.embed_tokens, group)
    if shared and "0" in model.layers._modules:
        model.layers._modules["0"].register_forward_pre_hook(partial(take_tokens, group))
    out = gather_rows if shared else enter
    for name in ("norm", "norm_moe_gen"):
        if hasattr(model, name):
            getattr(model, name).register_forward_hook(lambda _module, _args, x: out(x, group))
    for writer in model.writers.values():
        writer.register_forward_pre_hook(lambda _module, args: (weaken(args[0], group),))
    model.surprise = partial(surprise, group=group)


def hook_expert(expert: Expert, group: ProcessGroup, product: Any, out: Any, *, shared: bool) -> None:
    into, out = (gather_rows, scatter_rows) if shared else (enter, out)
    for norm in (expert.input_layernorm, expert.post_attention_layernorm):
        norm.register_forward_hook(lambda _module, _args, x: into(x, group))
    expert.self_attn.o_proj.forward = partial(write, expert.self_attn.o_proj, product, out, group)
    match expert.mlp:
        case MLP() | PlainMLP():
            expert.mlp.down_proj.forward = partial(write, expert.mlp.down_proj, product, out, group)
        case SparseMLP():
            expert.mlp.register_forward_hook(lambda _module, _args, x: out(x, group))


# ---- what hooks do ------------------------------------------------------------------------------------------------


def look_up(table: nn.Embedding, group: ProcessGroup, ids: Tensor) -> Tensor:
    """Rows of a table whose rows are shared out: a rank adds nothing for ids that it does not hold."""
    rows = table.weight.shape[0]
    own = ids - torch.distributed.get_rank(group) * rows
    held = (own >= 0) & (own < rows)
    x_TD = F.embedding(torch.where(held, own, 0), table.weight) * held[..., None]
    return leave(x_TD, group)


def take_tokens(group: ProcessGroup, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x_TD, *rest = args
    if x_TD.shape[0] % group.size():
        raise BadInput(f"{x_TD.shape[0]} tokens cannot be shared out over {group.size()} ranks of tensor parallelism")
    return (take_rows(x_TD, group), *rest)


def write(linear: nn.Linear, product: Any, out: Any, group: ProcessGroup, x: Tensor) -> Tensor:
    """A matrix cut by columns: the parts are summed, and the bias is added once."""
    y = out(product(x, linear.weight), group)
    return y if linear.bias is None else y + linear.bias


def surprise(logits_TV: Tensor, label_T: Tensor, *, group: ProcessGroup) -> Tensor:
    """Negative log-likelihood (T) of labels, of scores whose vocabulary is shared out. oracle: F.cross_entropy"""
    rows = logits_TV.shape[-1]
    own = label_T - torch.distributed.get_rank(group) * rows
    held = (own >= 0) & (own < rows)
    with torch.no_grad():
        most = logits_TV.amax(-1)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    shifted = logits_TV - most[:, None]
    mass = leave(shifted.exp().sum(-1), group)
    score = shifted.gather(-1, torch.where(held, own, 0)[:, None])[:, 0] * held
    return mass.log() - leave(score, group)
