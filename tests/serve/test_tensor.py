"""Two ranks answer as one engine that is exact: alone or beside others, and a rank that dies is a worker that dies."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from litchi.cli import find_checkpoint
from litchi.config import BadInput
from litchi.model.weights import load
from litchi.schema.digest import bits
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Action, Image, Role, Text
from litchi.serve.engine import Engine
from litchi.serve.fleet import Fleet
from litchi.serve.loading import load_answerer, load_engine
from litchi.serve.run import ServeConfig
from litchi.serve.scheduler import EngineConfig
from tests.model.lora_folders import lora_folder
from tests.serve.test_fleet import Heard, kill  # noqa: F401 (fixture)

ADAPTERS = ("", "poet", "lawyer")
CONFIG = ServeConfig(workers=1, tensor=2, engine=EngineConfig(path="torch", weights="float32", cache_tokens=4096))


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> tuple[str, ...]:
    """One adapter of every matrix, and one of some that are shared out by rows and some that are by columns."""
    root, net = tmp_path_factory.mktemp("adapters"), load(find_checkpoint("tiny"), check=False).model
    lora_folder(root / "poet", net, rank=3)
    lora_folder(root / "lawyer", net, rank=8, seed=1, targets=("q_proj", "down_proj"))
    return f"poet={root / 'poet'}", f"lawyer={root / 'lawyer'}"


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def pair(request: pytest.FixtureRequest, settings) -> Iterator[Fleet]:
    engine = replace(CONFIG.engine, weights=request.param)
    fleet = Fleet(find_checkpoint("tiny"), replace(CONFIG, engine=engine, adapters=settings)).start()
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def alone(settings) -> Iterator[Engine]:
    engine = load_engine(find_checkpoint("tiny"), replace(CONFIG, tensor=1, adapters=settings)).start()
    yield engine
    engine.close()


def requests() -> list[Request]:
    """Words with each adapter, a picture, the next frame, an action, and an embedding."""
    rng = random.Random(0)
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    room = Image(pixels=noise.numpy())
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, logprobs=True, ignore_eos=True)
    asked = Text(text="where is the red ball", role=Role.USER)
    spoken = [
        Request(
            parts=(asked,), want="text", params=replace(params, seed=rng.randrange(99), prompt_logprobs=1), adapter=name
        )
        for name in (*ADAPTERS, *ADAPTERS)
    ]
    return [
        *spoken,
        Request(parts=(Text(text="a room with a green key", role=Role.USER),), want="image", params=params),
        Request(parts=(room, Action.discrete(2, "minigrid")), want="frame", space="minigrid", params=params),
        Request(parts=(asked, room), want="action", space="minigrid", params=params),
        Request(parts=(asked,), want="embed"),
    ]


def test_answers_of_two_ranks_are_exact_and_near_those_of_one(pair: Fleet, alone: Engine) -> None:
    assert pair.mode == "exact" and pair.origin is not None and "over 2 ranks" in pair.origin.runner
    single = [pair.complete(request) for request in requests()]
    together = [Heard() for _ in requests()]
    for request, each in zip(requests(), together, strict=True):
        pair.submit(request, each, stream=False)
    for one, each, request in zip(single, together, requests(), strict=True):
        [found] = each.wait()
        assert each.error is None and bits(found) == bits(one)
        mine = alone.complete(request)
        near = 1e-4 if pair.config.engine.weights == "float32" else 0.3
        if request.want == "embed":
            assert torch.allclose(torch.tensor(one.vector), torch.tensor(mine.vector), atol=near)
        elif request.want == "text":
            worth, own = ([scored.logprob for scored in told.prompt[1:]] for told in (one, mine))
            assert torch.allclose(torch.tensor(worth), torch.tensor(own), atol=near)
    said = {tuple(scored.logprob for scored in one.prompt[1:]) for one in single[: len(ADAPTERS)]}
    assert len(said) == len(ADAPTERS), "each adapter has a say"


@pytest.mark.parametrize("pair", ["float32"], indirect=True)
def test_a_rank_that_is_killed_ends_its_worker_and_another_pair_goes_on(pair: Fleet, kill: Callable) -> None:  # noqa: F811
    """It is killed by the fourth piece of an answer, and what its worker had said beyond that is lost."""
    request = replace(requests()[0], params=SamplingParams(max_tokens=120, ignore_eos=True, logprobs=True))
    whole = pair.complete(request)
    [member] = pair.members
    told = subprocess.run(["pgrep", "-P", str(member.process.pid)], capture_output=True, text=True, check=True)
    [rank] = [int(word) for word in told.stdout.split()]

    def murder() -> None:
        if len(heard.pieces) == 4:
            kill(member, rank)

    heard = Heard(murder)
    ask = pair.submit(request, heard, stream=True)
    heard.wait()
    assert heard.error is None and ask.deaths == 1
    assert "".join(piece.text for piece in heard.pieces) == whole.text


def test_a_step_that_fails_on_one_rank_is_nobodys_answer() -> None:
    """A connection that broke may be heard of before the death of the rank at its other end."""
    program = """
from litchi.serve.tensor import one_fate
try:
    with one_fate():
        raise RuntimeError("Connection closed by peer")
finally:
    print("somebody heard of it")
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (1, ""), answer.stderr


def test_what_does_not_divide_is_refused() -> None:
    """Every rank finds it, and the first must live to say so."""
    with pytest.raises(BadInput, match="over 3 ranks"):
        Fleet(find_checkpoint("tiny"), replace(CONFIG, tensor=3)).start()
    for wrong in ({"tensor": 0}, {"workers": -1}):
        with pytest.raises(BadInput, match="or more"):
            load_answerer(find_checkpoint("tiny"), replace(CONFIG, **wrong))
    with pytest.raises(BadInput, match="path in PyTorch"):
        load_engine(find_checkpoint("tiny"), replace(CONFIG, engine=EngineConfig(weights="int8")))
