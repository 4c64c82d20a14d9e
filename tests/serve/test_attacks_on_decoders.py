"""Attacks on the decoders of pictures: their process may die, hang, spin, swell or lie, and only its picture is lost.

Each test is an attack that works on a server which decodes in its own process; docs/security.md names them one by one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image as Pillow

from litchi.serve import darkroom, exchange, limits
from litchi.serve.darkroom import Child, Darkroom
from tests.serve.test_attacks import is_well, world_of
from tests.serve.test_attacks_by_pictures import saved, shows, url_of
from tests.serve.test_attacks_in_bodies import ask, within

SMALL = shows(url_of(saved(Pillow.new("RGB", (64, 64), "red"), "PNG")))
Rooms = Callable[..., "Iterator[tuple[str, Darkroom]]"]


@pytest.fixture
def rooms(serve, monkeypatch) -> Rooms:
    """`with rooms(seconds=1) as (url, room):` a server, and where its pictures are decoded; one child is ready."""

    @contextmanager
    def one(code: str = "", **bounds: object) -> Iterator[tuple[str, Darkroom]]:
        made: list[Darkroom] = []
        monkeypatch.setattr(exchange, "Darkroom", lambda pixels: made.append(Darkroom(pixels, **bounds)) or made[-1])
        if code:
            script = f"from litchi.serve import darkroom; {code}; darkroom.main()"
            monkeypatch.setattr(darkroom, "COMMAND", ["-c", script])
        with serve(max_queue=64) as served:
            made[0].warm()
            yield served.url, made[0]

    return one


def jpeg_of_passes(count: int) -> bytes:
    """Sixteen million pixels, and so many passes over all of them: about ten milliseconds each."""
    raw = saved(Pillow.new("L", (4000, 4000), 90), "JPEG", progressive=True)
    at = raw.rindex(b"\xff\xda")
    return raw[:at] + raw[at:-2] * count + b"\xff\xd9"


def seconds_of(child: Child) -> float:
    """Of a processor."""
    told = Path(f"/proc/{child.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def refused(answer: tuple[int, str]) -> bool:
    return answer[0] == 400 and darkroom.TOO_MUCH in answer[1]


MANY = "darkroom.MAX_SCANS = 1 << 30"
"""A child that takes JPEGs of endless passes, as all did once: a picture that keeps a real decoder for minutes."""


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="only Linux tells what another process does")
def test_a_decoder_that_is_killed_in_the_middle_of_a_picture_takes_nobody_with_it(rooms) -> None:
    bomb = shows(url_of(jpeg_of_passes(10_000), "jpeg"))
    with rooms(MANY) as (url, room), ThreadPoolExecutor(1) as pool:
        assert ask(url, SMALL)[0] == 200
        [child] = room.idle
        for sign in (signal.SIGKILL, signal.SIGSEGV):
            enough = seconds_of(child) + 0.1
            asked = pool.submit(ask, url, bomb)
            until(lambda child=child, enough=enough: seconds_of(child) > enough)
            os.kill(child.process.pid, sign)
            assert refused(asked.result())
            assert ask(url, SMALL)[0] == 200 and is_well(url)
            assert child.process.returncode == -sign and room.idle[0] is not child
            [child] = room.idle
        os.kill(child.process.pid, signal.SIGKILL)  # while it has nothing to do: nobody's picture is lost
        until(lambda: child.process.poll() is not None)
        assert ask(url, SMALL)[0] == 200


def test_a_decoder_that_spins_or_hangs_is_ended(rooms, monkeypatch) -> None:
    raw = jpeg_of_passes(20_000)
    with rooms(MANY) as (url, room):  # by the clock
        assert ask(url, SMALL)[0] == 200
        [child] = room.idle
        room.seconds = 0.5
        assert refused(ask(url, shows(url_of(raw, "jpeg")))) and is_well(url)
        assert child.process.returncode == -signal.SIGKILL
        room.seconds = 60
        assert ask(url, SMALL)[0] == 200
    monkeypatch.setattr(darkroom, "CPU_SECONDS", 0)
    room = Darkroom(16 << 20, seconds=60)  # by the processor
    try:
        room.warm()
        [child] = room.idle
        with pytest.raises(darkroom.BadInput, match="takes too much"):
            room.decode(raw, 64, 16 << 20)
        assert child.process.returncode == -signal.SIGXCPU
    finally:
        room.close()


def test_a_picture_that_takes_more_memory_than_there_is_ends_its_decoder_alone(rooms, monkeypatch) -> None:
    """Fifty kilobytes of sixteen million pixels, which are let in, take sixty-four megabytes."""
    raw = saved(Pillow.new("RGB", (4000, 4000)), "PNG")
    monkeypatch.setattr(darkroom, "BYTES", 160 << 20)
    monkeypatch.setattr(darkroom, "BYTES_OF_PIXEL", 0)
    with rooms() as (url, room):
        for _ in range(2):
            [child] = room.idle
            with within(100 << 20):
                assert refused(ask(url, shows(url_of(raw))))
            assert child.process.poll() is not None and ask(url, SMALL)[0] == 200 and is_well(url)
    with rooms("darkroom.decode = lambda *a: bytes(8 << 30)") as (url, _), within(100 << 20):
        assert refused(ask(url, SMALL))


def test_many_pictures_are_decoded_while_one_hangs(rooms) -> None:
    with rooms(seconds=60, most=2, wait=60) as (url, room), ThreadPoolExecutor(33) as pool:
        assert ask(url, SMALL)[0] == 200
        [child] = room.idle
        os.kill(child.process.pid, signal.SIGSTOP)
        hangs = pool.submit(ask, url, SMALL)
        until(lambda: child in room.busy)
        answers = list(pool.map(lambda _: ask(url, SMALL)[0], range(32)))
        assert answers == [200] * 32 and not hangs.done() and is_well(url)
        os.kill(child.process.pid, signal.SIGKILL)
        assert refused(hangs.result())
        assert ask(url, SMALL)[0] == 200


def test_who_finds_every_decoder_hanging_is_asked_to_come_again(rooms) -> None:
    with rooms(seconds=60, most=1, wait=0.2) as (url, room), ThreadPoolExecutor(1) as pool:
        [child] = room.idle
        os.kill(child.process.pid, signal.SIGSTOP)
        hangs = pool.submit(ask, url, SMALL)
        until(lambda: child in room.busy)
        assert ask(url, SMALL)[0] == 429 and not hangs.done()
        os.kill(child.process.pid, signal.SIGKILL)
        assert refused(hangs.result()) and ask(url, SMALL)[0] == 200


LIES = {
    "another size": ((0, 65, 64, 64, 64), "bytes(65 * 64 * 3)"),
    "nothing": ((0, 0, 0, 0, 0), "b''"),
    "out of a large one": ((0, 64, 64, 1 << 20, 1 << 20), "bytes(64 * 64 * 3)"),
    "an endless one": ((0, (1 << 64) - 1, 1, 1, 1), "bytes(99)"),
    "an endless fault": ((1, 1 << 40, 0, 0, 0), "bytes(99)"),
    "no verdict": ((9, 1 << 63, 1, 1, 1), "bytes(99)"),
    "no letters": ((1, 2, 0, 0, 0), "b'\\xff\\xfe'"),
    "half of it": ((0, 64, 64, 64, 64), "bytes(99)"),
    "the truth": ((0, 64, 64, 9, 9), "bytes(64 * 64 * 3)"),
}
LIAR = """
from litchi.serve.darkroom import *
line = socket.socket(fileno=0)
_, _, count = ASKED.unpack(receive(line, ASKED.size))
receive(line, count)
line.sendall(TOLD.pack(*{told}) + {body})
"""


@pytest.mark.parametrize("kind", LIES)
def test_a_decoder_that_lies_is_not_believed(kind: str, monkeypatch) -> None:
    """Whoever takes one over writes to the door what he likes."""
    told, body = LIES[kind]
    monkeypatch.setattr(darkroom, "COMMAND", ["-c", LIAR.format(told=told, body=body)])
    room = Darkroom(16 << 20, seconds=30)
    try:
        with within(50 << 20):
            if kind == "the truth":
                assert room.decode(b"x", 64, 16 << 20)[1] == (9, 9)
            else:
                with pytest.raises(darkroom.BadInput, match="takes too much"):
                    room.decode(b"x", 0 if kind == "nothing" else 64, 16 << 20)
    finally:
        room.close()


def test_a_decoder_that_was_taken_over_reads_no_file_no_key_and_no_network(monkeypatch) -> None:
    monkeypatch.setenv("LITCHI_SECRET", "swordfish")
    with socket.create_server(("127.0.0.1", 0)) as trap:
        tries = (
            "open('/etc/passwd')",
            "__import__('os').listdir('/')",
            "__import__('os').pipe()",
            "open('/tmp/litchi-taken-over', 'w')",
            f"__import__('socket').create_connection({trap.getsockname()})",
            "__import__('subprocess').run(['true'])",
            "__import__('os').environ['LITCHI_SECRET']",
        )
        for attempt in tries:
            code = f"def taken(*a):\n try: told = {attempt}\n except (OSError, KeyError) as e: told = type(e).__name__"
            code += "\n raise darkroom.BadInput(str(told))"
            script = f"from litchi.serve import darkroom\n{code}\ndarkroom.decode, decode = taken, darkroom.decode\n"
            script += "darkroom.warm = lambda: None\ndarkroom.main()"
            monkeypatch.setattr(darkroom, "COMMAND", ["-c", script])
            room = Darkroom(64, seconds=30)
            try:
                with pytest.raises(darkroom.BadInput) as told:
                    room.decode(b"x", 64, 16 << 20)
                assert str(told.value) in ("OSError", "KeyError"), attempt
            finally:
                room.close()


def test_no_picture_of_a_stranger_is_decoded_in_the_doors_own_process(serve, monkeypatch) -> None:
    def here(*_: object) -> None:
        raise AssertionError("decoded in the door")

    monkeypatch.setattr(limits, "decode", here)
    monkeypatch.setattr(darkroom, "decode", here)
    [piece] = SMALL["messages"][0]["content"]
    url = piece["image_url"]["url"]
    item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
    action = {"type": "action", "space": "minigrid", "hz": 1, "values": [[0]]}
    with serve() as served:
        assert ask(served.url, SMALL)[0] == 200
        assert ask(served.url, {"input": [item]}, "/v1/responses")[0] == 200
        assert ask(served.url, {"want": "frame", "parts": [piece, action]}, "/v1/next")[0] == 200
        with world_of(served.url) as world:
            world.send(json.dumps({"type": "start", "image": url}))
            assert json.loads(world.recv(timeout=60))["type"] == "frame"
        assert is_well(served.url)
