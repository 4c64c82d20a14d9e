"""A frozen eye: cells as square as the picture allows, kept once seen, and whole again out of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from litchi.model.efficientnet import EfficientNetLite
from litchi.model.eye import FrozenEye, FrozenEyeConfig
from litchi.model.generate import Generator
from litchi.model.network import Features, Model, initialise
from litchi.model.weights import load, save
from litchi.schema.foreign import ForeignProcessor, ForeignTokenizer
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Image, Role, Text
from litchi.schema.sequence import Modality, pack
from litchi.schema.sight import Seen
from recipes.see import PICTURE, TEMPLATE
from tests.model.test_adopt import adopted, folder  # noqa: F401 (fixtures: a random Llama of transformers, adopted)

TOKEN = "<|endoftext|>"


@pytest.fixture(scope="module")
def eye() -> FrozenEye:
    torch.manual_seed(0)
    network = EfficientNetLite()
    for name, p in network.named_parameters():
        if "_bn" in name:  # at their first values the norms of a random network let almost nothing through
            torch.nn.init.uniform_(p, 2.0, 4.0) if name.endswith("weight") else torch.nn.init.normal_(p, 0.5)
    return FrozenEye(FrozenEyeConfig(TOKEN, num_tokens=8, pixels=32), network.requires_grad_(False))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "shape"), [((64, 64), (3, 2)), ((100, 400), (1, 8)), ((400, 100), (6, 1)), ((1, 999), (1, 8))]
)
def test_cells_follow_the_shape_of_the_picture(eye: FrozenEye, size: tuple, shape: tuple) -> None:
    [seen] = eye.look(picture(*size))
    assert isinstance(seen, Seen) and eye.shape(*size) == shape
    assert seen.value.shape == (shape[0] * shape[1], eye.config.channels) and len(seen.steps) == len(seen.value)


def test_a_picture_met_again_is_the_same_and_another_is_not(eye: FrozenEye) -> None:
    [first], [again], [other] = (eye.look(picture(64, 64, seed)) for seed in (1, 1, 2))
    assert torch.equal(first.value, again.value) and not torch.equal(first.value, other.value)
    turned = picture(32, 128, 1).reshape(128, 32, 3)
    assert eye.look(turned)[0].value.shape != eye.look(turned.reshape(32, 128, 3))[0].value.shape


def seeing(checkpoint: Path, eye: FrozenEye) -> tuple[Model, ForeignProcessor]:
    """The adopted Llama behind the eye, as the recipe joins SmolLM2 to it."""
    loaded = load(checkpoint)
    theirs = loaded.processor.tokenizer
    config = replace(theirs.config, template=TEMPLATE.replace(PICTURE, TOKEN))
    features = {str(Modality.VISION): Features(eye.config.channels)}
    net = Model(replace(loaded.model.config, modalities=features))
    initialise(net, 0)
    net.load_state_dict(net.state_dict() | loaded.model.state_dict())
    return net.eval(), ForeignProcessor(ForeignTokenizer(theirs.backend, config), eye)


def test_a_checkpoint_keeps_its_eye(adopted: Path, eye: FrozenEye, tmp_path: Path) -> None:  # noqa: F811
    net, processor = seeing(adopted, eye)
    save(tmp_path / "kept", net, processor, meta={})
    again = load(tmp_path / "kept")
    parts = (Image(pixels=picture(64, 96), role=Role.USER), Text(text="what do you see", role=Role.USER))
    before, after = processor.prompt(parts), again.processor.prompt(parts)
    assert before.tokens == after.tokens and before.tokens.count(processor.shown) == 8
    with torch.no_grad():
        assert torch.equal(net(pack([before.build()])), again.model(pack([after.build()])))


def test_what_is_said_depends_on_what_is_seen(adopted: Path, eye: FrozenEye) -> None:  # noqa: F811
    net, processor = seeing(adopted, eye)
    asked = [
        processor.prompt((Image(pixels=picture(64, 64, seed), role=Role.USER), Text(text="what", role=Role.USER)))
        for seed in (1, 2)
    ]
    with torch.no_grad():
        first, second = (net.logits(net(pack([builder.build()])))[-1] for builder in asked)
    assert (first - second).abs().max() > 1e-4
    parts = (Image(pixels=picture(64, 64), role=Role.USER), Text(text="what", role=Role.USER))
    request = Request(parts=parts, params=SamplingParams(max_tokens=6))
    cached, whole = (Generator(net, processor, cached=c).complete(request) for c in (True, False))
    assert cached.tokens == whole.tokens
