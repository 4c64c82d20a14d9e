"""How many frames a second a visitor of a dreamed room gets, through the door, and whether going back is exact.

    python bench/worlds.py

The tiny checkpoint, its engine and a real socket on loopback: actions one after another, each answered by the dreamed
frame and the real one. Then back to the first moment, the same actions again, and every frame must be the same.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time

from websockets.sync.client import connect

from bench.row import append
from litchi.cli import find_checkpoint, serve_config
from litchi.envs.minigrid import ACTIONS, Room
from litchi.serve.loading import load_engine
from litchi.serve.run import background

STEPS = 200


def main() -> int:
    checkpoint = find_checkpoint("tiny")
    config = serve_config(checkpoint, ["serve.port=0"])
    actions = random.Random(0).choices(ACTIONS[:3], k=STEPS)
    with background(config, load_engine(checkpoint, config), lambda env, seed: Room(env)) as address:
        with connect(address.replace("http", "ws") + "v1/worlds", max_size=None) as socket:
            ask(socket, {"type": "start", "seed": 3})
            first = [timed(socket, action) for action in actions]
            ask(socket, {"type": "rewind", "step": 0})
            again = [timed(socket, action) for action in actions]
    seconds = sorted(s for s, _ in first)
    append("worlds", "frames of a dreamed room through the door", STEPS / sum(seconds), "frames/s")
    append("worlds", "one frame, median", 1000 * statistics.median(seconds), "ms")
    append("worlds", "one frame, 99 of 100 within", 1000 * seconds[int(0.99 * STEPS)], "ms")
    same = sum(a == b for (_, a), (_, b) in zip(first, again, strict=True))
    append("worlds", "frames that are the same after going back", same, "frames", peer="frames", peer_figure=STEPS)
    return 0 if same == STEPS else 1


def timed(socket, action: str) -> tuple[float, str]:
    began = time.perf_counter()
    answer = ask(socket, {"type": "action", "action": action})
    return time.perf_counter() - began, answer["dream"]


def ask(socket, message: dict) -> dict:
    socket.send(json.dumps(message))
    answer = json.loads(socket.recv())
    assert answer["type"] == "frame", answer
    return answer


if __name__ == "__main__":
    sys.exit(main())
