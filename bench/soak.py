"""A server on loopback for a quarter of an hour: many clients, half of them rude; now and then a worker is killed.

    python bench/soak.py [--minutes 15] [--clients 64] [--kill 120]

SmolLM2-135M-Instruct by `litchi serve` with two workers. Clients ask, stream, embed, want words in a grammar, leave in
the middle, send broken, oversize and unauthorised requests. Whoever stays must get an answer, and an answer must be
that of an engine asked alone: text and log-probabilities. Memory is fitted by a line, for the door over the whole time,
for workers over the life of each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.row import append
from litchi.cli import find_checkpoint
from litchi.schema.request import Grammar, Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve.loading import load_engine
from litchi.serve.run import ServeConfig

KEY = {"Authorization": "Bearer soak"}
WORDS = (Path(__file__).read_text() + Path("README.md").read_text()).split()
WARM = 1 / 3
"""Of the time, before memory is looked at: caches fill."""


@dataclass
class Tally:
    """What became of all requests."""

    ends: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """The longest silence of each stream, in seconds."""
    recoveries: list[float] = field(default_factory=list)
    memory: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """By process, (seconds, MB)."""


@dataclass(frozen=True)
class Question:
    """A body, where it goes, and what an engine alone says."""

    path: str
    body: dict[str, Any]
    text: str
    logprobs: tuple[float, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kill", type=float, default=120, help="seconds between two kills")
    parser.add_argument("--show", action="store_true", help="print only, and add no row to the results")
    asked = parser.parse_args()
    known = questions(40)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"workers": 2, "port": port, "api_key": "soak", "max_queue": 40, "engine.max_running": 8}
    settings["engine.cache_tokens"] = 4096  # soon full, so that memory which still grows is lost
    words = [word for name, value in settings.items() for word in ("--set", f"serve.{name}={value}")]
    command = [
        sys.executable,
        "-c",
        "from litchi.cli import main; main()",
        "serve",
        str(find_checkpoint("smollm2")),
        *words,
    ]
    server = subprocess.Popen(command)
    tally = Tally()
    try:
        asyncio.run(soak(f"http://127.0.0.1:{port}", server, known, tally, asked))
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    return report(tally, code, asked)


def questions(count: int) -> list[Question]:
    """Asked alone, one after another, of an engine in this process."""
    engine, rng, found = load_engine(find_checkpoint("smollm2"), ServeConfig()).start(), random.Random(0), []
    for index in range(count):
        words = " ".join(WORDS[rng.randrange(len(WORDS) - 80) :][: rng.randrange(4, 80)])
        most, heat, seed = rng.randrange(4, 48), rng.choice((0.0, 1.0)), rng.randrange(1 << 30)
        body = {"max_tokens": most, "temperature": heat, "seed": seed, "logprobs": True}
        params = SamplingParams(max_tokens=most, temperature=heat, seed=seed, logprobs=True)
        if index % 5 == 4:
            params = SamplingParams(max_tokens=most, seed=seed, logprobs=True, grammar=Grammar("regex", "[a-z ]{3,20}"))
            body |= {"temperature": 0.0, "guided_regex": "[a-z ]{3,20}"}
        parts = (Text(text=words, role=Role.USER),)
        answer = engine.complete(Request(parts=parts, params=params))
        body["messages"] = [{"role": "user", "content": words}]
        worth = tuple(scored.logprob for scored in answer.scored if scored.logprob is not None)
        found.append(Question("/v1/chat/completions", body, answer.text, worth))
    engine.close()
    return found


async def soak(
    url: str, server: subprocess.Popen, known: list[Question], tally: Tally, asked: argparse.Namespace
) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=asked.clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=KEY) as client:
        await until_ready(client, server)
        end = time.monotonic() + 60 * asked.minutes
        watchers = [asyncio.create_task(watch(server.pid, tally))]
        watchers.append(asyncio.create_task(murder(client, server.pid, tally, asked.kill, end)))
        try:
            clients = (one(client, random.Random(seed), known, tally, end) for seed in range(asked.clients))
            await asyncio.gather(*clients)
        finally:
            for task in watchers:
                task.cancel()
        health = (await client.get("/health")).json()
        print("at the end:", json.dumps(health))
        await asyncio.sleep(2)  # who left at the end is noticed at the next step, and told at the next beat
        if busy := await gauge(client, "engine_running"):
            tally.wrong.append(f"engines still answer {busy:g} whom nobody waits for")


async def until_ready(client: httpx.AsyncClient, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.1)
    raise SystemExit("the server did not start")


async def one(client: httpx.AsyncClient, rng: random.Random, known: list[Question], tally: Tally, end: float) -> None:
    """One client: asks again and again, in one of the ways of `WAYS`, and sometimes waits in between."""
    while time.monotonic() < end:
        name = rng.choices(list(WAYS), [weight for weight, _ in WAYS.values()])[0]
        began = time.monotonic()
        try:
            tally.ends[await WAYS[name][1](client, rng, known, tally)] += 1
        except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
            tally.lost.append(f"{name}: {type(error).__name__} {error} after {time.monotonic() - began:.1f} s")
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random())


# ---- ways to ask ----


async def whole(client: httpx.AsyncClient, rng: random.Random, known: list[Question], tally: Tally) -> str:
    question, began = rng.choice(known), time.monotonic()
    answer = await client.post(question.path, json=question.body)
    if end := await refused(answer, rng, tally):
        return end
    tally.waits.append(time.monotonic() - began)
    [choice] = answer.json()["choices"]
    check(question, choice["message"]["content"], choice["logprobs"]["content"], tally)
    return "answered whole"


async def stream(client: httpx.AsyncClient, rng: random.Random, known: list[Question], tally: Tally) -> str:
    question = rng.choice(known)
    text, scored, last, gap, done = "", [], 0.0, 0.0, False
    async with client.stream("POST", question.path, json=question.body | {"stream": True}) as answer:
        if end := await refused(answer, rng, tally):
            return end
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            now = time.monotonic()
            gap, last = max(gap, now - last) if last else 0.0, now
            if line == "data: [DONE]":
                done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                tally.lost.append(f"stream: {event}")
                return "failed"
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                scored += (choice.get("logprobs") or {}).get("content") or []
    if not done:
        tally.lost.append("stream: it ended without an end")
        return "failed"
    tally.gaps.append(gap)
    check(question, text, scored, tally)
    return "answered in a stream"


async def refused(answer: httpx.Response, rng: random.Random, tally: Tally) -> str:
    """How a request ended that was not answered; "" for one that is."""
    if answer.status_code == 429:
        await asyncio.sleep(float(answer.headers["Retry-After"]) * rng.random())
        return "refused for now, 429"
    if answer.status_code != 200:
        tally.lost.append(f"{answer.status_code} {(await answer.aread())[:200]!r}")
        return "failed"
    return ""


def check(question: Question, text: str, scored: list[dict[str, Any]], tally: Tally) -> None:
    if text != question.text or tuple(each["logprob"] for each in scored) != question.logprobs:
        tally.wrong.append(f"{text!r} and not {question.text!r}")


async def leave(client: httpx.AsyncClient, rng: random.Random, known: list[Question], tally: Tally) -> str:
    """Goes away in the middle of a stream."""
    question, left = rng.choice(known), rng.randrange(1, 6)
    async with client.stream("POST", question.path, json=question.body | {"stream": True}) as answer:
        async for _ in answer.aiter_lines():
            left -= 1
            if not left:
                break
    return "left a stream"


async def hang_up(client: httpx.AsyncClient, rng: random.Random, known: list[Question], tally: Tally) -> str:
    """Sends half of a request, or all of it, and closes the connection."""
    body = json.dumps(rng.choice(known).body).encode()
    cut = rng.choice((len(body) // 2, len(body)))
    host, port = client.base_url.host, client.base_url.port
    _, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer soak\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body[:cut])
    await writer.drain()
    await asyncio.sleep(rng.random() / 4)
    writer.close()
    return "hung up"


async def embed(client: httpx.AsyncClient, rng: random.Random, known: list[Question], tally: Tally) -> str:
    answer = await client.post("/v1/embeddings", json={"model": "smollm2", "input": " ".join(rng.sample(WORDS, 12))})
    if end := await refused(answer, rng, tally):
        return end
    norm = sum(x * x for x in answer.json()["data"][0]["embedding"])
    if abs(norm - 1) > 1e-4:
        tally.wrong.append(f"an embedding of length {norm}")
    return "embedded"


async def misbehave(client: httpx.AsyncClient, rng: random.Random, known: list[Question], tally: Tally) -> str:
    """Requests that must be refused, each with its status."""
    body = rng.choice(known).body
    wrong: list[tuple[int, dict[str, Any]]] = [
        (400, {"content": b'{"messages": ['}),
        (400, {"json": body | {"temperature": 9}}),
        (400, {"json": body | {"tempreature": 1}}),
        (400, {"json": body | {"guided_regex": "(((" * 50}}),
        (400, {"json": {"messages": [{"role": "user", "content": "x" * 5000}]}}),
        (404, {"json": body | {"model": "nobody"}}),
        (413, {"content": b" " * (17 << 20)}),
        (401, {"json": body, "headers": {"Authorization": "Bearer wrong"}}),
    ]
    status, asked = rng.choices(wrong, [4, 4, 4, 4, 4, 4, 1, 4])[0]
    try:
        answer = await client.post("/v1/chat/completions", **asked)
    except (httpx.WriteError, httpx.ReadError):
        if status == 413:  # it may be refused, and the connection closed, before all of it was sent
            return "refused for good, as it should"
        raise
    if answer.status_code not in (status, 429):
        tally.wrong.append(f"{answer.status_code} and not {status}: {answer.text[:200]}")
    return "refused for good, as it should"


WAYS = {
    "whole": (5, whole),
    "stream": (6, stream),
    "leave": (3, leave),
    "hang up": (2, hang_up),
    "embed": (2, embed),
    "misbehave": (3, misbehave),
}


# ---- meanwhile ----


async def murder(client: httpx.AsyncClient, door: int, tally: Tally, every: float, end: float) -> None:
    """SIGKILL to one worker after another."""
    turn = 0
    while time.monotonic() + every / 2 < end:
        await asyncio.sleep(every / 2 if not turn else every)
        pids = workers(door)
        pid = pids[turn % len(pids)]
        turn += 1
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while await gauge(client, "workers_restarted") < turn or await gauge(client, "workers_ready") < 2:
            await asyncio.sleep(0.1)
        tally.recoveries.append(time.monotonic() - began)
        print(f"killed {pid}; two workers again after {tally.recoveries[-1]:.1f} s", flush=True)


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"litchi_{name} "))


def workers(door: int) -> list[int]:
    told = subprocess.run(["pgrep", "-P", str(door), "-f", "litchi.serve.member"], capture_output=True, text=True)
    return [int(word) for word in told.stdout.split()]


async def watch(door: int, tally: Tally) -> None:
    """What each process holds, every five seconds."""
    page, began = os.sysconf("SC_PAGE_SIZE") / 2**20, time.monotonic()
    while True:
        for pid in (door, *workers(door)):
            try:
                size = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
            except (OSError, IndexError):
                continue
            tally.memory.setdefault(pid, []).append((time.monotonic() - began, size))
        await asyncio.sleep(5)


# ---- afterwards ----


def report(tally: Tally, code: int, asked: argparse.Namespace) -> int:
    for name, count in sorted(tally.ends.items()):
        print(f"{count:8} {name}")
    for what in (*tally.lost[:20], *tally.wrong[:20]):
        print("  ", what)
    door = next(iter(tally.memory.values()))
    answered = sum(tally.ends[name] for name in ("answered whole", "answered in a stream"))
    slopes = [slope(rows) for rows in list(tally.memory.values())[1:] if len(rows) > 12]
    figures = {
        "answers compared": (answered, "equal in every log-probability"),
        "requests without an answer": (len(tally.lost), f"of {sum(tally.ends.values())}"),
        "answers that were wrong": (len(tally.wrong), f"of {answered}"),
        "workers killed": (len(tally.recoveries), f"in {asked.minutes:g} minutes, {asked.clients} clients"),
        "until two workers again, worst": (max(tally.recoveries, default=0), "s"),
        "longest silence of a stream": (max(tally.gaps, default=0), "s"),
        "longest silence of a stream, median": (statistics.median(tally.gaps), "s"),
        "wait for a whole answer, median": (statistics.median(tally.waits), "s"),
        "memory of the door grows by": (slope(door), f"MB a minute, of {door[-1][1]:.0f}"),
        "memory of a worker grows by, mean": (statistics.mean(slopes or [0.0]), "MB a minute"),
        "exit of the server": (code, "code"),
    }
    for name, (figure, unit) in figures.items():
        print(f"{name:40} {figure:10.3f} {unit}")
        if not asked.show:
            append("soak", name, figure, unit)
    return 1 if tally.lost or tally.wrong or code not in (0, -signal.SIGTERM) else 0


def slope(rows: list[tuple[float, float]]) -> float:
    """MB a minute, after what is filled once."""
    rows = rows[int(len(rows) * WARM) :]
    return 60 * statistics.linear_regression(*zip(*rows, strict=True)).slope if len(rows) > 2 else 0.0


if __name__ == "__main__":
    sys.exit(main())
