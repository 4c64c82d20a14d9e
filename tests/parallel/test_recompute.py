"""What is computed again is the same to the last bit, keeps every name, and is not kept in memory."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litchi.model.network import Model, ModelConfig, initialise
from litchi.model.objective import corrupt, loss_of, weights_of
from litchi.parallel import recompute
from litchi.parallel.crew import Crew
from litchi.parallel.gradient import backward, global_weights
from litchi.parallel.mesh import Layout, World, join
from litchi.parallel.plan import apply
from litchi.parallel.recompute import Recompute
from litchi.schema.sample import Sample
from litchi.schema.sequence import Batch, pack, pack_rows
from litchi.train.certify import MODEL, microbatch
from litchi.train.step import microbatch_generator, whole_pair
from tests.laws import documents
from tests.laws.texts import document

PROCESSOR = documents.processor(tower=True)
KINDS: list[Recompute] = ["full", "selective"]


def fresh() -> Model:
    return documents.model(PROCESSOR).train()


def batch() -> Batch:
    """Text, pictures seen through a tower and drawn, and actions."""
    rng = np.random.default_rng(0)
    parts = [documents.part(kind, rng) for kind in ("see", "draw", "move", "answer")]
    return pack([PROCESSOR.encode(Sample(tuple(parts), "a", "b"), rng)])


def gradients(model: Model) -> dict[str, Tensor]:
    """By name, None where nothing is learned."""
    read = corrupt(model, batch(), torch.Generator().manual_seed(0))
    loss_of(model, batch(), read).over(weights_of(model, batch(), read), {}).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_keep_every_bit_and_parameters_their_names(kind: Recompute, every: int):
    plain, again = fresh(), fresh()
    recompute.apply(again, kind, every)
    assert again.state_dict().keys() == plain.state_dict().keys()
    wanted, found = gradients(plain), gradients(again)
    assert wanted.keys() == found.keys() and any("tower" in name for name in wanted)
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def on_ranks(layout: Layout, kind: Recompute) -> dict[str, Tensor]:
    """This rank's gradients of what it holds of a network with a tower."""
    world, model = join(layout, torch.device("cpu")), Model(MODEL)
    initialise(model, 0)
    recompute.apply(model, kind)
    placed = apply(model, world)
    pairs = [whole_pair(model, microbatch("image", 0), microbatch_generator(0, 0, 0))]
    backward(placed, pairs, global_weights(placed, pairs), {}, torch.float32)
    return {leaf.name: leaf.local.grad.clone() for leaf in placed.learned() if leaf.local.grad is not None}


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=["zero", "tensor"])
def test_layers_that_are_divided_compute_again(crew: Crew, layout: Layout):
    plain, *others = (crew.run(on_ranks, layout, kind, size=2) for kind in ("none", *KINDS))
    for other in others:
        for wanted, found in zip(plain, other, strict=True):
            assert wanted and wanted.keys() == found.keys()
            assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


class Made(TorchDispatchMode):
    """The storages that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.sizes[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return out

    def bytes(self) -> int:
        """Of those that are still there."""
        gc.collect()
        return sum(size for storage, size in self.sizes.items() if not storage.expired())


def kept(kind: Recompute) -> int:
    """Bytes that a forward through eight layers leaves for its backward."""
    config = ModelConfig(vocab_size=64, width=64, num_layers=8, num_heads=4, num_kv_heads=4, head_width=16)
    model = Model(config)
    initialise(model, 0)
    recompute.apply(model, kind)
    rows = pack_rows([[document(64, seed=s)] for s in range(4)], 64, 0)
    own = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    with Made() as made:
        x_TD = model(rows)
        made.sizes = {storage: size for storage, size in made.sizes.items() if storage not in own}
        found = made.bytes()
    x_TD.sum().backward()
    return found


def test_what_is_computed_again_is_not_kept():
    none, selective, full = (kept(kind) for kind in ("none", "selective", "full"))
    state = 256 * 64 * 4 * 8
    """Bytes of what layers are given: fp32, 256 tokens, 64 values, 8 layers."""
    assert full < 2 * state
    assert full < selective < 0.55 * none, (none, selective, full)


def test_nothing_is_computed_again_where_nothing_is_learned():
    model = fresh()
    recompute.apply(model, "full")
    with torch.no_grad():
        assert torch.equal(model(batch()), fresh()(batch()))


def test_a_process_alone_is_a_world_of_one():
    model = fresh()
    recompute.apply(model, "full")
    assert apply(model, World()).leaves.keys() == dict(fresh().named_parameters()).keys()
