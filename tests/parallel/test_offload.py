"""AdamW whose state lies on the CPU is AdamW, bit for bit, through continuations and on divided weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from litchi.config import BadInput
from litchi.model.network import Model, initialise
from litchi.parallel.crew import Crew
from litchi.parallel.gradient import backward, global_weights
from litchi.parallel.mesh import Layout, World, join
from litchi.parallel.offload import offload
from litchi.parallel.plan import Placed, apply
from litchi.train.certify import MODEL, microbatch
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.step import microbatch_generator, whole_pair

CONFIG = OptimizerConfig(matrix_lr=0.0, lr=1e-2)


def placed(layout: Layout, world: World | None = None) -> Placed:
    model = Model(MODEL)
    initialise(model, 0)
    return apply(model, world or World(layout))


def optimizers(p: Placed, *, away: bool) -> list[torch.optim.Optimizer]:
    made = build_optimizers(p.learned(), CONFIG)
    return offload(made, exact=p.world.layout.exact) if away else made


def steps(p: Placed, made: list[torch.optim.Optimizer], numbers: range) -> None:
    for number in numbers:
        pairs = [whole_pair(p.model, microbatch("image", number), microbatch_generator(0, number, 0))]
        backward(p, pairs, global_weights(p, pairs), {}, torch.float32)
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = CONFIG.lr / (number + 1)
            optimizer.step()


def weights(p: Placed) -> dict[str, Tensor]:
    return {name: leaf.local.detach().clone() for name, leaf in p.leaves.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(b[name], value) for name, value in a.items())


@pytest.mark.parametrize("exact", [True, False])
def test_state_elsewhere_makes_the_same_steps(exact: bool):
    here, away = placed(Layout(data=1, exact=exact)), placed(Layout(data=1, exact=exact))
    before = weights(here)
    made = optimizers(away, away=True)
    steps(here, optimizers(here, away=False), range(3))
    steps(away, made, range(3))
    assert same(weights(here), weights(away)) and not same(before, weights(here))
    assert all(entry["exp_avg"].device.type == "cpu" for entry in made[0].state.values())


def test_a_continuation_takes_up_state_and_weights():
    whole, first, second = (placed(Layout(data=1)) for _ in range(3))
    steps(whole, optimizers(whole, away=True), range(4))
    before = optimizers(first, away=True)
    steps(first, before, range(2))
    after = optimizers(second, away=True)
    with torch.no_grad():  # weights are restored after the optimizers were made
        for name, value in weights(first).items():
            second.leaves[name].local.copy_(value)
    for ours, theirs in zip(after, before, strict=True):
        ours.load_state_dict(theirs.state_dict())
    steps(second, after, range(2, 4))
    assert same(weights(whole), weights(second))


def test_state_put_in_by_name_is_taken_up():
    whole, first, second = (placed(Layout(data=1)) for _ in range(3))
    steps(whole, optimizers(whole, away=True), range(4))
    before, after = optimizers(first, away=True), optimizers(second, away=True)
    steps(first, before, range(2))
    with torch.no_grad():
        for name, leaf in second.leaves.items():
            leaf.local.copy_(first.leaves[name].local)
            if entry := before[0].state.get(first.leaves[name].local):
                after[0].state[leaf.local] = {key: value.clone() for key, value in entry.items()}
    steps(second, after, range(2, 4))
    assert same(weights(whole), weights(second))


def on_ranks(layout: Layout, away: bool) -> dict[str, Tensor]:
    p = placed(layout, join(layout, torch.device("cpu")))
    steps(p, optimizers(p, away=away), range(2))
    return weights(p)


def test_divided_weights_make_the_same_steps(crew: Crew):
    here, away = (crew.run(on_ranks, Layout(), away, size=2) for away in (False, True))
    assert all(same(a, b) for a, b in zip(here, away, strict=True)) and not same(here[0], here[1])


def test_a_weight_without_a_gradient_stays():
    p = nn.Parameter(torch.ones(3))
    (made,) = offload([torch.optim.AdamW([p], lr=1.0)], exact=True)
    made.step()
    assert torch.equal(p, torch.ones(3)) and not made.state


def test_muon_is_refused():
    with pytest.raises(BadInput, match="set train.optimizer.matrix_lr=0"):
        offload(build_optimizers(placed(Layout(data=1)).learned(), OptimizerConfig()), exact=True)
