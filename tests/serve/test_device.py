"""What a GPU would compute: its lanes, its pages for FlashAttention, its graphs and its tiles, each held to the oracle.

No law here needs a GPU but those that are marked. Kernels that only a GPU has are written out here from what PyTorch's
documents say of them; that nothing is left on the CPU is found with tensors that have a device and no values.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litchi.cli import find_checkpoint
from litchi.config import BadInput
from litchi.model import exact
from litchi.model.attention import attend_dense
from litchi.model.generate import whole
from litchi.model.lowrank import Adapters
from litchi.model.network import Model
from litchi.model.weights import load
from litchi.schema.processor import Processor
from litchi.schema.request import Request
from litchi.serve.engine import Engine
from litchi.serve.graphs import Graphs, Play
from litchi.serve.lanes import Flash, Lanes, Slots, flash_works, rounded
from litchi.serve.loading import load_engine
from litchi.serve.pages import Pages
from litchi.serve.placing import device_of, place_of, placed
from litchi.serve.run import ServeConfig
from litchi.serve.runner import TorchRunner
from litchi.serve.scheduler import EngineConfig
from tests.laws.documents import model, processor
from tests.serve.nowhere import again, reader_of, wordy
from tests.serve.test_engine import KINDS, Answer, play, request, same, same_part

CPU = torch.device("cpu")


@dataclass
class Seat:
    start: int
    stop: int
    pages: list[int]
    ends: list[int]


@st.composite
def seats(draw: st.DrawFn, size: int, causal: bool = False) -> list[Seat]:
    """Pieces of documents on pages of their own, in any order; spans of any length."""
    order = draw(st.permutations(range(1, 25)))
    found, at = [], 0
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, 2 * size))
        stop = start + draw(st.integers(1, 2 * size))
        pages, at = list(order[at : at + -(-stop // size)]), at + -(-stop // size)
        ends = list(range(start + 1, stop + 1))
        if not causal:
            for index in range(len(ends) - 1):
                ends[index] = draw(st.sampled_from((ends[index], stop)))
            ends = [max(ends[: i + 1]) for i in range(len(ends))]
        found.append(Seat(start, stop, pages, ends))
    return found


def pool(size: int, dtype: torch.dtype = torch.float32) -> Pages:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 26, size, 2, 8, generator=generator).to(dtype).transpose(2, 3) for _ in range(2))
    keys[:, 0] = values[:, 0] = 0
    return Pages(keys, values)


def expected(q_THK: Tensor, seat: Seat, pages: Pages) -> Tensor:
    keys, values = (
        kept[0, seat.pages].transpose(1, 2).flatten(0, 1)[: seat.stop].float() for kept in (pages.keys, pages.values)
    )
    mask = torch.arange(seat.stop) < torch.tensor(seat.ends)[:, None]
    return attend_dense(q_THK.float(), keys, values, mask_TM=mask)


def looked(form: type[Slots], found: Sequence[Seat], pages: Pages) -> list[Tensor]:
    """What a form finds for each seat, and the oracle's answer behind it."""
    count = sum(seat.stop - seat.start for seat in found)
    length = rounded(count, 8)
    generator = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn(length, heads, 8, generator=generator).to(pages.keys.dtype) for heads in (6, 2, 2))
    slots = form(pages, form.lay(found, length, pages.size))
    out = slots.attend(q, *slots.extend(0, k, v))
    assert not pages.keys[0, 0].any() and not pages.values[0, 0].any(), "page 0 stays zeros"
    pairs, at = [], 0
    for seat in found:
        stop = at + seat.stop - seat.start
        kept = pages.keys[0, seat.pages].transpose(1, 2).flatten(0, 1)[seat.start : seat.stop]
        assert torch.equal(kept, k[at:stop]), "keys lie on their pages"
        pairs += [out[at:stop].float(), expected(q[at:stop], seat, pages)]
        at = stop
    return pairs


@given(st.data(), st.sampled_from((4, 16)))
@settings(max_examples=60, deadline=None)
def test_lanes_find_what_the_oracle_finds(data: st.DataObject, size: int) -> None:
    pairs = looked(Lanes, data.draw(seats(size)), pool(size))
    for found, wanted in zip(pairs[::2], pairs[1::2], strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def varlen_by_its_document(  # noqa: PLR0913 (its arguments are PyTorch's)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn for pages, as its docstring has it; what no query asks for is NaN."""
    assert window_size == (-1, 0) and enable_gqa and num_splits == 1 and cu_seq_k is None
    assert all(x.dtype == torch.int32 for x in (cu_seq_q, seqused_k, block_table))
    assert key.stride(-1) == 1 and max_k == block_table.shape[1] * key.shape[1] and int(seqused_k.max()) <= max_k
    out = torch.full_like(query, float("nan"))
    for number, used in enumerate(seqused_k.tolist()):
        start, stop = cu_seq_q[number : number + 2].tolist()
        assert stop - start <= max_q
        if stop > start:
            k, v = (x[block_table[number].long()].flatten(0, 1)[:used] for x in (key, value))
            mask = torch.ones(stop - start, used, dtype=torch.bool).tril(used - (stop - start))
            out[start:stop] = attend_dense(query[start:stop].float(), k.float(), v.float(), mask_TM=mask).to(out.dtype)
    return out


@given(st.data(), st.sampled_from((4, 16)))
@settings(max_examples=60, deadline=None)
def test_flash_attention_is_told_what_the_oracle_knows(data: st.DataObject, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", varlen_by_its_document)
        pairs = looked(Flash, data.draw(seats(size, causal=True)), pool(size, torch.bfloat16))
    for found, wanted in zip(pairs[::2], pairs[1::2], strict=True):
        assert torch.allclose(found, wanted, atol=0.02)


def test_flash_attention_is_tried_before_it_is_counted_on(monkeypatch) -> None:
    keys = pool(16, torch.bfloat16).keys[0]
    assert not flash_works(keys, 6), "no CPU has it"
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_its_document)
    assert flash_works(keys, 6) and not flash_works(keys.float(), 6)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
def test_tiles_are_products(count: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(count, 24), torch.randn(40, 24), torch.randn(40)
    assert torch.allclose(exact.tiled(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)


@pytest.mark.parametrize(("count", "length"), [(1, 8), (8, 8), (9, 16), (33, 64), (64, 64), (65, 128), (129, 192)])
def test_few_shapes_serve_many_steps(count: int, length: int) -> None:
    assert rounded(count, 8) == length


# ---- whole networks ----


def engine_of(net: Model, p: Processor, config: EngineConfig) -> Engine:
    adapters = Adapters(net)
    reader = reader_of(net, adapters)
    return Engine(net, p, config, runner=TorchRunner(net, torch.float32, adapters=adapters, reader=reader))


def close(mine: Answer, theirs: Answer) -> bool:
    a, b = whole(mine.deltas), whole(theirs.deltas)
    near = torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
    return near and a.tokens == b.tokens and all(map(same_part, a.parts, b.parts))


@pytest.mark.parametrize("kind", [*KINDS, "words"])
def test_an_engine_on_a_device_answers_as_one_on_the_cpu(kind: str, monkeypatch) -> None:
    p = processor(**KINDS.get(kind, {}))
    net = wordy(p) if kind == "words" else model(p, flow=kind == "flow")
    played = 0
    for seed in range(3):
        rng = random.Random(f"{kind}{seed}")
        asked = [request(rng, "mask" if kind == "words" else kind) for _ in range(8)]
        if kind == "words":
            asked = [replace(each, want="text", parts=each.parts[-1:], tokens=(5, 6, 7)) for each in asked]
            asked = [replace(each, parts=()) for each in asked]
        config = EngineConfig(
            page=8, cache_tokens=4096, step_tokens=rng.choice((5, 64)), path="torch", weights="float32"
        )
        plain = play(Engine(deepcopy(net), p, config), asked, random.Random(seed))
        if kind == "words":
            monkeypatch.setattr("litchi.serve.device.flash_works", lambda keys, heads: True)
            monkeypatch.setattr(varlen, "varlen_attn", varlen_by_its_document)
        engine = engine_of(deepcopy(net), p, config)
        found = play(engine, asked, random.Random(seed))
        assert isinstance(engine.runner, TorchRunner) and engine.runner.reader is not None
        assert engine.runner.reader.form is (Flash if kind == "words" else Lanes)
        if engine.runner.reader.graphs is not None:
            assert 0 < len(engine.runner.reader.graphs.known) < engine.num_steps
        for mine, theirs in zip(found, plain, strict=True):
            if theirs.deltas and theirs.deltas[-1].finish and mine.deltas and mine.deltas[-1].finish:
                assert close(mine, theirs)
                played += 1
    assert played > 12


@pytest.mark.parametrize(("page", "step", "count"), [(8, 5, 40), (128, 80, 104)])
def test_rows_that_are_wanted_of_many_steps_outlive_them_and_the_look_leaves_no_page_behind(page, step, count) -> None:
    """What a graph leaves is overwritten when it plays again, and it knows pages by where they lie."""
    p = processor()
    config = EngineConfig(page=page, cache_tokens=512, step_tokens=step, path="torch", weights="float32")
    asked = Request(parts=(), tokens=tuple(range(5, 5 + count)), want="embed")
    engines = [engine_of(wordy(p), p, config).look(), Engine(wordy(p), p, config)]
    mine, theirs = (engine.start().complete(asked) for engine in engines)
    for engine in engines:
        engine.close()
    assert torch.allclose(torch.tensor(mine.vector), torch.tensor(theirs.vector), atol=1e-5)


def test_nothing_of_a_step_is_left_on_the_cpu() -> None:
    """In a process of its own, since a device of that kind stays where it has been made known."""
    answer = subprocess.run([sys.executable, "-m", "tests.serve.nowhere"], capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.splitlines() == [*KINDS, "words", "words by flash", "refused"]


def test_a_graph_is_captured_once_for_a_set_of_shapes() -> None:
    captured = []

    def capture(step: Callable[[], Tensor]) -> Play:
        captured.append(step)
        return again(step)

    graphs = Graphs(lambda inputs: inputs["x"] * 2 + inputs["y"].sum(), capture)
    for count in (3, 4, 3, 3, 4):
        x, y = torch.rand(count), torch.rand(2)
        assert torch.equal(graphs.run({"x": x, "y": y}), x * 2 + y.sum())
    assert len(captured) == 2


# ---- where weights go ----


def test_only_matrices_of_products_are_narrow_and_heads_of_pictures_stay() -> None:
    net = placed(model(processor()), CPU, torch.bfloat16)
    wide = {name for name, value in net.state_dict().items() if value.dtype == torch.float32}
    assert "embed_tokens.weight" in wide and "norm.weight" in wide
    assert all(name in wide for name in net.state_dict() if name.startswith("writers."))
    assert net.layers[0].get_submodule("experts.0.mlp.up_proj").weight.dtype == torch.bfloat16


def test_a_checkpoint_is_read_straight_to_its_place() -> None:
    folder = find_checkpoint("tiny")
    direct = load(folder, place=partial(place_of, device=CPU, dtype=torch.bfloat16)).model
    later = placed(load(folder).model, CPU, torch.bfloat16)
    for (name, mine), theirs in zip(direct.state_dict().items(), later.state_dict().values(), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_a_clear_refusal() -> None:
    assert device_of(EngineConfig()) == CPU
    with pytest.raises(BadInput, match="sees no GPU here: set cpu or auto"):
        load_engine(find_checkpoint("tiny"), ServeConfig(engine=EngineConfig(device="cuda")))
    with pytest.raises(BadInput, match="bfloat16 or float32 only"):
        device_of(EngineConfig(device="cuda", weights="int4"))


def test_engines_share_the_gpus_out(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [device_of(EngineConfig(), number).index for number in (0, 2, 5)] == [0, 2, 1]
    assert device_of(EngineConfig(weights="int8")) == device_of(EngineConfig(path="native")) == CPU


def test_matrices_that_are_kept_narrow_give_the_bits_of_those_that_are_made_so_in_each_step() -> None:
    """The path in PyTorch on a CPU, which spends most of a step on that otherwise."""
    p, config = processor(), EngineConfig(path="torch", cache_tokens=4096)
    asked = [request(random.Random(seed), "mask") for seed in range(12)]
    kept = Engine(model(p), p, config, take=True)
    assert kept.model.layers[0].get_submodule("experts.0.mlp.up_proj").weight.dtype == torch.bfloat16
    for mine, theirs in zip(
        *(play(e, asked, random.Random(0)) for e in (kept, Engine(model(p), p, config))), strict=True
    ):
        assert mine.error is theirs.error is None and same(whole(mine.deltas), whole(theirs.deltas))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_the_look_finds_answers_exact_and_near_those_of_the_cpu(dtype) -> None:
    config = EngineConfig(weights=dtype, cache_tokens=4096)
    there = load_engine(find_checkpoint("tiny"), ServeConfig(engine=config)).start()
    here = load_engine(find_checkpoint("tiny"), ServeConfig(engine=replace(config, device="cpu", path="torch"))).start()
    asked = Request(parts=(), tokens=tuple(range(5, 90)), want="embed")
    try:
        assert there.mode == "exact"
        mine, theirs = there.complete(asked), here.complete(asked)
        near = 1e-3 if dtype == "float32" else 0.05
        assert torch.allclose(torch.tensor(mine.vector), torch.tensor(theirs.vector), atol=near)
    finally:
        there.close()
        here.close()
