"""A server looks whether this machine keeps the promise, and does not keep quiet if it does not."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
import torch
import torch.nn.functional as F

from litchi.cli import find_checkpoint
from litchi.model import exact
from litchi.model.compiled import compiler
from litchi.serve.engine import Engine
from litchi.serve.loading import load_engine
from litchi.serve.promise import broken
from litchi.serve.run import ServeConfig
from litchi.serve.runner import NativeRunner, Runner
from litchi.serve.scheduler import EngineConfig
from tests.laws.documents import model, processor
from tests.serve.test_engine import network


def look(engine: Engine, runner: Runner) -> str:
    return broken(runner, engine.processor, engine.model.config.vocab_size, engine.pages.size)


@pytest.mark.parametrize("page", [8, 64])
def test_the_path_in_pytorch_keeps_it_here_by_its_rules_and_not_without(monkeypatch, page: int) -> None:
    p, net = network("mask")
    engine = Engine(net, p, EngineConfig(path="torch", page=page, cache_tokens=512))
    assert look(engine, engine.runner) == ""

    def careless(mask: torch.Tensor) -> list[exact.Block]:
        """As many keys for all as the last one asks for."""
        count = len(mask)
        mask = F.pad(mask, (0, -mask.shape[1] % exact.KEYS, 0, -count % exact.QUERIES))
        mask[count:, 0] = True
        return [exact.Block(0, count, mask)]

    monkeypatch.setattr(exact, "blocks_of", careless)
    assert "attention" in look(engine, engine.runner)


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_the_path_in_c_keeps_it_here_and_a_sum_in_another_order_is_seen() -> None:
    p = processor()
    engine = Engine(model(p, wide=True), p, EngineConfig(path="native", page=64, cache_tokens=512))
    runner = engine.runner
    assert isinstance(runner, NativeRunner) and look(engine, runner) == ""
    run = runner.run

    def careless(pieces, pages):
        return [x if x is None or len(x) > 1 else x + x.abs().max() * 2**-22 for x in run(pieces, pages)]

    runner.run = careless
    assert look(engine, runner) == "a hidden state read as one of 1 beside others"


def test_a_server_that_cannot_keep_it_says_so_and_gives_no_receipts(served_by, monkeypatch) -> None:
    config = ServeConfig(engine=EngineConfig(path="torch", weights="float32", cache_tokens=2048))
    body = {"prompt": "where", "max_tokens": 2}
    for fault in ("", "a product of 3 rows"):
        with monkeypatch.context() as patch:
            patch.setattr("litchi.serve.engine.broken", lambda *_, fault=fault: fault)
            engine = load_engine(find_checkpoint("tiny"), config)
        with served_by(engine) as served:
            mode = httpx.get(f"{served.url}/health").json()["mode"]
            answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=30).json()
            receipt = httpx.get(f"{served.url}/v1/receipts/{answer['id']}")
        if fault:
            assert "not exact on this machine: a product of 3 rows" in mode and receipt.status_code == 404
        else:
            assert mode == "exact" and receipt.status_code == 200
    loose = load_engine(find_checkpoint("tiny"), replace(config, engine=replace(config.engine, exact=False)))
    assert loose.mode == "not exact: serve.engine.exact=false"
