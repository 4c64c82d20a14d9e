"""Experts shared out over ranks: loss and gradients of one process, no reading dropped, and no rank that waits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from litchi.config import BadInput
from litchi.model.moe import Mixture
from litchi.model.network import Mask, Model, ModelConfig, initialise
from litchi.model.objective import objective
from litchi.parallel import expert
from litchi.parallel.crew import Crew
from litchi.parallel.expert import counting, held, imbalance, is_expert
from litchi.parallel.mesh import DATA, EXPERT_SHARD, Axis, Layout, World, join
from litchi.parallel.modality import complete
from litchi.schema.sequence import Batch, Modality, pack
from tests.parallel.test_modality import document, pictured

TOLERANCE = 1e-5
"""Relative to the largest value of a gradient: the same sums in another order, in fp32."""

KIND = Mask(digits=3, levels=5, width=4)
MIXTURE = Mixture(num_experts=8, num_chosen=2, width=12)
NUM_MICROBATCHES = 4


@dataclass(frozen=True)
class Choice:
    """A network of experts, and how its router chooses."""

    activation: str = "silu"
    bias: bool = False
    sets: int = 1
    crowded: bool = False
    """Whether all tokens choose the same two experts, so that most ranks have nothing to read."""


CHOICES = {
    "as it comes": Choice(),
    "two matrices with biases": Choice(activation="gelu", bias=True),
    "a set for what is drawn": Choice(sets=2),
    "all choose the same": Choice(crowded=True),
}


def network(choice: Choice) -> Model:
    c = ModelConfig(
        *(40, 16, 2, 2, 1, 8, 24),
        modalities={"image": KIND},
        experts=choice.sets,
        activation="silu" if choice.activation == "silu" else "gelu",
        mlp_bias=choice.bias,
        mixture=MIXTURE,
    )
    model = Model(c)
    initialise(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            if choice.crowded and name.endswith("mlp.gate.weight"):
                parameter.zero_()
    return model


def microbatch(index: int) -> Batch:
    """A picture in every other one."""
    other = pictured(KIND, Modality.IMAGE, index) if index % 2 else document(index + 10)
    return pack([document(index), other])


def learn(model: Model, microbatches: range) -> Tensor:
    """Gradients of some microbatches, added up; the loss of them."""
    total = torch.zeros(())
    for index in microbatches:
        batch = complete(microbatch(index), model.config)
        loss = objective(model, batch, torch.Generator().manual_seed(index)).over({"text": 60.0, "image": 9.0}, {})
        loss.backward()
        total += loss.detach()
    return total


# ---- loss and gradients -------------------------------------------------------------------------------------------


def gaps(layout: Layout) -> dict[str, tuple[float, float, str]]:
    """How far loss and gradients are from one process, for each choice, and which gradient is farthest."""
    world = join(layout, torch.device("cpu"))
    found = {}
    for name, choice in CHOICES.items():
        alone, model = network(choice), network(choice)
        expert.apply(model, world)
        whole = learn(alone, range(NUM_MICROBATCHES))
        loss = learn(model, range(world.index(*DATA), NUM_MICROBATCHES, world.degree(*DATA)))
        dist.all_reduce(loss)
        oracle = dict(alone.named_parameters())
        grads = {n: gap(summed(n, p.grad, world), oracle[n].grad) for n, p in model.named_parameters()}
        worst = max(grads, key=lambda n: grads[n])
        found[name] = float((loss - whole).abs() / whole), grads[worst], worst
    return found


def summed(name: str, grad: Tensor | None, world: World) -> Tensor:
    assert grad is not None, f"{name} has no gradient"
    axes: tuple[Axis, ...] = ("replicate", *EXPERT_SHARD) if is_expert(name) else DATA
    if (group := world.group(*axes)) is not None:
        dist.all_reduce(grad, group=group)
    return grad


def gap(found: Tensor, alone: Tensor | None) -> float:
    """The largest difference, relative to the largest value; alone, an expert that no one chose has no gradient."""
    if alone is None:
        alone = torch.zeros_like(found)
    return float((found - alone).abs().max() / alone.abs().max().clamp_min(1e-12))


@pytest.mark.parametrize(
    ("layout", "size"), [(Layout(expert=2), 2), (Layout(expert=2), 4), (Layout(expert=4), 4)], ids=["2", "2 x 2", "4"]
)
def test_shared_out_experts_learn_as_one_process_does(crew: Crew, layout: Layout, size: int):
    for found in crew.run(gaps, layout, size=size):
        assert set(found) == set(CHOICES)
        for name, (loss, gradient, worst) in found.items():
            assert max(loss, gradient) <= TOLERANCE, (name, loss, gradient, worst)


# ---- what each rank has -------------------------------------------------------------------------------------------


def names_of(layout: Layout) -> tuple[list[str], list[int], dict[str, list[int]]]:
    """Parameters of a rank, its experts, and readings by expert where all tokens choose the same."""
    world = join(layout, torch.device("cpu"))
    model = network(CHOICES["all choose the same"])
    expert.apply(model, world)
    with counting(model) as counts:
        model(microbatch(world.rank))
    return [n for n, _ in model.named_parameters()], [*held(8, world)], {n: c.tolist() for n, c in counts.items()}


def test_each_expert_is_of_one_rank_and_keeps_its_name(crew: Crew):
    told = crew.run(names_of, Layout(expert=4))
    whole = [name for name, _ in network(Choice()).named_parameters()]
    assert [own for _, own, _ in told] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for name in whole:
        holders = [rank for rank, (names, _, _) in enumerate(told) if name in names]
        if not is_expert(name):
            assert holders == [0, 1, 2, 3]
        else:
            assert holders == [int(name.split(".mlp.experts.")[1].split(".")[0]) // 2]
    for _, _, counts in told:
        assert len(counts) == 2
        for readings in counts.values():
            assert sum(readings) == 2 * len(microbatch(0))
            assert sum(n > 0 for n in readings) == 2  # or the crowded case would show nothing


def test_imbalance_is_the_busiest_over_the_mean():
    assert imbalance(torch.tensor([5, 5, 5, 5])) == 1.0
    assert imbalance(torch.tensor([6, 2, 0, 0])) == 3.0
    assert imbalance(torch.tensor([0, 8, 0, 0])) == 4.0
    assert imbalance(torch.zeros(4, dtype=torch.long)) == 1.0


def test_counting_ends():
    model = network(Choice())
    works = [m.work for m in expert.mixtures(model).values()]
    with counting(model) as counts:
        model(microbatch(0))
    model(microbatch(0))
    assert [m.work for m in expert.mixtures(model).values()] == works
    assert [int(c.sum()) for c in counts.values()] == [2 * len(microbatch(0))] * 2


def refused(layout: Layout, mixture: Mixture | None) -> str:
    world = join(layout, torch.device("cpu"))
    model = Model(ModelConfig(40, 16, 1, 2, 1, 8, 24, mixture=mixture))
    with pytest.raises(BadInput) as error:
        expert.apply(model, world)
    return str(error.value)


def test_what_cannot_be_shared_out_is_refused(crew: Crew):
    assert all("choose a divisor" in said for said in crew.run(refused, Layout(expert=4), Mixture(6, 2, 8)))
    assert all("set it to 1" in said for said in crew.run(refused, Layout(expert=4), None))
