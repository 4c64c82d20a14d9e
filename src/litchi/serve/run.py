"""Serving: one model behind one door, and a page to talk, draw and play with it.

A request comes through `http` (the OpenAI endpoints, the world sessions, the page), is checked by `guard`, `limits` and
`wire`, passes `worker`, which bounds how many are inside, is answered by the `engine` beside others (its `scheduler`
chooses who reads, `guess` what is read ahead, its `runner` computes), and leaves as `answers` writes it, calls as
`callreader` finds them. On a GPU weights lie where `placing` puts them, and `device` computes a step in `lanes` and
`graphs`. Before all that `settings` refuses what cannot work, and `starting` does beside each other what can be. With
workers the engines are processes (`member`), which `spawn` starts, each at the end of a `pipe`, whose lives `keeper`
keeps and whom `fleet` asks; several ranks of one worker share the network (`ranks`, `tensor`). Any other `Sampler`
answers one at a time behind `solo`. `fetch` and `films` bring pictures in, `darkroom` decodes them, `swaps` brings
other weights. Which model and which simulator stand behind the door is the caller's choice.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from litchi.config import BadInput
from litchi.record import need
from litchi.schema.protocol import Sampler
from litchi.serve.darkroom import Darkroom
from litchi.serve.engine import Engine
from litchi.serve.fleet import Fleet
from litchi.serve.guard import LOOPBACK
from litchi.serve.limits import Limits
from litchi.serve.scheduler import EngineConfig
from litchi.serve.sessions import MakeRoom
from litchi.serve.settings import check, check_side
from litchi.serve.solo import Solo
from litchi.serve.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Where the door stands and how much it lets in."""

    host: str = "127.0.0.1"
    """Loopback: nobody else on the network. Give an address to open it, and then an `api_key`."""
    port: int = 8000
    """0 takes a free one."""
    model: str = "tiny"
    """The name that requests call the model by."""
    abilities: tuple[str, ...] = ("see", "draw", "dream", "watch")
    """What the model does besides talking, as /v1/models tells; the page shows no more than that."""
    api_key: str = ""
    """If set, every path asks for it but the page and /health."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that the door answers to; empty: the loopback names on loopback, any elsewhere."""
    side: int = 64
    """Height and width of the model's pictures in pixels; 0 leaves pictures as they come."""
    envs: tuple[str, ...] = ("BabyAI-GoToLocal-v0", "BabyAI-GoToObj-v0", "BabyAI-GoToRedBall-v0", "BabyAI-PickupLoc-v0")
    """Rooms that a visitor may ask for; the first is the default."""
    engine: EngineConfig = EngineConfig()
    adapters: tuple[str, ...] = ()
    """LoRA adapters that requests may name as their model, each as NAME=FOLDER, a folder that PEFT wrote."""
    workers: int = 0
    """Processes with an engine each, which may die without the door: 0 has one engine in the door's own process."""
    tensor: int = 1
    """Processes of a worker that share out every matrix between them; more than 1 makes at least one worker."""
    worker_patience: float = 120.0
    """Seconds after which a worker that has work and does not get on with it is replaced."""
    start_patience: float = 300.0
    """Seconds after which a worker that starts, and has not got a tensor or 64 MiB further since, is replaced."""
    checkpoints: tuple[str, ...] = ()
    """Folders whose weights may take the place of those that answer, by `POST /v1/weights`; asks for an `api_key`."""
    drain: float = 30.0
    """Seconds that answers under way have to end in when the server is told to stop."""
    receipts: str = ""
    """A file that what responses were made of is appended to, so that it outlives the server; empty: memory only."""
    max_queue: int = 64
    """Requests that wait while others are answered; the next gets 429."""
    max_worlds: int = 32
    max_world_steps: int = 512
    context_frames: int = 1
    """Frames that the world model sees; the last is enough in a world whose frame is its whole state."""
    max_body_bytes: int = 16 << 20
    max_image_bytes: int = 8 << 20
    max_pixels: int = 16 << 20
    max_images: int = 8
    max_frames: int = 32
    """Frames of one film; of a longer one so many are chosen, evenly in time."""
    fetch_hosts: tuple[str, ...] = ()
    """Hosts that pictures by address are fetched from, HOST or HOST:PORT, by https unless it says http://; only at
    public addresses. Empty: none is fetched."""
    fetch_inner_hosts: tuple[str, ...] = ()
    """The same for hosts of your own network, which may be at private addresses and loopback."""
    max_text: int = 4_000
    """Characters of one conversation: attention is quadratic in them."""
    max_tokens: int = 1024
    """Tokens of one answer."""
    patience: float = 30.0
    """Seconds that a client may take to send a request; longer only for a body that comes at 16 KiB a second."""

    @property
    def limits(self) -> Limits:
        return Limits(
            side=self.side,
            max_body_bytes=self.max_body_bytes,
            max_image_bytes=self.max_image_bytes,
            max_pixels=self.max_pixels,
            max_images=self.max_images,
            max_text=self.max_text,
            max_tokens=self.max_tokens,
            sees="see" in self.abilities,
            watches="watch" in self.abilities,
            max_frames=self.max_frames,
        )

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.allowed_hosts or (LOOPBACK if self.host in LOOPBACK else ())


@dataclass(frozen=True, slots=True)
class Door:
    """What can be set of a model that no Run of ours has made."""

    serve: ServeConfig


def run(config: ServeConfig, sampler: Sampler | Fleet, make_room: MakeRoom) -> None:
    """Serve until interrupted. Raises BadInput if the address cannot be had, or no worker starts any more."""
    uvicorn = need("serve", "uvicorn")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.host not in LOOPBACK and not config.api_key:
        logging.getLogger("litchi.serve").warning("open to the network without api_key: whoever reaches it may use it")
    darkroom = Darkroom(config.max_pixels)
    if config.abilities:  # beside the application, which takes longer to load; a model of words alone is shown nothing
        darkroom.warm()
    server = uvicorn.Server(uvicorn_config(config, sampler, make_room, darkroom))
    listener = bind(config.host, config.port)
    listener.listen()  # whoever reads the address below may come at once: he waits until the server is up
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    faults: list[str] = []

    def ended(fault: str) -> None:
        faults.append(fault)
        server.should_exit = True

    if isinstance(sampler, Fleet):
        sampler.ended = ended
    print(f"Litchi serves {config.model!r}. Page: http://{shown}:{port}/  API: http://{shown}:{port}/v1", flush=True)
    server.run(sockets=[listener])
    if faults:
        raise BadInput(faults[0])


@contextmanager
def background(config: ServeConfig, sampler: Sampler | Fleet, make_room: MakeRoom) -> Iterator[str]:
    """The address of a server that runs in a thread of this process while the block runs.

    If the port of the config is taken, any free one is had instead.
    """
    uvicorn = need("serve", "uvicorn")
    server = uvicorn.Server(uvicorn_config(config, sampler, make_room))
    try:
        listener = bind(config.host, config.port)
    except BadInput:
        listener = bind(config.host, 0)
    listener.listen()  # so that a request made before the server is up waits, and is not refused
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://{config.host}:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything is printed so that the address shown is the address had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP, since asyncio turns Nagle's delay off only for sockets that say so: it is 40 ms for each answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise BadInput(f"cannot listen on {host}:{port} ({error}); choose another with --set serve.port=0") from None
    return listener


def uvicorn_config(  # noqa: ANN201 (an extra's type)
    config: ServeConfig, sampler: Sampler | Fleet, make_room: MakeRoom, darkroom: Darkroom | None = None
):
    uvicorn = need("serve", "uvicorn")
    need("serve", "fastapi")
    from litchi.serve.http import create_app  # after need, which names the missing extra
    from litchi.serve.patience import patient

    check(config)
    check_side(config, getattr(sampler, "processor", None))
    answerer = sampler if isinstance(sampler, Engine | Fleet) else Solo(sampler)
    app = create_app(config, Worker(answerer, config.max_queue), make_room, darkroom)
    # A message of a world session is held whole in memory, as a body is: the same limit.
    return uvicorn.Config(
        app,
        http=patient(config.patience),
        log_level="warning",
        ws_max_size=config.max_body_bytes,
        timeout_graceful_shutdown=max(1, round(config.drain)),
        server_header=False,
    )
