"""NLVR: a sentence that a person wrote and a picture of three boxes; is it true?

A. Suhr et al. (ACL 2017), CC BY 4.0; the files of github.com/lil-lab/nlvr, the pictures of a split in a zip. Only `dev`
and `test` are read. **There is no train split here: `dev` may be trained on, `test` is only ever evaluated.** Who
trains on `dev` must say so beside any figure, and cannot tune on it as well; `meta["directory"]` are its six folds.
Beside a figure belongs the majority: always "true" is right for 547 of 989 examples of dev and 556 of 990 of test. 25
sentences stand in both, whatever their spelling, and cover 125 of the 990; 34 scenes do, whatever the order of boxes.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from litchi.config import BadInput
from litchi.data.boxes import are_towers, as_data, read_boxes
from litchi.schema.sample import Image, Role, Sample, Text

Part = Literal["dev", "test"]

ASK = "{} True or false?"
ANSWERS = {True: "true", False: "false"}
NUM_ORDERS = 6
"""The pictures of an example: its three boxes in every order."""


def nlvr_samples(folder: Path, part: Part, orders: Sequence[int] = (0,)) -> Iterator[Sample]:
    """Each example with these of its six orders of boxes, one after another: a picture is 120 kB in memory.

    Published accuracy is over all six. `meta` holds the identifier, the fold, and the boxes in the order of the first
    picture. Raises BadInput for files that are missing or broken, and for an order that is none.
    """
    if not orders or not set(orders) <= set(range(NUM_ORDERS)):
        raise BadInput(f"NLVR has the orders 0 to {NUM_ORDERS - 1} of boxes, not {list(orders)}")
    examples = read_examples(folder / f"{part}.json")
    path = folder / f"{part}_images.zip"
    try:
        with zipfile.ZipFile(path) as archive:
            for example in examples:
                for order in orders:
                    yield sample(example, part, order, read_picture(archive, example, part, order))
    except (OSError, KeyError, zipfile.BadZipFile, UnidentifiedImageError) as error:
        raise BadInput(f"{path} cannot be read ({error}): zip nlvr/{part}/images as {part}/images/") from error


def read_examples(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        examples = [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}): take it from github.com/lil-lab/nlvr") from error
    fields = {"sentence", "identifier", "directory", "label", "structured_rep"}
    if not examples or not all(isinstance(example, dict) and fields <= example.keys() for example in examples):
        raise BadInput(f"{path}: a line lacks one of {', '.join(sorted(fields))}: take it from github.com/lil-lab/nlvr")
    return examples


def read_picture(archive: zipfile.ZipFile, example: Mapping, part: Part, order: int) -> UInt8[np.ndarray, "h w 3"]:
    name = f"{part}/images/{example['directory']}/{part}-{example['identifier']}-{order}.png"
    return np.array(Picture.open(BytesIO(archive.read(name))).convert("RGB"))


def sample(example: Mapping, part: Part, order: int, pixels: UInt8[np.ndarray, "h w 3"]) -> Sample:
    boxes = read_boxes(example["structured_rep"])
    facts = {name: example[name] for name in ("identifier", "directory")} | {"order": order, "boxes": as_data(boxes)}
    key = f"nlvr-{part}-{example['identifier']}-{order}"
    kind = "towers" if are_towers(boxes) else "loose"
    return judged(pixels, example["sentence"], example["label"] == "true", Sample((), key, "nlvr", facts), kind)


def judged(pixels: UInt8[np.ndarray, "h w 3"], sentence: str, truth: bool, about: Sample, kind: str) -> Sample:
    """Picture, sentence, verdict; the verdict is learned. `about` gives the key, the source and the facts.

    `meta["turns"]` is one turn as `eval.tasks.talk` reads it.
    """
    question = ASK.format(sentence.strip().rstrip(".") + ".")
    parts = (
        Image(pixels=pixels, role=Role.USER),
        Text(text=question, role=Role.USER),
        Text(text=ANSWERS[truth], role=Role.ASSISTANT, weight=1.0),
    )
    turn = {"kind": kind, "question": question, "answer": ANSWERS[truth]}
    return Sample(parts, about.key, about.source, {"turns": [turn], "sentence": sentence, **about.meta})
