"""A door on loopback for every test, and behind it a small deterministic `Sampler`, so that no model is needed.

The painter computes its answers from what it is given: it names the mean colour of the last picture, paints the colour
that a prompt names, and foresees a world whose only object walks one tile by each action.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import httpx
import numpy as np
import pytest

from litchi.cli import main
from litchi.config import BadInput
from litchi.schema.protocol import Env, Sampler
from litchi.schema.request import Completion, Delta, Request
from litchi.schema.sample import Action, Image, Part, Role, Text

uvicorn = pytest.importorskip("uvicorn", reason="pip install litchi[serve]")
pytest.importorskip("fastapi", reason="pip install litchi[serve]")

from litchi.serve.run import ServeConfig, bind, uvicorn_config  # noqa: E402

for phase in ("connect", "read", "write", "pool"):  # five seconds are few where all tests share two cores
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, phase, 60.0)

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "white": (255, 255, 255)}
MOVES = {0: (0, -1), 1: (0, 1), 2: (-1, 0)}


def mean_colour(pixels: np.ndarray) -> str:
    mean = pixels.reshape(-1, 3).mean(axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))


def world(row: int, column: int, seed: int = 0) -> np.ndarray:
    """A black room with one white tile, and the seed written as the colour of the corner."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:8, :8] = (seed % 200, 100, 50)
    pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
    return pixels


def walk(pixels: np.ndarray, action: int) -> np.ndarray:
    """The white tile one step further, round the edges; pickup paints it away and drop leaves everything as it is."""
    rows, columns = np.nonzero(pixels[4::8, 4::8].min(axis=2) == 255)
    if not len(rows) or action not in MOVES:
        return pixels.copy()
    down, right = MOVES[action]
    row, column = 1 + (rows[0] - 1 + down) % 7, 1 + (columns[0] - 1 + right) % 7
    after = world(int(row), int(column))
    after[:8, :8] = pixels[:8, :8]
    return after


class Painter:
    """`pause` seconds pass before every token. `gate`, if cleared, holds every answer until it is set."""

    def __init__(self, pause: float = 0.0):
        self.pause, self.gate = pause, threading.Event()
        self.gate.set()
        self.made = 0
        self.closed = threading.Event()
        self.requests: list[Request] = []

    def stream(self, request: Request) -> Iterator[Delta]:
        self.requests.append(request)
        try:
            self.gate.wait(300)
            yield from self._deltas(request)
        finally:
            self.closed.set()

    def complete(self, request: Request) -> Completion:
        deltas = list(self.stream(request))
        text = "".join(delta.text for delta in deltas)
        return Completion(
            parts=tuple(delta.part for delta in deltas if delta.part is not None),
            text=text,
            finish=deltas[-1].finish or "stop",
            prompt_tokens=len(request.parts),
            tokens=tuple(t for delta in deltas for t in delta.tokens),
            logprobs=tuple(p for delta in deltas for p in delta.logprobs),
        )

    def _deltas(self, request: Request) -> Iterator[Delta]:
        images = [part.pixels for part in request.parts if isinstance(part, Image)]
        last = next((part.text for part in reversed(request.parts) if isinstance(part, Text)), "")
        match request.want:
            case "image":
                yield Delta(text="All of one colour.")
                yield Delta(part=self._paint(last, request.params.seed), finish="stop")
            case "frame":
                action = request.parts[-1]
                if not isinstance(action, Action):
                    raise BadInput("a frame follows an action; end the parts with one")
                yield Delta(part=Image(pixels=walk(images[-1], int(action.values[0, 0]))), finish="stop")
            case "action":
                yield Delta(part=Action.discrete(len(last) % 3, request.space), finish="stop")
            case _:
                yield from self._chat(request, images, last)

    def _chat(self, request: Request, images: list[np.ndarray], last: str) -> Iterator[Delta]:
        if "explode" in last:
            raise RuntimeError("the painter fell off the ladder")
        if "too long" in last:
            raise BadInput("the conversation has 9 tokens, more than the 8 of the model; drop the oldest messages")
        if "draw" in last:
            yield Delta(text="Here: ", tokens=(1,), logprobs=(-0.5,))
            yield Delta(part=self._paint(last, request.params.seed))
        turns = sum(isinstance(p, Text) and p.role is Role.ASSISTANT for p in request.parts)
        seen = f"mostly {mean_colour(images[-1])}" if images else "no picture"
        words = ["Forever. "] * 100_000 if "forever" in last else f"I see {seen} in turn {turns + 1} .".split(" ")
        for count, word in enumerate(words):
            time.sleep(self.pause)
            self.made += 1
            if count == request.params.max_tokens:
                yield Delta(finish="length")
                return
            if word in request.params.stop:
                break
            yield Delta(text=word + " ", tokens=(count,), logprobs=(-0.25,))
        yield Delta(finish="stop")

    def _paint(self, prompt: str, seed: int) -> Image:
        named = next((COLOURS[word] for word in prompt.split() if word in COLOURS), (128, 128, 128))
        pixels = np.full((64, 64, 3), named, np.uint8)
        pixels[0, 0] = seed % 256
        return Image(pixels=pixels, role=Role.ASSISTANT)


class WhiteTile:
    """An `Env`: the painter's world itself; with `drift`, the third step goes where no dream would."""

    def __init__(self, drift: bool = False):
        self.task, self.drift = "go to the red corner", drift

    def reset(self, seed: int) -> tuple[Part, ...]:
        self.count, self.pixels = 0, world(1 + seed % 7, 3, seed)
        return (Image(pixels=self.pixels),)

    def step(self, action: Action) -> tuple[tuple[Part, ...], float, bool, bool]:
        self.count += 1
        self.pixels = walk(self.pixels, int(action.values[0, 0]))
        if self.drift and self.count == 3:
            self.pixels[40:48, 40:48] = (0, 200, 0)
        return (Image(pixels=self.pixels),), float(self.count == 9), self.count == 9, False


@dataclass(frozen=True)
class Served:
    """A running server: its address, what answers behind it, and its configuration."""

    url: str
    sampler: Sampler
    config: ServeConfig


Serve = Callable[..., "contextmanager[Served]"]


@contextmanager
def serving(sampler: Sampler, make_room: Callable[[str, int], Env], **settings: object) -> Iterator[Served]:
    config = ServeConfig(**{"port": 0, "drain": 3.0} | settings)
    listener = bind(config.host, config.port)
    listener.listen()  # so that a client may connect at once and waits until the server accepts
    server = uvicorn.Server(uvicorn_config(config, sampler, make_room))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    host, port = listener.getsockname()
    try:
        yield Served(f"http://{host}:{port}", sampler, config)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def serve() -> Serve:
    """`with serve(max_queue=1) as served:` a server of its own over a `Painter`."""

    @contextmanager
    def one(painter: Painter | None = None, drift: bool = False, **settings: object) -> Iterator[Served]:
        painter = painter or Painter()
        with serving(painter, lambda name, seed: WhiteTile(drift), **settings) as served:
            try:
                yield served
            finally:
                painter.gate.set()

    return one


@pytest.fixture(scope="module")
def door() -> Iterator[Served]:
    """One server for the tests of a module that change nothing."""
    with serving(Painter(), lambda name, seed: WhiteTile()) as served:
        yield served


@pytest.fixture(scope="session")
def served_by() -> Serve:
    """`with served_by(sampler, make_room) as served:`; without arguments the painter and its room."""

    def served(sampler=None, room=None, **settings: object):
        return serving(sampler or Painter(), room or (lambda name, seed: WhiteTile()), **settings)

    return served


@pytest.fixture
def painter() -> type[Painter]:
    return Painter


@pytest.fixture(scope="session")
def white_tile() -> type[WhiteTile]:
    return WhiteTile


@pytest.fixture(scope="session")
def served_folder(served_by) -> Callable[[Path], AbstractContextManager]:
    """A server with what `litchi serve FOLDER` makes of a folder, on a port of its own."""

    def serve(folder: Path, *settings: str) -> AbstractContextManager:
        found: list = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("litchi.serve.run.run", lambda config, sampler, room: found.extend((config, sampler, room)))
            assert main(["serve", str(folder), *(word for each in settings for word in ("--set", each))]) == 0
        gc.unfreeze()  # what other tests have left is garbage
        config, sampler, room = found
        kept = {each.name: getattr(config, each.name) for each in fields(config) if each.name != "port"}
        return served_by(sampler, room, **kept)

    return serve
