"""Matrix products of the trunk in 8-bit floating point, each tensor scaled by its largest value as it comes.

Values and weights are e4m3 (3 bits of fraction), gradients e5m2 (2 bits, more range); sums are fp32 and answers what
autocast says (Micikevicius et al. 2022; Noune et al. 2022 for scaling). Weights, norms, router, attention, ways in and
heads stay as they are. Only the `forward` of a matrix is replaced, so that names stay.

N rows, K values of each, M values made of them.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litchi.config import BadInput
from litchi.model.moe import product_dtype
from litchi.model.network import Model

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
STEP = 16
"""Sizes of a product in 8 bits are multiples of this."""
CAPABLE = (8, 9)
"""The first compute capability with such products (Ada; Hopper is 9.0)."""


def apply(model: Model, device: torch.device) -> list[str]:
    """Let matrices of the trunk multiply in 8 bits; the names of those that do.

    One whose sizes do not fit stays as it is, and so does one whose `forward` something else replaced. A CPU computes
    the same, slowly. Raises BadInput for any other device that has no such products.
    """
    check(device)
    chosen = {
        f"layers.{name}": module
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("mlp.gate") and fits(module)
    }
    for linear in chosen.values():
        linear.forward = partial(multiply, linear)
    return list(chosen)


def check(device: torch.device) -> None:
    if device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < CAPABLE:
        has = "none" if capability is None else ".".join(map(str, capability))
        raise BadInput(
            f"products in 8 bits need a GPU of compute capability {CAPABLE[0]}.{CAPABLE[1]} and {device} has {has}: "
            f"leave them out"
        )


def fits(linear: nn.Linear) -> bool:
    return "forward" not in vars(linear) and all(size % STEP == 0 for size in linear.weight.shape)


def multiply(linear: nn.Linear, x: Tensor) -> Tensor:
    """The forward of a Linear. oracle: F.linear, from which it differs as 3 bits of fraction do"""
    x_NK = x.flatten(0, -2)
    missing = -len(x_NK) % STEP
    y_NM = Product.apply(F.pad(x_NK, (0, 0, 0, missing)), linear.weight, product_dtype(x))[: len(x_NK)]
    y = y_NM.unflatten(0, x.shape[:-1])
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


class Product(torch.autograd.Function):
    """Rows times a transposed weight; all three products of forward and backward are in 8 bits."""

    @staticmethod
    def forward(ctx, x_NK: Tensor, weight_MK: Tensor, dtype: torch.dtype) -> Tensor:
        x, x_scale = scaled(x_NK, VALUES)
        w, w_scale = scaled(weight_MK, VALUES)
        ctx.save_for_backward(x, x_scale, w, w_scale)
        ctx.dtypes = x_NK.dtype, weight_MK.dtype
        with torch.autocast(x.device.type, enabled=False):  # a CPU's fallback has products that it would cast
            return torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        (grad_NM,) = grads
        x, x_scale, w, w_scale = ctx.saved_tensors
        g, g_scale = scaled(grad_NM, GRADIENTS)
        into_x = into_w = None
        if ctx.needs_input_grad[0]:
            product = torch._scaled_mm(g, upright(w), scale_a=g_scale, scale_b=w_scale, out_dtype=grad_NM.dtype)
            into_x = product.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            across = g.t().contiguous()
            product = torch._scaled_mm(across, upright(x), scale_a=g_scale, scale_b=x_scale, out_dtype=grad_NM.dtype)
            into_w = product.to(ctx.dtypes[1])
        return into_x, into_w, None


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values that fill the range of an 8-bit type, and what to multiply them by to have them back."""
    most = torch.finfo(dtype).max
    scale = most / x.detach().abs().amax().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-most, most).to(dtype), scale.reciprocal()


def upright(x: Tensor) -> Tensor:
    """The same matrix with its columns in one piece each, as the second factor must be."""
    return x.t().contiguous().t()
