"""A codec folder keeps one autoencoder that others trained, for a flow to draw with, and to be given back as it came.

codec.json  codec.safetensors       a LatentCodec: its configuration, and its weights in the type they came in
original.json                       the config.json of diffusers, if it came with one
meta.json                           what this is, and SHA-256 of each file
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from litchi.config import BadInput, from_json, nearest, to_json
from litchi.model.convert import read_json
from litchi.model.latent import (
    FILES,
    HALVES,
    KNOWN,
    LatentCodec,
    LatentCodecConfig,
    keep_codec,
    kept_codec,
    read_codec,
    write_back,
)
from litchi.model.tensorfile import first_bytes, open_tensors
from litchi.model.torchfile import read_pickled
from litchi.model.weights import CODEC, ORIGINAL, check_files, publish, read_meta, replace_folder

CONFIG = "codec.json"


@dataclass(frozen=True, slots=True)
class CodecFolder:
    """A codec that is not learned here: a folder, and how many cells along a side are one row."""

    folder: Path
    pack: int = 1


def adopt_codec(source: Path, folder: Path, *, known: str = "") -> LatentCodec:
    """Write an autoencoder as a codec folder; `known` says which one a file holds that does not say so itself."""
    if known and known not in KNOWN:
        raise BadInput(
            f"{known!r} is no autoencoder that is known{nearest(known, KNOWN)}; these are: {', '.join(KNOWN)}"
        )
    if known and not source.is_file():
        raise BadInput(f"{source} is a folder, which says itself what it is: leave out --as {known}")
    said = source / "config.json"
    if source.is_file():
        known = known or FILES.get(source.name) or FILES.get(source.stem, "")
    try:
        codec = read_codec(source, KNOWN[known] if known else None)
    except BadInput as error:
        if known or "name its configuration" not in str(error):
            raise
        raise BadInput(f"{source} does not say which autoencoder it is: add --as, one of {', '.join(KNOWN)}") from error
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    (draft / CONFIG).write_text(to_json(codec.config))
    keep_codec(codec, draft / CODEC)
    if said.is_file():
        (draft / ORIGINAL).write_text(json.dumps(read_json(said), indent=1))
    publish(draft, folder, meta={"from": source.name, "family": family_of(codec)}, check=False)
    return codec


def load_codec(folder: Path, *, pack: int = 1) -> LatentCodec:
    """The codec of a folder, in fp32, with `pack` x `pack` cells a row. Raises BadInput if anything has changed."""
    check_files(folder, read_meta(folder))
    config = from_json(LatentCodecConfig, (folder / CONFIG).read_text(encoding="utf-8"))
    return kept_codec(replace(config, pack=pack), folder / CODEC)


def give_back_codec(folder: Path, place: Path) -> str:
    """Write the autoencoder of a codec folder as it came, bit for bit; returns its family.

    A folder of diffusers and single files keep their names; what was a pickle is safetensors now.
    """
    if place.exists() and any(place.iterdir()):
        raise BadInput(f"{place} is not empty: name a new folder")
    codec, original = load_codec(folder), folder / ORIGINAL
    draft = place.with_name(f".{place.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    write_back(draft, codec, read_json(original) if original.is_file() else None)
    replace_folder(draft, place)
    return family_of(codec)


def family_of(codec: LatentCodec) -> str:
    return type(codec.autoencoder).__name__


# ---- what a path holds --------------------------------------------------------------------------------------------


def is_codec(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def holds_autoencoder(source: Path) -> bool:
    """Whether others keep an autoencoder there: a folder of diffusers, the halves of a TAESD, or one file.

    Raises BadInput for a file that cannot be read, and for one half alone.
    """
    if source.is_dir():
        if (source / "model_index.json").is_file():
            raise BadInput(f"{source} is a whole pipeline of diffusers: name one part of it, such as {source / 'vae'}")
        if (source / "config.json").is_file():
            return "_class_name" in read_json(source / "config.json")
        kinds = [f"*_{half}.{kind}" for half in HALVES for kind in ("pth", "safetensors")]
        return any(path.is_file() for kind in kinds for path in source.glob(kind))
    start = first_bytes(source)[:4]
    if start == b"GGUF":
        return False
    if start == b"PK\x03\x04":
        names = list(read_pickled(source))
    else:
        with open_tensors(source) as file:
            names = list(file.entries)
    first = {name.partition(".")[0] for name in names}
    if source.stem.endswith(tuple(f"_{half}" for half in HALVES)) and all(part.isdecimal() for part in first):
        raise BadInput(f"{source} is one half of an autoencoder: name the folder that holds both")
    return not first.isdisjoint(HALVES)
