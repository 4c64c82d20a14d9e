"""Draw: a prompt becomes a picture, the picture is read back as a scene, and the scene must be what was asked for.

The six categories and the mean over them are GenEval's (D. Ghosh et al., NeurIPS 2023), on rooms instead of
photographs: figures are not comparable with GenEval's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from litchi.envs.scene import read, satisfies
from litchi.eval.item import Figure, Headline, Item, Json, Task
from litchi.eval.receipt import drawn, question, shown
from litchi.schema.digest import picture_pixels, picture_text
from litchi.schema.request import DRAWING, Request
from litchi.schema.sample import Image, Role, Sample

LAYOUT = "layout"
"""The category that gives every place; it is harder and easier in other ways than GenEval's, so it is told apart."""

HEADLINE = Headline(
    Figure("pictures as asked", "right", over="mean"),
    Figure("pictures as asked", "other", over="mean"),
    "true picture of another prompt",
    "mean over the six categories; layouts apart",
)
DETAILS = (
    Figure("by category", "right", over="each"),
    Figure("baseline by category", "other", over="each"),
    Figure("layout", "right", part=LAYOUT),
    Figure("readable as a room", "readable"),
    Figure("true pictures that satisfy their prompt", "reference"),
)


def draw(samples: Sequence[Sample]) -> Task:
    """The task; the truth that a sample holds is drawn only to check the scorer, and for the baseline."""
    others = {s.key: picture_text(picture(samples[i - 1]).pixels) for i, s in enumerate(samples)}

    def prompt(sample: Sample) -> Iterator[Item]:
        asked = tuple(takewhile(lambda part: part.role is not Role.ASSISTANT, shown(sample.parts)))
        true = picture(sample)
        category, wanted = sample.meta["category"], sample.meta["wanted"]
        truth = {"wanted": wanted, "picture": picture_text(true.pixels), "other": others[sample.key]}
        height, width = true.pixels.shape[:2]
        request = Request(parts=asked, want="image", params=DRAWING, height=height, width=width)
        yield question(sample, request, truth, drawn, part=LAYOUT if category == LAYOUT else "", kind=category)

    return Task("draw", samples, prompt, score, HEADLINE, DETAILS)


def score(part: str, truth: Json, answer: Json) -> dict[str, float]:
    pictures = {"right": answer, "reference": truth["picture"], "other": truth["other"]}
    scenes = {name: read(picture_pixels(text)) if text else None for name, text in pictures.items()}
    hits = {name: float(satisfies(scene, truth["wanted"])) for name, scene in scenes.items()}
    return hits | {"readable": float(scenes["right"] is not None), "n": 1.0}


def picture(sample: Sample) -> Image:
    return next(part for part in sample.parts if isinstance(part, Image) and part.role is Role.ASSISTANT)
