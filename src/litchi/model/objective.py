"""What is learned: the next token where a label stands, and the clean vector where a span was corrupted.

A loss is sums and weights per modality, so that documents, microbatches and ranks add up exactly; it is divided once,
by the global weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from litchi.model.network import Flow, Mask, Model, Velocity, drawn
from litchi.schema.arrays import IGNORE, MASK
from litchi.schema.sequence import Batch, Modality, Vectors


@dataclass(frozen=True, slots=True)
class Loss:
    """Weighted sums and their weights, by modality."""

    total: dict[str, Tensor]
    weight: dict[str, Tensor]

    def __add__(self, other: Loss) -> Loss:
        return Loss(add(self.total, other.total), add(self.weight, other.weight))

    def means(self) -> dict[str, float]:
        return {m: float(self.total[m].detach() / self.weight[m]) for m in self.total if float(self.weight[m]) > 0}

    def over(self, weight: Mapping[str, float], scale: Mapping[str, float]) -> Tensor:
        """The scalar to differentiate: each modality's sum over its global weight, times its scale (1 if not named).

        A modality without weight counts nothing, and still gives its heads a gradient of zeros: what optimizers do to a
        parameter does not depend on who had something to read.
        """
        factors = {m: scale.get(m, 1.0) / weight[m] if weight.get(m, 0) > 0 else 0.0 for m in self.total}
        return torch.stack([self.total[m] * factor for m, factor in factors.items()]).sum()


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {m: a[m] + b[m] if m in a and m in b else (a[m] if m in a else b[m]) for m in {**a, **b}}


def objective(model: Model, batch: Batch, generator: torch.Generator, chunk: int = 0) -> Loss:
    """Corrupt the batch, read it, and sum what the model got wrong.

    `generator` lives on the CPU, whatever the device.
    """
    return loss_of(model, batch, corrupt(model, batch, generator), chunk)


def loss_of(model: Model, batch: Batch, corrupted: Batch, chunk: int = 0) -> Loss:
    """The loss of reading `corrupted` where `batch` is the truth; `chunk` is that of `text_loss`."""
    return loss_from(model, model(corrupted), batch, corrupted, chunk)


def loss_from(model: Model, x_TD: Float[Tensor, "T D"], batch: Batch, corrupted: Batch, chunk: int = 0) -> Loss:
    """The loss of hidden states, which the network made of `corrupted`; of its weights, only the heads are needed."""
    labelled = supervised_labels(batch)
    text = text_loss(model, x_TD[labelled], batch.labels[labelled], batch.weights[labelled], chunk)
    total = {str(Modality.TEXT): text}
    for modality, v in batch.vectors.items():
        if modality in drawn(model.config):
            total[modality] = span_loss(model, x_TD, modality, v, corrupted.vectors[modality])
    weight = weights_of(model, batch, corrupted)
    return Loss(total, {m: torch.tensor(weight[m]) for m in total})


def text_loss(model: Model, x_ND: Tensor, labels_N: Tensor, weights_N: Tensor, chunk: int = 0) -> Tensor:
    """The weighted sum of what labels cost, a scalar.

    With `chunk` above 0, scores of the vocabulary exist for so many tokens at once, and are computed once: the gradient
    is made beside the loss. Equal up to the order of sums. oracle: `chunk` 0
    """

    def cost(x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return (model.surprise(model.logits(x).float(), labels) * weights).sum()

    if not 0 < chunk < len(x_ND):
        return cost(x_ND, labels_N, weights_N)
    if not torch.is_grad_enabled():
        pieces = zip(x_ND.split(chunk), labels_N.split(chunk), weights_N.split(chunk), strict=True)
        return torch.stack([cost(*piece) for piece in pieces]).sum()
    head = model.embed_tokens if model.config.tied else model.lm_head
    return ByChunks.apply(cost, chunk, labels_N, weights_N, x_ND, *head.parameters())


class ByChunks(torch.autograd.Function):
    """The sum of `cost` over chunks of rows. It is one number: its gradient is known with it, up to a factor."""

    @staticmethod
    def forward(ctx, cost, chunk: int, labels_N: Tensor, weights_N: Tensor, x_ND: Tensor, *head: Tensor) -> Tensor:
        learned = [p for p in head if p.requires_grad]
        grad_ND, grads = torch.empty_like(x_ND), [torch.zeros_like(p) for p in learned]
        parts = []
        for start in range(0, len(x_ND), chunk):
            rows = slice(start, start + chunk)
            x = x_ND[rows].detach().requires_grad_()
            with torch.enable_grad():
                part = cost(x, labels_N[rows], weights_N[rows])
            grad_ND[rows], *more = torch.autograd.grad(part, [x, *learned])
            for total, gradient in zip(grads, more, strict=True):
                total += gradient
            parts.append(part.detach())
        given = iter(grads)
        ctx.save_for_backward(grad_ND, *(next(given) if p.requires_grad else None for p in head))
        return torch.stack(parts).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, *factors: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if g is None else g * factors[0].to(g.dtype) for g in ctx.saved_tensors]
        return None, None, None, None, *scaled


def weights_of(model: Model, batch: Batch, corrupted: Batch) -> dict[str, float]:
    """The weight of each modality's loss, known before anything is read."""
    weight = {str(Modality.TEXT): float(batch.weights[supervised_labels(batch)].sum())}
    for modality, v in batch.vectors.items():
        if modality in drawn(model.config):
            weight[modality] = float(row_weights(model, modality, v, corrupted.vectors[modality]).sum())
    return weight


def supervised_labels(batch: Batch) -> Tensor:
    return (batch.labels != IGNORE) & (batch.weights > 0)


def row_weights(model: Model, modality: str, v: Vectors, noised: Vectors) -> Tensor:
    """Each row's weight times the number of things to guess in it: hidden digits of a mask, one vector of a flow."""
    match model.config.modalities[modality]:
        case Mask():
            return v.weight * (noised.value == MASK).sum(1)
        case _:
            return v.weight


def corrupt(model: Model, batch: Batch, generator: torch.Generator) -> Batch:
    """Noise or hide the vectors whose time is before 1; clean rows pass untouched."""
    vectors: dict[Modality, Vectors] = {}
    for modality, v in batch.vectors.items():
        time = v.time[:, None]
        match model.config.modalities[modality]:
            case Mask():
                keep = torch.rand(v.value.shape, generator=generator).to(time.device) < time
                value = torch.where(keep, v.value, MASK)
            case Flow() | Velocity():
                noise = torch.randn(v.value.shape, generator=generator).to(time.device)
                value = time * v.value + (1 - time) * noise
            case _:
                value = v.value
        vectors[modality] = replace(v, value=value)
    return replace(batch, vectors=vectors)


def span_loss(model: Model, x_TD: Tensor, modality: str, v: Vectors, noised: Vectors) -> Tensor:
    """The sum of one modality: cross-entropy of hidden digits, or error of the velocity (flow matching).

    With x predicted, the error of the velocity is that of x over (1 - t) squared; (1 - t) is bounded at 0.1.
    """
    rows = v.weight > 0
    guess = model.clean(x_TD[v.index[rows]], modality, noised.value[rows], noised.time[rows, None]).float()
    weight = v.weight[rows]
    match model.config.modalities[modality]:
        case Mask():
            hidden = noised.value[rows] == MASK
            nll = F.cross_entropy(guess[hidden], v.value[rows][hidden].long(), reduction="none")
            return (nll * weight[:, None].expand_as(hidden)[hidden]).sum()
        case _:
            error = (guess - v.value[rows]).square().mean(1) / (1 - v.time[rows]).clamp_min(0.1).square()
            return (error * weight).sum()
