"""An evaluation: ask every item of six abilities, keep a receipt of each answer, and read the board off the receipts.

Killed at any point, the same call goes on with the first item that has no receipt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from litchi.config import BadInput, to_json
from litchi.envs.minigrid import HELD_OUT
from litchi.eval.board import Board, Row, show
from litchi.eval.item import Task, figures, measure, p_value, scored
from litchi.eval.receipt import Rows, file_digest, read_rows
from litchi.eval.statistics import holm
from litchi.eval.tasks.act import Play, act
from litchi.eval.tasks.describe import describe
from litchi.eval.tasks.draw import draw
from litchi.eval.tasks.foresee import foresee
from litchi.eval.tasks.talk import talk
from litchi.eval.tasks.watch import watch
from litchi.record import Progress, replace_text
from litchi.schema.protocol import Sampler
from litchi.schema.sample import Sample

ABILITIES = ("talk", "describe", "draw", "foresee", "watch", "act")

Samples = Mapping[str, Sequence[Sample]]


@dataclass(frozen=True, slots=True)
class Bars:
    """What a headline must reach; None asks for nothing. Those given are our pilot's frames and BabyAI 1.1's policy."""

    talk: float | None = None
    describe: float | None = None
    draw: float | None = None
    foresee: float | None = 0.949
    watch: float | None = None
    act: float | None = 0.993


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """How much is asked of each ability: samples of the test split, and episodes for "act"."""

    abilities: tuple[str, ...] = ABILITIES
    talk: int = 256
    """Dialogues, of 5 to 7 questions each."""
    describe: int = 512
    draw: int = 1024
    """Prompts; layouts are among them."""
    foresee: int = 64
    """Rollouts, of 20 steps each."""
    watch: int = 512
    act: int = 512
    """Episodes."""
    first_seed: int = HELD_OUT
    """Seeds of the episodes run on from here."""
    drift_steps: int = 20
    """Steps of a dream; 0 leaves dreams out."""
    context_frames: int = 1
    """Frames that a request to foresee shows; 0 shows the whole history. One frame is the whole state of a room."""
    free_dialogues: int = 64
    """Dialogues that are also led with the model's own answers as history."""
    baseline_samples: int = 10_000
    """Training samples that the baselines of "talk" and "watch" are fitted on, at most."""
    bars: Bars = field(default_factory=Bars)


def run(
    config: EvalConfig,
    sampler: Sampler,
    samples: Samples,
    play: Play,
    random_play: Play,
    folder: Path,
    *,
    train: Samples | None = None,
    model: str = "",
) -> Board:
    """Evaluate a sampler and print the board, which is also written to `folder`/board.json.

    `samples` are of the test split, by ability. `train` fits the baselines that only count words; without it they are
    fitted on the test samples, to their advantage. `model` names what is measured. Raises BadInput if an ability has
    no samples, or if the folder holds an evaluation of something else.
    """
    tasks = bind(config, samples, train or {}, play, random_play)
    claim(folder, config, model)
    for task in tasks:
        answer(task, sampler, folder)
    board = tally(config, model, tasks, folder)
    replace_text(folder / "board.json", to_json(board))
    show(board)
    return board


def bind(config: EvalConfig, samples: Samples, train: Samples, play: Play, random_play: Play) -> list[Task]:
    """The tasks of a config on the first samples of each ability."""
    for name in config.abilities:
        if name not in ABILITIES:
            raise BadInput(f"unknown ability {name!r}; choose among {', '.join(ABILITIES)}")
        if name != "act" and not samples.get(name):
            raise BadInput(f"no test samples of {name!r}: write its test shards, or leave it out of abilities")
    return [make(name, config, samples, train, play, random_play) for name in config.abilities]


def make(name: str, config: EvalConfig, samples: Samples, train: Samples, play: Play, random_play: Play) -> Task:
    """One task; without samples it can still score rows and read figures off them."""
    chosen = samples.get(name, ())[: getattr(config, name)]
    # One at a time: ten thousand films at once would not fit in memory.
    learned = islice(train[name], config.baseline_samples) if train.get(name) else ()
    match name:
        case "talk":
            return talk(chosen, learned, config.free_dialogues)
        case "describe":
            return describe(chosen)
        case "draw":
            return draw(chosen)
        case "foresee":
            return foresee(chosen, config.drift_steps, config.context_frames)
        case "watch":
            return watch(chosen, learned)
        case _:
            return act(range(config.first_seed, config.first_seed + config.act), play, random_play)


def claim(folder: Path, config: EvalConfig, model: str) -> None:
    """Say whose evaluation lies in a folder, or find that it is this one. Bars may move, questions may not."""
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / "eval.json", to_json(Claim(model, replace(config, bars=Bars())))
    if path.exists() and path.read_text(encoding="utf-8") != mine:
        raise BadInput(
            f"{folder} holds another evaluation (see eval.json): give an empty folder, or the same config and model"
        )
    replace_text(path, mine)


@dataclass(frozen=True, slots=True)
class Claim:
    model: str
    config: EvalConfig


def answer(task: Task, sampler: Sampler, folder: Path) -> None:
    """Ask what has no receipt yet, one item after the other."""
    rows = Rows(folder / f"{task.name}.jsonl")
    items = list(task.items())
    left = [item for item in items if rows.find(item) is None]
    with Progress(len(items), f"eval {task.name}", done=len(items) - len(left)) as progress:
        for item in left:
            rows.add(scored(task, item, item.ask(sampler)))
            progress.advance(1)


def tally(config: EvalConfig, model: str, tasks: Sequence[Task], folder: Path) -> Board:
    """The board that the receipts in a folder give: it asks nothing, so that `verify` may call it."""
    answered = [read_rows(folder / f"{task.name}.jsonl") for task in tasks]
    chances = holm([p_value(task.headline, rows) for task, rows in zip(tasks, answered, strict=True)])
    board = []
    for task, rows, p in zip(tasks, answered, chances, strict=True):
        head = task.headline
        [score], [baseline] = measure(head.figure, rows), measure(head.baseline, rows)
        baseline = replace(baseline, name=head.baseline_name)
        bar, digest = getattr(config.bars, task.name), file_digest(folder / f"{task.name}.jsonl")
        board.append(Row(task.name, score, baseline, p, bar, head.note, tuple(figures(task, rows)), digest))
    return Board(model, to_json(config), tuple(board))
