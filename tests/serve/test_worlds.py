"""A world session steps a dream and a room under the same actions, rewinds both, and outlives every error."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

sync = pytest.importorskip("websockets.sync.client")
exceptions = pytest.importorskip("websockets.exceptions")


class Player:
    def __init__(self, url: str, **more: object):
        self.connection = sync.connect(url.replace("http", "ws") + "/v1/worlds", **more)

    def __call__(self, kind: str, **more: object) -> dict:
        self.socket.send(json.dumps({"type": kind, **more}))
        return json.loads(self.socket.recv(timeout=20))

    def raw(self, message: str | bytes) -> dict:
        self.socket.send(message)
        return json.loads(self.socket.recv(timeout=20))

    def __enter__(self) -> Player:
        self.socket = self.connection.__enter__()
        return self

    def __exit__(self, *fault: object) -> None:
        self.connection.__exit__(*fault)


def pixels(url: str) -> np.ndarray:
    return np.array(Pillow.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_dream_and_room_walk_together(door, white_tile):
    room = white_tile()
    first = room.reset(5)[0].pixels
    with Player(door.url) as play:
        frame = play("start", seed=5)
        assert frame["type"] == "frame" and frame["step"] == 0 and frame["same"] and frame["task"] == room.task
        assert np.array_equal(pixels(frame["dream"]), first) and frame["real"] == frame["dream"]
        for step, action in enumerate(["right", "right", "forward"], 1):
            frame = play("action", action=action)
            assert (frame["step"], frame["action"], frame["same"], frame["wrong_tiles"]) == (step, action, True, [])
            assert len(frame["changed_tiles"]) == 2, "the white tile left one tile and entered another"
        assert frame["ms"] >= 0 and frame["diverged_at"] is None


def test_a_rewound_world_goes_on_as_one_that_never_went_further(door):
    with Player(door.url) as play:
        play("start", seed=1)
        straight = [play("action", action=a) for a in ("right", "forward", "left")]
        play("rewind", step=1)
        again = [play("action", action=a) for a in ("forward", "left")]
        assert [f["dream"] for f in again] == [f["dream"] for f in straight[1:]]
        assert [f["real"] for f in again] == [f["real"] for f in straight[1:]]
        assert play("reset")["step"] == 0


def test_the_simulator_is_rewound_too(serve):
    with serve(drift=True) as served, Player(served.url) as play:
        play("start", seed=1)
        frames = [play("action", action="right") for _ in range(3)]
        assert [f["same"] for f in frames] == [True, True, False]
        assert frames[-1]["wrong_tiles"] == [[5, 5]] and frames[-1]["diverged_at"] == 3
        back = play("rewind", step=1)
        assert back["same"] and back["diverged_at"] is None
        assert [play("action", action="right")["same"] for _ in range(2)] == [True, False]


def test_the_model_sees_only_its_own_last_frame(serve, white_tile):
    with serve() as served, Player(served.url) as play:
        play("start", seed=2)
        play("action", action="right")
        play("action", action="right")
        asked = served.sampler.requests[-1]
        assert [type(part).__name__ for part in asked.parts] == ["Image", "Action"] and asked.want == "frame"
    with serve(context_frames=3) as served, Player(served.url) as play:
        play("start", seed=2)
        for _ in range(4):
            play("action", action="right")
        kinds = [type(part).__name__ for part in served.sampler.requests[-1].parts]
        assert kinds == ["Image", "Action"] * 3


def test_the_model_plays(door):
    with Player(door.url) as play:
        play("start", seed=3)
        frame = play("policy")
        assert frame["action"] == ("left", "right", "forward")[len("go to the red corner") % 3]
        assert play("policy", instruction="four")["action"] == "right"
        asked = door.sampler.requests[-2]
        assert asked.want == "action" and asked.parts[0].text == "four"


def test_a_reward_is_told(door):
    with Player(door.url) as play:
        play("start", seed=3)
        frames = [play("action", action="left") for _ in range(10)]
        assert [f["terminated"] for f in frames] == [False] * 8 + [True, False]
        assert frames[8]["reward"] == 1.0


def test_a_dream_can_begin_from_a_picture(door):
    out = io.BytesIO()
    Pillow.new("RGB", (32, 32), "black").save(out, "PNG")
    with Player(door.url) as play:
        frame = play("start", image="data:image/png;base64," + base64.b64encode(out.getvalue()).decode())
        assert frame["real"] is None and frame["same"] is False and pixels(frame["dream"]).shape == (64, 64, 3)
        assert play("action", action="forward")["step"] == 1
        assert "instruction" in play("policy")["message"]
        assert play("rewind", step=0)["step"] == 0


def test_errors_leave_the_session_alive(door):
    with Player(door.url) as play:
        assert "start" in play("action", action="left")["message"]
        play("start", seed=4)
        bad = [
            ("fly", {}),
            ("action", {"action": "fly"}),
            ("action", {}),
            ("action", {"action": 2}),
            ("rewind", {"step": 9}),
            ("rewind", {"step": -1}),
            ("rewind", {"step": "one"}),
            ("start", {"env": "os:system-v0"}),
            ("start", {"seed": "x"}),
            ("start", {"seed": 10**30}),
            ("start", {"image": "https://example.com/a.png"}),
            ("start", {"image": "data:image/png;base64,AAAA"}),
            ("policy", {"instruction": 7}),
        ]
        for kind, more in bad:
            answer = play(kind, **more)
            assert answer["type"] == "error" and answer["message"], (kind, more)
        for raw in ("{", "[]", "", b"\x00\xff", '{"type": NaN}'):
            assert play.raw(raw)["type"] == "error"
        assert play("action", action="right")["step"] == 1


def test_a_session_has_an_end(serve):
    with serve(max_world_steps=2, max_worlds=1) as served, Player(served.url) as play:
        play("start", seed=0)
        assert [play("action", action="left")["type"] for _ in range(3)] == ["frame", "frame", "error"]
        assert play("rewind", step=1)["step"] == 1
        with Player(served.url) as second:
            assert "too many" in json.loads(second.socket.recv(timeout=20))["message"]


def test_strangers_are_refused_at_the_handshake(serve):
    with serve(api_key="k") as served:
        stranger = {"origin": "https://evil.example", "additional_headers": {"Authorization": "Bearer k"}}
        for refused in ({}, stranger):
            with pytest.raises(exceptions.InvalidStatus), Player(served.url, **refused):
                pass
        with Player(served.url, additional_headers={"Authorization": "Bearer k"}) as play:
            assert play("start", seed=0)["step"] == 0
        with Player(served.url, subprotocols=["litchi", "litchi-key.aw"]) as play:
            assert play.socket.subprotocol == "litchi" and play("start", seed=0)["step"] == 0


def test_a_room_is_shown_as_the_world_begins(door):
    answer = httpx.get(f"{door.url}/v1/rooms?seed=6")
    assert (
        answer.headers["content-type"] == "image/png"
        and answer.headers["x-litchi-task"] == "go%20to%20the%20red%20corner"
    )
    with Player(door.url) as play:
        assert np.array_equal(pixels(play("start", seed=6)["real"]), np.array(Pillow.open(io.BytesIO(answer.content))))
