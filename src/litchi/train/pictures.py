"""Sample pictures while a model trains: what it draws from words, and what it foresees, beside the true pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from litchi.model.generate import Generator
from litchi.model.weights import load
from litchi.schema.processor import Processor
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Image, Role, Sample
from litchi.train.batches import Samples

SEARCHED = 400
"""Samples looked through for something to draw."""


class Pictures:
    """Keeps a few samples that end in a picture to draw; the rest of each is the prompt. If `silent`, draws nothing."""

    def __init__(
        self, folder: Path, processor: Processor, samples: Samples, count: int = 8, *, silent: bool = False
    ) -> None:
        self.folder, self.silent = folder / "pictures", silent
        found = [s for s in map(samples, range(SEARCHED)) if processor.draws and drawable(s)]
        drawn = [s for s in found if s.parts[-1].role is Role.ASSISTANT][:count]
        foreseen = [s for s in found if s.parts[-1].role is not Role.ASSISTANT][:count]
        self.samples = drawn + foreseen

    def draw(self, checkpoint: Path, step: int) -> None:
        """One row a sample: the true picture, and the model's."""
        if not self.samples or self.silent:
            return
        loaded = load(checkpoint, check=False)
        generator = Generator(loaded.model, loaded.processor)
        pairs = [np.concatenate([s.parts[-1].pixels, self.answer(generator, s).pixels]) for s in self.samples]
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = np.concatenate(pairs, axis=1).repeat(3, 0).repeat(3, 1)
        Pillow.fromarray(sheet).save(self.folder / f"step_{step:07d}.png")

    def answer(self, generator: Generator, sample: Sample) -> Image:
        truth = sample.parts[-1]
        want = "image" if truth.role is Role.ASSISTANT else "frame"
        height, width = truth.pixels.shape[:2]
        params = SamplingParams(temperature=1.0 if want == "image" else 0.0)
        request = Request(parts=sample.parts[:-1], want=want, params=params, height=height, width=width)
        drawn = generator.complete(request).parts[0]
        assert isinstance(drawn, Image)
        return drawn


def drawable(sample: Sample) -> bool:
    last = sample.parts[-1]
    return isinstance(last, Image) and last.weight > 0
