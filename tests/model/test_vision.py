"""A vision tower within the one forward: its rows stand on placeholders, read their own picture alone, and learn."""

from __future__ import annotations

from dataclasses import replace

import torch

from litchi.model.network import Mask, Model, ModelConfig, initialise
from litchi.model.objective import objective
from litchi.model.vision import Tower
from litchi.parallel.mesh import World
from litchi.parallel.plan import apply
from litchi.schema.arrays import IGNORE
from litchi.schema.processor import Builder, grid_places
from litchi.schema.sequence import Batch, Modality, TokenSequence, pack, pack_rows
from litchi.train.step import train_step

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""fp32 sums in another order; the model is two layers of width 16."""

PATCH, CHANNELS = 9, 12


def model(experts: int = 1) -> Model:
    kinds = {Modality.VISION: Tower(channels=CHANNELS, width=16, num_layers=1, num_heads=2), Modality.IMAGE: Mask(2, 4)}
    config = ModelConfig(
        vocab_size=20, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_width=12, mlp_width=24,
        modalities={str(m): kind for m, kind in kinds.items()}, experts=experts,
    )  # fmt: skip
    net = Model(config)
    initialise(net, 0)
    with torch.no_grad():  # at its first values the tower writes rows of about 1e-4, which no tolerance would see
        for p in net.readers[Modality.VISION].parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return net.eval()


def document(seed: int, sizes: tuple[tuple[int, int], ...] = ((2, 2), (1, 3))) -> TokenSequence:
    """Words, pictures that are only understood, and words to learn."""
    rng = torch.Generator().manual_seed(seed)
    builder = Builder()
    for height, width in sizes:
        builder.token(1 + seed % 3)
        rows = torch.randn(height * width, CHANNELS, generator=rng)
        builder.vectors(Modality.VISION, rows, torch.ones(len(rows)), 0.0, grid_places(height, width), PATCH)
        builder.time += 1
    for index in (4, 5, 6):
        builder.token(index, 1.0)
    return builder.build()


def changed(sequence: TokenSequence, row: int) -> TokenSequence:
    """The same document with other pixels in one patch."""
    v = sequence.vectors[Modality.VISION]
    value = v.value.clone()
    value[row] += 1.0
    return replace(sequence, vectors={**sequence.vectors, Modality.VISION: replace(v, value=value)})


def rows(net: Model, sequence: TokenSequence) -> torch.Tensor:
    """What the tower writes over the placeholders."""
    batch = pack([sequence])
    with torch.no_grad():
        return net.embed(batch, net.see(batch))[batch.vectors[Modality.VISION].index]


def test_rows_of_the_tower_stand_on_their_placeholders_and_nowhere_else() -> None:
    net, sequence = model(), document(0)
    batch = pack([sequence])
    with torch.no_grad():
        embedded, bare = net.embed(batch, net.see(batch)), net.embed_tokens(batch.tokens)
    stands = torch.zeros(len(batch), dtype=torch.bool)
    stands[batch.vectors[Modality.VISION].index] = True
    assert torch.equal(embedded[~stands], bare[~stands])
    assert bool((embedded[stands] != bare[stands]).any(1).all())


def test_a_patch_reads_its_own_picture_and_no_other() -> None:
    net, sequence = model(), document(0)
    before = rows(net, sequence)
    for row in range(7):
        differs = (rows(net, changed(sequence, row)) != before).any(1).tolist()
        first = row < 4
        assert differs == [first] * 4 + [not first] * 3


def test_a_patch_knows_its_place() -> None:
    net, sequence = model(), document(0, ((2, 2),))
    v = sequence.vectors[Modality.VISION]
    same = replace(sequence, vectors={Modality.VISION: replace(v, value=v.value[:1].expand(4, -1))})
    assert len(rows(net, same).unique(dim=0)) == 4


def test_pictures_of_different_documents_do_not_meet() -> None:
    net, documents = model(), [document(0), document(1), document(2, ((3, 1),))]
    with torch.no_grad():
        apart = torch.cat([net(pack([d])) for d in documents])
        torch.testing.assert_close(net(pack(documents)), apart, **CLOSE)
        row = max(map(len, documents)) + 2
        batch = pack_rows([[d] for d in documents], row, 0)
        real = torch.cat([torch.arange(len(d)) + i * row for i, d in enumerate(documents)])
        torch.testing.assert_close(net(batch)[real], apart, **CLOSE)


def test_what_is_said_after_a_picture_depends_on_it_and_what_came_before_does_not() -> None:
    net, sequence = model(), document(0)
    with torch.no_grad():
        base, other = net(pack([sequence])), net(pack([changed(sequence, 4)]))
    first = int(sequence.vectors[Modality.VISION].index[4])
    assert torch.equal(base[:first], other[:first])
    assert not torch.allclose(base[-1], other[-1], atol=1e-3)


def test_pictures_that_are_only_understood_belong_to_the_first_expert() -> None:
    net, batch = model(experts=2), pack([document(0)])
    text, spans = net.route(batch)
    assert len(text) == len(batch) and len(spans) == 0


def learn(batch: Batch) -> Model:
    net = model()
    train_step(apply(net, World()), [], [batch], scale={}, clip_at=0.0, dtype=torch.float32, draw=(0, 0))
    return net


def test_gradients_reach_every_weight_of_the_tower() -> None:
    net = learn(pack([document(0), document(1)]))
    tower = net.readers[Modality.VISION]
    assert sorted(name for name, p in tower.named_parameters() if p.grad is None) == []
    # the bias of a key moves all scores of a query alike, so that only part of qkv.bias can have a gradient
    assert sorted(name for name, p in tower.named_parameters() if not bool(p.grad.any())) == []


def test_a_tower_adds_no_loss_of_its_own() -> None:
    batch = pack([document(0)])
    loss = objective(model(), batch, torch.Generator().manual_seed(0))
    assert set(loss.total) == {"text"}
    assert float(loss.weight["text"]) == int((batch.labels != IGNORE).sum()) == 3
