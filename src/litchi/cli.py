"""The surface: `litchi VERB RECIPE|CHECKPOINT [--set a.b=c]`. It wires stages, which never meet each other.

Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from litchi.config import BadInput, from_json, override, to_json

if TYPE_CHECKING:
    from litchi.eval.board import Board
    from litchi.model.generate import Generator
    from litchi.run import Run
    from litchi.schema.episode import Episode
    from litchi.schema.processor import Processor
    from litchi.schema.sample import Sample

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "checkpoints"
"""Checkpoints that come with the repository, by name."""


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


def demo(run: Run, place: Place, args: argparse.Namespace) -> int:
    """All stages of a small run, and then the page."""
    make_data(run, place)
    checkpoint = make_checkpoint(run, place)
    board = make_board(run, checkpoint, place)
    greet(checkpoint)
    del board
    if args.stay:
        serve_checkpoint(run, checkpoint)
    else:
        print(f"To talk, draw and play with it in a browser: litchi serve {checkpoint}")
    return 0


def data(run: Run, place: Place, args: argparse.Namespace) -> int:
    """Make the shards of a run."""
    make_data(run, place)
    return 0


def train(run: Run, place: Place, args: argparse.Namespace) -> int:
    """Train a run on its shards, from where it stands."""
    print(make_checkpoint(run, place))
    return 0


def evaluate(run: Run, place: Place, args: argparse.Namespace) -> int:
    """Score a checkpoint on unseen worlds."""
    from litchi.train.run import newest_checkpoint

    checkpoint = args.checkpoint or newest_checkpoint(place.train)
    if checkpoint is None:
        raise BadInput(f"nothing trained in {place.train}: run `litchi train` first, or name a --checkpoint")
    board = make_board(run, Path(checkpoint), place)
    if args.json:
        print(to_json(board))
    return 0


def serve(run: Run, place: Place, args: argparse.Namespace) -> int:
    """Open the door and the page."""
    serve_checkpoint(run, place.folder)
    return 0


COMMANDS: dict[str, Callable[[Run, Place, argparse.Namespace], int]] = {
    "demo": demo,
    "data": data,
    "train": train,
    "eval": evaluate,
}


# ---- wiring -------------------------------------------------------------------------------------------------------


def make_data(run: Run, place: Place) -> None:
    """Make missing shards and say what is there."""
    from litchi.data.run import run as make

    manifest = make(run.data, place.data)
    print(f"data: {sum(manifest.counts.values())} samples in {len(manifest.shards)} shards, {place.data}")


def make_checkpoint(run: Run, place: Place) -> Path:
    """Fit the processor and train the network, each from where it stands."""
    from litchi.data.loader import Loader, open_shelves
    from litchi.train.run import run as train_run

    shelves = open_shelves(place.data, "train")
    processor = make_processor(run, place, shelves)
    model = replace(run.model, vocab_size=run.model.vocab_size or len(processor.tokenizer))
    samples = Loader(shelves, run.mixture, run.train.seed).at
    return train_run(run.train, model, processor, samples, place.train, to_json(run))


def make_processor(run: Run, place: Place, shelves: Mapping[str, Sequence[Sample]], each: int = 2_000) -> Processor:
    """The processor of a run, fitted on the first samples of each source unless it is there already."""
    from litchi.model.weights import load_processor, save_processor
    from litchi.train.fit import fit_processor

    if not place.processor.exists():
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
        place.eval,
        train=open_shelves(place.data, "train"),
        model=checkpoint.name,
    )


def load_sampler(checkpoint: str | Path) -> Generator:
    """A checkpoint as a sampler, by path or by the name of one that is shipped."""
    from litchi.model.generate import Generator
    from litchi.model.weights import load

    loaded = load(find_checkpoint(checkpoint))
    return Generator(loaded.model, loaded.processor)


def find_checkpoint(name: str | Path) -> Path:
    """Raises BadInput naming the shipped ones if there is nothing at `name`."""
    for path in (Path(name), SHIPPED / str(name)):
        if (path / "meta.json").is_file():
            return path
    shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*"))) or "none"
    raise BadInput(f"no checkpoint at {str(name)!r}: give a folder that `litchi train` wrote, or one of: {shipped}")


def serve_checkpoint(run: Run, checkpoint: Path) -> None:
    from litchi.envs.minigrid import Room
    from litchi.serve.run import run as serve_run

    serve_run(run.serve, load_sampler(checkpoint), lambda env, seed: Room(env))


def greet(checkpoint: Path) -> None:
    """One served request: a question about a real room, over HTTP."""
    print(f"checkpoint: {checkpoint}")


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
        raise BadInput(f"{name} has no function {function!r}")
    run = maker()
    for setting in settings:
        run = override(run, setting)
    return run


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="litchi", description="The whole life of a multimodal model.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, command in COMMANDS.items():
        sub = verbs.add_parser(name, help=(command.__doc__ or "").strip())
        sub.add_argument("recipe", nargs="?", default="tiny:demo" if name == "demo" else "tiny")
        sub.add_argument("--set", dest="settings", action="append", default=[], metavar="a.b=c")
        sub.add_argument("--folder", type=Path, help="where the run keeps its files (default runs/NAME)")
        if name == "demo":
            sub.add_argument("--stay", action="store_true", help="keep the page open at the end")
        if name == "eval":
            sub.add_argument("--checkpoint")
            sub.add_argument("--json", action="store_true")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run a verb, and turn bad input into one line and exit code 2."""
    args = parser().parse_args(argv)
    try:
        run = load_run(args.recipe, args.settings)
        place = Place(args.folder or Path("runs") / run.name)
        place.folder.mkdir(parents=True, exist_ok=True)
        return COMMANDS[args.verb](run, place, args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["find_checkpoint", "from_json", "load_run", "load_sampler", "main"]
