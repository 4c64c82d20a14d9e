"""Requests with different adapters are answered in the same steps, each to the bit as if it were alone; and through the
door an adapter is a model of its own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import torch

from litchi.cli import find_checkpoint, main
from litchi.config import BadInput
from litchi.model import exact
from litchi.model.adapters import Adapter, read_adapter
from litchi.model.compiled import compiler
from litchi.model.generate import Generator, whole
from litchi.model.lowrank import Adapters
from litchi.model.network import Model
from litchi.model.packing import Format
from litchi.model.weights import load
from litchi.schema.digest import digest
from litchi.schema.processor import Processor
from litchi.schema.request import Completion, Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve import pipe
from litchi.serve.engine import Engine
from litchi.serve.loading import load_engine
from litchi.serve.receipts import Origin
from litchi.serve.run import ServeConfig
from litchi.serve.runner import NativeRunner
from litchi.serve.scheduler import EngineConfig
from tests.laws.documents import WORDS, model, processor
from tests.model.lora_folders import lora_folder
from tests.serve.test_engine import Alone, Answer, play, request, same

NAMES = ("", "one", "two")
SCHEDULES = 6


def drawn(net: Model, name: str, **said: object) -> Adapter:
    with TemporaryDirectory() as folder:
        return read_adapter(lora_folder(Path(folder), net, **said), name, net)


@lru_cache
def network() -> tuple[Processor, Model, Adapters]:
    p = processor()
    net = exact.apply(model(p, wide=True))
    return p, net, shelf(net)


def shelf(net: Model, seed: int = 0) -> Adapters:
    one = drawn(net, "one", rank=3, seed=seed)
    return Adapters(net, [one, drawn(net, "two", rank=16, seed=1, targets=("q_proj", "v_proj", "down_proj"))])


def settings(rng: random.Random, **more: object) -> EngineConfig:
    return EngineConfig(
        max_running=rng.choice((4, 6, 16)),
        step_tokens=rng.choice((1, 5, 17, 64, 512)),
        page=rng.choice((32, 64)),
        cache_tokens=rng.choice((128, 128, 128, 2048)),
        remember=rng.random() < 0.8,
        **more,
    )


def requests_of(rng: random.Random) -> list[Request]:
    """Of any want, and often the same but for the adapter."""
    first = [request(rng, "mask") for _ in range(rng.randrange(4, 9))]
    found = [replace(asked, adapter=rng.choice(NAMES)) for asked in (*first, *first)]
    rng.shuffle(found)
    return found


def name_of(asked: Request) -> str:
    return asked.adapter + digest(asked)


def say(engine: Engine, asked: Request) -> Completion:
    answer = Answer()
    engine.submit(asked, answer.take)
    while engine.step():
        pass
    return whole(answer.deltas)


# ---- the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_schedule_and_no_neighbours_adapter_changes_an_answer(dtype: Format) -> None:
    """The oracle has no engine, no pages and one adapter at a time, for the whole network."""
    p, net, adapters = network()
    alone = deepcopy(model(p, wide=True))
    oracle = Generator(exact.apply(alone), p, cached=False, dtype=getattr(torch, dtype), adapters=shelf(alone))
    bare = Generator(exact.apply(model(p, wide=True)), p, cached=False, dtype=getattr(torch, dtype))
    expected: dict[str, Completion] = {}
    gave_way = recalled = 0
    for seed in range(SCHEDULES):
        rng = random.Random(f"adapters{seed}")
        asked = requests_of(rng)
        engine = Engine(net, p, settings(rng, path="torch", weights=dtype), adapters=adapters)
        for each, answer in zip(asked, play(engine, asked, rng), strict=True):
            assert answer.error is None, answer.error
            if answer.deltas and answer.deltas[-1].finish:
                if name_of(each) not in expected:
                    expected[name_of(each)] = (oracle if each.adapter else bare).complete(each)
                assert same(whole(answer.deltas), expected[name_of(each)]), (seed, each)
        assert engine.pages.num_free == len(engine.pages.readers) - 1
        gave_way, recalled = gave_way + engine.preempted, recalled + engine.tokens_cached
    assert gave_way and recalled


@pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4", "w4a8"])
def test_nor_does_one_on_the_native_path(weights: Format) -> None:
    p, net, adapters = network()
    kind = torch.float32 if weights == "float32" else torch.bfloat16
    runner = NativeRunner(net, kind, weights, adapters=adapters)
    oracle, bare = (Alone(net, p, weights, made) for made in (runner, NativeRunner(net, kind, weights)))
    oracle.adapters, expected, gave_way = adapters, {}, 0
    for seed in range(SCHEDULES):
        rng = random.Random(f"{weights}adapters{seed}")
        asked = requests_of(rng)
        engine = Engine(net, p, settings(rng, path="native", weights=weights), runner=runner, adapters=adapters)
        for each, answer in zip(asked, play(engine, asked, rng), strict=True):
            assert answer.error is None, answer.error
            if answer.deltas and answer.deltas[-1].finish:
                if name_of(each) not in expected:
                    expected[name_of(each)] = (oracle if each.adapter else bare).complete(each)
                assert same(whole(answer.deltas), expected[name_of(each)]), (seed, each)
        gave_way += engine.preempted
    assert gave_way


@pytest.mark.parametrize(
    "path", ["torch", pytest.param("native", marks=pytest.mark.skipif(not compiler(), reason="g++"))]
)
def test_both_paths_say_what_the_merged_network_says(path: str) -> None:
    """In float32, but for the order of sums: the likelihoods of a prompt, which is read in pieces beside others."""
    p, net, adapters = network()
    merged = deepcopy(model(p, wide=True))
    for module, update in adapters.known["one"].updates.items():
        merged.get_submodule(module).weight.data += update.up @ update.down
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    asked = Request(parts=(Text(text=" ".join(WORDS), role=Role.USER),), params=params, want="text")
    engine = Engine(net, p, EngineConfig(path=path, weights="float32", step_tokens=16), adapters=adapters)
    answers = [Answer() for _ in NAMES]
    for name, answer in zip(NAMES, answers, strict=True):
        engine.submit(replace(asked, adapter=name), answer.take)
    while engine.step():
        pass
    said = {name: worth(whole(answer.deltas)) for name, answer in zip(NAMES, answers, strict=True)}
    expected = worth(Generator(merged, p).complete(asked))
    torch.testing.assert_close(said["one"], expected, atol=1e-4, rtol=1e-4)
    assert all((said[name] - expected).abs().max() > 0.01 for name in ("", "two"))


def worth(said: Completion) -> torch.Tensor:
    return torch.tensor([each.logprob for each in said.prompt[1:]])


def test_what_was_read_with_one_adapter_is_not_found_by_another() -> None:
    p, net, adapters = network()
    asked = Request(parts=(Text(text=" ".join(WORDS * 2), role=Role.USER),), params=SamplingParams(max_tokens=2))
    engine = Engine(net, p, EngineConfig(path="torch", page=8), weights="w", adapters=adapters)
    for name, found in (("", False), ("one", False), ("two", False), ("one", True), ("", True)):
        before = engine.tokens_cached
        say(engine, replace(asked, adapter=name))
        assert bool(engine.tokens_cached > before) == found, name
    engine.adapters = shelf(net, seed=7)  # another content under the same name
    before = engine.tokens_cached
    say(engine, replace(asked, adapter="one"))
    assert engine.tokens_cached == before


def test_an_adapter_that_is_not_here_is_refused() -> None:
    p, net, adapters = network()
    asked = Request(parts=(Text(text="where", role=Role.USER),), adapter="tow")
    for sampler in (
        Engine(net, p, EngineConfig(path="torch"), adapters=adapters),
        Generator(net, p, adapters=adapters),
    ):
        with pytest.raises(BadInput, match="no adapter 'tow' here: did you mean 'two'"):
            list(sampler.stream(asked))


def test_whether_this_machine_keeps_the_promise_is_looked_at_with_adapters_too(monkeypatch) -> None:
    p, net, adapters = network()
    engine = Engine(net, p, EngineConfig(path="torch", cache_tokens=512), weights="w", adapters=adapters).look()
    assert engine.mode == "exact" and engine.origin is not None and set(engine.origin.adapters) == {"one", "two"}
    run = engine.runner.run

    def careless(pieces, pages):
        odd = [len(pieces) > 1 and piece.adapter == "two" for piece in pieces]
        return [x + x.abs().max() * 2**-6 if o else x for x, o in zip(run(pieces, pages), odd, strict=True)]

    monkeypatch.setattr(engine.runner, "run", careless)
    assert "a hidden state read as one of 13 beside others with 'two'" in engine.look().mode


def test_a_worker_is_told_the_adapter_and_tells_what_it_has() -> None:
    asked, origin = Request(parts=(), adapter="poet"), Origin("w", "r", "t", {"poet": "d", "lawyer": "e"})
    assert pipe.read(json.loads(json.dumps(pipe.written(asked))), Request) == asked
    assert Origin(**json.loads(json.dumps(asdict(origin)))) == origin
    assert origin.of([asked]).differs(Origin("w", "r", "t", {"poet": "d"})) == []
    assert origin.of([asked]).differs(Origin("w", "r", "t")) == ["adapter poet d, not there"]


def test_a_request_without_an_adapter_has_the_digest_that_it_had() -> None:
    asked = Request(parts=())
    assert digest(asked) != digest(replace(asked, adapter="x"))
    assert digest(asked) == "27c1f9428b845b45f74978a1e407739d56da53b9323a9586348eced2ca04a848"


# ---- through the door ---------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "where is the red ball"}], "max_tokens": 12}
ASKED = {
    "chat/completions": CHAT,
    "completions": {"prompt": "where is the red ball", "max_tokens": 12},
    "responses": {"input": "where is the red ball", "max_output_tokens": 12},
    "embeddings": {"input": "where is the red ball"},
}


@pytest.fixture(scope="module")
def poets(tmp_path_factory) -> list[str]:
    """Settings of two adapters of the shipped model."""
    net, root = load(find_checkpoint("tiny"), check=False).model, tmp_path_factory.mktemp("adapters")
    lora_folder(root / "one", net, rank=3)
    lora_folder(root / "two", net, rank=8, seed=1, targets=("q_proj", "up_proj"))
    return [f"poet={root / 'one'}", f"lawyer={root / 'two'}"]


def engine_of(settings: list[str]) -> Engine:
    return load_engine(find_checkpoint("tiny"), ServeConfig(adapters=tuple(settings)))


@pytest.fixture(scope="module")
def door(served_by, poets) -> Iterator[str]:
    with served_by(engine_of(poets), adapters=tuple(poets)) as served:
        yield f"{served.url}/v1"


def post(url: str, path: str, body: dict) -> dict:
    answer = httpx.post(f"{url}/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_each_adapter_is_a_model_of_its_own(door: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=door, api_key="none", max_retries=0) as client:
        told = client.models.list().data
        assert [each.id for each in told] == ["tiny", "poet", "lawyer"]
        assert [getattr(each, "parent", None) for each in told] == [None, "tiny", "tiny"]
        assert client.models.retrieve("poet").id == "poet"
        said = {}
        for name in ("tiny", "poet", "lawyer"):
            answer = client.chat.completions.create(model=name, **CHAT, logprobs=True)
            assert answer.model == name
            said[name] = answer.choices[0].logprobs.content[0].logprob
        assert len(set(said.values())) == 3
        with pytest.raises(
            openai.NotFoundError, match="no model 'bard' here; this server has 'tiny', 'poet', 'lawyer'"
        ):
            client.chat.completions.create(model="bard", **CHAT)


@pytest.mark.parametrize("path", ASKED)
def test_every_endpoint_takes_one_and_tells_it(door: str, path: str) -> None:
    bare = post(door, path, ASKED[path])
    assert bare["model"] == "tiny"
    told = [post(door, path, ASKED[path] | {"model": name}) for name in ("tiny", "poet", "lawyer")]
    assert [each["model"] for each in told] == ["tiny", "poet", "lawyer"]
    if path == "embeddings":
        vectors = [tuple(each["data"][0]["embedding"]) for each in (bare, *told)]
        assert vectors[0] == vectors[1] and len(set(vectors)) == 3
    assert httpx.post(f"{door}/{path}", json=ASKED[path] | {"model": "bard"}).status_code == 404
    receipt = httpx.get(f"{door}/receipts/{told[1]['id']}").json()
    assert receipt["model"] == "poet" and list(receipt["origin"]["adapters"]) == ["poet"]
    assert receipt["requests"][0]["adapter"] == "poet"


def test_a_stream_names_it_as_well(door: str) -> None:
    for path in ("chat/completions", "responses"):
        said = httpx.post(f"{door}/{path}", json=ASKED[path] | {"model": "poet", "stream": True}, timeout=60).text
        lines = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
        told = {each.get("response", each).get("model") for each in lines}
        assert told - {None} == {"poet"}
    ids = httpx.post(f"{door.removesuffix('/v1')}/tokenize", json={"model": "poet", "prompt": "a ball"}).json()[
        "tokens"
    ]
    assert ids


def test_a_client_of_ours_names_it_too(door: str) -> None:
    from litchi.client import HttpSampler

    params = SamplingParams(max_tokens=4, logprobs=True)
    asked = Request(parts=(Text(text="where is the red ball", role=Role.USER),), params=params)
    sampler = HttpSampler(door)
    bare, poet = (sampler.complete(replace(asked, adapter=name)) for name in ("", "poet"))
    assert bare.logprobs != poet.logprobs


def test_a_receipt_is_replayed_with_its_adapter_and_with_no_other(served_by, poets, tmp_path: Path) -> None:
    kept, net = str(tmp_path / "receipts.jsonl"), load(find_checkpoint("tiny"), check=False).model
    hot = CHAT | {"temperature": 1.0, "logprobs": True}
    with served_by(engine_of(poets[:1]), adapters=tuple(poets[:1]), receipts=kept) as served:
        bare, poet = (post(f"{served.url}/v1", "chat/completions", hot | {"model": n})["id"] for n in ("tiny", "poet"))
    other = [f"poet={lora_folder(tmp_path / 'other', net, rank=3, seed=9)}"]
    for settings, status in ((poets, 200), (other, 409), ([], 409)):
        with served_by(engine_of(settings), adapters=tuple(settings), receipts=kept) as served:
            assert post(f"{served.url}/v1", f"receipts/{bare}/replay", {})["same"]
            again = httpx.post(f"{served.url}/v1/receipts/{poet}/replay", timeout=60)
            assert again.status_code == status, again.text
            assert again.json()["same"] if status == 200 else "adapter poet" in again.json()["error"]["message"]


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("poet", "is not NAME=FOLDER"),
        ("=runs/poet", "is not NAME=FOLDER"),
        ("a/b=runs/poet", "no slash"),
        ("tiny=runs/poet", "the name 'tiny' is taken"),
        ("poet=a,poet=b", "the name 'poet' is taken"),
        ("poet=runs/nowhere", "adapter_config.json is missing"),
    ],
)
def test_a_setting_that_names_no_adapter_ends_the_command_in_one_line(capsys, setting: str, fault: str) -> None:
    assert main(["serve", "tiny", "--set", f"serve.adapters={setting}"]) == 2
    assert fault in capsys.readouterr().err
