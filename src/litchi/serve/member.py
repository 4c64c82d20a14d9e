"""A worker: a process with an engine of its own, which answers what the door's process asks through a pipe.

It ends with the door: when the other end of the pipe is gone, nobody waits for its answers.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litchi.config import BadInput, parse
from litchi.schema.request import Request
from litchi.serve.pipe import Pipe, read, written
from litchi.serve.starting import starting

if TYPE_CHECKING:
    from litchi.serve.engine import Engine
    from litchi.serve.solo import Piece

BEAT = 0.5
"""Seconds between two signs of life."""


def main() -> None:
    """The life of the worker whose end of the pipe is the file descriptor that the command line names."""
    warnings.filterwarnings("ignore", message=".*torch.*")
    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])))
    gc.disable()  # as `starting` does
    threading.Thread(target=import_engine, name="litchi-imports", daemon=True).start()
    task = pipe.receive()
    gc.enable()
    if task is None:
        os._exit(0)  # while torch is being imported, which no exit of Python's own may cut short
    started = logging.getLogger("litchi.start")
    started.setLevel(logging.DEBUG)
    started.addHandler(Teller(pipe))
    try:
        engine = begin(task)
    except Exception as error:
        pipe.send({"failed": described(error)})
        pipe.close()
        raise
    origin = engine.origin
    pipe.send({"ready": None if origin is None else asdict(origin), "mode": engine.mode})
    threading.Thread(target=beat, args=(pipe, engine), name="litchi-beat", daemon=True).start()
    Answers(pipe, engine).take()
    os._exit(0)  # threads of libraries must not keep a worker alive whom nobody asks


def import_engine() -> None:
    """While the door makes out what is to be served; what is wrong is told when it is needed."""
    with suppress(Exception):
        from litchi.serve import loading  # noqa: F401


def begin(task: dict[str, Any]) -> Engine:
    folder = Path(task["folder"])
    with starting(folder) as check:
        import torch

        from litchi.serve.loading import load_engine
        from litchi.serve.run import ServeConfig

        if task["threads"]:
            torch.set_num_threads(task["threads"])
        config = parse(ServeConfig, task["serve"], "serve")
        return load_engine(folder, config, task["place"], check).start()


class Teller(logging.Handler):
    """Tells the door what is done while the worker starts: silence is how it knows a start that hangs."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self.pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self.pipe.send({"doing": record.getMessage()})


class Answers:
    """What the door has asked, and what it is told."""

    def __init__(self, pipe: Pipe, engine: Engine) -> None:
        self.pipe, self.engine = pipe, engine
        self.lock = threading.Lock()
        self.tickets: dict[int, Any] = {}
        self.over: set[int] = set()
        """Those whose end was told before the engine had given a ticket."""

    def take(self) -> None:
        """Take in what is asked until the door is gone."""
        while (message := self.pipe.receive()) is not None:
            if "ask" in message:
                self.ask(message)
            elif ticket := self.tickets.get(message["of"]):
                self.engine.cancel(ticket)

    def ask(self, message: dict[str, Any]) -> None:
        number = message["of"]
        try:
            request = read(message["ask"], Request)
            ticket = self.engine.submit(request, partial(self.tell, number), stream=message["stream"])
        except Exception as error:
            self.pipe.send({"of": number, "end": described(error)})
            return
        with self.lock:
            if number in self.over:
                self.over.remove(number)
            else:
                self.tickets[number] = ticket

    def tell(self, number: int, piece: Piece | BaseException | None) -> None:
        """A piece of an answer, or its end, in the engine's thread."""
        if piece is not None and not isinstance(piece, BaseException):
            self.pipe.send({"of": number, "piece": written(piece)})
            return
        with self.lock:
            if self.tickets.pop(number, None) is None:
                self.over.add(number)
        self.pipe.send({"of": number, "end": None if piece is None else described(piece)})


def described(error: BaseException) -> list[str]:
    return ["input" if isinstance(error, BadInput) else type(error).__name__, str(error)]


def beat(pipe: Pipe, engine: Engine) -> None:
    """Signs of life: what the engine has to do, and what it has done."""
    while engine.alive:
        pipe.send({"beat": asdict(engine.load())})
        threading.Event().wait(BEAT)
    pipe.shut()  # the engine's thread has died: the door must hear of it


if __name__ == "__main__":
    main()
