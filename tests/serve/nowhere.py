"""A device that has no values: whoever mixes it with the CPU is refused, so that what a GPU would refuse is found here.

python -m tests.serve.nowhere
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from litchi.model.lowrank import Adapters
from litchi.model.network import Model, ModelConfig, initialise
from litchi.schema.processor import Builder, Processor
from litchi.schema.sample import Image, Role, Text
from litchi.serve import device
from litchi.serve.device import DeviceReader
from litchi.serve.graphs import Graphs, Play
from litchi.serve.lanes import Flash, rounded
from litchi.serve.pages import Pages
from litchi.serve.placing import placed
from litchi.serve.promise import drawn
from litchi.serve.runner import Piece, TorchRunner, together
from tests.laws.documents import model, processor
from tests.serve.test_engine import KINDS, picture


def again(step: Callable[[], Tensor]) -> Play:
    """Captures without a GPU: the same is done again into the same place."""
    out = step()
    return lambda: out.copy_(step()), out


def reader_of(net: Model, adapters: Adapters, dtype: torch.dtype = torch.float32) -> DeviceReader:
    return DeviceReader(net, dtype, adapters, exact=True, graphs=partial(Graphs, capture=again))


def wordy(p: Processor) -> Model:
    """A network of words only."""
    config = ModelConfig(
        vocab_size=len(p.tokenizer), width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_width=12, mlp_width=48
    )
    net = Model(config)
    initialise(net, 0)
    return net.eval()


def shown(p: Processor) -> Builder:
    """A user's picture and words."""
    words = Text(text="the red ball", role=Role.USER)
    return p.prompt((Image(pixels=picture(random.Random(0)), role=Role.USER), words), ())


def read(p: Processor, net: Model, documents: list[Builder], place: torch.device, *, flash: bool = False) -> None:
    pieces = [
        Piece(builder, 0, len(builder.tokens), list(range(8 * number + 1, 8 * number + 9)), scores=1)
        for number, builder in enumerate(documents)
    ]
    batch = together(pieces, partial(rounded, least=8))
    device.flash_works = lambda keys, heads: flash
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        adapters = Adapters(placed(net, place, torch.float32))
        reader = reader_of(net, adapters)
        runner = TorchRunner(net, torch.float32, adapters=adapters, reader=reader)
        pages = Pages(*runner.room(24, 8))
        assert pages.keys.device == place and pages.keys.shape == (2, 24, 2, 8, 12)
        assert (reader.form is Flash) == flash
        for _ in range(2):  # the second is played again
            hidden = reader(batch, pieces, pages)
            assert hidden.device == place and hidden.shape == (len(batch), 32)
        assert (len(reader.graphs.known) if reader.graphs else 0) == (not batch.vectors and len(batch) <= 64)
        scores = runner.logits(hidden[-2:].cpu())
        assert scores.device.type == "cpu" and scores.shape == (2, net.config.vocab_size)
        assert all(weight.device.type == "cpu" for weight in net.writers.parameters())


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(
        "nowhere", backend_module=SimpleNamespace(get_amp_supported_dtype=lambda: [torch.bfloat16])
    )
    place = torch.device("nowhere", 0)
    for kind, made in KINDS.items():
        p = processor(**made)
        net = model(p, flow=kind == "flow")
        documents = [drawn(p, net.config.vocab_size, random.Random(0))]
        if not p.sight:  # a tower's rows are counted by their values
            documents.append(shown(p))
        read(p, net, documents, place)
        print(kind)
    p = processor()
    for flash in (False, True):
        documents = [drawn(p, wordy(p).config.vocab_size, random.Random(seed)) for seed in range(2)]
        read(p, wordy(p), documents, place, flash=flash)
        print("words by flash" if flash else "words")
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.zeros(3, device=place) + torch.zeros(3)
        except RuntimeError:
            print("refused")


if __name__ == "__main__":
    main()
