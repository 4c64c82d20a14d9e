"""What training frameworks leave behind is known by its layout: it is opened if it can be, else refused with the mend.

    .metadata, *.distcp                    torch.distributed.checkpoint: Megatron-core's names or Hugging Face's
    zero/NAME/fp32.pt                      DeepSpeed universal
    mp_rank_*/model_optim_rng.pt           Megatron-LM before them: refused
    metadata.json of `zarr`                Megatron-core before `torch_dist`: refused
    zero_pp_rank_*, mp_rank_*_model_states DeepSpeed as it trains: refused

The folder of a run is as good as that of its last checkpoint, if the framework noted which that is. A config.json of
Hugging Face and the tokenizer stand in the folder that is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litchi.config import BadInput
from litchi.model.distcheckpoint import METADATA, Distributed, open_distributed
from litchi.model.families import Link, family_of, links, parameters, read_config
from litchi.model.megatron import ANCHOR, Layers, check_agreement, megatron_links, read_arguments, said_config
from litchi.model.network import ModelConfig
from litchi.model.tensorfile import INDEX, WHOLE, TensorFile, show
from litchi.model.universal import FOLDER, Universal, open_universal

ANCHORS = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight", "wte.weight")
"""The table of tokens under Hugging Face's names; what stands before it stands before every weight."""

BESIDES = re.compile(r"(optim|chained_\d|opt_param|lr_sched|sched|rng|rerun|dataloader|train_state)|.*\._extra_state")
"""Names of what only resuming needs."""

NOTES = {"latest_checkpointed_iteration.txt": "iter_{:07d}", "latest_universal": "{}", "latest": "{}"}
"""Where a run notes its last checkpoint, and how its folder is called; DeepSpeed notes a universal one apart."""

CONFIG_MEND = "lay the config.json of a Hugging Face model of the same sizes, and its tokenizer, into it"


@dataclass(frozen=True, slots=True)
class Trained:
    """What was found: its configuration as ours, and the weights under the names that `links` gives."""

    config: ModelConfig
    family: str
    links: list[Link]
    tensors: TensorFile
    original: Mapping[str, Any]


def open_trained(folder: Path, original: Mapping[str, Any] | None) -> Trained | None:
    """None for a folder that no training framework wrote. `original` is the config.json in it, if there is one.

    Raises BadInput for a layout that cannot be read, naming the mend.
    """
    if any((folder / name).is_file() for name in (WHOLE, INDEX)):
        return None
    place = last_of(folder)
    refuse_others(place)
    if (place / METADATA).is_file():
        file = open_distributed(place)
        stored = bare(file.entries, (ANCHOR,))
        return open_megatron(file, stored, original) if stored else open_plain(file, original)
    if (place / FOLDER).is_dir():
        return open_deepspeed(open_universal(place), original)
    return None


def last_of(folder: Path) -> Path:
    """The checkpoint that a run's folder notes as its last, else the folder."""
    for note, written in NOTES.items():
        if (folder / note).is_file() and not (folder / METADATA).is_file():
            said = (folder / note).read_bytes()[:200].decode(errors="replace").strip()
            name = written.format(int(said)) if said.isdecimal() and "iter" in written else said
            if set(name) & set("/\\\0") or name in ("", ".", "..") or not (folder / name).is_dir():
                raise BadInput(
                    f"{folder / note} names {show(name)}, which is no folder there: name the checkpoint itself"
                )
            return folder / name
    return folder


def refuse_others(place: Path) -> None:
    found = sorted(p.name for p in place.iterdir())
    backend = json_of(place / "metadata.json").get("sharded_backend")
    if backend not in (None, "torch_dist"):
        raise BadInput(
            f"{place} is a Megatron-core checkpoint of format {show(str(backend))}, which is not read: load it in a"
            " version of Megatron that wrote it and save it with --ckpt-format torch_dist"
        )
    if any((place / name / "model_optim_rng.pt").is_file() for name in found if name.startswith("mp_rank_")):
        raise BadInput(
            f"{place} is a Megatron-LM checkpoint of format 'torch', a pickle for each rank: load it in Megatron-LM"
            " with --ckpt-convert-format torch_dist --ckpt-convert-save DIR and name DIR"
        )
    if (place / FOLDER).is_dir() or METADATA in found:
        return
    if any(re.fullmatch(r".*zero_pp_rank_.*\.pt|mp_rank_\d+_model_states\.pt", name) for name in found):
        raise BadInput(
            f"{place} holds DeepSpeed's shards, a pickle for each rank: convert them with python -m"
            f" deepspeed.checkpoint.ds_to_universal --input_folder {place} --output_folder DIR, lay config.json and the"
            " tokenizer into DIR and name DIR"
        )
    if any(name.endswith(".distcp") for name in found):
        raise BadInput(
            f"{place} has no {METADATA}, which is written last: the save was not finished, take one before it"
        )


def json_of(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- kinds --------------------------------------------------------------------------------------------------------


def open_megatron(file: Distributed, stored: Mapping[str, str], original: Mapping[str, Any] | None) -> Trained:
    args = read_arguments(file)
    if args is not None and original is not None:
        check_agreement(file, args, original)
    elif args is not None:
        original = said_config(args)
    elif original is None:
        raise BadInput(f"{file.path} keeps no arguments of Megatron-LM: {CONFIG_MEND}")
    tensors = Layers(file, stored)
    config, family = read_config(original), family_of(original)
    return Trained(config, family, megatron_links(config, tensors.entries), tensors, original)


def open_plain(file: Distributed, original: Mapping[str, Any] | None) -> Trained:
    """Hugging Face's names in pieces, as FSDP saves them."""
    said = needed(file, original)
    config, family = read_config(said), family_of(said)
    return Trained(config, family, links(config, family), Layers(file, named(file)), said)


def open_deepspeed(file: Universal, original: Mapping[str, Any] | None) -> Trained:
    said = needed(file, original)
    config, family = read_config(said), family_of(said)
    known = links(config, family)
    meta = {name: torch.empty(shape, device="meta") for name, shape in parameters(config).items()}
    shapes = {link.theirs: link.export([meta[n] for n in link.ours]).shape for link in known}
    shapes |= {name.partition(".")[2]: shape for name, shape in shapes.items()}
    names = named(file)
    if config.tied and "lm_head.weight" in names and repeats(file, names["lm_head.weight"], table_of(names)):
        del names["lm_head.weight"]
    return Trained(config, family, known, file.under(names, shapes), said)


def repeats(file: Universal, head: str, table: str) -> bool:
    """Whether a head is the table as the model computed with it: DeepSpeed adds it from there, in 16 bits."""
    a, b = file.read(head), file.read(table)
    return a.numel() == b.numel() and any(
        torch.equal(a.flatten().to(kind), b.flatten().to(kind)) for kind in (torch.bfloat16, torch.float16)
    )


def needed(file: TensorFile, original: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if original is None:
        raise BadInput(f"{file.path} says nothing of its model: {CONFIG_MEND}")
    return original


def named(file: TensorFile) -> dict[str, str]:
    if found := bare(file.entries, ANCHORS):
        return found
    first = min(file.entries, default="")
    raise BadInput(
        f"{file.path} has no {ANCHORS[0]!r}, so that its names are not Hugging Face's (one is {show(first)}): save the"
        " model with save_pretrained in the code that trained it"
    )


def table_of(names: Mapping[str, str]) -> str:
    return next(stored for name, stored in names.items() if name in ANCHORS)


def bare(entries: Iterable[str], anchors: Iterable[str]) -> dict[str, str]:
    """Weights by their own names -> the names under which they are stored; empty if no anchor is among them."""
    weights = [name for name in entries if not BESIDES.match(name)]
    for anchor in anchors:
        before = sorted((n.removesuffix(anchor) for n in weights if n == anchor or n.endswith(f".{anchor}")), key=len)
        if before:
            return {n.removeprefix(before[0]): n for n in weights if n.startswith(before[0])}
    return {}
