"""Foresee: the next frame under an action, tile by tile; how long dreams stay true; whether the action matters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, UInt8

from litchi.envs.scene import TOLERANCE
from litchi.envs.tiles import TILE
from litchi.eval.item import Figure, Headline, Item, Json, Task
from litchi.eval.receipt import drawn, shown
from litchi.schema.digest import digest, picture_pixels, picture_text
from litchi.schema.protocol import Sampler
from litchi.schema.request import Request
from litchi.schema.sample import Action, Image, Part, Sample

Pixels = UInt8[np.ndarray, "h w 3"]

SHIFT_EVERY = 5
"""Of how many steps one is also asked with the neighbouring step's action."""

HEADLINE = Headline(
    Figure("frames exact", "exact"),
    Figure("frames exact", "copy"),
    "copy of the current frame",
    "from the true current frame, random actions; every tile as scene.read tells tiles apart",
)


def details(drift_steps: int) -> tuple[Figure, ...]:
    steps = range(1, drift_steps + 1)
    return (
        Figure("changed tiles right", "changed_right", "changed"),
        Figure("all tiles right", "tiles_right", "tiles"),
        Figure("frames equal in every pixel", "equal"),
        Figure("by action", "exact", over="each"),
        Figure("copy by action", "copy", over="each"),
        Figure("frames where something changed exact", "moved_exact", "moved"),
        Figure("action sensitivity", "broken", "shifted"),
        *(Figure(f"drift: step {k} exact", f"exact@{k}", part="drift") for k in steps),
        *(Figure(f"drift: exact up to step {k}", f"alive@{k}", part="drift") for k in steps),
        Figure("drift: steps before divergence", "before_divergence", part="drift", share=False),
    )


def foresee(samples: Sequence[Sample], drift_steps: int = 20, context_frames: int = 1) -> Task:
    """The task. A request shows the last `context_frames` frames and the actions between; 0 shows all."""

    def prompt(sample: Sample) -> Iterator[Item]:
        parts = shown(sample.parts)
        pairs = enumerate(zip(parts, parts[1:], strict=False))
        places = [i for i, (a, b) in pairs if isinstance(a, Action) and isinstance(b, Image)]
        for number in range(len(places)):
            yield step(sample, parts, places, number, context_frames)
        if drift_steps and len(places) >= drift_steps:
            yield dream(sample, parts, places[:drift_steps], context_frames)

    return Task("foresee", samples, prompt, score, HEADLINE, details(drift_steps))


def step(sample: Sample, parts: tuple[Part, ...], places: Sequence[int], number: int, context_frames: int) -> Item:
    """One transition. Some that change the frame are asked a second time with the action of the neighbouring step."""
    place = places[number]
    before, action, after = parts[place - 1 : place + 2]
    other = parts[places[number + 1] if number + 1 < len(places) else places[number - 1]]
    asked = request(parts[: place + 1], context_frames)
    shift = number % SHIFT_EVERY == 0 and index(action) != index(other) and not exact(before.pixels, after.pixels)
    neighbour = replace(asked, parts=(*asked.parts[:-1], other))

    def ask(sampler: Sampler) -> Json:
        frame = drawn(sampler.complete(asked))
        return {"frame": frame, "shifted": drawn(sampler.complete(neighbour)) if shift else None}

    truth = {"before": picture_text(before.pixels), "after": picture_text(after.pixels), "shift": shift}
    key = f"{sample.key}/{number:02d}"
    return Item(key, sample.key, digest(asked), truth, ask, kind=f"action {index(action)}")


def dream(sample: Sample, parts: tuple[Part, ...], places: Sequence[int], context_frames: int) -> Item:
    """Frame after frame on the model's own frames, from the true first one under the true actions."""

    def ask(sampler: Sampler) -> Json:
        own, frames = list(parts), []
        for place in places:
            frames.append(drawn(sampler.complete(request(tuple(own[: place + 1]), context_frames))))
            if frames[-1] is None:
                break
            own[place + 1] = Image(pixels=picture_pixels(frames[-1]))
        return frames

    truth = [picture_text(parts[place + 1].pixels) for place in places]
    return Item(f"{sample.key}/drift", sample.key, digest(request(parts, 0)), truth, ask, part="drift")


def request(parts: tuple[Part, ...], context_frames: int) -> Request:
    """The next frame after parts that end with an action."""
    frames = [i for i, part in enumerate(parts) if isinstance(part, Image)]
    start = frames[-context_frames] if 0 < context_frames <= len(frames) else frames[0]
    height, width = parts[start].pixels.shape[:2]
    return Request(parts=(*parts[: frames[0]], *parts[start:]), want="frame", height=height, width=width)


def score(part: str, truth: Json, answer: Json) -> dict[str, float]:
    return score_dream(truth, answer) if part == "drift" else score_step(truth, answer)


def score_step(truth: Json, answer: Json) -> dict[str, float]:
    before, after = picture_pixels(truth["before"]), picture_pixels(truth["after"])
    changed = ~same_tiles(before, after)
    frame = picture_pixels(answer["frame"]) if answer["frame"] else None
    right = same_tiles(frame, after)
    hit, moved = bool(right.all()), bool(changed.any())
    shifted = truth["shift"] and hit
    broken = shifted and not exact(picture_pixels(answer["shifted"]) if answer["shifted"] else None, after)
    values = {
        "exact": hit,
        "equal": frame is not None and np.array_equal(frame, after),
        "copy": not moved,
        "tiles_right": right.sum(),
        "tiles": right.size,
        "changed_right": (right & changed).sum(),
        "changed": changed.sum(),
        "moved_exact": hit and moved,
        "moved": moved,
        "shifted": shifted,
        "broken": broken,
        "n": 1,
    }
    return {name: float(value) for name, value in values.items()}


def score_dream(truth: Json, answer: Json) -> dict[str, float]:
    """`exact@k`: step k is right; `alive@k`: so was every step before it."""
    pairs = zip(truth, [*answer, *[None] * (len(truth) - len(answer))], strict=True)
    hits = [exact(picture_pixels(mine) if mine else None, picture_pixels(true)) for true, mine in pairs]
    alive = [all(hits[:k]) for k in range(1, len(hits) + 1)]
    values = {"n": 1.0, "before_divergence": float(sum(alive))}
    for k, (hit, lives) in enumerate(zip(hits, alive, strict=True), 1):
        values |= {f"exact@{k}": float(hit), f"alive@{k}": float(lives)}
    return values


def exact(frame: Pixels | None, truth: Pixels) -> bool:
    return bool(same_tiles(frame, truth).all())


def same_tiles(frame: Pixels | None, truth: Pixels) -> Bool[np.ndarray, "h/8 w/8"]:
    """Which 8x8 tiles show the same, by the distance at which `scene.read` gives a tile up; none if sizes differ."""
    rows, columns = truth.shape[0] // TILE, truth.shape[1] // TILE
    if frame is None or frame.shape != truth.shape:
        return np.zeros((rows, columns), bool)
    distance = np.abs(frame.astype(np.int16) - truth.astype(np.int16))
    return distance.reshape(rows, TILE, columns, TILE, 3).mean(axis=(1, 3, 4)) <= TOLERANCE


def index(action: Part) -> int:
    assert isinstance(action, Action)
    return int(action.values[0, 0])
