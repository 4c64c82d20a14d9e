"""The command line wires stages, which never meet each other: `litchi VERB RECIPE|CHECKPOINT [--set a.b=c]`.

Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from litchi.checkpoints import add_convert_arguments, convert, find_checkpoint
from litchi.config import BadInput, from_json, override, to_json
from litchi.layouts import (
    add_bench_arguments,
    add_plan_arguments,
    bench,
    certify,
    plan_layouts,
)
from litchi.schema.request import Request
from litchi.schema.sample import Image, Part, Role, Text

if TYPE_CHECKING:
    from litchi.envs.minigrid import Room
    from litchi.eval.board import Board
    from litchi.model.generate import Generator
    from litchi.model.network import ModelConfig
    from litchi.run import Run
    from litchi.schema.episode import Episode
    from litchi.schema.processor import Processor
    from litchi.schema.sample import Sample
    from litchi.serve.run import ServeConfig
    from litchi.train.run import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run keeps its files."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def train(self) -> Path:
        return self.folder / "train"

    @property
    def processor(self) -> Path:
        return self.folder / "processor"

    @property
    def eval(self) -> Path:
        return self.folder / "eval"


# ---- verbs --------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> int:
    """Run all stages of a small recipe, ask the result a question over HTTP, and show its board and its page."""
    from litchi.envs.rooms import check_rooms

    run, place = begin(args)
    check_rooms("serve.envs", run.serve.envs)
    make_data(run, place)
    checkpoint = make_checkpoint(run, place)
    with listening(run, checkpoint) as address:
        ask_something(address, run)
        make_board(run, checkpoint, place)
        print(f"The page: {address}")
        if sys.stdout.isatty():
            print("Open it in a browser; Ctrl-C ends.")
            threading.Event().wait()
    print(f"To open it again: {sys.argv[0]} serve {checkpoint}")
    return 0


def data(args: argparse.Namespace) -> int:
    """Make the shards of a recipe that are missing."""
    make_data(*begin(args))
    return 0


def train(args: argparse.Namespace) -> int:
    """Train a recipe on its shards, from where it stands; on several ranks, and again when one of them is lost."""
    from litchi.layouts import show_replay
    from litchi.train.launch import Launch, adopt_slurm, arguments, write
    from litchi.train.supervise import Plan, supervise

    adopt_slurm(os.environ)
    run, place = begin(args)
    command = arguments(args.recipe, args.settings, place.folder)
    if args.launch:
        launch = Launch(run.name, command, place.folder, args.nodes, args.gpus, args.ranks, args.restarts)
        print(write(launch, args.launch), end="")
        return 0
    if args.ranks and "RANK" not in os.environ:
        make_processor(run, place)
        plan = Plan(args.ranks, args.restarts)
        return supervise([sys.executable, "-m", "litchi.cli", *command], place.train, plan)
    if args.replay:
        from litchi.train.replay import replay

        return show_replay(replay(*training(run, place), args.replay))
    print(make_checkpoint(run, place))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Score a checkpoint (by default the newest of the recipe) on unseen worlds, from where it stands."""
    run, place = begin(args)
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint else last_checkpoint(place)
    board = make_board(run, checkpoint, place)
    if args.json:
        print(to_json(board))
    return 0


def board(args: argparse.Namespace) -> int:
    """Print the board of an evaluation."""
    from litchi.eval.board import markdown, show, show_details
    from litchi.eval.verify import load

    found = load(args.folder)
    if args.json or args.markdown:
        print(to_json(found) if args.json else markdown(found))
        return 0
    show(found)
    show_details(found)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Derive every figure of a board again from its receipts; 1 if any differs."""
    from litchi.eval.verify import load
    from litchi.eval.verify import verify as verify_board

    faults = verify_board(load(args.folder), args.folder)
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults" if faults else "every figure follows from its rows")
    return 1 if faults else 0


def serve(args: argparse.Namespace) -> int:
    """Open the door and the page for a checkpoint, by folder or by the name of one that is shipped."""
    from litchi.serve.spawn import early
    from litchi.serve.starting import import_door, starting

    checkpoint = find_checkpoint(args.checkpoint)
    with early(checkpoint, args.settings) as workers, starting(checkpoint) as check:
        from litchi.serve.loading import load_answerer
        from litchi.serve.run import run as serve_run

        config = serve_config(checkpoint, args.settings)
        check_envs(config, checkpoint)
        answerer = load_answerer(checkpoint, config, check, import_door, workers)
    if not answerer.processor.draws:
        config = replace(config, abilities=("see",) if answerer.processor.sees else (), side=0)
    serve_run(config, answerer, make_room)
    return 0


def check_envs(config: ServeConfig, checkpoint: Path) -> None:
    """Raises BadInput for a room that `make_room` cannot make, and for the extra if rooms are asked for without it.

    A model that others trained has none: it is served without the extra, and needs it only if rooms are named for it.
    """
    from litchi.serve.run import ServeConfig

    if (checkpoint / "run.json").is_file() or config.envs != ServeConfig().envs:
        from litchi.envs.rooms import check_rooms

        check_rooms("serve.envs", config.envs)


def make_room(env: str, seed: int) -> Room:
    """A simulator, which is imported with the first room that somebody wants."""
    from litchi.envs.minigrid import Room

    return Room(env)


def chat(args: argparse.Namespace) -> int:
    """Talk with a checkpoint in the terminal; one that sees is shown a picture first."""
    sampler = load_sampler(args.checkpoint)
    sees, own = sampler.processor.sees, not sampler.processor.draws
    parts: list[Part] = [first_picture(args, own=own)] if sees else []
    print(f"{'Ask about the picture' if sees else 'Say something'}; an empty line ends.")
    while question := ask("you> "):
        parts.append(Text(text=question, role=Role.USER))
        said = ""
        print("model> ", end="", flush=True)
        for delta in sampler.stream(Request(parts=tuple(parts))):
            said += delta.text
            print(delta.text, end="", flush=True)
            if isinstance(delta.part, Image):
                print(f"[drew {keep_picture(delta.part)}]", end="")
        print()
        parts.append(Text(text=said, role=Role.ASSISTANT))
    return 0


def plan(args: argparse.Namespace) -> int:
    """Foretell memory, time and cost of every layout of a model on a cluster, and say which is best."""
    from litchi.model.presets import PRESETS

    named = not args.cluster or args.preset in PRESETS
    return plan_layouts(args, None if named else load_run(args.preset, args.settings))


def act(args: argparse.Namespace) -> int:
    """Let a checkpoint act in the real simulator and say how often it succeeds."""
    from litchi.act.policy import Policy
    from litchi.act.run import run as act_run
    from litchi.envs.minigrid import SPACE, Room

    checkpoint = find_checkpoint(args.checkpoint)
    config = run_of(checkpoint, args.settings).act
    room = Room(config.env, "agent" if config.view == "agent" else "full")
    tally = act_run(config, room, Policy(load_sampler(checkpoint), SPACE, config.context_frames), lambda episode: None)
    print(f"{config.env}: {tally.successes} of {tally.episodes} episodes succeed, {tally.steps} steps")
    return 0


# ---- wiring -------------------------------------------------------------------------------------------------------


def make_data(run: Run, place: Place) -> None:
    """Make missing shards and say what is there."""
    from litchi.data.run import run as make

    manifest = make(run.data, place.data)
    print(f"data: {sum(manifest.counts.values())} samples in {len(manifest.shards)} shards, {place.data}")


def make_checkpoint(run: Run, place: Place) -> Path:
    """Fit the processor and train the network, each from where it stands."""
    from litchi.train.run import run as train_run

    return train_run(*training(run, place))


def training(run: Run, place: Place) -> tuple[TrainConfig, ModelConfig, Processor, Callable[[int], Sample], Path, str]:
    """What the training stage is told."""
    from litchi.data.loader import Loader, open_shelves

    processor = make_processor(run, place)
    model = replace(run.model, vocab_size=run.model.vocab_size or len(processor.tokenizer))
    samples = Loader(open_shelves(place.data, "train"), run.mixture, run.train.seed).at
    return run.train, model, processor, samples, place.train, to_json(run)


def make_processor(run: Run, place: Place, each: int = 2_000) -> Processor:
    """The processor of a run, fitted on the first samples of each source, by rank 0, unless it is there already."""
    from litchi.data.loader import open_shelves
    from litchi.model.weights import load_processor, save_processor
    from litchi.train.fit import fit_processor
    from litchi.train.watch import await_path

    if int(os.environ.get("RANK", "0")):
        await_path(place.processor)
    if not place.processor.exists():
        shelves = open_shelves(place.data, "train")
        first = (shelf[i] for shelf in shelves.values() for i in range(min(each, len(shelf))))
        draft = place.processor.with_name("processor.writing")
        if draft.exists():
            for path in draft.iterdir():
                path.unlink()
            draft.rmdir()
        save_processor(draft, fit_processor(run.fit, first, seed=run.train.seed))
        draft.rename(place.processor)
    return load_processor(place.processor)


def make_board(run: Run, checkpoint: Path, place: Place) -> Board:
    """Evaluate a checkpoint on the test split and in unseen worlds."""
    from litchi.act.policy import Policy, RandomAgent
    from litchi.act.run import play
    from litchi.data.loader import open_shelves
    from litchi.envs.minigrid import ACTIONS, SPACE, Room
    from litchi.eval.run import run as evaluate_run
    from litchi.schema.protocol import Agent

    sampler = load_sampler(checkpoint)

    def player(agent_for: Callable[[int], Agent]) -> Callable[[int], Episode]:
        room = Room(run.act.env, "agent" if run.act.view == "agent" else "full")
        return lambda seed: play(room, agent_for(seed), seed, run.act.max_steps)

    policy = Policy(sampler, SPACE, run.act.context_frames)
    return evaluate_run(
        run.eval,
        sampler,
        open_shelves(place.data, "test"),
        player(lambda seed: policy),
        player(lambda seed: RandomAgent(len(ACTIONS), seed, SPACE)),
        place.eval / checkpoint.name,
        train=open_shelves(place.data, "train"),
        model=checkpoint.name,
    )


def load_sampler(checkpoint: str | Path) -> Generator:
    """A checkpoint as a sampler, by path or by the name of one that is shipped."""
    from litchi.model.generate import Generator
    from litchi.model.weights import load

    loaded = load(find_checkpoint(checkpoint))
    return Generator(loaded.model, loaded.processor)


def run_of(checkpoint: Path, settings: Sequence[str]) -> Run:
    """The Run that wrote a checkpoint, with settings applied."""
    from litchi.run import Run

    path = checkpoint / "run.json"
    if not path.is_file():
        raise BadInput(f"{path} is missing: copy the checkpoint again")
    run = from_json(Run, path.read_text(encoding="utf-8"))
    for setting in settings:
        run = override(run, setting)
    return run


def serve_config(checkpoint: Path, settings: Sequence[str]) -> ServeConfig:
    """The door of the Run that wrote a checkpoint, or a plain one for a model that others trained."""
    if (checkpoint / "run.json").is_file():
        return run_of(checkpoint, settings).serve
    from litchi.serve.run import Door, ServeConfig

    door = Door(ServeConfig(model=checkpoint.name))
    for setting in settings:
        door = override(door, setting)
    return door.serve


def last_checkpoint(place: Place) -> Path:
    from litchi.train.run import newest_checkpoint

    found = newest_checkpoint(place.train)
    if found is None:
        raise BadInput(f"nothing trained in {place.train}: run `litchi train` first, or name a --checkpoint")
    return found


@contextmanager
def listening(run: Run, checkpoint: Path) -> Iterator[str]:
    """The address of a server on a checkpoint, while the block runs."""
    from litchi.serve.loading import load_engine
    from litchi.serve.run import background

    with background(run.serve, load_engine(checkpoint, run.serve), make_room) as address:
        yield address


def ask_something(address: str, run: Run) -> None:
    """One question about an unseen room, through the door as anyone's would go."""
    from litchi.client import HttpSampler
    from litchi.envs.minigrid import HELD_OUT, Room

    room = Room(run.serve.envs[0])
    picture = room.reset(HELD_OUT + 7)[0]
    question = "Where is the agent?"
    parts = (replace(picture, role=Role.USER), Text(text=question, role=Role.USER))
    answer = HttpSampler(address).complete(Request(parts=parts))
    row, column, _ = room.scene.agent
    print(f"Asked over HTTP: {question}  Answer: {answer.text}  (It is at row {row}, column {column}.)")


# ---- words --------------------------------------------------------------------------------------------------------


def load_run(recipe: str, settings: Sequence[str]) -> Run:
    """The Run that a recipe returns ("recipes.tiny", "recipes.tiny:demo"), with dotted settings applied."""
    name, _, function = recipe.partition(":")
    name = name if name.startswith("recipes.") else f"recipes.{name}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        known = ", ".join(sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if p.stem != "__init__"))
        raise BadInput(f"no recipe {recipe!r}; the recipes are: {known}") from error
    maker = getattr(module, function or "run", None)
    if maker is None:
        hint = "" if function else f"; python -m {name} --help says how it is run"
        raise BadInput(f"{name} has no function {function or 'run'!r}{hint}")
    run = maker()
    for setting in settings:
        run = override(run, setting)
    return run


def begin(args: argparse.Namespace) -> tuple[Run, Place]:
    """The Run and the folder that the arguments name."""
    run = load_run(args.recipe, args.settings)
    place = Place(args.folder or Path("runs") / run.name)
    place.folder.mkdir(parents=True, exist_ok=True)
    return run, place


def first_picture(args: argparse.Namespace, *, own: bool) -> Image:
    """The picture that `chat` is about: a file, in its own size or in that of a room, or an unseen room."""
    from litchi.envs.minigrid import HELD_OUT, Room

    if args.image is None:
        picture = Room().reset(HELD_OUT + args.seed)[0]
        assert isinstance(picture, Image)
        picture = replace(picture, role=Role.USER)
        print(f"A room: {keep_picture(picture)}")
        return picture
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with Pillow.open(args.image) as opened:
            paper = Pillow.new("RGBA", opened.size, "white")  # as the server lays what is transparent
            flat = Pillow.alpha_composite(paper, opened.convert("RGBA")).convert("RGB")
            pixels = np.asarray(flat if own else flat.resize((64, 64), Pillow.Resampling.NEAREST))
    except (UnidentifiedImageError, OSError) as error:
        raise BadInput(f"{args.image} is not a picture that can be read ({error}): give a PNG or JPEG file") from error
    return Image(pixels=pixels, role=Role.USER)


def keep_picture(image: Image) -> Path:
    from PIL import Image as Pillow

    path = Path(tempfile.mkdtemp(prefix="litchi-")) / "picture.png"
    Pillow.fromarray(image.pixels).resize((512, 512), Pillow.Resampling.NEAREST).save(path)
    return path


def ask(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="litchi", description="The whole life of a multimodal model.")
    top.set_defaults(settings=[])
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, function: Callable[[argparse.Namespace], int], *, settings: bool = True
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=(function.__doc__ or "").split("\n")[0], description=function.__doc__)
        sub.set_defaults(function=function)
        if settings:
            words = "change one setting"
            sub.add_argument("--set", dest="settings", action="append", default=[], metavar="a.b=c", help=words)
        return sub

    for name, function, recipe in (
        ("demo", demo, "tiny:demo"),
        ("data", data, ""),
        ("train", train, ""),
        ("eval", evaluate, ""),
    ):
        sub = verb(name, function)
        words = "module of recipes, or module:function"
        sub.add_argument("recipe", nargs="?" if recipe else None, default=recipe, help=words)
        sub.add_argument("--folder", type=Path, help="where the run keeps its files (default runs/NAME)")
        if name == "train":
            sub.add_argument("--ranks", type=int, default=0, help="processes on this machine, or on each with --launch")
            sub.add_argument("--restarts", type=int, default=3, help="in a row that bring no new step (default 3)")
            sub.add_argument("--replay", type=int, metavar="STEP", help="take a step of the run again, on this machine")
            sub.add_argument("--launch", choices=("slurm", "kubernetes"), help="print what starts the run there")
            sub.add_argument("--nodes", type=int, default=1, help="machines, with --launch")
            sub.add_argument("--gpus", type=int, default=0, help="of each machine, with --launch; none is CPUs")
        if name == "eval":
            sub.add_argument("--checkpoint", help="a folder, or the name of a shipped checkpoint")
            sub.add_argument("--json", action="store_true", help="print the board as JSON")
    for name, function in (("board", board), ("verify", verify)):
        sub = verb(name, function, settings=False)
        sub.add_argument("folder", type=Path, help="the folder of an evaluation, such as runs/tiny/eval")
        if name == "board":
            sub.add_argument("--json", action="store_true")
            sub.add_argument("--markdown", action="store_true")
    for name, function in (("serve", serve), ("chat", chat), ("act", act)):
        sub = verb(name, function, settings=name != "chat")
        sub.add_argument("checkpoint", nargs="?", default="tiny", help="a folder, or the name of a shipped checkpoint")
        if name == "chat":
            sub.add_argument("--image", type=Path, help="a picture; without it an unseen room")
            sub.add_argument("--seed", type=int, default=0, help="which unseen room")
    add_convert_arguments(verb("convert", convert, settings=False))
    sub = verb("certify", certify, settings=False)
    sub.add_argument("case", nargs="?", default="", help="only layouts with this in their name, such as pipeline")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--markdown", action="store_true", help="one row a layout, as in docs/layouts.md")
    add_plan_arguments(verb("plan", plan))
    add_bench_arguments(verb("bench", bench, settings=False))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run a verb, and turn bad input into one line and exit code 2."""
    args = parser().parse_args(argv)
    try:
        return args.function(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
