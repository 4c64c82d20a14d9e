"""A step divides once, by the weight of everything in it; what carries no weight is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from litchi.config import BadInput
from litchi.model.network import Model, initialise
from litchi.model.objective import corrupt, loss_of, weights_of
from litchi.parallel.mesh import World
from litchi.parallel.plan import apply
from litchi.schema.sample import Action, Role, Sample, Text
from litchi.schema.sequence import Batch, Modality, pack, split, supervised
from litchi.train.batches import Batches, check_coverage, coverage, emphasised
from litchi.train.run import run
from litchi.train.step import microbatch_generator, train_step
from tests.train.runs import CONFIG, MODEL, PROCESSOR, RUN, sample


def fresh() -> Model:
    model = Model(MODEL)
    initialise(model, 0)
    with torch.no_grad():  # heads start at zero, and would leave the trunk without a gradient
        for parameter in model.writers.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def documents(*positions: int) -> Batch:
    return pack([PROCESSOR.encode(sample(i), np.random.default_rng(i)) for i in positions])


def step(batches: list[Batch], dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict]:
    """The gradients that one optimizer step is taken from, and its row."""
    model = fresh()
    placed = apply(model, World())
    metrics = train_step(placed, [], batches, scale={"image": 2.0}, clip_at=0.0, dtype=dtype, draw=(5, 0))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, metrics.row()


def test_two_microbatches_are_one_batch_of_both() -> None:
    """Weights are global: a microbatch with few labels counts for as much as they weigh, not for a half."""
    groups = [(0, 1, 2, 3, 4), (5,), (6, 7)]
    model = fresh()
    parts = [documents(*group) for group in groups]
    corrupted = [corrupt(model, batch, microbatch_generator(5, 0, m)) for m, batch in enumerate(parts)]
    weight: dict[str, float] = {}
    for batch, noised in zip(parts, corrupted, strict=True):
        for m, w in weights_of(model, batch, noised).items():
            weight[m] = weight.get(m, 0.0) + w
    whole, noised = documents(*range(8)), pack([s for batch in corrupted for s in split(batch)])
    loss_of(model, whole, noised).over(weight, {"image": 2.0}).backward()
    gradients, row = step(parts)
    assert {"loss/text", "loss/image", "loss/action"} <= row.keys()
    for name, p in model.named_parameters():
        if p.grad is not None:
            # fp32 sums in another order; a wrong weight would be off by tenths of the norm
            assert float((gradients[name] - p.grad).norm()) <= 3e-6 * float(p.grad.norm()), name


def test_a_step_in_bfloat16_is_the_same_step_roughly() -> None:
    exact, rough = step([documents(*range(6))])[1], step([documents(*range(6))], torch.bfloat16)[1]
    # autocast rounds factors to 8 bits
    assert all(rough[name] == pytest.approx(value, rel=0.02) for name, value in exact.items())


def test_a_step_without_anything_to_learn_is_refused() -> None:
    plain = PROCESSOR.encode(Sample((Text(text="the red ball"),), "a", "b"), np.random.default_rng(0))
    with pytest.raises(BadInput, match="give parts a weight above 0"):
        step([pack([plain])])


def test_a_run_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    def unweighted(position: int) -> Sample:
        given = sample(position)
        return replace(given, parts=tuple(replace(part, weight=0.0) for part in given.parts))

    with pytest.raises(BadInput, match="nothing in the first batch is supervised: give the parts to be learned"):
        run(CONFIG, MODEL, PROCESSOR, unweighted, tmp_path, RUN)
    assert not list(tmp_path.glob("step_*"))


def test_coverage_shows_what_is_supervised() -> None:
    parts = (
        Text(text="where is the ball", role=Role.USER),
        Text(text="left of a blue key", role=Role.ASSISTANT, weight=0.5),
        Action(values=np.zeros((2, 2), np.float32), space="arm", weight=2.0),
        Action.discrete(1, "grid", weight=1.0),
    )
    batch = pack([PROCESSOR.encode(Sample(parts, "a", "b"), np.random.default_rng(0))])
    check_coverage(batch)
    said = coverage(batch, PROCESSOR)
    assert "left of a blue key<|end|><|grid:1|>" in said and "where" not in said
    assert supervised(batch)[Modality.ACTION] == 4.0 and "'action': '4'" in said
    assert f"of {len(batch)} tokens" in said


def test_emphasis_scales_every_weight_of_its_source_and_nothing_else() -> None:
    plain = Batches(sample, PROCESSOR, replace(CONFIG.batches, emphasis={}), 0)
    emphatic = Batches(sample, PROCESSOR, replace(CONFIG.batches, emphasis={"even": 3.0}), 0)
    for position in range(20):
        before, after = plain.encode(position), emphatic.encode(position)
        factor = 1.0 if position % 2 else 3.0
        assert torch.equal(after.weights, before.weights * factor) and torch.equal(after.labels, before.labels)
        for modality, v in before.vectors.items():
            assert torch.equal(after.vectors[modality].weight, v.weight * factor)
            assert torch.equal(after.vectors[modality].value, v.value)
            assert torch.equal(after.vectors[modality].time, v.time)


def test_emphasis_of_one_is_the_sequence_itself() -> None:
    sequence = PROCESSOR.encode(sample(0), np.random.default_rng(0))
    assert emphasised(sequence, 1.0) is sequence
