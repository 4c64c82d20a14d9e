"""How long `litchi serve` takes from the command line to its first answers: real processes, SmolLM2, the default door.

    python bench/start.py [--rounds 5] [--set serve.engine.weights=int4]

Each round starts a process, waits until /health answers, asks one short question in the chat, and ends the process.
Times are wall clock from the start of the process, client included; CPU seconds are those of the process alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

from bench.row import append
from litchi.cli import find_checkpoint

PEER = "bound"
"""Seconds from the command line to the first answer that a start may take."""
BOUND = 3.0
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of China?"}], "max_tokens": 8}


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds after the command line."""

    told: float
    """The address is printed."""
    healthy: float
    answered: float
    cpu: float
    """Of the processor, until the end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--show", action="store_true", help="print only: no row")
    asked = parser.parse_args()
    checkpoint = str(find_checkpoint("smollm2"))
    once(checkpoint, asked.settings)  # the compiler, and the files into memory
    starts = [once(checkpoint, asked.settings) for _ in range(asked.rounds)]
    for start in starts:
        print(" ".join(f"{f.name} {getattr(start, f.name):.2f}" for f in fields(start)), file=sys.stderr)
    middle = {f.name: statistics.median(getattr(start, f.name) for start in starts) for f in fields(Start)}
    print(f"medians: {' '.join(f'{name} {value:.2f}' for name, value in middle.items())}")
    if asked.show:
        return
    settings = "".join(f", {setting}" for setting in asked.settings)
    beside = {"address": middle["told"], "health": middle["healthy"], "cpu": middle["cpu"]}
    beside |= {"least": min(start.answered for start in starts), "most": max(start.answered for start in starts)}
    what = f"litchi serve to its first answer{settings}, median of {asked.rounds}"
    append("start", what, middle["answered"], "s", peer=PEER, peer_figure=BOUND, beside=beside)


def once(checkpoint: str, settings: list[str]) -> Start:
    more = [word for setting in ["serve.port=0", *settings] for word in ("--set", setting)]
    command = [sys.executable, "-m", "litchi.cli", "serve", checkpoint, *more]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().rpartition("API: ")[2].strip()
        told = time.perf_counter() - began
        assert address, "it did not start"
        where = urlsplit(address)
        assert where.hostname is not None and where.port is not None
        health = until_answered(where.hostname, where.port)
        healthy = time.perf_counter() - began
        body = QUESTION | {"model": health["model"]}
        said = ask(where.hostname, where.port, "POST", "/v1/chat/completions", json.dumps(body))
        answered = time.perf_counter() - began
        assert said["choices"][0]["message"]["content"], said
        process.send_signal(signal.SIGTERM)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Start(told, healthy, answered, used.ru_utime + used.ru_stime)


def until_answered(host: str, port: int) -> dict:
    while True:
        try:
            return ask(host, port, "GET", "/health")
        except (OSError, HTTPException):
            time.sleep(0.005)


def ask(host: str, port: int, method: str, path: str, body: str = "") -> dict:
    client = HTTPConnection(host, port, timeout=60)
    try:
        client.request(method, path, body or None, {"Content-Type": "application/json"} if body else {})
        answer = client.getresponse()
        told = json.loads(answer.read())
        assert answer.status == 200, told
        return told
    finally:
        client.close()


if __name__ == "__main__":
    main()
