"""Weights are packed in C++ as the slow way packs them, or nearer to what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litchi.model import compiled, native
from litchi.model.packing import BITS, KINDS, Format, dequantise, pack, quantise, unpack_groups

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
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "w8a8"])
def test_it_is_packed_as_the_slow_way_packs_it(form: Format, flags: tuple[str, ...]):
    """oracle: packing.pack"""
    weight = some_weights()
    assert torch.equal(packed(weight, form, flags), pack(weight, form).flatten().view(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_what_was_quantised(bits: int):
    weight = some_weights()[:64]
    assert torch.equal(
        unpack_groups(pack(weight, "int4" if bits == 4 else "int8"), bits), dequantise(*quantise(weight, bits))
    )


@FLAGS
def test_four_bits_lie_nearer_than_the_range_of_a_group_gives(flags: tuple[str, ...]):
    """Never further in any group, and a sixth less of the squares where weights are normal."""
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    for w, most in ((weight, 0.85), (some_weights(), 1.0)):
        found, plain = (
            (x - w).unflatten(1, (-1, 32)).pow(2).sum(2)
            for x in (given_back(w, "int4", flags), dequantise(*quantise(w, 4)))
        )
        assert bool((found <= plain * 1.0001).all())
        assert found.sum() <= most * plain.sum()


@FLAGS
def test_what_was_in_four_bits_stays_as_it_was(flags: tuple[str, ...]):
    """Groups of 32 with an fp16 scale and least value, which use nine or more of their steps."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (96, 4, 32), generator=generator)
    low = torch.randint(0, 4, (96, 4, 1), generator=generator)
    q = q.clamp(min=low, max=low + 8 + torch.randint(0, 4, (96, 4, 1), generator=generator))
    q[..., :1], q[..., 1:2] = low, torch.maximum(q.amax(2, keepdim=True), low + 8)
    scale = (0.01 + torch.rand(96, 4, generator=generator) / 10).half()
    weight = dequantise(q, scale, (-8 * scale.float() + 0.3 * torch.rand(96, 4, generator=generator)).half())
    assert torch.equal(given_back(weight, "int4", flags), weight)
