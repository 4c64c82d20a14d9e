"""The door is invisible: a request answered over HTTP is answered as the sampler behind the door answers it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from litchi.client import HttpSampler, ServerError
from litchi.config import BadInput
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Action, Image, Role, Text
from litchi.serve import run

BLUE = Image(pixels=np.full((64, 64, 3), (3, 0, 250), np.uint8), role=Role.USER)


def chat(text: str, **more: object) -> Request:
    return Request(parts=(BLUE, Text(text=text, role=Role.USER)), params=SamplingParams(**more))


REQUESTS = {
    "chat": chat("What is it?"),
    "logprobs": chat("What is it?", logprobs=True),
    "turns": Request(parts=(*chat("a").parts, Text(text="b", role=Role.ASSISTANT), Text(text="c", role=Role.USER))),
    "stop": chat("What is it?", stop=("turn",), max_tokens=9),
    "draws": chat("draw something green", seed=4),
    "image": Request(parts=(Text(text="a red room", role=Role.USER),), want="image", params=SamplingParams(seed=9)),
    "frame": Request(parts=(BLUE, Action.discrete(2, "minigrid")), want="frame"),
    "action": Request(parts=(Text(text="go there", role=Role.USER), BLUE), want="action", space="minigrid"),
}


@pytest.fixture
def remote(door) -> HttpSampler:
    return HttpSampler(door.url)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_door_is_invisible(remote, door, name):
    request = REQUESTS[name]
    here, there = door.sampler.complete(request), remote.complete(request)
    assert there.text == here.text and there.finish == here.finish and there.tokens == here.tokens
    assert len(there.parts) == len(here.parts)
    for mine, other in zip(here.parts, there.parts, strict=True):
        assert type(mine) is type(other)
        field = {"Image": "pixels", "Action": "values"}[type(mine).__name__]
        assert np.array_equal(getattr(mine, field), getattr(other, field))
    if request.params.logprobs:
        assert there.logprobs == here.logprobs
    else:
        assert there.prompt_tokens == here.prompt_tokens


@pytest.mark.parametrize("name", REQUESTS)
def test_streams_add_up_to_the_whole(remote, name):
    whole, deltas = remote.complete(REQUESTS[name]), list(remote.stream(REQUESTS[name]))
    assert "".join(d.text for d in deltas) == whole.text
    assert tuple(t for d in deltas for t in d.tokens) == whole.tokens
    assert deltas[-1].finish == whole.finish
    assert sum(d.part is not None for d in deltas) == len(whole.parts)


def test_refusals_keep_their_words(remote):
    with pytest.raises(BadInput, match="drop the oldest"):
        remote.complete(chat("too long"))
    with pytest.raises(BadInput, match="drop the oldest"):
        list(remote.stream(chat("too long")))
    with pytest.raises(ServerError, match="HTTP 500"):
        remote.complete(chat("explode"))
    with pytest.raises(BadInput, match="base_url"):
        HttpSampler("127.0.0.1:8000")


def test_dropping_a_stream_stops_the_server(serve, painter):
    slow = painter(pause=0.01)
    with serve(slow) as served:
        deltas = HttpSampler(served.url).stream(chat("forever", max_tokens=1024))
        next(deltas)
        deltas.close()
        assert slow.closed.wait(30) and slow.made < 1000


def test_the_client_needs_no_torch():
    check = "import sys, litchi.client; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_whoever_reads_the_address_of_a_server_may_come_at_once(painter, monkeypatch):
    """He waits until it is up, and is not refused."""
    came: list[str] = []

    def said(text: str, **more: object) -> None:
        for host, port in re.findall(r"Page: http://([\d.]+):(\d+)/", text):
            socket.create_connection((host, int(port)), timeout=30).close()
            came.append(host)

    monkeypatch.setattr(run, "print", said, raising=False)
    monkeypatch.setattr(run, "Darkroom", lambda pixels: SimpleNamespace(warm=lambda: None))
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: [each.close() for each in sockets])
    run.run(run.ServeConfig(port=0), painter(), lambda name, seed: None)
    assert came == ["127.0.0.1"]
