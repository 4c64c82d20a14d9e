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
    def __init__(self, url: str, fork: str = "", **more: object):
        query = f"?fork={fork}" if fork else ""
        self.connection = sync.connect(url.replace("http", "ws") + "/v1/worlds" + query, **more)

    def __call__(self, kind: str, **more: object) -> dict:
        self.socket.send(json.dumps({"type": kind, **more}))
        return json.loads(self.socket.recv(timeout=60))

    def read(self) -> dict:
        return json.loads(self.socket.recv(timeout=60))

    def raw(self, message: str | bytes) -> dict:
        self.socket.send(message)
        return json.loads(self.socket.recv(timeout=60))

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
            assert "too many" in json.loads(second.socket.recv(timeout=60))["message"]


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


# ---- forks --------------------------------------------------------------------------------------------------------


def lived(url: str, *actions: str) -> list[dict]:
    """The frames of a session that goes straight on."""
    with Player(url) as play:
        return [play("start", seed=5), *(play("action", action=action) for action in actions)]


def shown(frame: dict) -> dict:
    return {name: value for name, value in frame.items() if name != "ms"}


def assert_same(frames: list[dict], others: list[dict]) -> None:
    assert [shown(frame) for frame in frames] == [shown(frame) for frame in others]


def places(url: str, wanted: int) -> bool:
    """Whether so many places are taken, soon: a socket that was closed is noticed a moment later."""
    return any(httpx.get(f"{url}/health").json()["worlds"] == wanted for _ in range(500))


@pytest.mark.parametrize("drift", [False, True])
def test_a_fork_has_the_same_past_and_a_future_of_its_own(serve, drift: bool):
    with serve(drift=drift) as served, Player(served.url) as play:
        frames = [play("start", seed=5), *(play("action", action=a) for a in ("right", "right", "forward"))]
        made = play("fork", step=1)
        assert made["type"] == "fork" and made["step"] == 1
        with Player(served.url, made["fork"]) as other:
            first = other.read()
            assert_same([first], frames[1:2])
            theirs = [other("action", action=a) for a in ("forward", "left", "left")]
            ours = play("action", action="left")
            assert_same([first, *theirs], lived(served.url, "right", "forward", "left", "left")[1:])
            assert_same([*frames, ours], lived(served.url, "right", "right", "forward", "left"))
            assert ours["step"] == 4 and theirs[-1]["diverged_at"] == (3 if drift else None), "each has its simulator"


def test_rewinding_either_of_two_leaves_the_other_where_it_is(serve):
    with serve(drift=True) as served, Player(served.url) as play:
        [play("start", seed=5), *(play("action", action=a) for a in ("right", "right"))]
        with Player(served.url, play("fork")["fork"]) as other:
            assert other.read()["step"] == 2 and play("rewind", step=0)["step"] == 0
            assert_same([other("action", action="right")], lived(served.url, "right", "right", "right")[3:])
            assert other("rewind", step=0)["step"] == 0
            assert_same([play("action", action="forward")], lived(served.url, "forward")[1:])
            assert_same([other("action", action="left")], lived(served.url, "left")[1:])


def test_a_fork_outlives_its_parent_and_can_be_forked_itself(serve):
    with serve() as served:
        with Player(served.url) as play:
            play("start", seed=5)
            other = Player(served.url, play("fork")["fork"])
            with other:
                other.read()
                play.socket.close()
                other("action", action="right")
                with Player(served.url, other("fork", step=1)["fork"]) as third:
                    again = [third.read(), third("action", action="left")]
                    assert_same(again, lived(served.url, "right", "left")[1:])
        assert places(served.url, 0)


def test_a_dream_from_a_picture_can_be_forked(door):
    out = io.BytesIO()
    Pillow.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(out, "PNG")
    with Player(door.url) as play:
        frame = play("start", image="data:image/png;base64," + base64.b64encode(out.getvalue()).decode())
        with Player(door.url, play("fork", step=0)["fork"]) as other:
            assert_same([other.read()], [frame])
            assert other("action", action="left")["real"] is None


def test_forks_take_places_and_give_them_back(serve):
    with serve(max_worlds=2) as served:
        with Player(served.url) as play:
            play("start", seed=0)
            made = play("fork")["fork"]
            assert "too many" in play("fork")["message"] and places(served.url, 2)
            with Player(served.url) as third:
                assert "too many" in third.read()["message"]
            with Player(served.url, made) as other:
                assert other.read()["step"] == 0 and "too many" in other("fork")["message"]
                with Player(served.url, made) as late:
                    assert "taken up" in late.read()["message"], "a fork is taken up once"
            assert places(served.url, 1)
            left = play("fork")["fork"]
        assert places(served.url, 0), "what nobody took up ends with the session that made it"
        with Player(served.url, left) as late:
            assert "no fork" in late.read()["message"]
            with pytest.raises(exceptions.ConnectionClosed) as closed:
                late.read()
        assert closed.value.rcvd.code == 1008


def test_a_fork_asks_for_the_key_and_for_a_step_that_was(serve):
    key = {"additional_headers": {"Authorization": "Bearer k"}}
    with serve(api_key="k") as served, Player(served.url, **key) as play:
        assert "start" in play("fork")["message"]
        play("start", seed=0)
        for step in (1, -1, "0", 1.5, True):
            assert play("fork", step=step)["type"] == "error", step
        made = play("fork")["fork"]
        with pytest.raises(exceptions.InvalidStatus), Player(served.url, made):
            pass
        with Player(served.url, made, **key) as other:
            assert other.read()["step"] == 0, "who was refused at the door has taken nothing up"
