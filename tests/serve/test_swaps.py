"""Other weights behind the same door: no answer is of both, none is lost, and nobody swaps who may not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from litchi.cli import find_checkpoint
from litchi.config import BadInput
from litchi.model.weights import load, save
from litchi.serve.loading import load_engine
from litchi.serve.run import ServeConfig
from litchi.serve.scheduler import EngineConfig
from litchi.serve.settings import check
from tests.serve.test_engine_faults import Gate, until

ENGINE = EngineConfig(path="torch", weights="float32", cache_tokens=4096)
KEY = {"Authorization": "Bearer k"}
BODY = {"model": "tiny", "prompt": "where is the red ball", "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str, str]:
    """The shipped checkpoint, the same network with other weights, and one that has other words."""
    place, tiny = tmp_path_factory.mktemp("weights"), load(find_checkpoint("tiny"))
    with torch.no_grad():
        for weight in tiny.model.parameters():
            weight.mul_(1.1)
    save(place / "other", tiny.model, tiny.processor, meta={})
    tiny.processor.tokenizer.backend.add_tokens(["another"])
    save(place / "words", tiny.model, tiny.processor, meta={})
    return str(find_checkpoint("tiny")), str(place / "other"), str(place / "words")


def say(url: str, **more: object) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=BODY | more, headers=KEY, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def swap(url: str, folder: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/weights", json={"checkpoint": folder}, headers=KEY, timeout=120)


@pytest.fixture
def door(served_by, folders) -> Callable:
    """`with door() as (served, engine):` a server on the shipped checkpoint that may swap."""

    def one(**settings: object):
        config = ServeConfig(engine=ENGINE)
        engine = load_engine(Path(folders[0]), config)
        known = {"engine": ENGINE, "api_key": "k", "checkpoints": folders}
        return served_by(engine, **known | settings)

    return one


def test_answers_under_way_end_on_the_old_weights_and_later_ones_begin_on_the_new(door, folders) -> None:
    with door() as served, ThreadPoolExecutor(8) as pool:
        old = say(served.url)
        gate = Gate(served.sampler)
        gate.open.clear()
        asked = [pool.submit(say, served.url) for _ in range(4)]
        until(lambda: served.sampler.load().running + served.sampler.load().waiting == 4)
        gate.let(2)  # which ends no answer
        until(lambda: served.sampler.load().running == 4 and gate.held)
        changed = swap(served.url, folders[1])
        assert changed.status_code == 200, changed.text
        assert served.sampler.load().running, "the answers were over before the swap"
        gate.open.set()
        fresh = [pool.submit(say, served.url) for _ in range(3)]
        new = {each.result() for each in fresh}
        assert {each.result() for each in asked} == {old} and len(new) == 1 and new != {old}
        until(lambda: not served.sampler.alive)  # and who answered before is closed
        state = httpx.get(f"{served.url}/v1/weights", headers=KEY).json()
        assert state["checkpoint"] == folders[1] and state["digest"] == changed.json()["digest"]
        back = swap(served.url, folders[0])
        assert back.json()["digest"] != changed.json()["digest"] and say(served.url) == old


def test_a_receipt_names_the_weights_that_answered_and_is_not_replayed_by_others(door, folders) -> None:
    with door() as served:
        answer = httpx.post(f"{served.url}/v1/completions", json=BODY, headers=KEY, timeout=120).json()
        receipt = f"{served.url}/v1/receipts/{answer['id']}"
        assert httpx.post(f"{receipt}/replay", headers=KEY, timeout=120).json()["same"]
        before = httpx.get(receipt, headers=KEY).json()["origin"]["weights"]
        digest = swap(served.url, folders[1]).json()["digest"]
        assert digest != before and httpx.post(f"{receipt}/replay", headers=KEY, timeout=120).status_code == 409


def test_strangers_swap_nothing(door, folders, tmp_path: Path) -> None:
    with door() as served:
        body = {"checkpoint": folders[1]}
        assert httpx.post(f"{served.url}/v1/weights", json=body).status_code == 401
        for wrong in ({"checkpoint": str(tmp_path)}, {"checkpoint": "../.."}, {}, {"checkpoint": folders[1], "x": 1}):
            answer = httpx.post(f"{served.url}/v1/weights", json=wrong, headers=KEY)
            assert answer.status_code == 400, answer.text
        assert httpx.get(f"{served.url}/v1/weights", headers=KEY).json()["checkpoint"] is None
    with door(checkpoints=()) as served:
        assert swap(served.url, folders[1]).status_code == 404
    with pytest.raises(BadInput, match=r"set serve\.api_key"):
        check(ServeConfig(checkpoints=folders))


def test_weights_with_other_words_or_torn_are_refused_and_the_old_go_on(door, folders) -> None:
    with door() as served:
        old = say(served.url)
        refused = swap(served.url, folders[2])
        assert refused.status_code == 400 and "another tokenizer" in refused.text
        torn = Path(folders[1]) / "model" / "model.safetensors"
        whole = torn.read_bytes()
        torn.write_bytes(whole[:-1])
        try:
            assert swap(served.url, folders[1]).status_code == 400
        finally:
            torn.write_bytes(whole)
        assert say(served.url) == old
