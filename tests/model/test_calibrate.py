"""Four bits with errors fed back: nearer than each weight by itself, kept by packing, and whole or not there at all."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from litchi.cli import main
from litchi.config import BadInput, to_json
from litchi.data.run import DataConfig
from litchi.data.run import run as make_data
from litchi.model import calibrate as calibration
from litchi.model import feedback
from litchi.model.calibrate import Reading, batches, calibrate, inputs_of, steps, text_windows
from litchi.model.feedback import cost, feed_back, in_order, lines, look_again, round_alone, settled
from litchi.model.network import Model
from litchi.model.weights import load, save
from litchi.schema.processor import Processor
from litchi.schema.sequence import Batch, pack
from recipes import tiny
from tests.laws import documents

TEXT = " ".join(documents.WORDS)


def some_inputs(count: int = 2000, width: int = 128) -> Tensor:
    """Values that go together, of very different sizes, one never there and one always the same."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(width, width, generator=generator) / 8 + torch.eye(width)
    sizes = (torch.randn(width, generator=generator)).exp()
    x = torch.randn(count, width, generator=generator) @ mixed * sizes
    x[:, 5], x[:, 40] = 0, 3
    return x


def some_weights(rows: int = 96, width: int = 128) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) / 20


def test_no_output_is_further_off_than_by_weights_rounded_alone() -> None:
    """On the inputs that were read; half of the squares are gone where inputs go together. Where they do not, many rows
    would be further off, were they not left as they are."""
    apart = torch.randn(300, 32, generator=torch.Generator().manual_seed(2))
    for x, weight, most in ((some_inputs(), some_weights(), 0.55), (apart, some_weights(2000, 32), 0.97)):
        both = feed_back(weight, x.T @ x), round_alone(weight)
        fed, alone = ((x @ (weight - rounded).T).square().sum(0) for rounded in both)
        assert bool((fed <= alone * 1.0001).all())
        assert fed.sum() < most * alone.sum()


def test_inputs_that_were_not_read_gain_as_well() -> None:
    x, weight = some_inputs(4000), some_weights()
    rounded = feed_back(weight, x[:2000].T @ x[:2000])
    fed, alone = ((x[2000:] @ (weight - w).T).square().sum() for w in (rounded, round_alone(weight)))
    assert fed < 0.6 * alone


def test_packing_keeps_what_was_fed_back() -> None:
    """Bit for bit, with rows of zeros and of one value."""
    x, weight = some_inputs(), some_weights()
    weight[3], weight[4], weight[5, 32:64] = 0, 0.0123, 1e-9
    rounded = feed_back(weight, x.T @ x)
    assert torch.equal(round_alone(rounded), rounded)


def test_what_packing_would_move_is_settled() -> None:
    """A group of one value, of which a scale in fp16 and an integer are no help."""
    weight = torch.full((3, 64), 0.0123)
    assert not torch.equal(round_alone(weight), weight)
    found = settled(weight)
    assert torch.equal(round_alone(found), found) and torch.allclose(found, weight, rtol=1e-3)


def test_it_is_the_textbook_s_error_feedback() -> None:
    """oracle: GPTQ by the Cholesky factor of the inverse of the products, each error spread over later columns."""
    x, weight = some_inputs(), some_weights()
    products = x.T @ x
    products += 0.01 * products.diagonal().mean() * torch.eye(128)
    factor = torch.linalg.cholesky(torch.linalg.inv(products.double()), upper=True)
    left, expected = weight.double(), torch.empty_like(weight)
    for start in range(0, 128, 32):
        own = factor.diagonal()[start : start + 32].float() ** -2
        scale, least = lines(left[:, start : start + 32].float(), own / own.mean())
        for j in range(start, start + 32):
            expected[:, j] = ((left[:, j] - least) / scale).round().clamp(0, 15).float() * scale + least
            left[:, j:] -= ((left[:, j] - expected[:, j]) / factor[j, j])[:, None] * factor[j, j:]
    found, _ = in_order(weight.T.contiguous(), products)
    assert (found.T == expected).double().mean() > 0.95  # fp32 falls to the other side now and then


def test_every_further_sweep_comes_nearer() -> None:
    x, weight = some_inputs(), some_weights()
    products = x.T @ x + torch.eye(128)
    rounded, grids = in_order(weight.T.contiguous(), products)
    costs = [cost(weight - rounded.T, products).sum()]
    for _ in range(3):
        look_again(weight.T.contiguous(), products, rounded, grids)
        costs.append(cost(weight - rounded.T, products).sum())
    assert costs == sorted(costs, reverse=True) and costs[1] < 0.97 * costs[0]


def test_few_or_no_inputs_are_enough() -> None:
    """Fewer than columns, so that their products have no root; and none, as of an expert that nobody chose."""
    x, weight = some_inputs(20), some_weights()
    rounded = feed_back(weight, x.T @ x)
    assert cost(weight - rounded, x.T @ x).sum() < cost(weight - round_alone(weight), x.T @ x).sum()
    assert torch.equal(feed_back(weight, torch.zeros(128, 128)), round_alone(weight))


def test_without_a_compiler_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = some_inputs(), some_weights()
    fast = feed_back(weight, x.T @ x)
    monkeypatch.setattr(feedback, "compiler", lambda: None)
    assert torch.equal(feed_back(weight, x.T @ x), fast)


# ---- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2], ids=["one expert", "two experts"])
def plain(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    """A small network that sees and draws."""
    return written(tmp_path_factory.mktemp("plain") / "model", request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("small") / "model", 1)


def written(folder: Path, experts: int) -> Path:
    processor = documents.processor(tower=True)
    save(folder, documents.model(processor, wide=True, experts=experts), processor, meta={"step": 7})
    return folder


def some_documents(processor: Processor, first: int) -> list[Batch]:
    kinds = cycle([TEXT[first:], "where is the red ball", "two three"])
    samples = [
        documents.Sample((documents.Text(text=next(kinds)), picture(i)), f"{i}", "x") for i in range(first, first + 12)
    ]
    return [pack([processor.encode(s, np.random.default_rng(0)) for s in samples[i : i + 3]]) for i in range(0, 12, 3)]


def picture(seed: int) -> documents.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return documents.Image(pixels=pixels, role=documents.Role.NONE)


def test_layers_lie_on_the_grid_and_all_else_is_as_it_was(plain: Path, tmp_path: Path) -> None:
    before, folder = load(plain), tmp_path / "fed"
    count = calibrate(plain, folder, some_documents(before.processor, 0))
    after = load(folder)
    inner = {id(m.weight) for layer in after.model.layers for sets in steps(layer) for s in sets for m in s}
    assert count == sum(p.numel() for p in after.model.parameters() if id(p) in inner) > 0
    for (name, was), now in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        if id(now) in inner:
            assert torch.equal(round_alone(now), now) and not torch.equal(was, now), name
        else:
            assert torch.equal(was, now), name
    assert after.meta["step"] == 7 and after.meta["rounded"]["weights"] == count


def test_bfloat16_keeps_the_grid_but_for_its_own_rounding(small: Path, tmp_path: Path) -> None:
    read = some_documents(load(small).processor, 0)
    for dtype in (torch.float32, torch.bfloat16):
        calibrate(small, tmp_path / str(dtype), read, dtype=dtype)
    exact, half = (load(tmp_path / str(dtype)).model for dtype in (torch.float32, torch.bfloat16))
    for layer, other in zip(exact.layers, half.layers, strict=True):
        for was, now in zip(matrices(layer), matrices(other), strict=True):
            assert (round_alone(now) - was).norm() < 2**-8 * was.norm()


def matrices(layer: torch.nn.Module) -> list[Tensor]:
    return [m.weight.detach() for sets in steps(layer) for s in sets for m in s]


def test_what_the_network_says_changes_less_than_by_weights_rounded_alone(plain: Path, tmp_path: Path) -> None:
    """On documents that were read."""
    before = load(plain)
    read = some_documents(before.processor, 0)
    calibrate(plain, tmp_path / "fed", read)
    fed, alone = load(tmp_path / "fed").model, load(plain).model
    for layer in alone.layers:
        for matrix in (m for sets in steps(layer) for s in sets for m in s):
            matrix.weight.data = round_alone(matrix.weight.detach())
    with torch.inference_mode():
        off = [sum(float((m(b) - before.model(b)).square().sum()) for b in read) for m in (fed, alone)]
    assert off[0] < 0.8 * off[1]


def test_each_matrix_is_shown_what_it_reads(plain: Path) -> None:
    """Through a network that is whole: the products of a matrix's inputs, over all documents."""
    loaded = load(plain)
    model = loaded.model.requires_grad_(False)
    read = some_documents(loaded.processor, 0)
    with torch.inference_mode():
        readings = [Reading(b, s := model.see(b), model.embed(b, s)) for b in read]
        down = [sets[0] for sets in list(steps(model.layers[1]))[3]]
        found = inputs_of(model, readings, down)
        seen: list[Tensor] = []
        handle = down[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        for batch in read:
            model(batch)
        handle.remove()
    rows = torch.cat(seen)
    assert len(rows) and torch.allclose(found[0], rows.T @ rows, rtol=1e-4, atol=1e-4)


KILLED = """
import os, signal, sys
from pathlib import Path
from litchi.model.calibrate import batches, calibrate, text_windows
from litchi.model.weights import load_processor
plain, folder, text = map(Path, sys.argv[1:])
documents = batches(text_windows(text, load_processor(plain / "processor"), 600), 600)
calibrate(plain, folder, documents, told=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_kill_in_the_middle_leaves_nothing_half(small: Path, tmp_path: Path, monkeypatch) -> None:
    """What was at the destination is still there, and the same command goes on behind the layer that was done."""
    text, folder = tmp_path / "text", tmp_path / "fed"
    text.write_text(f"{TEXT}\n" * 300)
    words = ["convert", str(small), str(folder), "--calibrate", str(text), "--tokens", "600", "--dtype", "float32"]
    assert main(words) == 0
    whole = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    command = [sys.executable, "-c", KILLED, str(small), str(folder), str(text)]
    killed = subprocess.run(command, capture_output=True, timeout=600, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == whole
    assert {p.name for p in tmp_path.iterdir()} == {"text", "fed", ".fed.writing", ".fed.halfway"}
    done = []
    real = calibration.round_layer
    monkeypatch.setattr(calibration, "round_layer", lambda *given: done.append(given) or real(*given))
    assert main(words) == 0
    assert len(done) == 1  # of two layers
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == whole
    assert {p.name for p in tmp_path.iterdir()} == {"text", "fed"}


def test_a_draft_of_other_documents_is_thrown_away(small: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    loaded, folder = load(small), tmp_path / "fed"
    with pytest.raises(KeyboardInterrupt):
        calibrate(small, folder, some_documents(loaded.processor, 0), told=stop)
    assert not folder.exists()
    told: list[int] = []
    calibrate(small, folder, some_documents(loaded.processor, 12), told=lambda: told.append(1))
    calibrate(small, tmp_path / "straight", some_documents(loaded.processor, 12))
    assert len(told) == 2
    found = [(f / "model" / "model.safetensors").read_bytes() for f in (folder, tmp_path / "straight")]
    assert found[0] == found[1]


def test_a_run_is_shown_its_training_and_never_its_test_split(small: Path, tmp_path: Path) -> None:
    """Whose shards are not even there."""
    pytest.importorskip("minigrid", reason="pip install 'litchi[rooms]'")
    make_data(DataConfig(train={"talk": 6}, test={"talk": 2}, workers=1), tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test")
    loaded, run = load(small), replace(tiny.run(), mixture={"talk": 1.0})
    save(tmp_path / "own", loaded.model, loaded.processor, meta={}, run=to_json(run))
    words = ["convert", str(tmp_path / "own"), str(tmp_path / "fed"), "--calibrate", str(tmp_path / "data")]
    assert main([*words, "--tokens", "200"]) == 0
    told = load(tmp_path / "fed").meta["rounded"]
    assert told["tokens"] >= 200 and (tmp_path / "fed" / "run.json").read_text() == to_json(run)


def test_bad_input_is_refused_with_the_mend(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, broken = tmp_path / "short", tmp_path / "broken"
    short.write_text("the red ball")
    broken.write_bytes(b"\xff\xfe" * 9000)
    (tmp_path / "empty").mkdir()
    for path, more, expected in (
        (short, [], "name a text of at least"),
        (broken, [], "name a file of plain text"),
        (tmp_path / "nowhere", [], "name a file of plain text"),
        (tmp_path / "empty", [], "name a text file instead"),
        (short, ["--to", "huggingface"], "leave --to and --as out"),
        (short, ["--tokens", "0"], "name how many are read"),
    ):
        words = ["convert", str(small), str(tmp_path / "fed"), "--calibrate", str(path), *more]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and expected in said and said.count("\n") == 1, said
        assert not (tmp_path / "fed").exists()
    assert main(["convert", str(short), str(tmp_path / "fed"), "--calibrate", str(short)]) == 2
    assert "convert it first" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(small: Path, tmp_path: Path) -> None:
    loaded = load(small)
    model: Model = loaded.model
    with torch.no_grad():
        model.get_parameter("layers.1.experts.0.mlp.down_proj.weight")[3, 4] = torch.nan
    save(tmp_path / "damaged", model, loaded.processor, meta={})
    with pytest.raises(BadInput, match="holds NaN or infinity"):
        calibrate(tmp_path / "damaged", tmp_path / "fed", some_documents(loaded.processor, 0))
    assert not (tmp_path / "fed").exists()


def test_no_more_is_read_than_was_asked_for(small: Path, tmp_path: Path) -> None:
    text, processor = tmp_path / "text", load(small).processor
    text.write_text(f"{TEXT}\n" * 600)
    found = list(batches(text_windows(text, processor, 1500), 1500))
    assert [len(b) for b in found] == [512, 512]
    assert all(len(b) <= 512 for b in batches(text_windows(text, processor, 5000), 5000))
